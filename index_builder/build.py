"""Building an index in stages, each resumable by the shard: read and chunk, encode, index, BM25, finish."""

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from index_builder import index as vector_index
from index_builder.config import BuildConfig
from index_builder.corpus import ReadOptions, describe_corpora, read_documents
from index_builder.encoder import Encoder
from index_builder.index import VectorIndex, Vectors, plan_index
from index_builder.lexical import LexicalIndex
from index_builder.shards import Progress, ShardReader
from retro.artifact import (
    MANIFEST,
    begin,
    find_damage,
    finish,
    link_file,
    open_manifest,
    read_json,
    write_json,
    writing,
)
from retro.chunks import ChunkStore, Document, Int64s, chunk_spans, load_array, save_array, shard_path, write_documents
from retro.errors import ConfigError, CorpusError, FormatError, MismatchError
from retro.tokenizer import Tokenizer

logger = logging.getLogger(__name__)
READ_COUNTS = "documents/counts.json"
PART = "index part"
"""Kind of the artifact that `--shard i/n` makes."""


def build_index(
    corpora: Sequence[str],
    out: str | Path,
    config: BuildConfig | None = None,
    *,
    part: tuple[int, int] | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Turns corpora into a searchable index.

    Interrupted at any moment and called again with the same arguments, it goes on after the last finished shard; the result is the
    same, byte for byte, on the same kind of device.

    Args:
        corpora: Files, folders, `NAME=PATH`, `hf:NAME[@REVISION][/CONFIG]:SPLIT`.
        out: Folder of the index.
        config: See BuildConfig.
        part: (i, n): make only every n-th shard, from the i-th on (from 0), as a part for `merge_index`.
        device: Where the encoder runs, and FAISS where it can; several, as in `cuda:0,cuda:1`.
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
    if part is not None and not 0 <= part[0] < part[1]:
        raise ConfigError(f"part {part[0]} of {part[1]}: parts are counted from 0 to {part[1] - 1}")
    folder = Path(out)
    described = describe_corpora(corpora)
    encoder = open_encoder(config, device)
    tokenizer = Tokenizer.load(config.tokenizer) if config.tokenizer else encoder.tokenizer()
    recipe = make_recipe(config, described, encoder, tokenizer)
    kind = "index"
    if part is not None:
        kind, recipe = PART, recipe | {"part": list(part)}
    with writing(folder):
        if begin(folder, kind, recipe, overwrite=overwrite):
            logger.info("%s is there already, made by the same settings", folder)
            manifest: dict[str, Any] = read_json(folder / MANIFEST)
            return manifest
        tokenizer.save(folder)
        if not (folder / READ_COUNTS).is_file():
            counts = read_stage(corpora, folder, tokenizer, config, part=part or (0, 1), progress=progress)
            write_json(folder / READ_COUNTS, counts)
        truncated = encode_stage(folder, ChunkStore(folder).shards, encoder, config, progress)
        if part is not None:
            finish(folder, PART, recipe, {"encoder": encoder.description(), "truncated_chunks": truncated})
        else:
            finish_index(
                folder, recipe, config, encoder.description(), truncated=truncated, device=device, progress=progress
            )
    made: dict[str, Any] = read_json(folder / MANIFEST)
    return made


def merge_index(
    parts: Sequence[Path], out: Path, *, device: str = "cpu", overwrite: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Makes one index of the parts that `build_index(..., part=(i, n))` made of the same corpora: byte for byte the one that
    a build without parts makes.

    Args:
        parts: Folders of all n parts, in any order; their files are linked where the file system allows, else copied.
        out: Folder of the index.
        device: Where FAISS trains and adds.
        overwrite: As in `build_index`.
        progress: Likewise.

    Raises:
        FormatError: A part is unfinished, or a file in it is missing or damaged.
        MismatchError: The parts come from different builds, or one is missing or given twice.
    """
    manifests = []
    for path in parts:
        manifests.append(open_manifest(path, PART))
        if problems := list(find_damage(path, manifests[-1])):
            raise FormatError(f"{path} is damaged: {'; '.join(problems[:3])}. Make this part again (--overwrite)")
    if not manifests:
        raise ConfigError("no parts given: name the folders that `retro index build --shard i/n` made")
    numbers = [tuple(manifest["recipe"].pop("part")) for manifest in manifests]
    recipe, n = manifests[0]["recipe"], numbers[0][1]
    for path, manifest in zip(parts, manifests, strict=True):
        if manifest["recipe"] != recipe:
            raise MismatchError(
                f"{path} and {parts[0]} are parts of different builds (corpora or settings differ): build them alike"
            )
    if sorted(numbers) != [(i, n) for i in range(n)]:
        given = ", ".join(f"{i}/{of}" for i, of in sorted(numbers))
        raise MismatchError(f"the parts given are {given}; all of 0/{n} to {n - 1}/{n} are needed, each once")
    config = config_of(recipe)
    with writing(out):
        if not begin(out, "index", recipe, overwrite=overwrite):
            for path, manifest, (i, _) in zip(parts, manifests, numbers, strict=True):
                for name in manifest["files"]:
                    shared = name == READ_COUNTS or Path(name).parent.name not in ("documents", "chunks", "vectors")
                    if i == 0 or not shared:
                        link_file(path / name, out / name)
            truncated = sum(manifest["truncated_chunks"] for manifest in manifests)
            finish_index(
                out, recipe, config, manifests[0]["encoder"], truncated=truncated, device=device, progress=progress
            )
    made: dict[str, Any] = read_json(out / MANIFEST)
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


# --- the stages, for builds on one machine, on a cluster and for live changes ---------------------------------------


def open_encoder(config: BuildConfig, device: str) -> Encoder:
    """The encoder that a configuration names."""
    return Encoder.open(
        config.encoder,
        revision=config.revision,
        device=device,
        dtype=config.dtype,
        backend=config.backend,
        trust_remote_code=config.trust_remote_code,
        max_length=config.max_length,
        query_prompt=config.query_prompt,
        document_prompt=config.document_prompt,
        normalize=config.normalize,
    )


def make_recipe(
    config: BuildConfig, described: list[dict[str, Any]], encoder: Encoder, tokenizer: Tokenizer
) -> dict[str, Any]:
    """What an index is made from and how: two builds of the same recipe give the same bytes."""
    return {
        "config": asdict(config) | {"dtype": encoder.dtype},
        "corpora": described,
        "encoder_fingerprint": encoder.fingerprint,
        "tokenizer_fingerprint": tokenizer.fingerprint,
    }


def config_of(recipe: dict[str, Any]) -> BuildConfig:
    """The configuration in a recipe."""
    settings = dict(recipe["config"])
    return BuildConfig(**settings | {"read": ReadOptions(**settings["read"])})


def read_stage(
    corpora: Sequence[str],
    folder: Path,
    tokenizer: Tokenizer,
    config: BuildConfig,
    *,
    part: tuple[int, int] = (0, 1),
    list_rejects: bool = True,
    progress: Progress | None = None,
) -> dict[str, int]:
    """Documents and chunks of one part's shards that are not there yet; returns the counts of all parts together."""
    reader = ShardReader(
        corpora,
        config.read,
        make=lambda document: spans_of(document, tokenizer, config),
        shard_chars=config.shard_chars,
        rejects_file=folder / "rejects.jsonl" if list_rejects else None,
        wanted=lambda number: (
            number % part[1] == part[0] and not shard_path(folder / "documents", number, ".arrow").is_file()
        ),
        progress=told(progress, "read"),
    )
    for shard in reader:
        write_shard(folder, f"{shard.number:05d}", shard.documents, shard.made)
    return {
        "documents": reader.num_documents,
        "rejects": reader.num_rejects,
        "duplicates": reader.num_duplicates,
        "shards": reader.num_shards,
    }


def spans_of(document: Document, tokenizer: Tokenizer, config: BuildConfig) -> Int64s:
    """The chunks of a document as spans of characters [n, 2]; one with a vector of its own is one chunk."""
    if config.read.vectors_field is not None:
        return np.array([[0, len(document.text)]], np.int64)
    return chunk_spans(tokenizer.encode(document.text), config.chunk_len)


def write_shard(folder: Path, name: str, documents: Sequence[Document], spans: Sequence[Int64s]) -> None:
    """One shard of documents and chunks, and of vectors where the documents bring them.

    Raises:
        CorpusError: Vectors of different lengths.
    """
    if documents and documents[0].vector is not None:
        vectors = [d.vector for d in documents if d.vector is not None]
        for document, vector in zip(documents, vectors, strict=True):
            if len(vector) != len(vectors[0]):
                raise CorpusError(
                    f"{document.source}: the vector of {document.key} has {len(vector)} numbers, that of "
                    f"{documents[0].key} has {len(vectors[0])}: all vectors must come from one encoder"
                )
        save_array(shard_path(folder / "vectors", name, ".npy"), np.stack(vectors).astype(np.float16))
    write_documents(folder, name, documents, spans)


def encode_stage(
    folder: Path, shards: Sequence[str], encoder: Encoder, config: BuildConfig, progress: Progress | None = None
) -> int:
    """A float16 vector for each chunk of some shards; returns how many chunks the encoder cut short."""
    store = ChunkStore(folder, shards)
    truncated = 0
    report = told(progress, "encode", store.num_chunks)
    for number in range(len(store.shards)):
        first, end = store.first_row[number : number + 2].tolist()
        truncated += encode_shard(store, number, encoder, config, functools.partial(_add_to, first, report))
        report(end)
    share = truncated / max(store.num_chunks, 1)
    log = logger.warning if share > 0.01 else logger.info
    log("%.1f%% of the chunks are longer than the %d tokens the encoder reads", 100 * share, encoder.max_length)
    return truncated


def encode_shard(
    store: ChunkStore, number: int, encoder: Encoder, config: BuildConfig, progress: Callable[[int], None] | None = None
) -> int:
    """The vectors of one shard, unless they are there; returns how many of its chunks the encoder cuts short."""
    path = shard_path(store.folder / "vectors", store.shards[number], ".npy")
    texts = key_texts(store, number, config)
    if not path.is_file():
        save_array(path, encoder.encode(texts, "document", progress=progress).astype(np.float16))
    elif config.read.vectors_field is not None and number == 0:
        _check_foreign_vectors(load_array(path)[:32], texts[:32], encoder)
    fits = config.tokenizer is None and config.chunk_len <= encoder.max_length - 2 and not config.title_in_key
    foreign = config.read.vectors_field is not None
    return 0 if fits or foreign else encoder.count_truncated(texts, encoder.tokenizer())


def key_texts(store: ChunkStore, number: int, config: BuildConfig) -> list[str]:
    """What the chunks of one shard are found by."""
    pairs = store.shard_texts(number)
    return [f"{title}. {text}" if config.title_in_key and title else text for title, text in pairs]


def _check_foreign_vectors(vectors_NX: NDArray[np.float16], texts: list[str], encoder: Encoder) -> None:
    """Questions are encoded by the encoder, so that foreign vectors must be its own."""
    if vectors_NX.shape[1] != encoder.dim:
        raise MismatchError(
            f"the vectors of the corpus have {vectors_NX.shape[1]} numbers, those of the encoder {encoder.name} {encoder.dim}: "
            "name the encoder that made them with --encoder"
        )
    own = encoder.encode(texts, "document").astype(np.float64)
    given = vectors_NX.astype(np.float64)
    norms = np.linalg.norm(own, axis=1) * np.linalg.norm(given, axis=1)
    cosine = float(((own * given).sum(axis=1) / np.maximum(norms, 1e-12)).mean())
    if cosine < 0.95:
        logger.warning(
            "the vectors of the corpus do not look like those of %s (mean cosine %.2f on %d texts): questions may find nothing",
            encoder.name,
            cosine,
            len(texts),
        )


def told(progress: Progress | None, stage: str, total: int | None = None) -> Callable[[int], None]:
    """Reports how much of a stage is done, each figure once."""
    last = -1

    def report(done: int) -> None:
        nonlocal last
        if progress is not None and done != last:
            last = done
            progress(stage, done, total)

    return report


def _add_to(first: int, report: Callable[[int], None], done: int) -> None:
    report(first + done)


def open_vectors(folder: Path, shards: Sequence[str]) -> Vectors:
    """The stored vectors of some shards."""
    return Vectors([load_array(shard_path(folder / "vectors", name, ".npy")) for name in shards])


def index_stage(
    folder: Path,
    name: str,
    vectors: Vectors,
    config: BuildConfig,
    *,
    normalized: bool,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Vectors to a tuned index in the folder `name` of the index; returns its description for the manifest."""
    plan = plan_index(len(vectors), vectors.dim, config.index_type, max_memory=config.max_memory, recall=config.recall)
    logger.info("index: %s", plan.reason)
    n = len(vectors)
    description: dict[str, Any] = {
        "folder": name,
        "factory": plan.factory,
        "reason": plan.reason,
        "metric": "inner product" if normalized else "L2",
        "segments": [],
    }
    trained, segment = folder / name / vector_index.TRAINED, folder / name / "00000.faiss"

    report = told(progress, "index", n)
    if plan.factory != "Flat":
        if not trained.is_file():
            vector_index.train(trained, vectors, plan, normalized=normalized, seed=config.seed, device=device)
        if not segment.is_file():
            parts = []
            for first in range(0, n, plan.part_rows):
                end = min(first + plan.part_rows, n)
                parts.append(folder / name / f"part-{first // plan.part_rows:05d}.faiss")
                if not parts[-1].is_file():
                    vector_index.add_part(trained, vectors, first, end, parts[-1], device=device)
                report(end)
            vector_index.merge_parts(trained, parts, segment)
        for path in sorted((folder / name).glob("part-*")):
            path.unlink()
        description["segments"] = [{"file": segment.name, "rows": n}]
    searchable = VectorIndex.open(folder / name, vectors, description, device=device)
    report(n)
    return description | vector_index.tune(vectors, searchable, recall=config.recall, seed=config.seed)


def lexical_stage(
    folder: Path, name: str, store: ChunkStore, config: BuildConfig, progress: Progress | None = None
) -> dict[str, Any] | None:
    """A BM25 index in the folder `name` of the index; returns its description for the manifest."""
    if config.lexical == "off":
        return None

    def shards() -> Iterator[list[str]]:
        for shard in range(len(store.shards)):
            yield key_texts(store, shard, config)

    parts = LexicalIndex.build(
        folder / name,
        shards,
        language=config.lexical,
        progress=told(progress, "BM25", store.num_chunks),
    )
    return {"folder": name, "language": config.lexical, "parts": list(parts), "added": []}


def finish_index(
    folder: Path,
    recipe: dict[str, Any],
    config: BuildConfig,
    encoder: dict[str, Any],
    *,
    truncated: int,
    device: str,
    progress: Progress | None,
) -> None:
    """The stages after encoding, and the manifest."""
    store = ChunkStore(folder)
    counts = read_json(folder / READ_COUNTS)
    if len(store.shards) != counts["shards"]:
        raise FormatError(
            f"{folder} has {len(store.shards)} of {counts['shards']} shards: build it again (--overwrite)"
        )
    vectors = open_vectors(folder, store.shards)
    index = index_stage(
        folder, "index", vectors, config, normalized=encoder["normalized"], device=device, progress=progress
    )
    lexical = lexical_stage(folder, "lexical", store, config, progress)
    fields = {
        "state": 0,
        "next_name": len(store.shards),
        "base_rows": store.num_chunks,
        "documents": store.num_documents,
        "chunks": store.num_chunks,
        "rejects": counts["rejects"],
        "duplicates": counts["duplicates"],
        "truncated_chunks": truncated,
        "chunk_len": config.chunk_len,
        "title_in_key": config.title_in_key,
        "encoder": encoder,
        "tokenizer_fingerprint": recipe["tokenizer_fingerprint"],
        "index": index,
        "lexical": lexical,
        "shards": store.shards,
        "removed": None,
    }
    finish(folder, "index", recipe, fields)


def files_of(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """Every file of one state of an index, relative to its folder."""
    names = [name for name in ("tokenizer.json", READ_COUNTS, "rejects.jsonl") if (folder / name).is_file()]
    for shard in manifest["shards"]:
        names += [f"documents/{shard}.arrow", f"chunks/{shard}.npy", f"vectors/{shard}.npy"]
    if manifest["removed"] is not None:
        names.append(manifest["removed"])
    index, lexical = manifest["index"], manifest["lexical"]
    if index["segments"]:
        files = [vector_index.TRAINED, *(segment["file"] for segment in index["segments"])]
        names += [f"{index['folder']}/{file}" for file in files]
    if lexical is not None:
        below = folder / lexical["folder"]
        names += [path.relative_to(folder).as_posix() for path in LexicalIndex.files(below, lexical["parts"])]
    return names
