"""The network: a decoder with chunked cross-attention (CCA) over neighbors that a bidirectional encoder reads.

Letters of the dimensions (symbol of the paper, arXiv:2112.04426):

    B batch                          K neighbors of a chunk (k)      H heads
    T slots of a sequence (n)        R tokens of a neighbor (r)      C width of a head
    L chunks of a sequence (l)       S = K * R, or slots so far      V vocabulary
    M slots of a chunk (m)           N chunks that have neighbors    D, E width of decoder (d), of encoder (d')

A sequence is a grid of L chunks of M slots. A slot holds a token or is empty (`keep_BT`); a chunk belongs to one document
(`document_BL`). Self-attention, CCA and the encoder's view of the decoder stay within a document. Nothing here has a bias, so
an empty slot, zeroed at the embedding, stays exactly zero through every layer.

attention.py has attention itself, cca.py which slot sees which neighbors. The network knows nothing of files, text, search or
devices.
"""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from retro.attention import Attention, CausalMask, Places, attend
from retro.bert import BertEncoder
from retro.cca import Cache, Continuation, Neighborhood, Pointing, View, WholeChunks
from retro.config import ModelConfig

LOGITS_PER_PART = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Losses are computed in parts of so many logits: on a CPU they stay in its cache, a GPU is better off with large ones."""
ENCODED_PER_PART = 1 << 17
"""On a CPU, without gradients, neighbors are encoded in parts of so many activations, which stay in its cache."""

# --- layers -------------------------------------------------------------------------------------------------------


class Embedding(nn.Embedding):
    """A table of tokens whose rows are multiplied by the square root of their width when they are looked up.

    So a row that is small enough to be an output weight still outweighs what the first layers add to it.
    Source: arXiv:1706.03762, section 3.4.
    """

    def forward(self, ids_BT: Tensor) -> Tensor:
        x_BTD: Tensor = super().forward(ids_BT)
        return x_BTD * math.sqrt(self.embedding_dim)

    def reset_parameters(self) -> None:
        """On the meta device nothing: drawing there imports the compiler, which takes a second."""
        if not self.weight.is_meta:
            super().reset_parameters()


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

    def __init__(self, config: ModelConfig, number: int) -> None:
        """Makes layer `number`, counted from 1."""
        super().__init__()
        has_cca = number in config.cca_layers
        self.index = number - 1
        self.reads = has_cca and number == min(config.cca_layers)
        """Whether the neighbors are encoded here."""
        sizes = config.num_heads, config.head_dim
        positions: dict[str, Any] = {"positions": config.positions, "base": config.rope_base}
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config.dim, config.dim, *sizes, **positions)
        if not config.cca_positions:
            positions["positions"] = None
        self.cca_norm = nn.RMSNorm(config.dim, eps=config.norm_eps) if has_cca else None
        self.cca = Attention(config.dim, config.encoder_dim, *sizes, **positions) if has_cca else None
        self.ffw_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.ffw = FeedForward(config.dim, config.ffw_dim)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x_BTD: Tensor, view: View) -> Tensor:
        x_BTD = x_BTD + self.dropout(view.self_attend(self.index, self.attention, self.attention_norm(x_BTD)))
        if self.cca is not None and self.cca_norm is not None:
            if self.reads:
                view.read(x_BTD)
            normed_BTD = self.cca_norm(x_BTD)
            view.point(self.cca, normed_BTD)
            y_BTD = view.cross_attend(self.cca, normed_BTD)
            x_BTD = x_BTD if y_BTD is None else x_BTD + self.dropout(y_BTD)
        ffw_BTD: Tensor = self.dropout(self.ffw(self.ffw_norm(x_BTD)))
        return x_BTD + ffw_BTD


class EncoderLayer(nn.Module):
    """Bidirectional self-attention, in the first layer cross-attention to the decoder, feed-forward."""

    def __init__(self, config: ModelConfig, *, has_cross: bool) -> None:
        super().__init__()
        dim, sizes = config.encoder_dim, (config.encoder_heads, config.encoder_head_dim)
        positions: dict[str, Any] = {"positions": config.positions, "base": config.rope_base}
        self.attention_norm = nn.RMSNorm(dim, eps=config.norm_eps)
        self.attention = Attention(dim, dim, *sizes, **positions)
        self.cross_norm = nn.RMSNorm(dim, eps=config.norm_eps) if has_cross else None
        self.context_norm = nn.RMSNorm(config.dim, eps=config.norm_eps) if has_cross else None
        self.cross = Attention(dim, config.dim, *sizes, **positions) if has_cross else None
        self.ffw_norm = nn.RMSNorm(dim, eps=config.norm_eps)
        self.ffw = FeedForward(dim, config.encoder_ffw_dim)

    def forward(
        self,
        x_PRE: Tensor,
        own: Places,
        keep_PR: Tensor,
        hidden_NMD: Tensor,
        keep_NM: Tensor,
        kept_I: Tensor | None = None,
    ) -> Tensor:
        """One layer; P = N * K neighbors, those of a chunk one after the other, whose tokens stand at `own` places.

        `kept_I` are the places of P * R that hold a token, where the others, which nobody reads, are not to be computed.
        """
        P, R, E = x_PRE.shape
        N, M, _ = hidden_NMD.shape
        normed_PRE = self.attention_norm(x_PRE)
        q_PHRC = self.attention.queries(normed_PRE, own)
        k_PHRC, v_PHRC = self.attention.keys_values(normed_PRE, own)
        bias = self.attention.bias(q_PHRC, own, own)
        x_PRE = x_PRE + self.attention.merge(attend(q_PHRC, k_PHRC, v_PHRC, keep_PR[:, None, None, :], bias))
        if self.cross is not None and self.cross_norm is not None and self.context_norm is not None:
            K = P // max(N, 1)
            at = Places.range(0, R, self.cross, x_PRE, repeat=K)
            context = Places.range(0, M, self.cross, x_PRE)
            q_NHSC = self.cross.queries(self.cross_norm(x_PRE).view(N, K * R, E), at)
            k_NHMC, v_NHMC = self.cross.keys_values(self.context_norm(hidden_NMD), context)
            bias = self.cross.bias(q_NHSC, at, context)
            y_NHSC = attend(q_NHSC, k_NHMC, v_NHMC, keep_NM[:, None, None, :], bias)
            x_PRE = x_PRE + self.cross.merge(y_NHSC).view(P, R, E)
        if kept_I is None:
            y_PRE: Tensor = self.ffw(self.ffw_norm(x_PRE))
            return x_PRE + y_PRE
        x_UE = x_PRE.flatten(0, 1)
        x_IE = x_UE[kept_I]
        return x_UE.index_copy(0, kept_I, x_IE + self.ffw(self.ffw_norm(x_IE))).view(P, R, E)


class NeighborEncoder(nn.Module):
    """Reads every neighbor in the light of the decoder's activations of the chunk it was retrieved for.

    Source: arXiv:2112.04426, section 2.4 and algorithm 1.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        self.layers = nn.ModuleList(
            EncoderLayer(config, has_cross=config.encoder_conditioned and index == 0)
            for index in range(config.encoder_layers)
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
        keep_PR = keep_NKR.reshape(N * K, R)
        hidden_NMD = hidden_NMD.masked_fill(~keep_NM[..., None], 0.0)
        x_PRE = x_NKRE.reshape(N * K, R, E).masked_fill(~keep_PR[..., None], 0.0)
        first = self.layers[0]
        assert isinstance(first, EncoderLayer)
        own = Places.range(0, R, first.attention, x_PRE)
        kept_I = None
        if x_PRE.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            kept_I = keep_PR.flatten().nonzero()[:, 0]
        for layer in self.layers:
            x_PRE = _run(layer, self.checkpointing, x_PRE, own, keep_PR, hidden_NMD, keep_NM, kept_I)
        encoded_PRE: Tensor = self.norm(x_PRE).masked_fill(~keep_PR[..., None], 0.0)
        return encoded_PRE.view(N, K, R, E)


def _run(layer: nn.Module, checkpointing: bool, *arguments: Any) -> Tensor:
    """Calls a layer; with checkpointing only its input is kept, and it runs again in the backward pass."""
    if checkpointing and torch.is_grad_enabled():
        kept: Tensor = checkpoint(layer, *arguments, use_reentrant=False)
        return kept
    y: Tensor = layer(*arguments)
    return y


# --- the network --------------------------------------------------------------------------------------------------


class Retro(nn.Module):
    """Decoder Transformer with chunked cross-attention.

    Source: arXiv:2112.04426, section 2. On purpose different, unless the configuration says otherwise: rotary positions
    everywhere (in CCA with the paper's relative distance), and in our own presets one embedding table. All deviations are listed in
    docs/paper_map.md.

    Attributes:
        every_chunk: See Reader.
        checkpointing: In training keep only each layer's input, and run the layer again in the backward pass.
        pointing: Weight of the second loss, see `forward`.
        context_passages: How many passages it wants in front of a question, see `retro.answer.answer_prompt`.
    """

    context_passages = 0

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.chunk_len = config.chunk_len
        self.every_chunk = False
        self.checkpointing = False
        self.pointing = 0.0
        self.embedding = Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(DecoderLayer(config, number) for number in range(1, config.num_layers + 1))
        self.dropout = nn.Dropout(0.0)
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.encoder: NeighborEncoder | BertEncoder | None = None
        if config.cca_layers:
            self.encoder = BertEncoder(config) if config.encoder == "bert" else NeighborEncoder(config)
        self._head: tuple[int, Tensor] | None = None
        """The output weights once more, and the version of the table that they are a copy of: see `lay_out_for_decoding`."""
        untied = not config.tie_embeddings
        self.encoder_embedding = (
            Embedding(config.vocab_size, config.encoder_dim) if untied and config.cca_layers else None
        )
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False) if untied else None

    def initialize(self, generator: torch.Generator) -> "Retro":
        """Draws all weights: normal with deviation 1 / sqrt(width of the input), a table's rows having their own width.

        Outputs of residual branches are divided by sqrt(2 * layers) besides; queries, keys and distances have at most 0.02, so that
        attention begins nearly uniform. What a fixed 0.02 for everything costs at the widths used here: docs/decisions.md.

        Where tokens have one table and CCA's value and output matrices are square, these two begin as each other's inverse, so that
        CCA hands on what it attends to, as it is: copying need not be found out (docs/decisions.md). What a BERT reads of the
        decoder begins as embeddings, which it knows: residual branches before it begin as zero.
        """
        for name, parameter in self.named_parameters():
            if name.startswith("encoder.") and isinstance(self.encoder, BertEncoder):
                continue
            initialize_parameter(
                name,
                parameter,
                self.config.encoder_layers if name.startswith("encoder.") else self.config.num_layers,
                generator,
            )
        for layer in self.layers:
            cca: Any = layer.cca
            if (
                cca is not None
                and self.config.tie_embeddings
                and cca.v.weight.shape == (self.config.dim, self.config.dim)
            ):
                nn.init.orthogonal_(cca.v.weight, generator=generator)
                with torch.no_grad():
                    cca.out.weight.copy_(cca.v.weight.t())
        if isinstance(self.encoder, BertEncoder):
            self.encoder.initialize(generator)
            first = min(self.config.cca_layers)
            for layer in self.layers[:first]:
                branch: Any = layer
                nn.init.zeros_(branch.attention.out.weight)
                if branch.index + 1 < first:
                    nn.init.zeros_(branch.ffw.down.weight)
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
        slot_BT: Tensor | None = None,
        targets_BT: Tensor | None = None,
        loss_BT: Tensor | None = None,
        evidence_BLKR: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next token at every slot [B, T, V]; with targets, the sum of their losses in nats.

        Args:
            inputs_BT: This and the others as for `hidden`.
            keep_BT: See there.
            document_BL: See there.
            neighbors_BLKR: See there.
            keep_BLKR: See there.
            cache: See there.
            slot_BT: See there.
            targets_BT: What each slot is to predict.
            loss_BT: True where the target counts.
            evidence_BLKR: True where a neighbor's token belongs to what is to be said; `pointing` times the loss of
                `retro.cca.Pointing` is added.
        """
        pointing = None
        if targets_BT is not None and loss_BT is not None and evidence_BLKR is not None and self.pointing:
            pointing = Pointing(targets_BT, loss_BT, evidence_BLKR)
        hidden_BTD = self._hidden(inputs_BT, keep_BT, document_BL, neighbors_BLKR, keep_BLKR, cache, slot_BT, pointing)
        if targets_BT is None or loss_BT is None:
            return self.logits(hidden_BTD)
        loss = self.loss(hidden_BTD, targets_BT, loss_BT)[0]
        return loss if pointing is None else loss + self.pointing * pointing.loss()

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Logits [..., V] of final activations [..., D]."""
        table_VD = self.embedding.weight if self.head is None else self.head.weight
        if self._head is not None and hidden_BTD.numel() == table_VD.shape[1] and self._head[0] == table_VD._version:
            table_VD = self._head[1]
        return F.linear(hidden_BTD, table_VD)

    def lay_out_for_decoding(self) -> "Retro":
        """Stores every matrix with its longer side in one piece, whose product with one row is up to twice as fast: on a CPU,
        decoding is bound by that.

        Values, names and shapes stay as they are; batches are as fast as before. The output table, which is looked up by rows too,
        gets a copy, as large again. Not for a network that is to be trained on: optimizers want weights and moments alike.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.out_features >= module.in_features:
                module.weight.data = module.weight.data.t().contiguous().t()
        table_VD = self.embedding.weight if self.head is None else self.head.weight
        self._head = table_VD._version, table_VD.detach().t().contiguous().t()
        return self

    def loss(self, hidden_BTD: Tensor, targets_BT: Tensor, loss_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the losses in nats (float32 or wider) over the slots where `loss_BT` is True, and their number."""
        if torch.compiler.is_compiling():
            targets_N = targets_BT.masked_fill(~loss_BT, -100).flatten()
            return _cross_entropy(self.logits(hidden_BTD.flatten(0, 1)), targets_N), loss_BT.sum()
        hidden_ND, targets_N = hidden_BTD[loss_BT], targets_BT[loss_BT]
        rows = max(1, LOGITS_PER_PART["cuda" if hidden_ND.is_cuda else "cpu"] // self.config.vocab_size)
        logits, table_VD = self.logits, self.embedding.weight if self.head is None else self.head.weight
        device = hidden_ND.device.type
        if torch.is_autocast_enabled(device) and not table_VD.requires_grad:
            # Autocast remembers casts of what is trained only: a frozen table would be cast, and kept, once for every part.
            logits = partial(F.linear, weight=table_VD.to(torch.get_autocast_dtype(device)))
        parts = [
            _cross_entropy(logits(part_ND), part_N)
            for part_ND, part_N in zip(torch.split(hidden_ND, rows), torch.split(targets_N, rows), strict=True)
        ]
        return torch.stack(parts).sum(), loss_BT.sum()

    def hidden(
        self,
        inputs_BT: Tensor,
        *,
        keep_BT: Tensor | None = None,
        document_BL: Tensor | None = None,
        neighbors_BLKR: Tensor | None = None,
        keep_BLKR: Tensor | None = None,
        cache: Cache | None = None,
        slot_BT: Tensor | None = None,
    ) -> Tensor:
        """Final normed activations [B, T, D].

        Without cache and slots, the T columns are slots 0 to T - 1 of whole chunks. Otherwise every row has one document, and may
        stand anywhere.

        Args:
            inputs_BT: Token ids; any value where `keep_BT` is False.
            keep_BT: True where a column holds a token. Default: everywhere.
            document_BL: Which document each chunk belongs to; equal numbers mean the same document. Default: one a row.
            neighbors_BLKR: Token ids of each chunk's neighbors; any value where `keep_BLKR` is False. None turns retrieval off: no
                encoder, no CCA. With a cache, L counts from the chunk of each row's first slot in this call on (for one column L is
                1), and they are used where this call finishes the chunk.
            keep_BLKR: True where a neighbor has a token; all False means no neighbor.
            cache: Filled and extended. Rows whose `keep_BT` is False stay where they are.
            slot_BT: Slot of each column, rising in a row; any value where `keep_BT` is False. Default: with a new cache 0 to T - 1,
                so that empty columns are empty slots; with a filled one each row's next slots.
        """
        return self._hidden(inputs_BT, keep_BT, document_BL, neighbors_BLKR, keep_BLKR, cache, slot_BT)

    def _hidden(
        self,
        inputs_BT: Tensor,
        keep_BT: Tensor | None,
        document_BL: Tensor | None,
        neighbors_BLKR: Tensor | None,
        keep_BLKR: Tensor | None,
        cache: Cache | None,
        slot_BT: Tensor | None,
        pointing: Pointing | None = None,
    ) -> Tensor:
        """See `hidden`; without a cache, `pointing` takes down where CCA looks."""
        B, T = inputs_BT.shape
        device = inputs_BT.device
        if keep_BT is None:
            keep_BT = torch.ones(B, T, dtype=torch.bool, device=device)
        x_BTD = self.embedding(inputs_BT.masked_fill(~keep_BT, 0)).masked_fill(~keep_BT[..., None], 0.0)
        x_BTD = self.dropout(x_BTD)
        view: View
        if cache is None and slot_BT is None:
            segment_BT = torch.zeros_like(inputs_BT)
            if document_BL is not None:
                segment_BT = document_BL.repeat_interleave(self.chunk_len, dim=1)
            segment_BT = segment_BT.masked_fill(~keep_BT, -1)
            mask = CausalMask.of(segment_BT, dense=self.config.positions == "relative")
            view = WholeChunks(self, keep_BT, document_BL, neighbors_BLKR, keep_BLKR, mask)
        else:
            cache = cache if cache is not None else Cache()
            view = Continuation.into(self, cache, keep_BT, slot_BT, neighbors_BLKR, keep_BLKR)
            if not self.config.cca_layers:  # nothing else notes that the rows have gone on
                view.chunk.slot_B = view.next_B
        view.pointing = pointing
        for layer in self.layers:
            x_BTD = _run(layer, self.checkpointing, x_BTD, view)
        if cache is not None:
            cache.length += T
        normed: Tensor = self.norm(x_BTD)
        return normed

    def encode(self, near: Neighborhood, hidden_NMD: Tensor, keep_NM: Tensor) -> Tensor:
        """Encoded neighbors [N, K, R, E] of the chunks whose activations are given."""
        assert self.encoder is not None
        table = self.embedding if self.encoder_embedding is None else self.encoder_embedding
        N, K, R = near.tokens_NKR.shape
        count = max(N, 1)
        if hidden_NMD.device.type == "cpu" and not torch.is_grad_enabled():
            count = max(ENCODED_PER_PART // (K * R * self.config.encoder_dim), 1)
        parts = []
        for first in range(0, max(N, 1), count):
            part = slice(first, first + count)
            x_NKRE = table(near.tokens_NKR[part])
            parts.append(self.encoder(x_NKRE, near.keep_NKR[part], hidden_NMD[part], keep_NM[part]))
        encoded: Tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        return encoded

    def drop_activations(self, share: float) -> None:
        """From now on zeroes so many of the decoder's activations in training mode, see `TrainConfig.dropout`."""
        dropouts: list[Any] = [self.dropout, *(layer.dropout for layer in self.layers)]
        for dropout in dropouts:
            dropout.p = share

    def freeze_decoder(self) -> None:
        """From now on only chunked cross-attention and neighbor encoder have gradients, see `TrainConfig.freeze_decoder`."""
        added: list[Any] = [self.encoder, self.encoder_embedding]
        for layer in self.layers:
            added += [layer.cca_norm, layer.cca]
        self.requires_grad_(requires_grad=False)
        for module in added:
            if module is not None:
                module.requires_grad_(requires_grad=True)

    def checkpoint_activations(self, enable: bool = True) -> None:
        """From now on keeps little for the backward pass, at the price of a second forward pass; or all again."""
        self.checkpointing = enable
        if self.encoder is not None:
            self.encoder.checkpointing = enable


def _cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Sum in nats, in float32 or wider."""
    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    return F.cross_entropy(logits_NV.to(wide), targets_N, reduction="sum")


def initialize_parameter(name: str, parameter: Tensor, layers: int, generator: torch.Generator) -> None:
    """One weight of a stack of so many layers, as `Retro.initialize` says."""
    if parameter.ndim == 1:
        nn.init.ones_(parameter)
        return
    deviation = float(parameter.shape[1]) ** -0.5
    if name.endswith((".q.weight", ".k.weight", ".distance.weight")):
        deviation = min(deviation, 0.02)
    if name.endswith((".out.weight", ".down.weight")):
        deviation /= (2 * layers) ** 0.5
    nn.init.normal_(parameter, std=deviation, generator=generator)
