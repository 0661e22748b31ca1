"""Records of measurements: figures with everything that is needed to trust them and to measure them again.

report/
  records/lm-wiki.model-001.json           one Record each
  records/lm-wiki.model-001.units.parquet  what its means are means of: a row for each document or question
  report.html                              all records of the folder on one page (report.py)
"""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from retro.artifact import read_json, write_atomically, write_json
from retro.errors import FormatError

RECORDS = "records"
FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One number."""

    value: float | None
    """None where it cannot be given (nothing to measure)."""
    unit: str
    """As in "bits per byte", "%", "ms"; empty for a plain number."""
    low: float | None = None
    """Lower end of the 95% interval."""
    high: float | None = None
    """Upper end."""
    count: int | None = None
    """How many units it is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One plot: several series over the same x."""

    x_label: str
    y_label: str
    x: tuple[float, ...]
    series: dict[str, tuple[float | None, ...]]
    """By name, as long as x; None where there is no value."""
    log_x: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One measurement."""

    kind: str
    """lm, leakage, retrieval, qa, knn-lm, attribution, training."""
    name: str
    """Of what was measured, as a short title: the model's folder, or the index's."""
    figures: dict[str, Figure]
    """By name, in the order in which they are shown."""
    curves: dict[str, Curve] = field(default_factory=dict)
    """By title."""
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Tables by title: lists of rows of plain values, all rows of a table with the same keys."""
    configuration: dict[str, Any] = field(default_factory=dict)
    """All settings, resolved."""
    fingerprints: dict[str, str] = field(default_factory=dict)
    """Of model, index, data, files."""
    notes: tuple[str, ...] = ()
    """What a reader must know, in whole sentences."""
    seed: int = 0
    seconds: float = 0.0
    """Time it took."""
    command: tuple[str, ...] = ()
    environment: dict[str, Any] = field(default_factory=dict)
    created: str = ""
    """UTC, ISO 8601."""
    units: str = ""
    """Name of the file of its units, beside it; empty: none."""


def environment() -> dict[str, Any]:
    """Versions, hardware, and the commit of a checkout."""
    versions = {}
    for package in ("retro-lm", "torch", "numpy", "faiss-cpu", "faiss-gpu", "sentence-transformers", "transformers"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    import torch

    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpus": gpus,
        "commit": _commit(),
        "versions": versions,
    }


def write_record(out: Path, record: Record, units: Mapping[str, Sequence[Any]] | None = None) -> Path:
    """Adds a record to a report's folder, with the command line and the environment of this process.

    Args:
        out: Folder of the report; made where it is missing.
        record: `command`, `environment`, `created` and `units` are filled in.
        units: Columns of equal length: what the figures are means of; `id` names a unit, so that records can be paired.

    Returns:
        The file.

    Raises:
        StorageError: It cannot be written.
    """
    folder = out / RECORDS
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{record.kind}-{re.sub(r'[^A-Za-z0-9._-]+', '-', record.name)}"
    number = 1
    while (folder / f"{stem}-{number:03d}.json").exists():
        number += 1
    path = folder / f"{stem}-{number:03d}.json"
    content = asdict(record)
    content |= {
        "format": FORMAT,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "environment": environment(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if units is not None:
        table = pa.table({name: pa.array(list(column)) for name, column in units.items()})
        content["units"] = f"{path.stem}.units.parquet"
        write_atomically(folder / content["units"], lambda file: pq.write_table(table, file))
    write_json(path, content)
    return path


def read_records(out: Path) -> dict[Path, Record]:
    """All records of a report's folder, or the one of a file, oldest first.

    Raises:
        FormatError: There is none, or a file is no record.
    """
    paths = [out] if out.is_file() else sorted((out / RECORDS).glob("*.json"))
    if not paths:
        raise FormatError(f"{out} holds no records: measure something with `retro eval ... --out {out}` first")
    records = {path: _read(path) for path in paths}
    return dict(sorted(records.items(), key=lambda item: (item[1].created, item[0].name)))


def read_units(path: Path, record: Record) -> dict[str, list[Any]]:
    """The units of a record that lies in `path`; empty where it has none.

    Raises:
        FormatError: The file is missing or damaged.
    """
    if not record.units:
        return {}
    try:
        columns: dict[str, list[Any]] = pq.read_table(path.parent / record.units).to_pydict()
    except (OSError, pa.ArrowInvalid) as error:
        raise FormatError(f"{path.parent / record.units} cannot be read: {error}") from error
    return columns


def _read(path: Path) -> Record:
    content = read_json(path)
    try:
        if content.pop("format") != FORMAT:
            raise FormatError(f"{path} is a record of another version of this program: measure again")
        content["figures"] = {name: Figure(**figure) for name, figure in content["figures"].items()}
        content["curves"] = {
            title: Curve(
                **{
                    **curve,
                    "x": tuple(curve["x"]),
                    "series": {name: tuple(values) for name, values in curve["series"].items()},
                }
            )
            for title, curve in content["curves"].items()
        }
        return Record(**{**content, "notes": tuple(content["notes"]), "command": tuple(content["command"])})
    except (AttributeError, KeyError, TypeError) as error:
        raise FormatError(f"{path} is no record of a measurement: {error!r}") from error


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str:
    """Of the checkout that this file lies in; empty where there is none."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def to_json(record: Record) -> str:
    """For `--json`."""
    return json.dumps(asdict(record), indent=2)
