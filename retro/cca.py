"""Chunked cross-attention (CCA): which slots see which neighbors, of whole sequences and of columns added to a cache.

Letters as in model.py. A layer asks a view for what lies outside its own slots: `WholeChunks` of sequences that are there from the
beginning (training), `Continuation` of a cache by one column or more (decoding), where every row stands at a place of its own.

Source: arXiv:2112.04426, section 2.4 and algorithm 1.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from retro.attention import Attention, CausalMask, KeysValues, Places, attend
from retro.errors import ConfigError

# --- neighbors ----------------------------------------------------------------------------------------------------


class Neighborhood(NamedTuple):
    """The neighbors of those N chunks of a batch that have any."""

    chunk_N: Tensor
    """Which of the B * L chunks."""
    tokens_NKR: Tensor
    keep_NKR: Tensor

    @classmethod
    def of(cls, neighbors_BLKR: Tensor, keep_BLKR: Tensor, *, every: bool = False) -> "Neighborhood":
        """Leaves out the chunks without neighbors, unless every one is wanted: the encoder need not read emptiness."""
        keep_NKR = keep_BLKR.flatten(0, 1)
        tokens_NKR = neighbors_BLKR.flatten(0, 1)
        if every or torch.compiler.is_compiling():
            chunk_N = torch.arange(keep_NKR.shape[0], device=keep_NKR.device)
        else:
            chunk_N = keep_NKR.flatten(1).any(dim=1).nonzero().squeeze(1)
            tokens_NKR, keep_NKR = tokens_NKR[chunk_N], keep_NKR[chunk_N]
        return cls(chunk_N, tokens_NKR.masked_fill(~keep_NKR, 0), keep_NKR)


class Reader(Protocol):
    """What chunked cross-attention needs of a network: ours, or one built around a pretrained model."""

    chunk_len: int
    """M."""
    every_chunk: bool
    """Encode also chunks without neighbors, so that shapes, and the work of several ranks, do not depend on the data."""

    def encode(self, near: Neighborhood, hidden_NMD: Tensor, keep_NM: Tensor) -> Tensor:
        """Encoded neighbors [N, K, R, E] of the chunks whose activations are given."""
        ...


@dataclass(slots=True)
class Pointing:
    """A second loss, for training alone: the attention of CCA is to lie on the token that is said next, where neighbors hold it.

    It is summed over the slots whose target stands in the evidence of the neighbors they see.
    """

    targets_BT: Tensor
    loss_BT: Tensor
    """True where the target counts."""
    evidence_BLKR: Tensor
    """True where a neighbor's token belongs to an answer that stands there."""
    losses: list[Tensor] = field(default_factory=list)
    """Of each layer, in nats: -log of the attention, averaged over heads, that lies right."""

    def add(
        self,
        cca: Attention,
        normed_BTD: Tensor,
        slot_BT: Tensor,
        chunk_len: int,
        near: Neighborhood,
        encoded_NSE: Tensor,
    ) -> None:
        """Takes one layer down.

        Args:
            cca: Of the layer.
            normed_BTD: What it asks with.
            slot_BT: Slot of each column, from 0.
            chunk_len: M.
            near: The neighbors.
            encoded_NSE: What the layer reads of them.
        """
        L, K, R = self.evidence_BLKR.shape[1:]
        row_N, chunk_N = near.chunk_N // L, near.chunk_N % L
        place_NT = slot_BT[row_N] - (chunk_N[:, None] + 1) * chunk_len + 1
        evidence_NS = self.evidence_BLKR.flatten(0, 1)[near.chunk_N].flatten(1)
        right_NTS = evidence_NS[:, None] & (near.tokens_NKR.flatten(1)[:, None] == self.targets_BT[row_N][..., None])
        counts_NT = self.loss_BT[row_N] & (place_NT >= 0) & (place_NT < chunk_len) & right_NTS.any(dim=2)
        at_NT = place_NT.clamp(0, chunk_len - 1) + chunk_len - 1
        own = Places.of(at_NT, chunk_len - 1, 2 * chunk_len - 2, cca, normed_BTD.dtype)
        keys = Places.range(0, R, cca, encoded_NSE, repeat=K)
        keep_NS = near.keep_NKR.flatten(1)
        weights_NHTS = cca.weights(normed_BTD[row_N], own, encoded_NSE, keys, keep_NS, torch.float32)
        share_NT = (weights_NHTS * right_NTS[:, None]).sum(dim=-1).mean(dim=1)
        nats_NT = -share_NT.clamp_min(1e-9).log()
        self.losses.append(nats_NT.masked_fill(~counts_NT, 0.0).sum())

    def loss(self) -> Tensor:
        """Mean over the layers."""
        return torch.stack(self.losses).mean() if self.losses else self.targets_BT.new_zeros((), dtype=torch.float32)


