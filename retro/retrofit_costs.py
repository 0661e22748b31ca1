"""What putting retrieval into a pretrained base costs, by what becomes of the base: trained, frozen, with adapters, in 4 bits."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from retro.costs import Memory, state_memory

NF4_BITS = 4.5
"""A number in 4 bits, and a float32 scale for every 64 (arXiv:2305.14314, section 3, without double quantization)."""


def lora_parameters(matrices: Iterable[tuple[int, int]], rank: int) -> int:
    """Numbers that low-rank adapters add to matrices of these shapes (arXiv:2106.09685, section 4.1)."""
    return sum(rank * (rows + columns) for rows, columns in matrices)


def retrofit_memory(
    *, base_matrices: int, base_other: int, added: int, lora: int, base_bits: int = 16, ranks: int = 1
) -> dict[str, Memory]:
    """Weights, gradients and moments of retrofitting a pretrained base, by what becomes of the base. Activations come besides.

    Args:
        base_matrices: Parameters of the base that quantization can shrink.
        base_other: Its others: embeddings, norms, biases.
        added: Parameters of encoder and CCA, always trained.
        lora: Parameters of the adapters.
        base_bits: Of a frozen number of the base, where it is not quantized.
        ranks: Devices that share all of it.

    Returns:
        "full": everything is trained; "frozen": encoder and CCA alone; "lora": and adapters; "4-bit": as lora, the base in NF4.
    """
    base = base_matrices + base_other
    quantized = (NF4_BITS * base_matrices + base_bits * base_other) / max(base, 1)
    return {
        "full": state_memory(base + added, ranks=ranks),
        "frozen": state_memory(added, base, frozen_bits=base_bits, ranks=ranks),
        "lora": state_memory(added + lora, base, frozen_bits=base_bits, ranks=ranks),
        "4-bit": state_memory(added + lora, base, frozen_bits=quantized, ranks=ranks),
    }


def retrofit_flops(base: float, added: float, *, full: bool, through: float = 1.0) -> float:
    """FLOPs of forward and backward pass of a retrofitted base.

    A frozen matrix has no gradient of its own, but hands on that of its input, where something below it is trained.

    Args:
        base: Forward FLOPs of the base.
        added: Forward FLOPs of encoder and CCA.
        full: Whether the base is trained too.
        through: Share of the base's FLOPs that gradients run through: the layers from min(P) on; all of them with adapters.
    """
    return 3 * added + (3 * base if full else (1 + through) * base)


def matrix_shapes(base: Any) -> list[tuple[int, int]]:
    """Width in and out of every linear layer of a base but its output: those that quantization shrinks and adapters go beside.

    Args:
        base: A causal language model of transformers; adapters that it has already do not count.
    """
    return [shape for _, shape in _linear_layers(base)]


def _linear_layers(base: Any) -> Iterator[tuple[nn.Module, tuple[int, int]]]:
    head = base.get_output_embeddings()
    for name, module in base.named_modules():
        if module is head or "lora_" in name or hasattr(module, "base_layer"):
            continue
        if hasattr(module, "in_features") and hasattr(module, "out_features"):
            yield module, (int(module.in_features), int(module.out_features))
        elif hasattr(module, "nx") and hasattr(module, "nf"):  # GPT-2's linear layer
            yield module, (int(module.nx), int(module.nf))


def base_memory(
    base: Any, *, added: int, lora_rank: int = 16, base_bits: int = 16, ranks: int = 1
) -> dict[str, Memory]:
    """`retrofit_memory` of a base that is there, whatever is done to it now (quantized, adapters).

    Args:
        base: A causal language model of transformers.
        added: Parameters of encoder and CCA.
        lora_rank: Of the adapters beside every matrix of `matrix_shapes`.
        base_bits: As for `retrofit_memory`.
        ranks: As for `retrofit_memory`.
    """
    layers = list(_linear_layers(base))
    shapes = [shape for _, shape in layers]
    weights = {id(module.weight) for module, _ in layers}
    others = [p for name, p in base.named_parameters() if id(p) not in weights and "lora_" not in name]
    return retrofit_memory(
        base_matrices=sum(rows * columns for rows, columns in shapes),
        base_other=sum(p.numel() for p in others),
        added=added,
        lora=lora_parameters(shapes, lora_rank),
        base_bits=base_bits,
        ranks=ranks,
    )


def base_flops(
    shapes: Iterable[tuple[int, int]], *, dim: int, vocab_size: int, num_layers: int, inner: int, seq_len: int
) -> int:
    """FLOPs of a forward pass of a base over one sequence, by the convention of `forward_flops`.

    Args:
        shapes: From `matrix_shapes`; every token goes through every one (no mixture of experts).
        dim: Width.
        vocab_size: Logits.
        num_layers: Attentions.
        inner: Width of an attention's queries, all heads together.
        seq_len: T.
    """
    matrices = sum(rows * columns for rows, columns in shapes)
    return 2 * seq_len * (matrices + dim * vocab_size) + num_layers * 4 * seq_len**2 * inner
