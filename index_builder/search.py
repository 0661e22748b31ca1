"""Search with exclusions, and the retriever: encoder, index and chunk store of one index folder."""

import logging
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from index_builder.encoder import Encoder
from index_builder.index import VectorIndex
from retro.artifact import fingerprint, open_manifest, read_manifest
from retro.chunks import ChunkStore, Passage, group_hash
from retro.errors import ConfigError, FormatError, MismatchError
from retro.generate import Role

logger = logging.getLogger(__name__)
INDEX_FILE = "index/vectors.faiss"
CANDIDATES = 1 << 22
"""Rows looked at in one go, over all queries: bounds memory where one group is very large."""
OVER_FETCH = 8
"""Rows fetched beyond k at first, because some will be excluded."""


def find_neighbors(
    index: VectorIndex,
    store: ChunkStore,
    vectors_QX: NDArray[np.float32],
    k: int,
    excluded_QG: NDArray[np.uint64] | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The k best rows of each query that are not of an excluded group.

    Fetches more and more until every query has k or the index is exhausted. A row is excluded by its group and by nothing
    else: not by its place in the result, not by its score.

    Args:
        index: Vectors.
        store: The same rows' groups.
        vectors_QX: Queries.
        k: Rows wanted.
        excluded_QG: Hashes of the groups that each query may not have.

    Returns:
        Scores and rows [Q, k], best first; -inf and -1 where there is no further row.
    """
    Q = len(vectors_QX)
    scores_QK = np.full((Q, k), -np.inf, np.float32)
    rows_QK = np.full((Q, k), -1, np.int64)
    pending = np.arange(Q)
    fetch = min(k + (OVER_FETCH if excluded_QG is not None else 0), len(index))
    while len(pending):
        short = []
        block = max(1, CANDIDATES // fetch)
        for few in np.split(pending, range(block, len(pending), block)):
            # What fills all the lists that are searched at first must not hide the others.
            found_scores, found_rows = index.search(vectors_QX[few], fetch, all_lists=fetch == len(index))
            keep = found_rows >= 0
            if excluded_QG is not None:
                groups = store.groups(np.maximum(found_rows, 0))
                keep &= ~(groups[:, :, None] == excluded_QG[few][:, None, :]).any(axis=2)
            order = np.argsort(~keep, axis=1, kind="stable")[:, :k]
            kept = np.take_along_axis(keep, order, axis=1)
            width = order.shape[1]
            scores_QK[few, :width] = np.where(kept, np.take_along_axis(found_scores, order, axis=1), -np.inf)
            rows_QK[few, :width] = np.where(kept, np.take_along_axis(found_rows, order, axis=1), -1)
            short.append(few[keep.sum(axis=1) < k])
        if fetch == len(index):
            break
        pending = np.concatenate(short)
        fetch = min(fetch * 4, len(index))
    return scores_QK, rows_QK


class IndexRetriever:
    """Passages of an index by meaning; implements `retro.generate.Retriever`."""

    def __init__(self, folder: Path, encoder: Encoder) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder, "index")
        made_with = self.manifest["encoder"]
        if encoder.fingerprint != made_with["fingerprint"]:
            raise MismatchError(
                f"{folder} was built with the encoder {made_with['name']} ({made_with['fingerprint']}), not with "
                f"{encoder.name} ({encoder.fingerprint}): their vectors cannot be compared. Use that encoder, or build again"
            )
        self.encoder = encoder
        self.store = ChunkStore(folder)
        self.index = VectorIndex.load(folder / INDEX_FILE)
        if len(self.index) != self.store.num_chunks:
            raise FormatError(
                f"{folder} has {len(self.index):,} vectors for {self.store.num_chunks:,} chunks: build it again (--overwrite)"
            )

    @classmethod
    def open(cls, path: str | Path, *, device: str = "cpu", encoder: str | None = None) -> "IndexRetriever":
        """Opens an index with the encoder it was built with.

        Args:
            path: Folder made by `retro index build`.
            device: Where the encoder runs.
            encoder: Where that encoder lies now, if not where it was.

        Raises:
            FormatError: No index, unfinished or damaged.
            MismatchError: The encoder is another one.
        """
        folder = Path(path)
        made_with = open_manifest(folder, "index")["encoder"]
        opened = Encoder.open(encoder or made_with["name"], revision=made_with["revision"], device=device)
        return cls(folder, opened)

    @property
    def fingerprint(self) -> str:
        """Equal for indexes of the same documents, chunks and vectors."""
        files = {k: v["sha256"] for k, v in self.manifest["files"].items()}
        return fingerprint(files)

    def retrieve(
        self,
        queries: Sequence[str],
        k: int,
        *,
        role: Role = "document",
        exclude: Sequence[Collection[str]] | None = None,
    ) -> list[list[Passage]]:
        """See `retro.generate.Retriever`.

        Raises:
            ConfigError: An empty query, or k larger than the index.
        """
        if k < 1:
            raise ConfigError(f"k = {k}: ask for at least one passage")
        if k > self.store.num_chunks:
            raise ConfigError(f"k = {k} is more than the {self.store.num_chunks:,} chunks of {self.folder}: lower k")
        for query in queries:
            if not query.strip():
                raise ConfigError("the question is empty" if role == "query" else "a query is empty")
        excluded_QG = None
        if exclude is not None:
            if len(exclude) != len(queries):
                raise ConfigError(f"exclude is for {len(exclude)} queries, there are {len(queries)}: give one for each")
            width = max((len(groups) for groups in exclude), default=0)
            excluded_QG = np.zeros((len(queries), width), np.uint64)
            for row, groups in enumerate(exclude):
                excluded_QG[row, : len(groups)] = [group_hash(group) for group in groups]
        scores_QK, rows_QK = find_neighbors(self.index, self.store, self.encoder.encode(queries, role), k, excluded_QG)
        return [
            [self.store.passage(row, score) for row, score in zip(rows, scores, strict=True) if row >= 0]
            for rows, scores in zip(rows_QK.tolist(), scores_QK.tolist(), strict=True)
        ]
