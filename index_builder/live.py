"""A live index: documents are added, updated and removed while others search; every change is one atomic step.

A change writes new files beside the old ones and then replaces the manifest. Killed before that, it leaves the old state, and the
same command goes on where it stopped; what another command finds unlisted, it deletes. Whoever has the old state open keeps it.
Added documents form new shards, whose vectors are searched exactly until there are enough for a segment of the approximate index.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from index_builder import index as vector_index
from index_builder.build import (
    config_of,
    encode_shard,
    files_of,
    index_stage,
    key_texts,
    lexical_stage,
    open_vectors,
    spans_of,
    write_shard,
)
from index_builder.config import BuildConfig
from index_builder.corpus import Reject, describe_corpora, read_documents
from index_builder.encoder import Encoder
from index_builder.lexical import LexicalIndex
from index_builder.shards import Progress
from retro.artifact import CHANGE, open_manifest, read_json, remove_unlisted, replace_manifest, write_json, writing
from retro.chunks import ChunkStore, Document, Int64s, load_array, save_array, shard_path
from retro.errors import ConfigError, CorpusError
from retro.tokenizer import Tokenizer

logger = logging.getLogger(__name__)
SEGMENT_ROWS = 1 << 16
"""Added rows from which on the approximate index gets a segment more; fewer are searched exactly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What a change did, or would do."""

    added: int
    updated: int
    removed: int
    unchanged: int
    chunks: int
    """New ones."""


def add_documents(
    folder: Path,
    corpora: Sequence[str],
    *,
    update: bool = False,
    device: str = "cpu",
    encoder: Encoder | None = None,
    progress: Progress | None = None,
) -> Changes:
    """Adds the documents of corpora; they are found from the next search on.

    Args:
        folder: The index.
        corpora: As for `build_index`; read with the options that the index was built with.
        update: Replace documents whose keys are there already, where their contents differ; without it, such a key is an error.
        device: Where the encoder runs.
        encoder: The index's encoder where it is open already.
        progress: Told how far it is.

    Raises:
        CorpusError: A key that is there already, or a source that cannot be read.
        FormatError: There is no finished index.
        ConfigError: Another process is changing the index.
    """
    change = _Change(folder, "update" if update else "add", corpora, device, encoder, progress)
    done: Changes = change.run(lambda: change.write(corpora, _Choice(change, update=update)))
    return done


def sync_folder(
    folder: Path,
    source: str,
    *,
    delete: bool = False,
    dry_run: bool = False,
    device: str = "cpu",
    encoder: Encoder | None = None,
    progress: Progress | None = None,
) -> Changes:
    """Makes an index follow a folder: new documents are added, those whose contents differ are replaced.

    Args:
        folder: The index.
        source: A corpus; only documents of its name are compared.
        delete: Remove documents of that corpus which are no longer in the source.
        dry_run: Only count.
        device: Where the encoder runs.
        encoder: The index's encoder where it is open already.
        progress: Told how far it is.

    Raises:
        CorpusError, FormatError, ConfigError: As for `add_documents`.
    """
    change = _Change(folder, f"sync{' --delete' if delete else ''}", [source], device, encoder, progress)
    name = describe_corpora([source])[0]["name"] if delete else None
    if dry_run:
        return _Choice(change, update=True, delete_of=name).count([source])
    done: Changes = change.run(lambda: change.write([source], _Choice(change, update=True, delete_of=name)))
    return done


def remove_documents(folder: Path, keys: Sequence[str], *, missing_ok: bool = False) -> Changes:
    """Removes documents by key; they are found no more from the next search on. `compact_index` frees their space.

    Raises:
        ConfigError: A key that is not in the index, unless `missing_ok`; nothing is removed then.
        FormatError: There is no finished index.
    """
    change = _Change(folder, "remove", [], "cpu", None, None)

    def remove() -> Changes:
        found = {key: number for key in keys if (number := change.store.find(key)) is not None}
        absent = [key for key in dict.fromkeys(keys) if key not in found]
        if absent and not missing_ok:
            shown = ", ".join(absent[:3]) + (f" and {len(absent) - 3} more" if len(absent) > 3 else "")
            raise ConfigError(
                f"{folder} has no document {shown}: nothing was removed. Keys are CORPUS:ID, as searches show"
            )
        if found:
            change.commit(dead_documents=list(found.values()))
        return Changes(added=0, updated=0, removed=len(found), unchanged=len(absent), chunks=0)

    done: Changes = change.run(remove)
    return done


def compact_index(
    folder: Path, *, lexical: str | None = None, device: str = "cpu", progress: Progress | None = None
) -> dict[str, Any]:
    """Rewrites an index without its removed documents, in shards of full size, with a vector index and a BM25 index made anew. Rows
    get new numbers.

    Args:
        folder: The index.
        lexical: Language of the BM25 index, where it is to be another one.
        device: Where FAISS trains.
        progress: Told how far it is.

    Returns:
        The new manifest.

    Raises:
        FormatError: There is no finished index.
    """
    change = _Change(folder, f"compact{'' if lexical is None else f' --lexical {lexical}'}", [], device, None, progress)
    done: dict[str, Any] = change.run(lambda: change.compact(lexical))
    return done


class _Change:
    """One change of one index, under its lock."""

    def __init__(
        self,
        folder: Path,
        name: str,
        corpora: Sequence[str],
        device: str,
        encoder: Encoder | None,
        progress: Progress | None,
    ) -> None:
        self.folder = folder
        self.name = name
        self.corpora = corpora
        self.device = device
        self.progress = progress
        self._encoder = encoder
        self.load()

    def load(self) -> None:
        self.manifest = open_manifest(self.folder, "index")
        self.config: BuildConfig = config_of(self.manifest["recipe"])
        self.tokenizer = Tokenizer.load(str(self.folder))
        removed = self.manifest["removed"]
        self.dead_rows: Int64s = np.empty(0, np.int64) if removed is None else load_array(self.folder / removed)
        self.store = ChunkStore(self.folder, self.manifest["shards"], self.dead_rows)

    def run(self, work: Callable[[], Any]) -> Any:
        with writing(self.folder):
            self.load()  # the state may have changed while waiting for nobody else to write
            recipe = {
                "change": self.name,
                "state": self.manifest["state"],
                "corpora": describe_corpora(self.corpora) if self.corpora else [],
            }
            path = self.folder / CHANGE
            if not path.is_file() or read_json(path) != recipe:
                remove_unlisted(self.folder, self.manifest["files"])
                write_json(path, recipe)
            try:
                done = work()
            except (ConfigError, CorpusError):  # it is refused: there is nothing to go on with
                path.unlink()
                remove_unlisted(self.folder, self.manifest["files"])
                raise
            path.unlink(missing_ok=True)
            return done

    def encoder(self) -> Encoder:
        if self._encoder is None:
            self._encoder = Encoder.reopen(
                self.manifest["encoder"],
                device=self.device,
                dtype=self.config.dtype,
                backend=self.config.backend,
                trust_remote_code=self.config.trust_remote_code,
            )
        return self._encoder

    def new_name(self, offset: int = 0) -> str:
        """Shards and index folders are never called like earlier ones."""
        return f"{self.manifest['next_name'] + offset:05d}"

    # --- documents come

    def write(self, corpora: Sequence[str], choice: "_Choice") -> Changes:
        """New documents to shards with vectors, then the next state."""
        names: list[str] = []
        documents: list[Document] = []
        chars = 0

        def flush() -> None:
            name = self.new_name(len(names))
            if not shard_path(self.folder / "documents", name, ".arrow").is_file():
                spans = [spans_of(document, self.tokenizer, self.config) for document in documents]
                write_shard(self.folder, name, documents, spans)
            names.append(name)
            documents.clear()

        for document in choice.new_documents(corpora):
            documents.append(document)
            chars += len(document.text)
            if chars >= self.config.shard_chars:
                flush()
                chars = 0
        if documents:
            flush()
        added = ChunkStore(self.folder, names)
        for number in range(len(names)):
            encode_shard(added, number, self.encoder(), self.config, self._report(added, number))
        if names or choice.dead_documents:
            self.commit(new_shards=names, dead_documents=choice.dead_documents)
        return choice.changes(added.num_chunks)

    def _report(self, store: ChunkStore, number: int) -> Callable[[int], None] | None:
        before, progress = int(store.first_row[number]), self.progress
        return None if progress is None else lambda n: progress("encode", before + n, store.num_chunks)

    # --- the next state

    def commit(self, new_shards: Sequence[str] = (), dead_documents: Sequence[int] = ()) -> None:
        """Indexes new shards and puts the folder into its next state."""
        manifest = self.manifest
        next_name = manifest["next_name"] + len(new_shards)
        shards = [*manifest["shards"], *new_shards]
        index, lexical = dict(manifest["index"]), manifest["lexical"]
        if new_shards:
            shards, next_name = self._join_small(shards, len(new_shards), next_name)
            store = ChunkStore(self.folder, shards)
            index["segments"] = self._segments(index, store)
            lexical = self._lexical_parts(lexical, store)
        removed, dead_rows = manifest["removed"], self.dead_rows
        if dead_documents:
            dead_rows = np.union1d(dead_rows, self.store.rows_of(np.array(sorted(dead_documents), np.int64)))
            removed = f"removed/{manifest['state'] + 1:05d}.npy"
            save_array(self.folder / removed, dead_rows)
        self.replace(
            manifest
            | {"next_name": next_name, "index": index, "lexical": lexical, "shards": shards, "removed": removed},
            dead_rows,
        )

    def replace(self, manifest: dict[str, Any], dead_rows: Int64s) -> None:
        """Counts, and replaces the manifest by the next state's."""
        store = ChunkStore(self.folder, manifest["shards"], dead_rows)
        counts = {
            "state": self.manifest["state"] + 1,
            "documents": store.num_documents - len(store.dead_documents),
            "chunks": store.num_live_chunks,
        }
        self.manifest = replace_manifest(self.folder, manifest | counts, files_of(self.folder, manifest))

    def _fixed_rows(self) -> int:
        """Rows whose shards must stay as they are."""
        in_segments = sum(int(segment["rows"]) for segment in self.manifest["index"]["segments"])
        return max(int(self.manifest["base_rows"]), in_segments)

    def _join_small(self, shards: list[str], num_new: int, next_name: int) -> tuple[list[str], int]:
        """Joins the newest shard with the one before while that is no larger, so that many small additions leave few shards. Rows
        keep their numbers."""
        fixed = self._fixed_rows()
        while num_new == 1:
            store = ChunkStore(self.folder, shards)
            if len(shards) < 2 or store.first_row[-3] < fixed:
                break
            chars = [sum(map(len, table["text"].to_pylist())) for table in store.tables[-2:]]
            if chars[0] > chars[1] or sum(chars) > self.config.shard_chars:
                break
            name = f"{next_name:05d}"
            entries = [entry for shard in (-2, -1) for entry in store.shard_documents(shard)]
            rows = np.arange(store.first_row[-3], store.first_row[-1])
            vectors = open_vectors(self.folder, shards).gather(rows).astype(np.float16)
            save_array(shard_path(self.folder / "vectors", name, ".npy"), vectors)
            write_shard(self.folder, name, [d for d, _ in entries], [spans for _, spans in entries])
            shards, next_name = [*shards[:-2], name], next_name + 1
        return shards, next_name

    def _segments(self, index: dict[str, Any], store: ChunkStore) -> list[dict[str, Any]]:
        """Segments of the approximate index, with one more where the rows after them have become many."""
        segments: list[dict[str, Any]] = list(index["segments"])
        first, end = sum(s["rows"] for s in segments), store.num_chunks
        if index["factory"] != "Flat" and end - first >= SEGMENT_ROWS:
            below = self.folder / index["folder"]
            name = f"{len(segments):05d}-{self.manifest['state'] + 1:05d}.faiss"
            vectors = open_vectors(self.folder, store.shards)
            vector_index.add_part(below / vector_index.TRAINED, vectors, first, end, below / name, base=first)
            segments.append({"file": name, "rows": end - first})
        return segments

    def _lexical_parts(self, lexical: dict[str, Any] | None, store: ChunkStore) -> dict[str, Any] | None:
        """BM25 parts: those that were built, and one for each shard after them."""
        if lexical is None:
            return None
        base = [part for part in lexical["parts"] if part not in lexical["added"]]
        first_shard = int(np.searchsorted(store.first_row, self.manifest["base_rows"]))
        added = store.shards[first_shard:]
        for number, name in enumerate(added, first_shard):
            if name not in lexical["added"]:
                texts = key_texts(store, number, self.config)
                LexicalIndex.add_part(self.folder / lexical["folder"], name, texts)
        return lexical | {"parts": [*base, *added], "added": added}

    def compact(self, language: str | None) -> dict[str, Any]:
        """The documents that are left, to new shards and indexes."""
        config = self.config if language is None else replace(self.config, lexical=language)
        vectors, next_name = open_vectors(self.folder, self.store.shards), self.manifest["next_name"]
        names: list[str] = []
        entries: list[tuple[Document, Int64s]] = []
        rows: list[Int64s] = []
        chars = 0

        def flush() -> None:
            name = f"{next_name + len(names):05d}"
            if not shard_path(self.folder / "documents", name, ".arrow").is_file():
                gathered = vectors.gather(np.concatenate(rows)).astype(np.float16)
                save_array(shard_path(self.folder / "vectors", name, ".npy"), gathered)
                write_shard(self.folder, name, [d for d, _ in entries], [spans for _, spans in entries])
            names.append(name)
            entries.clear()
            rows.clear()

        for document, spans, first in self.store.live_documents():
            entries.append((document, spans))
            rows.append(np.arange(first, first + len(spans)))
            chars += len(document.text)
            if chars >= config.shard_chars:
                flush()
                chars = 0
        if entries:
            flush()
        state = self.manifest["state"] + 1
        store = ChunkStore(self.folder, names)
        index = index_stage(
            self.folder,
            f"index-{state}",
            open_vectors(self.folder, names),
            config,
            normalized=self.manifest["index"]["metric"] == "inner product",
            device=self.device,
            progress=self.progress,
        )
        lexical = lexical_stage(self.folder, f"lexical-{state}", store, config, self.progress)
        recipe = self.manifest["recipe"]
        self.replace(
            self.manifest
            | {
                "next_name": next_name + len(names),
                "base_rows": store.num_chunks,
                "index": index,
                "lexical": lexical,
                "shards": names,
                "removed": None,
                "recipe": recipe | {"config": recipe["config"] | {"lexical": config.lexical}},
            },
            np.empty(0, np.int64),
        )
        return self.manifest


