"""`retro eval readme`: tables of results in a text file, taken from records.

Between `<!-- results:NAME -->` and `<!-- /results -->`, each alone on its line, stand the figures of a record; between
`<!-- results:NAME#TITLE -->` and its end one of its tables. NAME is a record's file in a report, or its beginning without the
number (`lm-wiki.model`): the newest of that name then.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.markup import column, interval, number, with_unit
from eval.records import Record, read_records
from retro.artifact import write_atomically
from retro.errors import ConfigError, FormatError, MismatchError

_BEGIN = re.compile(r"<!-- results:(?P<name>[^\s#]+)(?:#(?P<title>.+?))? -->")
_END = "<!-- /results -->"
_NUMBER = re.compile(r"-\d{3,}$")


def fill(readme: Path, reports: Sequence[Path], *, check: bool = False) -> int:
    """Writes the tables of records into a file.

    Args:
        readme: The file.
        reports: Folders of reports, or files of records.
        check: Write nothing.

    Returns:
        How many tables there are.

    Raises:
        ConfigError: The file has no marker, or names what no report or two reports have.
        FormatError: A marker has no end, or there are no records.
        MismatchError: With `check`: the file differs from the records.
        StorageError: It cannot be written.
    """
    try:
        text = readme.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{readme} cannot be read as UTF-8 text: {error}") from error
    by_name = _by_name(reports)
    lines = text.splitlines(keepends=True)
    written: list[str] = []
    changed: list[str] = []
    count = 0
    while lines:
        line = lines.pop(0)
        written.append(line)
        begin = _BEGIN.fullmatch(line.strip())
        if begin is None:
            continue
        old = []
        while lines and lines[0].strip() != _END and not _BEGIN.fullmatch(lines[0].strip()):
            old.append(lines.pop(0))
        if not lines or lines[0].strip() != _END:
            raise FormatError(f"{readme}: {line.strip()} has no end: write {_END} on a line of its own below it")
        newline = "\r\n" if line.endswith("\r\n") else "\n"
        new = [row + newline for row in _table(begin["name"], begin["title"], by_name)]
        if new != old:
            changed.append(begin["name"])
        written += new
        count += 1
    if not count:
        raise ConfigError(f"{readme} has no marker: put <!-- results:NAME --> and {_END} where a table belongs")
    if check and changed:
        raise MismatchError(
            f"{readme} differs from the records at {', '.join(changed)}: run `retro eval readme` without --check"
        )
    if changed:
        write_atomically(readme, lambda file: file.write("".join(written).encode()))
    return count


def _by_name(reports: Sequence[Path]) -> dict[str, list[tuple[Path, Record]]]:
    """Of each name the newest record of each report."""
    found: dict[str, dict[Path, tuple[Path, Record]]] = {}
    for report in dict.fromkeys(reports):
        for path, record in read_records(report).items():  # oldest first
            for name in (path.name, path.stem, _NUMBER.sub("", path.stem)):
                found.setdefault(name, {})[report] = (path, record)
    return {name: list(by_report.values()) for name, by_report in found.items()}


def _table(name: str, title: str | None, by_name: Mapping[str, list[tuple[Path, Record]]]) -> list[str]:
    found = by_name.get(name, [])
    if not found:
        known = sorted({_NUMBER.sub("", n) for n in by_name if not n.endswith(".json")})
        raise ConfigError(f"no record is called {name}: there are {', '.join(known)}")
    if len(found) > 1:
        raise ConfigError(
            f"{name} is in {len(found)} reports ({', '.join(str(path) for path, _ in found)}): name one of them"
        )
    _, record = found[0]
    if title is None:
        rows = _figures(record)
    elif record.rows.get(title):
        rows = _rows(record.rows[title])
    else:
        raise ConfigError(f"{name} has no table {title!r}: there are {', '.join(record.rows) or 'none'}")
    measured = f"Measured {record.created[:10]}" + (f" on {place}" if (place := _place(record)) else "")
    command = " ".join(shlex.join(record.command).split())
    fence = "``" if "`" in command else "`"
    return ["", *rows, "", f"{measured}: {fence}{command}{fence}", ""]


def _place(record: Record) -> str:
    """Hardware and commit."""
    gpus = record.environment.get("gpus") or []
    hardware = ", ".join(dict.fromkeys(map(str, gpus))) or str(record.environment.get("processor") or "")
    commit = record.environment.get("commit")
    return hardware + (f", commit {commit}" if commit else "")


def _figures(record: Record) -> list[str]:
    rows = []
    for name, f in record.figures.items():
        spread = None if f.low is None or f.high is None else (f.high - f.low) / 2
        over = "" if f.count is None else number(f.count)
        rows.append([with_unit(name, f.unit), number(f.value, spread), interval(f.low, f.high), over])
    return _markdown(["", "value", "95% interval", "over"], [False, True, True, True], rows)


def _rows(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    names = list(rows[0])
    columns, right = [], []
    for name in names:
        values = [row.get(name) for row in rows]
        right.append(all(isinstance(v, int | float | None) and not isinstance(v, bool) for v in values))
        columns.append(column(values) if right[-1] else ["" if v is None else str(v) for v in values])
    return _markdown(names, right, list(zip(*columns, strict=True)))


def _markdown(names: Sequence[str], right: Sequence[bool], rows: Sequence[Sequence[str]]) -> list[str]:
    marks = ["---:" if at_right else "---" for at_right in right]
    return ["| " + " | ".join(map(_plain, row)) + " |" for row in (names, marks, *rows)]


def _plain(text: str) -> str:
    """Text that cannot end a cell or begin markup."""
    return re.sub(r"([\\|`<])", r"\\\1", " ".join(text.split()))
