"""Training: setup, train_step, evaluate_loss, and `train`, which makes a model's folder out of them.

A run that was interrupted, killed or asked for more steps goes on from its newest checkpoint when it is started again. On the CPU
it then ends with the same weights, bit for bit, as if it had never stopped: the batches and the learning rate are functions of
the step's number, and nothing else is random.

Under torchrun several processes (ranks) train one model together: each takes its part of every batch, in the order of the ranks, so
that the data of a step and its loss are the same however many there are. Only the first rank writes and reports.
"""

import contextlib
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn

from retro import artifact
from retro.chat import chat_template, save_template
from retro.checkpoint import (
    KIND,
    TrainingState,
    find_best,
    load_best,
    load_model,
    load_training,
    prune_training,
    save_best,
    save_model,
    save_tensors,
    save_training,
)
from retro.chunks import TrainingData
from retro.config import RETRIEVAL_SIZES, ModelConfig, Precision, RunConfig, TrainConfig, config_to_dict
from retro.costs import (
    Flops,
    cpu_has_bfloat16,
    device_peak_flops,
    forward_flops,
    frozen_training_flops,
    mfu,
    training_flops,
)
from retro.data import Batch, Batches, Retrieval, prefetched
from retro.distributed import ALONE, Ranks, joined, rank_device, shard, whole, whole_state, with_same_work
from retro.errors import ConfigError, FormatError, MismatchError, TrainingError
from retro.metrics import METRICS, Course, Lines, Metrics, read_lines
from retro.mixture import Mixture, corpus_seed, open_corpora
from retro.model import Retro
from retro.pretrained import digests
from retro.pretrained_encoder import load_encoder
from retro.question_batches import Curriculum, QuestionBatches, Reading, WithReplay
from retro.questions import QuestionData, common_template, common_tokenizer, open_questions
from retro.samples import SAMPLES, SamplePrompt
from retro.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

CHANGEABLE = (
    "data",
    "init",
    "replay",
    "out",
    "steps",
    "micro_batch_size",
    "log_every",
    "eval_every",
    "eval_sequences",
    "save_every",
    "keep_checkpoints",
    "patience",
    "keep_best",
    "sample_tokens",
    "prefetch",
    "tensorboard",
    "wandb_project",
    "device",
    "activation_checkpointing",
    "compile",
    "timeout_s",
)
"""Settings that may differ when a run goes on. The data may have moved, but must be the same; with other `steps` the learning rate
follows the new cosine from where the run is. Another micro_batch_size, number of ranks or device, activation_checkpointing
and compile give the same losses up to rounding (without dropout)."""


ALIKE = 0.5
"""Mean cosine of the rows of two tables of tokens from which on an encoder of the one understands the other."""
LATER: dict[str, Any] = {"dropout": 0.0, "freeze_decoder": False}
"""Settings that runs begun before them did not have, and what these did: that is left out of recipes, so that they go on."""


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
    corpora: dict[str, TrainingData]
    """Text by name, in the order of the settings; none where questions are trained on."""
    questions: list[QuestionData]
    """In the order of the settings; none where text is trained on."""
    tokenizer: Tokenizer
    template: str | None
    """How conversations are written, see `retro.chat.ChatFormat`."""
    model: Retro
    """With initial weights, on `device`."""
    optimizer: torch.optim.AdamW
    batches: Batches | Mixture | QuestionBatches | WithReplay
    """Of the split train."""
    device: torch.device
    dtype: torch.dtype
    """Of the matrix products."""
    recipe: dict[str, Any]
    """All that determines the weights, the number of steps apart."""
    ranks: Ranks
    """The processes that train together."""


# --- the parts ----------------------------------------------------------------------------------------------------


