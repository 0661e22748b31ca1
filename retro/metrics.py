"""The course of a training: `metrics.jsonl`, one line a record with its step, and `loss.png`, the plot of the losses in it.

The lines are the record of truth. TensorBoard and Weights & Biases are told them too where that is asked for.
"""

import contextlib
import importlib
import json
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from retro.artifact import read_json, storage_error, write_atomically, write_json
from retro.errors import ConfigError, DependencyError

METRICS, PLOT, TENSORBOARD, WANDB = "metrics.jsonl", "loss.png", "tensorboard", "wandb.json"
_CURVES = {
    "loss_nats": ("training", "0.7"),
    "valid_loss_on_nats": ("validation, retrieval on", "tab:blue"),
    "valid_loss_off_nats": ("validation, retrieval off", "tab:orange"),
    "valid_loss_shuffled_nats": ("validation, shuffled neighbors", "tab:green"),
}


class Lines:
    """A file of records in JSON, a line each, with the steps they are of."""

    def __init__(self, path: Path, step: int) -> None:
        """Opens the file and takes the lines after `step` away, with a line that a kill cut short."""
        self.path = path
        kept = "".join(_text(record) for record in read_lines(path) if record["step"] <= step)
        write_atomically(path, lambda file: file.write(kept.encode()))

    def append(self, record: dict[str, Any]) -> None:
        """Adds a record, which has a step."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_text(record))
        except OSError as error:
            raise storage_error(self.path, error) from error


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of such a file, oldest first; a line that is no record is left out."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            with contextlib.suppress(ValueError):
                record = json.loads(text)
                if isinstance(record, dict) and "step" in record:
                    yield record


class Metrics:
    """The metrics of one model's folder, and whoever else is told them."""

    def __init__(
        self,
        folder: Path,
        step: int,
        *,
        tensorboard: bool = False,
        wandb_project: str = "",
        settings: dict[str, Any] | None = None,
    ) -> None:
        """Opens the file and takes the lines after `step` away, with a line that a kill cut short.

        Args:
            folder: The model.
            step: That training goes on after.
            tensorboard: Whether to write event files into `folder/tensorboard`.
            wandb_project: Project of Weights & Biases that is sent the metrics; empty for none.
            settings: Plain data, for Weights & Biases.

        Raises:
            DependencyError: A package that is asked for is not installed.
        """
        self._folder = folder
        self._file = Lines(folder / METRICS, step)
        self._plot = folder / PLOT
        self._wanted = {"tensorboard": tensorboard, "wandb": bool(wandb_project)}
        self._project, self._settings = wandb_project, settings or {}
        for package, wanted in self._wanted.items():
            if wanted:
                _imported(package)
        self._told: list[_TensorBoard | _Wandb] | None = None

    def append(self, record: dict[str, float]) -> None:
        """Adds a record to the file and to whoever is told."""
        if self._told is None:  # not earlier: until now this object can be sent to other processes
            before = list(self.lines())
            self._told = [_TensorBoard(self._folder, before)] if self._wanted["tensorboard"] else []
            if self._wanted["wandb"]:
                self._told.append(_Wandb(self._folder, before, self._project, self._settings))
        self._file.append(record)
        for listener in self._told:
            listener.tell(record)

    def lines(self) -> Iterator[dict[str, Any]]:
        """The records, oldest first; a line that is no record is left out."""
        return read_lines(self._file.path)

    def close(self) -> None:
        """Writes out what the listeners hold back; nothing is told them afterwards."""
        told, self._told = self._told or [], []
        for listener in told:
            listener.close()

    def draw(self) -> None:
        """Draws training and validation losses over the steps."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        lines = list(self.lines())
        figure = Figure(figsize=(7, 4), dpi=100, layout="constrained")
        axes = FigureCanvasAgg(figure).figure.add_subplot()
        for key, (label, color) in _CURVES.items():
            points = [(line["step"], line[key]) for line in lines if key in line]
            if points:
                marker = "." if key != "loss_nats" else None
                axes.plot(*zip(*points, strict=True), label=label, color=color, marker=marker, linewidth=1)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("loss (nats per token)")
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend()
        write_atomically(self._plot, lambda file: figure.savefig(file, format="png", metadata={"Software": None}))


class Course:
    """How the validation loss has come along: what early stopping and the best model are decided by.

    It follows from the lines of the metrics alone, so that a training that goes on decides as one that was never interrupted.
    """

    def __init__(self, lines: Iterator[dict[str, Any]], key: str) -> None:
        """Goes through the lines so far.

        Args:
            lines: Records, oldest first.
            key: Of the loss.
        """
        self._key = key
        self.best_step: int | None = None
        """Of the evaluation with the lowest loss; None before the first one."""
        self.best_loss_nats = float("inf")
        self.since_best = 0
        """Evaluations after that one."""
        for line in lines:
            self.add(line)

    def add(self, record: dict[str, Any]) -> bool:
        """Takes a record note of; returns whether it has a lower loss than all before."""
        if self._key not in record:
            return False
        if not record[self._key] < self.best_loss_nats:
            self.since_best += 1
            return False
        self.best_step, self.best_loss_nats, self.since_best = record["step"], record[self._key], 0
        return True

    def exhausted(self, patience: int) -> bool:
        """Whether there have been so many evaluations since the best; 0 is never."""
        return 0 < patience <= self.since_best


class _TensorBoard:
    """Event files, made anew from the lines, so that nothing is in them twice after a training went on."""

    def __init__(self, folder: Path, before: list[dict[str, Any]]) -> None:
        shutil.rmtree(folder / TENSORBOARD, ignore_errors=True)
        self._writer = _imported("tensorboard").SummaryWriter(str(folder / TENSORBOARD))
        for record in before:
            self.tell(record)

    def tell(self, record: dict[str, float]) -> None:
        for name, value in record.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(record["step"]))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """A run of Weights & Biases. It goes on when training does, and leaves out by itself what it was told before."""

    def __init__(self, folder: Path, before: list[dict[str, Any]], project: str, settings: dict[str, Any]) -> None:
        path = folder / WANDB
        known = read_json(path) if path.is_file() else {}
        is_new = known.get("project") != project
        run_id = uuid.uuid4().hex[:16] if is_new else known["id"]
        wandb = _imported("wandb")
        try:
            self._run = wandb.init(project=project, id=run_id, name=folder.name, resume="allow", config=settings)
        except wandb.Error as error:
            raise ConfigError(
                f"Weights & Biases cannot be told the metrics: {error}. Log in with `wandb login`, set WANDB_MODE=offline, or "
                "leave train.wandb_project empty"
            ) from error
        write_json(path, {"project": project, "id": run_id})
        for record in before if is_new else ():
            self.tell(record)

    def tell(self, record: dict[str, float]) -> None:
        values = {name: value for name, value in record.items() if name != "step"}
        self._run.log(values, step=int(record["step"]))

    def close(self) -> None:
        self._run.finish()


def _imported(package: str) -> Any:
    module = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}[package]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DependencyError(
            f'the package {package} is not installed ({error}): pip install "retro-lm[{package}]", or leave the setting out'
        ) from error


def _text(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
