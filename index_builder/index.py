"""The vector index: choice, training, adding, tuning, search. The only importer of faiss.

Vectors of all rows are stored in float16. An exact index is nothing but these. An approximate one has inverted lists beside them,
in segments of consecutive rows, memory-mapped; rows after the last segment are searched exactly. Whatever finds the candidates,
they are scored again from the stored vectors: the score of a document depends neither on the kind of index nor on the others.
"""

import logging
import math
import mmap
import os
import struct
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from retro.artifact import storage_error, sync_folder, write_atomically
from retro.errors import ConfigError, DependencyError, FormatError

logger = logging.getLogger(__name__)
EXACT_BELOW = 50_000
"""Vectors below which the index is exact; and rows that a filter leaves below which these are searched exactly."""
TRAIN_PER_LIST = 64
"""Vectors per inverted list in the sample that trains it; FAISS warns below 39 and gains nothing above 256."""
MIN_TRAIN = 65_536
"""Vectors that train an index at least, where there are so many: quantizers need them."""
HNSW_FROM = 16_384
"""Lists from which on their centroids are found through a graph."""
PART_ROWS = 262_144
"""Rows that are added in one go, where there are not very many lists: bounds memory."""
ROWS_PER_LIST = 16
"""Rows of a part for each list at least: every part holds all centroids."""
DRAWN_BY_SHUFFLE = 1 << 26
"""Rows up to which the sample is drawn by shuffling all their numbers."""
FREE_LIMIT = 8 << 30
"""Bytes that an index takes where nobody says otherwise."""
RAM_COPY = 2 << 30
"""Bytes up to which vectors that are searched exactly are held as float32; beyond, they are read for every search."""
MARGIN = 16
"""Candidates of inverted lists beyond those wanted, because scores in float32 may swap neighbors."""
PART_BYTES = 400 << 20
"""Bytes of the lists of such a part at most; while they grow, FAISS holds up to twice as much."""
BLOCK_ROWS = 32_768
"""Rows that are compared at once in exact search."""
BLOCK_BYTES = 128 << 20
"""Bytes of the vectors that are read at once at most."""
OPQ_BYTES = 128 << 20
"""Bytes of the vectors that a rotation is learned from at most: FAISS holds five copies."""
MIN_OPQ = 10_000
"""Such vectors at least: 39 for each of 256 codes."""
BATCH = 256
"""Queries that are compared at once in exact search."""
MANY = 1 << 16
"""Candidates of a batch from which on exact scores decide between them."""
SCORED_AT_ONCE = 1 << 19
"""Numbers of stored vectors that a thread scores in one go."""
GPU_LIMIT = 2048
"""Candidates, and lists searched, of a query on a GPU at most."""
GPU_OWN = 3 << 29
"""Bytes of FAISS itself on each GPU."""
TRAINED = "trained.faiss"
Floats = NDArray[np.float32]
Rows = NDArray[np.int64]
Mask = NDArray[np.bool_]


class Vectors:
    """The stored vectors of all rows: shards of float16 [n, X], memory-mapped, in the order of rows."""

    def __init__(self, shards: Sequence[NDArray[np.float16]]) -> None:
        self._shards = list(shards)
        self._first = np.cumsum([0, *(len(shard) for shard in self._shards)])
        self.dim = int(self._shards[0].shape[1]) if self._shards else 0
        """X; 0 where there is no shard."""

    def __len__(self) -> int:
        return int(self._first[-1])

    def gather(self, rows: Rows) -> Floats:
        """Vectors of given rows, of any shape [..., X]; the rows must exist."""
        flat = np.asarray(rows, np.int64).reshape(-1)
        vectors_NX = np.empty((len(flat), self.dim), np.float32)
        order = np.argsort(flat, kind="stable")
        shards, starts = np.unique(np.searchsorted(self._first, flat[order], side="right") - 1, return_index=True)
        for shard, here in zip(shards.tolist(), np.split(order, starts)[1:], strict=True):
            vectors_NX[here] = self._shards[shard][flat[here] - self._first[shard]]
        return vectors_NX.reshape(*np.shape(rows), self.dim)

    def blocks(self, first: int = 0, end: int | None = None, max_rows: int = 65_536) -> Iterator[tuple[int, Floats]]:
        """The vectors of rows [first, end) in order, in blocks with their first row; what was read does not stay in memory."""
        end = len(self) if end is None else end
        max_rows = _rows_in(BLOCK_BYTES, 4 * self.dim, most=max_rows)
        while first < end:
            stop = min(first + max_rows, end)
            low = int(np.searchsorted(self._first, first, side="right")) - 1
            parts = []
            at = first
            while at < stop:
                shard, start = self._shards[low], int(self._first[low])
                part = shard[at - start : min(stop, int(self._first[low + 1])) - start]
                parts.append(np.asarray(part, np.float32))
                _forget(shard)
                at += len(part)
                low += 1
            yield first, parts[0] if len(parts) == 1 else np.concatenate(parts)
            first = stop


def _forget(shard: NDArray[Any]) -> None:
    """Lets the system take back the memory of a map that was read through."""
    mapped = getattr(shard, "_mmap", None)
    if mapped is not None and hasattr(mapped, "madvise"):
        mapped.madvise(mmap.MADV_DONTNEED)


def _rows_in(num_bytes: int, per_row: float, *, most: int) -> int:
    """Rows that so many bytes hold: one at least, and no more than `most`."""
    return max(1, min(most, int(num_bytes / max(per_row, 1))))


# --- which index ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexPlan:
    """Which index, and why."""

    factory: str
    """`Flat` for exact search, else for faiss.index_factory."""
    reason: str
    """A sentence for the user."""
    bytes_per_vector: float
    """Of what is searched; the stored float16 vectors come on top, on disk."""
    memory_bytes: int
    """Of what is searched, in all."""
    part_rows: int
    """Rows that are added in one go."""


