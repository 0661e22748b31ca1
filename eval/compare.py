"""`retro eval compare`: records side by side, several seeds as one, pairs tested over the units they share."""

import itertools
import json
import math
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from eval.metrics import RESAMPLES, Floats, bootstrap_mean, paired_bootstrap
from eval.records import Figure, Record, read_records, read_units
from retro.errors import ConfigError, MismatchError

_FAMILIES = {"knn-lm": "lm"}
"""Kinds whose units mean the same as those of another kind."""
_LOSS = re.compile(r"loss_(?P<mode>.+?)(?P<seeing>_seeing)?_nats")
_RANKED = re.compile(r"\b(?P<measure>hit|recall|nDCG|MRR)@\d+")
_ANSWER = "answer_"
"""How columns begin that hold what was said, the mode behind it."""
_MANY_TESTS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measure:
    """A mean, or a ratio of sums, over units."""

    name: str
    unit: str
    scale: float
    column: str
    denominator: str = ""
    """Column; empty: a mean."""


@dataclass(frozen=True, kw_only=True)
class _Run:
    """Records that differ in their seeds only."""

    label: str
    records: list[tuple[Path, Record]]

    @cached_property
    def units(self) -> dict[str, Floats]:
        """Columns of numbers, in the order of `ids`; the means over the seeds."""
        tables = [read_units(path, record) for path, record in self.records]
        order = [{unit: place for place, unit in enumerate(table.get("id", ()))} for table in tables]
        for (path, _), table, places in zip(self.records, tables, order, strict=True):
            if len(places) != len(table.get("id", ())):
                raise MismatchError(f"units of {path} have the same id twice: they cannot be paired")
            if places.keys() != order[0].keys():
                raise MismatchError(_difference(self.label, set(order[0]), path.name, set(places)))
        columns = {}
        for name in [c for c in tables[0] if c != "id" and all(_numeric(table.get(c)) for table in tables)]:
            values = [
                np.array([table[name][places[unit]] for unit in order[0]], float)
                for table, places in zip(tables, order, strict=True)
            ]
            columns[name] = np.mean(values, axis=0)
        return columns

    @cached_property
    def ids(self) -> list[str]:
        """Of the units; empty where there are none."""
        path, record = self.records[0]
        return list(map(str, read_units(path, record).get("id", ())))

    @cached_property
    def answers(self) -> dict[str, list[Any]]:
        """What was said in each mode, in the order of `ids`; empty where there are several seeds, which say several things."""
        if len(self.records) > 1:
            return {}
        columns = read_units(*self.records[0])
        return {name.removeprefix(_ANSWER): said for name, said in columns.items() if name.startswith(_ANSWER)}

    def value(self, name: str) -> tuple[Figure | None, float | None]:
        """A figure, the mean over seeds, and the standard deviation over them where there are several."""
        figures = [record.figures.get(name) for _, record in self.records]
        values = [figure.value for figure in figures if figure is not None and figure.value is not None]
        if len(values) < len(self.records) or figures[0] is None:
            return None, None
        spread = statistics.stdev(values) if len(values) > 1 else None
        return Figure(value=statistics.fmean(values), unit=figures[0].unit), spread


