"""What the commands share: options, output for people and programs, progress bars."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from retro.errors import ConfigError

SETTINGS: dict[str, Any] = {"rich_markup_mode": None, "no_args_is_help": True, "add_completion": False}

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
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N; several for an index, as in cuda:0,cuda:1.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Overwrite = Annotated[bool, typer.Option(help="Start again where something else was begun or made.")]
ModelPath = Annotated[Path, typer.Option("--model", help="Folder of a trained model.")]
IndexPath = Annotated[Path | None, typer.Option("--index", help="Folder of an index; not needed with -k 0.")]
IndexFolder = Annotated[Path, typer.Argument(help="Folder of an index.")]
Method = Annotated[
    str,
    typer.Option(
        "--retriever",
        help="dense: by meaning; bm25: by words; hybrid: both, fused; rerank: the best by meaning, ordered by words.",
    ),
]
QuestionMethod = Annotated[
    str,
    typer.Option("--retriever", help="dense, bm25, hybrid or rerank; auto: hybrid, or dense where there is no BM25."),
]
Where = Annotated[
    str | None, typer.Option(help="""Only documents that fulfil this, as in 'lang = "en" and year >= 2000'.""")
]
Seed = Annotated[int, typer.Option(help="Of the draws.")]


def choice(value: str, allowed: tuple[str, ...], option: str) -> Any:
    """The value, if it is one of those allowed; else a usage error."""
    if value not in allowed:
        raise typer.BadParameter(f"must be one of {', '.join(allowed)}", param_hint=option)
    return value


def parse_bytes(text: str) -> int:
    """`8GiB`, `500 MB` or a plain number to bytes.

    Raises:
        ConfigError: It is none of these.
    """
    import re

    units = {"": 1, "b": 1} | {f"{p}b": 1000**i for i, p in enumerate("kmgt", 1)}
    units |= {f"{p}ib": 1024**i for i, p in enumerate("kmgt", 1)} | {p: 1024**i for i, p in enumerate("kmgt", 1)}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in units:
        raise ConfigError(f"{text!r} is no amount of memory: write it as 8GiB, 500MB or a number of bytes")
    return int(float(match[1]) * units[match[2].lower()])


def resolve_devices(names: str) -> str:
    """`auto` to what is there; several devices, separated by commas, stay several."""
    from retro.train_setup import resolve_device

    return ",".join(str(resolve_device(name)) for name in names.split(","))


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_report(report: dict[str, Any], as_json: bool) -> None:
    """Names and values, a line each."""
    if as_json:
        print_json(report)
        return
    for key, value in report.items():
        entries = value.items() if isinstance(value, dict) else [(key, value)]
        for name, entry in entries:
            if isinstance(entry, (list, tuple)):
                entry = ", ".join(map(str, entry)) or "none"  # noqa: PLW2901
            number = isinstance(entry, int) and not isinstance(entry, bool)
            text = f"{entry:,}" if number else f"{entry:,.4g}" if isinstance(entry, float) else str(entry)
            typer.echo(f"{name.replace('_', ' '):22}{text}")


def passage_json(passage: Any) -> dict[str, Any]:
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


def print_passages(passages: list[Any]) -> None:
    import shutil
    import textwrap

    width = min(shutil.get_terminal_size((100, 24)).columns, 110)
    for number, passage in enumerate(passages, 1):
        link = f"  {passage.url}" if passage.url else ""
        typer.echo(f"{number:2}. {passage.score:.3f}  {passage.title or passage.key}  [{passage.key}]{link}")
        text = " ".join(passage.full_text.split())
        typer.echo(textwrap.fill(text, width, initial_indent="    ", subsequent_indent="    "))


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
def bars() -> Iterator[Any]:
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
def train_bar() -> Iterator[Any]:
    """The bar of a training run, with its loss."""
    with bars() as report:
        yield lambda p: report("train", p.step, p.steps, f"loss {p.loss_nats:.2f} nats, {p.tokens_per_s:,.0f} tokens/s")
