"""RETROfit from a pretrained base to answers: training, resuming, folders, the command line."""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import builders
import pytest
import torch
import transformers
from safetensors.torch import load_file
from typer.testing import CliRunner

from retro.checkpoint import load_model
from retro.chunks import TrainingData
from retro.config import BaseConfig, GenerateConfig, RunConfig, load_run_config
from retro.dry_run import measure_training
from retro.errors import ConfigError, DependencyError, MismatchError
from retro.generate import generate
from retro.metrics import METRICS, read_lines
from retro.model import Retro
from retro.pretrained import base_sizes
from retro.retrofit import load_retrofit
from retro.tokenizer import Tokenizer
from retro.train import train
from retro.train_setup import setup
from retro.train_step import train_step

SIZES: dict[str, Any] = {
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
ADDED = {
    "cca_layers": (2,),
    "encoder_dim": 8,
    "encoder_layers": 1,
    "encoder_heads": 2,
    "encoder_head_dim": 4,
    "encoder_ffw_dim": 16,
    "chunk_len": builders.CHUNK_LEN,
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    yield from builders.one_thread()


def save_base(folder: Path, seed: int = 0, *, vocab: int = 258, tokenizer: Tokenizer | None = None) -> Path:
    """A random GPT-2 with the tokenizer of the toy data."""
    torch.manual_seed(seed)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=vocab, **SIZES)).save_pretrained(folder)
    (tokenizer or builders.toy_tokenizer()).save(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "gpt2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    return builders.random_training_data(tmp_path_factory.mktemp("data") / "toy.data")


def fit_run(data: Path, base: Path, out: Path, options: dict[str, Any] | None = None, **changes: Any) -> RunConfig:
    run = builders.toy_run(data, out, **changes)
    chosen = BaseConfig(name=str(base), **(options or {}))
    sizes = base_sizes(chosen)
    return replace(run, model=replace(run.model, **(sizes | ADDED)), base=chosen)


@pytest.fixture(scope="module")
def trained(data: TrainingData, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(fit_run(data.folder, base, tmp_path_factory.mktemp("out") / "toy.model", sample_tokens=5))


def test_a_model_folder_holds_what_was_trained_and_names_its_base(trained: Path, base: Path) -> None:
    names = set(load_file(trained / "model.safetensors"))
    assert names
    assert not any(name.startswith("base.") for name in names)
    info = json.loads((trained / "config.json").read_text())
    assert info["model_type"] == "retrofit"
    assert (info["base"]["name"], info["base"]["model_type"]) == (str(base.resolve()), "gpt2")
    assert (
        info["tokenizer_fingerprint"]
        == Tokenizer.load(str(base)).fingerprint
        == Tokenizer.load(str(trained)).fingerprint
    )
    card = (trained / "README.md").read_text()
    assert f"put into the base {base.resolve()} (gpt2)" in card
    figures = list(read_lines(trained / METRICS))
    assert {"valid_loss_on_nats", "valid_loss_off_nats"} <= set(figures[-1])
    assert (trained / "samples.jsonl").is_file()


def test_a_trained_model_opens_with_its_base_and_is_that_base_without_retrieval(trained: Path, base: Path) -> None:
    plain: Any = transformers.AutoModelForCausalLM.from_pretrained(base)
    by_name, tokenizer, _ = load_retrofit(trained)
    given, _, _ = load_retrofit(trained, transformers.AutoModelForCausalLM.from_pretrained(base))
    ids_BT = torch.tensor([[tokenizer.bos_id, *range(5, 5 + 2 * builders.CHUNK_LEN - 1)]])
    neighbors = {
        "neighbors_BLKR": torch.arange(2, 2 + 2 * 2 * 5).view(1, 2, 2, 5),
        "keep_BLKR": torch.ones(1, 2, 2, 5, dtype=torch.bool),
    }
    with torch.no_grad():
        off_BTV = plain(ids_BT).logits
        assert torch.equal(by_name(ids_BT), off_BTV)
        on_BTV = by_name(ids_BT, **neighbors)
        assert torch.equal(given(ids_BT, **neighbors), on_BTV)
    differs_T = (on_BTV != off_BTV).any(dim=-1)[0]
    assert differs_T.nonzero()[0].item() == builders.CHUNK_LEN - 1


def test_another_base_is_a_mismatch_that_names_both(trained: Path, base: Path, tmp_path: Path) -> None:
    other = transformers.AutoModelForCausalLM.from_pretrained(save_base(tmp_path / "other", seed=1))
    with pytest.raises(MismatchError) as caught:
        load_retrofit(trained, other)
    assert str(base.resolve()) in str(caught.value)
    assert str(tmp_path / "other") in str(caught.value)


def test_a_model_of_our_own_is_not_opened_as_a_retrofit(data: TrainingData, tmp_path: Path) -> None:
    folder = train(builders.toy_run(data.folder, tmp_path / "own.model", steps=1))
    with pytest.raises(ConfigError, match="is no RETROfitted model"):
        load_retrofit(folder)
    assert isinstance(load_model(folder)[0], Retro)


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}, {"unfreeze": 1}, {"unfreeze": -1}], ids=str)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    data: TrainingData, base: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    whole = train(fit_run(data.folder, base, tmp_path / "whole.model", options, eval_every=100))

    def stop(progress: Any) -> None:
        if progress.step == 3:
            raise KeyboardInterrupt

    again = fit_run(data.folder, base, tmp_path / "again.model", options, eval_every=100)
    with pytest.raises(KeyboardInterrupt):
        train(again, progress=stop)
    resumed = train(again)
    expected, actual = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    model, _, _ = load_retrofit(resumed)
    state = model.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    if options:
        assert any(name.startswith("base.") for name in expected)