def setup(run: RunConfig, ranks: Ranks = ALONE) -> Setup:
    """Opens the training data and makes network and optimizer; with several ranks each holds its part of both.

    Raises:
        ConfigError: A setting is missing, the data cannot serve it, or the batch cannot be divided among the ranks.
        FormatError: The data is missing or damaged.
        MismatchError: Network and data have chunks of different lengths, or several data cannot be mixed.
    """
    config = run.train
    if not config.data or not config.out:
        missing = "data" if not config.data else "out"
        raise ConfigError(f"train.{missing} is empty: set it in the file, or with --set train.{missing}=FOLDER")
    _check_division(config, ranks)
    if config.init and run.base is not None:
        raise ConfigError("train.init takes models of our own, and [base] a pretrained one: leave one of them out")
    device = rank_device(config.device, resolve_device)
    dtype = resolve_precision(config.precision, device)
    folders = config.folders if config.task == "lm" else config.replay_folders
    corpora = open_corpora(folders)
    questions = [] if config.task == "lm" else open_questions(config.folders)
    tokenizer = common_tokenizer(_opened_data(corpora, questions))
    for data in corpora.values():
        if data.chunk_len != run.model.chunk_len:
            raise MismatchError(
                f"{data.folder} is cut into chunks of {data.chunk_len} tokens, the model has chunk_len = "
                f"{run.model.chunk_len}: set model.chunk_len={data.chunk_len}, or make the data again"
            )
    if run.base is None:
        run = replace(run, model=replace(run.model, vocab_size=tokenizer.vocab_size))
    prints = [artifact.fingerprint(data.manifest["files"]) for data in _opened_data(corpora, questions)]
    model, begun_with = _network(run, tokenizer, device, dtype)
    if config.activation_checkpointing:
        model.checkpoint_activations()
    if config.table_rate == 0:
        model.embedding.weight.requires_grad_(requires_grad=False)
    model.pointing = config.pointing
    if ranks.size > 1:
        shard(model, device, dtype)
    model.to(device)
    if config.compile:
        model.compile()
    settings = config_to_dict(config).items()
    kept = {key: value for key, value in settings if key not in CHANGEABLE and (key, value) not in LATER.items()}
    recipe = {
        "model": config_to_dict(run.model),
        "train": kept,
        "data": prints[0] if len(prints) == 1 else prints,
    }
    if run.base is not None:
        options = {key: value for key, value in config_to_dict(run.base).items() if key not in ("name", "revision")}
        recipe["base"] = {**options, "weights": artifact.fingerprint(model.digests)}
    if config.init:
        recipe["init"] = artifact.fingerprint(artifact.read_manifest(Path(config.init), KIND)["files"])
    if begun_with:
        recipe["encoder"] = artifact.fingerprint(begun_with)
    return Setup(
        run=run,
        corpora={} if questions else corpora,
        questions=questions,
        tokenizer=tokenizer,
        template=_template(run, questions),
        model=model,
        optimizer=make_optimizer(model, config),
        batches=_training_batches(run, corpora, questions),
        device=device,
        dtype=dtype,
        recipe=recipe,
        ranks=ranks,
    )


def _opened_data(
    corpora: dict[str, TrainingData], questions: Sequence[QuestionData]
) -> list[TrainingData | QuestionData]:
    return [*corpora.values(), *questions]


def _training_batches(
    run: RunConfig, corpora: dict[str, TrainingData], questions: Sequence[QuestionData]
) -> Batches | Mixture | QuestionBatches | WithReplay:
    """What is trained on: text, or questions, perhaps with text in between."""
    config = run.train
    streams = [open_batches(corpus, "train", run, number) for number, corpus in enumerate(corpora.values())]
    if not questions:
        return streams[0] if len(streams) == 1 else Mixture(streams, config.data_weights)
    asked = open_question_batches(questions, "train", run)
    if not streams:
        return asked
    text = streams[0] if len(streams) == 1 else Mixture(streams)
    return WithReplay(
        asked, text, share=config.replay_share, sequences=config.replay_sequences, batch_size=config.batch_size
    )


def open_question_batches(questions: Sequence[QuestionData], split: str, run: RunConfig) -> QuestionBatches:
    """The questions of a split; only those of the split train are permuted."""
    return QuestionBatches(
        questions,
        split,
        chunk_len=run.model.chunk_len,
        neighbor_len=run.train.neighbor_len,
        seed=run.train.seed,
        weights=run.train.data_weights,
        context_passages=run.train.context_passages,
        compact=not run.train.compile,
        permute=split == "train",
        evidence=bool(run.train.pointing) and split == "train",
        reading=Curriculum(run.train, ()).reading(1),
    )


