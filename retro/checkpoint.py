"""Models and the state of training on disk: safetensors and JSON, no pickle.

    X.model/
      config.json          network, tokenizer's fingerprint, figures of the training
      model.safetensors    weights, float32 (of an exported model also in fewer bits, in shards with an index: quantized.py)
      tokenizer.json, tokenizer_config.json, generation_config.json     the last two for Hugging Face transformers
      README.md            model card
      metrics.jsonl, loss.png     written by train.py
      training/step-00000200/     shard-*.safetensors, one for each rank that trained, and state.json
      manifest.json        written last

While a model trains, the newest two states are kept in `training/`, so that a damaged one costs little. A finished model keeps the
newest, from which training goes on when more steps are asked for; like every other file it stands in the manifest.

States are written and read by torch.distributed.checkpoint, each rank its part, so that any number of ranks can go on from what any
number has saved.
"""

import contextlib
import inspect
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

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
from retro.distributed import ALONE, Ranks, divided
from retro.errors import FormatError, MismatchError, StorageError
from retro.model import Retro
from retro.quantized import is_weights, restored
from retro.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

KIND = "model"
CONFIG, WEIGHTS, CARD, TRAINING = "config.json", "model.safetensors", "README.md", "training"
INDEX = "model.safetensors.index.json"
"""Which file holds which tensor, where there are several."""
TOKENIZER_CONFIG, GENERATION_CONFIG = "tokenizer_config.json", "generation_config.json"
_STATE = "state.json"
_WEIGHTS, _OPTIMIZER = "weights/", "optimizer/"
"""How the names of tensors in a state begin."""


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
    base = _base(model)
    of_transformers = {"model_type": "retro", "architectures": ["RetroForCausalLM"]}
    config = {
        **(of_transformers if base is None else {"model_type": "retrofit", "base": base}),
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


def load_model(
    folder: Path, device: torch.device | str = "cpu", *, base: Any = None
) -> tuple[Retro, Tokenizer, dict[str, Any]]:
    """Opens a finished model.

    Args:
        folder: The model.
        device: Where the network is put.
        base: Of a RETROfitted model, the base that it was trained on. Default: it is opened by its name.

    Returns:
        The network in eval mode (of a RETROfitted model a `retro.retrofit.RetroFit`, which is called alike), its tokenizer, and the
        content of config.json.

    Raises:
        FormatError: It is missing, unfinished, damaged or altered.
        MismatchError: Its files do not belong together, or the base is another one.
        ConfigError: The base is not there.
    """
    read_manifest(folder, KIND)
    info = read_config(folder)
    tokenizer = Tokenizer.load(str(folder))
    if tokenizer.fingerprint != info["tokenizer_fingerprint"]:
        raise MismatchError(
            f"{folder} was trained with the tokenizer {info['tokenizer_fingerprint']}, but holds {tokenizer.fingerprint}: "
            "copy the whole folder again from where the model was trained"
        )
    config = config_from_dict(ModelConfig, info["model"], where=str(folder / CONFIG))
    model: Any
    if "base" in info:
        from retro.retrofit import reopened

        model = reopened(info["base"], config, base, device)
    else:
        with torch.device("meta"):
            model = Retro(config)
        model.to_empty(device=device)
    _load_weights(model, load_weights(folder), folder / WEIGHTS)
    model.eval()
    model.context_passages = info.get("training", {}).get("settings", {}).get("context_passages", 0)
    if isinstance(model, Retro) and torch.device(device).type == "cpu":
        model.lay_out_for_decoding()
    return model, tokenizer, info


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a model's config.json.

    Raises:
        FormatError: It is missing, or not that of a model of ours.
    """
    info = read_json(folder / CONFIG)
    if not isinstance(info, dict) or not {"model", "tokenizer_fingerprint", "training"} <= set(info):
        raise FormatError(f"{folder / CONFIG} is not that of a model of this program: copy or train the model again")
    return info


def load_weights(folder: Path) -> dict[str, Tensor]:
    """A model's weights in floating types, in however many bits and files they are stored.

    Raises:
        FormatError: A file is missing or damaged, or the files do not hold what their index says.
    """
    path = folder / INDEX
    if (folder / WEIGHTS).is_file() or not path.is_file():
        return restored(load_tensors(folder / WEIGHTS), folder / WEIGHTS)
    index = read_json(path)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not all(isinstance(name, str) and is_weights(name) for name in places.values()):
        raise FormatError(f"{path} is damaged: it does not say which file holds which weights. Copy the model again")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        part = load_tensors(folder / name)
        if unlike := sorted(part.keys() ^ {tensor for tensor, place in places.items() if place == name}):
            raise FormatError(
                f"{path} does not say what {name} holds ({unlike[0]} stands in one of them only; {len(unlike)} in all). "
                "Take all files from the same model"
            )
        tensors |= part
    return restored(tensors, path)


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """One safetensors file, atomically."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = safetensors.torch.save(plain, metadata={"format": "pt"})
    write_atomically(path, lambda file: file.write(content))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file.

    Raises:
        FormatError: It is missing or damaged.
    """
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load_file(path)
    except FileNotFoundError as error:
        raise FormatError(f"{path} is missing") from error
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path} is damaged: {error}") from error
    return tensors


def _load_weights(model: Retro, tensors: dict[str, Tensor], path: Path) -> None:
    """Copies tensors into the network's own memory, so that their place in a file cannot change any rounding."""
    _check_shapes(model, shapes_of(tensors), path)
    model.load_state_dict(tensors)


def shape_problems(own: Mapping[str, torch.Size], shapes: Mapping[str, torch.Size]) -> list[str]:
    """What keeps tensors of these shapes from being a network's own, in words."""
    problems = [f"{name} is missing" for name in own if name not in shapes]
    problems += [f"{name} is unknown" for name in shapes if name not in own]
    problems += [
        f"{name} is {list(shapes[name])} instead of {list(own[name])}"
        for name in own
        if name in shapes and shapes[name] != own[name]
    ]
    return problems


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """By name."""
    return {name: tensor.shape for name, tensor in tensors.items()}


def _check_shapes(model: Retro, shapes: Mapping[str, torch.Size], path: Path) -> None:
    if problems := shape_problems(shapes_of(model.state_dict()), shapes):
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise MismatchError(
            f"{path} does not fit the network in {CONFIG}: {'; '.join(problems[:3])}{more}. "
            "Take both files from the same model"
        )


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


def _base(model: nn.Module) -> dict[str, Any] | None:
    """What a RETROfitted model says of its base; None for a network of our own."""
    describe: Any = getattr(model, "describe", None)
    return None if describe is None else describe()


def _size_lines(model: Retro) -> list[str]:
    config, base = model.config, _base(model)
    parameters = {name: p.numel() for name, p in model.named_parameters() if base is None or p.requires_grad}
    total = sum(parameters.values())
    layers = ", ".join(map(str, config.cca_layers)) or "(none)"
    if base is not None:
        revision = base["commit"] or base["revision"]
        return [
            f"- {total:,} parameters, put into the base {base['name']} ({base['model_type']}"
            f"{', revision ' + revision if revision else ''}), which is needed to use them and is not in this folder",
            f"- base: {config.num_layers} layers, width {config.dim}",
            f"- chunked cross-attention before layers {layers}; chunks of {config.chunk_len} tokens",
        ]
    tables = ("embedding.", "encoder_embedding.", "head.")
    embedding = sum(count for name, count in parameters.items() if name.startswith(tables))
    return [
        f"- {total:,} parameters, {embedding:,} of them embeddings of {config.vocab_size:,} tokens",
        f"- decoder: {config.num_layers} layers, width {config.dim}, {config.num_heads} heads of {config.head_dim}",
        f"- chunked cross-attention in layers {layers}; chunks of {config.chunk_len} tokens",
    ]


def _card(model: Retro, training: dict[str, Any]) -> str:
    """The model card."""
    config = model.config
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
        *_size_lines(model),
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
    folder: Path,
    model: Retro,
    optimizer: torch.optim.Optimizer,
    state: TrainingState,
    *,
    keep: int = 2,
    ranks: Ranks = ALONE,
) -> None:
    """Writes the state of training below the model's folder, whole or not at all, and deletes all but the newest `keep`.

    Args:
        folder: The model; the same for all ranks.
        model: What this rank holds of it.
        optimizer: Of its parameters.
        state: How far training has come.
        keep: How many states remain.
        ranks: Those that train together; each writes a file.

    Raises:
        StorageError: It cannot be written.
    """
    place = folder / TRAINING / f"step-{state.step:08d}"
    temporary = place.with_name(place.name + TEMPORARY)

    @_as_storage_errors(place)
    def prepare() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    @_as_storage_errors(place)
    def write() -> None:
        _write_parts(temporary, _tensors(model, optimizer), ranks)

    @_as_storage_errors(place)
    def complete(digests: dict[str, str]) -> None:
        write_json(temporary / _STATE, {**asdict(state), "sha256": digests})
        if place.exists():
            shutil.rmtree(place)  # a damaged one of the same step, that training went back before
        temporary.rename(place)
        sync_folder(place.parent)

    try:
        ranks.on_first(prepare)
        ranks.together(write)
        names = ranks.on_first(lambda: sorted(path.name for path in temporary.iterdir()))
        own = {name: sha256(temporary / name) for name in names[ranks.rank :: ranks.size]}
        digests = {name: digest for part in ranks.gather(own) for name, digest in part.items()}
        ranks.on_first(lambda: complete(dict(sorted(digests.items()))))
    except StorageError:
        with contextlib.suppress(OSError):
            shutil.rmtree(temporary)
        raise
    if ranks.is_first:
        prune_training(folder, keep=keep)