def num_lists(num_vectors: int) -> int:
    """About 4 sqrt(n), a power of two."""
    return int(2 ** round(math.log2(4 * math.sqrt(max(num_vectors, 1)))))


def plan_index(
    num_vectors: int, dim: int, index_type: str = "auto", *, max_memory: int | None = None, recall: float = 0.95
) -> IndexPlan:
    """The rule: exact search below 50,000 vectors; above, the most accurate of inverted lists of whole vectors (in float16, as they
    are stored), of 8 bits a number, and of product codes of X/4, X/6, X/8, X/12, X/24 bytes, that fits into the memory allowed.

    Args:
        num_vectors: N.
        dim: X.
        index_type: `auto`, or a factory string of FAISS.
        max_memory: Bytes allowed; None allows 8 GiB.
        recall: Recall@10 that the index will be tuned to; product codes are not chosen for a perfect one.

    Raises:
        ConfigError: Nothing fits, or the factory string is unknown to FAISS or cannot be trained on so few vectors.
    """
    limit = FREE_LIMIT if max_memory is None else max_memory
    allowed = f"{_gib(limit)} are allowed"
    if index_type != "auto":
        plan = _planned(index_type, f"{index_type}, as asked for", num_vectors, dim)
        if max_memory is not None and plan.memory_bytes > limit:
            raise ConfigError(
                f"{index_type} takes {_gib(plan.memory_bytes)} for {num_vectors:,} vectors, {allowed} "
                f"({_gib(plan.memory_bytes - limit)} are missing): raise --max-memory or choose another --index-type"
            )
        return plan
    exact = _planned("Flat", "", num_vectors, dim)
    if num_vectors < EXACT_BELOW and exact.memory_bytes <= limit:
        reason = f"exact search: {num_vectors:,} vectors are fewer than {EXACT_BELOW:,}"
        return _planned("Flat", reason, num_vectors, dim)
    lists = min(num_lists(num_vectors), 2 ** int(math.log2(max(num_vectors / 39, 1))))
    coarse = f"IVF{lists}_HNSW32" if lists >= HNSW_FROM else f"IVF{lists}"
    kinds = [(f"{coarse},SQfp16", "whole vectors in float16"), (f"{coarse},SQ8", "8 bits a number")]
    if recall < 1:
        for size in sorted({dim // n for n in (4, 6, 8, 12, 24) if dim // n}, reverse=True):
            out = size * max(1, min(4, dim // size))
            kinds.append((f"OPQ{size}_{out},{coarse},PQ{size}", f"product codes of {size} bytes"))
    for factory, content in kinds:
        plan = _planned(factory, "", num_vectors, dim)
        if plan.memory_bytes <= limit:
            reason = (
                f"{lists:,} inverted lists of {content}: {num_vectors:,} vectors take {_gib(plan.memory_bytes)}, {allowed}; "
                f"the most accurate that fits"
            )
            return _planned(factory, reason, num_vectors, dim)
    raise ConfigError(
        f"the smallest index of {num_vectors:,} vectors of {dim} numbers takes {_gib(plan.memory_bytes)}, {allowed}: "
        f"{_gib(plan.memory_bytes - limit)} are missing. Raise --max-memory, or take an encoder with fewer dimensions"
    )


def _planned(factory: str, reason: str, num_vectors: int, dim: int) -> IndexPlan:
    if factory == "Flat":
        per_vector, fixed, lists = 4.0 * dim, 0, 0
    else:
        index = _make(factory, dim, "L2")  # held, because its lists point into it
        ivf = _ivf(index)
        lists = int(ivf.nlist)
        per_vector = float(ivf.code_size + 8)
        fixed = lists * (4 * ivf.d + (32 * 2 * 4 if "HNSW" in factory else 0))
    return IndexPlan(
        factory=factory,
        reason=reason,
        bytes_per_vector=per_vector,
        memory_bytes=int(per_vector * num_vectors) + fixed,
        part_rows=_rows_in(PART_BYTES, per_vector, most=max(PART_ROWS, ROWS_PER_LIST * lists)),
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.2f} MiB"


# --- making it ------------------------------------------------------------------------------------------------------


def train(path: Path, vectors: Vectors, plan: IndexPlan, *, normalized: bool, seed: int, device: str = "cpu") -> None:
    """Trains an index on a seeded uniform random sample of the rows and writes it, empty.

    Args:
        path: The file.
        vectors: Of all rows.
        plan: Whose factory is not `Flat`.
        normalized: Whether the vectors have length 1: then by inner product, else by L2.
        seed: Of the sample.
        device: k-means runs on a GPU where FAISS can.

    Raises:
        ConfigError: Too few vectors for this index.
    """
    faiss = _faiss()
    index = _make(plan.factory, vectors.dim, "inner product" if normalized else "L2")
    ivf = _ivf(index)
    if not index.is_trained:
        lists = 1 if ivf is None else ivf.nlist
        size = min(len(vectors), max(lists * TRAIN_PER_LIST, MIN_TRAIN))
        sample_NX = _sample(vectors, size, seed, path.parent)
        if ivf is not None:
            ivf.cp.seed = 1234 + seed
            if _gpus(device) and hasattr(faiss, "StandardGpuResources"):
                flat = faiss.IndexFlatIP(ivf.d) if normalized else faiss.IndexFlatL2(ivf.d)
                estimate_gpu_memory(size * ivf.d * 4, device, what="training the index")
                ivf.clustering_index = _on_gpus(flat, _gpus(device))
        try:
            _fit(index, sample_NX, path.parent)
        except RuntimeError as error:
            raise ConfigError(
                f"{len(vectors):,} vectors are too few for the index type {plan.factory!r}: take a smaller one or auto"
            ) from error
        if ivf is not None:
            ivf.clustering_index = None
    _write(index, path)


def _sample(vectors: Vectors, size: int, seed: int, beside: Path) -> Floats:
    """A uniform random sample of rows, in row order, in a file that is memory-mapped."""
    rows = _draw(len(vectors), size, seed)
    sample_NX = _array_on_disk((size, vectors.dim), beside)
    step = _rows_in(BLOCK_BYTES, 4 * vectors.dim, most=65_536)
    for first in range(0, size, step):
        sample_NX[first : first + step] = vectors.gather(rows[first : first + step])
    for shard in vectors._shards:
        _forget(shard)
    return sample_NX


def _draw(n: int, size: int, seed: int) -> Rows:
    """Different numbers below n, ascending."""
    random = np.random.default_rng(seed)
    if n <= DRAWN_BY_SHUFFLE or size > n // 2:
        return np.sort(random.choice(n, size, replace=False))
    drawn = np.empty(0, np.int64)  # `choice` may hold 8 bytes for each of the n
    while len(drawn) < size:
        drawn = np.union1d(drawn, random.integers(n, size=size))
    return drawn[np.sort(random.choice(len(drawn), size, replace=False))]


def _array_on_disk(shape: tuple[int, int], beside: Path) -> Floats:
    """Room for vectors in a file that is memory-mapped and has no name: nothing is left of it, however this process ends."""
    try:
        beside.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=beside) as file:
            left = 4 * shape[0] * shape[1]
            while left > 0:  # written, because a full disk would kill a process that writes to a map
                left -= file.write(bytes(min(left, 1 << 20)))
            file.flush()
            return np.asarray(np.memmap(file, np.float32, mode="r+", shape=shape))
    except OSError as error:
        raise storage_error(beside / TRAINED, error) from error


def _fit(index: Any, sample_NX: Floats, beside: Path) -> None:
    """Does what the index's own `train` does, which holds a turned copy of the whole sample in memory."""
    faiss = _faiss()
    if not isinstance(index, faiss.IndexPreTransform):
        index.train(sample_NX)
        return
    for number in range(index.chain.size()):
        turn = faiss.downcast_VectorTransform(index.chain.at(number))
        if isinstance(turn, faiss.OPQMatrix):
            most = _rows_in(OPQ_BYTES, 4 * turn.d_in, most=turn.max_train_points)
            turn.max_train_points = max(MIN_OPQ, most)
        if not turn.is_trained:
            turn.train(sample_NX)
        turned_NX = _array_on_disk((len(sample_NX), turn.d_out), beside)
        turn.apply_noalloc(len(sample_NX), faiss.swig_ptr(sample_NX), faiss.swig_ptr(turned_NX))
        sample_NX = turned_NX
    _fit(faiss.downcast_index(index.index), sample_NX, beside)
    index.is_trained = True


def add_part(
    trained: Path, vectors: Vectors, first: int, end: int, out: Path, *, base: int = 0, device: str = "cpu"
) -> None:
    """Writes an index of rows [first, end), numbered from `base` on, the first row of their segment."""
    faiss = _faiss()
    index = _read(trained)
    work = index
    if _gpus(device) and hasattr(faiss, "StandardGpuResources"):
        estimate_gpu_memory((end - first) * 4 * vectors.dim, device, what="adding vectors")
        copy = _on_gpus(index, _gpus(device)[:1])
        work = index if copy is None else copy
    if _ivf(index) is None:
        raise ConfigError("only indexes with inverted lists (IVF...) and Flat are supported")
    for start, block_NX in vectors.blocks(first, end):
        work.add_with_ids(np.ascontiguousarray(block_NX), np.arange(start - base, start - base + len(block_NX)))
    _write(work if work is index else faiss.index_gpu_to_cpu(work), out)


def merge_parts(trained: Path, parts: Sequence[Path], out: Path) -> None:
    """Makes one segment of parts, list by list from memory maps, so that neither has to fit into memory. A single part becomes the
    segment as it is.

    Raises:
        FormatError: A part is damaged, or FAISS writes its inverted lists in another format than the one known here.
    """
    if len(parts) == 1:
        parts[0].replace(out)
        sync_folder(out.parent)
        return
    faiss = _faiss()
    index = _read(trained)
    num_lists, code_size = int(_ivf(index).nlist), int(_ivf(index).code_size)
    # The lists stand last: "ilar", their number, bytes of a code, how sizes are given (none here: sparse), and no size.
    empty = struct.pack(_LISTS, b"ilar", num_lists, code_size, b"sprs", 0)
    head_bytes = len(faiss.serialize_index(index)) - len(empty)
    opened = [_ListsOfPart(part, head_bytes, num_lists, code_size) for part in parts]
    sizes_L = np.zeros(num_lists, np.uint64)
    for part in opened:
        sizes_L += part.sizes_L
    index.ntotal = _ivf(index).ntotal = int(sizes_L.sum())
    head = faiss.serialize_index(index).tobytes()
    if not head.endswith(empty):
        raise FormatError(
            f"this release of FAISS ({faiss.__version__}) writes inverted lists in a format that is not known here"
        )

    def write(file: BinaryIO) -> None:
        file.write(head[:head_bytes])
        file.write(struct.pack(_LISTS, b"ilar", num_lists, code_size, b"full", num_lists))
        file.write(sizes_L.astype("<u8").tobytes())
        for number in range(num_lists):
            pieces = [part.take(number) for part in opened]
            for codes, _ in pieces:
                file.write(codes.data)
            for _, rows in pieces:
                file.write(rows.data)

    write_atomically(out, write)
    if _read(out, mapped=True).ntotal != index.ntotal:
        raise FormatError(f"{out} cannot be read back by this release of FAISS ({faiss.__version__})")


_LISTS = "<4sQQ4sQ"


class _ListsOfPart:
    """The inverted lists in the file of a part, taken from the first to the last. FAISS would hold the centroids of every part.

    Raises:
        FormatError: The file is missing or damaged.
    """

    def __init__(self, path: Path, head_bytes: int, num_lists: int, code_size: int) -> None:
        damaged = FormatError(f"{path} is no FAISS index or is damaged: build it again (--overwrite)")
        try:
            self._content = np.memmap(path, np.uint8, mode="r")
        except FileNotFoundError as error:
            raise FormatError(f"{path} is missing: build the index again (--overwrite)") from error
        except (OSError, ValueError) as error:
            raise damaged from error
        self._code_size = code_size
        self._place = head_bytes + struct.calcsize(_LISTS)
        if len(self._content) < self._place:
            raise damaged
        magic, *counts, kind, length = struct.unpack_from(_LISTS, self._content[head_bytes : self._place].data)
        wanted = num_lists if kind == b"full" else 2 * num_lists
        if magic != b"ilar" or counts != [num_lists, code_size] or kind not in (b"full", b"sprs") or length > wanted:
            raise damaged
        sizes = np.asarray(self._content[self._place : self._place + 8 * length]).view("<u8")
        self._place += 8 * length
        self.sizes_L: NDArray[np.uint64] = sizes
        if kind == b"sprs":  # pairs of a list and its size
            self.sizes_L = np.zeros(num_lists, np.uint64)
            self.sizes_L[sizes[::2].astype(np.int64)] = sizes[1::2]
        if len(self._content) != self._place + int(self.sizes_L.sum()) * (code_size + 8):
            raise damaged

    def take(self, number: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Codes and row numbers of the next list, as they stand."""
        if number % 1024 == 0:
            _forget(self._content)
        size = int(self.sizes_L[number])
        middle = self._place + size * self._code_size
        codes, rows = self._content[self._place : middle], self._content[middle : middle + 8 * size]
        self._place = middle + 8 * size
        return codes, rows


def _make(factory: str, dim: int, metric: str) -> Any:
    faiss = _faiss()
    try:
        kind = faiss.METRIC_INNER_PRODUCT if metric == "inner product" else faiss.METRIC_L2
        index = faiss.index_factory(dim, factory, kind)
    except RuntimeError as error:
        raise ConfigError(
            f"FAISS does not know the index type {factory!r} for {dim} dimensions; "
            "examples: Flat, IVF1024,SQfp16, IVF4096,SQ8, OPQ64_256,IVF16384_HNSW32,PQ64"
        ) from error
    if _ivf(index) is None:
        raise ConfigError(f"index type {factory!r} has no inverted lists: use Flat, or one with IVF as in IVF4096,SQ8")
    return index


def _ivf(index: Any) -> Any:
    """The inverted lists inside an index, or None."""
    faiss = _faiss()
    return faiss.try_extract_index_ivf(index)


def _write(index: Any, path: Path) -> None:
    faiss = _faiss()
    write_atomically(path, lambda file: faiss.write_index(index, faiss.PyCallbackIOWriter(file.write)))


def _read(path: Path, *, mapped: bool = False) -> Any:
    faiss = _faiss()
    if not path.is_file():
        raise FormatError(f"{path} is missing: build the index again (--overwrite)")
    try:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP if mapped else 0)
    except RuntimeError as error:
        raise FormatError(f"{path} is no FAISS index or is damaged: build it again (--overwrite)") from error


def _stop_prefetching(index: Any) -> None:
    """Keeps FAISS from starting threads that touch the lists of every search beforehand, which pays for what is not in memory."""
    lists = _faiss().downcast_InvertedLists(_ivf(index).invlists)
    if hasattr(lists, "prefetch_nthread"):
        lists.prefetch_nthread = 0


def physical_memory() -> int:
    """Bytes of this machine, or of the group of processes that this one is confined to."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    group = Path("/sys/fs/cgroup/memory.max")
    if group.is_file() and (limit := group.read_text(encoding="ascii").strip()).isdigit():
        limits.append(int(limit))
    return min(limits)


# --- searching it ---------------------------------------------------------------------------------------------------


class VectorIndex:
    """Vectors by row, searchable. Any number of threads may search.

    Attributes:
        metric: `inner product` for normalized vectors (it is the cosine), else `L2`.
        dim: X.
    """

    def __init__(
        self,
        vectors: Vectors,
        segments: Sequence[Any],
        description: dict[str, Any],
        dead_N: Mask | None,
        ram_copy: int,
    ) -> None:
        self.metric = str(description["metric"])
        self.dim = vectors.dim
        self._vectors = vectors
        self._segments = list(segments)
        self._first_rows = np.cumsum([0, *(segment.ntotal for segment in self._segments)]).tolist()
        self._alive_N = None if dead_N is None or not dead_N.any() else ~dead_N
        self._ram_copy = ram_copy
        # Filter, first row, rows from there on that may be found, with their vectors.
        self._kept: tuple[Mask | None, int, _Block] | None = None
        self._tail: tuple[Mask | None, int, _Block] | None = None
        self._gpu: list[Any] = []
        self._place: str | None = None  # GPU of what is searched exactly
        faiss = _faiss()
        quantizers = [faiss.downcast_index(_ivf(segment).quantizer) for segment in self._segments]
        self.has_graph = any(isinstance(quantizer, faiss.IndexHNSW) for quantizer in quantizers)
        """Whether the nearest lists are found through a graph."""
        self.nprobe = int(description.get("nprobe") or 1)
        self.ef_search = int(description.get("ef_search") or 0)
        self.rescore = int(description.get("rescore") or 1)

    @classmethod
    def open(
        cls,
        folder: Path,
        vectors: Vectors,
        description: dict[str, Any],
        *,
        device: str = "cpu",
        dead_N: Mask | None = None,
        max_memory: int | None = None,
    ) -> "VectorIndex":
        """Opens an index.

        Args:
            folder: Of the segments.
            vectors: Of all rows.
            description: `factory`, `metric`, `segments` (each `file` and `rows`, in the order of rows), and what `tune` found.
            device: Where the lists are searched; a GPU where the installed FAISS has one.
            dead_N: Rows that are never returned.
            max_memory: Bytes that exact search may hold a copy of the vectors in.

        Raises:
            FormatError: A segment is missing, damaged, or does not fit the description.
            ConfigError: The index does not fit on the GPU.
        """
        segments = []
        for record in description["segments"]:
            segment = _read(folder / record["file"], mapped=True)
            if segment.ntotal != record["rows"] or segment.d != vectors.dim or _ivf(segment) is None:
                raise FormatError(
                    f"{folder / record['file']} holds {segment.ntotal:,} vectors of {segment.d} numbers, not "
                    f"{record['rows']:,} of {vectors.dim}: build the index again (--overwrite)"
                )
            segments.append(segment)
        if (
            sum((folder / record["file"]).stat().st_size for record in description["segments"])
            <= physical_memory() // 2
        ):
            for segment in segments:
                _stop_prefetching(segment)
        if sum(segment.ntotal for segment in segments) > len(vectors):
            raise FormatError(f"{folder} has more rows than there are vectors: build the index again (--overwrite)")
        opened = cls(vectors, segments, description, dead_N, RAM_COPY if max_memory is None else max_memory)
        if _gpus(device):
            opened._to_gpu(device)
        return opened

    def __len__(self) -> int:
        return len(self._vectors)

    @property
    def has_lists(self) -> bool:
        """Whether a search looks at the nearest inverted lists only."""
        return bool(self._segments)

    @property
    def num_lists(self) -> int:
        """Inverted lists of a segment; 0 for an exact index."""
        return int(_ivf(self._segments[0]).nlist) if self._segments else 0

    def search(
        self, vectors_QX: Floats, k: int, *, keep_N: Mask | None = None, all_lists: bool = False
    ) -> tuple[Floats, Rows]:
        """The best rows.

        Args:
            vectors_QX: Queries.
            k: How many.
            keep_N: Rows that may be returned, of those that are alive.
            all_lists: Compare with every row, not only with the nearest lists.

        Returns:
            Scores and rows [Q, k], best first, the lower row first where scores are equal; a score is the inner product, or minus
            the squared distance. Where there is no further row (or none in the lists searched), the row is -1 and the score -inf.

        Raises:
            ConfigError: A query is not finite, or the filter is not for all rows.
        """
        queries_QX = np.ascontiguousarray(vectors_QX, np.float32)
        if not np.isfinite(queries_QX).all():
            raise ConfigError("a query vector holds NaN or infinity: the encoder gave no usable vector")
        if keep_N is not None and keep_N.shape != (len(self),):
            raise ConfigError(f"the filter has shape {list(keep_N.shape)}, there are {len(self):,} rows")
        scores_QK = np.full((len(queries_QX), k), -np.inf, np.float32)
        rows_QK = np.full((len(queries_QX), k), -1, np.int64)
        if len(queries_QX) == 0 or len(self) == 0 or k == 0:
            return scores_QK, rows_QK
        exact = all_lists or not self._segments
        if not exact and keep_N is not None:
            exact = int((keep_N if self._alive_N is None else keep_N & self._alive_N).sum()) <= EXACT_BELOW
        batches = [slice(first, first + BATCH) for first in range(0, len(queries_QX), BATCH)]
        best = [_Best(self, queries_QX[batch], k) for batch in batches]
        if not exact:
            for rows_QC in self._candidates(queries_QX, k, keep_N):
                for each, batch in zip(best, batches, strict=True):
                    each.add_candidates(rows_QC[batch])
        for block in self._blocks(keep_N, first=0 if exact else self._first_rows[-1]):
            for each in best:
                each.look_at(block)
        for each, batch in zip(best, batches, strict=True):
            each.write(scores_QK[batch], rows_QK[batch])
        return scores_QK, rows_QK

    # --- candidates of the inverted lists

    def _candidates(self, queries_QX: Floats, k: int, keep_N: Mask | None) -> list[Rows]:
        """Rows that the lists of each segment give; -1 where there are none."""
        alive_N = self._alive_N
        if keep_N is not None:
            alive_N = keep_N if alive_N is None else keep_N & alive_N
        found = []
        for number, segment in enumerate(self._segments):
            first, end = self._first_rows[number : number + 2]
            wanted = min(k * self.rescore + MARGIN, end - first)
            if self._gpu and alive_N is None and max(wanted, self.nprobe) <= GPU_LIMIT:
                _faiss().GpuParameterSpace().set_index_parameter(self._gpu[number], "nprobe", self.nprobe)
                _, rows = self._gpu[number].search(queries_QX, wanted)
            else:
                parameters = self._parameters(segment, None if alive_N is None else alive_N[first:end])
                _, rows = segment.search(queries_QX, wanted, params=parameters)
            rows[rows >= 0] += first
            found.append(rows)
        return found

    def _parameters(self, segment: Any, alive_N: Mask | None) -> Any:
        faiss = _faiss()
        ivf = _ivf(segment)
        inner: dict[str, Any] = {"nprobe": min(self.nprobe, ivf.nlist)}
        if alive_N is not None:
            inner["sel"] = faiss.IDSelectorBitmap(np.packbits(alive_N, bitorder="little"))
        if self.has_graph:
            inner["quantizer_params"] = faiss.SearchParametersHNSW(efSearch=max(self.ef_search, self.nprobe))
        parameters = faiss.SearchParametersIVF(**inner)
        if isinstance(segment, faiss.IndexPreTransform):
            parameters = faiss.SearchParametersPreTransform(index_params=parameters)
        return parameters

    # --- exact search

    def _blocks(self, keep_N: Mask | None, first: int) -> Iterator["_Block"]:
        """Rows that may be returned, from `first` on, with their vectors; the tail's and the last filter's stay in memory."""
        whole = first == self._first_rows[-1]
        count = len(self) - first if keep_N is None else int(keep_N[first:].sum())
        if not whole or count * self.dim * 4 > self._ram_copy:
            whole = keep_N is not None and count <= EXACT_BELOW
        if not whole:
            for start, block_NX in self._vectors.blocks(first, max_rows=BLOCK_ROWS):
                rows_N = np.arange(start, start + len(block_NX))
                alive_N = self._may_be_found(keep_N, rows_N)
                if alive_N.all():
                    yield self._block(rows_N, block_NX)
                elif alive_N.any():
                    yield self._block(rows_N[alive_N], block_NX[alive_N])
            return
        held = self._tail if keep_N is None else self._kept  # read once: another thread may replace it
        if held is None or held[0] is not keep_N or held[1] != first:
            rows_N = np.arange(first, len(self)) if keep_N is None else first + np.flatnonzero(keep_N[first:])
            rows_N = rows_N[self._may_be_found(None, rows_N)]
            held = (keep_N, first, self._block(rows_N, self._vectors.gather(rows_N)))
            if keep_N is None:
                self._tail = held
            else:
                self._kept = held
        block = held[2]
        for start in range(0, len(block.rows_N), BLOCK_ROWS):
            part = slice(start, start + BLOCK_ROWS)
            yield _Block(block.rows_N[part], block.vectors_NX[part], block.squares_N[part])

    def _block(self, rows_N: Rows, vectors_NX: Floats) -> "_Block":
        squares_N = np.einsum("nx,nx->n", vectors_NX, vectors_NX)
        return _Block(rows_N, vectors_NX if self._place is None else _on_device(vectors_NX, self._place), squares_N)

    def _may_be_found(self, keep_N: Mask | None, rows: Rows) -> Mask:
        alive = np.ones(len(rows), np.bool_) if self._alive_N is None else self._alive_N[rows]
        return alive if keep_N is None else alive & keep_N[rows]

    # --- the final scores

    def ranked(
        self, queries_QX: Floats, query_P: Rows, row_P: Rows, k: int
    ) -> tuple[NDArray[np.intp], NDArray[np.intp], Floats]:
        """The k best rows of each query by their scores from the stored vectors, which depend on the two vectors alone: in float64,
        rounded to float32.

        Args:
            queries_QX: Queries.
            query_P: Pairs of a query ...
            row_P: ... and a row, no pair twice.
            k: How many.

        Returns:
            Numbers of the pairs that are among them, their ranks from 0 on, and their scores, query by query.
        """
        score_P = np.empty(len(row_P), np.float32)
        wide_QX = queries_QX.astype(np.float64)

        def score(some: slice) -> None:
            q_PX = wide_QX[query_P[some]]
            v_PX = self._vectors.gather(row_P[some]).astype(np.float64)
            if self.metric == "inner product":
                score_P[some] = np.einsum("px,px->p", v_PX, q_PX)
            else:
                v_PX -= q_PX
                score_P[some] = -np.einsum("px,px->p", v_PX, v_PX)

        step = max(1, SCORED_AT_ONCE // self.dim)
        parts = [slice(first, first + step) for first in range(0, len(row_P), step)]
        if len(parts) == 1:
            score(parts[0])
        elif parts:
            with ThreadPoolExecutor(max(1, _faiss().omp_get_max_threads())) as threads:
                list(threads.map(score, parts))
        order = np.lexsort((row_P, -score_P, query_P))
        rank_P = np.arange(len(order)) - np.searchsorted(query_P[order], query_P[order])
        among = rank_P < k
        return order[among], rank_P[among], score_P[order[among]]

    # --- GPU

    def _to_gpu(self, device: str) -> None:
        faiss = _faiss()
        if not hasattr(faiss, "StandardGpuResources"):
            logger.warning("the installed FAISS has no GPU support: the index is searched on the CPU (retro-lm[gpu])")
            return
        size = sum(segment.ntotal * (_ivf(segment).code_size + 8) for segment in self._segments)
        rows = len(self) - self._first_rows[-1]
        estimate_gpu_memory(size + min(4 * self.dim * rows, self._ram_copy), device, what="the index")
        gpus = _gpus(device)
        self._place = f"cuda:{gpus[0]}"
        if self._segments and self._alive_N is not None:
            logger.info("the lists are searched on the CPU, because documents were removed: compact the index")
            return
        shard = len(gpus) > 1 and size + GPU_OWN > _free_on_gpus(gpus)
        copies = [_on_gpus(segment, gpus, shard=shard) for segment in self._segments]
        self._gpu = copies if all(copy is not None for copy in copies) else []


@dataclass(frozen=True, slots=True)
class _Block:
    """Some rows, ascending."""

    rows_N: Rows
    vectors_NX: Any
    """float32; on a GPU a tensor."""
    squares_N: Floats
    """Squared lengths."""


class _Best:
    """The best rows of a batch of queries, while blocks of ascending rows go by.

    Rows are compared by float32 products, and those that could be among the k best are kept until exact scores decide. A product
    is off by at most (X + 8) / 2^24 times the lengths of both vectors, in whatever order its X terms are added (Higham, Accuracy
    and Stability of Numerical Algorithms, section 3.1). So a row that lies two such errors or more below the k-th best one seen
    before is out of the question: at best it is as good, and has a higher number.
    """

    def __init__(self, index: VectorIndex, queries_QX: Floats, k: int) -> None:
        self._index, self._queries_QX, self._k = index, queries_QX, k
        self._length_Q = np.linalg.norm(queries_QX.astype(np.float64), axis=1)
        self._slack_Q = np.zeros(len(queries_QX))
        self._kth_Q = np.full(len(queries_QX), -np.inf, np.float32)
        # Pairs of query and row with float32 scores (for L2 without the query's own part): sorted out, and new.
        self._pairs = (np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
        self._new: list[tuple[Rows, Rows, Floats]] = []
        self._candidates: list[tuple[Rows, Rows]] = []

    def add_candidates(self, rows_QC: Rows) -> None:
        """Rows from elsewhere, other ones than in blocks; -1 is none."""
        query_P, column_P = np.nonzero(rows_QC >= 0)
        self._candidates.append((query_P, rows_QC[query_P, column_P]))

    def look_at(self, block: _Block) -> None:
        """Takes the rows of the next block that may be among the best."""
        l2 = self._index.metric == "L2"
        scores_QN = _products(self._queries_QX, block, l2=l2)
        longest = math.sqrt(float(block.squares_N.max()))
        error_Q = (2 * self._length_Q + longest) * longest if l2 else self._length_Q * longest
        self._slack_Q = np.maximum(self._slack_Q, 2 * _rounding(block.vectors_NX) * error_Q)
        floor_Q = _lower(self._kth_Q, self._slack_Q)
        unknown_Q = np.isneginf(self._kth_Q)
        if len(block.rows_N) >= self._k and unknown_Q.any():
            # Equal ones have no higher numbers here, so that they are kept, too.
            kth_Q = np.nextafter(_kth_best(scores_QN, self._k), np.float32(-np.inf))
            floor_Q = np.where(unknown_Q, _lower(kth_Q, self._slack_Q), floor_Q)
        query_P, column_P, score_P = _above(scores_QN, floor_Q)
        self._new.append((query_P, block.rows_N[column_P], score_P))
        if sum(len(new[0]) for new in self._new) >= len(self._pairs[0]):
            self._sort_out()

    def _sort_out(self) -> None:
        query_P, row_P, score_P = (np.concatenate(parts) for parts in zip(self._pairs, *self._new, strict=True))
        self._new = []
        order = np.lexsort((-score_P, query_P))
        query_P, row_P, score_P = query_P[order], row_P[order], score_P[order]
        first_Q = np.searchsorted(query_P, np.arange(len(self._kth_Q) + 1))
        known_Q = np.diff(first_Q) >= self._k
        self._kth_Q[known_Q] = score_P[first_Q[:-1][known_Q] + self._k - 1]
        keep_P = score_P >= _lower(self._kth_Q, self._slack_Q)[query_P]
        self._pairs = (query_P[keep_P], row_P[keep_P], score_P[keep_P])
        if len(self._pairs[0]) > max(MANY, 4 * self._k * len(self._kth_Q)):
            among, _, _ = self._index.ranked(self._queries_QX, *self._pairs[:2], self._k)
            self._pairs = (self._pairs[0][among], self._pairs[1][among], self._pairs[2][among])

    def write(self, scores_QK: Floats, rows_QK: Rows) -> None:
        """Writes scores and rows of the k best; places without a row are left as they are."""
        self._sort_out()
        query_P, row_P = (np.concatenate(parts) for parts in zip(self._pairs[:2], *self._candidates, strict=True))
        among, rank_P, score_P = self._index.ranked(self._queries_QX, query_P, row_P, self._k)
        scores_QK[query_P[among], rank_P] = score_P
        rows_QK[query_P[among], rank_P] = row_P[among]


def _lower(score_Q: Floats, slack_Q: NDArray[np.float64]) -> Floats:
    """Scores less a slack, not rounded up."""
    lower_Q = (score_Q - slack_Q).astype(np.float32)
    return np.where(slack_Q > 0, np.nextafter(lower_Q, np.float32(-np.inf)), lower_Q)


# The four things that are done with a block, by numpy, or by torch where it lies on a GPU.


def _on_device(vectors_NX: Floats, place: str) -> Any:
    import torch

    return torch.from_numpy(vectors_NX).to(place)


def _rounding(vectors_NX: Any) -> float:
    """How much a product of two vectors of length 1 is off at most."""
    rounding = (int(vectors_NX.shape[1]) + 8) / (1 << 24)
    if isinstance(vectors_NX, np.ndarray):
        return rounding
    import torch

    # Below the highest precision numbers may be rounded to bfloat16 first.
    return rounding + (0 if torch.get_float32_matmul_precision() == "highest" else 1 / 64)


def _products(queries_QX: Floats, block: _Block, *, l2: bool) -> Any:
    """Inner products [Q, N]; for L2 what is left of minus the squared distance without the query's own part."""
    if isinstance(block.vectors_NX, np.ndarray):
        scores_QN: Any = queries_QX @ block.vectors_NX.T
    else:
        scores_QN = _on_device(queries_QX, str(block.vectors_NX.device)) @ block.vectors_NX.T
    if l2:
        squares_N = block.squares_N if isinstance(scores_QN, np.ndarray) else scores_QN.new_tensor(block.squares_N)
        scores_QN *= 2
        scores_QN -= squares_N
    return scores_QN


def _kth_best(scores_QN: Any, k: int) -> Floats:
    if isinstance(scores_QN, np.ndarray):
        place = scores_QN.shape[1] - k
        return np.asarray(np.partition(scores_QN, place, axis=1)[:, place])
    return np.asarray(scores_QN.topk(k, dim=1).values[:, -1].cpu())


def _above(scores_QN: Any, floor_Q: Floats) -> tuple[Rows, Rows, Floats]:
    """Places above a floor of each row, and what is there."""
    if isinstance(scores_QN, np.ndarray):
        place_P = np.flatnonzero(scores_QN > floor_Q[:, None])
        score_P = scores_QN.reshape(-1)[place_P]
    else:
        above_QN = scores_QN > scores_QN.new_tensor(floor_Q)[:, None]
        place_P, score_P = np.asarray(above_QN.flatten().nonzero()[:, 0].cpu()), np.asarray(scores_QN[above_QN].cpu())
    query_P, column_P = np.divmod(place_P, scores_QN.shape[1])
    return query_P, column_P, score_P


def _gpus(device: str) -> list[int]:
    """Numbers of the GPUs in `cpu`, `cuda`, `cuda:1` or `cuda:0,cuda:1`."""
    names = [name for name in device.split(",") if name.startswith("cuda")]
    return [int(name.partition(":")[2] or 0) for name in names]


def _free_on_gpus(gpus: Sequence[int]) -> int:
    """Bytes, where there are fewest."""
    import torch

    return min(int(torch.cuda.mem_get_info(gpu)[0]) for gpu in gpus)


def estimate_gpu_memory(num_bytes: int, device: str, *, what: str) -> None:
    """Raises ConfigError where something that is divided between GPUs does not fit there, before anything is moved."""
    gpus = _gpus(device)
    free = _free_on_gpus(gpus)
    needed = num_bytes // len(gpus) + GPU_OWN
    if needed > free:
        raise ConfigError(
            f"{what} needs {_gib(needed)} on each of {len(gpus)} GPUs, {_gib(free)} are free ({_gib(needed - free)} missing): use "
            "--device cpu, more GPUs, or a smaller index (--max-memory)"
        )


def _on_gpus(index: Any, gpus: Sequence[int], *, shard: bool = False) -> Any:
    """A copy on GPUs, on each the whole one or a part; None where FAISS has no such index there."""
    faiss = _faiss()
    options = faiss.GpuMultipleClonerOptions()
    options.shard = shard
    options.allowCpuCoarseQuantizer = True  # a graph over centroids
    try:
        return faiss.index_cpu_to_gpus_list(index, options, list(gpus))
    except RuntimeError as error:
        logger.warning("FAISS cannot do this on a GPU, the CPU does it: %s", str(error).splitlines()[0])
        return None


# --- measuring and tuning it ----------------------------------------------------------------------------------------


def tune(vectors: Vectors, index: VectorIndex, *, recall: float, seed: int) -> dict[str, Any]:
    """Chooses how much of an index is searched, and measures what that finds.

    Queries are a seeded sample of the stored rows, each of which may not find itself. Of the settings in order of their cost the
    first is taken whose recall@10 against exact search is as wanted, even if the sample flatters it by two standard errors.

    Args:
        vectors: Of all rows.
        index: Over them; its settings are changed.
        recall: Recall@10 wanted.
        seed: Of the sample.

    Returns:
        `nprobe`, `ef_search`, `rescore` (None for an exact index) and `measured`: recall_at_10, recall_at_100, queries_per_s (of
        all queries in one batch), bytes_per_vector (of what is searched), queries.
    """
    n = len(vectors)
    queries = min(n, 1000, max(100, int(1e12 / max(n * vectors.dim, 1))))
    rows = np.sort(np.random.default_rng([seed, 1]).choice(n, queries, replace=False)) if n else np.empty(0, np.int64)
    queries_QX = vectors.gather(rows)
    depth = min(100, max(n - 1, 0))
    settings: dict[str, Any] = {"nprobe": None, "ef_search": None, "rescore": None}
    reached = 1.0
    if index.has_lists:
        truth_QK = _without_self(index.search(queries_QX, depth + 1, all_lists=True)[1], rows)
        for nprobe, rescore in _settings(index):
            index.nprobe, index.rescore = nprobe, rescore
            index.ef_search = max(64, 2 * nprobe) if index.has_graph else 0
            shares_Q = _shares(_without_self(index.search(queries_QX, 11)[1], rows), truth_QK, 10)
            reached = float(shares_Q.mean())
            if reached - 2 * float(shares_Q.std()) / math.sqrt(queries) >= recall:
                break
        if reached < recall:
            logger.warning("recall@10 is %.3f at most, %.3f was wanted: allow more memory", reached, recall)
        settings = {"nprobe": index.nprobe, "ef_search": index.ef_search or None, "rescore": index.rescore}
    started = time.perf_counter()
    found_QK = _without_self(index.search(queries_QX, depth + 1)[1], rows)
    seconds = time.perf_counter() - started
    if not index.has_lists:
        truth_QK = found_QK
    per_vector = 4.0 * vectors.dim if not index.has_lists else float(_ivf(index._segments[0]).code_size + 8)
    measured = {
        "recall_at_10": round(reached, 4),  # a search for 100 scores more candidates again, and would say too much
        "recall_at_100": round(float(_shares(found_QK, truth_QK, 100).mean()), 4),
        "queries_per_s": round(queries / max(seconds, 1e-9), 1),
        "bytes_per_vector": per_vector,
        "queries": queries,
    }
    return {**settings, "measured": measured}


def _settings(index: VectorIndex) -> Iterator[tuple[int, int]]:
    """Lists to search and candidates to score again, cheapest first."""
    lists = index.num_lists
    code = int(_ivf(index._segments[0]).code_size)
    rescores = (1,) if code >= 2 * index.dim else (1, 2) if code >= index.dim else (4, 8, 16)
    nprobe = 1
    while True:
        for rescore in rescores:
            yield min(nprobe, lists), rescore
        if nprobe >= lists:
            return
        nprobe = max(nprobe + 1, int(nprobe * 1.26))


def _without_self(rows_QK: Rows, own_Q: Rows) -> Rows:
    """Results without the query's own row; the last one goes where it was not found."""
    own_QK = rows_QK == own_Q[:, None]
    order = np.argsort(own_QK, axis=1, kind="stable")
    return np.take_along_axis(rows_QK, order, axis=1)[:, :-1]


def _shares(found_QK: Rows, truth_QK: Rows, k: int) -> NDArray[np.float64]:
    """Share of the k true rows that are among the k found, of each query [Q]; 1 where there is nothing to find."""
    k = min(k, truth_QK.shape[1])
    if not k or not len(truth_QK):
        return np.ones(1)
    hits = [len(np.intersect1d(f[:k], t[:k])) for f, t in zip(found_QK, truth_QK, strict=True)]
    return np.array(hits) / k


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise DependencyError(
            "faiss is missing: install retro-lm[cpu], or retro-lm[gpu] where there is an NVIDIA GPU"
        ) from error
    return faiss
