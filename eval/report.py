"""One page of all records of a report's folder, `report.html`: self-contained, without JavaScript."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.records import Record, write_record

PAGE = "report.html"


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
    return out / PAGE