def _network(
    run: RunConfig, tokenizer: Tokenizer, device: torch.device, dtype: torch.dtype
) -> tuple[Any, dict[str, str]]:
    """A network of our own, or one around a pretrained base, which is called alike; with initial weights.

    Besides the digests of what a pretrained encoder gave it, if one did.
    """
    if run.base is not None:
        from retro.retrofit import trainable

        return trainable(run.base, run.model, tokenizer, device=device, dtype=dtype, seed=run.train.seed), {}
    begun = _opened_init(run, tokenizer) if run.train.init else None
    begun_with: dict[str, str] = {}
    model = Retro(run.model)
    if begun is None or begun.config != run.model:
        model.initialize(torch.Generator().manual_seed(run.train.seed))
        if run.train.encoder and (begun is None or run.model.cca_layers):
            load_encoder(model, run.train.encoder, tokenizer.fingerprint)
            begun_with = _encoder_digests(model)
    if begun is not None:
        if begun_with and _likeness(model.embedding.weight, begun.embedding.weight) < ALIKE:
            logger.warning(
                "the table of tokens is that of %s, which the encoder %s does not know: train both with the same encoder, or this "
                "one without train.encoder",
                run.train.init,
                run.train.encoder,
            )
        _begin_with(model, begun)
    model.drop_activations(run.train.dropout)
    if run.train.freeze_decoder:
        model.freeze_decoder()
    return model, begun_with


def _likeness(first_VE: Tensor, second_VE: Tensor) -> float:
    """Mean cosine of the rows of two tables."""
    return float(torch.nn.functional.cosine_similarity(first_VE.detach(), second_VE.detach(), dim=1).mean())


def _begin_with(model: Retro, begun: Retro) -> None:
    """Gives a network the weights that another has for it. What reads neighbors adds nothing yet where it is new."""
    is_new = bool(model.config.cca_layers) and not begun.config.cca_layers
    if is_new:
        for layer in model.layers:
            cca: Any = layer.cca
            if cca is not None:
                torch.nn.init.zeros_(cca.out.weight)
    wanted = model.state_dict().keys()
    given = {name: weight for name, weight in begun.state_dict().items() if name in wanted}
    model.load_state_dict(given, strict=not is_new)


def _template(run: RunConfig, questions: Sequence[QuestionData]) -> str | None:
    """How the finished model wants conversations: as it was trained on them, else as what it began with does."""
    if run.train.task == "chat" or any(data.has_chats for data in questions):
        return common_template(questions)
    if run.train.init:
        return chat_template(run.train.init)
    if run.base is None:
        return None
    try:
        return chat_template(run.base.name, run.base.revision or None)
    except FormatError as error:
        logger.warning("%s: chats with this model will be written in ChatML", error)
        return None


def _encoder_digests(model: Retro) -> dict[str, str]:
    """Of what a pretrained encoder gives a network: its layers, where it reads neighbors, and its table of tokens."""
    layers = digests(model.encoder) if model.encoder is not None else {}
    return layers | {f"embedding.{key}": value for key, value in digests(model.embedding).items()}


def _opened_init(run: RunConfig, tokenizer: Tokenizer) -> Retro:
    """The finished model whose weights are those to begin with.

    Raises:
        MismatchError: It has another tokenizer than the run, or other sizes where both have weights.
    """
    folder = Path(run.train.init)
    model, its_tokenizer, _ = load_model(folder)
    if not isinstance(model, Retro):
        raise ConfigError(
            f"train.init = {str(folder)!r} is a pretrained model with retrieval (RETROfit), which no training can begin with: give "
            "its base as --base"
        )
    if its_tokenizer.fingerprint != tokenizer.fingerprint:
        raise MismatchError(
            f"the model {folder} has another tokenizer than the training data: make the data again with --tokenizer {folder}"
        )
    has, wanted = config_to_dict(model.config), config_to_dict(run.model)
    if not (model.config.cca_layers and run.model.cca_layers):
        has, wanted = ({k: v for k, v in sizes.items() if k not in RETRIEVAL_SIZES} for sizes in (has, wanted))
    if has != wanted:
        raise MismatchError(
            f"the model {folder} has other sizes than the run ({'; '.join(artifact.differing(has, wanted))}): leave them out of "
            "[model], and the preset, then its own are taken"
        )
    return model


