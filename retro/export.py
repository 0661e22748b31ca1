"""`retro export`: a copy of a finished model with smaller weights, in files of a limited size."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from retro.artifact import (
    MANIFEST,
    begin,
    finish,
    read_json,
    read_manifest,
    write_atomically,
    write_json,
    writing,
)
from retro.checkpoint import CARD, CONFIG, INDEX, KIND, load_weights, read_config, save_tensors
from retro.errors import ConfigError
from retro.quantized import FORMS, Form, is_weights, shards, stored
from retro.threshold import ANSWERS, load_threshold, save_threshold

_COPIED = ("tokenizer*", "special_tokens_map.json", "chat_template*", "generation_config.json", "LICENSE*", "NOTICE*")
"""What is needed besides weights, configuration and card; not what training left."""
_LICENSE, _STORED = "## License and limits", "## Stored weights"
_MEANING = {
    "float32": "As float32.",
    "bfloat16": "As bfloat16.",
    "int8": "As 8-bit integers with a float32 scale for each row of a matrix, norms as float32; widened when the model is opened.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A copy of a model."""

    folder: str
    weights: str
    """float32, bfloat16 or int8."""
    bfloat16: tuple[str, ...]
    """Modules that are not in int8."""
    files: int
    """That hold weights."""
    weights_bytes: int
    """Of these together."""
    largest_file_bytes: int
    folder_bytes: int
    """Of all files."""
    source_weights_bytes: int
    """Of the files that the weights were read from."""

    def report(self) -> dict[str, Any]:
        """By name."""
        return asdict(self)


def export_model(
    folder: Path,
    out: Path,
    *,
    weights: Form = "bfloat16",
    bfloat16: Sequence[str] = (),
    max_shard_bytes: int | None = None,
    overwrite: bool = False,
) -> Exported:
    """Copies a finished model without what training left. The copy opens as any other model does, and knows when not to answer.

    Args:
        folder: The model; of a RETROfitted one only what was trained is there, and the base is not looked for.
        out: The copy. It stays as it is where it was made so already.
        weights: How they are stored: float32, bfloat16, or int8 with a scale for each row.
        bfloat16: Modules whose matrices are written in bfloat16 where the others are int8, as in `encoder`.
        max_shard_bytes: No file with weights becomes larger; None: they are one file.
        overwrite: Take the place of another model in `out`.

    Raises:
        ConfigError: `out` is something else, or `folder` itself, a single tensor is larger than `max_shard_bytes`, or a
            module of `bfloat16` does not exist.
        FormatError: The model is missing, unfinished, damaged or altered.
        StorageError: The copy cannot be written.
    """
    if weights not in FORMS:
        raise ConfigError(f"weights = {weights!r}: must be one of {', '.join(FORMS)}")
    source, target = folder.resolve(), out.resolve()
    if source == target or target in source.parents or source in target.parents:
        raise ConfigError(f"{out} is the model itself, inside it or around it: choose another --out")
    manifest = read_manifest(folder, KIND)
    config = read_config(folder) | {"dtype": "float32" if weights == "int8" else weights, "stored_weights": weights}
    files, index = shards(stored(load_weights(folder), weights, bfloat16), max_shard_bytes)
    origin = {name: record for name, record in manifest["files"].items() if is_weights(name) or name == CONFIG}
    threshold = load_threshold(folder)
    recipe: dict[str, Any] = {"exported_from": origin, "weights": weights, "max_shard_bytes": max_shard_bytes}
    if bfloat16:
        recipe["bfloat16"] = list(bfloat16)
    with writing(out):
        if not begin(out, KIND, recipe, overwrite=overwrite):
            for name, tensors in files.items():
                save_tensors(out / name, tensors)
            if index:
                write_json(out / INDEX, index)
            for path in sorted(path for pattern in _COPIED for path in folder.glob(pattern) if path.is_file()):
                _write(out / path.name, path.read_bytes())
            write_json(out / CONFIG, config)
            _write(out / CARD, _card(folder, weights, bfloat16, sorted(files)).encode())
            finish(out, KIND, recipe, {"tokenizer_fingerprint": config["tokenizer_fingerprint"]})
    if threshold is not None and not (out / ANSWERS).is_file():  # else it may have been chosen for the copy
        save_threshold(out, threshold)
    made = {name: record["bytes"] for name, record in read_json(out / MANIFEST)["files"].items()}
    sizes = [made[name] for name in files]
    return Exported(
        folder=str(out),
        weights=weights,
        bfloat16=tuple(bfloat16),
        files=len(sizes),
        weights_bytes=sum(sizes),
        largest_file_bytes=max(sizes),
        folder_bytes=sum(made.values()),
        source_weights_bytes=sum(record["bytes"] for name, record in origin.items() if name != CONFIG),
    )


def _write(path: Path, content: bytes) -> None:
    write_atomically(path, lambda file: file.write(content))


def _card(folder: Path, weights: Form, bfloat16: Sequence[str], files: list[str]) -> str:
    """The model's own card, which may be written by hand, with a section about its weights before the one about its license."""
    path = folder / CARD
    card = path.read_text(encoding="utf-8") if path.is_file() else ""
    before, _, earlier = card.partition(f"{_STORED}\n")
    if earlier:  # of a model that was exported before
        card = before + (f"## {rest}" if (rest := earlier.partition("\n## ")[2]) else "")
    before, heading, after = card.partition(_LICENSE)
    where = f"`{files[0]}`" if len(files) == 1 else f"{len(files)} files, `{files[0]}` to `{files[-1]}`"
    but = f" The matrices of {', '.join(bfloat16)} are in bfloat16." if bfloat16 else ""
    section = f"{_STORED}\n\n{_MEANING[weights]}{but} In {where}.\n"
    return f"{before.rstrip()}\n\n{section}".lstrip() + (f"\n{heading}{after}" if heading else "")
