"""One page of all records of a report's folder, `report.html`: self-contained, without JavaScript, without any request."""

import base64
import hashlib
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from eval.markup import Html, column, interval, join, number, tag, with_unit
from eval.plots import bars, lines
from eval.records import RECORDS, Figure, Record, read_records, write_record
from retro.artifact import write_atomically

PAGE = "report.html"
KINDS = {
    "lm": "Language modeling",
    "leakage": "Leakage",
    "retrieval": "Retrieval",
    "qa": "Question answering",
    "knn-lm": "kNN-LM",
    "attribution": "Attribution",
    "training": "Training",
    "compare": "Comparison",
}
"""Titles of the kinds, in the order of their sections."""
_SHOWN_ROWS = 200
_LONG_TEXT = 40
_NUMBERS = ("Value", "95% interval", "Over")


def finish(out: Path, record: Record, units: Mapping[str, Sequence[Any]] | None = None) -> Path:
    """Adds a record to a report's folder and writes the page again; what every command that measures calls at its end.

    Args:
        out: Folder of the report; made where it is missing.
        record: See write_record.
        units: See write_record.

    Returns:
        The record's file.

    Raises:
        StorageError: It cannot be written.
        FormatError: Another file of the folder is no record.
    """
    path = write_record(out, record, units)
    render(out)
    return path


def render(out: Path) -> Path:
    """Writes the page of all records of a folder.

    Returns:
        The page.

    Raises:
        FormatError: There is no record, or a file is none.
        StorageError: It cannot be written.
    """
    text = page(read_records(out))
    # A record may hold half a surrogate pair, which UTF-8 cannot.
    write_atomically(out / PAGE, lambda file: file.write(text.encode("utf-8", "replace")))
    return out / PAGE


def page(records: Mapping[Path, Record]) -> str:
    """The whole page; `records` as read_records gives them."""
    order = list(KINDS)
    ordered = sorted(
        records.items(), key=lambda item: order.index(item[1].kind) if item[1].kind in order else len(order)
    )
    keys = {path: "r-" + re.sub(r"[^A-Za-z0-9_-]+", "-", path.stem) for path, _ in ordered}
    style = Html(resources.files("eval").joinpath("report.css").read_text(encoding="utf-8"))
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    days = sorted({record.created[:10] for _, record in ordered if record.created})
    when = "" if not days else f", measured {days[0]}" if len(days) == 1 else f", measured {days[0]} to {days[-1]}"
    count = f"{len(ordered)} record{'s' if len(ordered) > 1 else ''}{when}."
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", "Measurements"),
        tag("style", style),
    )
    header = tag("header", tag("h1", "Measurements"), tag("p", count, class_="meta"))
    sections = [_section(path, record, keys[path]) for path, record in ordered]
    body = tag("body", header, tag("main", _summary(ordered, keys), *sections))
    return "<!DOCTYPE html>\n" + tag("html", head, "\n", body, lang="en") + "\n"


def _summary(ordered: Sequence[tuple[Path, Record]], keys: Mapping[Path, str]) -> Html:
    """The first figure of each record, with a link to all of it."""
    rows = []
    for path, record in ordered:
        link = tag("a", record.name, href=f"#{keys[path]}")
        name, figure = next(iter(record.figures.items()), ("", Figure(value=None, unit="")))
        cells = _figure_cells(figure) if record.figures else [tag("td"), tag("td")]
        first = tag("td", with_unit(name, figure.unit))
        rows.append(tag("tr", tag("th", link, tag("span", _kind(record), class_="kind"), scope="row"), first, *cells))
    return _table(
        "Summary", _head("Record", "First figure", "Value", "95% interval", right=_NUMBERS), rows, class_="figures"
    )


def _section(path: Path, record: Record, key: str) -> Html:
    facts = [f"{record.created[:16].replace('T', ' ')} UTC" if record.created else None]
    facts += [f"took {record.seconds:,.3g} s" if record.seconds else None, f"seed {record.seed}"]
    file = tag("a", path.name, href=f"{RECORDS}/{path.name}")
    return tag(
        "section",
        tag("h2", tag("span", _kind(record), class_="kind"), record.name, id=f"{key}-name"),
        tag("p", ", ".join(fact for fact in facts if fact), ", ", file, class_="meta"),
        tag("ul", *(tag("li", note) for note in record.notes), class_="notes") if record.notes else None,
        _figures(record),
        _plots(record, key),
        *(_rows(title, rows) for title, rows in record.rows.items()),
        _repeat(record),
        id=key,
        aria_labelledby=f"{key}-name",
    )