def prune_training(folder: Path, *, keep: int) -> None:
    """Deletes all but the newest `keep` states."""
    for place in _places(folder)[keep:]:
        shutil.rmtree(place)


def load_training(
    folder: Path, model: Retro, optimizer: torch.optim.Optimizer, ranks: Ranks = ALONE
) -> TrainingState | None:
    """Puts the newest intact state into a network and its optimizer, wherever they are and however many ranks saved it.

    A damaged state is reported by a warning, and the one before is taken.

    Returns:
        How far training had come; None where nothing was saved.

    Raises:
        FormatError: States were saved, but none of them is intact.
        MismatchError: They are of another network.
    """
    places = ranks.on_first(lambda: _places(folder))
    for place in places:
        state, problem = None, None
        try:
            state = _read_state(place, ranks)
        except FormatError as error:
            problem = error
        problems = [str(found) for found in ranks.gather(problem) if found is not None]
        if problems or state is None:
            logger.warning("the checkpoint %s is left out: %s", place, problems[0])
            continue
        ranks.together(lambda place=place: _read_parts(place, model, optimizer, ranks))  # type: ignore[misc]
        return state
    if places:
        raise FormatError(
            f"none of the {len(places)} checkpoints in {folder / TRAINING} is intact: start again with --overwrite"
        )
    return None


