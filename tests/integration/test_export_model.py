"""`retro export`: from a trained folder to a smaller one that opens wherever the first did."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import builders
import pytest
import torch
import transformers
from commands import Outcome, command, done, refused
from safetensors import safe_open
from torch import Tensor
from torch.testing import assert_close

from retro.artifact import read_manifest
from retro.checkpoint import CONFIG, INDEX, KIND, load_model
from retro.config import BaseConfig, ModelConfig
from retro.errors import MismatchError
from retro.hub import RetroForCausalLM
from retro.pretrained import base_sizes
from retro.retrofit import load_retrofit
from retro.threshold import Threshold, load_threshold, save_threshold
from retro.train import train

LIMIT = 9 << 10


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    yield from builders.one_thread()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training, with all that it leaves."""
    folder = tmp_path_factory.mktemp("trained")
    data = builders.random_training_data(folder / "toy.data")
    model = train(builders.toy_run(data.folder, folder / "toy.model", sample_tokens=5, steps=30, learning_rate=1e-2))
    (model / "LICENSE").write_text("as you like")
    return model


@pytest.fixture(scope="module")
def narrow(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("narrow") / "int8.model"
    done("export", trained, "--out", out, "--weights", "int8", "--max-shard-size", LIMIT)
    return out


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "inputs_BT": torch.randint(2, 258, (2, 4 * builders.CHUNK_LEN), generator=generator),
        "neighbors_BLKR": torch.randint(2, 258, (2, 4, 2, 12), generator=generator),
        "keep_BLKR": torch.ones(2, 4, 2, 12, dtype=torch.bool),
    }


