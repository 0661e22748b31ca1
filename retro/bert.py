"""BERT (arXiv:1810.04805), with the names that its weights have in transformers; and one as the neighbor encoder, pretrained, so
that reading need not be learned from nothing.

The paper's encoder sees H_u, the decoder's activations of the chunk, through a cross-attention that has to be learned. Here H_u
stands in front of each neighbor, as the first of BERT's two segments, so that its own self-attention compares the two, as it has
learned to. Its table of tokens is the decoder's, so both have its tokenizer.

Letters as in model.py; besides, P = N * K neighbors, G of them of about the same length, S slots of a chunk, T places of both.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from retro.config import BERT_POSITIONS, ModelConfig
from retro.errors import ConfigError

_ALIKE = 16
"""Neighbors are read in groups whose lengths differ by less than this many tokens."""


class Bert(nn.Module):
    """transformers' `BertModel` without dropout and pooler, the same but for rounding: importing that one takes seconds, for which
    somebody with one question would wait.
    """

    def __init__(self, *, dim: int, ffw_dim: int, num_heads: int, num_layers: int, positions: int, eps: float) -> None:
        """Makes the weights, which are to be loaded or drawn.

        Args:
            dim: E.
            ffw_dim: Between the two matrices of a feed-forward.
            num_heads: H, a divisor of `dim`.
            num_layers: Layers.
            positions: Places that have an embedding.
            eps: Of the norms.
        """
        super().__init__()
        embeddings: dict[str, nn.Module] = {
            "position_embeddings": nn.Embedding(positions, dim),
            "token_type_embeddings": nn.Embedding(2, dim),
            "LayerNorm": nn.LayerNorm(dim, eps=eps),
        }
        self.embeddings = nn.ModuleDict(embeddings)
        layers = nn.ModuleList(BertLayer(dim, ffw_dim, num_heads, eps) for _ in range(num_layers))
        self.encoder = nn.ModuleDict({"layer": layers})

    def forward(self, x_BTE: Tensor, keep_BT: Tensor | None, place_BT: Tensor, segment_BT: Tensor) -> Tensor:
        """The last layer's states [B, T, E].

        Args:
            x_BTE: Embedded tokens.
            keep_BT: True where there is one, somewhere in every row; None: everywhere.
            place_BT: Their places, [B, T] or [1, T].
            segment_BT: 0 in the first of two texts, 1 in the second; likewise.
        """
        embeddings: Any = self.embeddings
        x_BTE = x_BTE + embeddings["token_type_embeddings"](segment_BT) + embeddings["position_embeddings"](place_BT)
        x_BTE = embeddings["LayerNorm"](x_BTE)
        keep_B11T = None if keep_BT is None else keep_BT[:, None, None, :]
        layers: Any = self.encoder["layer"]
        for layer in layers:
            x_BTE = layer(x_BTE, keep_B11T)
        return x_BTE


class BertLayer(nn.Module):
    """Self-attention and feed-forward, the norm behind each."""

    def __init__(self, dim: int, ffw_dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        projections: dict[str, nn.Module] = {name: nn.Linear(dim, dim) for name in ("query", "key", "value")}
        self.attention = nn.ModuleDict({"self": nn.ModuleDict(projections), "output": _output(dim, dim, eps)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(dim, ffw_dim)})
        self.output = _output(ffw_dim, dim, eps)

    def forward(self, x_BTE: Tensor, keep_B11T: Tensor | None) -> Tensor:
        B, T, _ = x_BTE.shape
        own: Any = self.attention["self"]
        q_BHTC, k_BHTC, v_BHTC = (
            own[name](x_BTE).view(B, T, self.num_heads, -1).transpose(1, 2) for name in ("query", "key", "value")
        )
        y_BHTC = F.scaled_dot_product_attention(q_BHTC, k_BHTC, v_BHTC, attn_mask=keep_B11T)
        x_BTE = self._added(self.attention["output"], y_BHTC.transpose(1, 2).flatten(2), x_BTE)
        return self._added(self.output, F.gelu(self.intermediate["dense"](x_BTE)), x_BTE)

    @staticmethod
    def _added(output: Any, y_BTF: Tensor, x_BTE: Tensor) -> Tensor:
        added_BTE: Tensor = output["LayerNorm"](output["dense"](y_BTF) + x_BTE)
        return added_BTE


def _output(width: int, dim: int, eps: float) -> nn.ModuleDict:
    return nn.ModuleDict({"dense": nn.Linear(width, dim), "LayerNorm": nn.LayerNorm(dim, eps=eps)})


class BertEncoder(nn.Module):
    """Reads every neighbor behind the decoder's activations of the chunk it was retrieved for.

    What it gives is BERT's last state of a token and the token's own embedding, each normed, in one sum: CCA finds what to read by
    the one, and can say it by the other, which needs no learning where tokens have one table.
    """

    def __init__(self, config: ModelConfig) -> None:
        """Makes it with random weights; see `initialize` and `retro.pretrained_encoder.load_encoder`."""
        super().__init__()
        self.config = config
        self.checkpointing = False
        self.grouped = True
        """Read neighbors of about the same length together. False: all at once, so that ranks call the layers equally often."""
        self.bert = Bert(
            dim=config.encoder_dim,
            ffw_dim=config.encoder_ffw_dim,
            num_heads=config.encoder_heads,
            num_layers=config.encoder_layers,
            positions=BERT_POSITIONS,
            eps=1e-12,
        )
        self.norm = nn.RMSNorm(config.encoder_dim, eps=config.norm_eps)
        self.token_norm = nn.RMSNorm(config.encoder_dim, eps=config.norm_eps)

    @property
    def layers(self) -> Any:
        """BERT's."""
        return self.bert.encoder["layer"]

    def initialize(self, generator: torch.Generator) -> None:
        """Draws all weights as BERT's were: normal with deviation 0.02, biases 0, norms 1."""
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02, generator=generator)
            else:
                nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)

    def forward(self, x_NKRE: Tensor, keep_NKR: Tensor, hidden_NMD: Tensor, keep_NM: Tensor) -> Tensor:
        """Encodes the neighbors of N chunks; see `retro.model.NeighborEncoder.forward`.

        Raises:
            ConfigError: Chunk and neighbor are longer than BERT_POSITIONS.
        """
        N, K, R, E = x_NKRE.shape
        if self.config.chunk_len + R > BERT_POSITIONS:
            raise ConfigError(
                f"{R} tokens of a neighbor behind a chunk of {self.config.chunk_len}: this encoder reads at most {BERT_POSITIONS} "
                "at once; lower neighbor_len"
            )
        keep_PR = keep_NKR.reshape(N * K, R)
        x_PRE = x_NKRE.reshape(N * K, R, E).masked_fill(~keep_PR[..., None], 0.0)
        hidden_NSE, keep_NS = self._compact(hidden_NMD, keep_NM)
        size_P = keep_NS.sum(dim=1).repeat_interleave(K)
        length_P = (keep_PR * torch.arange(1, R + 1, device=keep_PR.device)).amax(dim=1)
        encoded_PRE = torch.zeros_like(x_PRE)
        for row_G in self._groups(size_P + length_P, length_P > 0):
            chunk_G = row_G // K
            arguments = x_PRE[row_G], keep_PR[row_G], length_P[row_G], hidden_NSE[chunk_G], size_P[row_G]
            if self.checkpointing and torch.is_grad_enabled():
                read_GRE: Tensor = checkpoint(self._read, *arguments, use_reentrant=False)
            else:
                read_GRE = self._read(*arguments)
            encoded_PRE = encoded_PRE.index_copy(0, row_G, read_GRE.to(encoded_PRE.dtype))
        return encoded_PRE.view(N, K, R, E)

    def _compact(self, hidden_NMD: Tensor, keep_NM: Tensor) -> tuple[Tensor, Tensor]:
        """The slots that hold a token in front of the others; none where the encoder does not see the decoder."""
        if not self.config.encoder_conditioned:
            return hidden_NMD[:, :0], keep_NM[:, :0]
        slot_NS = keep_NM.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        keep_NS = keep_NM.gather(1, slot_NS)
        hidden_NSD = hidden_NMD.gather(1, slot_NS[..., None].expand_as(hidden_NMD))
        return hidden_NSD.masked_fill(~keep_NS[..., None], 0.0), keep_NS

    def _groups(self, total_P: Tensor, wanted_P: Tensor) -> list[Tensor]:
        """Rows that are read together, being about as long."""
        if not self.grouped or torch.compiler.is_compiling():
            return [torch.arange(len(total_P), device=total_P.device)]
        class_P = torch.where(wanted_P, (total_P + _ALIKE - 1) // _ALIKE, 0)
        return [(class_P == size).nonzero().squeeze(1) for size in sorted(set(class_P.tolist()) - {0})]

    def _read(self, x_GRE: Tensor, keep_GR: Tensor, length_G: Tensor, hidden_GSE: Tensor, size_G: Tensor) -> Tensor:
        """Reads `size_G` activations and, right behind them, the neighbor's first `length_G` places, as one text each."""
        (G, R, E), S = x_GRE.shape, hidden_GSE.shape[1]
        T = S + R if torch.compiler.is_compiling() else int((size_G + length_G).amax())
        place_T = torch.arange(T, device=x_GRE.device)
        behind_GT = place_T - size_G[:, None]
        second_GT = behind_GT >= 0
        # Where each place is taken from, out of all activations and then all of the neighbor's places.
        from_GT = torch.where(second_GT, S + behind_GT.clamp(0, R - 1), place_T.clamp(max=max(S - 1, 0)))
        both_GUE = torch.cat([hidden_GSE.to(x_GRE.dtype), x_GRE], dim=1)
        there_GU = torch.cat([torch.arange(S, device=x_GRE.device) < size_G[:, None], keep_GR], dim=1)
        there_GT = there_GU.gather(1, from_GT) & (behind_GT < length_G[:, None])
        nothing_G1 = ~there_GT.any(dim=1, keepdim=True)
        there_GT = there_GT | (nothing_G1 & (place_T == 0))  # attention to nothing has no gradient
        last_GTE = self.bert(
            # An embedding is scaled, see model.Embedding; BERT's own are not.
            both_GUE.gather(1, from_GT[..., None].expand(G, T, E)) / math.sqrt(E),
            there_GT,
            torch.where(second_GT, self.config.chunk_len + behind_GT.clamp(0, R - 1), place_T),
            second_GT.long(),
        )
        back_GR = (size_G[:, None] + torch.arange(R, device=x_GRE.device)).clamp(max=T - 1)
        last_GRE = last_GTE.gather(1, back_GR[..., None].expand(G, R, E))
        encoded_GRE: Tensor = self.norm(last_GRE) + self.token_norm(x_GRE)
        return encoded_GRE.masked_fill(~keep_GR[..., None], 0.0)
