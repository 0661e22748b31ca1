"""Weights in fewer bits, and in several files: what an exported model is made of, and how it becomes a model again.

In 8 bits a matrix `X` is stored as the integers `X`, int8, and `X_scale`, float32, one for each row: a weight is its integer times
the scale of its row. Rows are the channels of an output, or the tokens of a table. Vectors (norms) stay float32, and
matrices of modules that suffer most can stay in bfloat16.

    O rows of a matrix      I their width
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from retro.errors import ConfigError, FormatError

Form = Literal["float32", "bfloat16", "int8"]
FORMS: tuple[Form, ...] = ("float32", "bfloat16", "int8")
SCALE = "_scale"
"""How the name of a matrix's scales ends."""
_LARGEST = 127
"""-128 is not used, so that a weight and its negative are rounded alike."""
_HEADER_BYTES = 128
"""More than the header of a file takes for one tensor besides its name, and for the file itself."""


def quantize_rows(x_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds a matrix to 8 bits, half to even; a row's largest weight becomes 127.

    Returns:
        Integers, int8 [O, I], and scales, float32 [O]. No weight is off by more than half its row's scale, but for float32's own
        rounding.
    """
    x_OI = x_OI.to(torch.float32)
    scale_O = (x_OI.abs().amax(dim=1) / _LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.round(x_OI / scale_O[:, None]).to(torch.int8), scale_O


def dequantize_rows(q_OI: Tensor, scale_O: Tensor) -> Tensor:
    """The weights, float32 [O, I]."""
    return q_OI.to(torch.float32) * scale_O[:, None]


def stored(tensors: Mapping[str, Tensor], form: Form, bfloat16: Sequence[str] = ()) -> dict[str, Tensor]:
    """Weights as they are written.

    Args:
        tensors: By name.
        form: Of all of them.
        bfloat16: Modules whose matrices are written in bfloat16 where `form` is int8, as in `encoder` or `layers.0.cca`.

    Raises:
        ConfigError: There is no matrix in a module of that name.
        FormatError: One of the weights is infinite or not a number.
    """
    if bfloat16 and form != "int8":
        raise ConfigError(f"modules stay in bfloat16 where the others are int8, not {form}")
    matrices = [name for name, tensor in tensors.items() if tensor.ndim == 2]
    for module in bfloat16:
        if not any(_is_in(name, module) for name in matrices):
            some = ", ".join(sorted({name.partition(".")[0] for name in matrices}))
            raise ConfigError(f"no matrix lies in a module {module!r}: the largest modules are {some}")
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise FormatError(f"{name} holds weights that are infinite or not a number: train the model again")
        if form == "int8" and tensor.ndim == 2 and any(_is_in(name, module) for module in bfloat16):
            result[name] = tensor.to(torch.bfloat16)
        elif form == "int8" and tensor.ndim == 2:
            result[name], result[name + SCALE] = quantize_rows(tensor)
        else:
            result[name] = tensor.to(torch.bfloat16 if form == "bfloat16" else torch.float32)
    return result


def _is_in(name: str, module: str) -> bool:
    return f"{name}.".startswith(f"{module}.")


def restored(tensors: Mapping[str, Tensor], where: object) -> dict[str, Tensor]:
    """Weights of floating types out of what was written.

    Args:
        tensors: Content of the files.
        where: The files, for messages.

    Raises:
        FormatError: The scales of a matrix are missing.
    """
    result: dict[str, Tensor] = {}
    matrices = {name for name, tensor in tensors.items() if tensor.dtype == torch.int8}
    for name, tensor in tensors.items():
        if name in matrices:
            scale_O = tensors.get(name + SCALE)
            if scale_O is None or scale_O.shape != tensor.shape[:1]:
                raise FormatError(
                    f"{where} is damaged: {name} has no {SCALE} for each of its rows. Copy or export the model again"
                )
            result[name] = dequantize_rows(tensor, scale_O)
        elif name.removesuffix(SCALE) not in matrices:
            result[name] = tensor
    return result


def shards(tensors: Mapping[str, Tensor], max_bytes: int | None) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Divides tensors among files, in their order.

    Args:
        tensors: As they are written.
        max_bytes: No file becomes larger; None: there is one.

    Returns:
        The content of each file by its name, and that of the index, empty where there is one file. Names and index are those of
        Hugging Face.

    Raises:
        ConfigError: One tensor is larger than that.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    sizes = {name: tensor.nbytes + len(name.encode()) + _HEADER_BYTES for name, tensor in tensors.items()}
    limit = sum(sizes.values()) if max_bytes is None else max_bytes - _HEADER_BYTES
    largest = max(sizes, key=lambda name: sizes[name])
    if sizes[largest] > limit:
        raise ConfigError(
            f"files of at most {max_bytes:,} bytes cannot hold {largest}, which needs {sizes[largest] + _HEADER_BYTES:,} with its "
            f"header: allow {-(-(sizes[largest] + _HEADER_BYTES) // 1024):,}KiB, or store the weights in fewer bits"
        )
    pattern = "model{suffix}.safetensors"
    split = split_state_dict_into_shards_factory(
        sizes, get_storage_size=int, filename_pattern=pattern, max_shard_size=limit
    )
    files = {file: {name: tensors[name] for name in names} for file, names in split.filename_to_tensors.items()}
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
    return files, index if len(files) > 1 else {}


def is_weights(name: str) -> bool:
    """Whether a file of this name holds weights of a model, or is their index."""
    return re.fullmatch(r"model(-\d{5,}-of-\d{5,})?\.safetensors|model\.safetensors\.index\.json", name) is not None