def test_training_lowers_the_loss_with_retrieval_and_leaves_that_without_as_it_is(
    data: TrainingData, base: Path, tmp_path: Path
) -> None:
    run = fit_run(
        data.folder, base, tmp_path / "m.model", steps=30, learning_rate=1e-2, eval_every=15, neighbor_dropout=0.0
    )
    lines = list(read_lines(train(run) / METRICS))
    off = {line["valid_loss_off_nats"] for line in lines if "valid_loss_off_nats" in line}
    assert len(off) == 1
    losses = [line["loss_nats"] for line in lines if "loss_nats" in line]
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.1


def test_a_run_does_not_go_on_with_another_base(trained: Path, data: TrainingData, base: Path, tmp_path: Path) -> None:
    other = save_base(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match="base"):
        train(fit_run(data.folder, other, trained, sample_tokens=5, steps=8))


def test_generation_without_retrieval_is_that_of_the_base(trained: Path, base: Path) -> None:
    model, tokenizer, _ = load_model(trained)
    plain: Any = transformers.AutoModelForCausalLM.from_pretrained(base)
    [result] = generate(model, tokenizer, ["The oil"], GenerateConfig(max_new_tokens=10, num_neighbors=0))
    ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode("The oil").ids.tolist()]])
    made = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False, pad_token_id=1)
    assert result.ids == made[0, ids.shape[1] :].tolist()


def test_a_bfloat16_base_is_trained_and_opened_in_bfloat16(data: TrainingData, base: Path, tmp_path: Path) -> None:
    folder = train(fit_run(data.folder, base, tmp_path / "m.model", precision="bfloat16", steps=2))
    assert all(tensor.dtype == torch.float32 for tensor in load_file(folder / "model.safetensors").values())
    model, _, _ = load_retrofit(folder)
    assert model.base.dtype == torch.bfloat16
    wide, _, _ = load_retrofit(folder, transformers.AutoModelForCausalLM.from_pretrained(base))
    assert wide.base.dtype == torch.float32


# The command line


def test_the_command_makes_a_model_of_a_base_and_generates_and_asks(
    data: TrainingData, base: Path, tmp_path: Path
) -> None:
    from retro.cli import app

    sets = [f"model.{key}={list(value) if isinstance(value, tuple) else value}" for key, value in ADDED.items()]
    sets += [
        "train.seq_len=32",
        "train.neighbor_len=12",
        "train.batch_size=4",
        "train.micro_batch_size=4",
        "train.steps=2",
    ]
    sets += ["train.sample_tokens=0", "train.precision=float32", "base.lora_rank=2"]
    out = tmp_path / "m.model"
    arguments = ["train", "--base", str(base), "--data", str(data.folder), "--out", str(out)]
    result = CliRunner().invoke(app, [*arguments, *(part for key in sets for part in ("--set", key))])
    assert result.exit_code == 0, result.output
    assert "trained for 2 steps" in result.output
    assert any("lora_" in name for name in load_file(out / "model.safetensors"))
    for command in (["generate", "The oil"], ["ask", "When?"]):
        result = CliRunner().invoke(app, [*command, "--model", str(out), "-k", "0", "--max-new-tokens", "4", "--json"])
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)