class View(Protocol):
    """What a layer sees beyond its own slots."""

    pointing: Pointing | None
    """Takes down where CCA looks, where training asks for it."""

    def self_attend(self, layer: int, attention: Attention, normed_BTD: Tensor) -> Tensor:
        """The result of a layer's self-attention [B, T, D]."""
        ...

    def read(self, x_BTD: Tensor) -> None:
        """At layer min(P), between self-attention and CCA: encodes the neighbors in the light of these activations."""
        ...

    def cross_attend(self, cca: Attention, normed_BTD: Tensor) -> Tensor | None:
        """The result of a layer's CCA [B, T, D]; None where no slot has neighbors."""
        ...

    def point(self, cca: Attention, normed_BTD: Tensor) -> None:
        """Tells `pointing` where a layer's CCA looks."""
        ...


# --- whole sequences ----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class WholeChunks:
    """View of sequences of whole chunks that are there from the beginning.

    Chunk u ends at slot (u+1)M - 1; that slot and the next M - 1 are the queries of its neighbors. Shifted by M - 1 they
    are a grid of their own: row u, place i is slot (u+1)M - 1 + i.
    """

    model: Reader
    keep_BT: Tensor
    document_BL: Tensor | None
    neighbors_BLKR: Tensor | None
    keep_BLKR: Tensor | None
    mask: CausalMask | None = None
    """None where self-attention is not asked for here."""
    places: Places | None = None
    near: Neighborhood | None = None
    sees_NM: Tensor | None = None
    """True where the query at that place of the shifted grid may see the neighbors of its row."""
    encoded_NSE: Tensor | None = None
    cca_places: tuple[Places, Places] | None = None
    pointing: Pointing | None = None

    def point(self, cca: Attention, normed_BTD: Tensor) -> None:
        """See View."""
        if self.pointing is not None and self.near is not None and self.encoded_NSE is not None:
            slot_BT = torch.arange(normed_BTD.shape[1], device=normed_BTD.device).expand(normed_BTD.shape[:2])
            self.pointing.add(cca, normed_BTD, slot_BT, self.model.chunk_len, self.near, self.encoded_NSE)

    def self_attend(self, _layer: int, attention: Attention, normed_BTD: Tensor) -> Tensor:
        """See View."""
        assert self.mask is not None
        if self.places is None:
            self.places = Places.range(0, normed_BTD.shape[1], attention, normed_BTD)
        q_BHTC = attention.queries(normed_BTD, self.places)
        k_BHTC, v_BHTC = attention.keys_values(normed_BTD, self.places)
        bias = attention.bias(q_BHTC, self.places, self.places, causal=True)
        return attention.merge(self.mask.attend(q_BHTC, k_BHTC, v_BHTC, bias))

    def read(self, x_BTD: Tensor) -> None:
        """See View."""
        if self.neighbors_BLKR is None or self.keep_BLKR is None:
            return
        B, T, D = x_BTD.shape
        M = self.model.chunk_len
        L = T // M
        near = Neighborhood.of(self.neighbors_BLKR, self.keep_BLKR, every=self.model.every_chunk)
        if near.chunk_N.numel() == 0:
            return
        # The shifted grid of what queries may see: they hold a token and, but for a chunk's own last one, lie in the next chunk,
        # which must be of the same document.
        sees_BLM = F.pad(self.keep_BT, (1 - M, M - 1)).view(B, L, M)
        if self.document_BL is not None:
            same_BL = F.pad(self.document_BL[:, 1:] == self.document_BL[:, :-1], (0, 1))
            own_M = torch.arange(M, device=x_BTD.device) == 0
            sees_BLM = sees_BLM & (same_BL[..., None] | own_M)
        self.near = near
        self.sees_NM = sees_BLM.view(B * L, M)[near.chunk_N]
        hidden_NMD = x_BTD.view(B * L, M, D)[near.chunk_N]
        encoded_NKRE = self.model.encode(near, hidden_NMD, self.keep_BT.reshape(B * L, M)[near.chunk_N])
        self.encoded_NSE = encoded_NKRE.flatten(1, 2)

    def cross_attend(self, cca: Attention, normed_BTD: Tensor) -> Tensor | None:
        """See View."""
        if self.near is None or self.encoded_NSE is None or self.sees_NM is None:
            return None
        B, T, D = normed_BTD.shape
        M = self.model.chunk_len
        chunk_N, _, keep_NKR = self.near
        if self.cca_places is None:
            self.cca_places = _cca_places(M, keep_NKR, cca, normed_BTD)
        shifted_NMD = F.pad(normed_BTD, (0, 0, 1 - M, M - 1)).view(-1, M, D)[chunk_N]
        kv_NHSC = cca.keys_values(self.encoded_NSE, self.cca_places[1])
        y_NMD = _cross(cca, shifted_NMD, kv_NHSC, self.cca_places, self.sees_NM, keep_NKR.flatten(1))
        grid_BTD = torch.zeros_like(normed_BTD).view(-1, M, D).index_copy(0, chunk_N, y_NMD.to(normed_BTD.dtype))
        return F.pad(grid_BTD.view(B, T, D), (0, 0, M - 1, 1 - M))


