"""Training: setup, train_step, evaluate_loss, and `train`, which makes a model's folder out of them.

A run that was interrupted, killed or asked for more steps goes on from its newest checkpoint when it is started again. On the CPU
it then ends with the same weights, bit for bit, as if it had never stopped: the batches and the learning rate are functions of
the step's number, and nothing else is random.
"""

import contextlib
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from retro import artifact
from retro.checkpoint import (
    KIND,
    TrainingState,
    load_training,
    prune_training,
    save_model,
    save_tensors,
    save_training,
)
from retro.chunks import TrainingData
from retro.config import Precision, RunConfig, TrainConfig, config_to_dict
from retro.data import Batch, Batches, Retrieval
from retro.errors import ConfigError, MismatchError, TrainingError
from retro.metrics import Metrics
from retro.model import Retro

logger = logging.getLogger(__name__)

CHANGEABLE = ("data", "out", "steps", "log_every", "eval_every", "eval_sequences", "save_every", "device")
"""Settings that may differ when a run goes on. The data may have moved, but must be the same; with other `steps` the learning rate
follows the new cosine from where the run is."""


class Progress(NamedTuple):
    """What a progress bar shows after a step."""

    step: int
    """Steps done."""
    steps: int
    """Steps in all."""
    loss_nats: float
    """Of this step's batch, per token."""
    tokens_per_s: float
    """Since the last line of the metrics."""


class StepResult(NamedTuple):
    """Figures of one optimizer step."""

    loss_nats: float
    """Mean over the step's tokens."""
    grad_norm: float
    """Before clipping."""
    tokens: int
    """Tokens that were predicted."""


class Evaluation(NamedTuple):
    """Losses over the same sequences, with and without retrieval."""

    loss_nats: dict[Retrieval, float]
    """Mean over the tokens."""
    tokens: int
    """How many there were."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a run works with."""

    run: RunConfig
    """As given, with the vocabulary of the data's tokenizer."""
    data: TrainingData
    model: Retro
    """With initial weights, on `device`."""
    optimizer: torch.optim.AdamW
    batches: Batches
    """Of the split train."""
    device: torch.device
    dtype: torch.dtype
    """Of the matrix products."""
    recipe: dict[str, Any]
    """All that determines the weights, the number of steps apart."""


# --- the parts ----------------------------------------------------------------------------------------------------


def setup(run: RunConfig) -> Setup:
    """Opens the training data and makes network and optimizer.

    Raises:
        ConfigError: A setting is missing, or the data cannot serve it.
        FormatError: The data is missing or damaged.
        MismatchError: Network and data have chunks of different lengths.
    """
    config = run.train
    if not config.data or not config.out:
        missing = "data" if not config.data else "out"
        raise ConfigError(f"train.{missing} is empty: set it in the file, or with --set train.{missing}=FOLDER")
    device = resolve_device(config.device)
    dtype = resolve_precision(config.precision, device)
    data = TrainingData(Path(config.data))
    if data.chunk_len != run.model.chunk_len:
        raise MismatchError(
            f"{data.folder} is cut into chunks of {data.chunk_len} tokens, the model has chunk_len = "
            f"{run.model.chunk_len}: set model.chunk_len={data.chunk_len}, or make the data again"
        )
    run = replace(run, model=replace(run.model, vocab_size=data.tokenizer.vocab_size))
    batches = open_batches(data, "train", run)
    model = Retro(run.model).initialize(torch.Generator().manual_seed(config.seed)).to(device)
    kept = {key: value for key, value in config_to_dict(config).items() if key not in CHANGEABLE}
    recipe = {
        "model": config_to_dict(run.model),
        "train": kept,
        "data": artifact.fingerprint(data.manifest["files"]),
    }
    return Setup(
        run=run,
        data=data,
        model=model,
        optimizer=make_optimizer(model, config),
        batches=batches,
        device=device,
        dtype=dtype,
        recipe=recipe,
    )