def test_the_copy_holds_what_is_needed_and_nothing_that_training_left(trained: Path, narrow: Path) -> None:
    shards = sorted(path.name for path in narrow.glob("model-*"))
    assert len(shards) > 1
    assert all((narrow / name).stat().st_size <= LIMIT for name in shards)
    assert sorted(path.name for path in narrow.iterdir() if path.name != ".lock") == sorted(
        [
            *shards,
            INDEX,
            *("LICENSE", "README.md", "config.json", "generation_config.json", "manifest.json"),
            *("tokenizer.json", "tokenizer_config.json"),
        ]
    )
    for name in ("LICENSE", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (narrow / name).read_bytes() == (trained / name).read_bytes()
    before, after = (json.loads((folder / CONFIG).read_text()) for folder in (trained, narrow))
    assert after == before | {"dtype": "float32", "stored_weights": "int8"}
    index = json.loads((narrow / INDEX).read_text())
    for name in shards:
        with safe_open(narrow / name, framework="pt") as file:
            assert {tensor for tensor, place in index["weight_map"].items() if place == name} == set(file.keys())
    own_card, card = ((folder / "README.md").read_text() for folder in (trained, narrow))
    section = (
        "## Stored weights\n\nAs 8-bit integers with a float32 scale for each row of a matrix, norms as float32; widened when "
        f"the model is opened. In {len(shards)} files, `{shards[0]}` to `{shards[-1]}`.\n\n"
    )
    assert card.replace(section, "") == own_card
    assert section in card


def test_the_report_says_what_lies_in_the_folder(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "e.model"
    report = json.loads(
        done("export", trained, "--out", out, "--weights", "bfloat16", "--max-shard-size", "18KiB", "--json").out
    )
    sizes = [path.stat().st_size for path in out.glob("model-*.safetensors")]
    assert report == {
        "folder": str(out),
        "weights": "bfloat16",
        "bfloat16": [],
        "files": len(sizes),
        "weights_bytes": sum(sizes),
        "largest_file_bytes": max(sizes),
        "folder_bytes": sum(p.stat().st_size for p in out.iterdir() if p.name not in (".lock", "manifest.json")),
        "source_weights_bytes": (trained / "model.safetensors").stat().st_size,
    }
    assert report["largest_file_bytes"] <= 18 << 10
    lines = done("export", trained, "--out", out, "--weights", "bfloat16", "--max-shard-size", "18KiB").out.splitlines()
    assert lines[1].split() == ["weights", "bfloat16"]


def test_a_copy_in_8_bits_says_nearly_what_the_model_says(trained: Path, narrow: Path) -> None:
    (whole, _, _), (small, _, _) = load_model(trained), load_model(narrow)
    with torch.no_grad():
        expected, found = whole(**inputs()).log_softmax(-1), small(**inputs()).log_softmax(-1)
    divergence = (expected.exp() * (expected - found)).sum(-1)
    assert 0 < divergence.mean() < 1e-3
    agreed = (expected.argmax(-1) == found.argmax(-1)).float().mean()
    assert agreed >= 0.95
    assert json.loads(done("generate", "--model", narrow, "-k", 0, "abc", "--json").out)["tokens"] > 0


def test_a_part_of_a_copy_can_stay_in_bfloat16(trained: Path, narrow: Path, tmp_path: Path) -> None:
    out = tmp_path / "e.model"
    arguments = ["--weights", "int8", "--bfloat16", "encoder", "--max-shard-size", LIMIT]
    report = json.loads(done("export", trained, "--out", out, *arguments, "--json").out)
    assert report["bfloat16"] == ["encoder"]
    own, eight, mixed = (load_model(folder)[0].state_dict() for folder in (trained, narrow, out))
    for name, tensor in mixed.items():
        matrix_there = name.startswith("encoder.") and tensor.ndim == 2
        assert torch.equal(tensor, own[name].to(torch.bfloat16).float() if matrix_there else eight[name]), name
    assert "The matrices of encoder are in bfloat16. In " in (out / "README.md").read_text()
    refused(command("export", trained, "--out", out, "--weights", "int8"), "bfloat16", "--overwrite")
    refused(
        command("export", trained, "--out", tmp_path / "f.model", "--weights", "int8", "--bfloat16", "coder"), "'coder'"
    )
    assert not (tmp_path / "f.model").exists()


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "int8 --bfloat16 encoder"])
def test_transformers_open_every_copy_as_we_do(weights: str, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "e.model"
    done("export", trained, "--out", out, "--weights", *weights.split(), "--max-shard-size", "18KiB")
    assert (out / INDEX).is_file()
    ours = load_model(out)[0]
    opened: Any = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert isinstance(opened, RetroForCausalLM)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(opened.model.state_dict()[name], tensor), name
    by_default: Any = RetroForCausalLM.from_pretrained(out)
    expected = torch.bfloat16 if weights == "bfloat16" else torch.float32
    assert {parameter.dtype for parameter in by_default.parameters()} == {expected}
    asked: Any = RetroForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(asked.model.state_dict()[name], tensor.to(torch.bfloat16)), name
    # What it saves is a plain model again, also where it does not know its tokenizer.
    opened.save_pretrained(tmp_path / "saved")
    opened.tokenizer = None
    opened.save_pretrained(tmp_path / "bare")
    assert "stored_weights" not in json.loads((tmp_path / "bare" / CONFIG).read_text())
    bare: Any = RetroForCausalLM.from_pretrained(tmp_path / "bare")
    assert torch.equal(bare.model.embedding.weight, ours.embedding.weight)
    again, _, info = load_model(tmp_path / "saved")
    assert "stored_weights" not in info
    for name, tensor in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_transformers_refuse_damaged_copies(narrow: Path, tmp_path: Path) -> None:
    copy = tmp_path / "e.model"
    for name in ("model-00002", INDEX):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(narrow, copy)
        path = next(copy.glob(f"{name}*"))
        path.write_bytes(path.read_bytes()[:-9] + b"000000000")
        with pytest.raises(Exception, match=f"{path.name} was altered"):
            RetroForCausalLM.from_pretrained(copy)


def test_the_same_export_again_does_nothing_and_another_one_needs_overwrite(
    trained: Path, tmp_path: Path, folder_bytes: Callable[[Path], dict[str, bytes]]
) -> None:
    out, other = tmp_path / "a.model", tmp_path / "b.model"
    arguments = ["--weights", "int8", "--max-shard-size", LIMIT]
    for folder in (out, other):
        done("export", trained, "--out", folder, *arguments)
    made = folder_bytes(out)
    assert made == folder_bytes(other)
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    done("export", trained, "--out", out, *arguments)
    assert times == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    refused(command("export", trained, "--out", out, "--weights", "bfloat16"), str(out), "int8", "--overwrite")
    assert folder_bytes(out) == made
    done("export", trained, "--out", out, "--weights", "bfloat16", "--overwrite")
    assert sorted(path.name for path in out.glob("model*")) == ["model.safetensors"]
    assert read_manifest(out, KIND)["recipe"]["weights"] == "bfloat16"


def test_the_confidence_below_which_a_model_does_not_know_goes_with_it(trained: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "m.model", tmp_path / "e.model"
    shutil.copytree(trained, folder)
    chosen = Threshold(min_confidence=0.25, coverage=0.5, accuracy=0.75, chosen_on="dev", command="retro eval qa")
    save_threshold(folder, chosen)
    done("export", folder, "--out", out, "--weights", "int8")
    assert load_threshold(out) == chosen
    load_model(out)
    own = replace(chosen, min_confidence=0.5)
    save_threshold(out, own)
    done("export", folder, "--out", out, "--weights", "int8")
    assert load_threshold(out) == own


def test_what_must_not_be_written_over_is_left_alone(
    trained: Path, tmp_path: Path, folder_bytes: Callable[[Path], dict[str, bytes]]
) -> None:
    before = folder_bytes(trained)
    for out in (trained, trained / "small", trained.parent):
        refused(command("export", trained, "--out", out, "--overwrite"), "the model itself", "another --out")
    other = tmp_path / "other.model"
    shutil.copytree(trained, other)
    refused(command("export", trained, "--out", other), str(other), "--overwrite")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    refused(command("export", trained, "--out", tmp_path / "mine", "--overwrite"), "was not made by this program")
    assert folder_bytes(trained) == before


def test_what_is_no_finished_model_is_not_exported(trained: Path, tmp_path: Path) -> None:
    unfinished, out = tmp_path / "u.model", tmp_path / "e.model"
    shutil.copytree(trained, unfinished)
    (unfinished / "manifest.json").rename(unfinished / "build.json")
    refused(command("export", unfinished, "--out", out), str(unfinished), "interrupted")
    refused(command("export", tmp_path / "nothing", "--out", out), "is not there")
    damaged = tmp_path / "d.model"
    shutil.copytree(trained, damaged)
    (damaged / "model.safetensors").write_bytes(b"short")
    refused(command("export", damaged, "--out", out), "model.safetensors has 5 bytes")
    assert not out.exists()


def test_impossible_settings_are_said_before_anything_is_written(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "e.model"
    refused(command("export", trained, "--out", out, "--max-shard-size", "8KiB"), "8,192 bytes", "embedding.weight")
    refused(command("export", trained, "--out", out, "--max-shard-size", "many"), "'many' is no amount of memory")
    outcome: Outcome = command("export", trained, "--out", out, "--weights", "int4")
    assert outcome.code == 2
    assert "must be one of float32, bfloat16, int8" in " ".join(outcome.err.split())
    assert not out.exists()


def test_a_full_disk_is_said_and_the_copy_goes_on_afterwards(trained: Path, tmp_path: Path, file_limit: Any) -> None:
    out = tmp_path / "e.model"
    with file_limit(20_000):
        refused(command("export", trained, "--out", out), "the disk is full")
    with pytest.raises(Exception, match="interrupted"):
        load_model(out)
    done("export", trained, "--out", out)
    load_model(out)


def test_a_retrofitted_model_is_exported_without_its_base_and_opens_with_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    config = transformers.GPT2Config(vocab_size=258, bos_token_id=0, eos_token_id=1, **sizes)
    base = tmp_path / "gpt2"
    transformers.GPT2LMHeadModel(config).save_pretrained(base)
    builders.toy_tokenizer().save(base)
    data = builders.random_training_data(tmp_path / "toy.data")
    options = BaseConfig(name=str(base))
    run = builders.toy_run(data.folder, tmp_path / "fit.model")
    added: dict[str, Any] = {"cca_layers": (2,), "encoder_dim": 8, "encoder_layers": 1, "encoder_heads": 2}
    added |= {"encoder_head_dim": 4, "encoder_ffw_dim": 16, "chunk_len": builders.CHUNK_LEN}
    network: ModelConfig = replace(run.model, **(base_sizes(options) | added))
    folder = train(replace(run, model=network, base=options))
    base.rename(tmp_path / "away")
    for weights in ("float32", "int8"):
        done("export", folder, "--out", tmp_path / weights, "--weights", weights, "--max-shard-size", "16KiB")
    (tmp_path / "away").rename(base)
    whole, exact, narrow = (load_retrofit(f)[0] for f in (folder, tmp_path / "float32", tmp_path / "int8"))
    with torch.no_grad():
        expected = whole(**inputs())
        assert torch.equal(exact(**inputs()), expected)
        assert not torch.equal(narrow(**inputs()), expected)
        assert_close(narrow(**inputs()), expected, rtol=0, atol=0.02)
    other = transformers.GPT2LMHeadModel(config)
    with pytest.raises(MismatchError):
        load_retrofit(tmp_path / "int8", other)