def _cca_places(M: int, keep_NKR: Tensor, cca: Attention, like: Tensor) -> tuple[Places, Places]:
    """Places of CCA's queries and keys: query i (from 0) stands at i + M - 1, a neighbor's token at its own place.

    That is the paper's distance; alike for all K neighbors, so that their order is nothing.
    """
    _, K, R = keep_NKR.shape
    return Places.range(M - 1, 2 * M - 1, cca, like), Places.range(0, R, cca, like, repeat=K)


def _cross(
    cca: Attention,
    queries_NMD: Tensor,
    kv_NHSC: KeysValues,
    places: tuple[Places, Places],
    sees_NM: Tensor,
    keep_NS: Tensor,
) -> Tensor:
    """CCA of queries that see the keys of their row: [N, M, D], exactly zero where `sees_NM` is False."""
    q_NHMC = cca.queries(queries_NMD, places[0])
    keep_N1MS = sees_NM[:, None, :, None] & keep_NS[:, None, None, :]
    return cca.merge(attend(q_NHMC, *kv_NHSC, keep_N1MS, cca.bias(q_NHMC, *places)))


# --- decoding -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class ChunkCache:
    """What CCA needs of the past: the newest finished chunk's neighbors, and the activations of the chunk that is not finished.

    Rows stand at places of their own. Its size does not grow with the sequence.
    """

    slot_B: Tensor
    """The next slot of each row: int64, on the model's device."""
    hidden_BMD: Tensor | None = None
    """Activations at layer min(P) of the unfinished chunk, and one place more that nobody reads [B, M + 1, D]."""
    keep_BM: Tensor | None = None
    """True where that chunk holds a token so far."""
    kv: list[KeysValues] = field(default_factory=list)
    """Per layer of P, keys and values of the newest finished chunk's neighbors [B, H, S, C]."""
    keep_BS: Tensor | None = None
    """True where such a key stands for a token."""
    at_BS: Tensor | None = None
    """Its place in its neighbor."""

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> "ChunkCache":
        """Of rows that have no slot yet."""
        return cls(torch.zeros(rows, dtype=torch.long, device=device))

    def select(self, index_B: Tensor) -> None:
        """Takes rows, in an order, some perhaps more than once."""
        self._map(lambda x, _: x[index_B])

    def join(self, other: "ChunkCache") -> None:
        """Adds the rows of another cache of the same network below."""
        if self.keep_BS is not None and other.keep_BS is not None:
            S = max(self.keep_BS.shape[1], other.keep_BS.shape[1])
            self._widen(S)
            other._widen(S)
        theirs = other._all()
        self._map(lambda x, name: torch.cat([x, theirs[name]]))

    def crop(self, count: int, chunk_len: int) -> None:
        """Takes back the last `count` slots of every row.

        Raises:
            ConfigError: They reach back beyond the chunk that is not finished.
        """
        place_B = self.slot_B % chunk_len
        if bool((place_B < count).any()):
            raise ConfigError(
                f"{count} slots cannot be taken back across a chunk border: row {int(place_B.argmin())} holds "
                f"{int(place_B.min())} since its last one, and the neighbors before it are gone"
            )
        self.slot_B = self.slot_B - count
        if self.keep_BM is not None:
            at_M = torch.arange(chunk_len, device=self.slot_B.device)
            self.keep_BM = self.keep_BM & (at_M < (place_B - count)[:, None])

    def _widen(self, S: int) -> None:
        if self.keep_BS is not None and self.at_BS is not None:
            self.kv = [(_padded(k, S, 2), _padded(v, S, 2)) for k, v in self.kv]
            self.keep_BS, self.at_BS = _padded(self.keep_BS, S, 1), _padded(self.at_BS, S, 1)

    def _all(self) -> dict[str, Tensor]:
        named = {name: getattr(self, name) for name in ("slot_B", "hidden_BMD", "keep_BM", "keep_BS", "at_BS")}
        for layer, (k, v) in enumerate(self.kv):
            named |= {f"k{layer}": k, f"v{layer}": v}
        return {name: x for name, x in named.items() if x is not None}

    def _map(self, function: Callable[[Tensor, str], Tensor]) -> None:
        made = {name: function(x, name) for name, x in self._all().items()}
        self.kv = [(made.pop(f"k{layer}"), made.pop(f"v{layer}")) for layer in range(len(self.kv))]
        for name, x in made.items():
            setattr(self, name, x)


