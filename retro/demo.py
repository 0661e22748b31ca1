"""The whole path on the bundled corpus: index, search, training data, training, answers. `retro demo` and `make demo` run it."""

import dataclasses
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import typer

from retro.errors import FormatError

CORPUS, QUESTIONS = "squad11_dev_paragraphs.jsonl.xz", "squad11_dev.jsonl.xz"
SEARCHES = (
    "When did the 1973 oil crisis begin?",
    "What do plants use chlorophyll for?",
    "Which NFL team won Super Bowl 50?",
)
ASKED = (
    "When did the 1973 oil crisis begin?",
    "Who founded the Mongol Empire?",
    "What is the capital of Poland?",
    "Which company made the Apollo lunar module?",
    "What gas do plants release during photosynthesis?",
)


def examples_folder() -> Path:
    """The bundled corpus: inside the installed package, or beside it in a checkout.

    Raises:
        FormatError: It is in neither place.
    """
    for folder in (Path(__file__).parent / "examples", Path(__file__).parent.parent / "examples"):
        if (folder / CORPUS).is_file():
            return folder
    raise FormatError(f"the bundled corpus {CORPUS} is missing: install retro-lm again")


def run_demo(
    folder: Path,
    *,
    device: str,
    bars: Callable[[], AbstractContextManager[Any]],
    train_bar: Callable[[], AbstractContextManager[Any]],
) -> None:
    """Runs every stage that is not finished yet; results go to stdout."""
    from index_builder.build import build_index, train_tokenizer
    from index_builder.config import BuildConfig, DataConfig
    from index_builder.corpus import ReadOptions
    from index_builder.neighbors import build_training_data
    from index_builder.search import IndexRetriever
    from retro import train as training
    from retro.answer import ask
    from retro.checkpoint import load_model
    from retro.config import PRESETS, RunConfig

    started = time.monotonic()
    corpus = [f"squad={examples_folder() / CORPUS}"]
    index, data, model = folder / "demo.index", folder / "demo.data", folder / "demo.model"
    _headline("1. Index", "2,067 paragraphs of 48 Wikipedia articles, cut into chunks, encoded, made searchable.")
    with bars() as progress:
        build_index(corpus, index, BuildConfig(), device=device, progress=progress)
    retriever = IndexRetriever.open(index, device=device)
    _headline("2. Search", "Three questions, the best passages of each.")
    for query in SEARCHES:
        typer.echo(f"\n  {query}")
        for passage in retriever.retrieve([query], 2, role="query")[0]:
            _show(passage.score, passage.title, passage.full_text)

    _headline(
        "3. Training data",
        "The same paragraphs in the model's tokens, each chunk with two neighbors from other paragraphs.",
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
    _headline("4. Training", "A model of 2.4 million parameters reads them for a few minutes.")
    with train_bar() as progress:
        training.train(run, progress=progress)
    network, own_tokenizer, info = load_model(model, device)
    loss = {kind: info["training"][f"test_loss_{kind}_nats"] for kind in ("on", "off", "shuffled")}
    typer.echo(
        "\n  Test loss in nats per token: "
        f"{loss['on']:.3f} with its neighbors, {loss['off']:.3f} without, {loss['shuffled']:.3f} with those of others."
    )

    _headline("5. Answers", "Five questions, each with the passages that the model read.")
    typer.echo(
        "\n  A model that was trained for minutes answers badly; its passages are right.\n"
        "  Look at the passages: they are what a trained model reads its answer from."
    )
    for question in ASKED:
        answer = ask(network, own_tokenizer, question, retriever=retriever)
        typer.echo(f"\n  {question}\n  -> {' '.join(answer.text.split())}   (confidence {answer.confidence:.2f})")
        for passage in answer.passages[:3]:
            _show(passage.score, passage.title, passage.full_text)

    _headline("Your own folder", f"Done in {time.monotonic() - started:.0f} s. Next, with your files:")
    typer.echo('\n  retro index build my_folder --out my.index\n  retro index search my.index "your question" -k 5\n')


def _headline(title: str, text: str) -> None:
    typer.echo(f"\n{title}\n{'-' * len(title)}\n{text}")


def _show(score: float, title: str, text: str) -> None:
    line = " ".join(text.split())
    typer.echo(f"    {score:.2f}  {title}: {line[:150]}{'...' if len(line) > 150 else ''}")
