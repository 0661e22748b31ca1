"""Models and the state of training on disk: safetensors and JSON, no pickle.

    X.model/
      config.json          network, tokenizer's fingerprint, figures of the training
      model.safetensors    weights, float32
      tokenizer.json, tokenizer_config.json, generation_config.json     the last two for Hugging Face transformers
      README.md            model card
      metrics.jsonl, loss.png     written by train.py
      training/step-00000200/     weights.safetensors, optimizer.safetensors, state.json
      manifest.json        written last

While a model trains, the newest two states are kept in `training/`, so that a damaged one costs little. A finished model keeps the
newest, from which training goes on when more steps are asked for; like every other file it stands in the manifest.
"""

import contextlib
import hashlib
import logging
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from retro.artifact import (
    FORMAT_VERSION,
    MANIFEST,
    TEMPORARY,
    file_record,
    finish,
    read_json,
    read_manifest,
    sha256,
    storage_error,
    sync_folder,
    write_atomically,
    write_json,
)
from retro.config import GenerateConfig, ModelConfig, config_from_dict, config_to_dict
from retro.errors import FormatError, MismatchError
from retro.model import Retro
from retro.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

KIND = "model"
CONFIG, WEIGHTS, CARD, TRAINING = "config.json", "model.safetensors", "README.md", "training"
TOKENIZER_CONFIG, GENERATION_CONFIG = "tokenizer_config.json", "generation_config.json"
_STATE, _STATE_WEIGHTS, _STATE_OPTIMIZER = "state.json", "weights.safetensors", "optimizer.safetensors"


# --- models -------------------------------------------------------------------------------------------------------


def save_model(
    folder: Path,
    model: Retro,
    tokenizer: Tokenizer,
    *,
    weights: dict[str, Tensor] | None = None,
    training: dict[str, Any] | None = None,
    recipe: dict[str, Any] | None = None,
    num_neighbors: int | None = None,
    neighbor_len: int | None = None,
    generation: dict[str, Any] | None = None,
    alone: bool = True,
) -> None:
    """Completes the folder of a model.

    Args:
        folder: The model; held by `artifact.writing` where others might write.
        model: On any device.
        tokenizer: The one it was trained with.
        weights: Its state, where the network itself holds only a part of it.
        training: Figures for config.json and the card: plain data, losses in nats as `*_loss_*_nats`.
        recipe: What it was made from, as given to `artifact.begin`.
        num_neighbors: K at every chunk border while generating. Default: as in training.
        neighbor_len: R. Default: as in training.
        generation: generation_config.json of Hugging Face transformers. Default: which tokens are special.
        alone: Whatever else lies in the folder becomes part of the artifact. False: only network and weights do, so that others may
            write there, too, as transformers' tokenizers and trainers do.

    Raises:
        StorageError: It cannot be written.
    """
    training = training or {}
    (folder / MANIFEST).unlink(missing_ok=True)
    tokenizer.save(folder, with_bos=True)
    save_tensors(folder / WEIGHTS, model.state_dict() if weights is None else weights)
    reading = config_to_dict(GenerateConfig()) | training.get("settings", {})
    special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.eos_id}
    config = {
        "model_type": "retro",
        "architectures": ["RetroForCausalLM"],
        "model": config_to_dict(model.config),
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "num_neighbors": reading["num_neighbors"] if num_neighbors is None else num_neighbors,
        "neighbor_len": reading["neighbor_len"] if neighbor_len is None else neighbor_len,
        **special,
        "training": training,
    }
    write_json(folder / CONFIG, config)
    write_json(folder / TOKENIZER_CONFIG, _tokenizer_config(tokenizer))
    write_json(folder / GENERATION_CONFIG, special if generation is None else generation)
    write_card(folder, model, training)
    fields = {"tokenizer_fingerprint": tokenizer.fingerprint}
    if alone:
        finish(folder, KIND, recipe or {}, fields)
        return
    files = {name: file_record(folder / name) for name in (CONFIG, WEIGHTS)}
    write_json(
        folder / MANIFEST, {"format_version": FORMAT_VERSION, "kind": KIND, "recipe": {}, **fields, "files": files}
    )


def write_card(folder: Path, model: Retro, training: dict[str, Any]) -> None:
    """Writes the model card, over whatever took its place."""
    card = _card(model, training)
    write_atomically(folder / CARD, lambda file: file.write(card.encode()))


