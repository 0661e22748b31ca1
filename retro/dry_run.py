"""What the run at hand takes: opens its data and network and times a few real steps. Nothing is written.

Under torchrun all ranks time them together, and the figures are those of all of them; memory is that of each.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from retro.artifact import MANIFEST, UNFINISHED, differing, read_json
from retro.checkpoint import KIND, TrainingState, load_training
from retro.config import RunConfig, TrainConfig
from retro.costs import (
    Flops,
    Memory,
    Parameters,
    device_peak_flops,
    mfu,
    parameter_counts,
    training_memory,
)
from retro.data import Batch
from retro.distributed import joined, rank_device
from retro.errors import ConfigError
from retro.plan import digits, mean_forward, memory_report, share_added
from retro.question_batches import Curriculum, QuestionBatches, WithReplay
from retro.retrofit_costs import base_flops, base_memory, matrix_shapes, retrofit_flops
from retro.train import Progress
from retro.train_setup import Setup, resolve_device, setup
from retro.train_step import StepResult, learning_rate, question_flops, sequence_flops, train_step

MAX_STEPS = 10
"""Steps that are timed at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """What a few real steps showed."""

    seconds: float
    """Of one step."""
    tokens: float
    """Predicted in one step."""
    basis: str
    """What was timed."""
    loss_nats: float
    """Of the last one, per token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BasePlan:
    """What a pretrained base takes."""

    parameters: int
    """Of the base and all that was added."""
    added: int
    """Of encoder and CCA."""
    sequence_flops: float
    """Of a sequence, forward and backward."""
    memory: dict[str, Memory]
    """Weights, gradients and moments, by what becomes of the base: full, frozen, lora, 4-bit."""

    @classmethod
    def of(cls, parts: Setup, forward: Flops, seq_len: int) -> "BasePlan":
        """Counts a network made by `retro.retrofit`, for sequences of a length."""
        model: Any = parts.model
        options, config = parts.run.base, model.config
        assert options is not None
        added = sum(
            p.numel() for module in (model.cca, model.encoder, model.encoder_embedding) for p in module.parameters()
        )
        of_base = base_flops(
            matrix_shapes(model.base),
            dim=config.dim,
            vocab_size=config.vocab_size,
            num_layers=config.num_layers,
            inner=config.num_heads * config.head_dim,
            seq_len=seq_len,
        )
        through = 1.0 if options.lora_rank else (config.num_layers - min(config.cca_layers) + 1) / config.num_layers
        bits = 8 * next(model.base.parameters()).element_size()
        return cls(
            parameters=sum(p.numel() for p in model.parameters()),
            added=added,
            sequence_flops=retrofit_flops(of_base, forward.retrieval, full=options.unfreeze < 0, through=through),
            memory=base_memory(
                model.base, added=added, lora_rank=options.lora_rank or 16, base_bits=bits, ranks=parts.ranks.size
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """What the run at hand takes."""

    run: RunConfig
    """With the vocabulary of the data's tokenizer."""
    device: str
    parameters: Parameters
    timing: Timing
    steps_done: int
    """By an earlier start of the same run."""
    retrieving: float
    """Share of the chunks that have neighbors, `neighbor_dropout` included."""
    forward: Flops
    """Of a sequence, on average."""
    sequence_flops: float
    """Of a sequence, forward and backward."""
    peak: float | None
    """FLOP/s of all devices; None where nobody knows, or where products are not in bfloat16."""
    measured_memory: int
    """Bytes: on a GPU the most that PyTorch had in use, else the most that the process had in memory, programs included."""
    memory: Memory
    """Estimated."""
    base: "BasePlan | None" = None
    """Of a pretrained base that retrieval is put into."""

    @property
    def flops_per_step(self) -> float:
        """Model FLOPs."""
        return self.sequence_flops * self.run.train.batch_size

    def report(self) -> dict[str, Any]:
        """Plain data, for people and programs."""
        train, timing = self.run.train, self.timing
        left = max(train.steps - self.steps_done, 0)
        utilization = {}
        if self.peak is not None:
            share = mfu(self.flops_per_step, timing.seconds, self.peak)
            utilization = {"mfu": round(share, 4), "peak": f"{self.peak / 1e12:g} TFLOP/s in bfloat16 (data sheet)"}
        estimate: dict[str, Any] = {"estimate": memory_report(self.memory, "estimated_bytes")}
        adds = share_added(self.forward)
        if self.base is not None:
            adds = f"{self.base.added:,} parameters"
            estimate = {
                f"weights_and_optimizer_{name}_bytes": memory.total for name, memory in self.base.memory.items()
            }
        return {
            "device": self.device,
            "parameters": self.parameters.total if self.base is None else self.base.parameters,
            "timed": timing.basis,
            "loss_nats": round(timing.loss_nats, 4),
            "seconds_per_step": digits(timing.seconds),
            "tokens_per_s": round(timing.tokens / timing.seconds),
            "steps_done": self.steps_done,
            "steps_left": left,
            "hours_left": digits(left * timing.seconds / 3600),
            "flops_per_step": float(f"{self.flops_per_step:.4g}"),
            "chunks_with_neighbors": round(self.retrieving, 4),
            "retrieval_adds": adds,
            **utilization,
            "measured_bytes": self.measured_memory,
            **estimate,
            "notes": "Evaluations, samples and checkpoints come on top of the hours."
            + (" Questions are read with the most passages of the run." if len(train.passages) > 1 else "")
            + (" FLOPs are those of a step on questions, not on text." if train.replay else ""),
        }


