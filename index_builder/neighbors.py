"""Training data: a tokenized corpus with the neighbors of its chunks, none of their own group nor of an evaluation's words."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from index_builder.config import DataConfig
from index_builder.corpus import describe_corpora, read_documents
from index_builder.duplicates import NearDuplicates, NGrams, signatures
from index_builder.filters import Filter
from index_builder.search import Found, IndexRetriever, Snapshot, find_neighbors
from index_builder.shards import Progress, Shard, ShardReader
from retro.artifact import begin, finish, read_json, sha256, write_atomically, write_json, writing
from retro.chunks import (
    SPLITS,
    ChunkStore,
    Document,
    TokenizedDocument,
    TrainingData,
    load_array,
    name_hash,
    save_array,
    shard_path,
)
from retro.errors import FormatError, MismatchError
from retro.tokenizer import Tokenizer

logger = logging.getLogger(__name__)
_BLOCK = 1024
"""Neighbors that are tokenized in one go."""


def build_training_data(
    corpora: Sequence[str],
    out: Path,
    *,
    tokenizer: Tokenizer,
    retriever: IndexRetriever,
    config: DataConfig,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Tokenizes a corpus for one model and looks up the neighbors of all its chunks.

    Works in shards; interrupted and called again with the same arguments it goes on after the last finished one.

    Args:
        corpora: As for `build_index`.
        out: Folder of the training data.
        tokenizer: The model's.
        retriever: The index that neighbors come from.
        config: See DataConfig.
        overwrite: Start again where something else was begun or made.
        progress: Told how far it is.

    Returns:
        The manifest.

    Raises:
        CorpusError, ConfigError, FormatError, StorageError: As their names say.
    """
    snapshot = retriever.snapshot()
    recipe = {
        "config": asdict(config),
        "corpora": describe_corpora(corpora),
        "evaluation": describe_corpora(config.exclude_ngrams_of) if config.exclude_ngrams_of else [],
        "neighbors_sha256": sha256(Path(config.neighbors)) if config.neighbors else None,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "index_fingerprint": retriever.fingerprint,
        "retriever": retriever.method,
    }
    with writing(out):
        if begin(out, TrainingData.KIND, recipe, overwrite=overwrite):
            logger.info("%s is there already, made by the same settings", out)
            manifest: dict[str, Any] = read_json(out / "manifest.json")
            return manifest
        tokenizer.save(out)
        work = out / "shards"
        search = _Search(retriever, snapshot, config, work, progress)
        counts = _make_shards(corpora, work, out, tokenizer, search, config, progress)
        counts |= collect(work, out, tokenizer, snapshot.store, config)
        for path in sorted(work.iterdir()):
            path.unlink()
        work.rmdir()
        complete(out, recipe, tokenizer, config, retriever.encoder_fingerprint, counts)
    made: dict[str, Any] = read_json(out / "manifest.json")
    return made


def complete(
    out: Path,
    recipe: dict[str, Any],
    tokenizer: Tokenizer,
    config: DataConfig,
    encoder_fingerprint: str,
    counts: dict[str, int],
) -> None:
    """Writes the manifest of training data whose arrays are all there."""
    fields = {
        "chunk_len": config.chunk_len,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "encoder_fingerprint": encoder_fingerprint,
        **counts,
    }
    finish(out, TrainingData.KIND, recipe, fields)