def load_model(folder: Path, device: torch.device | str = "cpu") -> tuple[Retro, Tokenizer, dict[str, Any]]:
    """Opens a finished model.

    Returns:
        The network in eval mode, its tokenizer, and the content of config.json.

    Raises:
        FormatError: It is missing, unfinished, damaged or altered.
        MismatchError: Its files do not belong together.
    """
    read_manifest(folder, KIND)
    info = read_json(folder / CONFIG)
    if not isinstance(info, dict) or not {"model", "tokenizer_fingerprint", "training"} <= set(info):
        raise FormatError(f"{folder / CONFIG} is not that of a model of this program: copy or train the model again")
    tokenizer = Tokenizer.load(str(folder))
    if tokenizer.fingerprint != info["tokenizer_fingerprint"]:
        raise MismatchError(
            f"{folder} was trained with the tokenizer {info['tokenizer_fingerprint']}, but holds {tokenizer.fingerprint}: "
            "copy the whole folder again from where the model was trained"
        )
    config = config_from_dict(ModelConfig, info["model"], where=str(folder / CONFIG))
    with torch.device("meta"):
        model = Retro(config)
    model.to_empty(device=device)
    _load_weights(model, _load_tensors(folder / WEIGHTS), folder / WEIGHTS)
    return model.eval(), tokenizer, info


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """One safetensors file, atomically."""
    content = _serialized(tensors)
    write_atomically(path, lambda file: file.write(content))


def _serialized(tensors: dict[str, Tensor]) -> bytes:
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content: bytes = safetensors.torch.save(plain, metadata={"format": "pt"})
    return content


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load_file(path)
    except FileNotFoundError as error:
        raise FormatError(f"{path} is missing") from error
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path} is damaged: {error}") from error
    return tensors


def _load_weights(model: Retro, tensors: dict[str, Tensor], path: Path) -> None:
    """Copies tensors into the network's own memory, so that their place in a file cannot change any rounding."""
    own = model.state_dict()
    problems = [f"{name} is missing" for name in own if name not in tensors]
    problems += [f"{name} is unknown" for name in tensors if name not in own]
    problems += [
        f"{name} is {list(tensors[name].shape)} instead of {list(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise MismatchError(
            f"{path} does not fit the network in {CONFIG}: {'; '.join(problems[:3])}{more}. "
            "Take both files from the same model"
        )
    model.load_state_dict(tensors)


def _tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """How transformers encode as we do: BOS in front, no special tokens in text; padding on the left, by EOS."""
    bos, eos = (tokenizer.backend.id_to_token(i) for i in (tokenizer.bos_id, tokenizer.eos_id))
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": eos,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
    }


def _card(model: Retro, training: dict[str, Any]) -> str:
    """The model card."""
    config = model.config
    parameters = sum(p.numel() for p in model.parameters())
    tables = ("embedding.", "encoder_embedding.", "head.")
    embedding = sum(p.numel() for name, p in model.named_parameters() if name.startswith(tables))
    lines = [
        "---",
        "library_name: retro-lm",
        "pipeline_tag: text-generation",
        "license: other",
        "license_name: that-of-the-training-data",
        "tags:",
        *(f"- {tag}" for tag in ("retro", "retrieval-augmented-generation", "chunked-cross-attention")),
        "---",
        "",
        "# A retrieval-enhanced language model",
        "",
        "A decoder with chunked cross-attention to retrieved passages (RETRO, arXiv:2112.04426), made by retro-lm.",
        "It works without retrieval too.",
        "",
        "## Sizes",
        "",
        f"- {parameters:,} parameters, {embedding:,} of them embeddings of {config.vocab_size:,} tokens",
        f"- decoder: {config.num_layers} layers, width {config.dim}, {config.num_heads} heads of {config.head_dim}",
        f"- chunked cross-attention in layers {', '.join(map(str, config.cca_layers)) or '(none)'}; "
        f"chunks of {config.chunk_len} tokens",
    ]
    if config.cca_layers:
        lines.append(f"- neighbor encoder: {config.encoder_layers} layers, width {config.encoder_dim}")
    losses = {key: value for key, value in training.items() if key.endswith("_nats")}
    figures = {k: v for k, v in training.items() if k not in losses and isinstance(v, (str, int, float))}
    if figures:
        lines += ["", "## Training", "", *(f"- {_words(key)}: {_figure(value)}" for key, value in figures.items())]
    if losses:
        lines += ["", "## Losses", "", "Nats per token. Shuffled: with the neighbors of other documents."]
        lines += ["", "| | nats per token |", "|---|---|"]
        lines += [f"| {_words(key.removesuffix('_nats'))} | {value:.4f} |" for key, value in losses.items()]
    lines += [
        "",
        "## License and limits",
        "",
        "The weights are made from the training data named above: the licenses of its texts are the user's to respect. The",
        "program is licensed under Apache-2.0. The model says what is probable, which need not be true: check answers against",
        "the passages they came from.",
        "",
    ]
    return "\n".join(lines)