def open_batches(data: TrainingData, split: str, run: RunConfig) -> Batches:
    """The sequences of a split; only those of the split train are permuted. A model without CCA gets no neighbors."""
    return Batches(
        data,
        split,
        seq_len=run.train.seq_len,
        num_neighbors=run.train.num_neighbors if run.model.cca_layers else 0,
        neighbor_len=run.train.neighbor_len,
        seed=run.train.seed,
        permute=split == "train",
    )


def resolve_device(name: str) -> torch.device:
    """The device of a name: auto (the first GPU where there is one), cpu, cuda or cuda:N.

    Raises:
        ConfigError: The name is unknown, or there is no such GPU.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = name.partition(":")
    if name == "cpu":
        return torch.device("cpu")
    if kind != "cuda" or not (name == "cuda" or number.isdigit()):
        raise ConfigError(f"device = {name!r}: must be auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise ConfigError(f"device = {name!r}: PyTorch finds no GPU here; use cpu, or install PyTorch for CUDA")
    if int(number or 0) >= count:
        raise ConfigError(f"device = {name!r}: there are {count} GPUs here, cuda:0 to cuda:{count - 1}")
    return torch.device(name)


def resolve_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """dtype of the matrix products; weights, optimizer, norms and losses are float32 in any case."""
    if precision == "auto":
        able = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if able else torch.float32
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def make_optimizer(model: Retro, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101); matrices decay, the scales of the norms do not."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Rate of a step, counted from 1: linear to the highest at `warmup_steps`, then half a cosine to the final at `steps`."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    done = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    share = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return config.final_learning_rate + share * (config.learning_rate - config.final_learning_rate)


def train_step(
    model: Retro,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    *,
    micro_batch_size: int,
    rate: float,
    grad_clip: float,
    dtype: torch.dtype,
) -> StepResult:
    """One optimizer step: the loss is the sum over all tokens of the batch, divided by their number.

    Args:
        model: Left in training mode.
        optimizer: Of its parameters.
        batch: Anywhere; it goes to the model's device in parts of `micro_batch_size` sequences, whose gradients are summed.
        micro_batch_size: Sequences of one forward pass.
        rate: Learning rate.
        grad_clip: Largest norm of the gradient; 0 means no limit.
        dtype: bfloat16 turns autocast on.

    Raises:
        TrainingError: Loss or gradient is not finite; weights and optimizer are as they were.
    """
    model.train()
    optimizer.zero_grad(set_to_none=True)
    device = next(model.parameters()).device
    tokens = int(batch.loss_BT.sum())
    loss = torch.zeros((), device=device)
    for part in batch.split(micro_batch_size):
        loss_sum = _loss_sum(model, part.to(device), dtype)
        (loss_sum / tokens).backward()  # type: ignore[no-untyped-call]
        loss += loss_sum.detach() / tokens
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    loss_nats, grad_norm = torch.stack([loss, norm]).tolist()
    if not (math.isfinite(loss_nats) and math.isfinite(grad_norm)):
        raise TrainingError(f"the loss is {loss_nats} and the norm of its gradient {grad_norm}")
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return StepResult(loss_nats, grad_norm, tokens)


def _loss_sum(model: Retro, batch: Batch, dtype: torch.dtype) -> Tensor:
    with torch.autocast(batch.inputs_BT.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss: Tensor = model(**batch.tensors())
    return loss


@torch.no_grad()
def evaluate_loss(model: Retro, batches: Batches, *, sequences: int, batch_size: int, dtype: torch.dtype) -> Evaluation:
    """Loss with retrieval on, off, and with the neighbors of other documents ("shuffled"), over the same sequences.

    Args:
        model: In any mode, which it has again afterwards.
        batches: Of the split; without neighbors only "off" is measured.
        sequences: How many, from the first on; 0 means all of the split.
        batch_size: Sequences of one forward pass.
        dtype: bfloat16 turns autocast on.

    Raises:
        ConfigError: The data has no other documents to shuffle with.
    """
    count = min(sequences or batches.sequences_per_epoch, batches.sequences_per_epoch)
    modes: tuple[Retrieval, ...] = get_args(Retrieval) if batches.num_neighbors else ("off",)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    sums: dict[Retrieval, float] = dict.fromkeys(modes, 0.0)
    tokens = 0
    try:
        for first in range(0, count, batch_size):
            size = min(batch_size, count - first)
            for mode in modes:
                batch = batches.batch(first, size, neighbors=mode)
                sums[mode] += _loss_sum(model, batch.to(device), dtype).item()
            tokens += int(batch.loss_BT.sum())
    finally:
        model.train(was_training)
    return Evaluation({mode: total / tokens for mode, total in sums.items()}, tokens)


# --- the run ------------------------------------------------------------------------------------------------------


def train(run: RunConfig, *, overwrite: bool = False, progress: Callable[[Progress], None] | None = None) -> Path:
    """Trains a model, or goes on with it, and returns its folder.

    Args:
        run: Network and training; `model.vocab_size` gives way to that of the data's tokenizer.
        overwrite: Start again, whatever the folder holds of an earlier run.
        progress: Called after every step.

    Raises:
        ConfigError: Settings that cannot work, or that differ from those the run was begun with (but for `CHANGEABLE`).
        FormatError, MismatchError: Of the training data, or of what the folder holds.
        TrainingError: Loss or gradient is not finite. The step was not made, and its batch is saved.
        KeyboardInterrupt: After SIGINT or SIGTERM, when the step is finished and saved.
    """
    parts = setup(run)
    out, steps = Path(run.train.out), run.train.steps
    with artifact.writing(out):
        finished = artifact.begin(out, KIND, parts.recipe, overwrite=overwrite)
        state = load_training(out, parts.model, parts.optimizer) or TrainingState()
        if state.step > steps:
            raise ConfigError(f"{out} has had {state.step} steps already: set train.steps to that or more")
        if finished and state.step == steps:
            logger.info("%s is finished: %d steps", out, steps)
            return out
        if finished:  # more steps are asked for
            artifact.reopen(out, KIND, parts.recipe)
        if state.step:
            logger.info("going on with %s after step %d of %d", out, state.step, steps)
        metrics = Metrics(out, state.step)
        with _interrupts() as interrupted:
            state = _steps(parts, out, state, metrics, progress, interrupted)
        _complete(parts, out, state, metrics)
    return out


def _steps(
    parts: Setup,
    out: Path,
    state: TrainingState,
    metrics: Metrics,
    progress: Callable[[Progress], None] | None,
    interrupted: Callable[[], bool],
) -> TrainingState:
    """Trains from `state` to the last step."""
    config = parts.run.train
    validation = _open_held_out(parts, "valid")
    begun, done = time.monotonic(), state
    meter = _Meter()
    for step in range(state.step + 1, config.steps + 1):
        rate = learning_rate(config, step)
        batch = parts.batches.batch(state.sequence, config.batch_size, neighbor_dropout=config.neighbor_dropout)
        result = _guarded_step(parts, out, batch, step, rate)
        state = TrainingState(
            step=step,
            sequence=state.sequence + config.batch_size,
            tokens=state.tokens + result.tokens,
            seconds=done.seconds + time.monotonic() - begun,
        )
        tokens_per_s = meter.add(result.tokens)
        if progress is not None:
            progress(Progress(step, config.steps, result.loss_nats, tokens_per_s))
        last, stop = step == config.steps, interrupted()
        if last or step % config.log_every == 0:
            metrics.append(_record(parts, state, result, rate, tokens_per_s))
            meter = _Meter()
        if last or step % config.eval_every == 0:
            if validation is not None:
                metrics.append({"step": step, **_evaluated(parts, validation, "valid", config.eval_sequences)})
            metrics.draw()
            meter = _Meter()
        if last or stop or step % config.save_every == 0:
            save_training(out, parts.model, parts.optimizer, state)
            meter = _Meter()
        if stop:
            raise KeyboardInterrupt
    return state


def _guarded_step(parts: Setup, out: Path, batch: Batch, step: int, rate: float) -> StepResult:
    """`train_step`; where it refuses, the batch is saved for whoever looks for the reason."""
    config = parts.run.train
    try:
        return train_step(
            parts.model,
            parts.optimizer,
            batch,
            micro_batch_size=config.micro_batch_size,
            rate=rate,
            grad_clip=config.grad_clip,
            dtype=parts.dtype,
        )
    except TrainingError as error:
        path = out / f"failed-batch-{step:08d}.safetensors"
        save_tensors(path, batch.tensors())
        raise TrainingError(
            f"step {step}: {error}. The step was not made and its batch is in {path}. "
            "Mostly the learning rate is too high: lower train.learning_rate and start again with --overwrite"
        ) from error


def _open_held_out(parts: Setup, split: str) -> Batches | None:
    if len(parts.data.documents(split)) == 0:
        logger.warning("%s has no document in the split %s: its loss is not measured", parts.data.folder, split)
        return None
    return open_batches(parts.data, split, parts.run)


def _evaluated(parts: Setup, batches: Batches, split: str, sequences: int) -> dict[str, float]:
    """Losses of a split as metrics."""
    config = parts.run.train
    evaluation = evaluate_loss(
        parts.model, batches, sequences=sequences, batch_size=config.micro_batch_size, dtype=parts.dtype
    )
    losses = {f"{split}_loss_{mode}_nats": loss for mode, loss in evaluation.loss_nats.items()}
    logger.info("%s over %d tokens", ", ".join(f"{k} {v:.4f}" for k, v in losses.items()), evaluation.tokens)
    return {**losses, f"{split}_tokens": evaluation.tokens}


def _complete(parts: Setup, out: Path, state: TrainingState, metrics: Metrics) -> None:
    """Measures the test loss and makes the folder a model."""
    figures: dict[str, Any] = {
        "data": parts.data.folder.name,
        "steps": state.step,
        "tokens": state.tokens,
        "epochs": state.sequence / parts.batches.sequences_per_epoch,
        "seconds": round(state.seconds, 3),
    }
    for line in metrics.lines():  # the newest remain
        figures |= {key: value for key, value in line.items() if key.startswith("valid_")}
        if "loss_nats" in line:
            figures["train_loss_nats"] = line["loss_nats"]
    test = _open_held_out(parts, "test")
    if test is not None:
        figures |= _evaluated(parts, test, "test", 0)
    figures["settings"] = config_to_dict(parts.run.train)
    prune_training(out, keep=1)
    save_model(out, parts.model, parts.data.tokenizer, training=figures, recipe=parts.recipe)
    logger.info(
        "%s is finished: %d steps, %s, %.0f tokens/s",
        out,
        state.step,
        ", ".join(f"{key} {value:.4f}" for key, value in figures.items() if key.endswith("_nats")),
        state.tokens / max(state.seconds, 1e-9),
    )


class _Meter:
    """Tokens per second since it was made."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._tokens = 0

    def add(self, tokens: int) -> float:
        self._tokens += tokens
        return self._tokens / max(time.monotonic() - self._begun, 1e-9)


def _record(
    parts: Setup, state: TrainingState, result: StepResult, rate: float, tokens_per_s: float
) -> dict[str, float]:
    """A step as metrics."""
    record = {
        "step": state.step,
        "loss_nats": result.loss_nats,
        "learning_rate": rate,
        "grad_norm": result.grad_norm,
        "tokens_per_s": round(tokens_per_s, 1),
        "seconds": round(state.seconds, 3),
    }
    if parts.device.type == "cuda":
        record["gpu_memory_bytes"] = torch.cuda.max_memory_allocated(parts.device)
    return record


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Turns SIGINT and SIGTERM into a question that can be asked between steps; a second signal interrupts at once.

    Python gives signals to the main thread only: in others nothing is changed.
    """
    caught: list[int] = []

    def note(number: int, _frame: object) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)
        logger.warning("interrupted: finishing the step and saving; once more stops at once")

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