def measure_training(
    run: RunConfig,
    *,
    overwrite: bool = False,
    seconds: float = 60.0,
    progress: Callable[[Progress], None] | None = None,
) -> RunPlan:
    """Opens data and network as `train` does and times a few real steps; nothing is written.

    Args:
        run: As for `train`; `train.out` may be empty.
        overwrite: As for `train`: what `train.out` holds does not count.
        seconds: What timing may take, once everything is open; a single forward and backward pass may take longer.
        progress: Called after every step.

    Raises:
        ConfigError: A setting that cannot work, or a folder that holds something else.
        FormatError, MismatchError: Of the training data, or of what the folder holds.
        TrainingError: Loss or gradient is not finite.
    """
    out = run.train.out
    named = replace(run, train=replace(run.train, out=out or "unnamed.model"))
    with joined(rank_device(run.train.device, resolve_device), timeout_s=run.train.timeout_s) as ranks:
        parts = ranks.together(lambda: setup(named, ranks))
        state = TrainingState()
        if out and not overwrite and ranks.together(lambda: _is_begun(Path(out), parts)):
            state = load_training(Path(out), parts.model, parts.optimizer, ranks) or state
        on_gpu = parts.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(parts.device)
        asked = parts.batches.questions if isinstance(parts.batches, WithReplay) else parts.batches
        if isinstance(asked, QuestionBatches):
            asked.reading = Curriculum(parts.run.train, ()).reading(parts.run.train.steps)
        timing = _timed(parts, state, seconds, progress)
    if on_gpu:
        name = torch.cuda.get_device_name(parts.device)
        used = torch.cuda.max_memory_allocated(parts.device)
    else:
        name = f"{parts.device} with {torch.get_num_threads()} threads"
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    bfloat16 = parts.dtype == torch.bfloat16
    train = parts.run.train
    batch = asked.batch(
        state.sequence,
        min(train.batch_size, 256),
        neighbor_dropout=train.neighbor_dropout if parts.questions else 0.0,
    )
    retrieving = _retrieving(parts, batch)
    peak = device_peak_flops(name) if bfloat16 else None
    forward = question_flops(parts.run.model, batch) if parts.questions else mean_forward(parts.run, retrieving)
    T, K, R = train.seq_len, train.num_neighbors, train.neighbor_len
    if parts.questions:  # whose batches are as long as they must be
        T, K, R = batch.inputs_BT.shape[1], 0, 0
        if batch.keep_BLKR is not None:
            K, R = batch.keep_BLKR.shape[2:]
            T = max(T, parts.run.model.chunk_len * int(batch.keep_BLKR.flatten(2).any(dim=2).sum(dim=1).max()))
    base = None if parts.run.base is None else BasePlan.of(parts, forward, T)
    return RunPlan(
        run=parts.run,
        device=f"{f'{ranks.size} x ' if ranks.size > 1 else ''}{name}, {'bfloat16' if bfloat16 else 'float32'}",
        parameters=parameter_counts(parts.run.model),
        timing=timing,
        steps_done=state.step,
        retrieving=retrieving,
        forward=forward,
        sequence_flops=sequence_flops(parts.run, forward, T) if base is None else base.sequence_flops,
        base=base,
        peak=None if peak is None else peak * ranks.size,
        measured_memory=used,
        memory=training_memory(
            parts.run.model,
            micro_batch_size=train.micro_batch_size,
            seq_len=T,
            num_neighbors=K,
            neighbor_len=R,
            ranks=ranks.size,
            bfloat16=bfloat16,
            checkpointing=parts.model.checkpointing,
            frozen_decoder=train.freeze_decoder,
        ),
    )