def test_the_sizes_of_a_run_follow_from_its_base(base: Path) -> None:
    name = f"base.name='{base}'"
    run = load_run_config(None, [name, "model.cca_layers=[1]"], sizes=base_sizes)
    assert (run.model.dim, run.model.num_layers, run.model.vocab_size) == (16, 2, 258)
    assert run.model.cca_layers == (1,)
    assert (
        load_run_config(None, [name], sizes=base_sizes, preset="tiny").model
        == load_run_config(None, [name], sizes=base_sizes).model
    )
    assert run.base == BaseConfig(name=str(base))
    with pytest.raises(ConfigError, match=r"\[base\]: the key 'name' is missing"):
        load_run_config(None, ["base.lora_rank=2"], preset="tiny")


# What cannot work


def test_data_in_the_tokens_of_another_model_are_refused(data: TrainingData, tmp_path: Path) -> None:
    few = save_base(tmp_path / "few", vocab=200)
    with pytest.raises(
        MismatchError, match=r"258 different tokens, the base .* 200: make the training data with `retro data"
    ):
        train(fit_run(data.folder, few, tmp_path / "m.model"))
    trained = Tokenizer.train(["other words, other words"], 260)
    other = save_base(tmp_path / "other", vocab=260, tokenizer=trained)
    with pytest.raises(
        MismatchError, match=f"tokenizer {builders.toy_tokenizer().fingerprint}, the base .*{trained.fingerprint}"
    ):
        train(fit_run(data.folder, other, tmp_path / "m.model"))


def test_sequences_longer_than_the_bases_positions_are_refused(data: TrainingData, base: Path, tmp_path: Path) -> None:
    long = builders.make_training_data(
        tmp_path / "long.data",
        *builders.random_documents(0, counts={"train": 6, "valid": 2, "test": 1}, max_tokens=400),
    )
    with pytest.raises(ConfigError, match="the base knows 64 positions"):
        train(fit_run(long.folder, base, tmp_path / "m.model", seq_len=256))


def test_a_base_that_is_not_there_or_has_no_head_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing' cannot be opened as a causal language model"):
        base_sizes(BaseConfig(name=str(tmp_path / "nothing")))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=258, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaModel(config).save_pretrained(tmp_path / "body")
    from retro.pretrained import open_base

    with pytest.raises(ConfigError, match=r"has no lm_head\.weight"):
        open_base(BaseConfig(name=str(tmp_path / "body")), torch.float32)
    t5 = transformers.T5Config(vocab_size=258, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    t5.save_pretrained(tmp_path / "t5")
    with pytest.raises(ConfigError, match=r"\(t5\) is an encoder-decoder"):
        base_sizes(BaseConfig(name=str(tmp_path / "t5")))


def test_quantization_without_its_library_says_what_to_install(base: Path) -> None:
    import importlib.util

    from retro.pretrained import open_base

    if importlib.util.find_spec("bitsandbytes") is not None:
        pytest.skip("bitsandbytes is installed")
    with pytest.raises(DependencyError, match=r"4bit' needs .* pip install bitsandbytes"):
        open_base(BaseConfig(name=str(base), quantization="4bit"), torch.float32)
    with pytest.raises(ConfigError, match="quantized weights cannot be trained"):
        BaseConfig(name=str(base), quantization="8bit", unfreeze=1)


# Several ranks


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_two_ranks_train_as_one(data: TrainingData, base: Path, tmp_path: Path, precision: str) -> None:
    """GPT-2's output is its table: both are in one unit. The two also keep no activations of the layers."""
    losses = []
    for ranks in (1, 2):
        out = tmp_path / f"{ranks}.model"
        sets = [f"model.{key}={list(value) if isinstance(value, tuple) else value}" for key, value in ADDED.items()]
        sets += ["train.seq_len=32", "train.neighbor_len=12", "train.batch_size=4", "train.micro_batch_size=1"]
        sets += [
            "train.steps=4",
            "train.sample_tokens=0",
            "train.log_every=1",
            "train.eval_every=2",
            "train.eval_sequences=4",
        ]
        sets += [f"train.precision={precision}", "train.device=cpu", "train.learning_rate=0.01", "base.lora_rank=2"]
        arguments = ["train", "--base", str(base), "--data", str(data.folder), "--out", str(out)]
        arguments += [part for key in sets for part in ("--set", key)]
        start = [sys.executable, "-m", "retro"]
        if ranks > 1:
            arguments += ["--set", "train.activation_checkpointing=true"]
            start = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                "2",
                "-m",
                "retro",
            ]
        done = subprocess.run([*start, *arguments], capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        load_retrofit(out)
        losses.append([line["loss_nats"] for line in read_lines(out / METRICS) if "loss_nats" in line])
    tolerance = 1e-5 if precision == "float32" else 2e-2
    assert losses[0] == pytest.approx(losses[1], abs=tolerance)
    assert all(map(math.isfinite, losses[0]))
    assert len(losses[0]) == 4


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_a_quantized_base_is_trained_around_with_adapters_and_known_again(
    data: TrainingData, tmp_path: Path, quantization: str
) -> None:
    """Its quantized tensors cannot be compared, the others are: also with the base as it was before."""
    pytest.importorskip("bitsandbytes")
    wide = SIZES | {"n_embd": 64}
    torch.manual_seed(0)
    base = tmp_path / "wide"
    transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=258, **wide)).save_pretrained(base)
    builders.toy_tokenizer().save(base)
    options = {"quantization": quantization, "lora_rank": 2}
    folder = train(fit_run(data.folder, base, tmp_path / "m.model", options, steps=2))
    model, _, info = load_retrofit(folder)
    assert info["base"]["quantized"]
    assert any("lora_B" in name for name in model.state_dict())
    load_retrofit(folder, transformers.AutoModelForCausalLM.from_pretrained(base))
    changed: Any = transformers.AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        changed.transformer.wte.weight[7] += 1
    with pytest.raises(MismatchError, match=r"transformer\.wte\.weight"):
        load_retrofit(folder, changed)


