"""The network: a decoder with chunked cross-attention (CCA) over neighbors that a bidirectional encoder reads.

Letters of the dimensions (symbol of the paper, arXiv:2112.04426):

    B batch                          K neighbors of a chunk (k)      H heads
    T slots of a sequence (n)        R tokens of a neighbor (r)      C width of a head
    L chunks of a sequence (l)       S = K * R                       V vocabulary
    M slots of a chunk (m)           N chunks that have neighbors    D, E width of decoder (d), of encoder (d')

A sequence is a grid of L chunks of M slots. A slot holds a token or is empty (`keep_BT`); a chunk belongs to one document
(`document_BL`). Self-attention, CCA and the encoder's view of the decoder stay within a document. Nothing here has a bias, so
an empty slot, zeroed at the embedding, stays exactly zero through every layer.

The network knows nothing of files, text, search or devices.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retro.config import ModelConfig


class Rotation(NamedTuple):
    """Cosine and sine of the rotary angles of some positions, each [T, C/2] (Su et al. 2021, arXiv:2104.09864)."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(cls, positions_T: Tensor, head_dim: int, base: float, dtype: torch.dtype) -> "Rotation":
        """Angles in float64, so that the result is exact in every dtype."""
        exponents_C2 = torch.arange(0, head_dim, 2, device=positions_T.device, dtype=torch.float64) / head_dim
        angles_TC2 = positions_T.to(torch.float64)[:, None] * base**-exponents_C2
        return cls(angles_TC2.cos().to(dtype), angles_TC2.sin().to(dtype))

    def apply(self, x_BHTC: Tensor) -> Tensor:
        first, second = x_BHTC.chunk(2, dim=-1)
        return torch.cat([first * self.cos - second * self.sin, second * self.cos + first * self.sin], dim=-1)


def attend(q_BHTC: Tensor, k_BHSC: Tensor, v_BHSC: Tensor, keep_B1TS: Tensor) -> Tensor:
    """Softmax attention in which a query that may see nothing gets exactly zero.

    Args:
        q_BHTC: Queries.
        k_BHSC: Keys; finite everywhere, also where they are masked.
        v_BHSC: Values; likewise.
        keep_B1TS: Boolean, True where query t may see key s; any axis may be 1.
    """
    empty_B1T1 = ~keep_B1TS.any(dim=-1, keepdim=True)
    y_BHTC = F.scaled_dot_product_attention(q_BHTC, k_BHSC, v_BHSC, attn_mask=keep_B1TS | empty_B1T1)
    return y_BHTC.masked_fill(empty_B1T1, 0.0)