@dataclass(kw_only=True)
class _Tests:
    """What the pairs gave."""

    figures: dict[str, Figure] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def compare(inputs: Sequence[Path], *, seed: int = 0, resamples: int = RESAMPLES) -> Record:
    """Puts records of the same kind side by side and tests each pair of them.

    Args:
        inputs: Folders of reports, or files of records. Records that differ in nothing but their seeds become one, with mean and
            standard deviation; of several with the same seed the newest counts.
        seed: Of the resamples.
        resamples: How many.

    Returns:
        A record of kind compare: the differences as figures, second minus first, with their 95% intervals, and the share of answers
        that are letter by letter the same; tables of all figures and of the tests. Language models and kNN-LM are one kind here.

    Raises:
        ConfigError: There are no two records of one kind.
        MismatchError: No two records of a kind have the same units.
        FormatError: An input holds no records, or a file is damaged.
    """
    families = _runs(inputs)
    if not any(len(runs) > 1 for runs in families.values()):
        found = "; ".join(f"{kind}: {', '.join(run.label for run in runs)}" for kind, runs in families.items())
        raise ConfigError(f"there are no two records of one kind to compare ({found})")
    rows: dict[str, list[dict[str, Any]]] = {}
    tests = _Tests()
    for kind, runs in families.items():
        if len(runs) > 1:
            rows[kind] = _side_by_side(runs)
            _test_pairs(kind, runs, tests, seed, resamples)
    if tests.rows:
        rows["Paired tests"] = tests.rows
        tests.notes.append(
            f"Differences are second minus first, with 95% intervals and two-sided p-values of {resamples:,} paired bootstrap "
            "resamples of the units; where there are several seeds, a unit's value is its mean over them."
        )
    if len(tests.rows) > _MANY_TESTS:
        tests.notes.append(f"{len(tests.rows)} tests: p-values are not corrected for their number.")
    return Record(
        kind="compare",
        name=" and ".join(path.name or str(path) for path in inputs),
        figures=tests.figures,
        rows=rows,
        configuration={"inputs": [str(path) for path in inputs], "resamples": resamples, "seed": seed},
        notes=tuple(tests.notes),
        seed=seed,
    )


def _runs(inputs: Sequence[Path]) -> dict[str, list[_Run]]:
    """By kind; each is labelled by its input, or by its file where there are several."""
    grouped: list[tuple[Path, str, list[tuple[Path, Record]]]] = []
    for path in dict.fromkeys(inputs):
        seeds: dict[str, dict[int, tuple[Path, Record]]] = {}
        for file, record in read_records(path).items():  # oldest first
            if record.kind != "compare":
                seeds.setdefault(_but_seed(record), {})[record.seed] = (file, record)
        grouped += [(path, _family(next(iter(by.values()))[1].kind), list(by.values())) for by in seeds.values()]
    families: dict[str, list[_Run]] = {}
    for path, family, records in grouped:
        alone = sum((p, f) == (path, family) for p, f, _ in grouped) == 1
        unlike = sum(p.name == path.name for p in dict.fromkeys(inputs)) == 1
        start = path.name if path.name and unlike else str(path)
        label = start.removesuffix(".json") if alone or path.is_file() else f"{start}/{records[-1][0].stem}"
        if len(records) > 1:
            label += f" ({len(records)} seeds)"
        families.setdefault(family, []).append(_Run(label=label, records=records))
    return families


def _family(kind: str) -> str:
    return _FAMILIES.get(kind, kind)


def _but_seed(record: Record) -> str:
    """All that makes two records the same measurement, as text."""
    settings = {key: value for key, value in record.configuration.items() if key != "seed"}
    return json.dumps([record.kind, record.name, settings, record.fingerprints], sort_keys=True, default=str)


def _side_by_side(runs: Sequence[_Run]) -> list[dict[str, Any]]:
    """A row for each figure of any of them."""
    names = dict.fromkeys(name for run in runs for _, record in run.records for name in record.figures)
    rows = []
    for name in names:
        values = [run.value(name) for run in runs]
        row: dict[str, Any] = {"figure": name, "unit": next((f.unit for f, _ in values if f is not None), "")}
        for run, (figure, spread) in zip(runs, values, strict=True):
            row[run.label] = None if figure is None else figure.value
            if len(run.records) > 1:
                row[f"{run.label}, standard deviation"] = spread
        rows.append(row)
    return rows


def _test_pairs(kind: str, runs: Sequence[_Run], tests: _Tests, seed: int, resamples: int) -> None:
    pairs = list(itertools.combinations([run for run in runs if run.ids], 2))
    unlike = []
    for first, second in pairs:
        if set(first.ids) != set(second.ids):
            unlike.append(_difference(first.label, set(first.ids), second.label, set(second.ids)))
            continue
        _test(kind, first, second, tests, seed, resamples)
    if unlike and len(unlike) == len(pairs):
        raise MismatchError(f"records of kind {kind} cannot be paired: {unlike[0]}. Measure both on the same data")
    tests.notes += [f"Not tested: {reason}." for reason in unlike]


