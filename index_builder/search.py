"""Search with exclusions and filters, and the retriever: encoder, vectors, BM25 and chunk store of one index folder."""

import logging
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from index_builder.build import open_vectors
from index_builder.encoder import Encoder
from index_builder.filters import Filter
from index_builder.index import VectorIndex, Vectors
from index_builder.lexical import LexicalIndex, fuse
from retro.artifact import MANIFEST, fingerprint, open_manifest, read_manifest
from retro.chunks import ChunkStore, Passage, load_array, name_hash
from retro.errors import ConfigError, FormatError, MismatchError
from retro.generate import Role

logger = logging.getLogger(__name__)
AUTO: Final = "auto"
Method = Literal["dense", "bm25", "hybrid", "rerank", "auto"]
"""By the encoder's vectors; by words; by both, their rankings fused; by vectors, the best of them re-ranked by words; or what suits
the state of the index and the text: `hybrid` for a question, where there is BM25, else `dense`."""
METHODS: tuple[str, ...] = tuple(method for method in get_args(Method) if method != AUTO)
CANDIDATES = 1 << 22
"""Rows looked at in one go, over all queries: bounds memory where one group is very large."""
OVER_FETCH = 8
"""Rows fetched beyond k at first, because some will be excluded."""
FUSED = 100
"""Rows of each ranking that are fused, and of the dense one that are re-ranked; four times k where that is more."""
WORDS = 1.75
"""What a question's words weigh beside its meaning: `LexicalIndex.overlap` beside similarity in units of `_similarity_unit`."""
UNIT_PAIRS = 500
"""Pairs of passages from which that unit is estimated, with a standard error of 3%."""
FUSION_CONSTANT = 10
"""Of reciprocal rank fusion; 5 to 20 find as many answers (NQ dev, WebQuestions train), the usual 60 half a point fewer."""
Found = tuple[NDArray[np.float32], NDArray[np.int64]]
"""Scores and rows [Q, k], best first; -inf and -1 where there is no further row."""


def settled(method: Method, role: Role, *, has_words: bool) -> Method:
    """What `auto` stands for with texts of this role and an index with or without BM25; others as they are."""
    if method != AUTO:
        return method
    return "hybrid" if role == "query" and has_words else "dense"