def _words(key: str) -> str:
    return key.replace("_", " ")


def _figure(value: str | int | float) -> str:
    return value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"


# --- the state of training ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """How far training has come; weights and optimizer lie beside it. Nothing random has a state of its own."""

    step: int = 0
    """Optimizer steps done."""
    sequence: int = 0
    """Number of the next sequence to train on."""
    tokens: int = 0
    """Tokens predicted so far."""
    seconds: float = 0.0
    """Time spent so far, in all runs together."""


def save_training(
    folder: Path, model: Retro, optimizer: torch.optim.Optimizer, state: TrainingState, *, keep: int = 2
) -> None:
    """Writes the state of training below the model's folder, whole or not at all, and deletes all but the newest `keep`.

    Raises:
        StorageError: It cannot be written.
    """
    place = folder / TRAINING / f"step-{state.step:08d}"
    temporary = place.with_name(place.name + TEMPORARY)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        digests = {}
        for name, tensors in (
            (_STATE_WEIGHTS, model.state_dict()),
            (_STATE_OPTIMIZER, _optimizer_tensors(model, optimizer)),
        ):
            content = _serialized(tensors)
            digests[name] = hashlib.sha256(content).hexdigest()
            _write_through(temporary / name, content)
        write_json(temporary / _STATE, {**asdict(state), "sha256": digests})
        if place.exists():
            shutil.rmtree(place)  # a damaged one of the same step, that training went back before
        temporary.rename(place)
        sync_folder(place.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            shutil.rmtree(temporary)
        raise storage_error(place, error) from error
    prune_training(folder, keep=keep)


def prune_training(folder: Path, *, keep: int) -> None:
    """Deletes all but the newest `keep` states."""
    for place in _places(folder)[keep:]:
        shutil.rmtree(place)


def load_training(folder: Path, model: Retro, optimizer: torch.optim.Optimizer) -> TrainingState | None:
    """Puts the newest intact state into a network and its optimizer, wherever they are.

    A damaged state is reported by a warning, and the one before is taken.

    Returns:
        How far training had come; None where nothing was saved.

    Raises:
        FormatError: States were saved, but none of them is intact.
        MismatchError: They are of another network.
    """
    places = _places(folder)
    for place in places:
        try:
            state = _read_state(place)
            weights = _load_tensors(place / _STATE_WEIGHTS)
            moments = _load_tensors(place / _STATE_OPTIMIZER)
        except FormatError as error:
            logger.warning("the checkpoint %s is left out: %s", place, error)
            continue
        _load_weights(model, weights, place / _STATE_WEIGHTS)
        _load_optimizer(model, optimizer, moments)
        return state
    if places:
        raise FormatError(
            f"none of the {len(places)} checkpoints in {folder / TRAINING} is intact: start again with --overwrite"
        )
    return None


def _places(folder: Path) -> list[Path]:
    """Folders of the saved states, newest first."""
    found = (folder / TRAINING).glob("step-*")
    return sorted((path for path in found if not path.name.endswith(TEMPORARY)), reverse=True)


def _read_state(place: Path) -> TrainingState:
    """Reads state.json and checks the files it speaks of."""
    content = read_json(place / _STATE)
    try:
        digests = content.pop("sha256")
        state = TrainingState(**content)
        expected = {name: digests[name] for name in (_STATE_WEIGHTS, _STATE_OPTIMIZER)}
    except (AttributeError, KeyError, TypeError) as error:
        raise FormatError(f"{place / _STATE} is damaged: {error!r}") from error
    for name, digest in expected.items():
        if not (place / name).is_file():
            raise FormatError(f"{place / name} is missing")
        if sha256(place / name) != digest:
            raise FormatError(f"{place / name} was truncated or altered (its SHA-256 differs from {_STATE})")
    return state


def _optimizer_tensors(model: Retro, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as `parameter/name`; a parameter that never had a gradient has none."""
    return {
        f"{parameter_name}/{name}": value
        for parameter_name, parameter in model.named_parameters()
        for name, value in optimizer.state.get(parameter, {}).items()
    }


def _load_optimizer(model: Retro, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    optimizer.state.clear()
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        parameter_name, _, name = key.rpartition("/")
        parameter = parameters[parameter_name]
        own = torch.empty(value.shape, dtype=value.dtype, device=parameter.device)
        optimizer.state[parameter][name] = own.copy_(value)


def _write_through(path: Path, content: bytes) -> None:
    """Writes a file down to the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
