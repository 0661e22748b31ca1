"""A pretrained bidirectional encoder, a BERT of transformers, as the neighbor encoder: reading need not be learned from nothing.

The paper's encoder sees H_u, the decoder's activations of the chunk, through a cross-attention that has to be learned. Here H_u
stands in front of each neighbor, as the first of BERT's two segments, so that its own self-attention compares the two, as it has
learned to. Its table of tokens is the decoder's, so both have its tokenizer.

Letters as in model.py; besides, P = N * K neighbors, G of them of about the same length, S slots of a chunk, T places of both.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from retro.config import BERT_POSITIONS, ModelConfig
from retro.errors import ConfigError

_ALIKE = 16
"""Neighbors are read in groups whose lengths differ by less than this many tokens."""


class BertEncoder(nn.Module):
    """Reads every neighbor behind the decoder's activations of the chunk it was retrieved for.

    What it gives is BERT's last state of a token and the token's own embedding, each normed, in one sum: CCA finds what to read by
    the one, and can say it by the other, which needs no learning where tokens have one table.
    """

    def __init__(self, config: ModelConfig) -> None:
        """Makes it with random weights of transformers; see `initialize` and `retro.pretrained_encoder.load_encoder`."""
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
        read = self.bert(
            # An embedding is scaled, see model.Embedding; BERT's own are not.
            inputs_embeds=both_GUE.gather(1, from_GT[..., None].expand(G, T, E)) / math.sqrt(E),
            attention_mask=there_GT.long(),
            position_ids=torch.where(second_GT, self.config.chunk_len + behind_GT.clamp(0, R - 1), place_T),
            token_type_ids=second_GT.long(),
        )
        back_GR = (size_G[:, None] + torch.arange(R, device=x_GRE.device)).clamp(max=T - 1)
        last_GRE = read.last_hidden_state.gather(1, back_GR[..., None].expand(G, R, E))
        encoded_GRE: Tensor = self.norm(last_GRE) + self.token_norm(x_GRE)
        return encoded_GRE.masked_fill(~keep_GR[..., None], 0.0)
