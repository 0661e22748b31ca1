"""What a network costs: parameters, FLOPs, and the memory of training it. No training is done here.

Letters as in model.py. A FLOP is one addition or one multiplication, so a product of matrices [a, b] x [b, c] has 2abc. Matrix
products alone are counted; everything else is a few thousandths of them.
"""

import functools
import re
from dataclasses import dataclass
from typing import NamedTuple

import torch

from retro.config import ModelConfig
from retro.model import Retro

# --- devices --------------------------------------------------------------------------------------------------------


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies in bfloat16; others emulate it, many times slower than float32."""
    asks = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return any(ask is not None and ask() for ask in asks)


class Gpu(NamedTuple):
    """Data sheet."""

    bf16_flops: float
    """FLOP/s in bfloat16 with tensor cores and sums in float32; dense, so half of what is advertised with sparsity."""
    memory: int
    """Bytes."""
    pattern: str
    """Of the name that PyTorch gives it, whole, without the maker's. Slices (MIG) and laptop GPUs do not match."""


GPUS = {
    "l4": Gpu(121e12, 24 * 10**9, r"L4"),
    "l40s": Gpu(362e12, 48 * 10**9, r"L40S"),
    "a10": Gpu(125e12, 24 * 10**9, r"A10"),
    "a100": Gpu(312e12, 80 * 10**9, r"A100.*"),
    "h100": Gpu(989e12, 80 * 10**9, r"H100( SXM5?)?( 80GB HBM3)?"),
    "h100-pcie": Gpu(756e12, 80 * 10**9, r"H100 PCIe"),
    "h100-nvl": Gpu(835e12, 94 * 10**9, r"H100 NVL"),
    "h200": Gpu(989e12, 141 * 10**9, r"H200"),
    "h200-nvl": Gpu(835e12, 141 * 10**9, r"H200 NVL"),
    "gh200": Gpu(989e12, 96 * 10**9, r"GH200.*"),
    "b200": Gpu(2250e12, 180 * 10**9, r"B200"),
    "rtx-3090": Gpu(71e12, 24 * 10**9, r"GeForce RTX 3090"),
    "rtx-4090": Gpu(165.2e12, 24 * 10**9, r"GeForce RTX 4090"),
    "rtx-5090": Gpu(209.5e12, 32 * 10**9, r"GeForce RTX 5090"),
    "mi300x": Gpu(1307e12, 192 * 10**9, r"Instinct MI300X.*"),
}
"""The makers' data sheets: NVIDIA's of L4, L40S, A10, A100, H100 (SXM, PCIe, NVL), H200, GH200 and HGX B200, its white papers
of the GeForce architectures Ampere, Ada and Blackwell, and AMD's of MI300X. The A100 with 40 GB has half the memory said here."""


def device_peak_flops(name: str) -> float | None:
    """Peak FLOP/s in bfloat16 of a GPU by the name `torch.cuda.get_device_name` gives; None where it is not in the table."""
    bare = re.sub(r"^(NVIDIA|AMD) ", "", name.strip())
    if "MIG" in bare:
        return None
    return next((gpu.bf16_flops for gpu in GPUS.values() if re.fullmatch(gpu.pattern, bare)), None)


# --- parameters -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Numbers of a network, by part."""

    decoder: int = 0
    """Matrices of self-attention and feed-forward."""
    cca: int = 0
    """Matrices of chunked cross-attention."""
    encoder: int = 0
    """Matrices of the neighbor encoder."""
    embeddings: int = 0
    """Tables of tokens."""
    head: int = 0
    """The output's own matrix; 0 where it is an embedding table."""
    vectors: int = 0
    """Scales of norms and biases."""

    @property
    def matrices(self) -> int:
        """What the paper counts: "non-embedding parameters"."""
        return self.decoder + self.cca + self.encoder

    @property
    def total(self) -> int:
        return self.matrices + self.embeddings + self.head + self.vectors


