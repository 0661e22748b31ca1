"""Batches out of training data. The position in training is one number, so nothing else need be saved to go on.

Letters as in model.py; besides, D documents of a split.

An epoch is a stream of chunks: the split's documents in an order of its own, each on its grid (its lead of empty slots, BOS, the
tokens; the last chunk perhaps partial). Every L chunks of the stream are a sequence; a long document goes on in the next one, and
the last sequence of an epoch is filled with empty chunks. Sequences are counted through all epochs from 0, and everything random is
a function of the seed, the epoch and the sequence.

Memory grows with the number of documents, never with that of tokens: those are read through memory maps.
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retro.chunks import SPLITS, Int64s, TrainingData
from retro.config import NeighborPart
from retro.errors import ConfigError

Retrieval = Literal["on", "off", "shuffled"]
Bools = NDArray[np.bool_]

# The last number of a generator's seed: what it draws.
_DROPOUT, _SHUFFLE, _COPY = 1, 2, 3
_TRIES = 32
"""Random draws of a chunk with other neighbors, before all chunks are searched for one."""
_BLOCK = 1 << 14
"""Chunks looked at in one go in that search."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences of a model's input, and what it is to predict."""

    inputs_BT: Tensor
    """Token ids, int64; 0 in empty slots. EOS is never one of them."""
    targets_BT: Tensor
    """The next token of the same document, int64; EOS after its last one; 0 in empty slots."""
    keep_BT: Tensor
    """True where a slot holds a token."""
    loss_BT: Tensor
    """True where the target counts: in every slot that holds a token."""
    document_BL: Tensor
    """Number of each chunk's document in the training data, int64; -1 for empty chunks."""
    neighbors_BLKR: Tensor | None
    """Token ids of the chunks' neighbors, int64; None: retrieval is off."""
    keep_BLKR: Tensor | None
    """True where a neighbor has a token; all False for a neighbor that is missing."""
    slot_BT: Tensor | None = None
    """Slot of each column, int64, where the columns are not the slots of whole chunks."""
    evidence_BLKR: Tensor | None = None
    """True where a neighbor's token belongs to an answer that stands in it; of questions whose model is trained to look there."""

    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by name."""
        return {name: value for name in _BATCH_FIELDS if (value := getattr(self, name)) is not None}

    def to(self, device: torch.device | str) -> "Batch":
        """The same on a device; a batch that is pinned is copied while other work goes on."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=tensor.is_pinned()))

    def pinned(self) -> "Batch":
        """The same in memory that a GPU copies from directly."""
        return self._mapped(Tensor.pin_memory)

    def chosen(self, rows_B: Tensor) -> "Batch":
        """Some of the sequences, in the order given."""
        return self._mapped(lambda tensor: tensor[rows_B])

    @staticmethod
    def joined(batches: "list[Batch]") -> "Batch":
        """The sequences of batches that have the same tensors, one after the other."""
        columns = ([getattr(batch, name) for batch in batches] for name in _BATCH_FIELDS)
        return Batch(*(None if column[0] is None else torch.cat(column) for column in columns))  # type: ignore[arg-type]

    def split(self, size: int) -> Iterator["Batch"]:
        """The same sequences in batches of `size`; the last may be smaller."""
        for first in range(0, len(self.inputs_BT), size):
            yield self._mapped(lambda tensor, first=first: tensor[first : first + size])  # type: ignore[misc]

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        values = (getattr(self, name) for name in _BATCH_FIELDS)
        return Batch(*(None if value is None else function(value) for value in values))  # type: ignore[arg-type]


_BATCH_FIELDS = tuple(field.name for field in fields(Batch))


@contextlib.contextmanager
def prefetched(batches: Iterable[Batch], *, depth: int, pin: bool = False) -> Iterator[Iterator[Batch]]:
    """Prepares batches in a thread while others are computed on; they are the same as without.

    Args:
        batches: Walked through by the thread, which ends with the context, whether all were taken or not.
        depth: Batches prepared ahead at most; 0 makes each when it is asked for, without a thread.
        pin: Whether to put them into pinned memory.

    Yields:
        The batches. An error of the thread is raised in place of the batch that it prevented.
    """
    made = (batch.pinned() if pin else batch for batch in batches)
    if depth == 0:
        yield made
        return
    ready: queue.SimpleQueue[Batch | BaseException | None] = queue.SimpleQueue()
    room = threading.Semaphore(depth)
    stopped = False

    def prepare() -> None:
        try:
            while room.acquire() and not stopped and (batch := next(made, None)) is not None:
                ready.put(batch)
            ready.put(None)
        except BaseException as error:
            ready.put(error)

    def taken() -> Iterator[Batch]:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            room.release()
            yield item

    thread = threading.Thread(target=prepare, name="prefetch", daemon=True)
    thread.start()
    try:
        yield taken()
    finally:
        stopped = True
        room.release()
        thread.join()


