"""Models and states of training: what is saved is read back, what is damaged is noticed."""

import json
import logging
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from builders import one_thread, toy_model_config, toy_tokenizer
from torch.testing import assert_close

from retro.artifact import MANIFEST, read_manifest, write_manifest
from retro.checkpoint import (
    CONFIG,
    INDEX,
    KIND,
    TRAINING,
    WEIGHTS,
    TrainingState,
    load_model,
    load_training,
    save_model,
    save_tensors,
    save_training,
)
from retro.config import TrainConfig
from retro.errors import FormatError, MismatchError, StorageError
from retro.export import export_model
from retro.model import Retro
from retro.tokenizer import Tokenizer
from retro.train_setup import make_optimizer

_one_thread = pytest.fixture(autouse=True, scope="module")(one_thread)
INPUTS = torch.arange(2, 18).view(1, 16)
SHARD = "shard-00001-model-00001-of-00001.safetensors"


def make_model(seed: int = 0, **changes: Any) -> Retro:
    return Retro(toy_model_config(**changes)).initialize(torch.Generator().manual_seed(seed))


def rewrite_manifest(folder: Path) -> None:
    """Makes the manifest agree with altered files, so that what lies behind it is tested."""
    (folder / MANIFEST).unlink()
    write_manifest(folder, KIND, {})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_model(tmp_path / "m", make_model(), toy_tokenizer(), training={"steps": 3, "valid_loss_on_nats": 1.25})
    return tmp_path / "m"


# --- models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False, "encoder_dim": 24}, {"cca_layers": ()}])
def test_a_loaded_model_computes_what_the_saved_one_did(changes: dict[str, Any], tmp_path: Path) -> None:
    model = make_model(**changes)
    save_model(tmp_path / "m", model, toy_tokenizer())
    loaded, tokenizer, info = load_model(tmp_path / "m")
    assert loaded.config == model.config
    assert tokenizer.fingerprint == info["tokenizer_fingerprint"] == toy_tokenizer().fingerprint
    assert not loaded.training
    with torch.no_grad():
        assert_close(loaded(INPUTS), model(INPUTS), rtol=0, atol=0)


def test_saving_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_model(tmp_path / name, make_model(), toy_tokenizer(), training={"steps": 1})
    assert read_manifest(tmp_path / "a", KIND) == read_manifest(tmp_path / "b", KIND)


def test_config_holds_the_figures_and_the_card_shows_them(saved: Path) -> None:
    info = json.loads((saved / CONFIG).read_text())
    assert info["training"] == {"steps": 3, "valid_loss_on_nats": 1.25}
    card = (saved / "README.md").read_text()
    parameters = sum(p.numel() for p in make_model().parameters())
    for expected in (f"{parameters:,} parameters", "- steps: 3", "| valid loss on | 1.2500 |", "layers 2", "License"):
        assert expected in card


def test_a_model_that_is_not_there_or_unfinished_is_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="is not there"):
        load_model(tmp_path / "nothing")
    (saved / MANIFEST).unlink()
    with pytest.raises(FormatError, match="interrupted"):
        load_model(saved)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, "tokenizer.json", "README.md"])
