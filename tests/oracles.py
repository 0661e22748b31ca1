"""Naive float64 implementations that the numeric tests compare the network with, and the small cases they run on.

Letters as in retro/model.py. The oracle follows the specification token by token: a slot t sees the encoded neighbors of chunk
u = (t + 1) // M - 1, if there is one, when t is u's own last slot or belongs to u's document. It loops over rows, slots, heads,
neighbors and keys, skips what is masked instead of masking it, and shares nothing with the network but the weights.

Conventions that the specification leaves free: a rotary head of width C turns component j together with component j + C/2
(half-split) by position * base ** (-2j / C); GELU is the exact one; RMSNorm adds `norm_eps` to the mean square.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from retro.config import ModelConfig

FloatArray = npt.NDArray[np.float64]
Placed = tuple[int, FloatArray]
"""A position and the activation that stands there."""


def assert_same(actual: Tensor, expected: Tensor, *, atol: float = 1e-12) -> None:
    """Equal but for rounding: absolutely, because activations are normed and of order 1."""
    assert_close(actual, expected, rtol=0.0, atol=atol)


class Oracle:
    """The network of `config` with the weights of `state`, one vector at a time."""

    def __init__(self, config: ModelConfig, state: dict[str, Tensor]) -> None:
        self.config = config
        self.weights: dict[str, FloatArray] = {
            name: weight.detach().to(torch.float64).numpy().copy() for name, weight in state.items()
        }

    def hidden(self, batch: "Batch") -> Tensor:
        """Final normed activations [B, T, D]; zero in empty slots."""
        rows = [self._row(batch, row) for row in range(batch.inputs_BT.shape[0])]
        return torch.from_numpy(np.stack(rows))

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Logits [B, T, V]."""
        table_VD = self.weights["embedding.weight" if self.config.tie_embeddings else "head.weight"]
        B, T, _ = hidden_BTD.shape
        logits_BTV = np.zeros((B, T, self.config.vocab_size))
        for b in range(B):
            for t in range(T):
                for v in range(self.config.vocab_size):
                    logits_BTV[b, t, v] = float(table_VD[v] @ hidden_BTD[b, t].numpy())
        return torch.from_numpy(logits_BTV)

    def loss(self, logits_BTV: Tensor, targets_BT: Tensor, loss_BT: Tensor) -> float:
        """Sum of -log p(target) in nats over the slots where `loss_BT` is True."""
        total = 0.0
        for b, t in loss_BT.nonzero().tolist():
            logits_V = [float(logit) for logit in logits_BTV[b, t]]
            highest = max(logits_V)
            normalizer = highest + math.log(math.fsum(math.exp(logit - highest) for logit in logits_V))
            total += normalizer - logits_V[int(targets_BT[b, t])]
        return total

    def encode(self, neighbors: Sequence[Sequence[Placed]], chunk: Sequence[Placed]) -> list[list[Placed]]:
        """Encodes the neighbors of one chunk.

        Args:
            neighbors: Of each neighbor, the places of its tokens and their embeddings.
            chunk: The places of the chunk's tokens and the decoder's activations H_u there.
        """
        context = []
        if self.config.encoder == "bert":
            return [self._encode_by_bert(neighbor, chunk) for neighbor in neighbors]
        if self.config.encoder_conditioned:
            context = [(i, self._norm("encoder.layers.0.context_norm", h_D)) for i, h_D in chunk]
        return [self._encode_one(neighbor, context) for neighbor in neighbors]

    def cca(self, prefix: str, place: int, normed_D: FloatArray, encoded: Sequence[Sequence[Placed]]) -> FloatArray:
        """Output of the CCA `prefix` for the query at `place` in [0, M): one softmax over all neighbors' tokens."""
        query = (place + self.config.chunk_len - 1, normed_D)
        context = [token for neighbor in encoded for token in neighbor]
        return self._attention(prefix, query, context, self.config.num_heads, self.config.head_dim)

    def _row(self, batch: "Batch", row: int) -> FloatArray:
        config, M = self.config, self.config.chunk_len
        T = batch.inputs_BT.shape[1]
        slots = [t for t in range(T) if batch.keep_BT[row, t]]
        document = [int(batch.document_BL[row, t // M]) for t in range(T)]
        table_VD = self.weights["embedding.weight"] * math.sqrt(config.dim)
        x = {t: table_VD[int(batch.inputs_BT[row, t])] for t in slots}
        encoded: dict[int, list[list[Placed]]] = {}
        for number in range(1, config.num_layers + 1):
            prefix = f"layers.{number - 1}"
            normed = {t: self._norm(f"{prefix}.attention_norm", x[t]) for t in slots}
            mixed = {}
            for t in slots:
                context = [(s, normed[s]) for s in slots if s <= t and document[s] == document[t]]
                mixed[t] = x[t] + self._attention(
                    f"{prefix}.attention", (t, normed[t]), context, config.num_heads, config.head_dim
                )
            x = mixed
            if number in config.cca_layers:
                if number == min(config.cca_layers):
                    encoded = {u: self._encode_chunk(batch, row, u, x) for u in range(T // M)}
                for t in slots:
                    u = (t + 1) // M - 1
                    ends_u = t == (u + 1) * M - 1
                    if u < 0 or not (ends_u or document[t] == document[u * M]):
                        continue
                    normed_D = self._norm(f"{prefix}.cca_norm", x[t])
                    x[t] = x[t] + self.cca(f"{prefix}.cca", t - ((u + 1) * M - 1), normed_D, encoded[u])
            for t in slots:
                x[t] = x[t] + self._feed_forward(f"{prefix}.ffw", self._norm(f"{prefix}.ffw_norm", x[t]))
        final_TD = np.zeros((T, config.dim))
        for t in slots:
            final_TD[t] = self._norm("norm", x[t])
        return final_TD

    def _encode_chunk(self, batch: "Batch", row: int, u: int, x: dict[int, FloatArray]) -> list[list[Placed]]:
        M = self.config.chunk_len
        table_VE = self.weights["embedding.weight" if self.config.tie_embeddings else "encoder_embedding.weight"]
        table_VE = table_VE * math.sqrt(self.config.encoder_dim)
        ids_KR, keep_KR = batch.neighbors_BLKR[row, u], batch.keep_BLKR[row, u]
        K, R = ids_KR.shape
        neighbors = [[(r, table_VE[int(ids_KR[k, r])]) for r in range(R) if keep_KR[k, r]] for k in range(K)]
        return self.encode(neighbors, [(i, x[u * M + i]) for i in range(M) if u * M + i in x])

    def _encode_one(self, neighbor: Sequence[Placed], context: Sequence[Placed]) -> list[Placed]:
        config = self.config
        heads, width = config.encoder_heads, config.encoder_head_dim
        places = [r for r, _ in neighbor]
        x = dict(neighbor)
        for index in range(config.encoder_layers):
            prefix = f"encoder.layers.{index}"
            normed = [(r, self._norm(f"{prefix}.attention_norm", x[r])) for r in places]
            for r, normed_E in normed:
                x[r] = x[r] + self._attention(f"{prefix}.attention", (r, normed_E), normed, heads, width)
            for r in places:
                if index == 0 and config.encoder_conditioned:
                    query = (r, self._norm(f"{prefix}.cross_norm", x[r]))
                    x[r] = x[r] + self._attention(f"{prefix}.cross", query, context, heads, width)
                x[r] = x[r] + self._feed_forward(f"{prefix}.ffw", self._norm(f"{prefix}.ffw_norm", x[r]))
        return [(r, self._norm("encoder.norm", x[r])) for r in places]

    def _encode_by_bert(self, neighbor: Sequence[Placed], chunk: Sequence[Placed]) -> list[Placed]:
        """Source: arXiv:1810.04805; layers as in arXiv:1706.03762, norms behind the sums."""
        config, root = self.config, math.sqrt(self.config.encoder_dim)
        first = [h_D for _, h_D in chunk] if config.encoder_conditioned else []
        read = [(place, 0, h_D) for place, h_D in enumerate(first)]
        read += [(config.chunk_len + r, 1, x_E) for r, x_E in neighbor]
        tables = [
            self.weights[f"encoder.bert.embeddings.{name}_embeddings.weight"] for name in ("position", "token_type")
        ]
        x = [
            self._layer_norm("encoder.bert.embeddings.LayerNorm", x_E / root + tables[0][place] + tables[1][segment])
            for place, segment, x_E in read
        ]
        for index in range(config.encoder_layers):
            prefix = f"encoder.bert.encoder.layer.{index}"
            q, k, v = (
                [self._affine(f"{prefix}.attention.self.{name}", x_E) for x_E in x]
                for name in ("query", "key", "value")
            )
            mixed = []
            for q_E in q:
                merged_E = np.zeros(config.encoder_dim)
                for head in range(config.encoder_heads):
                    part = slice(head * config.encoder_head_dim, (head + 1) * config.encoder_head_dim)
                    shares = [math.exp(float(q_E[part] @ k_E[part]) / math.sqrt(config.encoder_head_dim)) for k_E in k]
                    for share, v_E in zip(shares, v, strict=True):
                        merged_E[part] += share / math.fsum(shares) * v_E[part]
                mixed.append(self._affine(f"{prefix}.attention.output.dense", merged_E))
            x = [self._layer_norm(f"{prefix}.attention.output.LayerNorm", a + b) for a, b in zip(mixed, x, strict=True)]
            inner = [_gelu(self._affine(f"{prefix}.intermediate.dense", x_E)) for x_E in x]
            down = [self._affine(f"{prefix}.output.dense", inner_F) for inner_F in inner]
            x = [self._layer_norm(f"{prefix}.output.LayerNorm", a + b) for a, b in zip(down, x, strict=True)]
        return [
            (r, self._norm("encoder.norm", last_E) + self._norm("encoder.token_norm", x_E))
            for (r, x_E), last_E in zip(neighbor, x[len(first) :], strict=True)
        ]

    def _affine(self, name: str, x_D: FloatArray) -> FloatArray:
        out: FloatArray = self.weights[f"{name}.weight"] @ x_D + self.weights[f"{name}.bias"]
        return out

    def _layer_norm(self, name: str, x_D: FloatArray) -> FloatArray:
        centered_D = x_D - math.fsum(x_D.tolist()) / len(x_D)
        variance = math.fsum(float(value) ** 2 for value in centered_D) / len(x_D)
        normed_D: FloatArray = centered_D / math.sqrt(variance + 1e-12) * self.weights[f"{name}.weight"]
        return normed_D + self.weights[f"{name}.bias"]

    def _attention(self, prefix: str, query: Placed, context: Sequence[Placed], heads: int, width: int) -> FloatArray:
        """Attention of one query to some places; zero where there is none."""
        position, x_D = query
        rotary = self.config.positions == "rotary" and (self.config.cca_positions or ".cca" not in prefix)
        q_I = self.weights[f"{prefix}.q.weight"] @ x_D
        merged_I = np.zeros(heads * width)
        for head in range(heads if context else 0):
            part = slice(head * width, (head + 1) * width)
            q_C = self._rotate(q_I[part], position) if rotary else q_I[part]
            scores, values = [], []
            for place, c_D in context:
                k_C = self.weights[f"{prefix}.k.weight"][part] @ c_D
                k_C = self._rotate(k_C, place) if rotary else k_C
                if f"{prefix}.distance.weight" in self.weights:
                    k_C = k_C + self.weights[f"{prefix}.distance.weight"][part] @ self._sinusoid(
                        position - place, len(x_D)
                    )
                scores.append(float(q_C @ k_C) / math.sqrt(width))
                values.append(self.weights[f"{prefix}.v.weight"][part] @ c_D)
            highest = max(scores)
            shares = [math.exp(score - highest) for score in scores]
            for share, v_C in zip(shares, values, strict=True):
                merged_I[part] += share / math.fsum(shares) * v_C
        out_D: FloatArray = self.weights[f"{prefix}.out.weight"] @ merged_I
        return out_D

    def _rotate(self, x_C: FloatArray, position: int) -> FloatArray:
        width = len(x_C)
        half = width // 2
        turned_C = np.zeros(width)
        for j in range(half):
            angle = position * self.config.rope_base ** (-2 * j / width)
            turned_C[j] = x_C[j] * math.cos(angle) - x_C[j + half] * math.sin(angle)
            turned_C[j + half] = x_C[j] * math.sin(angle) + x_C[j + half] * math.cos(angle)
        return turned_C

    def _sinusoid(self, distance: int, width: int) -> FloatArray:
        """Sines of all frequencies, then cosines."""
        angles = [distance * self.config.rope_base ** (-2 * j / width) for j in range((width + 1) // 2)]
        return np.array([*map(math.sin, angles), *map(math.cos, angles)][:width])

    def _norm(self, name: str, x_D: FloatArray) -> FloatArray:
        mean_square = math.fsum(float(value) ** 2 for value in x_D) / len(x_D)
        normed_D: FloatArray = x_D / math.sqrt(mean_square + self.config.norm_eps) * self.weights[f"{name}.weight"]
        return normed_D

    def _feed_forward(self, prefix: str, x_D: FloatArray) -> FloatArray:
        inner = self.weights[f"{prefix}.up.weight"] @ x_D
        out_D: FloatArray = self.weights[f"{prefix}.down.weight"] @ _gelu(inner)
        return out_D


def _gelu(x_D: FloatArray) -> FloatArray:
    return np.array([0.5 * value * (1 + math.erf(value / math.sqrt(2))) for value in x_D.tolist()])


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Sequences with their neighbors, and what is to be predicted."""

    inputs_BT: Tensor
    keep_BT: Tensor
    document_BL: Tensor
    neighbors_BLKR: Tensor
    keep_BLKR: Tensor
    targets_BT: Tensor
    loss_BT: Tensor

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `Retro.hidden`."""
        names = ("inputs_BT", "keep_BT", "document_BL", "neighbors_BLKR", "keep_BLKR")
        return {name: getattr(self, name) for name in names}

    def row(self, index: int) -> "Batch":
        """That row alone."""
        fields = [f.name for f in dataclasses.fields(self)]
        return Batch(**{name: getattr(self, name)[index : index + 1] for name in fields})


def tiny_config(**changes: Any) -> ModelConfig:
    """A network that a naive loop can run: every width is another number where it may be."""
    sizes: dict[str, Any] = {
        "vocab_size": 29,
        "dim": 8,
        "num_layers": 3,
        "num_heads": 2,
        "head_dim": 6,
        "ffw_dim": 14,
        "cca_layers": (2, 3),
        "encoder_dim": 10,
        "encoder_layers": 2,
        "encoder_heads": 3,
        "encoder_head_dim": 4,
        "encoder_ffw_dim": 11,
        "chunk_len": 4,
        "tie_embeddings": False,
        "rope_base": 50.0,
        "norm_eps": 1e-4,
    }
    return ModelConfig(**(sizes | changes))


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Draws weights large enough that softmaxes are far from uniform, in place; norms' weights too are all different."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.3 * noise)
            elif "embedding" in name:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
            else:
                parameter.copy_(noise * 1.3 / parameter.shape[1] ** 0.5)


def varied_lengths(B: int, L: int, K: int, R: int) -> list[list[list[int]]]:
    """Token counts of the neighbors of every chunk: all full, ragged, one missing, none, in turn."""
    lengths = []
    for b in range(B):
        row = []
        for u in range(L):
            kind = (b + u) % 4
            full = [R] * K
            ragged = [1 + (3 * b + u + 2 * k) % R for k in range(K)]
            missing = [0 if k == (b + u) % K else R - 1 for k in range(K)]
            row.append([full, ragged, missing if K > 1 else ragged, [0] * K][kind])
        lengths.append(row)
    return lengths


def make_batch(
    config: ModelConfig,
    rows: Sequence[Sequence[tuple[int, int]]],
    lengths: Sequence[Sequence[Sequence[int]]],
    *,
    R: int,
    seed: int = 0,
) -> Batch:
    """A batch with random tokens, also in the places that are masked.

    Args:
        config: For `chunk_len` and `vocab_size`. Token 0 is drawn in masked places only.
        rows: Of each row its documents, each (empty slots before its first token, tokens); each begins at a chunk border.
        lengths: Of each row, chunk and neighbor the number of tokens, 0 for a missing neighbor. Gives the number of chunks;
            those behind the last document are empty.
        R: Places of a neighbor.
        seed: Of the tokens.
    """
    M = config.chunk_len
    B, L, K = len(lengths), len(lengths[0]), len(lengths[0][0])
    generator = torch.Generator().manual_seed(seed)
    keep_BT = torch.zeros(B, L * M, dtype=torch.bool)
    document_BL = torch.zeros(B, L, dtype=torch.long)
    for b, documents in enumerate(rows):
        chunk = 0
        for index, (lead, tokens) in enumerate(documents):
            begin = chunk * M + lead
            keep_BT[b, begin : begin + tokens] = True
            chunk_end = chunk + -(-(lead + tokens) // M)
            document_BL[b, chunk:chunk_end] = index
            chunk = chunk_end
        if chunk > L:
            raise ValueError(f"row {b} needs {chunk} chunks, there are {L}")
        # Empty chunks at the end belong to nothing; in every second row they carry the last document's number.
        document_BL[b, chunk:] = len(documents) - b % 2
    keep_BLKR = torch.arange(R) < torch.tensor(lengths)[..., None]
    inputs_BT = torch.randint(1, config.vocab_size, (B, L * M), generator=generator)
    neighbors_BLKR = torch.randint(1, config.vocab_size, (B, L, K, R), generator=generator)
    return Batch(
        inputs_BT=inputs_BT,
        keep_BT=keep_BT,
        document_BL=document_BL,
        neighbors_BLKR=neighbors_BLKR,
        keep_BLKR=keep_BLKR,
        targets_BT=torch.randint(0, config.vocab_size, (B, L * M), generator=generator),
        loss_BT=keep_BT & (torch.rand(B, L * M, generator=generator) < 0.7),
    )


def rich_batch(config: ModelConfig, *, K: int = 2, R: int = 7, seed: int = 0) -> Batch:
    """Three rows of 6 chunks: one document, two, three; leads, partial last chunks, empty chunks at the end."""
    M = config.chunk_len
    rows = [
        [(1, 6 * M - 3)],
        [(0, 2 * M), (M - 1, M + 2)],
        [(2, M - 2), (0, 2 * M - 1), (1, 2 * M - 1)],
    ]
    return make_batch(config, rows, varied_lengths(len(rows), 6, K, R), R=R, seed=seed)


def prompt_batch(config: ModelConfig, *, L: int = 8, K: int = 2, R: int = 6, seed: int = 0) -> Batch:
    """One document a row: without a lead, with a whole empty chunk in front, with a lead, and ending early; for cached decoding."""
    M = config.chunk_len
    rows = [[(0, L * M)], [(M + 1, (L - 1) * M - 1)], [(M - 1, (L - 1) * M + 1)], [(1, (L - 4) * M + M // 2)]]
    return make_batch(config, rows, varied_lengths(len(rows), L, K, R), R=R, seed=seed)


def decode_slots(
    model: Any,
    cache: Any,
    batch: Batch,
    prompt_chunks: int,
    *,
    border_neighbors: dict[int, tuple[Tensor, Tensor]] | None = None,
    retrieval: bool = True,
) -> Tensor:
    """Activations [B, T, D] of cached decoding: whole chunks in the first call, then one slot at a time.

    Args:
        model: A `Retro` (or a mutated copy).
        cache: An empty `Cache` of the same module.
        batch: One document per row. The neighbors of chunk u are handed over with the slot that ends u.
        prompt_chunks: Chunks of the first call.
        border_neighbors: Instead of the batch's own, tokens and keep [B, 1, K, R] by chunk; no neighbors for chunks not named.
        retrieval: False hands over None everywhere.
    """
    M = model.config.chunk_len
    T = batch.inputs_BT.shape[1]
    P = prompt_chunks * M
    prompt_neighbors: dict[str, Any] = {}
    if retrieval:
        prompt_neighbors = {
            "neighbors_BLKR": batch.neighbors_BLKR[:, :prompt_chunks],
            "keep_BLKR": batch.keep_BLKR[:, :prompt_chunks],
        }
    with torch.no_grad():
        parts = [
            model.hidden(
                batch.inputs_BT[:, :P], keep_BT=batch.keep_BT[:, :P].contiguous(), cache=cache, **prompt_neighbors
            )
        ]
        for t in range(P, T):
            arguments: dict[str, Any] = {"slot_BT": torch.full((len(batch.inputs_BT), 1), t)}
            u = t // M
            if retrieval and t % M == M - 1:
                if border_neighbors is None:
                    arguments |= {
                        "neighbors_BLKR": batch.neighbors_BLKR[:, u : u + 1],
                        "keep_BLKR": batch.keep_BLKR[:, u : u + 1],
                    }
                elif u in border_neighbors:
                    arguments |= dict(zip(("neighbors_BLKR", "keep_BLKR"), border_neighbors[u], strict=True))
            one = slice(t, t + 1)
            parts.append(model.hidden(batch.inputs_BT[:, one], keep_BT=batch.keep_BT[:, one], cache=cache, **arguments))
    return torch.cat(parts, dim=1)


def decode_ragged(model: Any, cache: Any, batch: Batch, generator: torch.Generator, longest: int) -> Tensor:
    """Activations [B, T, D] of cached decoding in which every row goes on by a number of slots of its own at every call.

    Args:
        model: A `Retro` (or a mutated copy).
        cache: An empty `Cache` of the same module.
        batch: One document per row, with or without a lead. Zeros stand in the result where a row has no token.
        generator: Draws how many slots each row takes: 0 (it waits) to `longest`.
        longest: See above.
    """
    M = model.config.chunk_len
    B, T = batch.inputs_BT.shape
    slots = [torch.nonzero(batch.keep_BT[b])[:, 0].tolist() for b in range(B)]
    done = [0] * B
    result = torch.zeros(B, T, model.config.dim, dtype=model.embedding.weight.dtype)
    while any(done[b] < len(slots[b]) for b in range(B)):
        drawn = torch.randint(0, longest + 1, (B,), generator=generator).tolist()
        taken = [slots[b][done[b] : done[b] + drawn[b]] for b in range(B)]
        width = max(1, *map(len, taken))
        columns = {name: torch.zeros(B, width, dtype=torch.long) for name in ("inputs_BT", "slot_BT")}
        keep_BT = torch.zeros(B, width, dtype=torch.bool)
        first_chunk = [0 if done[b] == len(slots[b]) else slots[b][done[b]] // M for b in range(B)]
        L = max((row[-1] // M - chunk + 1 for row, chunk in zip(taken, first_chunk, strict=True) if row), default=1)
        neighbors_BLKR = torch.zeros(B, L, *batch.neighbors_BLKR.shape[2:], dtype=torch.long)
        keep_BLKR = torch.zeros_like(neighbors_BLKR, dtype=torch.bool)
        for b, row in enumerate(taken):
            # The columns of a row may lie anywhere: here at the right, as under left padding.
            columns["inputs_BT"][b, width - len(row) :] = batch.inputs_BT[b, row]
            columns["slot_BT"][b, width - len(row) :] = torch.tensor(row, dtype=torch.long)
            keep_BT[b, width - len(row) :] = True
            there = slice(first_chunk[b], min(first_chunk[b] + L, T // M))
            neighbors_BLKR[b, : there.stop - there.start] = batch.neighbors_BLKR[b, there]
            keep_BLKR[b, : there.stop - there.start] = batch.keep_BLKR[b, there]
        if all(done):
            del columns["slot_BT"]  # every row goes on where it stands
        done = [number + len(row) for number, row in zip(done, taken, strict=True)]
        with torch.no_grad():
            hidden_BTD = model.hidden(
                **columns, keep_BT=keep_BT, neighbors_BLKR=neighbors_BLKR, keep_BLKR=keep_BLKR, cache=cache
            )
        for b, row in enumerate(taken):
            result[b, row] = hidden_BTD[b, width - len(row) :]
    return result
