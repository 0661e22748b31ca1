"""The `retro` command: composes the commands of the three packages. Nothing heavy is imported before it is needed."""

import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from retro.errors import RetroError

for _name in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "HF_DATASETS_DISABLE_TELEMETRY"):
    os.environ.setdefault(_name, "1")

_SETTINGS: dict[str, Any] = {"rich_markup_mode": None, "no_args_is_help": True, "add_completion": False}
app = typer.Typer(
    help="Retrieval-enhanced language models: index a corpus, train with its neighbors, ask.\n\n"
    "\b\nFirst steps:\n  retro demo\n  retro index build my_folder --out my.index\n"
    '  retro index search my.index "a question" -k 5',
    **_SETTINGS,
)
index_app = typer.Typer(help="Build, search and check an index.", **_SETTINGS)
tokenizer_app = typer.Typer(help="Train a tokenizer.", **_SETTINGS)
app.add_typer(index_app, name="index")
app.add_typer(tokenizer_app, name="tokenizer")

Corpora = Annotated[
    list[str],
    typer.Argument(help="Files, folders, NAME=PATH, or hf:NAME[@REVISION][/CONFIG]:SPLIT.", metavar="CORPUS..."),
]
TextField = Annotated[str, typer.Option(help="Field that holds the text.")]
IdField = Annotated[str, typer.Option(help="Field that holds the id.")]
TitleField = Annotated[str, typer.Option(help="Field that holds the title.")]
Limit = Annotated[int | None, typer.Option(help="Read at most this many documents.")]
OnError = Annotated[str, typer.Option(help="stop, or skip: leave bad records out and list them in rejects.jsonl.")]
MaxChars = Annotated[int, typer.Option(help="Longest document accepted, in characters.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Overwrite = Annotated[bool, typer.Option(help="Start again where something else was begun or made.")]
ModelPath = Annotated[Path, typer.Option("--model", help="Folder of a trained model.")]
IndexPath = Annotated[Path | None, typer.Option("--index", help="Folder of an index; not needed with -k 0.")]
Seed = Annotated[int, typer.Option(help="Of the draws.")]


# --- index --------------------------------------------------------------------------------------------------------


@index_app.command("build")
def index_build(
    corpora: Corpora,
    out: Annotated[Path, typer.Option(help="Folder of the index.")],
    encoder: Annotated[str, typer.Option(help="A sentence-transformers model: folder or name on the hub.")] = "",
    revision: Annotated[str | None, typer.Option(help="Revision of the encoder on the hub.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Whose tokens a chunk counts [the encoder's].")] = None,
    chunk_len: Annotated[int, typer.Option(help="Tokens of a chunk.")] = 64,
    title_in_key: Annotated[bool, typer.Option(help="Put the title in front of stored chunks when encoding.")] = False,
    index_type: Annotated[str, typer.Option(help="auto, or a factory string of FAISS.")] = "auto",
    shard_chunks: Annotated[int, typer.Option(help="Chunks of a shard.")] = 4096,
    text_field: TextField = "text",
    id_field: IdField = "id",
    title_field: TitleField = "title",
    limit: Limit = None,
    on_error: OnError = "stop",
    max_document_chars: MaxChars = 10_000_000,
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Turn a corpus into a searchable index; run again, an interrupted build goes on.

    \b
    Example:
      retro index build wiki.jsonl --out wiki.index
    """
    from index_builder.build import build_index
    from index_builder.config import DEFAULT_ENCODER, BuildConfig

    config = BuildConfig(
        encoder=encoder or DEFAULT_ENCODER,
        revision=revision,
        tokenizer=tokenizer,
        chunk_len=chunk_len,
        title_in_key=title_in_key,
        index_type=index_type,
        shard_chunks=shard_chunks,
        read=_read_options(text_field, id_field, title_field, limit, on_error, max_document_chars),
    )
    with _bars() as progress:
        manifest = build_index(corpora, out, config, device=_device(device), overwrite=overwrite, progress=progress)
    _show_index(out, manifest, as_json)


@index_app.command("search")
def index_search(
    index: Annotated[Path, typer.Argument(help="Folder of an index.")],
    query: Annotated[str, typer.Argument(help="A question, or any text.")],
    k: Annotated[int, typer.Option("-k", help="Passages to show.")] = 5,
    role: Annotated[
        str, typer.Option(help="query for a question, document for a text like the stored ones.")
    ] = "query",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Show the passages nearest in meaning.

    \b
    Example:
      retro index search wiki.index "When did the 1973 oil crisis begin?" -k 5 --json
    """
    from index_builder.search import IndexRetriever

    if role not in ("query", "document"):
        raise typer.BadParameter("must be query or document", param_hint="--role")
    retriever = IndexRetriever.open(index, device=_device(device))
    started = time.perf_counter()
    passages = retriever.retrieve([query], k, role="query" if role == "query" else "document")[0]
    seconds = time.perf_counter() - started
    if as_json:
        _print_json({"query": query, "seconds": round(seconds, 4), "results": [_passage_json(p) for p in passages]})
        return
    _print_passages(passages)


@index_app.command("info")
def index_info(
    index: Annotated[Path, typer.Argument(help="Folder of an index.")],
    as_json: AsJson = False,
) -> None:
    """Show what an index holds and how it was made.

    \b
    Example:
      retro index info wiki.index
    """
    from retro.artifact import read_manifest

    _show_index(index, read_manifest(index, "index"), as_json)


@index_app.command("verify")
def index_verify(
    index: Annotated[Path, typer.Argument(help="Folder of an index.")],
    as_json: AsJson = False,
) -> None:
    """Compare every byte of an index with its checksums; exit code 1 where something differs.

    \b
    Example:
      retro index verify wiki.index
    """
    from index_builder.build import verify_index

    problems = verify_index(index)
    if as_json:
        _print_json({"index": str(index), "intact": not problems, "problems": problems})
    else:
        typer.echo("\n".join(problems) if problems else f"{index} is intact")
    if problems:
        raise typer.Exit(1)


# --- tokenizer, data ----------------------------------------------------------------------------------------------


@tokenizer_app.command("train")
def tokenizer_train(
    corpora: Corpora,
    out: Annotated[Path, typer.Option(help="Folder of the tokenizer.")],
    vocab_size: Annotated[int, typer.Option(help="Entries, 256 bytes and 2 special tokens included.")] = 16384,
    text_field: TextField = "text",
    id_field: IdField = "id",
    title_field: TitleField = "title",
    limit: Limit = None,
    on_error: OnError = "stop",
    max_document_chars: MaxChars = 10_000_000,
    overwrite: Overwrite = False,
) -> None:
    """Train a byte-level BPE on a corpus.

    \b
    Example:
      retro tokenizer train wiki.jsonl --vocab-size 8192 --out wiki.tok
    """
    from index_builder.build import train_tokenizer

    options = _read_options(text_field, id_field, title_field, limit, on_error, max_document_chars)
    with _bars() as progress:
        tokenizer = train_tokenizer(
            corpora, out, vocab_size=vocab_size, options=options, overwrite=overwrite, progress=progress
        )
    typer.echo(f"{out}: {tokenizer.vocab_size:,} tokens, fingerprint {tokenizer.fingerprint}")


@app.command("data")
def data(
    corpora: Corpora,
    tokenizer: Annotated[str, typer.Option(help="Of the model: a folder, a tokenizer.json, or a name on the hub.")],
    index: Annotated[Path, typer.Option(help="Index that the neighbors come from.")],
    out: Annotated[Path, typer.Option(help="Folder of the training data.")],
    k: Annotated[int, typer.Option("-k", help="Neighbors of a chunk.")] = 2,
    neighbor_len: Annotated[int, typer.Option(help="Tokens of a neighbor that are kept.")] = 128,
    chunk_len: Annotated[int, typer.Option(help="Tokens of a chunk of the model.")] = 64,
    exclude: Annotated[str, typer.Option(help="group, or none: a chunk may then find itself.")] = "group",
    valid_share: Annotated[float, typer.Option(help="Held out where documents name no split.")] = 0.02,
    test_share: Annotated[float, typer.Option(help="Held out where documents name no split.")] = 0.02,
    seed: Seed = 0,
    text_field: TextField = "text",
    id_field: IdField = "id",
    title_field: TitleField = "title",
    limit: Limit = None,
    on_error: OnError = "stop",
    max_document_chars: MaxChars = 10_000_000,
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Tokenize a corpus for a model and look up the neighbors of all its chunks.

    \b
    Example:
      retro data wiki.jsonl --tokenizer wiki.tok --index wiki.index -k 2 --out wiki.data
    """
    from index_builder.config import DataConfig
    from index_builder.neighbors import build_training_data
    from index_builder.search import IndexRetriever
    from retro.tokenizer import Tokenizer

    if exclude not in ("group", "none"):
        raise typer.BadParameter("must be group or none", param_hint="--exclude")
    config = DataConfig(
        num_neighbors=k,
        neighbor_len=neighbor_len,
        chunk_len=chunk_len,
        exclude="group" if exclude == "group" else "none",
        valid_share=valid_share,
        test_share=test_share,
        seed=seed,
        read=_read_options(text_field, id_field, title_field, limit, on_error, max_document_chars),
    )
    opened = Tokenizer.load(tokenizer)
    retriever = IndexRetriever.open(index, device=_device(device))
    with _bars() as progress:
        manifest = build_training_data(
            corpora, out, tokenizer=opened, retriever=retriever, config=config, overwrite=overwrite, progress=progress
        )
    shown = {key: manifest[key] for key in ("documents", "chunks", "tokens", "chunks_with_neighbors", "rejects")}
    if as_json:
        _print_json({"data": str(out), **shown})
    else:
        typer.echo(f"{out}: " + ", ".join(f"{value:,} {key.replace('_', ' ')}" for key, value in shown.items()))


# --- train, generate, ask -----------------------------------------------------------------------------------------


@app.command("train")
def train(
    config: Annotated[Path | None, typer.Argument(help="TOML file with [model] and [train].")] = None,
    preset: Annotated[str | None, typer.Option(help="Start from a preset: tiny or small.")] = None,
    data: Annotated[Path | None, typer.Option(help="Training data; same as --set train.data=...")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the model; same as --set train.out=...")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a key: train.steps=100.")] = None,
    print_config: Annotated[bool, typer.Option(help="Print the resolved configuration and stop.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Train a model; run again, an interrupted training goes on exactly.

    \b
    Example (a quick trial):
      retro train --preset tiny --data wiki.data --out wiki.model --set train.steps=20
    """
    from retro.config import config_to_dict, load_run_config

    overrides = list(set_ or [])
    overrides += [f"train.data='{data}'"] if data is not None else []
    overrides += [f"train.out='{out}'"] if out is not None else []
    run = load_run_config(config, overrides, preset=preset)
    if print_config:
        _print_json(config_to_dict(run))
        return
    from retro import train as training

    with _train_bar() as progress:
        folder = training.train(run, overwrite=overwrite, progress=progress)
    typer.echo(f"{folder}: trained for {run.train.steps:,} steps; losses in {folder / 'metrics.jsonl'} and loss.png")


@app.command("generate")
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    model: ModelPath,
    index: IndexPath = None,
    k: Annotated[int, typer.Option("-k", help="Neighbors at each chunk border; 0 turns retrieval off.")] = 2,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the continuation.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw among this many tokens; 0 means all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw among tokens with this much probability.")] = 1.0,
    seed: Seed = 0,
    stream: Annotated[bool, typer.Option(help="Print while generating.")] = False,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Continue a text, retrieving neighbors at every chunk border.

    \b
    Example:
      retro generate --model wiki.model --index wiki.index "The oil crisis of 1973" --max-new-tokens 80
    """
    from retro.config import GenerateConfig
    from retro.generate import generate as run_generate

    settings = GenerateConfig(
        max_new_tokens=max_new_tokens,
        num_neighbors=k,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    loaded, tokenizer, retriever = _open_model(model, index if k > 0 else None, _device(device))
    streaming = stream and not as_json
    result = run_generate(
        loaded,
        tokenizer,
        [prompt],
        settings,
        retriever=retriever,
        on_token=(lambda _, piece: typer.echo(piece, nl=False)) if streaming else None,
    )[0]
    if as_json:
        retrieved = {chunk: [_passage_json(p) for p in few] for chunk, few in result.retrieved.items()}
        _print_json(
            {"prompt": prompt, "text": result.text, "finished": result.finished, "tokens": len(result.ids)}
            | {"retrieved": retrieved}
        )
    else:
        typer.echo("" if streaming else prompt + result.text)


@app.command("ask")
def ask(
    question: Annotated[str, typer.Argument(help="A question.")],
    model: ModelPath,
    index: IndexPath = None,
    k: Annotated[int, typer.Option("-k", help="Passages to read; 0 answers without.")] = 10,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 32,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Answer a question and show the passages the answer came from.

    \b
    Example:
      retro ask --model wiki.model --index wiki.index "When did the 1973 oil crisis begin?" -k 5
    """
    from retro.answer import NEIGHBOR_LEN, question_prompt
    from retro.answer import ask as run_ask
    from retro.config import GenerateConfig

    question_prompt(question)
    settings = GenerateConfig(num_neighbors=k, neighbor_len=NEIGHBOR_LEN, max_new_tokens=max_new_tokens)
    loaded, tokenizer, retriever = _open_model(model, index if k > 0 else None, _device(device))
    answer = run_ask(loaded, tokenizer, question, retriever=retriever, config=settings)
    if as_json:
        _print_json(
            {
                "question": question,
                "answer": answer.text,
                "confidence": round(answer.confidence, 4),
                "passages": [_passage_json(p) for p in answer.passages],
            }
        )
        return
    typer.echo(f"{answer.text}   (confidence {answer.confidence:.2f})\n")
    _print_passages(answer.passages)


# --- demo, env ----------------------------------------------------------------------------------------------------


@app.command("demo")
def demo(
    folder: Annotated[
        Path, typer.Option("--dir", help="Where demo.index, demo.data and demo.model are made.")
    ] = Path(),
    device: Device = "auto",
) -> None:
    """The whole path on a small corpus: index, search, train, ask. Run again, finished stages are reused.

    \b
    Example:
      retro demo
    """
    from retro.demo import run_demo

    run_demo(folder, device=_device(device), bars=_bars, train_bar=_train_bar)


@app.command("env")
def env(as_json: AsJson = False) -> None:
    """Print what a bug report needs.

    \b
    Example:
      retro env
    """
    import importlib.metadata
    import platform

    import torch

    packages = "retro-lm torch numpy faiss-cpu faiss-gpu sentence-transformers transformers tokenizers datasets pyarrow"
    versions: dict[str, Any] = {}
    for package in packages.split():
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    report = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "packages": versions,
    }
    if as_json:
        _print_json(report)
        return
    for key, value in report.items():
        if key != "packages":
            typer.echo(f"{key:24}{', '.join(value) or 'none' if isinstance(value, list) else value}")
    for package, version in versions.items():
        typer.echo(f"{package:24}{version or 'not installed'}")


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="More messages on stderr.")] = False,
) -> None:
    if version:
        import importlib.metadata

        typer.echo(importlib.metadata.version("retro-lm"))
        raise typer.Exit
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s %(message)s", stream=sys.stderr
    )
    for name in ("retro", "index_builder", "eval"):
        logging.getLogger(name).setLevel(logging.INFO)
    for name in ("faiss", "httpx", "sentence_transformers", "transformers"):
        logging.getLogger(name).setLevel(logging.WARNING)


