"""A check before a long training: whether the network learns one small batch by heart."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from retro.config import RunConfig
from retro.errors import TrainingError
from retro.train import Progress
from retro.train_setup import setup
from retro.train_step import train_step

MOST_SEQUENCES, MOST_STEPS = 4, 200
BOUND = 0.25
"""Share of the first loss that the last one must be below. Knowing how frequent each token is does not bring it there."""
_WARMUP = 10


class Overfit(NamedTuple):
    """How the check went."""

    first_loss_nats: float
    """Before the first step."""
    last_loss_nats: float
    steps: int


def overfit_batch(run: RunConfig, *, progress: Callable[[Progress], None] | None = None) -> Overfit:
    """Trains on the first sequences alone, in memory, until their loss is below a quarter of what it was.

    At most MOST_SEQUENCES or `train.micro_batch_size` sequences, and MOST_STEPS or `train.steps` steps, at the highest learning
    rate after a short warm-up, with all neighbors. Nothing is written, and `train.out` need not be set.

    Raises:
        TrainingError: The loss did not fall that far, or was not finite.
        ConfigError, FormatError, MismatchError: As in `train`.
    """
    config = run.train
    parts = setup(replace(run, train=replace(config, out=config.out or "(none)")))
    batch = parts.batches.batch(0, min(config.micro_batch_size, MOST_SEQUENCES))
    steps = min(config.steps, MOST_STEPS)
    begun, tokens = time.monotonic(), 0
    losses: list[float] = []
    for step in range(1, steps + 1):
        result = train_step(
            parts.model,
            parts.optimizer,
            batch,
            micro_batch_size=config.micro_batch_size,
            rate=config.learning_rate * min(step / _WARMUP, 1),
            grad_clip=config.grad_clip,
            dtype=parts.dtype,
        )
        losses.append(result.loss_nats)
        tokens += result.tokens
        if progress is not None:
            progress(Progress(step, steps, result.loss_nats, tokens / max(time.monotonic() - begun, 1e-9)))
        if losses[-1] < BOUND * losses[0]:
            return Overfit(losses[0], losses[-1], step)
    raise TrainingError(
        f"the loss of one batch fell from {losses[0]:.4f} to {losses[-1]:.4f} nats in {steps} steps, not below "
        f"{BOUND * losses[0]:.4f}: try another train.learning_rate than {config.learning_rate:g}, or more train.steps (at most "
        f"{MOST_STEPS} are made); where that does not help, network or data are wrong"
    )
