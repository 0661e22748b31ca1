"""The confidence below which a model says that it does not know: chosen on questions, kept in the model's folder.

X.model/answers.json     min_confidence, coverage, accuracy, chosen_on, command, weights
"""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from retro.artifact import (
    MANIFEST,
    file_record,
    fingerprint,
    open_manifest,
    read_json,
    read_manifest,
    write_json,
    writing,
)
from retro.checkpoint import KIND, TRAINING
from retro.config import config_from_dict
from retro.errors import ConfigError, FormatError

logger = logging.getLogger(__name__)

ANSWERS = "answers.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold:
    """A confidence, and what it brought on the questions that it was chosen on."""

    min_confidence: float
    """Answers below it are not given; in [0, 1]."""
    coverage: float
    """Share of the questions that were answered, in [0, 1]."""
    accuracy: float
    """Share of the given answers that were right, in [0, 1]."""
    chosen_on: str
    """Name of the questions."""
    command: str
    """That chose it."""

    def __post_init__(self) -> None:
        for name in ("min_confidence", "coverage", "accuracy"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} = {getattr(self, name)}: must be a share, from 0 to 1")


def save_threshold(folder: Path, threshold: Threshold) -> None:
    """Puts a threshold into a finished model's folder, in place of an earlier one; killed on the way, it leaves none.

    Raises:
        FormatError: There is no such model, or it is unfinished or damaged.
        ConfigError: Another process is writing there.
        StorageError: It cannot be written.
    """
    read_manifest(folder, KIND)
    with writing(folder):
        manifest = read_manifest(folder, KIND)
        files = {name: record for name, record in manifest["files"].items() if name != ANSWERS}
        if ANSWERS in manifest["files"]:
            write_json(folder / MANIFEST, manifest | {"files": files})
        write_json(folder / ANSWERS, asdict(threshold) | {"weights": _weights(manifest)})
        files[ANSWERS] = file_record(folder / ANSWERS)
        write_json(folder / MANIFEST, manifest | {"files": dict(sorted(files.items()))})


def load_threshold(folder: Path) -> Threshold | None:
    """The threshold that was chosen for a model's present weights; None where none was.

    Raises:
        FormatError: There is no such model, or the threshold is damaged or was altered by hand.
        ConfigError: A key of it is unknown, missing or out of range.
    """
    manifest = open_manifest(folder, KIND)
    path = folder / ANSWERS
    if ANSWERS not in manifest["files"]:
        return None
    if not path.is_file() or file_record(path) != manifest["files"][ANSWERS]:
        raise FormatError(
            f"{path} is missing or was altered: choose the confidence again, by the command that chose it"
        )
    values = read_json(path)
    if not isinstance(values, dict) or "weights" not in values:
        raise FormatError(f"{path} is not a threshold of this program: choose the confidence again")
    if values.pop("weights") != _weights(manifest):
        logger.warning("%s was chosen for other weights and is not used: choose the confidence again", path)
        return None
    return config_from_dict(Threshold, values, where=str(path))


def _weights(manifest: dict[str, Any]) -> str:
    """Which weights a model has."""
    return fingerprint(
        {
            name: record["sha256"]
            for name, record in manifest["files"].items()
            if name.endswith(".safetensors") and not name.startswith(f"{TRAINING}/")
        }
    )
