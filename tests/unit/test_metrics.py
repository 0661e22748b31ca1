"""The record of a training and whoever else is told it."""

import json
import pickle
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from retro.errors import DependencyError
from retro.metrics import METRICS, TENSORBOARD, Course, Lines, Metrics, read_lines

RECORDS: list[dict[str, Any]] = [
    {"step": 1, "loss_nats": 3.5, "seconds": 1.0},
    {"step": 2, "loss_nats": 2.25, "seconds": 2.0},
    {"step": 2, "valid_loss_on_nats": 2.5},
    {"step": 3, "loss_nats": 1.5, "seconds": 3.0},
    {"step": 4, "loss_nats": 1.25, "seconds": 4.0},
    {"step": 4, "valid_loss_on_nats": 2.0},
]


def run_to(folder: Path, after: int, last: int, **options: Any) -> None:
    """A training from a step to another."""
    metrics = Metrics(folder, after, **options)
    for record in RECORDS:
        if after < record["step"] <= last:
            metrics.append(record)
    metrics.close()


def test_a_line_may_hold_any_text(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "x.jsonl", 0)
    records = [{"step": 1, "text": 'a "quoted"\nline of \u2028 Łódź'}, {"step": 2, "text": ""}]
    for record in records:
        lines.append(record)
    assert list(read_lines(lines.path)) == records
    assert list(read_lines(Lines(tmp_path / "x.jsonl", 1).path)) == records[:1]


# --- TensorBoard --------------------------------------------------------------------------------------------------


def events(folder: Path) -> list[tuple[int, str, float]]:
    """Step, name and value of every scalar in all event files, by TensorBoard's own reader."""
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    found = []
    for path in (folder / TENSORBOARD).iterdir():
        for event in loader.LegacyEventFileLoader(str(path)).Load():
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return found


def expected(records: list[dict[str, Any]]) -> list[tuple[int, str, float]]:
    return [(r["step"], name, value) for r in records for name, value in r.items() if name != "step"]


@pytest.fixture
def tensorboard() -> None:
    pytest.importorskip("tensorboard")


@pytest.mark.usefixtures("tensorboard")
@pytest.mark.parametrize("killed_at", [2, 3, 4])
def test_event_files_hold_every_line_once_also_after_going_on_from_an_earlier_step(
    killed_at: int, tmp_path: Path
) -> None:
    run_to(tmp_path, 0, killed_at, tensorboard=True)
    run_to(tmp_path, 2, 4, tensorboard=True)
    assert [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()] == RECORDS
    assert events(tmp_path) == expected(RECORDS)
    assert len(list((tmp_path / TENSORBOARD).iterdir())) == 1


@pytest.mark.usefixtures("tensorboard")
def test_event_files_asked_for_later_hold_what_was_before(tmp_path: Path) -> None:
    run_to(tmp_path, 0, 3)
    assert not (tmp_path / TENSORBOARD).exists()
    run_to(tmp_path, 3, 4, tensorboard=True)
    assert events(tmp_path) == expected(RECORDS)


@pytest.mark.usefixtures("tensorboard")
def test_lines_are_in_the_event_file_at_once_and_closing_ends_its_thread(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    metrics = Metrics(tmp_path, 0, tensorboard=True)
    metrics.append(RECORDS[0])
    assert events(tmp_path) == expected(RECORDS[:1])
    metrics.close()
    metrics.append(RECORDS[1])
    metrics.close()
    assert events(tmp_path) == expected(RECORDS[:1])
    assert set(threading.enumerate()) <= before


@pytest.mark.usefixtures("tensorboard")
def test_metrics_that_were_not_written_to_yet_can_be_sent_to_another_process(tmp_path: Path) -> None:
    metrics = pickle.loads(pickle.dumps(Metrics(tmp_path, 0, tensorboard=True)))
    metrics.append(RECORDS[0])
    metrics.close()
    assert events(tmp_path) == expected(RECORDS[:1])


# --- packages that are missing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "module", "extra"),
    [
        ({"tensorboard": True}, "torch.utils.tensorboard", r"retro-lm\[tensorboard\]"),
        ({"wandb_project": "p"}, "wandb", r"retro-lm\[wandb\]"),
    ],
)
def test_a_missing_package_is_named_before_training_begins(
    options: dict[str, Any], module: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DependencyError, match=extra):
        Metrics(tmp_path, 0, **options)


def test_nothing_is_imported_that_was_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("torch.utils.tensorboard", "tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, module, None)
    run_to(tmp_path, 0, 4)
    assert [path.name for path in tmp_path.iterdir()] == [METRICS]


# --- the course of the validation loss ----------------------------------------------------------------------------


def test_the_course_counts_evaluations_since_the_first_lowest_loss() -> None:
    losses = [3.0, 2.0, 2.5, 2.0, 1.5, 1.5, float("nan"), 1.75, 1.25]
    course = Course(iter([]), "loss")
    found = []
    for step, loss in enumerate(losses):
        assert not course.add({"step": step, "other": 0.0})
        found.append((course.add({"step": step, "loss": loss}), course.best_step, course.since_best))
    assert found == [
        (True, 0, 0),
        (True, 1, 0),
        (False, 1, 1),
        (False, 1, 2),
        (True, 4, 0),
        (False, 4, 1),
        (False, 4, 2),
        (False, 4, 3),
        (True, 8, 0),
    ]
    lines: list[dict[str, Any]] = [{"step": n, "loss": loss} for n, loss in enumerate(losses)]
    for stop in range(len(lines)):
        resumed = Course(iter(lines[:stop]), "loss")
        for line in lines[stop:]:
            resumed.add(line)
        assert vars(resumed) == vars(course)


def test_a_course_without_evaluations_has_no_best() -> None:
    course = Course(iter(RECORDS[:2]), "valid_loss_on_nats")
    assert (course.best_step, course.since_best) == (None, 0)


def test_patience_ends_after_as_many_evaluations_without_a_lower_loss() -> None:
    course = Course(iter([{"step": n, "loss": loss} for n, loss in enumerate((2.0, 1.0, 1.5, 1.0))]), "loss")
    assert [course.exhausted(patience) for patience in (0, 1, 2, 3)] == [False, True, True, False]
