"""The whole path on the bundled corpus: index, search, answers, a changed index, training. `retro demo` and `make demo` run it."""

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import typer

from retro.errors import FormatError

CORPUS, QUESTIONS, MODEL = "squad11_dev_paragraphs.jsonl.xz", "squad11_dev.jsonl.xz", "answers.model"
SEARCHES = (
    "When did the 1973 oil crisis begin?",
    "What do plants use chlorophyll for?",
    "Which NFL team won Super Bowl 50?",
)
ASKED = (
    "When did the 1973 oil crisis begin?",
    "What is the capital of Poland?",
    "Which NFL team won Super Bowl 50?",
    "Who translated the Bible into German?",
    "In which state is the city of Jacksonville?",
)
"""About articles that the bundled model was not trained on (see examples/answers.py)."""
FACT_QUESTION = "Where was the chess congress of 2031 held?"
FACT = {
    "id": "chess-2031",
    "title": "Chess congress of 2031",
    "text": "The chess congress of 2031 was held in Lisbon. It was the first one in which no game was longer than an hour.",
}
"""Something that no model knows, for the last step."""


def examples_folder() -> Path:
    """The bundled corpus: inside the installed package, or beside it in a checkout.

    Raises:
        FormatError: It is in neither place.
    """
    for folder in (Path(__file__).parent / "examples", Path(__file__).parent.parent / "examples"):
        if (folder / CORPUS).is_file():
            return folder
    raise FormatError(f"the bundled corpus {CORPUS} is missing: install retro-lm again")


def bundled_model() -> Path:
    """Folder of the model that comes with the project.

    Raises:
        FormatError: It is not there.
    """
    folder = examples_folder() / MODEL
    if not folder.is_dir():
        raise FormatError(f"the bundled model {MODEL} is missing: install retro-lm again, or name a model of your own")
    return folder


def run_demo(
    folder: Path,
    *,
    device: str,
    bars: Callable[[], AbstractContextManager[Any]],
    train_bar: Callable[[], AbstractContextManager[Any]] | None = None,
) -> None:
    """Runs every stage that is not finished yet; results go to stdout.

    Args:
        folder: Where artifacts are made.
        device: Of everything.
        bars: Progress of an index.
        train_bar: Progress of training, where a model of one's own is to be trained, too.
    """
    from index_builder.build import build_index
    from index_builder.config import BuildConfig
    from index_builder.live import add_documents, remove_documents
    from index_builder.search import IndexRetriever
    from retro.answer import DONT_KNOW, ask
    from retro.checkpoint import load_model
    from retro.threshold import load_threshold

    started = time.monotonic()
    index = folder / "demo.index"
    _headline("1. Index", "2,067 paragraphs of 48 Wikipedia articles, cut into chunks, encoded, made searchable.")
    with bars() as progress:
        build_index([f"squad={examples_folder() / CORPUS}"], index, BuildConfig(), device=device, progress=progress)
    retriever = IndexRetriever.open(index, device=device, method="auto")
    _headline("2. Search", "Three questions, the best passages of each.")
    for query in SEARCHES:
        typer.echo(f"\n  {query}")
        for passage in retriever.retrieve([query], 2, role="query")[0]:
            _show(passage.score, passage.title, passage.full_text)

    _headline("3. Answers", "The bundled model reads ten passages for each question; here are the first three of them.")
    network, tokenizer, _ = load_model(bundled_model(), device)
    threshold = load_threshold(bundled_model())

    def show(question: str, count: int = 3) -> None:
        answer = ask(network, tokenizer, question, retriever=retriever)
        said, confidence = " ".join(answer.text.split()), f"confidence {answer.confidence:.2f}"
        is_known = threshold is None or answer.confidence >= threshold.min_confidence
        typer.echo(
            f"\n  {question}\n  -> "
            + (f"{said}   ({confidence})" if is_known else f"{DONT_KNOW}   ({said}, {confidence})")
        )
        for passage in answer.passages[:count]:
            _show(passage.score, passage.title, passage.full_text)

    for question in ASKED:
        show(question)

    _headline("4. Knowledge by index", "A document is added, asked about, and removed again. Nothing is trained.")
    show(FACT_QUESTION, 1)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "news.jsonl"
        path.write_text(json.dumps(FACT) + "\n", encoding="utf-8")
        add_documents(index, [f"news={path}"], update=True, device=device, encoder=retriever.encoder)
    show(FACT_QUESTION, 1)
    remove_documents(index, [f"news:{FACT['id']}"])
    show(FACT_QUESTION, 1)
    if train_bar is not None:
        _train(folder, retriever, device=device, bars=bars, train_bar=train_bar)

    _headline("Your own folder", f"Done in {time.monotonic() - started:.0f} s. Next, with your files:")
    typer.echo('\n  retro index build my_folder --out my.index\n  retro ask --index my.index "your question"\n')


def _train(
    folder: Path,
    retriever: Any,
    *,
    device: str,
    bars: Callable[[], AbstractContextManager[Any]],
    train_bar: Callable[[], AbstractContextManager[Any]],
) -> None:
    """A tokenizer, training data and a tiny model out of the same corpus."""
    from index_builder.build import train_tokenizer
    from index_builder.config import DataConfig
    from index_builder.corpus import ReadOptions
    from index_builder.neighbors import build_training_data
    from retro import train as training
    from retro.checkpoint import read_config
    from retro.config import PRESETS, RunConfig

    corpus, data, model = [f"squad={examples_folder() / CORPUS}"], folder / "demo.data", folder / "demo.model"
    _headline(
        "5. Training data",
        "The same paragraphs in a tokenizer of their own, each chunk with two neighbors from other paragraphs.",
    )
    with bars() as progress:
        tokenizer = train_tokenizer(
            corpus, folder / "demo.tok", vocab_size=8192, options=ReadOptions(), progress=progress
        )
        build_training_data(
            corpus, data, tokenizer=tokenizer, retriever=retriever, config=DataConfig(), progress=progress
        )
    tiny = PRESETS["tiny"]
    run = RunConfig(
        model=tiny.model,
        train=dataclasses.replace(
            tiny.train, data=str(data), out=str(model), device=device, steps=400, warmup_steps=40
        ),
    )
    _headline("6. Training", "A language model of 2.4 million parameters reads them for a few minutes.")
    with train_bar() as progress:
        training.train(run, progress=progress)
    figures = read_config(model)["training"]
    loss = {kind: figures[f"test_loss_{kind}_nats"] for kind in ("on", "off", "shuffled")}
    typer.echo(
        "\n  Test loss in nats per token: "
        f"{loss['on']:.3f} with its neighbors, {loss['off']:.3f} without, {loss['shuffled']:.3f} with those of others."
    )


def _headline(title: str, text: str) -> None:
    typer.echo(f"\n{title}\n{'-' * len(title)}\n{text}")


def _show(score: float, title: str, text: str) -> None:
    line = " ".join(text.split())
    typer.echo(f"    {score:.2f}  {title}: {line[:150]}{'...' if len(line) > 150 else ''}")
