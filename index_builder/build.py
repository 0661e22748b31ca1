"""Building an index in stages, each resumable by the shard: read and chunk, encode, index, finish."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from index_builder.config import BuildConfig
from index_builder.corpus import ReadOptions, describe_corpora, read_documents
from index_builder.encoder import Encoder
from index_builder.index import VectorIndex, plan_index
from index_builder.search import INDEX_FILE
from index_builder.shards import Progress, count_rejects, read_shards
from retro.artifact import MANIFEST, begin, find_damage, finish, open_manifest, read_json, write_json, writing
from retro.chunks import ChunkStore, Document, Int64s, chunk_spans, load_array, save_array, shard_path, write_documents
from retro.tokenizer import Tokenizer

logger = logging.getLogger(__name__)
READ_COUNTS = "documents/counts.json"


def build_index(
    corpora: Sequence[str],
    out: str | Path,
    config: BuildConfig | None = None,
    *,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Turns corpora into a searchable index.

    Interrupted at any moment and called again with the same arguments, it goes on after the last finished shard; the result is the
    same, byte for byte.

    Args:
        corpora: Files, folders, `NAME=PATH`, `hf:NAME[@REVISION][/CONFIG]:SPLIT`.
        out: Folder of the index.
        config: See BuildConfig.
        device: Where the encoder runs.
        overwrite: Start again where something else was begun or made.
        progress: Told how far it is.

    Returns:
        The manifest.

    Raises:
        CorpusError: A document source that is missing or malformed.
        ConfigError: A setting that cannot work, or another one than the unfinished index was begun with.
        StorageError: The disk is full or not writable; what is finished is kept.
    """
    config = config or BuildConfig()
    folder = Path(out)
    described = describe_corpora(corpora)
    encoder = Encoder.open(config.encoder, revision=config.revision, device=device)
    tokenizer = Tokenizer.load(config.tokenizer) if config.tokenizer else encoder.tokenizer()
    recipe = {
        "config": asdict(config),
        "corpora": described,
        "encoder_fingerprint": encoder.fingerprint,
        "tokenizer_fingerprint": tokenizer.fingerprint,
    }
    with writing(folder):
        if begin(folder, "index", recipe, overwrite=overwrite):
            logger.info("%s is there already, made by the same settings", folder)
            manifest: dict[str, Any] = read_json(folder / MANIFEST)
            return manifest
        tokenizer.save(folder)
        counts = _read(corpora, folder, tokenizer, config, progress)
        store = ChunkStore(folder)
        truncated = _encode(folder, store, encoder, config, progress)
        index = _index(folder, store, encoder, config, progress)
        fields = {
            "documents": store.num_documents,
            "chunks": store.num_chunks,
            "rejects": counts["rejects"],
            "truncated_chunks": truncated,
            "chunk_len": config.chunk_len,
            "title_in_key": config.title_in_key,
            "encoder": encoder.description(),
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "index": index,
        }
        finish(folder, "index", recipe, fields)
    made: dict[str, Any] = read_json(folder / MANIFEST)
    return made