def save_best(folder: Path, weights: dict[str, Tensor], step: int) -> None:
    """Keeps the weights of a step as the best so far, in the place of those before.

    Raises:
        StorageError: They cannot be written.
    """
    save_tensors(_best_path(folder, step), weights)
    for path in (folder / TRAINING).glob("best-*.safetensors"):
        if path != _best_path(folder, step):
            path.unlink()


def find_best(folder: Path) -> int | None:
    """The step of the best weights that are kept; None where there are none."""
    steps = [int(path.stem.removeprefix("best-")) for path in (folder / TRAINING).glob("best-*.safetensors")]
    return max(steps, default=None)


def load_best(folder: Path, model: Retro, step: int) -> None:
    """Puts the best weights into a network, of which this rank may hold a part only.

    Raises:
        FormatError, MismatchError: They are damaged, or of another network.
    """
    path = _best_path(folder, step)
    tensors = load_tensors(path)
    _check_shapes(model, shapes_of(tensors), path)
    with torch.no_grad():
        for name, own in model.state_dict().items():
            own.copy_(divided(tensors[name], own))


def _best_path(folder: Path, step: int) -> Path:
    return folder / TRAINING / f"best-{step:08d}.safetensors"


def _places(folder: Path) -> list[Path]:
    """Folders of the saved states, newest first."""
    found = (folder / TRAINING).glob("step-*")
    return sorted((path for path in found if not path.name.endswith(TEMPORARY)), reverse=True)