class _Choice:
    """Which documents of a source are new to an index, and which of the index they replace."""

    def __init__(self, change: _Change, *, update: bool, delete_of: str | None = None) -> None:
        self._store = change.store
        self._change = change
        self._update = update
        self._delete_of = delete_of
        self._options = replace(change.config.read, limit=None)
        self.dead_documents: list[int] = []
        self._added = self._updated = self._unchanged = self._removed = 0

    def new_documents(self, corpora: Sequence[str]) -> Iterator[Document]:
        """Streams the documents to add, and collects the numbers of those to remove."""
        there = np.zeros(self._store.num_documents, np.bool_)
        for item in read_documents(corpora, self._options):
            if isinstance(item, Reject):
                logger.warning("%s:%d left out: %s", item.file, item.line, item.reason)
                continue
            number = self._store.find(item.key)
            if number is None:
                self._added += 1
                yield item
                continue
            there[number] = True
            if not self._update:
                raise CorpusError(
                    f"{item.source}: the index has a document {item.key} already; nothing was added. Use `retro index update` to "
                    "replace documents, or name the corpus differently (NAME=PATH)"
                )
            if self._store.field("content_hash", number) == item.content_hash:
                self._unchanged += 1
                continue
            self._updated += 1
            self.dead_documents.append(number)
            yield item
        if self._delete_of is not None:
            prefix = f"{self._delete_of}:"
            gone = [n for n, key in self._store.numbered_keys() if key.startswith(prefix) and not there[n]]
            self._removed = len(gone)
            self.dead_documents += gone

    def count(self, corpora: Sequence[str]) -> Changes:
        """What would change."""
        tokenizer, config = self._change.tokenizer, self._change.config
        return self.changes(sum(len(spans_of(document, tokenizer, config)) for document in self.new_documents(corpora)))

    def changes(self, chunks: int) -> Changes:
        return Changes(
            added=self._added,
            updated=self._updated,
            removed=self._removed,
            unchanged=self._unchanged,
            chunks=chunks,
        )
