"""The vector index. The only importer of faiss."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retro.artifact import write_atomically
from retro.errors import ConfigError, DependencyError, FormatError

EXACT_BELOW = 50_000
"""Vectors below which the index is exact."""
TRAIN_PER_LIST = 128
"""Vectors per inverted list in the sample that trains it; FAISS warns below 39 and gains nothing above 256."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexPlan:
    """Which index, and why."""

    factory: str
    """For faiss.index_factory."""
    reason: str
    """A sentence for the user."""


def plan_index(num_vectors: int, index_type: str = "auto") -> IndexPlan:
    """The rule: exact below 50,000 vectors; above, inverted lists of full vectors, about 4 sqrt(n) of them, a power of two."""
    if index_type != "auto":
        return IndexPlan(factory=index_type, reason=f"{index_type}, as asked for")
    if num_vectors < EXACT_BELOW:
        return IndexPlan(factory="Flat", reason=f"exact search: {num_vectors:,} vectors are fewer than {EXACT_BELOW:,}")
    lists = 2 ** round(math.log2(4 * math.sqrt(num_vectors)))
    return IndexPlan(
        factory=f"IVF{lists},Flat",
        reason=f"{lists} inverted lists: {num_vectors:,} vectors are at least {EXACT_BELOW:,}; about 4 sqrt(n) lists, "
        f"one in 16 is searched",
    )


class VectorIndex:
    """Vectors by row, searchable.

    Attributes:
        metric: `inner product` for normalized vectors (it is the cosine), else `L2`.
    """

    def __init__(self, index: Any, metric: str) -> None:
        self._index = index
        self.metric = metric

    @classmethod
    def build(
        cls,
        shards: Callable[[], Iterable[NDArray[np.float16]]],
        *,
        num_vectors: int,
        dim: int,
        factory: str,
        normalized: bool,
        seed: int,
        progress: Callable[[int], None] | None = None,
    ) -> "VectorIndex":
        """Trains where the kind of index needs it, on a uniform random sample, and adds all vectors in order.

        Args:
            shards: Gives the vectors [n, X] in order of rows, each time it is called.
            num_vectors: Rows in all.
            dim: X.
            factory: See IndexPlan.
            normalized: Whether the vectors have length 1.
            seed: Of the sample.
            progress: Called with the number of vectors added.

        Raises:
            ConfigError: The factory string is unknown to FAISS or cannot be trained on so few vectors.
        """
        faiss = _faiss()
        metric = faiss.METRIC_INNER_PRODUCT if normalized else faiss.METRIC_L2
        try:
            index = faiss.index_factory(dim, factory, metric)
        except RuntimeError as error:
            raise ConfigError(
                f"FAISS does not know the index type {factory!r} for {dim} dimensions; "
                "examples: Flat, IVF1024,Flat, IVF4096,SQ8"
            ) from error
        if not index.is_trained:
            lists = faiss.extract_index_ivf(index).nlist if "IVF" in factory else 1
            sample = _sample(shards, num_vectors, max(lists * TRAIN_PER_LIST, 10_000), seed)
            try:
                index.train(sample)
            except RuntimeError as error:
                raise ConfigError(
                    f"{num_vectors:,} vectors are too few for the index type {factory!r}: take a smaller one or auto"
                ) from error
        if "IVF" in factory:
            ivf = faiss.extract_index_ivf(index)
            ivf.nprobe = max(min(16, ivf.nlist), ivf.nlist // 16)
        done = 0
        for vectors_NX in shards():
            index.add(np.ascontiguousarray(vectors_NX, np.float32))
            done += len(vectors_NX)
            if progress is not None:
                progress(done)
        return cls(index, "inner product" if normalized else "L2")

    def save(self, path: Path) -> None:
        """Writes FAISS's own format."""
        faiss = _faiss()
        write_atomically(path, lambda file: faiss.write_index(self._index, faiss.PyCallbackIOWriter(file.write)))

    @classmethod
    def load(cls, path: Path) -> "VectorIndex":
        """Raises FormatError where the file is no index."""
        faiss = _faiss()
        try:
            index = faiss.read_index(str(path))
        except RuntimeError as error:
            raise FormatError(f"{path} is no FAISS index or is damaged: build it again (--overwrite)") from error
        return cls(index, "inner product" if index.metric_type == faiss.METRIC_INNER_PRODUCT else "L2")

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @property
    def has_lists(self) -> bool:
        """Whether a search looks at the nearest inverted lists only."""
        return type(self._index).__name__.startswith("IndexIVF")

    @property
    def dim(self) -> int:
        """X."""
        return int(self._index.d)

    def search(
        self, vectors_QX: NDArray[np.float32], k: int, *, all_lists: bool = False
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The best rows.

        Args:
            vectors_QX: Queries.
            k: How many.
            all_lists: Search all inverted lists, not only the nearest.

        Returns:
            Scores and rows [Q, k], best first; a score is the inner product, or minus the squared distance. Where fewer than k
            were found (inverted lists), the row is -1 and the score -inf.
        """
        if len(vectors_QX) == 0:
            return np.empty((0, k), np.float32), np.empty((0, k), np.int64)
        params = None
        if all_lists and self.has_lists:
            faiss = _faiss()
            params = faiss.SearchParametersIVF(nprobe=faiss.extract_index_ivf(self._index).nlist)
        scores_QK, rows_QK = self._index.search(np.ascontiguousarray(vectors_QX, np.float32), k, params=params)
        if self.metric == "L2":
            scores_QK = -scores_QK
        scores_QK[rows_QK < 0] = -np.inf
        return scores_QK, rows_QK


def _sample(
    shards: Callable[[], Iterable[NDArray[np.float16]]], num_vectors: int, size: int, seed: int
) -> NDArray[np.float32]:
    """A uniform random sample of rows, in row order."""
    size = min(size, num_vectors)
    rows = np.sort(np.random.default_rng(seed).choice(num_vectors, size, replace=False))
    parts = []
    first = 0
    for vectors_NX in shards():
        low, high = np.searchsorted(rows, [first, first + len(vectors_NX)])
        parts.append(np.asarray(vectors_NX[rows[low:high] - first], np.float32))
        first += len(vectors_NX)
    return np.concatenate(parts)


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise DependencyError(
            "faiss is missing: install retro-lm[cpu], or retro-lm[gpu] where there is an NVIDIA GPU"
        ) from error
    return faiss
