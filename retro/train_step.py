"""An optimizer step, the losses that are measured between steps, and what both cost. None of it knows of files or folders."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from retro.config import ModelConfig, RunConfig, TrainConfig
from retro.costs import Flops, forward_flops, frozen_training_flops, mfu, training_flops
from retro.data import Batch, Batches, Retrieval
from retro.distributed import ALONE, Ranks, whole, with_same_work
from retro.errors import TrainingError
from retro.model import Retro
from retro.question_batches import QuestionBatches


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
    ranks: Ranks = ALONE,
) -> StepResult:
    """One optimizer step: the loss is the sum over all tokens of the batch, of all ranks together, divided by their number.

    Args:
        model: Left in training mode.
        optimizer: Of its parameters.
        batch: This rank's part, anywhere; it goes to the model's device in parts of `micro_batch_size` sequences, whose
            gradients are summed.
        micro_batch_size: Sequences of one forward pass.
        rate: Learning rate.
        grad_clip: Largest norm of the gradient; 0 means no limit.
        dtype: bfloat16 turns autocast on.
        ranks: Those that make the step together, with as many sequences each.

    Raises:
        TrainingError: Loss or gradient is not finite, on all ranks; weights and optimizer are as they were.
    """
    model.train()
    optimizer.zero_grad(set_to_none=True)
    device = next(model.parameters()).device
    tokens = int(ranks.total(int(batch.loss_BT.sum()))[0])
    loss = torch.zeros((), device=device)
    for part in batch.split(micro_batch_size):
        loss_sum = _loss_sum(model, part, dtype, ranks)
        if loss_sum.requires_grad:  # around a frozen base nothing does where no sequence has neighbors
            (loss_sum / (tokens / ranks.size)).backward()  # type: ignore[no-untyped-call]  # FSDP averages over the ranks
        loss += loss_sum.detach() / tokens
    # Where nothing has a gradient, the norm is a zero on the CPU.
    norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)).to(device)
    own_loss_nats, grad_norm = torch.stack([loss, norm]).tolist()
    (loss_nats,) = ranks.total(own_loss_nats)
    if not (math.isfinite(loss_nats) and math.isfinite(grad_norm)):
        message = f"the loss is {loss_nats} and the norm of its gradient {grad_norm}"
        elsewhere = math.isfinite(own_loss_nats) and not math.isfinite(loss_nats)
        raise (ElsewhereError if elsewhere else TrainingError)(message)
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("share", 1.0)
    optimizer.step()
    return StepResult(loss_nats, grad_norm, tokens)


class ElsewhereError(TrainingError):
    """The loss that is not finite is another rank's."""


def _loss_sum(model: Retro, batch: Batch, dtype: torch.dtype, ranks: Ranks) -> Tensor:
    device = next(model.parameters()).device
    tensors = with_same_work(batch, ranks).tensors()
    if device.type == "cuda":  # out of pinned memory the copies do not hold up the host
        tensors = {name: tensor if tensor.is_cuda else tensor.pin_memory() for name, tensor in tensors.items()}
    tensors = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss: Tensor = model(**tensors)
    return loss


