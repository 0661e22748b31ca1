"""A pretrained bidirectional encoder, a BERT of transformers, as the neighbor encoder: reading need not be learned from nothing.

The paper's encoder sees H_u, the decoder's activations of the chunk, through a cross-attention that has to be learned. Here H_u
stands in front of each neighbor, as the first of BERT's two segments, so that its own self-attention compares the two, as it has
learned to. Its table of tokens is the decoder's, so both have its tokenizer.

Letters as in model.py; besides, P = N * K neighbors, G of them of about the same length, S slots of a chunk that hold a token.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from retro.config import BERT_POSITIONS, ModelConfig

_ALIKE = 32
"""Neighbors are read in groups whose lengths differ by less than this many tokens."""


class BertEncoder(nn.Module):
    """Reads every neighbor behind the decoder's activations of the chunk it was retrieved for.

    What it gives is BERT's last state of a token and the token's own embedding, each normed, in one sum: CCA finds what to read by
    the one, and can say it by the other, which needs no learning where tokens have one table.
    """

    def __init__(self, config: ModelConfig) -> None:
        """Makes it with random weights of transformers; see `initialize` and `load`."""
        super().__init__()
        from transformers import BertConfig, BertModel

        self.config = config
        self.checkpointing = False
        self.grouped = True
        """Read neighbors of about the same length together. False: all at once, so that ranks call the layers equally often."""
        bert: Any = BertModel(
            BertConfig(
                vocab_size=1,
                pad_token_id=0,
                hidden_size=config.encoder_dim,
                num_hidden_layers=config.encoder_layers,
                num_attention_heads=config.encoder_heads,
                intermediate_size=config.encoder_ffw_dim,
                max_position_embeddings=BERT_POSITIONS,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            ),
            add_pooling_layer=False,
        )
        bert.embeddings.word_embeddings = None  # embedded tokens are given
        self.bert = bert
        self.norm = nn.RMSNorm(config.encoder_dim, eps=config.norm_eps)
        self.token_norm = nn.RMSNorm(config.encoder_dim, eps=config.norm_eps)

    @property
    def layers(self) -> Any:
        """BERT's."""
        return self.bert.encoder.layer

    def initialize(self, generator: torch.Generator) -> None:
        """Draws all weights as BERT's were: normal with deviation 0.02, biases 0, norms 1."""
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02, generator=generator)
            else:
                nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)

    def forward(self, x_NKRE: Tensor, keep_NKR: Tensor, hidden_NMD: Tensor, keep_NM: Tensor) -> Tensor:
        """Encodes the neighbors of N chunks; see `retro.model.NeighborEncoder.forward`."""
        N, K, R, E = x_NKRE.shape
        keep_PR = keep_NKR.reshape(N * K, R)
        x_PRE = x_NKRE.reshape(N * K, R, E).masked_fill(~keep_PR[..., None], 0.0)
        hidden_NSE, keep_NS = self._compact(hidden_NMD, keep_NM)
        rows, parts = [], []
        for row_G, length in self._groups(keep_PR):
            chunk_G = row_G // K
            arguments = x_PRE[row_G, :length], keep_PR[row_G, :length], hidden_NSE[chunk_G], keep_NS[chunk_G]
            if self.checkpointing and torch.is_grad_enabled():
                read_GRE: Tensor = checkpoint(self._read, *arguments, use_reentrant=False)
            else:
                read_GRE = self._read(*arguments)
            rows.append(row_G)
            parts.append(F.pad(read_GRE, (0, 0, 0, R - length)))
        if not parts:
            return torch.zeros_like(x_NKRE)
        row_P, encoded_PRE = torch.cat(rows), torch.cat(parts)
        encoded_PRE = encoded_PRE.new_zeros(N * K, R, E).index_copy(0, row_P, encoded_PRE)
        return encoded_PRE.view(N, K, R, E)

    def _compact(self, hidden_NMD: Tensor, keep_NM: Tensor) -> tuple[Tensor, Tensor]:
        """The slots that hold a token, in front, as many as any chunk has; none where the encoder does not see the decoder."""
        if not self.config.encoder_conditioned:
            return hidden_NMD[:, :0], keep_NM[:, :0]
        S = keep_NM.shape[1] if torch.compiler.is_compiling() else int(keep_NM.sum(dim=1).amax()) if len(keep_NM) else 0
        slot_NS = keep_NM.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :S]
        hidden_NSD = hidden_NMD.gather(1, slot_NS[..., None].expand(-1, -1, hidden_NMD.shape[2]))
        keep_NS = keep_NM.gather(1, slot_NS)
        return hidden_NSD.masked_fill(~keep_NS[..., None], 0.0), keep_NS

    def _groups(self, keep_PR: Tensor) -> Iterator[tuple[Tensor, int]]:
        """Rows of about the same length, and the length of the longest; rows without any token are in no group."""
        P, R = keep_PR.shape
        if not self.grouped or torch.compiler.is_compiling():
            yield torch.arange(P, device=keep_PR.device), R
            return
        length_P = (keep_PR * torch.arange(1, R + 1, device=keep_PR.device)).amax(dim=1)
        size_P = (length_P + _ALIKE - 1) // _ALIKE
        for size in sorted(set(size_P.tolist()) - {0}):
            row_G = (size_P == size).nonzero().squeeze(1)
            yield row_G, int(length_P[row_G].amax())

    def _read(self, x_GRE: Tensor, keep_GR: Tensor, hidden_GSE: Tensor, keep_GS: Tensor) -> Tensor:
        (G, R, E), S = x_GRE.shape, hidden_GSE.shape[1]
        device = x_GRE.device
        position_T = torch.cat([torch.arange(S, device=device), self.config.chunk_len + torch.arange(R, device=device)])
        type_T = (torch.arange(S + R, device=device) >= S).long()
        read = self.bert(
            inputs_embeds=torch.cat([hidden_GSE.to(x_GRE.dtype), x_GRE], dim=1) / math.sqrt(E),  # see model.Embedding
            attention_mask=torch.cat([keep_GS, keep_GR], dim=1).long(),
            position_ids=position_T[None],
            token_type_ids=type_T.expand(G, S + R),
        )
        encoded_GRE: Tensor = self.norm(read.last_hidden_state[:, S:]) + self.token_norm(x_GRE)
        return encoded_GRE.masked_fill(~keep_GR[..., None], 0.0)