def _padded(x: Tensor, size: int, axis: int) -> Tensor:
    """Zeros (False) added at the end of an axis."""
    shape = list(x.shape)
    shape[axis] = size - shape[axis]
    return x if shape[axis] == 0 else torch.cat([x, x.new_zeros(shape)], dim=axis)


@dataclass(slots=True)
class Cache:
    """What decoding more slots needs: keys and values of self-attention, and what CCA needs.

    Start with `Cache()`; `Retro.hidden` fills it. Each call adds columns, in which a row may have a token or not.
    """

    length: int = 0
    """Columns so far."""
    keys_values: list[KeysValues] = field(default_factory=list)
    """Per decoder layer, [B, H, capacity, C] each; the first `length` columns are valid."""
    keep_BT: Tensor | None = None
    """Which columns hold a token [B, length]."""
    at_BT: Tensor | None = None
    """The slots they stand at."""
    full: bool = True
    """Whether every column of every row holds a token."""
    chunk: ChunkCache | None = None

    def append(self, layer: int, k_BHTC: Tensor, v_BHTC: Tensor) -> KeysValues:
        """Adds the new columns of one layer; returns the keys and values of all so far."""
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

    def append_places(self, keep_BT: Tensor, slot_BT: Tensor) -> None:
        """Adds what the new columns hold; comes before `append`, and `length` is raised at the end."""
        self.full = self.full and bool(keep_BT.all())
        old_keep, old_at = self.keep_BT, self.at_BT
        self.keep_BT = keep_BT if old_keep is None else torch.cat([old_keep[:, : self.length], keep_BT], dim=1)
        self.at_BT = slot_BT if old_at is None else torch.cat([old_at[:, : self.length], slot_BT], dim=1)

    def select(self, index_B: Tensor) -> None:
        """Takes rows, in an order, some perhaps more than once."""
        self.keys_values = [(k[index_B], v[index_B]) for k, v in self.keys_values]
        self.keep_BT = None if self.keep_BT is None else self.keep_BT[index_B]
        self.at_BT = None if self.at_BT is None else self.at_BT[index_B]
        if self.chunk is not None:
            self.chunk.select(index_B)
        self._trim()

    def _trim(self) -> None:
        """Drops the columns in front that no row uses any more."""
        if self.keep_BT is None or self.at_BT is None or self.full:
            return
        used_T = self.keep_BT.any(dim=0)
        start = int(used_T.int().argmax())
        if start:
            self.keys_values = [
                (k[:, :, start : self.length], v[:, :, start : self.length]) for k, v in self.keys_values
            ]
            self.keep_BT, self.at_BT = self.keep_BT[:, start:], self.at_BT[:, start:]
            self.length -= start
        self.full = bool(self.keep_BT.all())

    def join(self, other: "Cache") -> None:
        """Adds the rows of another cache of the same network below; the shorter one gets empty columns in front."""
        if other.chunk is None or other.keep_BT is None or other.at_BT is None:
            return
        if self.chunk is None or self.keep_BT is None or self.at_BT is None:
            self.length, self.keys_values = other.length, other.keys_values
            self.keep_BT, self.at_BT, self.full, self.chunk = other.keep_BT, other.at_BT, other.full, other.chunk
            return
        length = max(self.length, other.length)
        pairs = zip(self.keys_values, other.keys_values, strict=True)

        def joined(a: Tensor, b: Tensor, axis: int) -> Tensor:
            a, b = a.narrow(axis, 0, self.length), b.narrow(axis, 0, other.length)
            return torch.cat([_padded_front(a, length, axis), _padded_front(b, length, axis)])

        self.keys_values = [(joined(k, k2, 2), joined(v, v2, 2)) for (k, v), (k2, v2) in pairs]
        self.keep_BT, self.at_BT = joined(self.keep_BT, other.keep_BT, 1), joined(self.at_BT, other.at_BT, 1)
        self.full = self.full and other.full and self.length == other.length
        self.length = length
        self.chunk.join(other.chunk)

    def crop(self, count: int, chunk_len: int) -> None:
        """Takes back the last `count` columns, in each of which every row holds a token.

        Raises:
            ConfigError: They reach back beyond the chunk that is not finished.
        """
        if self.chunk is not None and self.keep_BT is not None and self.at_BT is not None:
            self.chunk.crop(count, chunk_len)
            self.length -= count
            self.keep_BT, self.at_BT = self.keep_BT[:, : self.length], self.at_BT[:, : self.length]


