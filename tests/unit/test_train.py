"""The parts of training, each against a number worked out another way."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import one_thread, random_training_data, toy_model_config, toy_run
from torch.testing import assert_close

from retro.config import RunConfig, TrainConfig
from retro.data import Batch, Batches
from retro.errors import ConfigError, MismatchError, TrainingError
from retro.metrics import METRICS, PLOT, Metrics
from retro.model import Retro
from retro.train_setup import make_optimizer, open_batches, resolve_device, resolve_precision, setup
from retro.train_step import evaluate_loss, learning_rate, train_step

_one_thread = pytest.fixture(autouse=True, scope="module")(one_thread)


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_training_data(tmp_path_factory.mktemp("data") / "toy.data").folder


@pytest.fixture
def run(data_folder: Path, tmp_path: Path) -> RunConfig:
    return toy_run(data_folder, tmp_path / "m")


def step_once(model: Retro, optimizer: torch.optim.Optimizer, batch: Batch, **changes: Any) -> Any:
    options: dict[str, Any] = {"micro_batch_size": 4, "rate": 1e-3, "grad_clip": 0.0, "dtype": torch.float32}
    return train_step(model, optimizer, batch, **(options | changes))


def naive_loss(model: Retro, batch: Batch) -> tuple[float, int]:
    """Sum of the losses, slot by slot, and their number."""
    with torch.no_grad():
        logits = model(
            batch.inputs_BT,
            keep_BT=batch.keep_BT,
            document_BL=batch.document_BL,
            neighbors_BLKR=batch.neighbors_BLKR,
            keep_BLKR=batch.keep_BLKR,
        )
    total, count = 0.0, 0
    for b, t in batch.loss_BT.nonzero().tolist():
        total -= F.log_softmax(logits[b, t].double(), dim=-1)[batch.targets_BT[b, t]].item()
        count += 1
    return total, count


# --- learning rate ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "expected"),
    [(1, 0.25), (2, 0.5), (4, 1.0), (6, 0.1 + 0.9 * 0.8535533905932737), (8, 0.55), (12, 0.1)],
)
def test_the_rate_rises_linearly_and_falls_by_half_a_cosine(step: int, expected: float) -> None:
    config = TrainConfig(learning_rate=1.0, final_learning_rate=0.1, warmup_steps=4, steps=12)
    assert learning_rate(config, step) == pytest.approx(expected, rel=1e-12)


def test_the_rate_works_without_warmup_and_with_warmup_longer_than_the_run() -> None:
    no_warmup = TrainConfig(learning_rate=1.0, final_learning_rate=0.5, warmup_steps=0, steps=1)
    assert learning_rate(no_warmup, 1) == 0.5
    long_warmup = TrainConfig(learning_rate=1.0, warmup_steps=10, steps=5)
    assert learning_rate(long_warmup, 5) == 0.5


# --- optimizer and step -------------------------------------------------------------------------------------------


def test_decay_shrinks_matrices_and_leaves_the_scales_of_norms_alone() -> None:
    model = Retro(toy_model_config()).initialize(torch.Generator().manual_seed(0))
    optimizer = make_optimizer(model, TrainConfig(learning_rate=0.1, weight_decay=0.5))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1 - 0.1 * 0.5 if parameter.ndim == 2 else 1.0
        assert_close(parameter.detach(), before[name] * factor, msg=name)
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len(before)


def test_gradients_of_four_parts_are_those_of_one_batch(run: RunConfig) -> None:
    parts = setup(run)
    batch = parts.batches.batch(0, 4)
    assert len(set(batch.loss_BT.sum(dim=1).tolist())) > 1, "a mean of means would pass"
    results, gradients = [], []
    for size in (4, 1):
        results.append(step_once(parts.model, parts.optimizer, batch, micro_batch_size=size, rate=0.0))
        gradients.append({name: p.grad.clone() for name, p in parts.model.named_parameters() if p.grad is not None})
    assert len(gradients[0]) == len(list(parts.model.parameters()))
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient, rtol=1e-6, atol=1e-6 * gradient.abs().max().item(), msg=name)
    total, count = naive_loss(parts.model, batch)
    for result in results:
        assert result.tokens == count
        assert result.loss_nats == pytest.approx(total / count, rel=1e-6)
        assert result.grad_norm == pytest.approx(results[0].grad_norm, rel=1e-5)


def test_a_long_gradient_is_clipped_and_its_true_norm_reported(run: RunConfig) -> None:
    parts = setup(run)
    batch = parts.batches.batch(0, 4)
    norms = []
    for clip in (0.0, 0.125):
        result = step_once(parts.model, parts.optimizer, batch, grad_clip=clip, rate=0.0)
        grads = [p.grad for p in parts.model.parameters() if p.grad is not None]
        norms.append((result.grad_norm, torch.cat([g.flatten() for g in grads]).norm().item()))
    assert norms[0][0] == pytest.approx(norms[0][1], rel=1e-5)
    assert norms[0][0] > 0.125
    assert norms[1] == pytest.approx((norms[0][0], 0.125), rel=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing(run: RunConfig, value: float) -> None:
    parts = setup(run)
    step_once(parts.model, parts.optimizer, parts.batches.batch(0, 4))
    parts.model.norm.weight.data[3].fill_(value)
    before = {name: p.detach().clone() for name, p in parts.model.named_parameters()}
    moments = {p: {k: v.clone() for k, v in s.items()} for p, s in parts.optimizer.state.items()}
    with pytest.raises(TrainingError, match="the loss is nan"):
        step_once(parts.model, parts.optimizer, parts.batches.batch(4, 4))
    for name, parameter in parts.model.named_parameters():
        assert_close(parameter.detach(), before[name], rtol=0, atol=0, equal_nan=True)
    for key, state in parts.optimizer.state.items():
        assert_close(state, moments[key], rtol=0, atol=0)


def test_bfloat16_is_near_float32_and_leaves_the_weights_float32(run: RunConfig) -> None:
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        parts = setup(run)
        losses.append(step_once(parts.model, parts.optimizer, parts.batches.batch(0, 4), dtype=dtype).loss_nats)
        assert {p.dtype for p in parts.model.parameters()} == {torch.float32}
    assert losses[1] != losses[0]
    assert losses[1] == pytest.approx(losses[0], rel=2**-8)  # one rounding of the logits


# --- evaluation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sequences", [0, 3])
def test_losses_are_sums_over_tokens_of_the_same_sequences(run: RunConfig, sequences: int) -> None:
    parts = setup(run)
    batches = open_batches(next(iter(parts.corpora.values())), "valid", run)
    count = sequences or batches.sequences_per_epoch
    assert count <= batches.sequences_per_epoch
    parts.model.train()
    found = evaluate_loss(parts.model, batches, sequences=sequences, batch_size=2, dtype=torch.float32)
    assert parts.model.training
    assert list(found.loss_nats) == ["on", "off", "shuffled"]
    for mode, loss in found.loss_nats.items():
        total, tokens = naive_loss(parts.model, batches.batch(0, count, neighbors=mode))
        assert found.tokens == tokens
        assert loss == pytest.approx(total / tokens, rel=1e-6)
    assert len(set(found.loss_nats.values())) == 3


def test_evaluation_is_the_same_twice_and_asks_for_no_more_than_there_is(run: RunConfig) -> None:
    parts = setup(run)
    batches = open_batches(next(iter(parts.corpora.values())), "test", run)
    found = [
        evaluate_loss(parts.model, batches, sequences=n, batch_size=3, dtype=torch.float32) for n in (0, 1000, 1000)
    ]
    assert found[0] == found[1] == found[2]


def test_a_decoder_without_cca_is_measured_without_retrieval_only(data_folder: Path, tmp_path: Path) -> None:
    run = toy_run(data_folder, tmp_path, model={"cca_layers": ()})
    parts = setup(run)
    assert parts.batches.batch(0, 1).neighbors_BLKR is None
    batches = open_batches(next(iter(parts.corpora.values())), "valid", run)
    found = evaluate_loss(parts.model, batches, sequences=0, batch_size=2, dtype=torch.float32)
    assert list(found.loss_nats) == ["off"]


# --- setup --------------------------------------------------------------------------------------------------------


def test_the_vocabulary_is_that_of_the_data(data_folder: Path, tmp_path: Path) -> None:
    parts = setup(toy_run(data_folder, tmp_path, model={"vocab_size": 5000}))
    assert parts.run.model.vocab_size == parts.model.config.vocab_size == 258


def test_initial_weights_depend_on_the_seed_only(data_folder: Path, tmp_path: Path) -> None:
    weights = []
    for seed, noise in ((3, 0), (3, 1), (4, 1)):
        with torch.random.fork_rng():
            torch.manual_seed(noise)
            weights.append(setup(toy_run(data_folder, tmp_path, seed=seed)).model.embedding.weight.detach())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])


def test_chunks_of_another_length_are_a_mismatch(data_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=r"chunks of 8 tokens, the model has chunk_len = 4: set model\.chunk_len=8"):
        setup(toy_run(data_folder, tmp_path, model={"chunk_len": 4}))


@pytest.mark.parametrize("missing", ["data", "out"])
def test_a_run_names_its_data_and_its_place(run: RunConfig, missing: str) -> None:
    changes: dict[str, Any] = {missing: ""}
    with pytest.raises(ConfigError, match=rf"train\.{missing} is empty"):
        setup(replace(run, train=replace(run.train, **changes)))


def test_devices_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("cpu") == resolve_device("auto") == torch.device("cpu")
    for name in ("cuda", "cuda:1"):
        with pytest.raises(ConfigError, match="finds no GPU"):
            resolve_device(name)
    for name in ("tpu", "cuda:", "cuda:x", "cpu:0", ""):
        with pytest.raises(ConfigError, match="must be auto, cpu, cuda or cuda:N"):
            resolve_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    assert resolve_device("auto") == torch.device("cuda")
    with pytest.raises(ConfigError, match="there are 2 GPUs here, cuda:0 to cuda:1"):
        resolve_device("cuda:2")


def test_precision_is_float32_on_a_cpu_unless_asked_for() -> None:
    cpu = torch.device("cpu")
    assert resolve_precision("auto", cpu) == torch.float32
    assert resolve_precision("float32", cpu) == torch.float32
    assert resolve_precision("bfloat16", cpu) == torch.bfloat16


@pytest.mark.parametrize("is_native", [False, True])
def test_a_cpu_that_emulates_bfloat16_is_warned_of(
    is_native: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("retro.train_setup.cpu_has_bfloat16", lambda: is_native)
    resolve_precision("bfloat16", torch.device("cpu"))
    assert ("only emulates bfloat16" in caplog.text) == (not is_native)


def test_batches_of_training_are_permuted_and_those_of_the_other_splits_are_not(run: RunConfig) -> None:
    data = next(iter(setup(run).corpora.values()))
    orders = {}
    for split in ("train", "valid", "test"):
        batches: Batches = open_batches(data, split, run)
        documents = batches.batch(0, batches.sequences_per_epoch).document_BL.flatten()
        orders[split] = bool((documents[documents >= 0].diff() >= 0).all())
    assert orders == {"train": False, "valid": True, "test": True}


# --- metrics ------------------------------------------------------------------------------------------------------


def test_lines_after_the_checkpoint_and_half_a_line_are_cut_off(tmp_path: Path) -> None:
    records = [{"step": step, "loss_nats": 1 / step} for step in (1, 2, 3, 4)]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / METRICS).write_text(text + '{"step": 1, "lo')
    metrics = Metrics(tmp_path, 2)
    assert list(metrics.lines()) == records[:2]
    metrics.append(records[3])
    assert (tmp_path / METRICS).read_text() == "".join(text.splitlines(keepends=True)[i] for i in (0, 1, 3))


def test_the_plot_is_a_small_png_and_the_same_for_the_same_losses(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 0)
    metrics.draw()
    for step in range(1, 100):
        metrics.append({"step": step, "loss_nats": 5 / step})
    metrics.append({"step": 99, "valid_loss_on_nats": 1.0, "valid_loss_off_nats": 2.0, "valid_loss_shuffled_nats": 3.0})
    plots = []
    for _ in range(2):
        metrics.draw()
        plots.append((tmp_path / PLOT).read_bytes())
    assert plots[0] == plots[1]
    assert plots[0].startswith(b"\x89PNG")
    assert len(plots[0]) < 100_000
