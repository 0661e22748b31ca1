"""Pretrained causal language models of Hugging Face transformers, as bases to put retrieval into: opening them, where their
layers are, what they may have trained, and by which digest they are known again."""

import hashlib
import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retro.cca import Cache
from retro.config import BaseConfig
from retro.errors import ConfigError, DependencyError, MismatchError
from retro.tokenizer import Tokenizer

LAYERS = {
    "gemma": "model.layers",
    "gemma2": "model.layers",
    "gemma3_text": "model.layers",
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "llama": "model.layers",
    "mistral": "model.layers",
    "opt": "model.decoder.layers",
    "phi": "model.layers",
    "phi3": "model.layers",
    "qwen2": "model.layers",
    "qwen3": "model.layers",
}
"""Where the architectures (`model_type`) that are tested keep their list of decoder layers. Its parent is the decoder."""
LEARNED_POSITIONS = ("gpt2", "opt")
"""Those that know only the positions of their table; the others have rotary ones."""
SAMPLED = 1 << 14
"""Values of a tensor that its digest covers at most."""


def sizes(config: Any) -> dict[str, Any]:
    """All sizes of a network built around a base, by their names in ModelConfig.

    `vocab_size`, `dim` and `num_layers` are the base's. The others may be changed: CCA has as many heads as the base; the encoder
    is as wide as the paper's, where the base is; P is the paper's (every third layer from the 6th), in a base of fewer than 12
    layers every second one from the middle. `ffw_dim` and `tie_embeddings` mean nothing here.

    Args:
        config: Of the base, as transformers give it.

    Raises:
        ConfigError: It is an encoder-decoder.
    """
    if config.is_encoder_decoder:
        raise ConfigError(
            f"the base {_name(config)} ({config.model_type}) is an encoder-decoder: take a decoder, trained to continue text"
        )
    text = config.get_text_config(decoder=True)
    D, L, H = text.hidden_size, text.num_hidden_layers, text.num_attention_heads
    E = min(D - D % 2, 896)
    heads = max(E // 64, 1)
    return {
        "vocab_size": text.vocab_size,
        "dim": D,
        "num_layers": L,
        "num_heads": H,
        "head_dim": max(D // H // 2 * 2, 2),
        "ffw_dim": 4 * D,
        "cca_layers": tuple(range(6, L + 1, 3) if L >= 12 else range(L // 2 + 1, L + 1, 2)),
        "encoder_dim": E,
        "encoder_layers": 2,
        "encoder_heads": heads,
        "encoder_head_dim": max(min(E // heads // 2 * 2, 64), 2),
        "encoder_ffw_dim": 4 * E,
        "tie_embeddings": False,
    }


def base_sizes(base: BaseConfig) -> dict[str, Any]:
    """`sizes` of a base by its name; its weights are not read.

    Raises:
        ConfigError: There is no such base, or it is an encoder-decoder.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(base.name, revision=base.revision or None)
    except (OSError, ValueError) as error:
        raise _not_opened(base, error) from error
    return sizes(config)


def open_base(base: BaseConfig, dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
    """Opens a base with its language modeling head.

    Args:
        base: Name or folder, revision and quantization.
        dtype: Of its weights, float32 or bfloat16. Where base weights are trained themselves, they are float32 anyway.
        device: Where it is put.

    Raises:
        ConfigError: There is no such base, it has no head, or it is no causal language model.
        DependencyError: Its quantization needs a library that is not installed.
    """
    import transformers

    opener: Any = transformers.AutoModelForCausalLM  # with output_loading_info it gives a pair, unlike its annotation
    options: dict[str, Any] = {"dtype": torch.float32 if base.unfreeze else dtype}
    if base.quantization != "none":
        options |= {"quantization_config": _quantization(base, dtype), "device_map": {"": torch.device(device)}}
    try:
        model, report = opener.from_pretrained(
            base.name, revision=base.revision or None, output_loading_info=True, **options
        )
    except (OSError, ValueError) as error:
        raise _not_opened(base, error) from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ConfigError(
            f"the base {base.name} has no {', '.join(missing[:3])}: it was saved without its language modeling head, or is "
            "damaged; take the model for causal language modeling"
        )
    return model if base.quantization != "none" else model.to(device)


def check_vocabulary(base: Any, options: BaseConfig, tokenizer: Tokenizer) -> None:
    """Raises a MismatchError where training data are not in the tokens of a base, as far as it has a tokenizer with it."""
    advice = f"make the training data with `retro data --tokenizer {options.name}`"
    size = base.get_input_embeddings().weight.shape[0]
    if tokenizer.vocab_size > size:
        raise MismatchError(
            f"the training data have {tokenizer.vocab_size:,} different tokens, the base {options.name} {size:,}: {advice}"
        )
    try:
        own = Tokenizer.load(options.name)
    except ConfigError:
        return
    if own.fingerprint != tokenizer.fingerprint:
        raise MismatchError(
            f"the training data are of the tokenizer {tokenizer.fingerprint}, the base {options.name} has {own.fingerprint}: "
            f"{advice}"
        )


def layer_list(base: Any, path: str = "") -> tuple[nn.Module, nn.ModuleList]:
    """The decoder of a base, whose result are the final activations, and its layers.

    Args:
        base: With a language modeling head.
        path: Where the layers are. Empty: where `LAYERS` says.

    Raises:
        ConfigError: It has no head, or its architecture is unknown.
    """
    kind = base.config.model_type
    known = f"known are {', '.join(LAYERS)}; for others say where the decoder layers are, as in layers = 'model.layers'"
    if not path and kind not in LAYERS:
        raise ConfigError(f"the base {_name(base.config)} is of the unknown architecture {kind!r}: {known}")
    if base.get_output_embeddings() is None:
        raise ConfigError(
            f"the base {type(base).__name__} has no language modeling head: open it with AutoModelForCausalLM.from_pretrained"
        )
    path = path or LAYERS[kind]
    try:
        layers, decoder = base.get_submodule(path), base.get_submodule(path.rpartition(".")[0])
    except AttributeError as error:
        raise ConfigError(f"the base {type(base).__name__} has nothing at layers = {path!r}: {known}") from error
    if not isinstance(layers, nn.ModuleList):
        raise ConfigError(f"layers = {path!r} of {type(base).__name__} is a {type(layers).__name__}, no list of layers")
    return decoder, layers


def keep_differentiable(base: nn.Module) -> None:
    """Keeps bitsandbytes from packing 4-bit weights, on CPUs with AVX512-BF16, into a form that has no gradients.

    It does so at the first call in eval mode, and there is no way back (bitsandbytes 0.50).
    """
    module: Any
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def add_lora(base: Any, rank: int, alpha: float) -> None:
    """Puts low-rank adapters (Hu et al. 2021, arXiv:2106.09685) beside all matrices of the layers, in float32; they begin as zero.

    Raises:
        DependencyError: peft is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise DependencyError('lora_rank needs the package peft: pip install peft, or "retro-lm[peft]"')
    import peft
    from transformers.pytorch_utils import Conv1D

    transposed = any(isinstance(module, Conv1D) for module in base.modules())
    config: Any = peft.LoraConfig  # takes a float for alpha, unlike its annotation
    settings = config(r=rank, lora_alpha=alpha, target_modules="all-linear", fan_in_fan_out=transposed)
    peft.inject_adapter_in_model(settings, base)
    for name, parameter in base.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()


# --- places -------------------------------------------------------------------------------------------------------


def check_attention(base: Any) -> None:
    """Raises a ConfigError where a base's attention takes no masks, which confine it to one document."""
    implementation = _text(base)._attn_implementation
    if implementation not in ("sdpa", "eager"):
        raise ConfigError(
            f"the base's attention is {implementation!r}, which takes no masks of packed documents: open it with "
            "attn_implementation='sdpa'"
        )


def check_length(base: Any, columns: int, position_BT: Tensor | None) -> None:
    """Raises a ConfigError where tokens stand at positions that a base does not know."""
    most = getattr(base.config, "max_position_embeddings", 0)
    if base.config.model_type not in LEARNED_POSITIONS or columns <= most:
        return
    tokens = columns if position_BT is None else int(position_BT.max()) + 1
    if tokens > most:
        raise ConfigError(
            f"{tokens} tokens in a row, but the base knows {most} positions: take shorter sequences (train.seq_len, max_new_tokens)"
        )


def sequence_places(base: Any, keep_BT: Tensor, document_BL: Tensor | None, chunk_len: int) -> dict[str, Tensor]:
    """What a base is told of packed sequences: every token sees its own document, whose tokens are counted from 0.

    Args:
        base: Opened.
        keep_BT: True where a slot holds a token. Empty slots see empty slots.
        document_BL: As for `Retro.hidden`.
        chunk_len: M.

    Returns:
        `position_ids` [B, T], and `attention_mask` where there is more than one document or an empty slot.
    """
    T = keep_BT.shape[1]
    segment_BT = torch.zeros_like(keep_BT, dtype=torch.long)
    if document_BL is not None:
        segment_BT = document_BL.repeat_interleave(chunk_len, dim=1)
    slot_T = torch.arange(T, device=keep_BT.device)
    begins_BT = F.pad(segment_BT[:, 1:] != segment_BT[:, :-1], (1, 0), value=True)
    first_BT = (slot_T * begins_BT).cummax(dim=1).values
    count_BT = F.pad(keep_BT.cumsum(1), (1, 0))
    position_BT = (count_BT[:, 1:] - count_BT.gather(1, first_BT) - 1).clamp(min=0)
    if not torch.compiler.is_compiling() and bool(keep_BT.all() & (first_BT == 0).all()):
        return {"position_ids": position_BT}
    segment_BT = segment_BT.masked_fill(~keep_BT, -1)
    distance_TT = slot_T[:, None] - slot_T
    sees_BTT = (segment_BT[:, :, None] == segment_BT[:, None, :]) & (distance_TT >= 0)
    return {"position_ids": position_BT, "attention_mask": _masks(base, sees_BTT, distance_TT)}


def cache_places(base: Any, cache: Cache, keep_BT: Tensor) -> dict[str, Tensor]:
    """What a base is told of columns that were just added to a cache.

    Args:
        base: Opened.
        cache: With the places of these columns.
        keep_BT: True where one holds a token. Another sees what is before it, and itself.

    Returns:
        `position_ids` [B, T], which count a row's tokens, and `attention_mask`.
    """
    assert cache.keep_BT is not None
    assert cache.at_BT is not None
    T, S = keep_BT.shape[1], cache.keep_BT.shape[1]
    position_BT = (cache.keep_BT.cumsum(1)[:, -T:] - 1).clamp(min=0)
    earlier_TS = torch.ones(T, S, dtype=torch.bool, device=keep_BT.device).tril(S - T)
    own_TS = earlier_TS & ~earlier_TS.tril(S - T - 1)
    distance_BTS = (cache.at_BT[:, -T:, None] - cache.at_BT[:, None, :]).masked_fill(own_TS, 0)
    sees_BTS = cache.keep_BT[:, None, :] & earlier_TS | own_TS
    return {"position_ids": position_BT, "attention_mask": _masks(base, sees_BTS, distance_BTS)}


def _masks(base: Any, sees_BTS: Tensor, distance_BTS: Tensor) -> Any:
    """A base's `attention_mask`; several by name where its layers differ."""
    config = _text(base)
    window = getattr(config, "sliding_window", None)
    near_BTS = sees_BTS if window is None else sees_BTS & (distance_BTS < window)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return _mask(base, near_BTS)
    masks = {"full_attention": sees_BTS, "sliding_attention": near_BTS}
    other = set(kinds) - set(masks)
    if other:
        raise ConfigError(f"the base has layers of the kind {', '.join(sorted(other))}, which are not supported")
    return {kind: _mask(base, masks[kind]) for kind in set(kinds)}


def _mask(base: Any, sees_BTS: Tensor) -> Tensor:
    """Boolean for fused attention, which is added to logits otherwise."""
    if _text(base)._attn_implementation == "sdpa":
        return sees_BTS[:, None]
    lowest = torch.finfo(base.dtype).min
    return torch.zeros_like(sees_BTS, dtype=base.dtype).masked_fill(~sees_BTS, lowest)[:, None]


def _text(base: Any) -> Any:
    return base.config.get_text_config(decoder=True)


# --- the same base ------------------------------------------------------------------------------------------------


def digests(base: nn.Module) -> dict[str, str]:
    """A digest of every tensor, by which a base is known again.

    It covers the shape and at most SAMPLED values, evenly spread, rounded to bfloat16: so it is the same whether a base is loaded
    in float32 or bfloat16, and quickly made. (What was rounded to float16 in between may differ.) A quantized tensor has none.
    """
    found = {}
    for name, parameter in base.named_parameters():
        if parameter.is_floating_point():
            flat: Tensor = parameter.detach().reshape(-1)
            some = flat[:: -(-len(flat) // SAMPLED) or 1].to(torch.bfloat16).view(torch.int16).cpu()
            content = str(list(parameter.shape)).encode() + some.numpy().astype("<i2").tobytes()
            found[name] = hashlib.sha256(content).hexdigest()[:16]
    return found


def check_digests(
    stored: Mapping[str, str], own: Mapping[str, str], *, trained_on: str, given: str, quantized: bool
) -> None:
    """Compares what both have.

    Args:
        stored: Of the base that a model was trained on.
        own: Of the base at hand.
        trained_on: Name of the former, for the message.
        given: Name of the latter.
        quantized: Whether either is quantized, so that tensors may be missing.

    Raises:
        MismatchError: They are not the same.
    """
    common = sorted(stored.keys() & own.keys())
    differing = [name for name in common if stored[name] != own[name]]
    differing += [] if quantized else sorted(stored.keys() ^ own.keys())
    if differing or not common:
        raise MismatchError(
            f"the model was trained on the base {trained_on}, and {given} is another one: {len(differing)} tensors differ "
            f"({', '.join(differing[:3]) or 'none has the same name'}). Open it with the base it was trained on, in float32 or "
            "bfloat16"
        )


def is_quantized(base: nn.Module) -> bool:
    """Whether some weights are not floating-point numbers."""
    return any(not parameter.is_floating_point() for parameter in base.parameters())


# --- details ------------------------------------------------------------------------------------------------------


def _quantization(base: BaseConfig, dtype: torch.dtype) -> Any:
    missing = [name for name in ("bitsandbytes", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise DependencyError(
            f"quantization = {base.quantization!r} needs the packages bitsandbytes and accelerate, and {' and '.join(missing)} "
            f"cannot be found: pip install {' '.join(missing)}, or leave quantization away"
        )
    import transformers

    settings: Any = transformers.BitsAndBytesConfig
    if base.quantization == "8bit":
        return settings(load_in_8bit=True)
    return settings(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _not_opened(base: BaseConfig, error: Exception) -> ConfigError:
    first = str(error).strip().partition("\n")[0]
    revision = f" (revision {base.revision})" if base.revision else ""
    return ConfigError(
        f"the base {base.name!r}{revision} cannot be opened as a causal language model: {first} "
        "Give a folder with config.json and the weights, or the name of a model on the Hugging Face hub"
    )


def _name(config: Any) -> str:
    return getattr(config, "_name_or_path", "") or type(config).__name__.removesuffix("Config")