def test_an_altered_byte_is_noticed(saved: Path, name: str) -> None:
    content = bytearray((saved / name).read_bytes())
    content[len(content) // 2] ^= 1
    (saved / name).write_bytes(content)
    with pytest.raises(FormatError, match=f"{name} was altered"):
        load_model(saved)


def test_weights_that_are_no_safetensors_are_refused(saved: Path) -> None:
    (saved / WEIGHTS).write_bytes(b"nonsense" * 4)
    rewrite_manifest(saved)
    with pytest.raises(FormatError, match=r"model\.safetensors is damaged"):
        load_model(saved)


def test_another_tokenizer_is_a_mismatch(saved: Path) -> None:
    Tokenizer.train(["other other other"], 262).save(saved)
    rewrite_manifest(saved)
    with pytest.raises(MismatchError, match="trained with the tokenizer"):
        load_model(saved)


def test_weights_of_another_network_are_a_mismatch(saved: Path) -> None:
    weights = dict(make_model().state_dict())
    weights["strange"] = weights.pop("norm.weight")
    weights["embedding.weight"] = weights["embedding.weight"][:, :8].contiguous()
    save_tensors(saved / WEIGHTS, weights)
    rewrite_manifest(saved)
    message = r"norm\.weight is missing; strange is unknown; embedding\.weight is \[258, 8\] instead of \[258, 16\]"
    with pytest.raises(MismatchError, match=message):
        load_model(saved)


def test_a_config_of_something_else_is_refused(saved: Path) -> None:
    (saved / CONFIG).write_text('{"architectures": ["GPT2"]}')
    rewrite_manifest(saved)
    with pytest.raises(FormatError, match="not that of a model"):
        load_model(saved)


# --- weights in fewer bits and in several files -------------------------------------------------------------------


@pytest.fixture
def sharded(saved: Path, tmp_path: Path) -> Path:
    """The model in 8 bits and at least three files."""
    export_model(saved, tmp_path / "narrow.model", weights="int8", max_shard_bytes=9_000)
    assert len(list((tmp_path / "narrow.model").glob("model-*.safetensors"))) >= 3
    return tmp_path / "narrow.model"


@pytest.mark.parametrize("max_shard_bytes", [None, 25_000])
@pytest.mark.parametrize("tied", [True, False])
def test_float32_weights_are_the_same_bit_for_bit_in_any_number_of_files(
    max_shard_bytes: int | None, tied: bool, tmp_path: Path
) -> None:
    model = make_model(tie_embeddings=tied)
    save_model(tmp_path / "m", model, toy_tokenizer())
    made = export_model(tmp_path / "m", tmp_path / "e", weights="float32", max_shard_bytes=max_shard_bytes)
    assert (made.files > 1) == (max_shard_bytes is not None)
    loaded, tokenizer, info = load_model(tmp_path / "e")
    assert tokenizer.fingerprint == toy_tokenizer().fingerprint
    assert (info["stored_weights"], info["dtype"]) == ("float32", "float32")
    assert list(loaded.state_dict()) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_a_table_that_is_input_and_output_is_stored_once(saved: Path, tmp_path: Path) -> None:
    made = export_model(saved, tmp_path / "e", weights="bfloat16")
    stored = safetensors.torch.load_file(tmp_path / "e" / WEIGHTS)
    table = make_model().embedding.weight
    assert [name for name, tensor in stored.items() if tensor.shape == table.shape] == ["embedding.weight"]
    parameters = sum(p.numel() for p in make_model().parameters())
    assert sum(tensor.nbytes for tensor in stored.values()) == 2 * parameters
    assert made.weights_bytes == (tmp_path / "e" / WEIGHTS).stat().st_size < made.source_weights_bytes / 2 + 8192


def test_bfloat16_weights_are_opened_as_torch_rounds_them(saved: Path, tmp_path: Path) -> None:
    export_model(saved, tmp_path / "e", weights="bfloat16", max_shard_bytes=25_000)
    loaded, _, info = load_model(tmp_path / "e")
    assert info["dtype"] == "bfloat16"
    for name, tensor in make_model().state_dict().items():
        assert loaded.state_dict()[name].dtype == torch.float32
        assert torch.equal(loaded.state_dict()[name], tensor.to(torch.bfloat16).float()), name


def test_a_model_in_8_bits_computes_nearly_the_same_and_is_a_quarter_as_large(sharded: Path) -> None:
    model, (narrow, _, info) = make_model(), load_model(sharded)
    assert (info["stored_weights"], info["dtype"]) == ("int8", "float32")
    for name, tensor in model.state_dict().items():
        step = tensor.abs().amax(dim=-1, keepdim=True) / 127
        assert ((narrow.state_dict()[name] - tensor).abs() <= (step * 0.501 if tensor.ndim == 2 else 0)).all(), name
    with torch.no_grad():
        expected, found = model(INPUTS), narrow(INPUTS)
    # Each product of n terms is off by about its weights' 1 / 127 / sqrt(12) of the largest: 1% of logits, a few times.
    off = (found - expected).std() / expected.std()
    assert 0 < off < 0.03
    plain = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    matrices = [t for path in sharded.glob("model-*.safetensors") for t in safetensors.torch.load_file(path).values()]
    assert sum(t.nbytes for t in matrices if t.dtype == torch.int8) == plain


def test_a_copy_of_a_copy_in_8_bits_is_the_same_model(sharded: Path, tmp_path: Path) -> None:
    export_model(sharded, tmp_path / "again", weights="int8")
    export_model(sharded, tmp_path / "wide", weights="float32")
    for name in ("again", "wide"):
        for key, tensor in load_model(sharded)[0].state_dict().items():
            assert_close(load_model(tmp_path / name)[0].state_dict()[key], tensor, rtol=1e-6, atol=0)
    card = (tmp_path / "again" / "README.md").read_text()
    assert card.count("## Stored weights") == 1
    assert card.count("## License and limits") == 1


def test_a_missing_or_damaged_file_of_several_is_noticed(sharded: Path) -> None:
    names = sorted(path.name for path in sharded.glob("model-*.safetensors"))
    alter(sharded / names[1])
    with pytest.raises(FormatError, match=f"{names[1]} was altered"):
        load_model(sharded)
    (sharded / names[1]).write_bytes(b"nonsense" * 4)
    rewrite_manifest(sharded)
    with pytest.raises(FormatError, match=f"{names[1]} is damaged"):
        load_model(sharded)
    (sharded / names[1]).unlink()
    rewrite_manifest(sharded)
    with pytest.raises(FormatError, match=f"{names[1]} is missing"):
        load_model(sharded)


def test_an_index_that_does_not_fit_its_files_is_refused(sharded: Path) -> None:
    path = sharded / INDEX
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index))
    with pytest.raises(FormatError, match=r"index\.json has .* bytes instead of"):
        load_model(sharded)
    first, second = sorted(set(index["weight_map"].values()))[:2]
    name = next(name for name, file in index["weight_map"].items() if file == first)
    edits: list[tuple[dict[str, str], str]] = [
        (index["weight_map"] | {name: second}, f"does not say what {first} holds"),
        (index["weight_map"] | {"strange": first}, "strange stands in one of them only; 1 in all"),
        (index["weight_map"] | {name: "model-00009-of-00003.safetensors"}, f"does not say what {first} holds"),
        (index["weight_map"] | {name: "../other.model/model.safetensors"}, "does not say which file"),
    ]
    for places, message in edits:
        path.write_text(json.dumps({**index, "weight_map": places}))
        rewrite_manifest(sharded)
        with pytest.raises(FormatError, match=message):
            load_model(sharded)
    path.write_text("[]")
    rewrite_manifest(sharded)
    with pytest.raises(FormatError, match="does not say which file holds which weights"):
        load_model(sharded)
    path.write_text(json.dumps({**index, "weight_map": {n: f for n, f in index["weight_map"].items() if f != second}}))
    rewrite_manifest(sharded)
    with pytest.raises((FormatError, MismatchError), match=r"is missing|has no _scale"):
        load_model(sharded)


