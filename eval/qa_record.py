"""The record of questions that were asked: how many answers are right, what retrieval adds, when to be silent.

Everything is worked out from the lines of predictions (see `predictions.Asking.run`) alone.
Letters: N questions.
"""

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from eval.language_modeling import evenly
from eval.metrics import RESAMPLES, answer_recall, bootstrap_mean, paired_bootstrap
from eval.predictions import DEPTH, MODES
from eval.records import Curve, Figure, Record
from eval.selective import Floats, area_interval, choose_threshold, selective_accuracy
from retro.errors import ConfigError
from retro.threshold import Threshold, save_threshold

Line = Mapping[str, Any]

TITLES = {
    "retrieval": "retrieval",
    "shuffled": "shuffled",
    "closed": "closed book",
    "gold": "gold passages",
    "prompt": "prompt",
    "frequent": "most frequent answer",
}
"""What the modes are called for people."""
_SCORES = {"exact match": "exact_match", "F1": "f1"}
_SHOWN = 20
_RECALLS = (1, 2, 3, 5, 10, 20, 50, 100)
_DRAWN = 20_000_000
"""Draws of a bootstrap, about: more questions get fewer resamples, 1,000 at least."""


# --- the record ---------------------------------------------------------------------------------------------------


def qa_record(
    name: str,
    lines: Sequence[Line],
    *,
    num_read: int,
    configuration: Mapping[str, Any],
    fingerprints: Mapping[str, str],
    notes: Sequence[str] = (),
    seed: int = 0,
    seconds: float = 0.0,
) -> tuple[Record, dict[str, list[Any]]]:
    """Figures of what was said.

    Args:
        name: Of the model.
        lines: See `Asking.run`; one at least.
        num_read: Passages that were read of each question; 0: none.
        configuration: See Record, as the next ones.
        fingerprints: Of model, index and questions.
        notes: What a reader must know besides.
        seed: Of the intervals.
        seconds: Time it took.

    Returns:
        A record and its units, a row for each question.
    """
    table = _Table(lines, num_read, seed)
    figures = table.scores("", range(len(lines)))
    figures |= table.gains()
    figures |= table.recalls()
    for title, numbers in table.parts().items():
        figures |= table.scores(f" {title}", numbers, only=("exact match",))
    for data_set, numbers in table.data_sets.items():
        if len(table.data_sets) > 1:
            figures |= table.scores(f" on {data_set}", numbers)
    figures |= table.areas()
    figures |= table.costs()
    rows = {
        "By data set, and by what was found": table.by_part(),
        "Retrieval against the others": table.differences,
        "By relation": table.by_group(),
        "Some answers": _examples(lines),
    }
    record = Record(
        kind="qa",
        name=name,
        figures=figures,
        curves=table.curves(),
        rows={title: few for title, few in rows.items() if few},
        configuration=dict(configuration),
        fingerprints=dict(fingerprints),
        notes=(*notes, *_notes(table)),
        seed=seed,
        seconds=seconds,
    )
    return record, table.units()