class Attention(nn.Module):
    """The four projections that self-attention, CCA and the encoder's cross-attention share."""

    def __init__(self, query_dim: int, context_dim: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        inner = num_heads * head_dim
        self.q = nn.Linear(query_dim, inner, bias=False)
        self.k = nn.Linear(context_dim, inner, bias=False)
        self.v = nn.Linear(context_dim, inner, bias=False)
        self.out = nn.Linear(inner, query_dim, bias=False)

    def queries(self, x_BTD: Tensor, rotation: Rotation) -> Tensor:
        """[B, T, D] to rotated queries [B, H, T, C]."""
        return rotation.apply(self._heads(self.q(x_BTD)))

    def keys_values(self, context_BSD: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """[B, S, D] to rotated keys and values, each [B, H, S, C]."""
        return rotation.apply(self._heads(self.k(context_BSD))), self._heads(self.v(context_BSD))

    def merge(self, y_BHTC: Tensor) -> Tensor:
        """Heads back together and through the output projection: [B, T, D]."""
        out: Tensor = self.out(y_BHTC.transpose(1, 2).flatten(2))
        return out

    def _heads(self, x_BTI: Tensor) -> Tensor:
        B, T, inner = x_BTI.shape
        return x_BTI.view(B, T, self.num_heads, inner // self.num_heads).transpose(1, 2)


class Embedding(nn.Embedding):
    """A table of tokens whose rows are multiplied by the square root of their width when they are looked up.

    So a row that is small enough to be an output weight still outweighs what the first layers add to it.
    Source: arXiv:1706.03762, section 3.4.
    """

    def forward(self, ids_BT: Tensor) -> Tensor:
        x_BTD: Tensor = super().forward(ids_BT)
        return x_BTD * math.sqrt(self.embedding_dim)


class FeedForward(nn.Module):
    """Two matrices with GELU between."""

    def __init__(self, dim: int, ffw_dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, ffw_dim, bias=False)
        self.down = nn.Linear(ffw_dim, dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        y_BTD: Tensor = self.down(F.gelu(self.up(x_BTD)))
        return y_BTD


class DecoderLayer(nn.Module):
    """Self-attention, CCA where the layer is in P, feed-forward: each residual, each on a normed input."""

    def __init__(self, config: ModelConfig, *, has_cca: bool) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config.dim, config.dim, config.num_heads, config.head_dim)
        self.cca_norm = nn.RMSNorm(config.dim, eps=config.norm_eps) if has_cca else None
        self.cca = Attention(config.dim, config.encoder_dim, config.num_heads, config.head_dim) if has_cca else None
        self.ffw_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.ffw = FeedForward(config.dim, config.ffw_dim)


class EncoderLayer(nn.Module):
    """Bidirectional self-attention, in the first layer cross-attention to the decoder, feed-forward."""

    def __init__(self, config: ModelConfig, *, has_cross: bool) -> None:
        super().__init__()
        dim, heads, width = config.encoder_dim, config.encoder_heads, config.encoder_head_dim
        self.attention_norm = nn.RMSNorm(dim, eps=config.norm_eps)
        self.attention = Attention(dim, dim, heads, width)
        self.cross_norm = nn.RMSNorm(dim, eps=config.norm_eps) if has_cross else None
        self.context_norm = nn.RMSNorm(config.dim, eps=config.norm_eps) if has_cross else None
        self.cross = Attention(dim, config.dim, heads, width) if has_cross else None
        self.ffw_norm = nn.RMSNorm(dim, eps=config.norm_eps)
        self.ffw = FeedForward(dim, config.encoder_ffw_dim)


class NeighborEncoder(nn.Module):
    """Reads every neighbor in the light of the decoder's activations of the chunk it was retrieved for.

    Source: arXiv:2112.04426, section 2.4 and algorithm 1.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(
            EncoderLayer(config, has_cross=index == 0) for index in range(config.encoder_layers)
        )
        self.norm = nn.RMSNorm(config.encoder_dim, eps=config.norm_eps)

    def forward(self, x_NKRE: Tensor, keep_NKR: Tensor, hidden_NMD: Tensor, keep_NM: Tensor) -> Tensor:
        """Encodes the neighbors of N chunks.

        Args:
            x_NKRE: Embedded neighbor tokens; may hold anything where `keep_NKR` is False.
            keep_NKR: True where a neighbor has a token.
            hidden_NMD: H_u, the decoder's activations of the chunk at layer min(P), between self-attention and CCA.
            keep_NM: True where the chunk has a token.

        Returns:
            Encoded neighbors [N, K, R, E], zero where there is no token.
        """
        N, K, R, E = x_NKRE.shape
        M = hidden_NMD.shape[1]
        device, dtype = x_NKRE.device, x_NKRE.dtype
        width, base = self.config.encoder_head_dim, self.config.rope_base
        own = Rotation.at(torch.arange(R, device=device), width, base, dtype)
        queries = Rotation.at(torch.arange(R, device=device).repeat(K), width, base, dtype)
        context = Rotation.at(torch.arange(M, device=device), width, base, dtype)

        keep_PR1 = keep_NKR.reshape(N * K, R, 1)
        keep_P11R = keep_NKR.reshape(N * K, 1, 1, R)
        keep_N11M = keep_NM[:, None, None, :]
        hidden_NMD = hidden_NMD.masked_fill(~keep_NM[..., None], 0.0)
        x_PRE = x_NKRE.reshape(N * K, R, E).masked_fill(~keep_PR1, 0.0)
        for layer in self.layers:
            assert isinstance(layer, EncoderLayer)
            normed_PRE = layer.attention_norm(x_PRE)
            k_PHRC, v_PHRC = layer.attention.keys_values(normed_PRE, own)
            y_PHRC = attend(layer.attention.queries(normed_PRE, own), k_PHRC, v_PHRC, keep_P11R)
            x_PRE = x_PRE + layer.attention.merge(y_PHRC)
            if layer.cross is not None:
                assert layer.cross_norm is not None
                assert layer.context_norm is not None
                q_NHSC = layer.cross.queries(layer.cross_norm(x_PRE).view(N, K * R, E), queries)
                k_NHMC, v_NHMC = layer.cross.keys_values(layer.context_norm(hidden_NMD), context)
                x_PRE = x_PRE + layer.cross.merge(attend(q_NHSC, k_NHMC, v_NHMC, keep_N11M)).view(N * K, R, E)
            x_PRE = x_PRE + layer.ffw(layer.ffw_norm(x_PRE))
        encoded_PRE: Tensor = self.norm(x_PRE).masked_fill(~keep_PR1, 0.0)
        return encoded_PRE.view(N, K, R, E)


@dataclass(slots=True)
class Cache:
    """What decoding one more slot needs: keys and values of self-attention, and those of the newest chunk's neighbors.

    Start with `Cache()`; `Retro.hidden` fills it. The size of `cca` does not grow with the sequence.
    """

    length: int = 0
    """Slots seen so far."""
    keys_values: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Per decoder layer, [B, H, capacity, C] each; the first `length` slots are valid."""
    keep_BT: Tensor | None = None
    """Which slots hold a token [B, capacity]."""
    hidden_BMD: Tensor | None = None
    """Activations at layer min(P) of the chunk that is not finished yet."""
    cca: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Per layer of P, keys and values of the newest finished chunk's neighbors [B, H, S, C]; empty where it has none."""
    cca_keep_BS: Tensor | None = None

    def append(self, layer: int, k_BHTC: Tensor, v_BHTC: Tensor) -> tuple[Tensor, Tensor]:
        """Adds the new slots of one layer; returns the keys and values of all slots so far."""
        end = self.length + k_BHTC.shape[2]
        if layer == len(self.keys_values):
            self.keys_values.append((_grown(k_BHTC[:, :, :0], end), _grown(v_BHTC[:, :, :0], end)))
        if end > self.keys_values[layer][0].shape[2]:
            old_k, old_v = self.keys_values[layer]
            self.keys_values[layer] = (_grown(old_k[:, :, : self.length], end), _grown(old_v[:, :, : self.length], end))
        all_k, all_v = self.keys_values[layer]
        all_k[:, :, self.length : end] = k_BHTC
        all_v[:, :, self.length : end] = v_BHTC
        return all_k[:, :, :end], all_v[:, :, :end]

    def append_keep(self, keep_BT: Tensor) -> Tensor:
        """Adds the new slots' `keep`; returns it for all slots so far."""
        end = self.length + keep_BT.shape[1]
        if self.keep_BT is None:
            self.keep_BT = keep_BT.clone()
        else:
            self.keep_BT = torch.cat([self.keep_BT[:, : self.length], keep_BT], dim=1)
        return self.keep_BT[:, :end]


def _grown(x_BHTC: Tensor, length: int) -> Tensor:
    """A copy with room for at least `length` slots, and for half as many again."""
    B, H, T, C = x_BHTC.shape
    grown = x_BHTC.new_zeros(B, H, length + length // 2 + 16, C)
    grown[:, :, :T] = x_BHTC
    return grown


class Neighborhood(NamedTuple):
    """The neighbors of those N chunks of a batch that have any."""

    chunk_N: Tensor
    """Which of the B * L chunks."""
    tokens_NKR: Tensor
    keep_NKR: Tensor

    @classmethod
    def of(cls, neighbors_BLKR: Tensor, keep_BLKR: Tensor) -> "Neighborhood":
        """Leaves out the chunks without neighbors: the encoder need not read emptiness."""
        keep_NKR = keep_BLKR.flatten(0, 1)
        if torch.compiler.is_compiling():
            chunk_N = torch.arange(keep_NKR.shape[0], device=keep_NKR.device)
        else:
            chunk_N = keep_NKR.flatten(1).any(dim=1).nonzero().squeeze(1)
        tokens_NKR = neighbors_BLKR.flatten(0, 1)[chunk_N]
        keep_NKR = keep_NKR[chunk_N]
        return cls(chunk_N, tokens_NKR.masked_fill(~keep_NKR, 0), keep_NKR)


class Retro(nn.Module):
    """Decoder Transformer with chunked cross-attention.

    Source: arXiv:2112.04426, section 2. On purpose different: rotary positions everywhere (in CCA query i stands at i + M - 1 and a
    neighbor's token at its own place, which is the paper's relative distance), and in our own presets one embedding table.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(
            DecoderLayer(config, has_cca=number in config.cca_layers) for number in range(1, config.num_layers + 1)
        )
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.encoder = NeighborEncoder(config) if config.cca_layers else None
        untied = not config.tie_embeddings
        self.encoder_embedding = (
            Embedding(config.vocab_size, config.encoder_dim) if untied and config.cca_layers else None
        )
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False) if untied else None

    def initialize(self, generator: torch.Generator) -> "Retro":
        """Draws all weights: normal with deviation 1 / sqrt(width of the input), a table's rows having their own width.

        Outputs of residual branches are divided by sqrt(2 * layers) besides; queries and keys have at most 0.02, so that attention
        begins nearly uniform. What a fixed 0.02 for everything costs at the widths used here: docs/decisions.md.
        """
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                nn.init.ones_(parameter)
                continue
            deviation = parameter.shape[1] ** -0.5
            if name.endswith((".q.weight", ".k.weight")):
                deviation = min(deviation, 0.02)
            if name.endswith((".out.weight", ".down.weight")):
                layers = self.config.encoder_layers if name.startswith("encoder.") else self.config.num_layers
                deviation /= (2 * layers) ** 0.5
            nn.init.normal_(parameter, std=deviation, generator=generator)
        return self

    def forward(
        self,
        inputs_BT: Tensor,
        *,
        keep_BT: Tensor | None = None,
        document_BL: Tensor | None = None,
        neighbors_BLKR: Tensor | None = None,
        keep_BLKR: Tensor | None = None,
        cache: Cache | None = None,
        targets_BT: Tensor | None = None,
        loss_BT: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next token at every slot [B, T, V]; with targets, the sum of their losses in nats.

        Args:
            inputs_BT: This and the others as for `hidden`.
            keep_BT: See there.
            document_BL: See there.
            neighbors_BLKR: See there.
            keep_BLKR: See there.
            cache: See there.
            targets_BT: What each slot is to predict.
            loss_BT: True where the target counts.
        """
        hidden_BTD = self.hidden(
            inputs_BT,
            keep_BT=keep_BT,
            document_BL=document_BL,
            neighbors_BLKR=neighbors_BLKR,
            keep_BLKR=keep_BLKR,
            cache=cache,
        )
        if targets_BT is None or loss_BT is None:
            return self.logits(hidden_BTD)
        return self.loss(hidden_BTD, targets_BT, loss_BT)[0]

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Logits [..., V] of final activations [..., D]."""
        return F.linear(hidden_BTD, self.embedding.weight if self.head is None else self.head.weight)

    def loss(self, hidden_BTD: Tensor, targets_BT: Tensor, loss_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the losses in nats (float32 or wider) over the slots where `loss_BT` is True, and their number."""
        logits_NV = self.logits(hidden_BTD[loss_BT])
        wide = torch.promote_types(logits_NV.dtype, torch.float32)
        return F.cross_entropy(logits_NV.to(wide), targets_BT[loss_BT], reduction="sum"), loss_BT.sum()

    def hidden(
        self,
        inputs_BT: Tensor,
        *,
        keep_BT: Tensor | None = None,
        document_BL: Tensor | None = None,
        neighbors_BLKR: Tensor | None = None,
        keep_BLKR: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Final normed activations [B, T, D].

        Args:
            inputs_BT: Token ids; any value where `keep_BT` is False. Without a cache T is a multiple of M.
            keep_BT: True where a slot holds a token. Default: everywhere.
            document_BL: Which document each chunk belongs to; equal numbers mean the same document. Default: one a row.
            neighbors_BLKR: Token ids of each chunk's neighbors; any value where `keep_BLKR` is False. None turns retrieval off: no
                encoder, no CCA. With a cache and T = 1, L is 1 and they are the neighbors of the chunk that this slot ends.
            keep_BLKR: True where a neighbor has a token; all False means no neighbor.
            cache: Filled and extended. The first call takes whole chunks (the prompt), each later one a single slot; one document
                per row.
        """
        B, T = inputs_BT.shape
        M = self.config.chunk_len
        device = inputs_BT.device
        if keep_BT is None:
            keep_BT = torch.ones(B, T, dtype=torch.bool, device=device)
        start = cache.length if cache is not None else 0
        x_BTD = self.embedding(inputs_BT.masked_fill(~keep_BT, 0)).masked_fill(~keep_BT[..., None], 0.0)

        keep_all_BT = keep_BT if cache is None else cache.append_keep(keep_BT)
        self_keep_B1TT = keep_all_BT[:, None, None, :] & keep_BT[:, None, :, None]
        if T > 1:
            self_keep_B1TT = self_keep_B1TT & torch.ones(T, T, dtype=torch.bool, device=device).tril()
        if document_BL is not None:
            document_BT = document_BL.repeat_interleave(M, dim=1)
            self_keep_B1TT = self_keep_B1TT & (document_BT[:, None, :, None] == document_BT[:, None, None, :])
        rotation = Rotation.at(
            torch.arange(start, start + T, device=device), self.config.head_dim, self.config.rope_base, x_BTD.dtype
        )

        cca: _Cca | None = None
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            normed_BTD = layer.attention_norm(x_BTD)
            k_BHTC, v_BHTC = layer.attention.keys_values(normed_BTD, rotation)
            if cache is not None:
                k_BHTC, v_BHTC = cache.append(index, k_BHTC, v_BHTC)
            y_BHTC = attend(layer.attention.queries(normed_BTD, rotation), k_BHTC, v_BHTC, self_keep_B1TT)
            x_BTD = x_BTD + layer.attention.merge(y_BHTC)
            if layer.cca is not None:
                assert layer.cca_norm is not None
                if cca is None:
                    cca = self._begin_cca(x_BTD, keep_BT, document_BL, neighbors_BLKR, keep_BLKR, cache)
                x_BTD = cca.add(x_BTD, layer.cca_norm(x_BTD), layer.cca)
            x_BTD = x_BTD + layer.ffw(layer.ffw_norm(x_BTD))
        if cache is not None:
            cache.length += T
        normed: Tensor = self.norm(x_BTD)
        return normed

    def _begin_cca(
        self,
        x_BTD: Tensor,
        keep_BT: Tensor,
        document_BL: Tensor | None,
        neighbors_BLKR: Tensor | None,
        keep_BLKR: Tensor | None,
        cache: Cache | None,
    ) -> "_Cca":
        """At layer min(P), between self-attention and CCA: encodes the neighbors, whole chunks or one slot at a time."""
        if cache is None or cache.length == 0:
            return _WholeChunks.begin(self, x_BTD, keep_BT, document_BL, neighbors_BLKR, keep_BLKR, cache)
        return _OneSlot.begin(self, x_BTD, keep_BT, neighbors_BLKR, keep_BLKR, cache)

    def encode(self, near: Neighborhood, hidden_NMD: Tensor, keep_NM: Tensor) -> Tensor:
        """Encoded neighbors [N, K, R, E] of the chunks whose activations are given."""
        assert self.encoder is not None
        table = self.embedding if self.encoder_embedding is None else self.encoder_embedding
        encoded: Tensor = self.encoder(table(near.tokens_NKR), near.keep_NKR, hidden_NMD, keep_NM)
        return encoded

    def neighbor_rotation(self, K: int, R: int, like: Tensor) -> Rotation:
        """Each neighbor's tokens at their own places, alike for all K neighbors, so that their order is nothing."""
        positions_S = torch.arange(R, device=like.device).repeat(K)
        return Rotation.at(positions_S, self.config.head_dim, self.config.rope_base, like.dtype)


@dataclass(slots=True)
class _WholeChunks:
    """CCA of a sequence of whole chunks.

    Chunk u ends at slot (u+1)M - 1; that slot and the next M - 1 are the queries of its neighbors. Shifted by M - 1 they
    are a grid of their own: row u, place i is slot (u+1)M - 1 + i.
    """

    model: Retro
    near: Neighborhood
    encoded_NKRE: Tensor | None
    sees_BLM: Tensor
    """True where the query at that place of the shifted grid may see the neighbors of row u."""
    query_rotation: Rotation
    neighbor_rotation: Rotation | None
    cache: Cache | None

    @classmethod
    def begin(
        cls,
        model: Retro,
        x_BTD: Tensor,
        keep_BT: Tensor,
        document_BL: Tensor | None,
        neighbors_BLKR: Tensor | None,
        keep_BLKR: Tensor | None,
        cache: Cache | None,
    ) -> "_WholeChunks":
        B, T, D = x_BTD.shape
        M = model.config.chunk_len
        L = T // M
        if neighbors_BLKR is None or keep_BLKR is None:
            neighbors_BLKR = torch.zeros(B, L, 1, 1, dtype=torch.long, device=x_BTD.device)
            keep_BLKR = torch.zeros_like(neighbors_BLKR, dtype=torch.bool)
        _, _, K, R = neighbors_BLKR.shape
        near = Neighborhood.of(neighbors_BLKR, keep_BLKR)
        # The shifted grid of what queries may see: they hold a token and, but for a chunk's own last one, lie in the next chunk,
        # which must be of the same document.
        sees_BLM = F.pad(keep_BT, (1 - M, M - 1)).view(B, L, M)
        if document_BL is not None:
            same_BL = F.pad(document_BL[:, 1:] == document_BL[:, :-1], (0, 1))
            own_M = torch.arange(M, device=x_BTD.device) == 0
            sees_BLM = sees_BLM & (same_BL[..., None] | own_M)
        encoded_NKRE = None
        neighbor_rotation = None
        if near.chunk_N.numel() > 0:
            hidden_NMD = x_BTD.view(B * L, M, D)[near.chunk_N]
            encoded_NKRE = model.encode(near, hidden_NMD, keep_BT.reshape(B * L, M)[near.chunk_N])
            neighbor_rotation = model.neighbor_rotation(K, R, encoded_NKRE)
        query_rotation = Rotation.at(
            torch.arange(M - 1, 2 * M - 1, device=x_BTD.device),
            model.config.head_dim,
            model.config.rope_base,
            x_BTD.dtype,
        )
        if cache is not None:
            cache.hidden_BMD = x_BTD.new_zeros(B, M, D)
            cache.cca_keep_BS = keep_BLKR[:, -1].reshape(B, K * R) if encoded_NKRE is not None else None
        return cls(model, near, encoded_NKRE, sees_BLM, query_rotation, neighbor_rotation, cache)

    def add(self, x_BTD: Tensor, normed_BTD: Tensor, cca: Attention) -> Tensor:
        """x + CCA(normed)."""
        B, T, D = x_BTD.shape
        _, L, M = self.sees_BLM.shape
        if self.encoded_NKRE is None or self.neighbor_rotation is None:
            return x_BTD
        N, K, R, _ = self.encoded_NKRE.shape
        chunk_N = self.near.chunk_N
        shifted_NMD = F.pad(normed_BTD, (0, 0, 1 - M, M - 1)).view(B * L, M, D)[chunk_N]
        q_NHMC = cca.queries(shifted_NMD, self.query_rotation)
        k_NHSC, v_NHSC = cca.keys_values(self.encoded_NKRE.flatten(1, 2), self.neighbor_rotation)
        keep_N1MS = self.sees_BLM.view(B * L, 1, M, 1)[chunk_N] & self.near.keep_NKR.reshape(N, 1, 1, K * R)
        y_NMD = cca.merge(attend(q_NHMC, k_NHSC, v_NHSC, keep_N1MS))
        grid_BTD = x_BTD.new_zeros(B * L, M, D).index_copy(0, chunk_N, y_NMD.to(x_BTD.dtype)).view(B, T, D)
        if self.cache is not None:
            self._keep_newest(k_NHSC, v_NHSC, B, L)
        return x_BTD + F.pad(grid_BTD, (0, 0, M - 1, 1 - M))

    def _keep_newest(self, k_NHSC: Tensor, v_NHSC: Tensor, B: int, L: int) -> None:
        assert self.cache is not None
        last_N = self.near.chunk_N % L == L - 1
        row_N = self.near.chunk_N[last_N] // L
        shape = (B, *k_NHSC.shape[1:])
        self.cache.cca.append(
            (
                k_NHSC.new_zeros(shape).index_copy(0, row_N, k_NHSC[last_N]),
                v_NHSC.new_zeros(shape).index_copy(0, row_N, v_NHSC[last_N]),
            )
        )


@dataclass(slots=True)
class _OneSlot:
    """CCA of the next slot, with the newest finished chunk's keys and values out of the cache."""

    cache: Cache
    keep_B1: Tensor
    query_rotation: Rotation
    fresh: tuple[Tensor, Rotation] | None
    """Encoded neighbors [B, S, E] and their rotation, where this slot ends a chunk."""
    layer: int = 0

    @classmethod
    def begin(
        cls,
        model: Retro,
        x_B1D: Tensor,
        keep_B1: Tensor,
        neighbors_B1KR: Tensor | None,
        keep_B1KR: Tensor | None,
        cache: Cache,
    ) -> "_OneSlot":
        B, _, D = x_B1D.shape
        M = model.config.chunk_len
        place = cache.length % M
        assert cache.hidden_BMD is not None
        assert cache.keep_BT is not None
        cache.hidden_BMD[:, place : place + 1] = x_B1D
        fresh = None
        if place == M - 1:
            cache.cca, cache.cca_keep_BS = [], None
            if neighbors_B1KR is not None and keep_B1KR is not None and bool(keep_B1KR.any()):
                _, _, K, R = neighbors_B1KR.shape
                near = Neighborhood.of(neighbors_B1KR, keep_B1KR)
                keep_BM = cache.keep_BT[:, cache.length - M + 1 : cache.length + 1]
                encoded_NKRE = model.encode(near, cache.hidden_BMD[near.chunk_N], keep_BM[near.chunk_N])
                encoded_BSE = encoded_NKRE.new_zeros(B, K * R, encoded_NKRE.shape[-1])
                encoded_BSE[near.chunk_N] = encoded_NKRE.flatten(1, 2)
                fresh = (encoded_BSE, model.neighbor_rotation(K, R, encoded_BSE))
                cache.cca_keep_BS = keep_B1KR.reshape(B, K * R)
            cache.hidden_BMD = torch.zeros_like(cache.hidden_BMD)
        position = (cache.length + 1) % M + M - 1
        query_rotation = Rotation.at(
            torch.tensor([position], device=x_B1D.device), model.config.head_dim, model.config.rope_base, x_B1D.dtype
        )
        return cls(cache, keep_B1, query_rotation, fresh)

    def add(self, x_B1D: Tensor, normed_B1D: Tensor, cca: Attention) -> Tensor:
        """x + CCA(normed)."""
        if self.fresh is not None:
            self.cache.cca.append(cca.keys_values(*self.fresh))
        if self.cache.cca_keep_BS is None:
            return x_B1D
        k_BHSC, v_BHSC = self.cache.cca[self.layer]
        self.layer += 1
        keep_B11S = (self.cache.cca_keep_BS & self.keep_B1)[:, None, None, :]
        y_BH1C = attend(cca.queries(normed_B1D, self.query_rotation), k_BHSC, v_BHSC, keep_B11S)
        return x_B1D + cca.merge(y_BH1C)


_Cca = _WholeChunks | _OneSlot