@torch.no_grad()
def evaluate_loss(
    model: Retro,
    batches: Batches,
    *,
    sequences: int,
    batch_size: int,
    dtype: torch.dtype,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Loss with retrieval on, off, and with the neighbors of other documents ("shuffled"), over the same sequences.

    Args:
        model: In any mode, which it has again afterwards.
        batches: Of the split; without neighbors only "off" is measured.
        sequences: How many, from the first on; 0 means all of the split.
        batch_size: Sequences of one forward pass.
        dtype: bfloat16 turns autocast on.
        ranks: Those that share the sequences.

    Raises:
        ConfigError: The data has no other documents to shuffle with.
    """
    count = min(sequences or batches.sequences_per_epoch, batches.sequences_per_epoch)
    modes: tuple[Retrieval, ...] = get_args(Retrieval) if batches.num_neighbors else ("off",)
    was_training = model.training
    model.eval()
    sums: dict[Retrieval, float] = dict.fromkeys(modes, 0.0)
    tokens = 0
    try:
        for first, size, counts in _shares(count, batch_size, ranks):
            for mode in modes:
                batch = batches.batch(first, size, neighbors=mode)
                loss = _loss_sum(model, batch, dtype, ranks).item()
                sums[mode] += loss if counts else 0.0
            tokens += int(batch.loss_BT.sum()) if counts else 0
    finally:
        model.train(was_training)
    total_tokens, *totals = ranks.total(tokens, *sums.values())
    losses = {mode: total / total_tokens for mode, total in zip(modes, totals, strict=True)}
    return Evaluation(losses, int(total_tokens))


@torch.no_grad()
def evaluate_answers(
    model: Retro,
    batches: QuestionBatches,
    *,
    mode: Retrieval,
    count: int,
    batch_size: int,
    dtype: torch.dtype,
    ranks: Ranks = ALONE,
) -> tuple[float, float, int]:
    """Loss of the answers, and share of the questions whose whole answer, EOS included, is what greedy decoding says.

    Args:
        model: In any mode, which it has again afterwards.
        batches: Of the split, with the reading that is asked for.
        mode: on, off or shuffled.
        count: How many questions, from the first on; 0 means all of the split.
        batch_size: Questions of one forward pass.
        dtype: bfloat16 turns autocast on.
        ranks: Those that share the questions.

    Returns:
        Mean loss in nats per token, share in [0, 1], number of questions.
    """
    count = min(count or batches.sequences_per_epoch, batches.sequences_per_epoch)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    loss, tokens, right = 0.0, 0, 0
    try:
        for first, size, counts in _shares(count, batch_size, ranks):
            batch = with_same_work(batches.batch(first, size, neighbors=mode), ranks).to(device)
            tensors = batch.tensors()
            targets_BT, loss_BT = tensors.pop("targets_BT"), tensors.pop("loss_BT")
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                logits_NV = model(**tensors)[loss_BT].float()
            if not counts:
                continue
            wrong_BT = torch.zeros_like(loss_BT)
            wrong_BT[loss_BT] = logits_NV.argmax(dim=1) != targets_BT[loss_BT]
            loss += float(torch.nn.functional.cross_entropy(logits_NV, targets_BT[loss_BT], reduction="sum"))
            tokens += int(loss_BT.sum())
            right += int((~wrong_BT.any(dim=1)).sum())
    finally:
        model.train(was_training)
    all_loss, all_tokens, all_right = ranks.total(loss, tokens, right)
    return all_loss / all_tokens, all_right / count, count


def _shares(count: int, batch_size: int, ranks: Ranks) -> Iterator[tuple[int, int, bool]]:
    """This rank's batches of the first `count` sequences: their first one, how many, and whether they count.

    A rank for which nothing is left goes through the last sequence with the others, and does not count it.
    """
    for start in range(0, count, batch_size * ranks.size):
        first = start + batch_size * ranks.rank
        size = max(min(batch_size, count - first), 0)
        yield min(first, count - 1), size or 1, size > 0


def utilization(run: RunConfig, batch: Batch, step_s: float, peak: float) -> float:
    """Model FLOPs utilization of a step, encoder and CCA counted for the chunks of the batch that have neighbors.

    Args:
        run: Network and training.
        batch: Of the step, or a part of it.
        step_s: Seconds of the step.
        peak: FLOP/s of all devices together.
    """
    keep_BLKR = batch.keep_BLKR
    if run.train.task == "lm":
        forward = forward_flops(
            run.model,
            seq_len=run.train.seq_len,
            num_neighbors=0 if keep_BLKR is None else run.train.num_neighbors,
            neighbor_len=run.train.neighbor_len,
            retrieving=0.0 if keep_BLKR is None else float(keep_BLKR.flatten(2).any(dim=2).float().mean()),
        )
    else:
        forward = question_flops(run.model, batch)
    of_sequence = sequence_flops(run, forward, batch.inputs_BT.shape[1])
    return mfu(run.train.batch_size * of_sequence, step_s, peak)


def sequence_flops(run: RunConfig, forward: Flops, seq_len: int) -> float:
    """FLOPs of forward and backward pass of a sequence of so many slots, of a run without a base."""
    if run.train.freeze_decoder:
        return frozen_training_flops(run.model, forward, seq_len=seq_len)
    return training_flops(forward)


def question_flops(config: ModelConfig, batch: Batch) -> Flops:
    """FLOPs of a forward pass over a question, on average over a batch of them.

    Columns are counted as they are, padding included, as for text. Passages are counted by the tokens that they have, for their
    lengths differ much, and logits where the loss wants them.
    """
    T, M = batch.inputs_BT.shape[1], config.chunk_len
    forward = forward_flops(config, seq_len=T, num_neighbors=0, neighbor_len=0)
    forward = replace(forward, head=forward.head * float(batch.loss_BT.double().mean()))
    if batch.keep_BLKR is None or not config.cca_layers:
        return forward
    tokens_BLK = batch.keep_BLKR.sum(dim=3)
    neighbors_BL = (tokens_BLK > 0).sum(dim=2)
    chunks, neighbors = int((neighbors_BL > 0).sum()), int(neighbors_BL.sum())
    if not neighbors:
        return forward
    K, R = -(-neighbors // chunks), round(int(tokens_BLK.sum()) / neighbors)
    of_chunk = forward_flops(config, seq_len=M, num_neighbors=K, neighbor_len=R)
    share = neighbors / K / len(batch.inputs_BT)
    return replace(forward, encoder=share * of_chunk.encoder, cca=share * of_chunk.cca)