@dataclass(frozen=True, slots=True)
class _Epoch:
    """The stream of chunks of one epoch."""

    documents_D: Int64s
    """In their order."""
    first_chunk_D: Int64s
    """Where each begins in the stream, and the end [D + 1]."""


class Batches:
    """The sequences of one split of training data, by number."""

    def __init__(
        self,
        data: TrainingData,
        split: str,
        *,
        seq_len: int,
        num_neighbors: int,
        neighbor_len: int,
        seed: int,
        neighbor_part: NeighborPart = "both",
        permute: bool = True,
    ) -> None:
        """Lays out the split.

        Args:
            data: Training data, open.
            split: train, valid or test.
            seq_len: T, slots of a sequence.
            num_neighbors: K, the best neighbors that are used; 0 turns retrieval off.
            neighbor_len: R, tokens of a neighbor that are used.
            seed: Of the documents' order, the dropped, the shuffled and the copied neighbors.
            neighbor_part: "chunk" or "continuation" uses that part of the neighbors only; of a continuation, what the data holds.
            permute: False keeps the documents in their order in every epoch, for evaluation.

        Raises:
            ConfigError: `seq_len` is not whole chunks, the data holds fewer or shorter neighbors, or the split is empty.
        """
        M = data.chunk_len
        if seq_len < M or seq_len % M:
            raise ConfigError(
                f"seq_len = {seq_len} is no multiple of the {M} slots of a chunk in {data.folder}: "
                f"set it to {max(seq_len // M, 1) * M}"
            )
        if num_neighbors > data.num_neighbors:
            raise ConfigError(
                f"num_neighbors = {num_neighbors}, but {data.folder} holds {data.num_neighbors} for a chunk: "
                "set it lower, or make the data again with more (`retro data -k`)"
            )
        if num_neighbors and neighbor_len > data.neighbor_len:
            raise ConfigError(
                f"neighbor_len = {neighbor_len}, but the neighbors in {data.folder} are cut after "
                f"{data.neighbor_len} tokens: set it lower, or make the data again with longer ones"
            )
        if num_neighbors and neighbor_part != "both" and data.arrays.neighbor_chunk_lengths is None:
            raise ConfigError(
                f"neighbor_part = {neighbor_part!r}, but {data.folder} was made by an older version and does not say where the "
                "chunks of its neighbors end: make it again with `retro data`"
            )
        self._documents_D = data.documents(split)
        if len(self._documents_D) == 0:
            raise ConfigError(f"{data.folder} has no document in the split {split!r}")
        self.data = data
        self.split = split
        self.seq_len = seq_len
        self.num_neighbors = num_neighbors
        self.neighbor_len = neighbor_len
        self.seed = seed
        self._permute = permute
        self._chunks_D = np.diff(data.chunk_starts)[self._documents_D]
        """Chunks of each document of the split."""
        self._in_order = self._laid_out(np.arange(len(self._documents_D)))
        self._layouts: dict[int, _Epoch] = {}
        self._ids = np.asarray(data.arrays.ids)
        self._starts = np.asarray(data.arrays.starts)
        self._leads = np.asarray(data.arrays.leads)
        self._chunk_neighbors = np.asarray(data.arrays.neighbors)[:, :num_neighbors]
        self._part = neighbor_part
        stored = None if neighbor_part == "continuation" else neighbor_len
        self._neighbor_ids = np.asarray(data.arrays.neighbor_ids)[:, :stored]
        lengths = data.arrays.neighbor_chunk_lengths if neighbor_part == "chunk" else data.arrays.neighbor_lengths
        self._neighbor_ends = np.asarray(lengths)
        """Where the part that is used ends in each neighbor's tokens."""

    @property
    def chunks_per_epoch(self) -> int:
        """Chunks of the split, partial ones included."""
        return int(self._chunks_D.sum())

    @property
    def sequences_per_epoch(self) -> int:
        """Sequences that hold each chunk of the split once."""
        return -(-self.chunks_per_epoch * self.data.chunk_len // self.seq_len)

    def batch(
        self,
        first_sequence: int,
        size: int,
        *,
        neighbor_dropout: float = 0.0,
        copy_share: float = 0.0,
        neighbors: Retrieval = "on",
    ) -> Batch:
        """Some sequences; the same whenever they are asked for, and in whatever company.

        Args:
            first_sequence: Number of the first, counted through all epochs.
            size: B, how many; they may reach into the next epoch.
            neighbor_dropout: Share of the sequences, drawn at random, that have no neighbors.
            copy_share: Share of other sequences, in which every chunk that can have neighbors has itself and its true
                continuation in the place of one of them; those of a smaller share are among those of a larger one. The loss over
                such a batch says nothing about bits per byte.
            neighbors: "off": none at all. "shuffled": those of a chunk of another document, drawn from the split (from all of
                the data where the split has none to offer); a neighbor that is missing stays missing.

        Raises:
            ConfigError: There is no chunk of another document with as many neighbors to shuffle with, or continuations are asked
                for in what is held out.
        """
        if copy_share and self.split != "train":
            raise ConfigError(
                f"copy_share = {copy_share} in the split {self.split!r}: only training sequences are copied"
            )
        sequences_B = np.arange(first_sequence, first_sequence + size)
        document_BL, local_BL = self._placed(sequences_B)
        inputs_BT, targets_BT, keep_BT = self._tokens(document_BL, local_BL)
        neighbors_BLKR = keep_BLKR = None
        if neighbors != "off" and self.num_neighbors:
            rows_BL = np.where(document_BL >= 0, self.data.chunk_starts[document_BL] + local_BL, -1)
            chosen_BLK = self._chosen(rows_BL)
            copying = []
            for b, sequence in enumerate(sequences_B.tolist()):
                # From one end of the range come the sequences without neighbors, from the other those that copy.
                drawn = self._generator(sequence, _DROPOUT).random()
                if drawn < neighbor_dropout:
                    chosen_BLK[b] = -1
                elif drawn >= 1 - copy_share:
                    copying.append((b, self._generator(sequence, _COPY)))
                if neighbors == "shuffled":
                    chosen_BLK[b] = self._shuffled(document_BL[b], chosen_BLK[b], self._generator(sequence, _SHUFFLE))
            found_BLKR, there_BLKR = self._neighbor_tokens(chosen_BLK)
            for b, generator in copying:
                self._put_copies(document_BL[b], local_BL[b], found_BLKR[b], there_BLKR[b], generator)
            neighbors_BLKR, keep_BLKR = torch.from_numpy(found_BLKR), torch.from_numpy(there_BLKR)
        return Batch(
            inputs_BT=torch.from_numpy(inputs_BT),
            targets_BT=torch.from_numpy(targets_BT),
            keep_BT=torch.from_numpy(keep_BT),
            loss_BT=torch.from_numpy(keep_BT.copy()),
            document_BL=torch.from_numpy(document_BL),
            neighbors_BLKR=neighbors_BLKR,
            keep_BLKR=keep_BLKR,
        )

    def neighbors_of(self, document: int, chunk: int) -> list[list[int]]:
        """Tokens of the neighbors of one chunk, counted in its document; those that are there."""
        rows_1 = self.data.chunk_starts[document : document + 1] + chunk
        neighbors_1KR, keep_1KR = self._neighbor_tokens(self._chosen(rows_1))
        return [ids[keep].tolist() for ids, keep in zip(neighbors_1KR[0], keep_1KR[0], strict=True) if keep.any()]

    def _generator(self, sequence: int, purpose: int) -> np.random.Generator:
        epoch, place = divmod(sequence, self.sequences_per_epoch)
        return np.random.default_rng([self.seed, epoch, place, purpose])

    def _layout(self, epoch: int) -> _Epoch:
        """The stream of an epoch; the newest two are kept."""
        if not self._permute:
            return self._in_order
        if epoch not in self._layouts:
            order_D = np.random.default_rng([self.seed, epoch]).permutation(len(self._documents_D))
            while len(self._layouts) > 1:
                del self._layouts[next(iter(self._layouts))]
            self._layouts[epoch] = self._laid_out(order_D)
        return self._layouts[epoch]

    def _laid_out(self, order_D: Int64s) -> _Epoch:
        first_D = np.concatenate([np.zeros(1, np.int64), np.cumsum(self._chunks_D[order_D])])
        return _Epoch(self._documents_D[order_D], first_D)

    def _placed(self, sequences_B: Int64s) -> tuple[Int64s, Int64s]:
        """Document of each chunk of some sequences (-1: an empty chunk) and the chunk's number in it, both [B, L]."""
        L = self.seq_len // self.data.chunk_len
        epoch_B, place_B = np.divmod(sequences_B, self.sequences_per_epoch)
        stream_BL = place_B[:, None] * L + np.arange(L)
        document_BL = np.full(stream_BL.shape, -1, np.int64)
        local_BL = np.zeros(stream_BL.shape, np.int64)
        held_BL = stream_BL < self.chunks_per_epoch
        for epoch in np.unique(epoch_B).tolist():
            layout = self._layout(epoch)
            here_BL = held_BL & (epoch_B == epoch)[:, None]
            stream_N = stream_BL[here_BL]
            place_N = np.searchsorted(layout.first_chunk_D, stream_N, side="right") - 1
            document_BL[here_BL] = layout.documents_D[place_N]
            local_BL[here_BL] = stream_N - layout.first_chunk_D[place_N]
        return document_BL, local_BL

    def _tokens(self, document_BL: Int64s, local_BL: Int64s) -> tuple[Int64s, Int64s, Bools]:
        """Inputs, targets and which slots hold a token, all [B, T]."""
        B, _ = document_BL.shape
        M = self.data.chunk_len
        # A place is that of a token in its document; a lead puts the first slots before its beginning.
        place_BLM = (local_BL * M - self._leads[document_BL])[..., None] + np.arange(M)
        start_BL1 = self._starts[document_BL][..., None]
        length_BL1 = self._starts[document_BL + 1][..., None] - start_BL1
        keep_BLM = (place_BLM >= 0) & (place_BLM < length_BL1) & (document_BL >= 0)[..., None]
        next_BLM = keep_BLM & (place_BLM + 1 < length_BL1)
        inputs_BLM = np.zeros(place_BLM.shape, np.int64)
        inputs_BLM[keep_BLM] = self._ids[(start_BL1 + place_BLM)[keep_BLM]]
        targets_BLM = np.where(keep_BLM, self.data.tokenizer.eos_id, 0).astype(np.int64)
        targets_BLM[next_BLM] = self._ids[(start_BL1 + place_BLM + 1)[next_BLM]]
        T = self.seq_len
        return inputs_BLM.reshape(B, T), targets_BLM.reshape(B, T), keep_BLM.reshape(B, T)

    def _chosen(self, rows_BL: Int64s) -> Int64s:
        """Which neighbors the chunks of some rows have [..., K]; -1 where there is none, or no row."""
        chosen_BLK = np.full((*rows_BL.shape, self.num_neighbors), -1, np.int64)
        held_BL = rows_BL >= 0
        chosen_BLK[held_BL] = self._chunk_neighbors[rows_BL[held_BL]]
        return chosen_BLK

    def _neighbor_tokens(self, chosen_BLK: Int64s) -> tuple[Int64s, Bools]:
        """Tokens of the neighbors and which of them are there, [B, L, K, R]. A missing one is never looked up."""
        present_BLK = chosen_BLK >= 0
        chosen_P = chosen_BLK[present_BLK]
        R = self.neighbor_len
        ids_PR, place_PR = self._neighbor_ids[chosen_P], np.arange(R)[None]
        if self._part == "continuation":
            place_PR = place_PR + np.asarray(self.data.arrays.neighbor_chunk_lengths)[chosen_P][:, None]
            ids_PR = np.take_along_axis(ids_PR, np.minimum(place_PR, self.data.neighbor_len - 1), axis=1)
        keep_BLKR = np.zeros((*chosen_BLK.shape, R), np.bool_)
        keep_BLKR[present_BLK] = place_PR < self._neighbor_ends[chosen_P][:, None]
        neighbors_BLKR = np.zeros((*chosen_BLK.shape, R), np.int64)
        neighbors_BLKR[present_BLK] = ids_PR
        neighbors_BLKR[~keep_BLKR] = 0
        return neighbors_BLKR, keep_BLKR

    def _put_copies(
        self,
        document_L: Int64s,
        local_L: Int64s,
        neighbors_LKR: Int64s,
        keep_LKR: Bools,
        generator: np.random.Generator,
    ) -> None:
        """Puts the chunks of one sequence, each with what truly follows, into the place of one of their neighbors.

        A copy is the chunk and the next one of the document (the next one alone where only continuations are used), without BOS,
        cut after R tokens. It begins up to half a chunk earlier or later, because chunks of an index lie on a grid of their own: at
        a fixed distance the model would learn to count instead of looking for what it has just read. It never goes on beyond the
        next chunk, whose tokens are those that see it. A chunk that is not finished, or holds no text, cannot have neighbors.
        """
        M, R = self.data.chunk_len, self.neighbor_len
        skipped = M if self._part == "continuation" else 0
        earlier = max(min(M // 2, (R - M + skipped) // 2), 0)  # half of the room that is left for the continuation
        slot_L = generator.integers(self.num_neighbors, size=len(document_L))
        shift_L = generator.integers(-earlier, M // 2 + 1, size=len(document_L))
        # Places of tokens in their document, as in _tokens; BOS has the first.
        chunk_L = local_L * M - self._leads[document_L]
        start_L, length_L = self._starts[document_L], self._starts[document_L + 1] - self._starts[document_L]
        able_L = (document_L >= 0) & (chunk_L + M > 1) & (chunk_L + M <= length_L)
        place_LR = np.maximum(chunk_L + skipped + shift_L, 1)[:, None] + np.arange(R)
        held_LR = able_L[:, None] & (place_LR < np.minimum(chunk_L + 2 * M, length_L)[:, None])
        for chunk in np.flatnonzero(held_LR.any(axis=1)).tolist():
            held_R = held_LR[chunk]
            copy_R = np.zeros(R, np.int64)
            copy_R[held_R] = self._ids[start_L[chunk] + place_LR[chunk, held_R]]
            neighbors_LKR[chunk, slot_L[chunk]] = copy_R
            keep_LKR[chunk, slot_L[chunk]] = held_R

    def _shuffled(self, document_L: Int64s, chosen_LK: Int64s, generator: np.random.Generator) -> Int64s:
        """Gives each chunk of a sequence the neighbors of a chunk of another document that has all those it has.

        What the other chunk's neighbors are is not looked at: with very few documents one of them may by chance be a passage of
        the chunk's own document.
        """
        shuffled_LK = np.full_like(chosen_LK, -1)
        wanting_N = np.flatnonzero((chosen_LK >= 0).any(axis=1))
        layout = self._in_order
        for _ in range(_TRIES):
            if len(wanting_N) == 0:
                return shuffled_LK
            drawn_N = generator.integers(self.chunks_per_epoch, size=len(wanting_N))
            place_N = np.searchsorted(layout.first_chunk_D, drawn_N, side="right") - 1
            other_N = layout.documents_D[place_N]
            offered_NK = self._chosen(self.data.chunk_starts[other_N] + drawn_N - layout.first_chunk_D[place_N])
            needed_NK = chosen_LK[wanting_N] >= 0
            fits_N = (other_N != document_L[wanting_N]) & ((offered_NK >= 0) | ~needed_NK).all(axis=1)
            shuffled_LK[wanting_N[fits_N]] = np.where(needed_NK, offered_NK, -1)[fits_N]
            wanting_N = wanting_N[~fits_N]
        for chunk in wanting_N.tolist():
            needed_K = chosen_LK[chunk] >= 0
            shuffled_LK[chunk] = np.where(needed_K, self._searched(int(document_L[chunk]), needed_K, generator), -1)
        return shuffled_LK

    def _searched(self, document: int, needed_K: Bools, generator: np.random.Generator) -> Int64s:
        """Neighbors of the first chunk of another document, from a random one on, that has all of those needed."""
        N = len(self._chunk_neighbors)
        begin = int(generator.integers(N))
        for splits in ((SPLITS.index(self.split),), range(len(SPLITS))):
            for offset in range(0, N, _BLOCK):
                rows_N = (begin + np.arange(offset, min(offset + _BLOCK, N))) % N
                document_N = np.searchsorted(self.data.chunk_starts, rows_N, side="right") - 1
                offered_NK = self._chosen(rows_N)
                fits_N = (document_N != document) & ((offered_NK >= 0) | ~needed_K).all(axis=1)
                fits_N &= np.isin(self.data.arrays.splits[document_N], splits)
                if fits_N.any():
                    found_K: Int64s = offered_NK[np.argmax(fits_N)]
                    return found_K
        raise ConfigError(
            f"neighbors cannot be shuffled: no other document of {self.data.folder} has a chunk with {needed_K.sum()} "
            "neighbors; measure with retrieval on and off only, or make the data of more documents"
        )