def _kind(record: Record) -> str:
    return KINDS.get(record.kind, record.kind)


def _figures(record: Record) -> Html | None:
    if not record.figures:
        return None
    rows = [
        tag(
            "tr",
            tag("th", with_unit(name, figure.unit), scope="row"),
            *_figure_cells(figure),
            tag("td", number(figure.count) if figure.count else "", class_="n"),
        )
        for name, figure in record.figures.items()
    ]
    return _table(f"Figures of {record.name}", _head("Figure", *_NUMBERS, right=_NUMBERS), rows, class_="figures")


def _figure_cells(figure: Figure) -> list[Html]:
    spread = None if figure.low is None or figure.high is None else (figure.high - figure.low) / 2
    between = interval(figure.low, figure.high)
    return [tag("td", number(figure.value, spread), class_="n"), tag("td", between, class_="n between")]


def _plots(record: Record, key: str) -> Html | None:
    drawn = [
        bars(figures, title, f"{key}-b{place}") for place, (title, figures) in enumerate(figure_groups(record.figures))
    ]
    drawn += [lines(curve, title, f"{key}-c{place}") for place, (title, curve) in enumerate(record.curves.items())]
    return tag("div", *drawn, class_="plots") if drawn else None


def figure_groups(figures: Mapping[str, Figure]) -> Iterator[tuple[str, dict[str, Figure]]]:
    """What is drawn together: figures of one unit whose names begin alike, two or more, and not all of them 0."""
    groups: dict[tuple[str, str], dict[str, Figure]] = {}
    for name, figure in figures.items():
        if figure.unit and figure.value is not None and math.isfinite(figure.value):
            start, *rest = re.split(", |: ", name, maxsplit=1)
            groups.setdefault((figure.unit, start if rest else ""), {})[rest[0] if rest else name] = figure
    yield from (
        (start or f"Figures in {unit}", group)
        for (unit, start), group in groups.items()
        if len(group) > 1 and any(f.value for f in group.values())
    )


def _rows(title: str, rows: Sequence[Mapping[str, Any]]) -> Html | None:
    if not rows:
        return tag("p", f"{title}: none.")
    names, shown = list(rows[0]), rows[:_SHOWN_ROWS]
    columns, classes = [], []
    for place, name in enumerate(names):
        values = [row.get(name) for row in shown]
        numeric = place > 0 and all(isinstance(v, int | float | None) and not isinstance(v, bool) for v in values)
        columns.append(column(values) if numeric else [_cell(value) for value in values])
        classes.append("n" if numeric else "long" if any(len(text) > _LONG_TEXT for text in columns[-1]) else None)
    # The first column names the row.
    body = [
        tag(
            "tr",
            tag("th", first, scope="row", class_=classes[0]),
            *(tag("td", text, class_=c) for text, c in zip(rest, classes[1:], strict=True)),
        )
        for first, *rest in zip(*columns, strict=True)
    ]
    if len(rows) > len(shown):
        title += f" (the first {len(shown)} of {len(rows):,} rows; all are in the record)"
    right = [name for name, c in zip(names, classes, strict=True) if c == "n"]
    return _table(title, _head(*names, right=right), body)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return number(value) if isinstance(value, int | float) else str(value)


def _repeat(record: Record) -> Html:
    tables = [
        _settings("Configuration", dict(_flat(record.configuration))),
        _settings("Environment", dict(_flat(record.environment))),
        _settings("Fingerprints", record.fingerprints),
    ]
    command = tag("pre", tag("code", shlex.join(record.command))) if record.command else None
    return tag(
        "details", tag("summary", "How to repeat it"), command, tag("div", *tables, class_="columns"), class_="repeat"
    )


def _settings(title: str, settings: Mapping[str, Any]) -> Html | None:
    if not settings:
        return None
    rows = [tag("tr", tag("th", key, scope="row"), tag("td", _cell(value))) for key, value in settings.items()]
    return _table(title, None, rows, class_="settings")


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings with dots in their names."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", ", ".join(map(str, value)) or "none" if isinstance(value, list | tuple) else value


def _head(*columns: str, right: Sequence[str] = ()) -> Html:
    cells = (tag("th", column, scope="col", class_="n" if column in right else None) for column in columns)
    return tag("thead", tag("tr", *cells))


def _table(caption: str, head: Html | None, rows: Sequence[Html], class_: str | None = None) -> Html:
    """A table in a frame that scrolls by itself where it is wider than the screen, with the keyboard too."""
    table = tag("table", tag("caption", caption), head, tag("tbody", join(*rows)), class_=class_)
    return tag("div", table, class_="scroll", tabindex="0", role="group", aria_label=caption)
