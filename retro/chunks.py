"""Documents, chunks of documents and training data on disk: the only reader and writer of these files.

X.index/documents/00000.arrow   a shard of documents (Arrow IPC, memory-mapped)
X.index/chunks/00000.npy        its chunks, int64 [n, 3]: document, first character, end character
X.data/tokens/, neighbors/      a tokenized corpus and the neighbors of its chunks (class TrainingData)
"""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
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


def group_hash(group: str) -> int:
    """64 bits that stand for a group's name."""
    import hashlib

    return int.from_bytes(hashlib.blake2b(group.encode(), digest_size=8).digest(), "little")


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
_SCHEMA = pa.schema([(name, pa.large_string()) for name in _TEXT_COLUMNS] + [("group_hash", pa.uint64())])


def shard_path(folder: Path, number: int, suffix: str) -> Path:
    """Path of one numbered shard."""
    return folder / f"{number:05d}{suffix}"


def write_documents(folder: Path, number: int, documents: Sequence[Document], chunks_N3: Int64s, records: int) -> None:
    """Writes one shard of documents and its chunks; the documents come last, so that their presence means both.

    Args:
        folder: The index.
        number: Of the shard.
        documents: In corpus order.
        chunks_N3: Document (counted over the whole index), first and end character of every chunk.
        records: Corpus records read so far, rejected ones included: where reading goes on.
    """
    columns = [pa.array([getattr(d, name) for d in documents], pa.large_string()) for name in _TEXT_COLUMNS]
    hashes = pa.array([group_hash(d.group) for d in documents], pa.uint64())
    table = pa.Table.from_arrays([*columns, hashes], schema=_SCHEMA.with_metadata({"records": str(records)}))

    def write(file: Any) -> None:
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)

    save_array(shard_path(folder / "chunks", number, ".npy"), chunks_N3)
    write_atomically(shard_path(folder / "documents", number, ".arrow"), write)


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

    A row is the number of a chunk in corpus order, 64 bit and stable.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tables: list[pa.Table] = []
        self._chunks: list[Int64s] = []
        for path in sorted((folder / "documents").glob("*.arrow")):
            try:
                self._tables.append(pa.ipc.open_file(pa.memory_map(str(path))).read_all())
            except (pa.ArrowInvalid, OSError) as error:
                raise FormatError(f"{path} is damaged: {error}") from error
            self._chunks.append(load_array(folder / "chunks" / f"{path.stem}.npy"))
        self._first_document = np.cumsum([0, *(t.num_rows for t in self._tables)])
        self._first_row = np.cumsum([0, *(len(c) for c in self._chunks)])

    @property
    def num_documents(self) -> int:
        return int(self._first_document[-1])

    @property
    def num_chunks(self) -> int:
        """N: rows of the index."""
        return int(self._first_row[-1])

    @property
    def num_shards(self) -> int:
        return len(self._tables)

    def records_read(self) -> int:
        """Corpus records that the shards so far came from, rejected ones included."""
        if not self._tables:
            return 0
        return int(self._tables[-1].schema.metadata[b"records"])

    def keys(self) -> Iterable[str]:
        """The keys of all documents, in order."""
        for table in self._tables:
            yield from table["key"].to_pylist()

    def shard_texts(self, shard: int) -> list[tuple[str, str]]:
        """Title and text of every chunk of one shard."""
        texts: list[tuple[str, str]] = []
        loaded, text, title = -1, "", ""
        first = int(self._first_document[shard])
        for document, start, end in self._chunks[shard].tolist():
            if document != loaded:
                loaded = document
                text = self._tables[shard]["text"][document - first].as_py()
                title = self._tables[shard]["title"][document - first].as_py()
            texts.append((title, text[start:end]))
        return texts

    def groups(self, rows: Int64s) -> NDArray[np.uint64]:
        """Hash of the group of each row, any shape; rows must exist."""
        return self._group_of_document[self.documents_of(rows)]

    def documents_of(self, rows: Int64s) -> Int64s:
        """Number of the document of each row, any shape."""
        return self._document_of_row[rows]

    @functools.cached_property
    def _document_of_row(self) -> Int64s:
        return np.concatenate([np.empty(0, np.int64), *(c[:, 0] for c in self._chunks)])

    @functools.cached_property
    def _group_of_document(self) -> NDArray[np.uint64]:
        return np.concatenate([np.empty(0, np.uint64), *(t["group_hash"].to_numpy() for t in self._tables)])

    def passage(self, row: int, score: float = 0.0) -> Passage:
        """The chunk of a row with its continuation.

        Raises:
            IndexError: There is no such row; a missing neighbor (-1) is not the last one.
        """
        if not 0 <= row < self.num_chunks:
            raise IndexError(f"row {row} is not in [0, {self.num_chunks})")
        shard = int(np.searchsorted(self._first_row, row, side="right")) - 1
        chunks_N3, local = self._chunks[shard], row - int(self._first_row[shard])
        document, start, end = (int(x) for x in chunks_N3[local])
        continued = end
        if local + 1 < len(chunks_N3) and chunks_N3[local + 1, 0] == document:
            continued = int(chunks_N3[local + 1, 2])
        entry = document - int(self._first_document[shard])
        table = self._tables[shard]
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
        self.arrays = TrainingArrays(
            **{name: load_array(folder / below / f"{name}.npy") for name, below in TrainingArrays.folders().items()}
        )
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