class _Search:
    """The neighbors of a corpus' chunks in one state of an index, or out of a table made elsewhere, with all exclusions."""

    def __init__(
        self,
        retriever: IndexRetriever,
        snapshot: Snapshot,
        config: DataConfig,
        work: Path,
        progress: Progress | None,
    ) -> None:
        self._retriever = retriever
        self._snapshot = snapshot
        self._config = config
        self._progress = progress
        store = snapshot.store
        self._keep_N = snapshot.rows_where(Filter.parse(config.where) if config.where else None)
        if config.exclude_ngrams_of:
            banned_N = self._cached(work / "banned.npy", self._overlapping_rows)
            self._keep_N = ~banned_N if self._keep_N is None else self._keep_N & ~banned_N
        self._duplicates = None
        if config.exclude_near_duplicates:
            signatures_DP = self._cached(work / "signatures.npy", self._signatures)
            self._duplicates = NearDuplicates(signatures_DP)
            self._group_of_document = np.concatenate([t["group_hash"].to_numpy() for t in store.tables])
        self._table_NK = None if config.neighbors is None else _load_table(Path(config.neighbors), store.num_chunks)

    def find(
        self, queries: list[str], places: NDArray[np.int64], owners: NDArray[np.int64], documents: list[Document]
    ) -> Found:
        """Scores and rows [Q, K] for chunks of some documents.

        Args:
            queries: Their texts.
            places: Their numbers in the whole corpus [Q].
            owners: Which of the documents each is of [Q].
            documents: See above.
        """
        K = self._config.num_neighbors
        excluded_QG = None if self._config.exclude == "none" else self._excluded(documents)[owners]
        if self._table_NK is None:
            return self._retriever.find(
                queries, K, role="document", excluded_QG=excluded_QG, keep_N=self._keep_N, snapshot=self._snapshot
            )
        if len(places) and places[-1] >= len(self._table_NK):
            raise MismatchError(
                f"{self._config.neighbors} has rows for {len(self._table_NK):,} chunks, the corpus has more (chunk "
                f"{places[-1]:,}): it was made for another corpus or tokenizer, or for other leads (--lead-share 0)"
            )
        table_QK = np.asarray(self._table_NK[places])
        rank_QK = np.where(table_QK >= 0, -np.arange(table_QK.shape[1], dtype=np.float32), -np.inf)
        # What a table says is filtered like the result of a search: a lower rank is a lower score.
        keep_QK = table_QK >= 0
        for mask in (self._keep_N, None if self._snapshot.store.dead_N is None else ~self._snapshot.store.dead_N):
            if mask is not None:
                keep_QK &= mask[np.maximum(table_QK, 0)]
        ordered = np.argsort(~keep_QK, axis=1, kind="stable")
        rank_QK = np.take_along_axis(np.where(keep_QK, rank_QK, -np.inf), ordered, axis=1).astype(np.float32)
        table_QK = np.take_along_axis(np.where(keep_QK, table_QK, -1), ordered, axis=1)
        return find_neighbors(
            lambda few, n: (rank_QK[few, :n], table_QK[few, :n]),
            len(queries),
            table_QK.shape[1],
            K,
            self._snapshot.store.groups,
            excluded_QG,
        )

    def check_complete(self, num_chunks: int) -> None:
        """Raises MismatchError where a table has more rows than the corpus has chunks."""
        if self._table_NK is not None and len(self._table_NK) != num_chunks:
            raise MismatchError(
                f"{self._config.neighbors} has rows for {len(self._table_NK):,} chunks, the corpus has {num_chunks:,}: it was "
                "made for another corpus or tokenizer, or for other leads (--lead-share 0)"
            )

    def _excluded(self, documents: list[Document]) -> NDArray[np.uint64]:
        """Hashes of the groups that each document may have no neighbors of [D, G]: its own, and those of its near-duplicates."""
        own_D = np.array([name_hash(document.group) for document in documents], np.uint64)
        if self._duplicates is None:
            return own_D[:, None]
        matches = self._duplicates.matches(signatures([document.text for document in documents]))
        excluded_DG = np.repeat(own_D[:, None], 1 + max(map(len, matches), default=0), axis=1)
        for row, numbers in enumerate(matches):
            excluded_DG[row, 1 : 1 + len(numbers)] = self._group_of_document[numbers]
        return excluded_DG

    def _overlapping_rows(self) -> NDArray[np.bool_]:
        """Rows whose chunk and continuation share 13 words in a row with a document of the evaluation files."""
        options = replace(self._config.read, limit=None, on_error="stop", deduplicate="none", vectors_field=None)
        evaluation = read_documents(self._config.exclude_ngrams_of, options)
        ngrams = NGrams.of_texts(item.text for item in evaluation if isinstance(item, Document))
        store, parts = self._snapshot.store, []
        for shard in range(len(store.shards)):
            texts = []
            for document, spans in store.shard_documents(shard):
                ends = spans[1:, 1].tolist() + spans[-1:, 1].tolist()
                texts += [document.text[start:end] for start, end in zip(spans[:, 0].tolist(), ends, strict=True)]
            parts.append(ngrams.overlap(texts))
            self._report("evaluation's 13-grams", shard, store)
        banned_N = np.concatenate(parts)
        logger.info("%s of %s chunks share 13 words in a row with the evaluation files", banned_N.sum(), len(banned_N))
        return banned_N

    def _signatures(self) -> NDArray[np.uint32]:
        store, parts = self._snapshot.store, []
        for shard, table in enumerate(store.tables):
            parts.append(signatures(table["text"].to_pylist()))
            self._report("near-duplicates", shard, store)
        return np.concatenate(parts)

    def _report(self, stage: str, shard: int, store: ChunkStore) -> None:
        if self._progress is not None:
            self._progress(stage, int(store.first_row[shard + 1]), store.num_chunks)

    @staticmethod
    def _cached(path: Path, make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        if not path.is_file():
            save_array(path, make())
        return load_array(path)


def _load_table(path: Path, num_rows: int) -> NDArray[np.int64]:
    """Neighbors made elsewhere: index rows of each chunk of the corpus [N, K'], -1 where there is none.

    A .npy array of integers, or a Parquet file with the columns `chunk` (0 to N - 1 in any order) and `neighbors` (lists, all of
    one length).

    Raises:
        FormatError: It is no such file, or holds a row that the index does not have.
    """
    try:
        if path.suffix == ".npy":
            table_NK = load_array(path)
        else:
            table = pq.read_table(path, columns=["chunk", "neighbors"]).sort_by("chunk")
            if not np.array_equal(table["chunk"].to_numpy(), np.arange(len(table))):
                raise FormatError(f"{path}: its chunks are not 0 to {len(table) - 1:,}, each once")
            table_NK = np.array(table["neighbors"].to_pylist())
    except (OSError, pa.ArrowInvalid, pa.ArrowKeyError, ValueError) as error:
        raise FormatError(
            f"{path} is no table of neighbors ({error}): give a .npy of integers [chunks, k], or a Parquet file with the columns "
            "chunk and neighbors"
        ) from error
    if table_NK.ndim != 2 or not np.issubdtype(table_NK.dtype, np.integer) or table_NK.shape[1] < 1:
        raise FormatError(f"{path} holds {table_NK.dtype} of shape {list(table_NK.shape)}, not integers of [chunks, k]")
    if len(table_NK) and not -1 <= int(table_NK.min()) <= int(table_NK.max()) < num_rows:
        raise FormatError(
            f"{path} names rows from {table_NK.min():,} to {table_NK.max():,}; the index has rows 0 to {num_rows - 1:,}, and -1 "
            "means none"
        )
    return table_NK


def _make_shards(
    corpora: Sequence[str],
    work: Path,
    out: Path,
    tokenizer: Tokenizer,
    search: _Search,
    config: DataConfig,
    progress: Progress | None,
) -> dict[str, int]:
    """Reads, tokenizes and searches; a shard's `counts` file comes last and marks it finished."""
    chunks = 0

    def wanted(number: int) -> bool:
        nonlocal chunks
        path = shard_path(work, number, ".counts.json")
        if not path.is_file():
            return True
        chunks += read_json(path)["chunks"]
        return False

    reader = ShardReader(
        corpora,
        config.read,
        make=lambda document: tokenized(document, tokenizer, config),
        shard_chars=config.shard_chars,
        rejects_file=out / "rejects.jsonl",
        wanted=wanted,
    )
    for shard in reader:
        made = _write_shard(work, shard, chunks, tokenizer, search, config)
        write_json(shard_path(work, shard.number, ".counts.json"), {"chunks": made})
        chunks += made
        if progress is not None:
            progress("neighbors of chunks", chunks, None)
    search.check_complete(chunks)
    return {
        "documents": reader.num_documents,
        "chunks": chunks,
        "rejects": reader.num_rejects,
        "duplicates": reader.num_duplicates,
    }


def tokenized(document: Document, tokenizer: Tokenizer, config: DataConfig) -> TokenizedDocument:
    """Puts a document on its grid; split and lead follow from the seed and the names alone."""
    split = document.drawn_split(config.seed, config.valid_share, config.test_share)
    lead = 0
    random = np.random.default_rng([config.seed, 1, name_hash(document.key)])
    if split == SPLITS.index("train") and random.random() < config.lead_share:
        lead = int(random.integers(1, config.chunk_len))
    return TokenizedDocument.make(document.text, tokenizer, config.chunk_len, lead=lead, split=split)


def _write_shard(
    work: Path,
    shard: Shard[TokenizedDocument],
    first_chunk: int,
    tokenizer: Tokenizer,
    search: _Search,
    config: DataConfig,
) -> int:
    """Looks up the neighbors of one shard and writes its arrays; returns the number of its chunks."""
    M, K = config.chunk_len, config.num_neighbors
    place, queries, owners = [], [], []
    chunk = 0
    for number, entry in enumerate(shard.made):
        for offset, query in enumerate(entry.queries):
            if query.strip():
                place.append(chunk + offset)
                queries.append(query)
                owners.append(number)
        chunk += -(-(entry.lead + len(entry.ids)) // M)
    places = np.array(place, np.int64)
    scores_QK, rows_QK = search.find(queries, first_chunk + places, np.array(owners, np.int64), shard.documents)
    rows_NK = np.full((chunk, K), -1, np.int64)
    scores_NK = np.full((chunk, K), np.nan, np.float32)
    rows_NK[places] = rows_QK
    scores_NK[places] = np.where(rows_QK >= 0, scores_QK, np.nan)
    write_tokens(work, shard.number, shard.made, tokenizer)
    write_rows(work, shard.number, rows_NK, scores_NK)
    return chunk


def write_tokens(work: Path, number: int, made: Sequence[TokenizedDocument], tokenizer: Tokenizer) -> None:
    """The tokens of one shard's documents, for `collect`."""
    columns = [(len(e.ids), e.lead, e.split, e.num_bytes) for e in made]
    ids = np.concatenate([e.ids for e in made]).astype(_ids_type(tokenizer))
    save_array(shard_path(work, number, ".ids.npy"), ids)
    save_array(shard_path(work, number, ".documents.npy"), np.array(columns, np.int64))


def write_rows(work: Path, number: int, rows_NK: NDArray[np.int64], scores_NK: NDArray[np.float32]) -> None:
    """The neighbors of one shard's chunks, partial ones included, for `collect`: rows of the index, -1 where there is none."""
    save_array(shard_path(work, number, ".rows.npy"), rows_NK)
    save_array(shard_path(work, number, ".scores.npy"), scores_NK)


class NeighborTokens(NamedTuple):
    """Neighbors in a model's tokens."""

    ids_UR: NDArray[Any]
    """Chunk and continuation as one string, cut after R tokens; 0 beyond."""
    lengths_U: NDArray[np.int32]
    """How many tokens each has."""
    chunk_lengths_U: NDArray[np.int32]
    """How many of these are the chunk's own."""


def neighbor_tokens(store: ChunkStore, index_rows: NDArray[np.int64], tokenizer: Tokenizer, R: int) -> NeighborTokens:
    """Tokenizes some rows of an index [U] as neighbors."""
    U = len(index_rows)
    ids_UR = np.zeros((U, R), _ids_type(tokenizer))
    lengths_U, chunk_lengths_U = np.zeros(U, np.int32), np.zeros(U, np.int32)
    passages = [store.passage(int(row)) for row in index_rows]
    texts = [passage.full_text for passage in passages]
    encodings = tokenizer.backend.encode_batch(texts, add_special_tokens=False)
    for row, (passage, encoding) in enumerate(zip(passages, encodings, strict=True)):
        ids = encoding.ids[:R]
        ids_UR[row, : len(ids)] = ids
        lengths_U[row] = len(ids)
        # A token that the border between chunk and continuation splits is the chunk's.
        chunk_lengths_U[row] = sum(first < len(passage.text) for first, _ in encoding.offsets[:R])
    return NeighborTokens(ids_UR, lengths_U, chunk_lengths_U)


def collect(
    work: Path,
    out: Path,
    tokenizer: Tokenizer,
    store: ChunkStore,
    config: DataConfig,
    *,
    make: Callable[[Iterable[NDArray[np.int64]]], Iterable[NeighborTokens]] | None = None,
) -> dict[str, int]:
    """Shards to the flat arrays of TrainingData, and the text of every neighbor to tokens.

    Args:
        work: The shards, by `write_tokens` and `write_rows`.
        out: Folder of the training data.
        tokenizer: The model's.
        store: Of the index.
        config: See DataConfig.
        make: `neighbor_tokens` of blocks of rows, in order, where others than this process are to do it.

    Returns:
        Counts for the manifest.
    """

    def shards(name: str) -> list[NDArray[Any]]:
        return [load_array(path) for path in sorted(work.glob(f"*.{name}.npy"))]

    documents_D4 = np.concatenate(shards("documents"))
    rows = shards("rows")
    index_rows = np.unique(np.concatenate([np.unique(r[r >= 0]) for r in rows]))
    tokens, near = out / "tokens", out / "neighbors"
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(documents_D4[:, 0], dtype=np.int64)])
    small: dict[str, NDArray[Any]] = {
        "starts": starts,
        "leads": documents_D4[:, 1].astype(np.int32),
        "splits": documents_D4[:, 2].astype(np.uint8),
        "num_bytes": documents_D4[:, 3],
    }
    for name, array in small.items():
        save_array(tokens / f"{name}.npy", array)
    _save_concatenated(tokens / "ids.npy", shards("ids"))
    numbered = [np.where(r >= 0, np.searchsorted(index_rows, r), -1) for r in rows]
    _save_concatenated(near / "neighbors.npy", numbered)
    _save_concatenated(near / "scores.npy", shards("scores"))
    save_array(near / "index_rows.npy", index_rows)

    U, R = len(index_rows), config.neighbor_len
    ids_UR = np.zeros((U, R), _ids_type(tokenizer))
    lengths_U, chunk_lengths_U = np.zeros(U, np.int32), np.zeros(U, np.int32)
    blocks = (index_rows[start : start + _BLOCK] for start in range(0, U, _BLOCK))
    found = make(blocks) if make is not None else (neighbor_tokens(store, b, tokenizer, R) for b in blocks)
    start = 0
    for part in found:
        few = slice(start, start + len(part.lengths_U))
        ids_UR[few], lengths_U[few], chunk_lengths_U[few] = part
        start = few.stop
    save_array(near / "neighbor_ids.npy", ids_UR)
    save_array(near / "neighbor_lengths.npy", lengths_U)
    save_array(near / "neighbor_chunk_lengths.npy", chunk_lengths_U)
    with_neighbors = sum(int((r >= 0).any(axis=1).sum()) for r in rows)
    return {"tokens": int(starts[-1]), "chunks_with_neighbors": with_neighbors, "different_neighbors": U}


def _save_concatenated(path: Path, arrays: list[NDArray[Any]]) -> None:
    """Writes arrays, one after the other, as one .npy without holding them all."""
    length = sum(len(a) for a in arrays)
    header = {
        "descr": np.lib.format.dtype_to_descr(arrays[0].dtype),
        "fortran_order": False,
        "shape": (length, *arrays[0].shape[1:]),
    }

    def write(file: Any) -> None:
        np.lib.format.write_array_header_1_0(file, header)
        for array in arrays:
            file.write(np.ascontiguousarray(array).data)

    write_atomically(path, write)


def _ids_type(tokenizer: Tokenizer) -> Any:
    return np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
