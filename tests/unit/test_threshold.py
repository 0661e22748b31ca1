"""The confidence below which a model does not know: kept with the weights it was chosen for, whole or not at all."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import builders
import pytest
import torch
from builders import toy_model_config, toy_tokenizer

from retro.artifact import MANIFEST, file_record, read_manifest, write_json, writing
from retro.checkpoint import KIND, load_model, save_model
from retro.errors import ConfigError, FormatError
from retro.model import Retro
from retro.threshold import ANSWERS, Threshold, load_threshold, save_threshold

THRESHOLD = Threshold(
    min_confidence=0.3, coverage=0.75, accuracy=0.5, chosen_on="nq_open_dev", command="retro eval qa wiki.model"
)
one_thread = pytest.fixture(autouse=True)(builders.one_thread)


def save(folder: Path, seed: int = 0) -> None:
    save_model(folder, Retro(toy_model_config()).initialize(torch.Generator().manual_seed(seed)), toy_tokenizer())


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save(tmp_path / "toy.model")
    return tmp_path / "toy.model"


def alter(folder: Path, **changes: Any) -> None:
    """Writes another threshold as if this program had."""
    content = json.loads((folder / ANSWERS).read_text()) | changes
    write_json(folder / ANSWERS, {key: value for key, value in content.items() if value is not None})
    manifest = read_manifest_unchecked(folder)
    write_json(folder / MANIFEST, manifest | {"files": manifest["files"] | {ANSWERS: file_record(folder / ANSWERS)}})


def read_manifest_unchecked(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    return content


def test_a_threshold_is_part_of_the_model(model: Path) -> None:
    assert load_threshold(model) is None
    before = read_manifest(model, KIND)
    save_threshold(model, THRESHOLD)
    assert load_threshold(model) == THRESHOLD
    after = read_manifest(model, KIND)
    assert set(after["files"]) == {*before["files"], ANSWERS}
    assert {name: record for name, record in after["files"].items() if name != ANSWERS} == before["files"]
    assert {key: value for key, value in after.items() if key != "files"} == {
        key: value for key, value in before.items() if key != "files"
    }
    load_model(model)
    moved = model.with_name("moved.model")
    shutil.copytree(model, moved)
    assert load_threshold(moved) == THRESHOLD


def test_a_later_threshold_takes_the_place_of_an_earlier_one(model: Path) -> None:
    save_threshold(model, THRESHOLD)
    other = Threshold(min_confidence=1, coverage=0, accuracy=1, chosen_on="webq_train", command="")
    save_threshold(model, other)
    assert load_threshold(model) == other
    load_model(model)


def test_a_threshold_changed_by_hand_is_refused(model: Path) -> None:
    save_threshold(model, THRESHOLD)
    path = model / ANSWERS
    path.write_text(path.read_text().replace("0.3", "0.1"))
    for opened in (load_threshold, load_model):
        with pytest.raises(FormatError, match=r"answers\.json .*altered"):
            opened(model)
    path.unlink()
    with pytest.raises(FormatError, match=r"answers\.json is missing"):
        load_threshold(model)


def test_a_threshold_of_other_weights_is_none(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_threshold(model, THRESHOLD)
    save(model, seed=1)  # the manifest is written anew, of all that lies there
    assert ANSWERS in read_manifest(model, KIND)["files"]
    with caplog.at_level(logging.WARNING):
        assert load_threshold(model) is None
    assert "chosen for other weights" in caplog.text
    save_threshold(model, THRESHOLD)
    assert load_threshold(model) == THRESHOLD


def test_killed_while_one_is_saved_the_model_has_none_and_is_sound(model: Path) -> None:
    without = (model / MANIFEST).read_bytes()
    save_threshold(model, THRESHOLD)
    (model / MANIFEST).write_bytes(without)  # killed before the last of its steps
    assert load_threshold(model) is None
    load_model(model)
    save_threshold(model, THRESHOLD)
    assert load_threshold(model) == THRESHOLD


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_confidence": 1.5}, "min_confidence = 1.5"),
        ({"coverage": "all"}, "coverage = 'all'"),
        ({"accuracy": None}, "'accuracy' is missing"),
        ({"min_confidense": 0.1}, "unknown key 'min_confidense'"),
    ],
)
def test_a_threshold_is_read_strictly(model: Path, changes: dict[str, Any], message: str) -> None:
    save_threshold(model, THRESHOLD)
    alter(model, **changes)
    with pytest.raises(ConfigError, match=message):
        load_threshold(model)


def test_what_is_no_threshold_is_refused(model: Path) -> None:
    save_threshold(model, THRESHOLD)
    alter(model, weights=None)
    with pytest.raises(FormatError, match="not a threshold"):
        load_threshold(model)


@pytest.mark.parametrize("name", ["min_confidence", "coverage", "accuracy"])
@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan")])
def test_shares_lie_between_0_and_1(name: str, value: float) -> None:
    values: dict[str, Any] = {"min_confidence": 0.5, "coverage": 0.5, "accuracy": 0.5, "chosen_on": "", "command": ""}
    with pytest.raises(ConfigError, match=f"{name} = "):
        Threshold(**values | {name: value})


def test_a_model_that_is_not_there_or_is_written_gets_none(model: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="has not been made"):
        save_threshold(tmp_path / "none.model", THRESHOLD)
    assert not (tmp_path / "none.model").exists()
    with writing(model), pytest.raises(ConfigError, match="another process"):
        save_threshold(model, THRESHOLD)