class _Table:
    """Scores of all questions, by mode and measure."""

    def __init__(self, lines: Sequence[Line], num_read: int, seed: int) -> None:
        self._lines, self._num_read, self._seed = lines, num_read, seed
        self.modes = [mode for mode in MODES if any(mode in line["modes"] for line in lines)]
        self._values: dict[tuple[str, str], Floats] = {
            (mode, score): np.array([line["modes"].get(mode, {}).get(field, np.nan) for line in lines], float)
            for mode in self.modes
            for score, field in _SCORES.items()
        }
        self.data_sets: dict[str, list[int]] = {}
        for number, line in enumerate(lines):
            self.data_sets.setdefault(line["data_set"], []).append(number)
        self.differences: list[dict[str, Any]] = []
        """Filled by `gains`."""
        self.looked_up = any("rank" in line for line in lines)
        self.depth = max((len(line.get("passages", ())) for line in lines), default=0)

    def _of(self, mode: str, score: str, numbers: Sequence[int]) -> Floats:
        """Scores of those of some questions that a mode answered."""
        values_N: Floats = self._values[mode, score][np.asarray(numbers, np.int64)]
        found_N: Floats = values_N[~np.isnan(values_N)]
        return found_N

    def _percent(self, values_N: Floats) -> Figure:
        if not len(values_N):
            return Figure(value=None, unit="%", count=0)
        low, high = bootstrap_mean(values_N, seed=self._seed, resamples=_resamples(len(values_N)))
        return Figure(value=100 * float(values_N.mean()), unit="%", low=100 * low, high=100 * high, count=len(values_N))

    def scores(self, where: str, numbers: Sequence[int], only: Sequence[str] = tuple(_SCORES)) -> dict[str, Figure]:
        """Of some questions; `where` says which."""
        found = {
            f"{score}{where}, {TITLES[mode]}": self._percent(self._of(mode, score, numbers))
            for score in only
            for mode in self.modes
        }
        return {name: figure for name, figure in found.items() if figure.count}

    def gains(self) -> dict[str, Figure]:
        """Retrieval less each other mode, on the questions that both answered."""
        figures: dict[str, Figure] = {}
        for other in self.modes if "retrieval" in self.modes else []:
            if other == "retrieval":
                continue
            for score in _SCORES:
                first_N, second_N = self._values["retrieval", score], self._values[other, score]
                both_N = ~(np.isnan(first_N) | np.isnan(second_N))
                count = int(both_N.sum())
                found = paired_bootstrap(
                    100 * first_N[both_N], 100 * second_N[both_N], seed=self._seed, resamples=_resamples(count)
                )
                figures[f"retrieval less the others, {score}: {TITLES[other]}"] = Figure(
                    value=found.value, unit="points", low=found.low, high=found.high, count=count
                )
                self.differences.append(
                    {
                        "less": TITLES[other],
                        "measure": score,
                        "retrieval, %": 100 * float(first_N[both_N].mean()),
                        "other, %": 100 * float(second_N[both_N].mean()),
                        "difference": found.value,
                        "from": found.low,
                        "to": found.high,
                        "p": found.p_value,
                        "questions": count,
                    }
                )
        return figures

    def parts(self) -> dict[str, list[int]]:
        """Questions by what was found for them; those that hold some."""
        if not self.looked_up:
            return {}
        ranks = [line.get("rank") for line in self._lines]
        gold = [line.get("gold_rank") for line in self._lines]
        k = self._num_read
        found = {
            f"with the answer in the {k} read": [n for n, r in enumerate(ranks) if r is not None and r <= k],
            f"without the answer in the {k} read": [n for n, r in enumerate(ranks) if r is None or r > k],
        }
        if k < DEPTH <= self.depth:
            found[f"with the answer in the first {DEPTH}"] = [
                n for n, r in enumerate(ranks) if r is not None and r <= DEPTH
            ]
        if any(rank is not None for rank in gold):
            first = max(DEPTH, k)
            found[f"with the answer in a passage of a gold document in the first {first}"] = [
                n for n, r in enumerate(gold) if r is not None and r <= first
            ]
        return {title: numbers for title, numbers in found.items() if numbers}

    def recalls(self) -> dict[str, Figure]:
        """Questions with an answer in the first passages."""
        if not self.looked_up:
            return {}
        figures = {}
        for k in sorted({k for k in (1, 5, 20, self._num_read) if k <= self.depth}):
            hits = [float(line["rank"] is not None and line["rank"] <= k) for line in self._lines]
            figures[f"answer recall, k = {k}"] = self._percent(np.array(hits))
        return figures

    def by_part(self) -> list[dict[str, Any]]:
        """A row for each data set, what was found, and mode."""
        everything: dict[str, list[int]] = {"all": list(range(len(self._lines))), **self.parts()}
        sets = {"all": everything["all"], **self.data_sets} if len(self.data_sets) > 1 else self.data_sets
        rows = []
        for data_set, members in sets.items():
            for part, numbers in everything.items():
                few = sorted(set(members) & set(numbers))
                for mode in self.modes:
                    row: dict[str, Any] = {"data set": data_set, "questions": part, "mode": TITLES[mode]}
                    row["number"] = len(self._of(mode, "exact match", few))
                    for score in _SCORES:
                        figure = self._percent(self._of(mode, score, few))
                        row |= {score: figure.value, f"{score}, from": figure.low, f"{score}, to": figure.high}
                    rows += [row] if row["number"] else []
        return rows

    def by_group(self) -> list[dict[str, Any]]:
        """A row for each relation, the largest first."""
        groups: dict[str, list[int]] = {}
        for number, line in enumerate(self._lines):
            if line["group"]:
                groups.setdefault(line["group"], []).append(number)
        rows = []
        for group, numbers in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
            row: dict[str, Any] = {"relation": group, "questions": len(numbers)}
            for mode in self.modes:
                values_N = self._of(mode, "exact match", numbers)
                row[f"exact match, {TITLES[mode]}"] = 100 * float(values_N.mean()) if len(values_N) else None
            rows.append(row)
        return rows

    def _selections(self) -> dict[str, tuple[Floats, Floats]]:
        """Confidences and exact matches of the modes in which a model speaks."""
        spoken = [mode for mode in self.modes if mode not in ("shuffled", "frequent")]
        return {mode: confidences(self._lines, mode) for mode in spoken}

    def areas(self) -> dict[str, Figure]:
        """Under accuracy over coverage."""
        figures = {}
        for mode, (confidence_N, right_N) in self._selections().items():
            area = selective_accuracy(confidence_N, right_N).area
            low, high = area_interval(confidence_N, right_N, self._seed)
            figures[f"area under accuracy over coverage, {TITLES[mode]}"] = Figure(
                value=100 * area, unit="%", low=100 * low, high=100 * high, count=len(right_N)
            )
        return figures

    def curves(self) -> dict[str, Curve]:
        """Accuracy over coverage, and answer recall over the number of passages."""
        shares = tuple(range(1, 101))
        series: dict[str, tuple[float | None, ...]] = {}
        for mode, (confidence_N, right_N) in self._selections().items():
            found = selective_accuracy(confidence_N, right_N)
            # The fewest answers that are at least so many: one confidence may be that of many answers.
            places = np.searchsorted(found.coverage, np.array(shares) / 100 - 1e-9)
            series[TITLES[mode]] = tuple((100 * found.accuracy[places]).tolist())
        curves = {}
        if series:
            curves["Accuracy over coverage, the most confident answers first"] = Curve(
                x_label="share of the questions answered, %",
                y_label="exact match among them, %",
                x=shares,
                series=series,
            )
        if self.looked_up:
            ks = tuple(sorted({k for k in (*_RECALLS, self.depth) if k <= self.depth}))
            firsts = [None if line["rank"] is None else line["rank"] - 1 for line in self._lines]
            curves["Answer recall"] = Curve(
                x_label="k",
                y_label="recall@k, %",
                x=ks,
                series={"passages found": tuple(100 * answer_recall(firsts, k) for k in ks)},
                log_x=True,
            )
        return curves

    def costs(self) -> dict[str, Figure]:
        """Seconds and tokens of a question, means."""
        figures = {}
        if self.looked_up:
            searching = [line["search_seconds"] for line in self._lines]
            figures["seconds of a question, finding passages"] = Figure(
                value=float(np.mean(searching)), unit="s", count=len(searching)
            )
        for name, field, unit in (
            ("seconds of a question", "seconds", "s"),
            ("prompt tokens of a question", "prompt_tokens", "tokens"),
            ("tokens of passages beside the prompt", "passage_tokens", "tokens"),
            ("generated tokens of a question", "generated_tokens", "tokens"),
        ):
            for mode in self.modes:
                values = [line["modes"][mode][field] for line in self._lines if field in line["modes"].get(mode, {})]
                if values:
                    mean = Figure(value=float(np.mean(values)), unit=unit, count=len(values))
                    # Seconds are those of a batch, shared out: no interval over questions.
                    figures[f"{name}, {TITLES[mode]}"] = mean if unit == "s" else self._with_interval(mean, values)
        return figures

    def _with_interval(self, mean: Figure, values: Sequence[float]) -> Figure:
        low, high = bootstrap_mean(np.array(values, float), seed=self._seed, resamples=_resamples(len(values)))
        return replace(mean, low=low, high=high)

    def units(self) -> dict[str, list[Any]]:
        """A row for each question; None where a mode did not answer it."""

        def plain(values_N: Floats) -> list[float | None]:
            return [None if np.isnan(value) else value for value in values_N.tolist()]

        units: dict[str, list[Any]] = {name: [line[name] for line in self._lines] for name in ("id", "data_set")}
        if self.looked_up:
            units["rank"] = [line["rank"] for line in self._lines]
        for mode in self.modes:
            units[f"em_{mode}"] = plain(self._values[mode, "exact match"])
            units[f"f1_{mode}"] = plain(self._values[mode, "F1"])
            said = [line["modes"].get(mode, {}) for line in self._lines]
            units[f"confidence_{mode}"] = [entry.get("confidence") for entry in said]
        return units