def train_tokenizer(
    corpora: Sequence[str],
    out: Path,
    *,
    vocab_size: int,
    options: ReadOptions,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Tokenizer:
    """Trains a byte-level BPE on the texts of corpora and saves it.

    Raises:
        CorpusError, ConfigError, StorageError: As for `build_index`.
    """
    recipe = {"vocab_size": vocab_size, "corpora": describe_corpora(corpora), "read": asdict(options)}

    def texts() -> Iterator[str]:
        for number, item in enumerate(read_documents(corpora, options), 1):
            if isinstance(item, Document):
                yield item.text
            if progress is not None and number % 1000 == 0:
                progress("read", number, None)

    with writing(out):
        if not begin(out, "tokenizer", recipe, overwrite=overwrite):
            tokenizer = Tokenizer.train(texts(), vocab_size)
            tokenizer.save(out)
            finish(out, "tokenizer", recipe, {"fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size})
    return Tokenizer.load(str(out))


def verify_index(folder: Path) -> list[str]:
    """Compares every byte of an index with its manifest; returns what differs.

    Raises:
        FormatError: There is no finished index.
    """
    return list(find_damage(folder, open_manifest(folder, "index")))


def _read(
    corpora: Sequence[str], folder: Path, tokenizer: Tokenizer, config: BuildConfig, progress: Progress | None
) -> dict[str, int]:
    """Stage 1: documents and chunks."""
    path = folder / READ_COUNTS
    if path.is_file():
        counts: dict[str, int] = read_json(path)
        return counts
    done = ChunkStore(folder)
    number, documents, chunks, records = done.num_shards, done.num_documents, done.num_chunks, done.records_read()
    rejects = records - documents
    for shard in read_shards(
        corpora,
        config.read,
        make=lambda document: chunk_spans(tokenizer.encode(document.text), config.chunk_len),
        size=len,
        shard_size=config.shard_chunks,
        skip_records=records,
        rejects_file=folder / "rejects.jsonl",
        rejects_before=rejects,
    ):
        write_documents(folder, number, shard.documents, _numbered(shard.made, documents), records=shard.records)
        number += 1
        documents += len(shard.documents)
        chunks += sum(len(spans) for spans in shard.made)
        if progress is not None:
            progress("read", documents, None)
    counts = {"documents": documents, "chunks": chunks, "rejects": count_rejects(folder / "rejects.jsonl")}
    write_json(path, counts)
    return counts


def _numbered(spans: list[Int64s], first_document: int) -> Int64s:
    """Chunks of several documents as rows of document, first and end character."""
    rows = [
        np.concatenate([np.full((len(s), 1), first_document + i, np.int64), s], axis=1) for i, s in enumerate(spans)
    ]
    return np.concatenate([np.empty((0, 3), np.int64), *rows])


def _encode(
    folder: Path,
    store: ChunkStore,
    encoder: Encoder,
    config: BuildConfig,
    progress: Progress | None,
) -> int:
    """Stage 2: a float16 vector for each chunk; returns how many chunks the encoder cut short."""
    truncated, done = 0, 0
    own = encoder.tokenizer()
    fits = config.tokenizer is None and config.chunk_len <= encoder.max_length - 2 and not config.title_in_key
    for shard in range(store.num_shards):
        path = shard_path(folder / "vectors", shard, ".npy")
        texts = [
            f"{title}. {text}" if config.title_in_key and title else text for title, text in store.shard_texts(shard)
        ]
        truncated += 0 if fits else encoder.count_truncated(texts, own)
        if not path.is_file():
            before = done

            def report(n: int, before: int = before) -> None:
                if progress is not None:
                    progress("encode", before + n, store.num_chunks)

            save_array(path, encoder.encode(texts, "document", progress=report).astype(np.float16))
        done += len(texts)
    share = truncated / max(store.num_chunks, 1)
    log = logger.warning if share > 0.01 else logger.info
    log("%.1f%% of the chunks are longer than the %d tokens the encoder reads", 100 * share, encoder.max_length)
    return truncated


def _index(
    folder: Path, store: ChunkStore, encoder: Encoder, config: BuildConfig, progress: Progress | None
) -> dict[str, Any]:
    """Stage 3: vectors to FAISS."""
    plan = plan_index(store.num_chunks, config.index_type)
    logger.info("index: %s", plan.reason)

    def shards() -> Iterator[NDArray[np.float16]]:
        for shard in range(store.num_shards):
            yield load_array(shard_path(folder / "vectors", shard, ".npy"))

    description = {
        "factory": plan.factory,
        "reason": plan.reason,
        "metric": "inner product" if encoder.normalized else "L2",
    }
    if not (folder / INDEX_FILE).is_file():
        index = VectorIndex.build(
            shards,
            num_vectors=store.num_chunks,
            dim=encoder.dim,
            factory=plan.factory,
            normalized=encoder.normalized,
            seed=config.seed,
            progress=None if progress is None else lambda n: progress("index", n, store.num_chunks),
        )
        index.save(folder / INDEX_FILE)
    return description