def _check_division(config: TrainConfig, ranks: Ranks) -> None:
    at_once = ranks.size * config.micro_batch_size
    if config.batch_size % at_once:
        fits = config.batch_size % ranks.size == 0
        micro = math.gcd(config.batch_size // ranks.size, config.micro_batch_size)
        raise ConfigError(
            f"batch_size = {config.batch_size} is no multiple of {at_once}, which is {ranks.size} ranks x micro_batch_size = "
            f"{config.micro_batch_size}: "
            + (f"set train.micro_batch_size={micro}" if fits else "take a number of ranks that divides batch_size")
        )


def open_batches(data: TrainingData, split: str, run: RunConfig, corpus: int = 0) -> Batches:
    """The sequences of a split; only those of the split train are permuted. A model without CCA gets no neighbors.

    Args:
        data: Open.
        split: train, valid or test.
        run: Network and training.
        corpus: Number of the data in a mixture.
    """
    return Batches(
        data,
        split,
        seq_len=run.train.seq_len,
        num_neighbors=run.train.num_neighbors if run.model.cca_layers else 0,
        neighbor_len=run.train.neighbor_len,
        seed=corpus_seed(run.train.seed, corpus),
        neighbor_part=run.train.neighbor_part,
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
    if precision == "bfloat16" and device.type == "cpu" and not cpu_has_bfloat16():
        logger.warning("This CPU only emulates bfloat16, many times slower: use precision = float32")
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def make_optimizer(model: Retro, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101); matrices decay, biases and the scales of the norms do not."""
    shares = {"encoder": config.encoder_rate, "embedding": config.table_rate}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = config.weight_decay if parameter.ndim >= 2 else 0.0
            share = shares.get(name.partition(".")[0], 1.0)
            groups.setdefault((decay, share), []).append(parameter)
    options = [{"params": few, "weight_decay": decay, "share": share} for (decay, share), few in groups.items()]
    return torch.optim.AdamW(options, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


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
        raise (_ElsewhereError if elsewhere else TrainingError)(message)
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("share", 1.0)
    optimizer.step()
    return StepResult(loss_nats, grad_norm, tokens)


class _ElsewhereError(TrainingError):
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


def _shares(count: int, batch_size: int, ranks: Ranks) -> Iterator[tuple[int, int, bool]]:
    """This rank's batches of the first `count` sequences: their first one, how many, and whether they count.

    A rank for which nothing is left goes through the last sequence with the others, and does not count it.
    """
    for start in range(0, count, batch_size * ranks.size):
        first = start + batch_size * ranks.rank
        size = max(min(batch_size, count - first), 0)
        yield min(first, count - 1), size or 1, size > 0


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


# --- the run ------------------------------------------------------------------------------------------------------


def train(run: RunConfig, *, overwrite: bool = False, progress: Callable[[Progress], None] | None = None) -> Path:
    """Trains a model, or goes on with it, and returns its folder; under torchrun together with the other processes.

    Args:
        run: Network and training; `model.vocab_size` gives way to that of the data's tokenizer.
        overwrite: Start again, whatever the folder holds of an earlier run.
        progress: Called after every step, on the first rank.

    Raises:
        ConfigError: Settings that cannot work, or that differ from those the run was begun with (but for `CHANGEABLE`).
        FormatError, MismatchError: Of the training data, or of what the folder holds.
        TrainingError: Loss or gradient is not finite: the step was not made, and its batch is saved. Or another rank was lost.
        KeyboardInterrupt: After SIGINT or SIGTERM, when the step is finished and saved.
        SystemExit: On the ranks that need not report the error that another one reports.
    """
    config = run.train
    out = Path(config.out)
    with (
        joined(rank_device(config.device, resolve_device), timeout_s=config.timeout_s) as ranks,
        contextlib.ExitStack() as stack,
    ):
        parts = ranks.together(lambda: setup(run, ranks))

        def begin() -> bool:
            stack.enter_context(artifact.writing(out))
            return artifact.begin(out, KIND, parts.recipe, overwrite=overwrite)

        finished = ranks.on_first(begin)
        ranks.together(lambda: _check_shared(out))
        state = load_training(out, parts.model, parts.optimizer, ranks) or TrainingState()
        metrics = ranks.on_first(lambda: _opened(parts, out, state, finished=finished))
        if metrics is None:
            logger.info("%s is finished: %d steps", out, state.step)
            return out
        stack.callback(metrics.close)
        with _interrupts() as interrupted, _explained_memory(config):
            state = _steps(parts, out, state, metrics, progress if ranks.is_first else None, interrupted)
            _complete(parts, out, state, metrics)
    return out


@contextlib.contextmanager
def _explained_memory(config: TrainConfig) -> Iterator[None]:
    """Says what to lower where a GPU's memory is not enough."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        smaller = max(config.micro_batch_size // 2, 1)
        first = f"lower train.micro_batch_size (now {config.micro_batch_size}; {smaller} gives the same steps)"
        ways = [first] if config.micro_batch_size > 1 else []
        ways += [] if config.activation_checkpointing else ["set train.activation_checkpointing=true"]
        ways += [f"lower train.seq_len ({config.seq_len}) or train.num_neighbors ({config.num_neighbors})"]
        raise TrainingError(
            f"the GPU has too little memory: {', or '.join(ways)}, or train on more GPUs with torchrun; the newest checkpoint "
            f"is kept, so that the run goes on. ({str(error).splitlines()[0]})"
        ) from error


def _check_shared(out: Path) -> None:
    """The first rank has just put something there."""
    if not any((out / name).is_file() for name in (artifact.UNFINISHED, artifact.MANIFEST)):
        raise ConfigError(f"{out} is not the same folder on all machines: give a train.out that they share")


def _opened(parts: Setup, out: Path, state: TrainingState, *, finished: bool) -> Metrics | None:
    """Makes the folder ready for more steps; None where there are none to be made."""
    steps = parts.run.train.steps
    if state.step > steps:
        raise ConfigError(f"{out} has had {state.step} steps already: set train.steps to that or more")
    if finished and (state.step == steps or _is_exhausted(parts, out)):
        return None
    if finished:  # more steps are asked for
        artifact.reopen(out, KIND, parts.recipe)
    if state.step:
        logger.info("going on with %s after step %d of %d", out, state.step, steps)
    return Metrics(
        out,
        state.step,
        tensorboard=parts.run.train.tensorboard,
        wandb_project=parts.run.train.wandb_project,
        settings=config_to_dict(parts.run),
    )


def _is_exhausted(parts: Setup, out: Path) -> bool:
    return Course(read_lines(out / METRICS), _deciding_loss(parts)).exhausted(parts.run.train.patience)


def _steps(
    parts: Setup,
    out: Path,
    state: TrainingState,
    metrics: Metrics,
    progress: Callable[[Progress], None] | None,
    interrupted: Callable[[], bool],
) -> TrainingState:
    """Trains from `state` to the last step, or until patience ends. All ranks go through it alike; the first one writes."""
    config, ranks = parts.run.train, parts.ranks
    validation = _Validation(parts, out, state, metrics)
    begun, done = time.monotonic(), state
    meter = _Meter()
    on_gpu = parts.device.type == "cuda"
    while state.step < config.steps and not validation.course.exhausted(config.patience):
        # Batches are not prepared beyond an evaluation, which may decide how they are made.
        end = min((state.step // config.eval_every + 1) * config.eval_every, config.steps)
        coming = _batches_after(parts, state, end, validation.curriculum)
        with prefetched(coming, depth=config.prefetch, pin=on_gpu) as batches:
            for step, batch in enumerate(batches, state.step + 1):
                rate = learning_rate(config, step)
                result = _guarded_step(parts, out, batch, step, rate)
                state = TrainingState(
                    step=step,
                    sequence=state.sequence + config.batch_size,
                    tokens=state.tokens + result.tokens,
                    seconds=done.seconds + time.monotonic() - begun,
                )
                meter.add(result.tokens)
                if progress is not None:
                    progress(Progress(step, config.steps, result.loss_nats, meter.tokens_per_s))
                last, stop = step == config.steps, ranks.any(interrupted())
                if last or step % config.log_every == 0:
                    if ranks.is_first:
                        metrics.append(_record(parts, state, batch, result, rate, meter))
                    meter = _Meter()
                if last or step % config.eval_every == 0:
                    validation.look(step)
                    meter = _Meter()
                ended = last or validation.course.exhausted(config.patience)
                if ended or stop or step % config.save_every == 0:
                    save_training(out, parts.model, parts.optimizer, state, keep=config.keep_checkpoints, ranks=ranks)
                    meter = _Meter()
                if stop:
                    raise KeyboardInterrupt
    if state.step < config.steps:
        logger.info(
            "the validation loss has not fallen for %d evaluations: training ends", validation.course.since_best
        )
    return state


def _batches_after(parts: Setup, state: TrainingState, end: int, curriculum: Curriculum) -> Iterator[Batch]:
    """This rank's parts of the batches of the steps to come, up to the step `end`."""
    config, batches = parts.run.train, parts.batches
    for step in range(state.step + 1, end + 1):
        if isinstance(batches, (QuestionBatches, WithReplay)):
            batches.reading = curriculum.reading(step)
        sequence = state.sequence + (step - state.step - 1) * config.batch_size
        yield batches.batch(
            *parts.ranks.part(sequence, config.batch_size),
            neighbor_dropout=config.neighbor_dropout,
            copy_share=config.copy_share_at(step),
        )


def _guarded_step(parts: Setup, out: Path, batch: Batch, step: int, rate: float) -> StepResult:
    """`train_step`; where it refuses, the batch is saved for whoever looks for the reason: by the rank whose loss is not finite."""
    config, ranks = parts.run.train, parts.ranks

    def refuse(error: TrainingError) -> None:
        if isinstance(error, _ElsewhereError):
            return
        path = out / f"failed-batch-{step:08d}{f'-rank-{ranks.rank}' if ranks.size > 1 else ''}.safetensors"
        save_tensors(path, batch.tensors())
        raise TrainingError(
            f"step {step}: {error}. The step was not made and its batch is in {path}. "
            "Mostly the learning rate is too high: lower train.learning_rate and start again with --overwrite"
        ) from error

    if config.dropout:  # what a step drops does not hang on where the run began
        torch.manual_seed(int(np.random.SeedSequence([config.seed, step, ranks.rank]).generate_state(1)[0]))
    try:
        return train_step(
            parts.model,
            parts.optimizer,
            batch,
            micro_batch_size=_micro_batch_size(parts, batch),
            rate=rate,
            grad_clip=config.grad_clip,
            dtype=parts.dtype,
            ranks=ranks,
        )
    except TrainingError as error:
        refused = error
    ranks.together(lambda: refuse(refused))
    raise refused


def _micro_batch_size(parts: Setup, batch: Batch) -> int:
    """Sequences of one forward pass; of text among questions fewer, as they are longer."""
    config, M = parts.run.train, parts.run.model.chunk_len
    is_text = batch.slot_BT is None and batch.inputs_BT.shape[1] == config.seq_len
    if not parts.questions or not is_text:
        return config.micro_batch_size
    return max(1, config.micro_batch_size * 2 * M // config.seq_len)


class _Validation:
    """What is done at every evaluation, and what it decides."""

    def __init__(self, parts: Setup, out: Path, state: TrainingState, metrics: Metrics) -> None:
        config, ranks = parts.run.train, parts.ranks
        self._parts, self._out, self._metrics = parts, out, metrics
        self._held_out = _open_held_out(parts, "valid")
        self.course = ranks.on_first(lambda: Course(metrics.lines(), _deciding_loss(parts)))
        self.curriculum = ranks.on_first(lambda: Curriculum(config, metrics.lines()))
        self._asked = _open_asked(parts, "valid")
        self._prompt: SamplePrompt | None = None
        if config.sample_tokens and self._held_out:
            self._prompt = SamplePrompt.choose(next(iter(self._held_out.values())))
        if self._prompt is not None:
            self._samples = ranks.on_first(lambda: Lines(out / SAMPLES, state.step))

    def look(self, step: int) -> None:
        """Measures the losses, keeps the best weights, writes a sample, draws the plot."""
        parts, config, ranks = self._parts, self._parts.run.train, self._parts.ranks
        if self._held_out or self._asked:
            record: dict[str, Any] = {"step": step}
            if self._asked is None:
                record |= _evaluated(parts, self._held_out, "valid", config.eval_sequences)
            else:
                passages = self.curriculum.reading(step).num_passages
                record |= _answered(parts, self._asked, "valid", config.eval_sequences, passages)
                self.curriculum.add(record)
            if ranks.is_first:
                self._metrics.append(record)
            if self.course.add(record) and config.keeps_best:
                weights = whole_state(parts.model, ranks)
                ranks.on_first(lambda: save_best(self._out, weights, step))
        if self._prompt is not None:
            sample = self._sampled(self._prompt)
            if sample is not None:
                self._samples.append({"step": step, **sample})
                logger.info("sample: %r goes on %r", sample["prompt"][-80:], sample["continuation"])
        if ranks.is_first:
            self._metrics.draw()

    def _sampled(self, prompt: SamplePrompt) -> dict[str, Any] | None:
        """A sample of the network as it is; None on all ranks but the first, which puts the network together for it."""
        parts, model = self._parts, self._parts.model
        if parts.ranks.size > 1 and parts.run.base is not None:
            return None  # no rank has the base
        if parts.ranks.size > 1:
            weights = whole_state(model, parts.ranks)
            if not parts.ranks.is_first:
                return None
            model = Retro(parts.run.model)
            model.load_state_dict(weights)
            model.to(parts.device)
        eager = torch.compiler.set_stance("force_eager") if parts.run.train.compile else contextlib.nullcontext()
        with eager:
            return prompt.sample(model, next(iter(self._held_out.values())), parts.run.train.sample_tokens)


def _deciding_loss(parts: Setup) -> str:
    """Key of the validation loss that early stopping and the best model go by."""
    return f"valid_loss_{'on' if parts.run.model.cca_layers else 'off'}_nats"


def _open_asked(parts: Setup, split: str) -> QuestionBatches | None:
    """The questions of a split; None where text is trained on, or there are none."""
    if not any(len(data.questions(split)) for data in parts.questions):
        if parts.questions:
            logger.warning("there is no question in the split %s: nothing is measured on it", split)
        return None
    return open_question_batches(parts.questions, split, parts.run)


def _answered(parts: Setup, asked: QuestionBatches, split: str, count: int, passages: int) -> dict[str, float]:
    """How questions of a split are answered with the most passages, evidence among them (on), without any (off), and with those of
    another question (shuffled); where fewer are trained with at present, also with that many."""
    config = parts.run.train
    options: dict[str, Any] = {"count": count, "batch_size": config.micro_batch_size, "dtype": parts.dtype}
    most = config.passages[-1] if parts.run.model.cca_layers else 0
    found: dict[str, float] = {}
    modes: tuple[Retrieval, ...] = get_args(Retrieval) if most else ("off",)
    for mode in modes:
        asked.reading = Reading(num_passages=max(most, 1))
        loss, right, questions = evaluate_answers(parts.model, asked, mode=mode, ranks=parts.ranks, **options)
        found |= {
            f"{split}_loss_{mode}_nats": loss,
            f"{split}_exact_match_{mode}": right,
            f"{split}_questions": questions,
        }
    found |= {"passages": passages, f"{split}_exact_match": found[f"{split}_exact_match_{modes[0]}"]}
    if 0 < passages < most:
        asked.reading = Reading(num_passages=passages)
        _, found[f"{split}_exact_match"], _ = evaluate_answers(
            parts.model, asked, mode="on", ranks=parts.ranks, **options
        )
    logger.info("%s", ", ".join(f"{key} {value:.4g}" for key, value in found.items()))
    return found


def _open_held_out(parts: Setup, split: str) -> dict[str, Batches]:
    """A split of the corpora that have documents in it, by their names."""
    held_out = {}
    for number, (name, data) in enumerate(parts.corpora.items()):
        if len(data.documents(split)) == 0:
            logger.warning("%s has no document in the split %s: its loss is not measured", data.folder, split)
        else:
            held_out[name] = open_batches(data, split, parts.run, number)
    return held_out


def _evaluated(parts: Setup, held_out: dict[str, Batches], split: str, sequences: int) -> dict[str, float]:
    """Losses of a split as metrics: the mean of the corpora by their shares, and of several also each one's own."""
    config = parts.run.train
    found = {
        name: evaluate_loss(
            parts.model,
            batches,
            sequences=sequences,
            batch_size=config.micro_batch_size,
            dtype=parts.dtype,
            ranks=parts.ranks,
        )
        for name, batches in held_out.items()
    }
    shares = parts.batches.shares if isinstance(parts.batches, Mixture) else [1.0]
    share = {name: share for name, share in zip(parts.corpora, shares, strict=True) if name in found}
    losses: dict[str, float] = {}
    for mode in next(iter(found.values())).loss_nats:
        mean = sum(share[name] * own.loss_nats[mode] for name, own in found.items()) / sum(share.values())
        losses[f"{split}_loss_{mode}_nats"] = mean
        if len(parts.corpora) > 1:
            losses |= {f"{split}_{name}_loss_{mode}_nats": own.loss_nats[mode] for name, own in found.items()}
    tokens = sum(own.tokens for own in found.values())
    logger.info("%s over %d tokens", ", ".join(f"{k} {v:.4f}" for k, v in losses.items()), tokens)
    return {**losses, f"{split}_tokens": tokens}


def _complete(parts: Setup, out: Path, state: TrainingState, metrics: Metrics) -> None:
    """Puts the best weights back where they are kept, measures the test loss and makes the folder a model."""
    best = parts.ranks.on_first(lambda: find_best(out)) if parts.run.train.keeps_best else None
    if best is not None:
        load_best(out, parts.model, best)
    figures: dict[str, Any] = {
        "data": ", ".join(data.folder.name for data in _opened_data(parts.corpora, parts.questions)),
        "steps": state.step,
        "tokens": state.tokens,
        "epochs": state.sequence / parts.batches.sequences_per_epoch,
        "seconds": round(state.seconds, 3),
    }
    figures |= {} if best is None else {"best_step": best}
    for line in metrics.lines():  # the newest remain, of the validation those of the weights that are kept
        if best is None or line["step"] <= best:
            figures |= {key: value for key, value in line.items() if key.startswith("valid_")}
        if "loss_nats" in line and not parts.run.train.copies:  # of a model that was shown the answers, no figure
            figures["train_loss_nats"] = line["loss_nats"]
    test, asked = _open_held_out(parts, "test"), _open_asked(parts, "test")
    if test:
        figures |= _evaluated(parts, test, "test", 0)
    if asked is not None:
        figures |= _answered(parts, asked, "test", 0, parts.run.train.passages[-1])
    figures["settings"] = config_to_dict(parts.run.train)
    weights = whole_state(parts.model, parts.ranks)

    def write() -> None:
        metrics.close()
        prune_training(out, keep=1)
        save_template(out, parts.template)
        save_model(out, parts.model, parts.tokenizer, weights=weights, training=figures, recipe=parts.recipe)

    parts.ranks.on_first(write)
    logger.info(
        "%s is finished: %d steps, %s, %.0f tokens/s",
        out,
        state.step,
        ", ".join(f"{key} {value:.4f}" for key, value in figures.items() if key.endswith("_nats")),
        state.tokens / max(state.seconds, 1e-9),
    )


class _Meter:
    """How quick the steps are since it was made."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._tokens = self._steps = 0

    def add(self, tokens: int) -> None:
        """Counts a step that is done."""
        self._tokens += tokens
        self._steps += 1
        self._seconds = max(time.monotonic() - self._begun, 1e-9)

    @property
    def tokens_per_s(self) -> float:
        return self._tokens / self._seconds

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return self._seconds / self._steps


def _record(
    parts: Setup, state: TrainingState, batch: Batch, result: StepResult, rate: float, meter: _Meter
) -> dict[str, float]:
    """A step as metrics. Where `copy_share` is above 0, the loss counts sequences that were shown what they had to predict."""
    record = {
        "step": state.step,
        "loss_nats": result.loss_nats,
        "learning_rate": rate,
        "grad_norm": result.grad_norm,
        "tokens_per_s": round(meter.tokens_per_s, 1),
        "seconds": round(state.seconds, 3),
    }
    if parts.run.train.copies and batch.keep_BLKR is not None:
        record["copy_share"] = parts.run.train.copy_share_at(state.step)
    if parts.device.type == "cuda":
        record["gpu_memory_bytes"] = torch.cuda.max_memory_allocated(parts.device)
        peak = device_peak_flops(torch.cuda.get_device_name(parts.device))
        # The seconds are those of several steps, which with replay are of two kinds.
        counted = parts.run.base is None and not parts.run.train.replay
        if peak is not None and parts.dtype == torch.bfloat16 and counted:
            record["mfu"] = utilization(parts.run, batch, meter.step_s, peak * parts.ranks.size)
    return record


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