def save_chosen_threshold(folder: Path, lines: Sequence[Line], accuracy: float, chosen_on: str) -> Threshold:
    """Chooses the confidence below which a model does not know, and puts it into its folder.

    Args:
        folder: The model.
        lines: See `Asking.run`; of the answers with the passages found, or of those without any.
        accuracy: Share of right answers that is wanted, from 0 to 1; see `choose_threshold`.
        chosen_on: Name of the questions.

    Raises:
        ConfigError: No confidence gives it, or the questions were asked in no mode that `retro ask` has.
        StorageError: It cannot be written.
    """
    mode = next((m for m in ("retrieval", "closed") if any(m in line["modes"] for line in lines)), None)
    if mode is None:
        raise ConfigError("a confidence is chosen on answers with retrieval or closed book: ask in one of these modes")
    confidence, coverage, share = choose_threshold(*confidences(lines, mode), accuracy)
    threshold = Threshold(
        min_confidence=confidence,
        coverage=coverage,
        accuracy=share,
        chosen_on=f"{chosen_on} ({TITLES[mode]})",
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    )
    save_threshold(folder, threshold)
    return threshold


def confidences(lines: Sequence[Line], mode: str) -> tuple[Floats, Floats]:
    """Confidence and exact match of what a mode said, of the questions that it answered [N]."""
    said = [line["modes"][mode] for line in lines if mode in line["modes"]]
    return np.array([s["confidence"] for s in said], float), np.array([s["exact_match"] for s in said], float)