def _is_begun(out: Path, parts: Setup) -> bool:
    """Whether a folder holds a beginning of this run.

    Raises:
        ConfigError: It holds something else, as `artifact.begin` would say.
    """
    found = next((read_json(out / name) for name in (MANIFEST, UNFINISHED) if (out / name).is_file()), None)
    if found is None:
        return False
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise ConfigError(f"{out} holds something else than a model: choose another --out")
    if differences := list(differing(found["recipe"], json.loads(json.dumps(parts.recipe)))):
        raise ConfigError(
            f"{out} was made or begun differently ({'; '.join(differences)}). Use the same settings to go on, "
            "--overwrite to start again, or another --out"
        )
    return True


def _timed(parts: Setup, state: TrainingState, seconds: float, progress: Callable[[Progress], None] | None) -> Timing:
    """A micro batch, which prepares kernels and memory; where there is time, another one, and whole steps."""
    config, ranks = parts.run.train, parts.ranks
    deadline = time.monotonic() + seconds
    sequence = state.sequence

    def step(sequences: int) -> tuple[float, StepResult]:
        nonlocal sequence
        begun = time.monotonic()
        # Around a frozen decoder, sequences without neighbors have no backward pass: a few would say nothing of the others.
        is_few = sequences < config.batch_size and (config.freeze_decoder or parts.run.base is not None)
        dropout = 0.0 if is_few else config.neighbor_dropout
        batch = parts.batches.batch(*ranks.part(sequence, sequences), neighbor_dropout=dropout)
        result = _step(parts, batch, config, state.step + 1)
        if parts.device.type == "cuda":
            torch.cuda.synchronize(parts.device)
        took = time.monotonic() - begun
        sequence += sequences
        return took, result

    def is_over(more: float) -> bool:  # on any rank: all make the same steps
        return ranks.any(time.monotonic() + more > deadline)

    at_once = config.micro_batch_size * ranks.size
    parts_of_step = config.batch_size // at_once
    took, result = step(at_once)
    if not is_over(took):
        took, result = step(at_once)
    if is_over(parts_of_step * took):
        return Timing(
            seconds=parts_of_step * took,
            tokens=parts_of_step * result.tokens,
            basis=f"one micro batch of {at_once} sequences, times {parts_of_step}",
            loss_nats=result.loss_nats,
        )
    times: list[float] = []
    tokens = 0
    while not times or (len(times) < MAX_STEPS and not is_over(times[-1])):
        took, result = step(config.batch_size)
        times.append(took)
        tokens += result.tokens
        if progress is not None:
            progress(Progress(len(times), MAX_STEPS, result.loss_nats, tokens / sum(times)))
    return Timing(
        seconds=sum(times) / len(times),
        tokens=tokens / len(times),
        basis=f"{len(times)} steps",
        loss_nats=result.loss_nats,
    )


def _step(parts: Setup, batch: Batch, config: TrainConfig, number: int) -> StepResult:
    return train_step(
        parts.model,
        parts.optimizer,
        batch,
        micro_batch_size=config.micro_batch_size,
        rate=learning_rate(config, number),
        grad_clip=config.grad_clip,
        dtype=parts.dtype,
        ranks=parts.ranks,
    )


def _retrieving(parts: Setup, batch: Batch) -> float:
    """Share of the chunks that have neighbors."""
    if batch.keep_BLKR is None:
        return 0.0
    dropped = 0.0 if parts.questions else parts.run.train.neighbor_dropout
    return (1 - dropped) * float(batch.keep_BLKR.flatten(2).any(dim=2).float().mean())