def _test(kind: str, first: _Run, second: _Run, tests: _Tests, seed: int, resamples: int) -> None:
    place = {unit: i for i, unit in enumerate(second.ids)}
    order = np.array([place[unit] for unit in first.ids])
    for measure in _measures(kind, first.units.keys() & second.units.keys()):
        a, b = first.units[measure.column], second.units[measure.column][order]
        below: Floats = np.ones(len(a))
        if measure.denominator:
            below, other = first.units[measure.denominator], second.units[measure.denominator][order]
            if not np.array_equal(below, other):
                reason = f"{measure.denominator} of {first.label} and {second.label} differ"
                if measure.denominator == "bytes":
                    raise MismatchError(
                        f"{reason}: documents of the same ids have other texts. Measure both on the same data"
                    )
                tests.notes.append(f"Not tested: {measure.name}: {reason}.")
                continue
        if not below.sum() > 0:
            continue
        found = paired_bootstrap(b, a, below, seed=seed, resamples=resamples)
        scale = measure.scale
        tests.figures[f"{measure.name}: {second.label} minus {first.label}"] = Figure(
            value=scale * found.value, unit=measure.unit, low=scale * found.low, high=scale * found.high, count=len(a)
        )
        tests.rows.append(
            {
                "measure": measure.name,
                "first": first.label,
                "second": second.label,
                "of the first": scale * float(a.sum() / below.sum()),
                "of the second": scale * float(b.sum() / below.sum()),
                "difference": scale * found.value,
                "low": scale * found.low,
                "high": scale * found.high,
                "p": found.p_value,
                "units": len(a),
            }
        )
    for mode in sorted(first.answers.keys() & second.answers.keys()):
        pairs = zip(first.answers[mode], (second.answers[mode][i] for i in order), strict=True)
        same = np.array([one == other for one, other in pairs if None not in (one, other)], float)
        if len(same):
            low, high = bootstrap_mean(same, seed=seed, resamples=resamples)
            tests.figures[f"identical answers, {mode}: {first.label} and {second.label}"] = Figure(
                value=100 * float(same.mean()), unit="%", low=100 * low, high=100 * high, count=len(same)
            )


def _measures(kind: str, columns: set[str]) -> Iterator[_Measure]:
    """What the columns of the units mean."""
    for column in sorted(columns):
        if kind == "lm" and (loss := _LOSS.fullmatch(column)):
            mode = "baseline" if loss["mode"] == "baseline" else f"retrieval {loss['mode']}"
            below = f"bytes{loss['seeing'] or ''}"
            name = f"bits per byte, {mode}" + (", tokens that can see neighbors" if loss["seeing"] else "")
            if below in columns:
                yield _Measure(name=name, unit="bits per byte", scale=1 / math.log(2), column=column, denominator=below)
        elif kind == "qa" and re.fullmatch(r"(em|f1)(_.+)?", column):
            name = column.replace("em", "exact match", 1) if column.startswith("em") else column.replace("f1", "F1", 1)
            yield _Measure(name=name.replace("_", ", "), unit="%", scale=100.0, column=column)
        elif kind == "retrieval" and (ranked := _RANKED.search(column)):
            percent = ranked["measure"] in ("hit", "recall")
            yield _Measure(name=column, unit="%" if percent else "", scale=100.0 if percent else 1.0, column=column)


def _numeric(values: Sequence[Any] | None) -> bool:
    return values is not None and all(isinstance(value, int | float) for value in values)


def _difference(first: str, ids: set[Any], second: str, others: set[Any]) -> str:
    only = sorted(map(str, ids ^ others))
    return (
        f"the units of {first} ({len(ids):,}) and {second} ({len(others):,}) differ: {len(only):,} are in one of them only, "
        f"as {only[0]}"
    )