@functools.cache
def parameter_counts(config: ModelConfig) -> Parameters:
    """Counts the network's own tensors, on the meta device: no memory is used.

    Source: arXiv:2112.04426, table 1, whose numbers are `matrices`.
    """
    with torch.device("meta"):
        model = Retro(config)
    counts = dict.fromkeys(Parameters.__dataclass_fields__, 0)
    for name, tensor in model.named_parameters():
        if tensor.ndim < 2 or name.endswith("bias"):
            part = "vectors"
        elif name.startswith(("embedding.", "encoder_embedding.")):
            part = "embeddings"
        elif name.startswith(("head.", "encoder.")):
            part = name.partition(".")[0]
        else:
            part = "cca" if ".cca." in name else "decoder"
        counts[part] += tensor.numel()
    return Parameters(**counts)


# --- FLOPs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Flops:
    """FLOPs by part of the network."""

    attention: float
    """The decoder's self-attention with its projections."""
    feed_forward: float
    """The decoder's."""
    head: float
    """Logits."""
    encoder: float = 0
    """The neighbor encoder, with its view of the decoder."""
    cca: float = 0
    """Chunked cross-attention with its projections."""

    @property
    def decoder(self) -> float:
        """Without retrieval."""
        return self.attention + self.feed_forward + self.head

    @property
    def retrieval(self) -> float:
        """What neighbors add."""
        return self.encoder + self.cca

    @property
    def total(self) -> float:
        return self.decoder + self.retrieval