# --- the state of training ----------------------------------------------------------------------------------------


def stepped(seed: int, steps: int = 2) -> tuple[Retro, torch.optim.AdamW]:
    """A model after some optimizer steps without neighbors: CCA and encoder have no optimizer state."""
    model = make_model(seed)
    optimizer = make_optimizer(model, TrainConfig())
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(model(INPUTS).square().mean())
        optimizer.step()
    return model, optimizer


def test_a_state_is_read_back_exactly_and_training_goes_on_the_same(tmp_path: Path) -> None:
    model, optimizer = stepped(0)
    state = TrainingState(step=7, sequence=28, tokens=100, seconds=1.5)
    save_training(tmp_path, model, optimizer, state)
    other, other_optimizer = stepped(1, steps=1)
    assert load_training(tmp_path, other, other_optimizer) == state
    for m, o in ((model, optimizer), (other, other_optimizer)):
        o.zero_grad(set_to_none=True)
        torch.autograd.backward(m(INPUTS).square().mean())
        o.step()
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert_close(theirs, ours, rtol=0, atol=0, msg=name)
        assert optimizer.state.get(ours, {}).keys() == other_optimizer.state.get(theirs, {}).keys()


def test_only_the_newest_two_states_are_kept(tmp_path: Path) -> None:
    model, optimizer = stepped(0)
    for step in (9, 10, 11):
        save_training(tmp_path, model, optimizer, TrainingState(step=step))
    assert sorted(p.name for p in (tmp_path / TRAINING).iterdir()) == ["step-00000010", "step-00000011"]