def main() -> None:
    """Entry point: a RetroError is one line on stderr and exit code 1; usage is 2, an interrupt 130."""
    try:
        app()
    except RetroError as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        typer.echo("Interrupted. What is finished is kept: run the same command again to go on.", err=True)
        sys.exit(130)


# --- shared by the commands ---------------------------------------------------------------------------------------


def _read_options(
    text_field: str, id_field: str, title_field: str, limit: int | None, on_error: str, max_document_chars: int
) -> Any:
    from index_builder.corpus import ReadOptions

    if on_error not in ("stop", "skip"):
        raise typer.BadParameter("must be stop or skip", param_hint="--on-error")
    return ReadOptions(
        text_field=text_field,
        id_field=id_field,
        title_field=title_field,
        limit=limit,
        on_error="stop" if on_error == "stop" else "skip",
        max_document_chars=max_document_chars,
    )


def _device(name: str) -> str:
    from retro.train import resolve_device

    return str(resolve_device(name))


def _open_model(model: Path, index: Path | None, device: str) -> tuple[Any, Any, Any]:
    from retro.checkpoint import load_model

    loaded, tokenizer, _ = load_model(model, device)
    if index is None:
        return loaded, tokenizer, None
    from index_builder.search import IndexRetriever

    return loaded, tokenizer, IndexRetriever.open(index, device=device)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def _passage_json(passage: Any) -> dict[str, Any]:
    return {
        "score": passage.score,
        "key": passage.key,
        "title": passage.title,
        "url": passage.url,
        "text": passage.text,
        "continuation": passage.continuation,
        "row": passage.row,
        "metadata": json.loads(passage.metadata),
    }