def _resamples(count: int) -> int:
    return int(min(RESAMPLES, max(1000, _DRAWN // max(count, 1))))


def _examples(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """A few, evenly spaced."""
    mode = "retrieval" if any("retrieval" in line["modes"] for line in lines) else "closed"
    return [
        {
            "question": line["question"],
            "answer": line["modes"][mode]["answer"],
            "expected": " / ".join(line["answers"][:3]),
            "right": bool(line["modes"][mode]["exact_match"]),
            "confidence": line["modes"][mode]["confidence"],
            "first passage with the answer": line.get("rank"),
            "best passage": line["passages"][0]["key"] if line.get("passages") else "",
        }
        for line in evenly([line for line in lines if mode in line["modes"]], _SHOWN)
    ]


def _notes(table: _Table) -> list[str]:
    notes = ["Exact match and F1 by SQuAD's rules, best over the accepted answers."]
    if "shuffled" in table.modes:
        notes.append("Shuffled: with the passages of another question, none of which has text in common with its own.")
    if "gold" in table.modes:
        notes.append(
            "Gold passages: of the document that the question names; questions without one are left out there."
        )
    if "prompt" in table.modes:
        notes.append("Prompt: the same passages in the prompt of another model, which was not trained on this.")
    if "frequent" in table.modes:
        notes.append("Most frequent answer: of the training questions of the same relation.")
    if table.looked_up:
        notes.append("A passage has the answer where it stands in it as whole words, in any case.")
    return notes