def test_nothing_saved_is_nothing_to_go_on_from(tmp_path: Path) -> None:
    assert load_training(tmp_path, *stepped(0)) is None


def test_a_state_is_plain_safetensors_of_weights_and_moments(tmp_path: Path) -> None:
    model, optimizer = stepped(0)
    save_training(tmp_path, model, optimizer, TrainingState(step=1))
    place = tmp_path / TRAINING / "step-00000001"
    assert sorted(path.name for path in place.iterdir()) == [SHARD, "state.json"]
    found = safetensors.torch.load_file(place / SHARD)
    expected = {f"weights/{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        expected |= {f"optimizer/{name}/{key}": value for key, value in optimizer.state.get(parameter, {}).items()}
    assert any(name.endswith("/exp_avg_sq") for name in expected)
    assert_close(found, expected, rtol=0, atol=0)


def test_a_state_of_another_network_is_a_mismatch(tmp_path: Path) -> None:
    save_training(tmp_path, *stepped(0), TrainingState(step=1))
    for changes, message in (
        ({"ffw_dim": 40}, r"is \[32, 16\] instead of \[40, 16\]"),
        ({"num_layers": 3}, "is missing"),
    ):
        other = make_model(**changes)
        with pytest.raises(MismatchError, match=message):
            load_training(tmp_path, other, make_optimizer(other, TrainConfig()))


def test_a_full_disk_is_said_and_leaves_the_state_before(
    tmp_path: Path, file_limit: Callable[[int], AbstractContextManager[None]]
) -> None:
    model, optimizer = stepped(0)
    save_training(tmp_path, model, optimizer, TrainingState(step=1))
    with pytest.raises(StorageError, match="the disk is full"), file_limit(20_000):
        save_training(tmp_path, model, optimizer, TrainingState(step=2))
    assert [path.name for path in (tmp_path / TRAINING).iterdir()] == ["step-00000001"]
    assert load_training(tmp_path, model, optimizer) == TrainingState(step=1)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def corrupt_state(path: Path) -> None:
    path.write_text('{"step": 2}')


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (SHARD, truncate),
        (SHARD, alter),
        (SHARD, Path.unlink),
        ("state.json", truncate),
        ("state.json", corrupt_state),
        ("state.json", Path.unlink),
        ("", shutil.rmtree),
    ],
)
def test_a_damaged_state_gives_way_to_the_one_before(
    name: str, damage: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older, older_optimizer = stepped(0)
    save_training(tmp_path, older, older_optimizer, TrainingState(step=1))
    save_training(tmp_path, *stepped(1), TrainingState(step=2))
    newest = tmp_path / TRAINING / "step-00000002"
    damage(newest / name)
    model, optimizer = stepped(2)
    with caplog.at_level(logging.WARNING):
        state = load_training(tmp_path, model, optimizer)
    assert state == TrainingState(step=1)
    warned = " ".join(record.getMessage() for record in caplog.records if record.name == "retro.checkpoint")
    assert (str(newest) in warned) == bool(name)
    for ours, theirs in zip(older.parameters(), model.parameters(), strict=True):
        assert_close(theirs, ours, rtol=0, atol=0)


def test_a_damaged_state_is_replaced_when_its_step_comes_again(tmp_path: Path) -> None:
    model, optimizer = stepped(0)
    save_training(tmp_path, model, optimizer, TrainingState(step=1))
    alter(tmp_path / TRAINING / "step-00000001" / SHARD)
    save_training(tmp_path, model, optimizer, TrainingState(step=1))
    assert load_training(tmp_path, model, optimizer) == TrainingState(step=1)


def test_no_intact_state_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    model, optimizer = stepped(0)
    for step in (1, 2):
        save_training(tmp_path, model, optimizer, TrainingState(step=step))
        alter(tmp_path / TRAINING / f"step-{step:08d}" / SHARD)
    with pytest.raises(FormatError, match=r"none of the 2 checkpoints .* --overwrite"):
        load_training(tmp_path, model, optimizer)