@pytest.mark.parametrize("options", [{}, {"lora_rank": 4}, {"unfreeze": -1}])
def test_a_dry_run_counts_the_base_and_gives_the_memory_of_every_way_to_train_it(
    data: TrainingData, base: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    run = fit_run(data.folder, base, tmp_path / "toy.model", options)
    plan = measure_training(run, seconds=5)
    model: Any = setup(run).model
    named = dict(model.named_parameters())
    added = sum(p.numel() for name, p in named.items() if not name.startswith("base."))
    report = plan.report()
    assert report["parameters"] == sum(p.numel() for p in named.values())
    assert report["retrieval_adds"] == f"{added:,} parameters"
    sizes = {way: report[f"weights_and_optimizer_{way}_bytes"] for way in ("full", "frozen", "lora", "4-bit")}
    frozen = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_pretrained(base).parameters())
    assert sizes["frozen"] == 16 * added + 4 * frozen
    assert sizes["full"] == 16 * (added + frozen)
    assert sizes["frozen"] < sizes["lora"] < sizes["full"]
    assert sizes["4-bit"] < sizes["lora"]
    assert not (tmp_path / "toy.model").exists()
    # All of the base: three times its forward pass and encoder's; frozen: less.
    assert plan.base is not None
    whole = measure_training(fit_run(data.folder, base, tmp_path / "b.model", {"unfreeze": -1}), seconds=5)
    assert whole.base is not None
    assert (plan.base.sequence_flops == whole.base.sequence_flops) == (options == {"unfreeze": -1})
    assert plan.base.sequence_flops <= whole.base.sequence_flops


def test_a_step_in_which_no_sequence_has_neighbors_leaves_a_frozen_base_and_all_else_as_it_was(
    data: TrainingData, base: Path, tmp_path: Path
) -> None:
    """Nothing that is trained takes part in it: there is no gradient, which is no error."""
    parts = setup(fit_run(data.folder, base, tmp_path / "toy.model"))
    before = {name: p.detach().clone() for name, p in parts.model.named_parameters()}
    batch = parts.batches.batch(0, 2, neighbors="off")
    result = train_step(
        parts.model, parts.optimizer, batch, micro_batch_size=1, rate=1e-3, grad_clip=1.0, dtype=torch.float32
    )
    assert result.grad_norm == 0
    assert result.loss_nats > 0
    for name, parameter in parts.model.named_parameters():
        assert torch.equal(parameter, before[name])
