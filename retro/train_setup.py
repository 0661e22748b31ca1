"""What a training run works with: its data, network and optimizer, made of its settings or refused."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from retro import artifact
from retro.chat import chat_template
from retro.checkpoint import KIND, load_model
from retro.chunks import TrainingData
from retro.config import RETRIEVAL_SIZES, Precision, RunConfig, TrainConfig, config_to_dict
from retro.costs import cpu_has_bfloat16
from retro.data import Batches
from retro.distributed import ALONE, Ranks, rank_device, shard
from retro.errors import ConfigError, FormatError, MismatchError
from retro.mixture import Mixture, corpus_seed, open_corpora
from retro.model import Retro
from retro.pretrained import digests
from retro.pretrained_encoder import load_encoder
from retro.question_batches import Curriculum, QuestionBatches, WithReplay
from retro.questions import QuestionData, common_template, common_tokenizer, open_questions
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
    tokenizer = common_tokenizer(opened_data(corpora, questions))
    for data in corpora.values():
        if data.chunk_len != run.model.chunk_len:
            raise MismatchError(
                f"{data.folder} is cut into chunks of {data.chunk_len} tokens, the model has chunk_len = "
                f"{run.model.chunk_len}: set model.chunk_len={data.chunk_len}, or make the data again"
            )
    if run.base is None:
        run = replace(run, model=replace(run.model, vocab_size=tokenizer.vocab_size))
    prints = [artifact.fingerprint(data.manifest["files"]) for data in opened_data(corpora, questions)]
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


def opened_data(
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


def _encoder_digests(model: Retro) -> dict[str, str]:
    """Of what a pretrained encoder gives a network: its layers, where it reads neighbors, and its table of tokens."""
    layers = digests(model.encoder) if model.encoder is not None else {}
    return layers | {f"embedding.{key}": value for key, value in digests(model.embedding).items()}


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
