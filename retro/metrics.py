"""The course of a training: `metrics.jsonl`, one line a record with its step, and `loss.png`, the plot of the losses in it."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from retro.artifact import storage_error, write_atomically

METRICS, PLOT = "metrics.jsonl", "loss.png"
_CURVES = {
    "loss_nats": ("training", "0.7"),
    "valid_loss_on_nats": ("validation, retrieval on", "tab:blue"),
    "valid_loss_off_nats": ("validation, retrieval off", "tab:orange"),
    "valid_loss_shuffled_nats": ("validation, shuffled neighbors", "tab:green"),
}


class Metrics:
    """Both files of one model's folder."""

    def __init__(self, folder: Path, step: int) -> None:
        """Opens the file and takes the lines after `step` away, with a line that a kill cut short."""
        self._path = folder / METRICS
        self._plot = folder / PLOT
        kept = "".join(json.dumps(line) + "\n" for line in self.lines() if line["step"] <= step)
        write_atomically(self._path, lambda file: file.write(kept.encode()))

    def append(self, record: dict[str, float]) -> None:
        """Adds a line."""
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise storage_error(self._path, error) from error

    def lines(self) -> Iterator[dict[str, Any]]:
        """The records, oldest first; a line that is no record is left out."""
        if not self._path.is_file():
            return
        with self._path.open(encoding="utf-8", errors="replace") as file:
            for text in file:
                with contextlib.suppress(ValueError):
                    record = json.loads(text)
                    if isinstance(record, dict) and "step" in record:
                        yield record

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