def forward_flops(
    config: ModelConfig, *, seq_len: int, num_neighbors: int, neighbor_len: int, retrieving: float = 1.0
) -> Flops:
    """FLOPs of a forward pass over one sequence.

    Attention counts all T x T products, the half that causality masks included: the convention of PaLM (arXiv:2204.02311, appendix
    B), which makes figures of model FLOPs utilization comparable. Every slot has logits.

    Args:
        config: The network.
        seq_len: T.
        num_neighbors: K; 0 turns retrieval off.
        neighbor_len: R.
        retrieving: Share of the chunks that have neighbors: the others cost nothing in encoder and CCA.
    """
    D, M, R = config.dim, config.chunk_len, neighbor_len
    inner = config.num_heads * config.head_dim
    relative = config.positions == "relative"
    attention: float = _attention_flops(seq_len, seq_len, D, D, inner)
    attention += relative * _distance_flops(seq_len, seq_len, D, inner)
    feed_forward = 4 * seq_len * D * config.ffw_dim
    encoder = cca = 0.0
    if config.cca_layers and num_neighbors:
        chunks = retrieving * (seq_len // M)
        encoder = _encoder_flops(config, chunks, num_neighbors, R)
        cca = chunks * _attention_flops(M, num_neighbors * R, D, config.encoder_dim, inner)
        if relative and config.cca_positions:
            cca += _distance_flops(chunks * M, M + R - 1, D, inner)
        cca *= len(config.cca_layers)
    return Flops(
        attention=config.num_layers * attention,
        feed_forward=config.num_layers * feed_forward,
        head=2 * seq_len * D * config.vocab_size,
        encoder=encoder,
        cca=cca,
    )


def _encoder_flops(config: ModelConfig, chunks: float, K: int, R: int) -> float:
    """Of the neighbors of so many chunks."""
    E, M = config.encoder_dim, config.chunk_len
    inner = config.encoder_heads * config.encoder_head_dim
    if config.encoder == "bert":  # the chunk stands in front of each neighbor
        T = R + M * config.encoder_conditioned
        layer = chunks * K * (_attention_flops(T, T, E, E, inner) + 4 * T * E * config.encoder_ffw_dim)
        return config.encoder_layers * layer
    rows = chunks * K * R
    layer = chunks * K * _attention_flops(R, R, E, E, inner) + 4 * rows * E * config.encoder_ffw_dim
    cross = chunks * _attention_flops(K * R, M, E, config.dim, inner)
    if config.positions == "relative":
        layer += _distance_flops(rows, 2 * R - 1, E, inner)
        cross += _distance_flops(rows, R + M - 1, E, inner)
    return config.encoder_layers * layer + config.encoder_conditioned * cross


def _attention_flops(queries: int, keys: int, query_dim: int, key_dim: int, inner: int) -> int:
    """Projections of queries, output, keys and values; a product for the logits and one for the values."""
    return 4 * queries * query_dim * inner + 4 * keys * key_dim * inner + 4 * queries * keys * inner


def _distance_flops(queries: float, distances: int, query_dim: int, inner: int) -> float:
    """What relative positions add: the projection of all distances, once, and the product of every query with each of them."""
    return 2 * distances * query_dim * inner + 2 * queries * distances * inner


def training_flops(forward: Flops, *, recomputed: bool = False) -> float:
    """FLOPs of forward and backward pass: a product of matrices has two gradients, each of which costs as much as itself.

    Args:
        forward: Of the forward pass.
        recomputed: Count the second forward pass of activation checkpointing: hardware FLOPs. Model FLOPs leave it out.
    """
    return (4 if recomputed else 3) * forward.total


def frozen_training_flops(config: ModelConfig, forward: Flops, *, seq_len: int) -> float:
    """The same where chunked cross-attention and neighbor encoder alone are trained.

    A frozen matrix hands on the gradient of its input and has none itself; products of two activations have both gradients. There
    are none below the first chunked cross-attention, in whose layer only the feed-forward comes after it.

    Args:
        config: The network.
        forward: Of the forward pass over a sequence.
        seq_len: T.
    """
    if not forward.retrieval:
        return forward.total
    inner = config.num_heads * config.head_dim
    above = config.num_layers - min(config.cca_layers)
    attention = 8 * seq_len * config.dim * inner + 8 * seq_len**2 * inner
    if config.positions == "relative":
        attention += 2 * seq_len**2 * inner
    feed_forward = forward.feed_forward / config.num_layers
    backward = forward.head + (above + 1) * feed_forward + above * attention + 2 * forward.retrieval
    return forward.total + backward


def mfu(flops_per_step: float, seconds: float, peak: float) -> float:
    """Model FLOPs utilization: the share of the peak that a step's model FLOPs are (arXiv:2204.02311, section 4.1).

    Args:
        flops_per_step: `training_flops` of all sequences of the step, on all devices.
        seconds: Of the step.
        peak: FLOP/s of all devices together.
    """
    return flops_per_step / seconds / peak


# --- memory ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of training on one device."""

    weights: int = 0
    """Frozen ones included."""
    gradients: int = 0
    optimizer: int = 0
    """AdamW's two moments, float32."""
    copies: int = 0
    """Weights in bfloat16 under autocast; with shards, the layers that are gathered and their gradients."""
    activations: int = 0
    """What the forward pass keeps for the backward pass."""
    logits: int = 0
    """With their log-probabilities and gradient, at the loss."""

    @property
    def total(self) -> int:
        """Of a step of several micro batches; with a single one, gradients are not there yet when activations are most."""
        return self.weights + self.gradients + self.optimizer + self.copies + self.activations + self.logits


def state_memory(trainable: int, frozen: int = 0, *, frozen_bits: float = 32, ranks: int = 1) -> Memory:
    """Weights, gradients and moments of so many numbers: 16 bytes for each that is trained.

    Args:
        trainable: Parameters in float32.
        frozen: Parameters without gradients.
        frozen_bits: Of each of those.
        ranks: Devices that share all of it (FSDP).
    """
    share = -(-trainable // ranks)
    return Memory(weights=4 * share + int(frozen * frozen_bits / 8 / ranks), gradients=4 * share, optimizer=8 * share)


def training_memory(
    config: ModelConfig,
    *,
    micro_batch_size: int,
    seq_len: int,
    num_neighbors: int,
    neighbor_len: int,
    bfloat16: bool = True,
    ranks: int = 1,
    checkpointing: bool = False,
    frozen_decoder: bool = False,
) -> Memory:
    """What training a network takes on each device.

    Activations are those that PyTorch's own operators keep, each an array of its own; kernels of `torch.compile` keep fewer.
    Attention is taken not to keep T x T numbers, but with relative positions it does; a CPU's keeps its mask besides, where a
    sequence holds several documents.

    Args:
        config: The network.
        micro_batch_size: Sequences of one forward pass on one device.
        seq_len: T.
        num_neighbors: K; 0 for none.
        neighbor_len: R.
        bfloat16: Products in bfloat16 (autocast; with several ranks, gathered weights too), else in float32.
        ranks: Devices that share weights, gradients and moments (FSDP).
        checkpointing: Keep the inputs of the layers only and compute each layer again in the backward pass.
        frozen_decoder: Encoder and CCA alone are trained. Activations are counted as if all were.
    """
    counts = parameter_counts(config)
    size = 2 if bfloat16 else 4
    head = config.vocab_size * config.dim
    if ranks == 1:
        copies = 2 * (counts.matrices + head) if bfloat16 else 0
    else:  # tables, output and norms are whole during a pass, and so are two matrices at a time; gradients in float32
        matrix = max(config.dim, config.encoder_dim) * max(config.ffw_dim, config.encoder_ffw_dim)
        copies = 8 * (counts.embeddings + counts.head + counts.vectors) + 2 * (size + 4) * matrix
        copies += 2 * head if bfloat16 else 0
    retrieval = bool(config.cca_layers and num_neighbors)
    neighbors = seq_len // config.chunk_len * num_neighbors if retrieval else 0
    activations = _activation_bytes(config, seq_len, neighbors, neighbor_len, size, checkpointing)
    frozen = counts.decoder + head + counts.head if frozen_decoder else 0
    state = state_memory(counts.total - frozen, frozen, ranks=ranks)
    return Memory(
        weights=state.weights,
        gradients=state.gradients,
        optimizer=state.optimizer,
        copies=copies,
        activations=micro_batch_size * activations,
        logits=12 * micro_batch_size * seq_len * config.vocab_size,
    )


RELATIVE_BYTES = 20
"""What a pair of a query and a key keeps in a head with relative positions; measured."""


def _activation_bytes(config: ModelConfig, T: int, neighbors: int, R: int, size: int, checkpointing: bool) -> int:
    """Of one sequence of T tokens, whose chunks have so many neighbors together."""

    def norm(rows: int, dim: int) -> int:  # its input and the scaled one in float32, its output as it is multiplied
        return rows * dim * (8 + size)

    def attention(queries: int, keys: int, heads: int, width: int, seen: int, relative: bool = True) -> int:
        kept = (
            (3 * queries + 2 * keys) * heads * width * size
        )  # queries, outputs before and after masking; keys, values
        return kept + (relative and config.positions == "relative") * queries * seen * heads * RELATIVE_BYTES

    D, E, M, P = config.dim, config.encoder_dim, config.chunk_len, neighbors * R
    heads, encoder_heads = (config.num_heads, config.head_dim), (config.encoder_heads, config.encoder_head_dim)
    layer = 2 * norm(T, D) + attention(T, T, *heads, T) + 2 * T * config.ffw_dim * size
    ends = norm(T, D) + norm(P, E)
    cca = encoder_layer = cross = 0
    if P:
        cca = norm(T, D) + attention(T, P, *heads, P * M // T, config.cca_positions)
    if P and config.encoder == "bert":
        rows = P + neighbors * M * config.encoder_conditioned
        encoder_layer = 2 * norm(rows, E) + 2 * rows * config.encoder_ffw_dim * size
        encoder_layer += attention(rows, rows, *encoder_heads, R, relative=False)
    elif P:
        encoder_layer = 2 * norm(P, E) + 2 * P * config.encoder_ffw_dim * size
        encoder_layer += attention(P, P, *encoder_heads, R)
        if config.encoder_conditioned:
            cross = norm(P, E) + norm(T, D) + attention(P, T, *encoder_heads, M)
    if checkpointing:
        inputs = 4 * (config.num_layers * T * D + (config.encoder_layers + 1) * P * E)
        return inputs + ends + max(layer + cca, encoder_layer + cross)
    return (
        config.num_layers * layer + len(config.cca_layers) * cca + config.encoder_layers * encoder_layer + cross + ends
    )