def _padded_front(x: Tensor, size: int, axis: int) -> Tensor:
    shape = list(x.shape)
    shape[axis] = size - shape[axis]
    return torch.cat([x.new_zeros(shape), x], dim=axis)


def _grown(x_BHTC: Tensor, length: int) -> Tensor:
    """A copy with room for at least `length` columns, and for half as many again."""
    B, H, T, C = x_BHTC.shape
    grown = x_BHTC.new_zeros(B, H, length + length // 2 + 16, C)
    grown[:, :, :T] = x_BHTC
    return grown


@dataclass(slots=True)
class Continuation:
    """View of columns that come after those of a cache; every row stands at a place of its own.

    The first of a row's L chunks here is the one that was not finished.
    """

    model: Reader
    chunk: ChunkCache
    keep_BT: Tensor
    slot_BT: Tensor
    first_B: Tensor
    """The first of the L chunks: the unfinished one, or that of a new row's first token; 0 for a grid."""
    next_B: Tensor
    """Each row's next slot after these columns."""
    neighbors_BLKR: Tensor | None
    keep_BLKR: Tensor | None
    cache: Cache | None = None
    """None where self-attention is not asked for here."""
    places: Places | None = None
    begun: tuple[Tensor, Tensor] | None = None
    """`keep_BS` and `at_BS` of the cache when these columns began."""
    num_chunks: int = 1
    """L."""
    near: Neighborhood | None = None
    encoded_NSE: Tensor | None = None
    newest: tuple[Tensor, Tensor] | None = None
    """Which of the N chunks are the newest finished one of their row [N], and these rows."""
    cca_places: tuple[Places, Places] | None = None
    cached: tuple[Places, Places, Tensor, bool] | None = None
    """Of `_cached`: places of queries and keys, which query sees which key, and whether every one sees every one."""
    cca_layer: int = 0
    pointing: Pointing | None = None

    def point(self, cca: Attention, normed_BTD: Tensor) -> None:
        """See View; rows are new ones that begin in their first chunk."""
        if self.pointing is not None and self.near is not None and self.encoded_NSE is not None:
            slot_BT = self.slot_BT - self.first_B[:, None] * self.model.chunk_len
            self.pointing.add(cca, normed_BTD, slot_BT, self.model.chunk_len, self.near, self.encoded_NSE)

    @classmethod
    def into(
        cls,
        model: Reader,
        cache: Cache,
        keep_BT: Tensor,
        slot_BT: Tensor | None,
        neighbors_BLKR: Tensor | None,
        keep_BLKR: Tensor | None,
    ) -> "Continuation":
        """Begins, and enters what the columns hold into a cache, new or filled; the arguments are those of `Retro.hidden`."""
        if cache.chunk is None:
            cache.chunk = ChunkCache.empty(len(keep_BT), keep_BT.device)
        view = cls.of(model, cache.chunk, keep_BT, slot_BT, neighbors_BLKR, keep_BLKR, cache)
        cache.append_places(keep_BT, view.slot_BT)
        return view

    @classmethod
    def of(
        cls,
        model: Reader,
        chunk: ChunkCache,
        keep_BT: Tensor,
        slot_BT: Tensor | None,
        neighbors_BLKR: Tensor | None,
        keep_BLKR: Tensor | None,
        cache: Cache | None = None,
    ) -> "Continuation":
        """Begins beside whoever keeps self-attention's keys and values; see `into`."""
        B, T = keep_BT.shape
        fresh = chunk.hidden_BMD is None and not (cache is not None and cache.length)
        first_B = chunk.slot_B // model.chunk_len
        if slot_BT is None and fresh:
            slot_BT = torch.arange(T, device=keep_BT.device).expand(B, T)
            next_B = torch.full_like(chunk.slot_B, T)
        else:
            if slot_BT is None:
                slot_BT = chunk.slot_B[:, None] + keep_BT.cumsum(1) - 1
            next_B = torch.where(keep_BT, slot_BT + 1, chunk.slot_B[:, None]).amax(dim=1)
            first_B = torch.where(keep_BT, slot_BT, next_B[:, None]).amin(dim=1) // model.chunk_len
        slot_BT = slot_BT.masked_fill(~keep_BT, 0)
        return cls(model, chunk, keep_BT, slot_BT, first_B, next_B, neighbors_BLKR, keep_BLKR, cache)

    def self_attend(self, layer: int, attention: Attention, normed_BTD: Tensor) -> Tensor:
        """See View."""
        assert self.cache is not None
        assert self.cache.keep_BT is not None
        assert self.cache.at_BT is not None
        T = self.keep_BT.shape[1]
        if self.places is None:
            high = 0 if attention.positions == "rotary" else int(self.cache.at_BT.max())
            self.places = Places.of(self.slot_BT, 0, high, attention, normed_BTD.dtype)
        q_BHTC = attention.queries(normed_BTD, self.places)
        k_BHSC, v_BHSC = self.cache.append(layer, *attention.keys_values(normed_BTD, self.places))
        if self.cache.full and T == 1 and attention.positions == "rotary":
            return attention.merge(F.scaled_dot_product_attention(q_BHTC, k_BHSC, v_BHSC))
        keep_B1TS = self.cache.keep_BT[:, None, None, :] & self.keep_BT[:, None, :, None]
        if T > 1:
            S = self.cache.keep_BT.shape[1]
            keep_B1TS = keep_B1TS & torch.ones(T, S, dtype=torch.bool, device=q_BHTC.device).tril(S - T)
        bias = None
        if attention.positions == "relative":
            keys = Places(self.cache.at_BT, None, None, 0, self.places.high)
            bias = attention.bias(q_BHTC, self.places, keys, causal=True)
        return attention.merge(attend(q_BHTC, k_BHSC, v_BHSC, keep_B1TS, bias))

    def read(self, x_BTD: Tensor) -> None:
        """See View; leaves the cache as the next call needs it, but for the keys and values."""
        B, T, D = x_BTD.shape
        M = self.model.chunk_len
        chunk = self.chunk
        if chunk.hidden_BMD is None or chunk.keep_BM is None or chunk.keep_BS is None or chunk.at_BS is None:
            chunk.hidden_BMD = x_BTD.new_zeros(B, M + 1, D)
            chunk.keep_BM = torch.zeros(B, M, dtype=torch.bool, device=x_BTD.device)
            chunk.keep_BS = torch.zeros(B, 0, dtype=torch.bool, device=x_BTD.device)
            chunk.at_BS = torch.zeros(B, 0, dtype=torch.long, device=x_BTD.device)
        done_B = self.next_B // M - self.first_B
        self.begun = chunk.keep_BS, chunk.at_BS
        self.num_chunks = L = 1 if T == 1 else int(done_B.max()) + 1
        # Columns onto a grid of L chunks; those without a token go to a place behind it that nobody reads.
        place_BT = (self.slot_BT - self.first_B[:, None] * M).masked_fill(~self.keep_BT, L * M)
        hidden = chunk.hidden_BMD.to(x_BTD.dtype)
        if L > 1:
            hidden = torch.cat([hidden[:, :M], hidden.new_zeros(B, (L - 1) * M + 1, D)], dim=1)
        if L == 1 and torch.is_inference_mode_enabled() and hidden.is_inference():
            hidden.scatter_(1, place_BT[..., None].expand(B, T, D), x_BTD)
        else:
            hidden = hidden.scatter(1, place_BT[..., None].expand(B, T, D), x_BTD)
        keep = F.pad(chunk.keep_BM, (0, (L - 1) * M + 1)).scatter(1, place_BT, self.keep_BT)[:, :-1]
        if self.neighbors_BLKR is not None and self.keep_BLKR is not None:
            self._encode(hidden, keep, done_B)
        self._replace_keys(done_B > 0)
        # The chunk that is not finished now; a row that stands on a border has none.
        if L > 1:
            row_B11 = done_B.clamp(max=L - 1)[:, None, None]
            hidden = hidden[:, :-1].view(B, L, M * D).gather(1, row_B11.expand(B, 1, M * D)).view(B, M, D)
            hidden = F.pad(hidden, (0, 0, 0, 1))
            keep = keep.view(B, L, M).gather(1, row_B11.expand(B, 1, M))[:, 0]
        chunk.hidden_BMD = hidden
        chunk.keep_BM = keep & (self.next_B % M > 0)[:, None]
        chunk.slot_B = self.next_B

    def _encode(self, hidden: Tensor, keep: Tensor, done_B: Tensor) -> None:
        """Reads the neighbors of the chunks that these columns finish; `hidden` [B, L*M + 1, D], `keep` [B, L*M]."""
        assert self.neighbors_BLKR is not None
        assert self.keep_BLKR is not None
        B, L, M = len(done_B), self.num_chunks, self.model.chunk_len
        # The last chunk, when it is not finished here, need not be given.
        neighbors_BLKR = _padded(self.neighbors_BLKR[:, :L], L, 1)
        done_BL = torch.arange(L, device=done_B.device) < done_B[:, None]
        keep_BLKR = _padded(self.keep_BLKR[:, :L], L, 1) & done_BL[:, :, None, None]
        near = Neighborhood.of(neighbors_BLKR, keep_BLKR)
        if near.chunk_N.numel() == 0:
            return
        hidden_NMD = hidden[:, :-1].reshape(B * L, M, -1)[near.chunk_N]
        encoded_NKRE = self.model.encode(near, hidden_NMD, keep.reshape(B * L, M)[near.chunk_N])
        self.near, self.encoded_NSE = near, encoded_NKRE.flatten(1, 2)
        row_N = near.chunk_N // L
        newest_N = near.chunk_N % L == done_B[row_N] - 1
        self.newest = newest_N, row_N[newest_N]

    def _replace_keys(self, ended_B: Tensor) -> None:
        """Rows that finish a chunk here forget the neighbors of the one before."""
        chunk = self.chunk
        assert self.begun is not None
        keep_BS, at_BS = self.begun
        if self.near is None:
            if keep_BS.shape[1]:
                chunk.keep_BS = keep_BS & ~ended_B[:, None]
            return
        keep_NKR = self.near.keep_NKR
        _, K, R = keep_NKR.shape
        at_NS = torch.arange(R, device=at_BS.device).repeat(K).expand(len(keep_NKR), K * R)
        chunk.keep_BS = self._replaced(keep_BS, keep_NKR.flatten(1), ended_B, 1)
        chunk.at_BS = self._replaced(at_BS, at_NS, ended_B, 1)

    def _replaced(self, old: Tensor, fresh: Tensor, ended_B: Tensor, axis: int) -> Tensor:
        """Per row: what is fresh of its newest finished chunk, nothing where that has no neighbors, the old where none ended."""
        assert self.newest is not None
        newest_N, row_N = self.newest
        size = max(old.shape[axis], fresh.shape[axis])
        base = _padded(old, size, axis)
        base = base.masked_fill(ended_B.view(-1, *[1] * (base.ndim - 1)), 0)
        return base.index_copy(0, row_N, _padded(fresh[newest_N], size, axis).to(base.dtype))

    def cross_attend(self, cca: Attention, normed_BTD: Tensor) -> Tensor | None:
        """See View."""
        chunk, layer = self.chunk, self.cca_layer
        self.cca_layer += 1
        assert self.begun is not None
        assert chunk.keep_BS is not None
        assert chunk.at_BS is not None
        if layer == len(chunk.kv):
            B = len(normed_BTD)
            none = normed_BTD.new_zeros(B, cca.num_heads, 0, cca.head_dim)
            chunk.kv.append((none, none))
        old_kv, fresh_kv = chunk.kv[layer], None
        if self.near is not None and self.encoded_NSE is not None:
            if self.cca_places is None:
                self.cca_places = _cca_places(self.model.chunk_len, self.near.keep_NKR, cca, normed_BTD)
            fresh_kv = cca.keys_values(self.encoded_NSE, self.cca_places[1])
            ended_B = self.next_B // self.model.chunk_len > self.first_B
            chunk.kv[layer] = (
                self._replaced(old_kv[0], fresh_kv[0], ended_B, 2),
                self._replaced(old_kv[1], fresh_kv[1], ended_B, 2),
            )
        if chunk.keep_BS.shape[1] == 0:
            return None
        if normed_BTD.shape[1] == 1:
            return self._cached(cca, normed_BTD, chunk.kv[layer], chunk.keep_BS, chunk.at_BS, self.keep_BT)
        # Chunk of each query, counted from the unfinished one at the beginning; -1 is the newest that was finished before.
        M = self.model.chunk_len
        owner_BT = (self.slot_BT + 1) // M - 1 - self.first_B[:, None]
        y_BTD = self._cached(cca, normed_BTD, old_kv, *self.begun, self.keep_BT & (owner_BT < 0))
        return y_BTD if fresh_kv is None else y_BTD + self._fresh(cca, normed_BTD, fresh_kv, owner_BT)

    def _cached(
        self, cca: Attention, normed_BTD: Tensor, kv: KeysValues, keep_BS: Tensor, at_BS: Tensor, sees_BT: Tensor
    ) -> Tensor:
        """CCA to one chunk's neighbors per row."""
        if keep_BS.shape[1] == 0:
            return torch.zeros_like(normed_BTD)
        M = self.model.chunk_len
        if self.cached is None:
            at = Places.of((self.slot_BT + 1) % M + M - 1, M - 1, 2 * M - 2, cca, normed_BTD.dtype)
            high = int(at_BS.max()) if cca.positions == "relative" else 0
            keep_B1TS = sees_BT[:, None, :, None] & keep_BS[:, None, None, :]
            self.cached = (at, Places(at_BS, None, None, 0, high), keep_B1TS, bool(keep_B1TS.all()))
        at, keys, keep_B1TS, whole = self.cached
        q_BHTC = cca.queries(normed_BTD, at)
        if whole and cca.positions != "relative":
            return cca.merge(F.scaled_dot_product_attention(q_BHTC, *kv))
        return cca.merge(attend(q_BHTC, *kv, keep_B1TS, cca.bias(q_BHTC, at, keys)))

    def _fresh(self, cca: Attention, normed_BTD: Tensor, kv_NHSC: KeysValues, owner_BT: Tensor) -> Tensor:
        """CCA to the neighbors of chunks that ended in these columns, on the shifted grid of those chunks."""
        assert self.near is not None
        assert self.cca_places is not None
        B, T, D = normed_BTD.shape
        L, M = self.num_chunks, self.model.chunk_len
        sees_BT = self.keep_BT & (owner_BT >= 0)
        place_BT = (owner_BT * M + (self.slot_BT + 1) % M).masked_fill(~sees_BT, L * M)
        index_BTD = place_BT[..., None].expand(B, T, D)
        grid = normed_BTD.new_zeros(B, L * M + 1, D).scatter(1, index_BTD, normed_BTD)
        sees = torch.zeros(B, L * M + 1, dtype=torch.bool, device=grid.device).scatter(1, place_BT, sees_BT)
        chunk_N, _, keep_NKR = self.near
        queries_NMD = grid[:, :-1].reshape(B * L, M, D)[chunk_N]
        sees_NM = sees[:, :-1].reshape(B * L, M)[chunk_N]
        y_NMD = _cross(cca, queries_NMD, kv_NHSC, self.cca_places, sees_NM, keep_NKR.flatten(1))
        grid = grid.new_zeros(B * L, M, D).index_copy(0, chunk_N, y_NMD.to(grid.dtype)).view(B, L * M, D)
        return F.pad(grid, (0, 0, 0, 1)).gather(1, index_BTD)