def _print_passages(passages: list[Any]) -> None:
    import shutil
    import textwrap

    width = min(shutil.get_terminal_size((100, 24)).columns, 110)
    for number, passage in enumerate(passages, 1):
        link = f"  {passage.url}" if passage.url else ""
        typer.echo(f"{number:2}. {passage.score:.3f}  {passage.title or passage.key}  [{passage.key}]{link}")
        text = " ".join(passage.full_text.split())
        typer.echo(textwrap.fill(text, width, initial_indent="    ", subsequent_indent="    "))


def _show_index(folder: Path, manifest: dict[str, Any], as_json: bool) -> None:
    size = sum(record["bytes"] for record in manifest["files"].values())
    encoder = manifest["encoder"]
    report = {
        "index": str(folder),
        "documents": manifest["documents"],
        "chunks": manifest["chunks"],
        "rejects": manifest["rejects"],
        "truncated_chunks": manifest["truncated_chunks"],
        "chunk_len": manifest["chunk_len"],
        "encoder": encoder["name"],
        "dim": encoder["dim"],
        "metric": manifest["index"]["metric"],
        "index_type": manifest["index"]["factory"],
        "reason": manifest["index"]["reason"],
        "bytes": size,
    }
    if as_json:
        _print_json(report)
        return
    for key, value in report.items():
        typer.echo(
            f"{key.replace('_', ' '):18}{value:,}" if isinstance(value, int) else f"{key.replace('_', ' '):18}{value}"
        )