def _read_state(place: Path, ranks: Ranks) -> TrainingState:
    """Reads state.json and checks this rank's share of the files it speaks of."""
    content = read_json(place / _STATE)
    try:
        digests = sorted(content.pop("sha256").items())
        state = TrainingState(**content)
    except (AttributeError, KeyError, TypeError) as error:
        raise FormatError(f"{place / _STATE} is damaged: {error!r}") from error
    for name, digest in digests[ranks.rank :: ranks.size]:
        if not (place / name).is_file():
            raise FormatError(f"{place / name} is missing")
        if sha256(place / name) != digest:
            raise FormatError(f"{place / name} was truncated or altered (its SHA-256 differs from {_STATE})")
    return state


def _tensors(model: Retro, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """A state by names: weights, and the optimizer's `parameter/name`; a parameter that never had a gradient has none of these."""
    moments = {
        f"{_OPTIMIZER}{parameter_name}/{name}": value
        for parameter_name, parameter in model.named_parameters()
        for name, value in optimizer.state.get(parameter, {}).items()
    }
    return {_WEIGHTS + name: tensor for name, tensor in model.state_dict().items()} | moments


def _write_parts(place: Path, tensors: dict[str, Tensor], ranks: Ranks) -> None:
    """Writes this rank's part of some tensors, with the others."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    known = inspect.signature(HuggingFaceStorageWriter).parameters
    each_its_own = "save_distributed" if "save_distributed" in known else "save_sharded"  # torch 2.8 has the latter
    options: dict[str, Any] = {each_its_own: True}
    writer = HuggingFaceStorageWriter(str(place), **options)
    with _failing_as_it_did(), _without_warning_of_one_process():
        save(tensors, storage_writer=writer, no_dist=ranks.size == 1)


def _read_parts(place: Path, model: Retro, optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
    """Copies a state into the memory of network and optimizer, with the others."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(place))
    entries = reader.read_metadata().state_dict_metadata
    saved = {key: entry for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
    shapes = {name.removeprefix(_WEIGHTS): entry.size for name, entry in saved.items() if name.startswith(_WEIGHTS)}
    _check_shapes(model, shapes, place)
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for key, entry in saved.items():
        if key.startswith(_OPTIMIZER):
            parameter_name, _, name = key.removeprefix(_OPTIMIZER).rpartition("/")
            parameter = parameters[parameter_name]
            if entry.size == parameter.shape:
                value = torch.zeros_like(parameter.detach(), dtype=entry.properties.dtype)
            else:
                value = torch.zeros(entry.size, dtype=entry.properties.dtype, device=parameter.device)
            optimizer.state[parameter][name] = value
    with _failing_as_it_did(), _without_warning_of_one_process():
        load(_tensors(model, optimizer), storage_reader=reader, no_dist=ranks.size == 1)


@contextlib.contextmanager
def _as_storage_errors(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise error if isinstance(error, StorageError) else storage_error(place, error) from error


@contextlib.contextmanager
def _failing_as_it_did() -> Iterator[None]:
    """Takes the first failure out of the collection, no Exception, that torch.distributed.checkpoint makes of all ranks'."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as failure:
        raise next(iter(failure.failures.values()))[0] from failure


@contextlib.contextmanager
def _without_warning_of_one_process() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield
