"""Documents, chunks of documents and training data on disk: the only reader and writer of these files.

X.index/documents/00000.arrow   a shard of documents (Arrow IPC, memory-mapped)
X.index/chunks/00000.npy        its chunks, int64 [n, 3]: document (counted in the shard), first and end character
X.data/tokens/, neighbors/      a tokenized corpus and the neighbors of its chunks (class TrainingData)
"""

import contextlib
import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
from numpy.typing import NDArray

from retro.artifact import read_manifest, write_atomically
from retro.errors import FormatError, MismatchError
from retro.tokenizer import Encoded, Tokenizer

Int64s = NDArray[np.int64]
SPLITS = ("train", "valid", "test")


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text with its name and what is known about it."""

    key: str
    """`corpus:id`, unique in an index."""
    text: str
    title: str
    """Empty where there is none; so are url and split."""
    url: str
    group: str
    """The unit of exclusion: a training chunk has no neighbors of its own group. By default the key."""
    split: str
    """train, valid, test or empty."""
    metadata: str
    """Every other field, as canonical JSON."""
    content_hash: str
    """Hex digest of all of the above but the key."""
    source: str
    """File and line, for messages; not stored."""
    vector: NDArray[np.float32] | None = field(default=None, compare=False, repr=False)
    """Made elsewhere [X], for a document that is one chunk; stored with the vectors, not with the document."""

    def drawn_split(self, seed: int, valid_share: float, test_share: float) -> int:
        """Index into SPLITS: its own split, or one drawn for its group, so that the shares are held out where none is named."""
        if self.split:
            return SPLITS.index(self.split)
        draw = np.random.default_rng([seed, name_hash(self.group)]).random()
        if draw < valid_share:
            return SPLITS.index("valid")
        return SPLITS.index("test" if draw < valid_share + test_share else "train")


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """A chunk of an index as a neighbor: its text, and the continuation in the same document."""

    row: int
    key: str
    title: str
    url: str
    text: str
    continuation: str
    """The next chunk, with what stands between; empty at the end of the document."""
    score: float
    """Of the search that found it; higher is better."""
    metadata: str

    @property
    def full_text(self) -> str:
        """Chunk and continuation as one string: what the model reads."""
        return self.text + self.continuation


def name_hash(name: str) -> int:
    """64 bits that stand for the name of a group or the key of a document."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


# --- chunks of a text ---------------------------------------------------------------------------------------------


def chunk_spans(encoded: Encoded, chunk_len: int) -> Int64s:
    """Cuts a tokenized text into chunks of `chunk_len` tokens (the last may be shorter).

    Returns:
        First and end character of each chunk [n, 2]. Spans hold whole characters: where a byte-level border splits one, it
        belongs to both chunks.
    """
    n = len(encoded.ids)
    if n == 0:
        return np.empty((0, 2), np.int64)
    first = np.arange(0, n, chunk_len)
    last = np.minimum(first + chunk_len, n) - 1
    return np.stack([encoded.spans[first, 0], encoded.spans[last, 1]], axis=1)


# --- the chunk store of an index ----------------------------------------------------------------------------------

_TEXT_COLUMNS = ("key", "title", "url", "group", "split", "metadata", "content_hash", "text")
_SCHEMA = pa.schema(
    [(name, pa.large_string()) for name in _TEXT_COLUMNS] + [("key_hash", pa.uint64()), ("group_hash", pa.uint64())]
)


def shard_path(folder: Path, number: int | str, suffix: str) -> Path:
    """Path of one numbered shard."""
    return folder / (f"{number:05d}{suffix}" if isinstance(number, int) else f"{number}{suffix}")


def write_documents(folder: Path, shard: int | str, documents: Sequence[Document], spans: Sequence[Int64s]) -> None:
    """Writes one shard of documents and its chunks; the documents come last, so that their presence means both.

    Args:
        folder: The index.
        shard: Its number or name.
        documents: In order.
        spans: First and end character of each chunk [n, 2], of each document.
    """
    columns: list[Any] = [pa.array([getattr(d, name) for d in documents], pa.large_string()) for name in _TEXT_COLUMNS]
    columns.append(pa.array([name_hash(d.key) for d in documents], pa.uint64()))
    columns.append(pa.array([name_hash(d.group) for d in documents], pa.uint64()))
    table = pa.Table.from_arrays(columns, schema=_SCHEMA)
    owner_N = np.repeat(np.arange(len(spans)), [len(s) for s in spans])
    chunks_N3 = np.concatenate([owner_N[:, None], np.concatenate([np.empty((0, 2), np.int64), *spans])], axis=1)

    def write(file: Any) -> None:
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)

    save_array(shard_path(folder / "chunks", shard, ".npy"), chunks_N3.astype(np.int64))
    write_atomically(shard_path(folder / "documents", shard, ".arrow"), write)


def save_array(path: Path, array: NDArray[Any]) -> None:
    """One .npy file, atomically."""
    array = np.ascontiguousarray(array).reshape(array.shape)

    def write(file: Any) -> None:
        # Not np.save, whose error on a full disk does not say that the disk is full.
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)

    write_atomically(path, write)


def load_array(path: Path) -> NDArray[Any]:
    """A .npy file, memory-mapped.

    Raises:
        FormatError: It is missing or no such file.
    """
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise FormatError(f"{path} is missing") from error
    except (OSError, ValueError, EOFError) as error:
        if path.is_file() and path.stat().st_size:
            try:  # an empty array cannot be memory-mapped
                return np.load(path, allow_pickle=False)  # type: ignore[no-any-return]
            except (OSError, ValueError, EOFError):
                pass
        raise FormatError(f"{path} is damaged: {error}") from error
    return array


class ChunkStore:
    """Read access to the documents and chunks of an index, by row, through memory maps.

    A row is the number of a chunk in the order of the shards, 64 bit and stable until the index is compacted. Documents are
    numbered likewise. Rows of removed documents keep their numbers.
    """

    def __init__(self, folder: Path, shards: Sequence[str] | None = None, dead_rows: Int64s | None = None) -> None:
        """Opens shards.

        Args:
            folder: The index.
            shards: Names of its shards in order; None takes all that are there.
            dead_rows: Rows of removed documents.

        Raises:
            FormatError: A shard is missing or damaged.
        """
        self.folder = folder
        self.shards = sorted(p.stem for p in (folder / "documents").glob("*.arrow")) if shards is None else list(shards)
        _allow_open_files(3 * len(self.shards))
        self.tables: list[pa.Table] = []
        """The documents of each shard: key, title, url, group, split, metadata, content_hash, text, key_hash, group_hash."""
        self._chunks: list[Int64s] = []
        for name in self.shards:
            path = shard_path(folder / "documents", name, ".arrow")
            try:
                self.tables.append(pa.ipc.open_file(pa.memory_map(str(path))).read_all())
            except FileNotFoundError as error:
                raise FormatError(f"{path} is missing") from error
            except (pa.ArrowInvalid, OSError) as error:
                raise FormatError(f"{path} is damaged: {error}") from error
            self._chunks.append(load_array(shard_path(folder / "chunks", name, ".npy")))
        self.first_document = np.cumsum([0, *(t.num_rows for t in self.tables)])
        """Number of the first document of each shard, and the end."""
        self.first_row = np.cumsum([0, *(len(c) for c in self._chunks)])
        """First row of each shard, and the end."""
        self.dead_N: NDArray[np.bool_] | None = None
        """Whether each row is of a removed document; None where none is."""
        self._num_dead = 0 if dead_rows is None else len(dead_rows)
        self.dead_documents: Int64s = np.empty(0, np.int64)
        """Numbers of the removed documents."""
        if dead_rows is not None and len(dead_rows):
            if dead_rows[-1] >= self.num_chunks:
                raise FormatError(f"{folder} lists row {dead_rows[-1]} as removed, but has {self.num_chunks:,} chunks")
            self.dead_N = np.zeros(self.num_chunks, np.bool_)
            self.dead_N[dead_rows] = True
            self.dead_documents = self._owners(np.asarray(dead_rows))

    @property
    def num_documents(self) -> int:
        """Documents in the shards, removed ones included."""
        return int(self.first_document[-1])

    @property
    def num_chunks(self) -> int:
        """N: rows of the index, those of removed documents included."""
        return int(self.first_row[-1])

    @property
    def num_live_chunks(self) -> int:
        """Rows that a search can return."""
        return self.num_chunks - self._num_dead

    def live_rows(self, numbers: Int64s) -> Int64s:
        """Rows of chunks that are counted without removed ones, 0 to `num_live_chunks` - 1; of any shape."""
        if self.dead_N is None:
            return numbers
        dead_rows = np.flatnonzero(self.dead_N)
        return numbers + np.searchsorted(dead_rows - np.arange(len(dead_rows)), numbers, side="right")

    def numbered_keys(self) -> Iterator[tuple[int, str]]:
        """Numbers and keys of all documents that were not removed, in order."""
        keys = (key for table in self.tables for key in table["key"].to_pylist())
        return ((n, key) for n, (key, dead) in enumerate(zip(keys, self._dead_D, strict=True)) if not dead)

    def live_documents(self) -> Iterator[tuple[Document, Int64s, int]]:
        """The documents that were not removed, in order, with the spans of their chunks [n, 2] and their first row."""
        number = row = 0
        for shard in range(len(self.shards)):
            for document, spans in self.shard_documents(shard):
                if not self._dead_D[number]:
                    yield document, spans, row
                number += 1
                row += len(spans)

    def find(self, key: str) -> int | None:
        """Number of the document with this key; None where there is none, or it was removed."""
        order, hashes = self._keys
        wanted = np.uint64(name_hash(key))
        place = int(np.searchsorted(hashes, wanted))
        while place < len(hashes) and hashes[place] == wanted:
            number = int(order[place])
            if self.field("key", number) == key and not self._dead_D[number]:
                return number
            place += 1
        return None

    def field(self, name: str, document: int) -> str:
        """One of the texts that are kept of a document."""
        shard = int(np.searchsorted(self.first_document, document, side="right")) - 1
        value: str = self.tables[shard][name][document - int(self.first_document[shard])].as_py()
        return value

    @functools.cached_property
    def _keys(self) -> tuple[Int64s, NDArray[np.uint64]]:
        """Documents in the order of the hashes of their keys, and these hashes."""
        hashes = np.concatenate([np.empty(0, np.uint64), *(t["key_hash"].to_numpy() for t in self.tables)])
        order = np.argsort(hashes, kind="stable")
        return order, hashes[order]

    @functools.cached_property
    def _dead_D(self) -> NDArray[np.bool_]:  # noqa: N802
        dead_D = np.zeros(self.num_documents, np.bool_)
        dead_D[self.dead_documents] = True
        return dead_D

    def shard_texts(self, shard: int) -> list[tuple[str, str]]:
        """Title and text of every chunk of one shard."""
        texts: list[tuple[str, str]] = []
        for document, spans in self.shard_documents(shard):
            texts += [(document.title, document.text[start:end]) for start, end in spans.tolist()]
        return texts

    def shard_documents(self, shard: int) -> Iterator[tuple[Document, Int64s]]:
        """The documents of one shard, removed ones included, with the spans of their chunks [n, 2]."""
        chunks_N3, table = np.asarray(self._chunks[shard]), self.tables[shard]
        bounds = np.searchsorted(chunks_N3[:, 0], np.arange(table.num_rows + 1))
        for entry in range(table.num_rows):
            values = {name: table[name][entry].as_py() for name in _TEXT_COLUMNS}
            yield Document(**values, source=""), chunks_N3[bounds[entry] : bounds[entry + 1], 1:]

    def rows_of(self, documents: Int64s) -> Int64s:
        """All rows of some documents, ascending."""
        order = np.sort(np.asarray(documents, np.int64))
        rows = [np.empty(0, np.int64)]
        # Shard by shard, and not from a table of all rows, which only searches hold.
        for shard, wanted in self._by_shard(order, self.first_document):
            owner_N, base = self._chunks[shard][:, 0], int(self.first_row[shard])
            first, end = (np.searchsorted(owner_N, wanted, side=side) + base for side in ("left", "right"))
            rows += [np.arange(a, b) for a, b in zip(first.tolist(), end.tolist(), strict=True)]
        return np.concatenate(rows)

    def _owners(self, rows: Int64s) -> Int64s:
        """Numbers of the documents of some rows in ascending order, each once."""
        found = [
            np.unique(self._chunks[shard][local, 0]) + int(self.first_document[shard])
            for shard, local in self._by_shard(rows, self.first_row)
        ]
        return np.concatenate([np.empty(0, np.int64), *found])

    @staticmethod
    def _by_shard(ascending: Int64s, firsts: Int64s) -> Iterator[tuple[int, Int64s]]:
        """Numbers that count on through all shards, as those of each shard that has some, counted from its first."""
        bounds = np.searchsorted(ascending, firsts)
        for shard in np.flatnonzero(np.diff(bounds)).tolist():
            yield shard, ascending[bounds[shard] : bounds[shard + 1]] - firsts[shard]

    def groups(self, rows: Int64s) -> NDArray[np.uint64]:
        """Hash of the group of each row, any shape; rows must exist."""
        return self._group_of_document[self.documents_of(rows)]

    def documents_of(self, rows: Int64s) -> Int64s:
        """Number of the document of each row, any shape."""
        return self._document_of_row[rows]

    @functools.cached_property
    def _document_of_row(self) -> Int64s:
        numbered = [c[:, 0] + first for c, first in zip(self._chunks, self.first_document.tolist(), strict=False)]
        return np.concatenate([np.empty(0, np.int64), *numbered])

    @functools.cached_property
    def _group_of_document(self) -> NDArray[np.uint64]:
        return np.concatenate([np.empty(0, np.uint64), *(t["group_hash"].to_numpy() for t in self.tables)])

    def passage(self, row: int, score: float = 0.0) -> Passage:
        """The chunk of a row with its continuation.

        Raises:
            IndexError: There is no such row; a missing neighbor (-1) is not the last one.
        """
        if not 0 <= row < self.num_chunks:
            raise IndexError(f"row {row} is not in [0, {self.num_chunks})")
        shard = int(np.searchsorted(self.first_row, row, side="right")) - 1
        chunks_N3, local = self._chunks[shard], row - int(self.first_row[shard])
        entry, start, end = (int(x) for x in chunks_N3[local])
        continued = end
        if local + 1 < len(chunks_N3) and chunks_N3[local + 1, 0] == entry:
            continued = int(chunks_N3[local + 1, 2])
        table = self.tables[shard]
        text: str = table["text"][entry].as_py()
        return Passage(
            row=row,
            key=table["key"][entry].as_py(),
            title=table["title"][entry].as_py(),
            url=table["url"][entry].as_py(),
            text=text[start:end],
            continuation=text[end:continued],
            score=score,
            metadata=table["metadata"][entry].as_py(),
        )


def _allow_open_files(count: int) -> None:
    """A memory map holds its file open; raises this process's limit as far as the system allows."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 512
    if soft != resource.RLIM_INFINITY and soft < wanted:
        new = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (new, hard))


# --- training data ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedDocument:
    """One document of a training corpus on its grid of chunks.

    BOS stands in the first slot after the lead; EOS is no slot, only the last target.
    """

    ids: NDArray[np.int32]
    """BOS and the tokens of the text."""
    lead: int
    """Empty slots before BOS, in [0, M)."""
    split: int
    """Index into SPLITS."""
    num_bytes: int
    """UTF-8 bytes of the text."""
    queries: list[str]
    """Text of each finished chunk: what its neighbors are looked up with. A last, partial chunk has none."""

    @staticmethod
    def make(text: str, tokenizer: Tokenizer, chunk_len: int, *, lead: int, split: int) -> "TokenizedDocument":
        """Tokenizes a document and cuts its text at the borders of the grid."""
        encoded = tokenizer.encode(text)
        finished = (lead + 1 + len(encoded.ids)) // chunk_len
        queries = []
        for chunk in range(finished):
            first = max(chunk * chunk_len - lead - 1, 0)
            end = (chunk + 1) * chunk_len - lead - 1
            queries.append(text[encoded.spans[first, 0] : encoded.spans[end - 1, 1]] if end > first else "")
        return TokenizedDocument(
            ids=np.concatenate([np.array([tokenizer.bos_id], np.int32), encoded.ids]),
            lead=lead,
            split=split,
            num_bytes=len(text.encode()),
            queries=queries,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingArrays:
    """The arrays of training data, as files of their names.

    D documents, N chunks of them all (partial ones included), K neighbors, U different neighbors, R tokens of one.
    """

    ids: NDArray[Any]
    """tokens/: all documents' tokens, one after the other; uint16 where the vocabulary allows, else int32."""
    starts: Int64s
    """tokens/: where each document begins in `ids`, and the end [D + 1]."""
    leads: NDArray[np.int32]
    """tokens/ [D]."""
    splits: NDArray[np.uint8]
    """tokens/: index into SPLITS [D]."""
    num_bytes: Int64s
    """tokens/: UTF-8 bytes of each document's text [D]."""
    neighbors: Int64s
    """neighbors/: which of the U neighbors each chunk has [N, K], -1 where there is none."""
    scores: NDArray[np.float32]
    """neighbors/: of the search [N, K], NaN where there is none."""
    index_rows: Int64s
    """neighbors/: row of the index that each of the U neighbors was [U]."""
    neighbor_ids: NDArray[Any]
    """neighbors/: tokens of chunk and continuation, cut after R [U, R]."""
    neighbor_lengths: NDArray[np.int32]
    """neighbors/: how many of them there are [U]."""
    neighbor_chunk_lengths: NDArray[np.int32] | None = None
    """neighbors/: how many of these are the chunk's own, before those of its continuation [U]. None in data of older versions."""

    @classmethod
    def folders(cls) -> dict[str, str]:
        """Folder of each array."""
        names = [f.name for f in fields(cls)]
        split = names.index("neighbors")
        return {name: "tokens" if i < split else "neighbors" for i, name in enumerate(names)}


class TrainingData:
    """A corpus tokenized for one model, with the neighbors of its chunks: read access through memory maps.

    It holds its neighbors' tokens itself, so that it stays valid whatever happens to the index, and can be moved alone.
    """

    KIND = "training data"

    def __init__(self, folder: Path) -> None:
        """Opens the folder.

        Raises:
            FormatError: It is missing, unfinished, damaged, or its arrays contradict each other.
        """
        self.folder = folder
        self.manifest = read_manifest(folder, self.KIND)
        self.chunk_len = int(self.manifest["chunk_len"])
        self.tokenizer = Tokenizer.load(str(folder))
        if self.tokenizer.fingerprint != self.manifest["tokenizer_fingerprint"]:
            raise MismatchError(f"{folder} holds another tokenizer than it was made with: make it again")
        paths = {name: f"{below}/{name}.npy" for name, below in TrainingArrays.folders().items()}
        if paths["neighbor_chunk_lengths"] not in self.manifest["files"]:
            del paths["neighbor_chunk_lengths"]
        self.arrays = TrainingArrays(**{name: load_array(folder / path) for name, path in paths.items()})
        lengths_D = self.arrays.leads + np.diff(self.arrays.starts)
        chunks_D = -(-lengths_D // self.chunk_len)
        self.chunk_starts: Int64s = np.concatenate([np.zeros(1, np.int64), np.cumsum(chunks_D, dtype=np.int64)])
        """First chunk of each document, and the end [D + 1]."""
        if self.chunk_starts[-1] != len(self.arrays.neighbors):
            raise FormatError(
                f"{folder} has {len(self.arrays.neighbors):,} rows of neighbors for {self.chunk_starts[-1]:,} chunks: "
                "make it again"
            )

    @property
    def num_neighbors(self) -> int:
        """K, the most that a model can train with."""
        return int(self.arrays.neighbors.shape[1])

    @property
    def neighbor_len(self) -> int:
        """R, likewise."""
        return int(self.arrays.neighbor_ids.shape[1])

    def documents(self, split: str) -> Int64s:
        """Numbers of the documents of one split."""
        return np.flatnonzero(self.arrays.splits == SPLITS.index(split))