class _Lines:
    """Progress where there is no terminal: a line every 30 seconds and at the end of a stage."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self, stage: str, done: int, total: int | None, note: str = "") -> None:
        now = time.monotonic()
        if done == total or now - self._last >= 30:
            self._last = now
            typer.echo(f"{stage}: {done:,}{f' of {total:,}' if total else ''} {note}".rstrip(), err=True)


@contextmanager
def _bars() -> Iterator[Any]:
    """One bar a stage with rate and time left on a terminal, lines elsewhere."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:>20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    tasks: dict[str, tuple[TaskID, float, int]] = {}
    with Progress(*columns, console=Console(stderr=True)) as bars:

        def report(stage: str, done: int, total: int | None, note: str = "") -> None:
            if stage not in tasks:
                tasks[stage] = (bars.add_task(stage, total=total, note=""), time.monotonic(), done)
            task, started, first = tasks[stage]
            seconds = time.monotonic() - started
            rate = f"{(done - first) / seconds:,.1f}/s" if seconds > 0.5 else ""
            bars.update(task, completed=done, total=total, note=f"{rate} {note}".strip())

        yield report


@contextmanager
def _train_bar() -> Iterator[Any]:
    """The bar of a training run, with its loss."""
    with _bars() as bars:
        yield lambda p: bars("train", p.step, p.steps, f"loss {p.loss_nats:.2f} nats, {p.tokens_per_s:,.0f} tokens/s")
