"""`retro eval training`: the course of a training as a record, so that its curve stands in a report beside what it led to."""

import re
from pathlib import Path
from typing import Any

from eval.records import Curve, Figure, Record
from retro.artifact import read_json, sha256
from retro.checkpoint import CONFIG
from retro.errors import FormatError
from retro.metrics import METRICS, read_lines

_LOSS = re.compile(r"(?:(?P<split>[a-z]+)_)?(?:(?P<corpus>.+)_)?loss(?:_(?P<mode>on|off|shuffled))?_nats")
_SPLITS = {None: "training", "valid": "validation", "test": "test"}
_MODES = {None: "", "on": ", retrieval on", "off": ", retrieval off", "shuffled": ", shuffled neighbors"}


def training_record(folder: Path) -> Record:
    """Losses of a model's folder over the steps, of a finished training or one that runs.

    Args:
        folder: Of the model; its metrics.jsonl is read, and its config.json where it is finished.

    Raises:
        FormatError: The folder has no losses.
    """
    lines = list(read_lines(folder / METRICS))
    losses: dict[str, dict[int, float]] = {}
    for line in lines:
        for key, value in line.items():
            if (name := _name(key)) and isinstance(value, int | float):
                losses.setdefault(name, {})[line["step"]] = float(value)
    if not losses:
        raise FormatError(f"{folder / METRICS} holds no losses: name the folder of a model that `retro train` made")
    steps = sorted({step for by_step in losses.values() for step in by_step})
    tokens_per_s = [line["tokens_per_s"] for line in lines if "tokens_per_s" in line]
    speed = Figure(value=sorted(tokens_per_s)[len(tokens_per_s) // 2], unit="tokens per s") if tokens_per_s else None
    configuration: dict[str, Any] = {}
    if (folder / CONFIG).is_file():
        configuration = read_json(folder / CONFIG).get("training") or {}
    return Record(
        kind="training",
        name=folder.resolve().name,
        figures={
            f"last loss, {name}": Figure(value=by_step[max(by_step)], unit="nats per token")
            for name, by_step in losses.items()
        }
        | ({} if speed is None else {"speed, median": speed}),
        curves={
            "Loss": Curve(
                x_label="step",
                y_label="nats per token",
                x=tuple(map(float, steps)),
                series={name: tuple(by_step.get(step) for step in steps) for name, by_step in losses.items()},
            )
        },
        configuration=configuration,
        fingerprints={METRICS: sha256(folder / METRICS)},
    )


def _name(key: str) -> str:
    """What a key of metrics.jsonl means, empty where it is no loss."""
    found = _LOSS.fullmatch(key)
    if found is None or found["split"] not in _SPLITS:
        return ""
    corpus = f" on {found['corpus']}" if found["corpus"] else ""
    return f"{_SPLITS[found['split']]}{corpus}{_MODES[found['mode']]}"
