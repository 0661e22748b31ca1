"""Training data: a tokenized corpus with the neighbors of its chunks, none of their own group."""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from index_builder.config import DataConfig
from index_builder.corpus import describe_corpora
from index_builder.search import IndexRetriever, find_neighbors
from index_builder.shards import Progress, count_rejects, read_shards
from retro.artifact import begin, finish, read_json, write_atomically, write_json, writing
from retro.chunks import (
    SPLITS,
    Document,
    TokenizedDocument,
    TrainingData,
    group_hash,
    load_array,
    save_array,
    shard_path,
)
from retro.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


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
    recipe = {
        "config": asdict(config),
        "corpora": describe_corpora(corpora),
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "index_fingerprint": retriever.fingerprint,
    }
    with writing(out):
        if begin(out, TrainingData.KIND, recipe, overwrite=overwrite):
            logger.info("%s is there already, made by the same settings", out)
            manifest: dict[str, Any] = read_json(out / "manifest.json")
            return manifest
        tokenizer.save(out)
        work = out / "shards"
        counts = _make_shards(corpora, work, out, tokenizer, retriever, config, progress)
        counts |= _collect(work, out, tokenizer, retriever, config)
        for path in sorted(work.iterdir()):
            path.unlink()
        work.rmdir()
        finish(
            out,
            TrainingData.KIND,
            recipe,
            {
                "chunk_len": config.chunk_len,
                "tokenizer_fingerprint": tokenizer.fingerprint,
                "vocab_size": tokenizer.vocab_size,
                "encoder_fingerprint": retriever.encoder.fingerprint,
                **counts,
            },
        )
    made: dict[str, Any] = read_json(out / "manifest.json")
    return made


def _make_shards(
    corpora: Sequence[str],
    work: Path,
    out: Path,
    tokenizer: Tokenizer,
    retriever: IndexRetriever,
    config: DataConfig,
    progress: Progress | None,
) -> dict[str, int]:
    """Reads, tokenizes and searches; a shard's `counts` file comes last and marks it finished."""
    number, records, documents_done, chunks_done, rejects = 0, 0, 0, 0, 0
    while (path := shard_path(work, number, ".counts.json")).is_file():
        counts = read_json(path)
        records, rejects = counts["records"], counts["rejects"]
        documents_done += counts["documents"]
        chunks_done += counts["chunks"]
        number += 1
    for shard in read_shards(
        corpora,
        config.read,
        make=lambda document: _tokenized(document, tokenizer, config),
        size=lambda tokenized: -(-(tokenized.lead + len(tokenized.ids)) // config.chunk_len),
        shard_size=config.shard_chunks,
        skip_records=records,
        rejects_file=out / "rejects.jsonl",
        rejects_before=rejects,
    ):
        documents_done += len(shard.documents)
        chunks = _write_shard(work, number, shard.made, shard.documents, tokenizer, retriever, config)
        chunks_done += chunks
        counts = {
            "records": shard.records,
            "rejects": shard.rejects,
            "documents": len(shard.documents),
            "chunks": chunks,
        }
        write_json(shard_path(work, number, ".counts.json"), counts)
        number += 1
        if progress is not None:
            progress("neighbors of chunks", chunks_done, None)
    return {"documents": documents_done, "chunks": chunks_done, "rejects": count_rejects(out / "rejects.jsonl")}


def _tokenized(document: Document, tokenizer: Tokenizer, config: DataConfig) -> TokenizedDocument:
    """Puts a document on its grid; split and lead follow from the seed and the names alone."""
    draw = np.random.default_rng([config.seed, group_hash(document.group)]).random()
    if document.split:
        split = SPLITS.index(document.split)
    elif draw < config.valid_share:
        split = SPLITS.index("valid")
    elif draw < config.valid_share + config.test_share:
        split = SPLITS.index("test")
    else:
        split = SPLITS.index("train")
    lead = 0
    random = np.random.default_rng([config.seed, 1, group_hash(document.key)])
    if split == SPLITS.index("train") and random.random() < config.lead_share:
        lead = int(random.integers(1, config.chunk_len))
    return TokenizedDocument.make(document.text, tokenizer, config.chunk_len, lead=lead, split=split)


def _write_shard(
    work: Path,
    number: int,
    tokenized: list[TokenizedDocument],
    documents: list[Document],
    tokenizer: Tokenizer,
    retriever: IndexRetriever,
    config: DataConfig,
) -> int:
    """Looks up the neighbors of one shard and writes its arrays; returns the number of its chunks."""
    M, K = config.chunk_len, config.num_neighbors
    place, queries, groups = [], [], []
    chunk = 0
    for document, entry in zip(documents, tokenized, strict=True):
        for offset, query in enumerate(entry.queries):
            if query.strip():
                place.append(chunk + offset)
                queries.append(query)
                groups.append(group_hash(document.group))
        chunk += -(-(entry.lead + len(entry.ids)) // M)
    vectors_QX = retriever.encoder.encode(queries, "document")
    excluded = np.array(groups, np.uint64)[:, None] if config.exclude == "group" else None
    scores_QK, rows_QK = find_neighbors(retriever.index, retriever.store, vectors_QX, K, excluded)
    rows_NK = np.full((chunk, K), -1, np.int64)
    scores_NK = np.full((chunk, K), np.nan, np.float32)
    rows_NK[place] = rows_QK
    scores_NK[place] = np.where(rows_QK >= 0, scores_QK, np.nan)
    ids_type = _ids_type(tokenizer)
    columns = [(len(e.ids), e.lead, e.split, e.num_bytes) for e in tokenized]
    save_array(shard_path(work, number, ".ids.npy"), np.concatenate([e.ids for e in tokenized]).astype(ids_type))
    save_array(shard_path(work, number, ".documents.npy"), np.array(columns, np.int64))
    save_array(shard_path(work, number, ".rows.npy"), rows_NK)
    save_array(shard_path(work, number, ".scores.npy"), scores_NK)
    return chunk


def _collect(
    work: Path, out: Path, tokenizer: Tokenizer, retriever: IndexRetriever, config: DataConfig
) -> dict[str, int]:
    """Shards to the flat arrays of TrainingData, and the text of every neighbor to tokens; returns counts."""

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
    lengths_U = np.zeros(U, np.int32)
    for start in range(0, U, 1024):
        texts = [retriever.store.passage(int(row)).full_text for row in index_rows[start : start + 1024]]
        for offset, ids in enumerate(tokenizer.encode_batch(texts)):
            n = min(len(ids), R)
            ids_UR[start + offset, :n] = ids[:n]
            lengths_U[start + offset] = n
    save_array(near / "neighbor_ids.npy", ids_UR)
    save_array(near / "neighbor_lengths.npy", lengths_U)
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
