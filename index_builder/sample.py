"""A sample of a corpus, from which the size of the whole follows: documents, chunks, tokens, bytes on disk, and rates."""

import contextlib
import gzip
import lzma
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from index_builder.build import write_shard
from index_builder.config import BuildConfig
from index_builder.corpus import Reject, _files, _resolve, read_documents
from index_builder.formats import COMPRESSIONS
from index_builder.lexical import PART_POSTINGS, WORDS, LexicalIndex
from index_builder.shards import Progress
from retro.chunks import Document, Int64s, chunk_spans, load_array, shard_path
from retro.errors import ConfigError, CorpusError
from retro.tokenizer import Tokenizer

KEPT_TEXTS = 2048
"""Chunks that are kept of a sample, at least half as many as there can be."""
LOOKED_INTO = 64
"""Files of a kind that are looked into, where reading did not come to it."""
SETTLED = 8 << 20
"""Bytes of a compressed file after which its ratio is taken as that of the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """How fast something goes, and how that is known."""

    per_s: float
    unit: str
    source: str

    def times(self, factor: float, source: str) -> "Rate":
        """A rate that follows from this one."""
        return replace(self, per_s=self.per_s * factor, source=f"{self.source}; {source}")

    def __str__(self) -> str:
        digits = 0 if self.per_s >= 100 else 1
        return f"{self.per_s:,.{digits}f} {self.unit}/s: {self.source}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusSize:
    """How large a corpus is, and what its index keeps of it on disk beside vectors."""

    documents: int
    chunks: int
    tokens: int | None
    """Of the text, by the tokenizer that cuts the chunks; None where vectors come with the corpus and nothing is cut."""
    exact: bool
    basis: str
    """How these counts came about."""
    document_bytes: int
    lexical_bytes: int


class _Source(NamedTuple):
    """A file, or a data set."""

    shown: str
    """As in `Document.source`."""
    spec: str
    """A corpus of it alone."""
    kind: str
    """Format and compression, or the data set: what was read of a kind stands for the rest of it."""
    path: Path | None
    units: float
    """Rows of Parquet and of data sets, bytes of other files."""


@dataclass(slots=True)
class _Tally:
    """What was read of one kind."""

    units: float = 0.0
    """In all."""
    read: float = 0.0
    documents: int = 0
    chunks: int = 0
    tokens: int = 0
    chars: int = 0


@dataclass(slots=True)
class Sample:
    """Documents from the beginning of a corpus, and where a kind of file comes later, from the beginning of that."""

    config: BuildConfig
    tokenizer: Tokenizer
    folder: Path
    progress: Progress | None
    finished: bool = False
    """Whether this is the whole corpus."""
    texts: list[str] = field(default_factory=list)
    """Chunks from all over the sample."""
    vector_dim: int | None = None
    _tallies: dict[str, _Tally] = field(default_factory=dict)
    _seconds: float = 0.0
    _stored: int = 0
    _stride: int = 1
    _seen: int = 0
    _pending: list[tuple[Document, Int64s]] = field(default_factory=list)
    _pending_chars: int = 0

    def read(self, corpora: Sequence[str], until: float, max_documents: int | None) -> None:
        """Reads until the end of the corpus, of the time, or of so many documents."""
        sources = {source.shown: source for source in _list_sources(corpora)}
        self._tallies = {source.kind: _Tally() for source in sources.values()}
        at, line, self.finished = self._read(corpora, sources, until, max_documents)
        if self.finished:
            return
        for corpus in _resolve(corpora):
            if corpus.dataset is not None:
                rows = _dataset_rows(corpus, self.config.read.limit)
                sources[corpus.location] = sources[corpus.location]._replace(units=rows)
        for source in sources.values():
            self._tallies[source.kind].units += source.units
        for source in sources.values():
            if source.shown == at:
                self._tallies[source.kind].read += _units_before(source, line)
                break
            self._tallies[source.kind].read += source.units
        for kind, tally in self._tallies.items():
            if tally.units and not tally.read:
                self._look_into([source for source in sources.values() if source.kind == kind], tally, max_documents)

    def _look_into(self, sources: list[_Source], tally: _Tally, max_documents: int | None) -> None:
        """Reads from files of a kind that was not reached, for a second or two."""
        until = time.monotonic() + 1
        for source in sources[:: -(-len(sources) // LOOKED_INTO)]:
            if tally.read and time.monotonic() > until:
                return
            # An empty file is no corpus, but no error in one.
            with contextlib.suppress(CorpusError):
                _, line, whole = self._read([source.spec], {source.shown: source}, until + 1, max_documents)
                tally.read += source.units if whole else _units_before(source, line)

    def _read(
        self, corpora: Sequence[str], sources: dict[str, _Source], until: float, max_documents: int | None
    ) -> tuple[str, int, bool]:
        """Returns file and line of the last document, and whether the end was reached."""
        shown, line, count = "", 0, 0
        started = time.monotonic()
        for item in read_documents(corpora, self.config.read):
            if isinstance(item, Reject):
                shown, line = item.file, item.line
            else:
                shown, line = _place(item.source, sources)
                self._take(item, self._tallies[sources[shown].kind])
                count += 1
            if self.progress is not None and count % 256 == 0:
                self.progress("read a sample", count, None)
            if count == max_documents or time.monotonic() > until:
                break
        else:
            line = -1
        self._write()
        self._seconds += time.monotonic() - started
        return shown, line, line < 0

    def _take(self, document: Document, tally: _Tally) -> None:
        text = document.text
        if document.vector is not None:
            self.vector_dim = len(document.vector)
            spans = np.array([[0, len(text)]], np.int64)
        else:
            encoded = self.tokenizer.encode(text)
            spans = chunk_spans(encoded, self.config.chunk_len)
            tally.tokens += len(encoded.ids)
        tally.documents += 1
        tally.chunks += len(spans)
        tally.chars += len(text)
        title = f"{document.title}. " if self.config.title_in_key and document.title else ""
        for start, end in spans[-self._seen % self._stride :: self._stride].tolist():
            self.texts.append(title + text[start:end])
        self._seen += len(spans)
        while len(self.texts) >= 2 * KEPT_TEXTS:
            self.texts, self._stride = self.texts[::2], 2 * self._stride
        self._pending.append((document, spans))
        self._pending_chars += len(text)
        if self._pending_chars >= self.config.shard_chars:
            self._write()

    def _write(self) -> None:
        """As a build would, and away with it."""
        if not self._pending:
            return
        write_shard(self.folder, "00000", [d for d, _ in self._pending], [spans for _, spans in self._pending])
        self._stored += shard_path(self.folder / "documents", "00000", ".arrow").stat().st_size
        self._pending, self._pending_chars = [], 0

    def rate(self) -> Rate:
        documents = sum(tally.documents for tally in self._tallies.values())
        source = f"measured on {documents:,} documents of this corpus, chunking and writing included"
        return Rate(per_s=documents / max(self._seconds, 1e-6), unit="documents", source=source)

    def size(self, lexical_bytes: Callable[[int], int]) -> CorpusSize:
        """Of the whole corpus.

        Raises:
            CorpusError: There was nothing in what was read of a kind.
        """
        factors = {}
        for kind, tally in self._tallies.items():
            if not self.finished and tally.units and not tally.read:
                raise CorpusError(f"nothing could be read of {kind} in the time: give more time or fewer documents")
            factors[kind] = 1.0 if self.finished or not tally.units else tally.units / tally.read
        totals = {
            name: sum(getattr(tally, name) * factors[kind] for kind, tally in self._tallies.items())
            for name in ("documents", "chunks", "tokens", "chars")
        }
        limit, basis = self.config.read.limit, "the whole corpus was read"
        read = sum(tally.documents for tally in self._tallies.values())
        if not self.finished:
            shares = ", ".join(f"{100 * min(1.0, 1 / factor):.2g}% of {kind}" for kind, factor in factors.items())
            basis = f"{read:,} documents were read, {shares}, by bytes on disk or rows"
            if limit is not None and totals["documents"] > limit:
                totals = {name: value * limit / totals["documents"] for name, value in totals.items()}
                basis += f"; no more than the limit of {limit:,} documents"
            if self.config.read.deduplicate != "none":
                basis += "; duplicates further apart than the sample are not counted out"
        chars = sum(tally.chars for tally in self._tallies.values())
        chunks = round(totals["chunks"])
        return CorpusSize(
            documents=round(totals["documents"]),
            chunks=chunks,
            tokens=None if self.config.read.vectors_field else round(totals["tokens"]),
            exact=self.finished,
            basis=basis,
            document_bytes=int(self._stored * totals["chars"] / max(chars, 1)),
            lexical_bytes=lexical_bytes(chunks),
        )


def _place(source: str, sources: dict[str, _Source]) -> tuple[str, int]:
    """File and line of a document; line 0 where the file is one document."""
    if source in sources:
        return source, 0
    shown, _, line = source.rpartition(":")
    return shown, int(line)


def _list_sources(corpora: Sequence[str]) -> list[_Source]:
    """Files and data sets in the order in which they are read.

    Raises:
        CorpusError: One is missing or cannot be read.
    """
    sources = []
    for corpus in _resolve(corpora):
        if corpus.dataset is not None:
            sources.append(_Source(corpus.location, corpus.location, corpus.location, None, math.nan))
            continue
        for number, file in enumerate(_files(corpus)[0]):
            name = PurePath(file.path.name.lower())
            kind = name.suffix
            if kind in COMPRESSIONS:
                kind = PurePath(name.stem).suffix + kind
            units = float(file.path.stat().st_size)
            if file.kind == "parquet":
                try:
                    units = float(pq.read_metadata(file.path).num_rows)
                except (pa.ArrowException, OSError) as error:
                    raise CorpusError(f"{file.shown} is damaged ({error}); copy or download it again") from error
            sources.append(_Source(file.shown, f"sample{number}={file.path}", kind, file.path, units))
    return sources


def _dataset_rows(corpus: Any, limit: int | None) -> float:
    """Rows of a data set that was read in part.

    Raises:
        CorpusError: It cannot be read.
        ConfigError: Nobody knows.
    """
    import datasets

    path = corpus.dataset.dataset if corpus.path is None else str(corpus.path.absolute())
    try:
        builder = datasets.load_dataset_builder(path, corpus.dataset.config, revision=corpus.dataset.revision)
        split = (builder.info.splits or {}).get(corpus.dataset.split)
    except Exception as error:  # the library raises nearly everything
        raise CorpusError(f"{corpus.location} cannot be read ({error}); check the name and the connection") from error
    if split is not None and split.num_examples:
        return float(split.num_examples)
    if limit is not None:
        return float(limit)
    raise ConfigError(
        f"nobody knows how many rows {corpus.location} has: its size can only be planned with --limit, or as files on disk"
    )


def _units_before(source: _Source, line: int) -> float:
    """How much of a source was read with its first `line` lines; of a compressed file, by the ratio of what was read."""
    if line == 0:
        return source.units
    if source.path is None or source.kind == ".parquet":
        return float(line)
    with source.path.open("rb") as raw:
        stream: Any = raw
        if source.kind.endswith(".gz"):
            stream = gzip.GzipFile(fileobj=raw)
        elif source.kind.endswith(".xz"):
            stream = lzma.LZMAFile(raw)  # noqa: SIM115 (it is closed with the file below it)
        elif source.kind.endswith(".zst"):
            import zstandard

            unpack = zstandard.ZstdDecompressor(max_window_size=2**31)
            stream = unpack.stream_reader(raw, read_across_frames=True, closefd=False)
        lines = plain = 0
        wanted: int | None = None
        packed = source.units
        while block := stream.read(1 << 16):
            found = block.count(b"\n")
            if wanted is None and lines + found >= line:
                wanted = plain + len(b"\n".join(block.split(b"\n", line - lines)[: line - lines])) + 1
            lines += found
            plain += len(block)
            # Not before: the readers take in more than they have given out.
            if wanted is not None and raw.tell() >= SETTLED:
                packed = float(raw.tell())
                break
    return packed * (plain if wanted is None else wanted) / max(plain, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class LexicalSample:
    """A BM25 index of some chunks."""

    rate: Rate
    chunks: int
    words: int
    postings: float

    @classmethod
    def measure(cls, texts: Sequence[str], folder: Path, language: str) -> "LexicalSample":
        started = time.monotonic()
        parts = LexicalIndex.build(folder, lambda: [texts], language=language)
        seconds = max(time.monotonic() - started, 1e-6)
        words = len(load_array(folder / WORDS))
        stored = sum(path.stat().st_size for path in LexicalIndex.files(folder, parts))
        rate = Rate(
            per_s=len(texts) / seconds, unit="chunks", source=f"measured on {len(texts):,} chunks of this corpus"
        )
        # 8 bytes a posting, 4 a row, 32 a word.
        return cls(rate=rate, chunks=len(texts), words=words, postings=max(stored - 4 * len(texts) - 32 * words, 8) / 8)

    def bytes_of(self, chunks: int) -> int:
        """Of an index of so many chunks. The number of different words grows with the power 0.6 of the text (Heaps' law)."""
        postings = self.postings * chunks / max(self.chunks, 1)
        parts = max(1.0, postings / PART_POSTINGS)
        words_of_all = self.words * (postings / self.postings) ** 0.6
        words_of_part = self.words * (postings / parts / self.postings) ** 0.6
        return int(8 * postings + 4 * chunks + 16 * words_of_all + 16 * parts * words_of_part)