def find_neighbors(
    fetch: Callable[[NDArray[np.int64], int], Found],
    num_queries: int,
    num_rows: int,
    k: int,
    groups_of: Callable[[NDArray[np.int64]], NDArray[np.uint64]],
    excluded_QG: NDArray[np.uint64] | None = None,
) -> Found:
    """The k best rows of each query that are not of an excluded group.

    Fetches more and more until every query has k or there is nothing more. A row is excluded by its group and by nothing
    else: not by its place in the result, not by its score.

    Args:
        fetch: Gives the n best rows of some queries, by their numbers; where n is `num_rows`, all that there are.
        num_queries: Q.
        num_rows: The most that `fetch` can give.
        k: Rows wanted.
        groups_of: Hash of the group of each row.
        excluded_QG: Hashes of the groups that each query may not have.
    """
    scores_QK = np.full((num_queries, k), -np.inf, np.float32)
    rows_QK = np.full((num_queries, k), -1, np.int64)
    pending = np.arange(num_queries)
    n = min(k + (OVER_FETCH if excluded_QG is not None else 0), num_rows)
    while len(pending) and n:
        short = []
        block = max(1, CANDIDATES // n)
        for few in np.split(pending, range(block, len(pending), block)):
            found_scores, found_rows = fetch(few, n)
            keep = found_rows >= 0
            if excluded_QG is not None:
                groups = groups_of(np.maximum(found_rows, 0))
                keep &= ~(groups[:, :, None] == excluded_QG[few][:, None, :]).any(axis=2)
            order = np.argsort(~keep, axis=1, kind="stable")[:, :k]
            kept = np.take_along_axis(keep, order, axis=1)
            width = order.shape[1]
            scores_QK[few, :width] = np.where(kept, np.take_along_axis(found_scores, order, axis=1), -np.inf)
            rows_QK[few, :width] = np.where(kept, np.take_along_axis(found_rows, order, axis=1), -1)
            short.append(few[keep.sum(axis=1) < k])
        if n == num_rows:
            break
        pending = np.concatenate(short)
        n = min(n * 4, num_rows)
    return scores_QK, rows_QK


@dataclass(slots=True)
class Snapshot:
    """One state of an index, as it was when it was opened; later changes of the folder do not touch it."""

    folder: Path
    manifest: dict[str, Any]
    store: ChunkStore
    vectors: Vectors
    index: VectorIndex
    lexical: LexicalIndex | None
    _masks: dict[Filter, NDArray[np.bool_]] = field(default_factory=dict)
    _unit: float | None = None

    @classmethod
    def open(cls, folder: Path, *, device: str = "cpu") -> "Snapshot":
        """Opens the present state.

        Raises:
            FormatError: No index, unfinished or damaged.
        """
        while True:
            state = open_manifest(folder, "index")["state"]
            try:
                return cls._open(folder, read_manifest(folder, "index"), device)
            except FormatError:
                # The next state may have come while this one was being opened, and its files gone.
                if open_manifest(folder, "index")["state"] == state:
                    raise

    @classmethod
    def _open(cls, folder: Path, manifest: dict[str, Any], device: str) -> "Snapshot":
        dead_rows = None if manifest["removed"] is None else load_array(folder / manifest["removed"])
        store = ChunkStore(folder, manifest["shards"], dead_rows)
        if store.num_live_chunks != manifest["chunks"]:
            raise FormatError(
                f"{folder} holds {store.num_live_chunks:,} chunks, its manifest says {manifest['chunks']:,}: build it again "
                "(--overwrite)"
            )
        vectors = open_vectors(folder, store.shards)
        if len(vectors) != store.num_chunks:
            raise FormatError(
                f"{folder} has {len(vectors):,} vectors for {store.num_chunks:,} chunks: build it again (--overwrite)"
            )
        described = manifest["index"]
        index = VectorIndex.open(folder / described["folder"], vectors, described, device=device, dead_N=store.dead_N)
        words = manifest["lexical"]
        lexical = None if words is None else LexicalIndex.open(folder / words["folder"], words["parts"])
        return cls(folder, manifest, store, vectors, index, lexical)

    def rows_where(self, where: Filter | None) -> NDArray[np.bool_] | None:
        """Whether each row is of a document that fulfils a filter [N]; None where there is no filter."""
        if where is None:
            return None
        if where not in self._masks:
            while len(self._masks) >= 16:
                self._masks.pop(next(iter(self._masks)))
            keep_D = np.concatenate([np.empty(0, np.bool_), *(where.keep(table) for table in self.store.tables)])
            self._masks[where] = keep_D[self.store.documents_of(np.arange(self.store.num_chunks))]
        return self._masks[where]

    def find(
        self,
        queries: Sequence[str],
        vectors_QX: NDArray[np.float32] | None,
        k: int,
        *,
        method: Method,
        role: Role = "query",
        excluded_QG: NDArray[np.uint64] | None = None,
        keep_N: NDArray[np.bool_] | None = None,
    ) -> Found:
        """The best rows of each query.

        `hybrid` takes the best rows by meaning and the best by words. For chunks (`document`) it fuses both rankings by
        reciprocal rank. For questions it scores each row anew by both: by its similarity, in units of how similar passages
        differ, plus WORDS times how much of the question stands in the passage, chunk and continuation. A chunk that
        continues a better one comes last: it is there already.

        Args:
            queries: Texts.
            vectors_QX: Their vectors; not needed for `bm25`.
            k: Rows wanted.
            method: See Method.
            role: What the queries are.
            excluded_QG: Hashes of the groups that each query may not have.
            keep_N: Rows that may be found; those of removed documents never are.
        """
        n, dead_N = self.store.num_chunks, self.store.dead_N
        alive_N = keep_N
        if dead_N is not None:
            alive_N = ~dead_N if keep_N is None else keep_N & ~dead_N

        def dense(few: NDArray[np.int64], wanted: int) -> Found:
            assert vectors_QX is not None
            # What fills all the lists that are searched at first must not hide the others.
            return self.index.search(vectors_QX[few], wanted, keep_N=keep_N, all_lists=wanted == n)

        def words(few: NDArray[np.int64], wanted: int) -> Found:
            return self._words().search([queries[q] for q in few], wanted, alive_N)

        def best(fetch: Callable[[NDArray[np.int64], int], Found], wanted: int) -> Found:
            return find_neighbors(fetch, len(queries), n, wanted, self.store.groups, excluded_QG)

        method = settled(method, role, has_words=self.lexical is not None)
        if method == "dense":
            return best(dense, k)
        if method == "bm25":
            return best(words, k)
        wanted = min(max(FUSED, 4 * k), n)
        if method == "hybrid":
            both = [best(dense, wanted), best(words, wanted)]
            if role == "document":
                return self._continuations_last(*fuse(both, wanted, FUSION_CONSTANT), k)
            assert vectors_QX is not None
            rows_QK = np.concatenate([rows_QK for _, rows_QK in both], axis=1)
            return self._continuations_last(*self._by_both(queries, vectors_QX, rows_QK, wanted), k)
        _, rows_QK = best(dense, wanted)
        scores_QK = self._words().score(queries, rows_QK)
        order = np.argsort(-scores_QK, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(scores_QK, order, axis=1), np.take_along_axis(rows_QK, order, axis=1)

    def passages(
        self,
        queries: Sequence[str],
        vectors_QX: NDArray[np.float32] | None,
        k: int,
        *,
        method: Method,
        role: Role = "query",
        excluded_QG: NDArray[np.uint64] | None = None,
        keep_N: NDArray[np.bool_] | None = None,
    ) -> list[list[Passage]]:
        """The best passages of each query, best first: of a chunk its neighbors, of a question `distinct_passages`.

        The arguments are those of `find`; fewer than k are found only where there are no more.
        """
        wanted = k if role == "document" else min(2 * k, self.store.num_live_chunks)
        scores_QK, rows_QK = self.find(
            queries, vectors_QX, wanted, method=method, role=role, excluded_QG=excluded_QG, keep_N=keep_N
        )
        found = zip(rows_QK, scores_QK, strict=True)
        if role == "query":
            return [distinct_passages(self.store, rows, scores, k) for rows, scores in found]
        return [
            [
                self.store.passage(row, score)
                for row, score in zip(rows.tolist(), scores.tolist(), strict=True)
                if row >= 0
            ]
            for rows, scores in found
        ]

    def _by_both(
        self, queries: Sequence[str], vectors_QX: NDArray[np.float32], rows_QK: NDArray[np.int64], k: int
    ) -> Found:
        """The k best of some rows, each of which may be there twice, by similarity and words together."""
        rows_QK = np.sort(rows_QK, axis=1)
        rows_QK[:, 1:][rows_QK[:, 1:] == rows_QK[:, :-1]] = -1
        query_P, column_P = np.nonzero(rows_QK >= 0)
        row_P = rows_QK[query_P, column_P]
        pairs, _, similarity_P = self.index.ranked(vectors_QX, query_P, row_P, rows_QK.shape[1])
        scores_QK = np.full(rows_QK.shape, -np.inf, np.float32)
        scores_QK[query_P[pairs], column_P[pairs]] = similarity_P / self._similarity_unit()
        following_QK = np.minimum(rows_QK + 1, self.store.num_chunks - 1)
        document_QK, owner_QK = (self.store.documents_of(rows) for rows in (np.maximum(rows_QK, 0), following_QK))
        is_continued_QK = (rows_QK >= 0) & (following_QK > rows_QK) & (document_QK == owner_QK)
        passages_QKR = np.stack([rows_QK, np.where(is_continued_QK, following_QK, -1)], axis=2)
        scores_QK += np.float32(WORDS) * self._words().overlap(queries, passages_QKR, self.store.dead_N)
        # Stable, and rows ascend: of equal scores the lower row comes first.
        order = np.argsort(-scores_QK, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(scores_QK, order, axis=1), np.take_along_axis(rows_QK, order, axis=1)

    def _similarity_unit(self) -> float:
        """Standard deviation of the similarity of a passage to another, over random pairs of those that were not removed; 1 where
        all are alike.

        Encoders differ in the range of their similarities: so neither a shift nor another scale changes what is found.
        """
        if self._unit is None:
            n, random = self.store.num_live_chunks, np.random.default_rng(0)
            if n < 2:
                return 1.0
            first_P = random.integers(n, size=UNIT_PAIRS)
            second_P = (first_P + random.integers(1, n, size=UNIT_PAIRS)) % n
            first_P, second_P = self.store.live_rows(np.stack([first_P, second_P]))
            first_PX = self.vectors.gather(first_P)
            if (
                self.index.metric == "inner product"
            ):  # then questions have length 1, and passages from elsewhere may not
                first_PX /= np.maximum(np.linalg.norm(first_PX, axis=1, keepdims=True), np.finfo(np.float32).tiny)
            _, _, similarity_P = self.index.ranked(first_PX, np.arange(UNIT_PAIRS), second_P, 1)
            self._unit = float(similarity_P.std(dtype=np.float64)) or 1.0
        return self._unit

    def _continuations_last(self, scores_QK: NDArray[np.float32], rows_QK: NDArray[np.int64], k: int) -> Found:
        """Puts a chunk that is the continuation of a better one behind all others: it is there already.

        Its score is lowered by 1 more than the best and the worst differ by.
        """
        documents_QK = self.store.documents_of(np.maximum(rows_QK, 0))
        for scores, rows, documents in zip(scores_QK, rows_QK.tolist(), documents_QK.tolist(), strict=True):
            num_rows = sum(row >= 0 for row in rows)
            taken: set[tuple[int, int]] = set()
            drop = 1 + scores[0] - scores[num_rows - 1] if num_rows else 0
            for place, (row, document) in enumerate(zip(rows[:num_rows], documents, strict=False)):
                if (row - 1, document) in taken:
                    scores[place] -= drop
                else:
                    taken.add((row, document))
        order = np.argsort(-scores_QK, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(scores_QK, order, axis=1), np.take_along_axis(rows_QK, order, axis=1)

    def _words(self) -> LexicalIndex:
        if self.lexical is None:
            raise ConfigError(
                f"{self.folder} has no BM25 index (it was built with --lexical off): search it with --retriever dense, or "
                "run `retro index compact --lexical english`"
            )
        return self.lexical


def distinct_passages(store: ChunkStore, rows: NDArray[np.int64], scores: NDArray[np.float32], k: int) -> list[Passage]:
    """The k best passages that hits make, best first; fewer where there are no more.

    A passage is a chunk with its continuation. So a hit that continues a better one is there already: the two are one passage, and
    what else there is comes first.

    Args:
        store: Of the rows.
        rows: Best first, -1 for none [K].
        scores: Theirs [K].
        k: Passages wanted.
    """
    few = rows >= 0
    rows, scores = rows[few], scores[few]
    documents = store.documents_of(rows).tolist()
    taken: set[tuple[int, int]] = set()
    continuing = []
    for place, (row, document) in enumerate(zip(rows.tolist(), documents, strict=True)):
        if (row - 1, document) in taken:
            continuing.append(place)
        else:
            taken.add((row, document))
    order = [place for place in range(len(rows)) if place not in continuing] + continuing
    return [store.passage(int(rows[place]), float(scores[place])) for place in order[:k]]


class IndexRetriever:
    """Passages of an index; implements `retro.generate.Retriever`.

    It follows the folder: a document that was added or removed by anybody is there or gone at the next call.
    """

    def __init__(
        self,
        folder: Path,
        encoder: Encoder | Callable[[], Encoder],
        *,
        method: Method = "dense",
        where: Filter | None = None,
        device: str = "cpu",
    ) -> None:
        if method not in (*METHODS, AUTO):
            raise ConfigError(f"retriever {method!r} is unknown: use {', '.join(METHODS)}")
        self.folder = folder
        self._encoder: Encoder | None = None if callable(encoder) else encoder
        self._open_encoder = encoder if callable(encoder) else None
        self._opening = threading.Lock()
        self.method: Method = method
        self.where = where
        """What every search is confined to; a search can only narrow it."""
        self._device = device
        self._seen = _identity(folder)
        self._snapshot = Snapshot.open(folder, device=device)
        self._check_encoder(self._encoder)
        if method not in ("dense", AUTO):
            self._snapshot._words()

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        device: str = "cpu",
        encoder: str | None = None,
        method: Method = "dense",
        where: Filter | str | None = None,
        dtype: str = "auto",
        trust_remote_code: bool = False,
    ) -> "IndexRetriever":
        """Opens an index with the encoder it was built with.

        Args:
            path: Folder made by `retro index build`.
            device: Where the encoder runs, and FAISS where it can.
            encoder: Where that encoder lies now, if not where it was.
            method: How passages are found.
            where: What every search is confined to.
            dtype: In which the encoder computes.
            trust_remote_code: Whether code that comes with an encoder of the hub may run.

        Raises:
            FormatError: No index, unfinished or damaged.
            MismatchError: The encoder is another one; with `bm25`, which opens none, when it is needed.
            ConfigError: The index has nothing to search by this method.
        """
        folder = Path(path)
        condition = Filter.parse(where) if isinstance(where, str) else where
        made_with = open_manifest(folder, "index")["encoder"]

        def reopen() -> Encoder:
            return Encoder.reopen(
                made_with, name=encoder, device=device, dtype=dtype, trust_remote_code=trust_remote_code
            )

        # Who searches by words alone need not wait for an encoder, nor have it.
        opened = reopen if method == "bm25" else reopen()
        return cls(folder, opened, method=method, where=condition, device=device)

    @property
    def encoder(self) -> Encoder:
        """What the vectors were made with. Opened when it is first needed, where the method was `bm25`.

        Raises:
            ConfigError, DependencyError, MismatchError: As `open`.
        """
        with self._opening:
            if self._encoder is None:
                assert self._open_encoder is not None
                opened = self._open_encoder()
                self._check_encoder(opened)
                self._encoder = opened
            return self._encoder

    def snapshot(self) -> Snapshot:
        """The present state of the index, opened anew where it has changed."""
        if (identity := _identity(self.folder)) != self._seen:
            self._snapshot = Snapshot.open(self.folder, device=self._device)
            self._seen = identity
            self._check_encoder(self._encoder)
        return self._snapshot

    @property
    def store(self) -> ChunkStore:
        """Documents and chunks of the present state."""
        return self.snapshot().store

    @property
    def manifest(self) -> dict[str, Any]:
        """Of the present state."""
        return self.snapshot().manifest

    @property
    def encoder_fingerprint(self) -> str:
        """Of the encoder that the vectors were made with, which need not be open."""
        return str(self.manifest["encoder"]["fingerprint"])

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
        where: Filter | str | None = None,
    ) -> list[list[Passage]]:
        """See `retro.generate.Retriever`.

        Raises:
            ConfigError: An empty query, a malformed filter, or k larger than the index.
        """
        now = self.snapshot()
        if k < 1:
            raise ConfigError(f"k = {k}: ask for at least one passage")
        if k > now.store.num_live_chunks:
            raise ConfigError(
                f"k = {k} is more than the {now.store.num_live_chunks:,} chunks of {self.folder}: lower k"
            )
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
                excluded_QG[row, : len(groups)] = [name_hash(group) for group in groups]
        condition = Filter.parse(where) if isinstance(where, str) else where
        if self.where is not None:
            condition = self.where if condition is None else self.where.narrowed(condition)
        return now.passages(
            queries,
            self._vectors(queries, role),
            k,
            method=self.method,
            role=role,
            excluded_QG=excluded_QG,
            keep_N=now.rows_where(condition),
        )

    def find(
        self,
        queries: Sequence[str],
        k: int,
        *,
        role: Role,
        excluded_QG: NDArray[np.uint64] | None,
        keep_N: NDArray[np.bool_] | None,
        snapshot: Snapshot,
    ) -> Found:
        """Rows instead of passages, of one state of the index; see `Snapshot.find`."""
        return snapshot.find(
            queries,
            self._vectors(queries, role),
            k,
            method=self.method,
            role=role,
            excluded_QG=excluded_QG,
            keep_N=keep_N,
        )

    def _vectors(self, queries: Sequence[str], role: Role) -> NDArray[np.float32] | None:
        return None if self.method == "bm25" else self.encoder.encode(queries, role)

    def _check_encoder(self, encoder: Encoder | None) -> None:
        """Of one that is not open yet nothing is known."""
        made_with = self._snapshot.manifest["encoder"]
        if encoder is not None and encoder.fingerprint != made_with["fingerprint"]:
            raise MismatchError(
                f"{self.folder} was built with the encoder {made_with['name']} ({made_with['fingerprint']}), not with "
                f"{encoder.name} ({encoder.fingerprint}): their vectors cannot be compared. Use that encoder, or build again"
            )


def _identity(folder: Path) -> tuple[int, int, int]:
    """Changes with every state of an index: its manifest is replaced, never altered."""
    try:
        info = (folder / MANIFEST).stat()
    except OSError:
        return (0, 0, 0)
    return info.st_ino, info.st_mtime_ns, info.st_size
