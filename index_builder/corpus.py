"""Documents from files, folders and Hugging Face datasets, streamed: memory is bounded by the longest document allowed.

A corpus is written as one of

    PATH                                 a file or a folder
    hf:NAME[@REVISION][/CONFIG]:SPLIT    a Hugging Face dataset: hf:name:train, hf:org/name:train, hf:org/name@rev:train,
                                         hf:org/name@rev/config:train. Without a revision one slash means org/name and
                                         two mean org/name/config. A revision has no slash.
    hf:FOLDER:SPLIT                      a dataset on disk. FOLDER starts with ./ or ../ or / and ends at the last colon.

each with an optional `CORPUS=` in front, which names it; a path that exists and holds a `=` is a path. Keys of documents
are `corpus:id`. The name of a file is its stem without the suffixes below, that of a folder or dataset its last part.

Formats go by suffix, in any case; all but Parquet may end in .gz, .xz or .zst as well:

    .jsonl .ndjson .json    one JSON object a line
    .csv .tsv .parquet      a document a row, in the first two with the names of the columns in the first row
    .txt .md .markdown .html .htm    a document a file

JSON Lines are read here and not through `datasets`, which can neither name the line of a record that is malformed nor
leave it out. Folders are read in the order of their posix paths; hidden entries are left out and links to folders are
not followed.
"""

import csv
import functools
import hashlib
import io
import json
import logging
import lzma
import math
import operator
import os
import re
import stat
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple, NoReturn, cast

from retro.errors import ConfigError, CorpusError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_LOG = logging.getLogger(__name__)

_KINDS = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "jsonl"),
    **{".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".txt": "text"},
    **dict.fromkeys((".md", ".markdown"), "markdown"),
    **dict.fromkeys((".html", ".htm"), "html"),
}
_COMPRESSIONS = (".gz", ".xz", ".zst")
_SPLITS = {"": "", "train": "train", "valid": "valid", "validation": "valid", "dev": "valid", "test": "test"}
_BOM = b"\xef\xbb\xbf"
_NUL = "it holds a NUL character, so it is not plain text or was damaged; remove the character"

_FRONT_MATTER = re.compile(r"\A---[ \t]*\n([\w-]+[ \t]*:.*?\n)(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL)
_FRONT_TITLE = re.compile(r"^title[ \t]*:[ \t]*([^\s>|].*)$", re.MULTILINE)
_HEADING = re.compile(r" {0,3}#[ \t]+(\S.*?)(?:[ \t]+#+)?[ \t]*")

_DROPPED = ("script", "style", "noscript", "template", "nav", "header", "footer", "aside", "form", "svg", "title")
_BLOCK = re.compile(
    "address|article|blockquote|body|br|caption|center|d[dlt]|details|div|fieldset|fig(caption|ure)|h[1-6]|head|hr|html|"
    "legend|li|main|menu|[ou]l|p|section|summary|table|tbody|tfoot|thead|tr"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One document of a corpus."""

    key: str
    """`corpus:id`; unique over all corpora read together."""
    text: str
    """Neither empty nor blank; line ends are "\\n"."""
    title: str
    """Empty when there is none."""
    url: str
    """Empty when there is none."""
    group: str
    """The unit of exclusion: what must not be retrieved for a member of the same group. Default: the key."""
    split: str
    """"train", "valid" or "test"; empty when the record names none."""
    metadata: str
    """Every other field, as canonical JSON: keys sorted, no spaces, not escaped."""
    content_hash: str
    """Hexadecimal blake2b (16 bytes) of text, title, url, group, split and metadata."""
    source: str
    """File and line, for messages: "wiki.jsonl:17"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reject:
    """A record that was left out."""

    file: str
    line: int
    """1-based, a row for Parquet and datasets; 0 where the file is one document."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """How records become documents.

    Raises:
        ConfigError: A value is out of range, or two fields have the same name.
    """

    text_field: str = "text"
    id_field: str = "id"
    title_field: str = "title"
    limit: int | None = None
    """Documents to read at most, over all corpora together."""
    on_error: Literal["stop", "skip"] = "stop"
    """Whether a record that cannot be used ends the reading or is yielded as a `Reject`."""
    max_document_chars: int = 10_000_000
    """Longest text in characters. Memory grows with it: a record takes up to six bytes a character as JSON."""

    def __post_init__(self) -> None:
        names = (self.text_field, self.id_field, self.title_field, "url", "group", "split")
        if "" in names or len(set(names)) < len(names):
            raise ConfigError(
                f"text, id and title come from the fields {', '.join(map(repr, names[:3]))}; they need three different "
                "names, none of them empty, 'url', 'group' or 'split'"
            )
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit is {self.limit}; give at least 1, or leave it out to read everything")
        if self.on_error not in ("stop", "skip"):
            raise ConfigError(f"on_error is {self.on_error!r}; use 'stop' or 'skip'")
        if self.max_document_chars < 1:
            raise ConfigError(f"max_document_chars is {self.max_document_chars}; give at least 1")

    @property
    def _max_bytes(self) -> int:
        """Longest line or one-document file that is held in memory: a \\uXXXX per character, and 1 MiB around it."""
        return 6 * self.max_document_chars + 2**20


def read_documents(corpora: Sequence[str], options: ReadOptions) -> Iterator[Document | Reject]:
    """Stream the documents of all corpora, in order; the module's docstring says how a corpus is written.

    Names and paths are checked at once, everything else as the stream is read.

    Args:
        corpora: Paths and datasets, e.g. `["wiki.jsonl.zst", "manual=docs/", "hf:org/name:train"]`.
        options: Field names and limits.

    Returns:
        Documents and, with `on_error="skip"`, the records left out.

    Raises:
        CorpusError: A corpus is missing, cannot be read, is damaged or holds no document; or, with `on_error="stop"`,
            a record cannot be used.
    """
    return _documents(_resolve(corpora), options)


def describe_corpora(corpora: Sequence[str]) -> list[dict[str, Any]]:
    """Say what the corpora are, without reading them, so that a later call can tell whether one has changed.

    Returns:
        JSON values, one object a corpus: `name`; `path`, absolute, or the dataset as written; `kind`, a format,
        "folder" or "hf"; `files`, the path (relative to the corpus), `bytes` and `mtime_ns` of each, none for a dataset
        of the hub.

    Raises:
        CorpusError: A corpus is missing, cannot be read or has no file of a known format, or two share a name.
    """
    described: list[dict[str, Any]] = []
    for corpus in _resolve(corpora):
        files = []
        for file in [] if corpus.path is None else _files(corpus)[0]:
            info = _stat(file.path)
            files.append({"path": file.relative, "bytes": info.st_size, "mtime_ns": info.st_mtime_ns})
        path = corpus.location if corpus.kind == "hf" or corpus.path is None else _shown(corpus.path.absolute())
        parts = {} if corpus.dataset is None else corpus.dataset._asdict()
        described.append({"name": corpus.name, "path": path, "kind": corpus.kind, "files": files, **parts})
    return described


# Corpora and their files


class _Dataset(NamedTuple):
    dataset: str
    revision: str | None
    config: str | None
    split: str


class _Corpus(NamedTuple):
    name: str
    location: str
    kind: str
    path: Path | None  # None for a dataset of the hub
    dataset: _Dataset | None


class _File(NamedTuple):
    path: Path
    shown: str
    relative: str
    kind: str


def _resolve(corpora: Sequence[str]) -> list[_Corpus]:
    if not corpora:
        raise CorpusError("no corpus given; name a file, a folder or hf:NAME:SPLIT")
    resolved: dict[str, _Corpus] = {}
    for corpus in map(_resolve_one, corpora):
        if not corpus.name or ":" in corpus.name:
            raise CorpusError(f"the name of {corpus.location} would be {corpus.name!r}; give one with NAME=PATH")
        if other := resolved.get(corpus.name):
            raise CorpusError(
                f"{other.location} and {corpus.location} are both called {corpus.name!r}; name one with NAME=PATH"
            )
        resolved[corpus.name] = corpus
    return list(resolved.values())


def _resolve_one(spec: str) -> _Corpus:
    name, location = "", spec
    if not _exists(spec) and (named := re.fullmatch(r"([A-Za-z0-9._-]+)=(.+)", spec)):
        name, location = named.groups()
    if location.startswith("hf:") and not _exists(location):
        dataset = _parse_dataset(location)
        folder = Path(dataset.dataset) if dataset.dataset.startswith(("./", "../", "/")) else None
        if folder and not stat.S_ISDIR(_stat(folder).st_mode):
            raise CorpusError(f"{folder} is not a folder; write hf:FOLDER:SPLIT, or its path alone to read one file")
        name = name or (folder.resolve().name if folder else dataset.dataset.rpartition("/")[2])
        return _Corpus(name, location, "hf", folder, dataset)
    path = Path(location)
    if stat.S_ISDIR(_stat(path).st_mode):
        return _Corpus(name or path.resolve().name, location, "folder", path, None)
    stem, kind = _parse_filename(path.name)
    if not kind:
        raise CorpusError(
            f"{_shown(path)} has a suffix that is not known; convert it to one of {' '.join(_KINDS)}, all but .parquet "
            f"with {' '.join(_COMPRESSIONS)} as well"
        )
    return _Corpus(name or stem, location, kind, path, None)


def _parse_dataset(location: str) -> _Dataset:
    name, _, split = location.removeprefix("hf:").rpartition(":")
    if name.startswith(("./", "../", "/")) and split:
        return _Dataset(name, None, None, split)
    part = r"[\w.-]+"
    with_revision = rf"(?P<name>{part}(?:/{part})?)@(?P<revision>{part})(?:/(?P<config>[^/@]+))?"
    without = rf"(?P<name>{part}(?:/{part})?)(?:/(?P<config>[^/@]+))?"
    match = re.fullmatch(with_revision, name) or re.fullmatch(without, name)
    if match is None or re.fullmatch(part, split) is None:
        raise CorpusError(
            f"{location} is not a dataset; write hf:NAME[@REVISION][/CONFIG]:SPLIT or hf:./FOLDER:SPLIT, and use "
            "--limit instead of a slice of a split"
        )
    found = match.groupdict()
    return _Dataset(found["name"], found.get("revision"), found["config"], split)


def _parse_filename(name: str) -> tuple[str, str]:
    """Stem without known suffixes, and format ("" when not known)."""
    path = PurePath(name)
    compressed = path.suffix.lower() in _COMPRESSIONS
    path = PurePath(path.stem) if compressed else path
    kind = _KINDS.get(path.suffix.lower(), "")
    return path.stem, "" if compressed and kind == "parquet" else kind


def _files(corpus: _Corpus) -> tuple[list[_File], Counter[str]]:
    """Files of a local corpus in order, and how many of which other suffixes were skipped."""
    path = cast("Path", corpus.path)
    if corpus.kind not in ("folder", "hf"):
        paths = [path]
    else:
        paths = []
        for folder, folders, names in os.walk(path, onerror=_raise):
            folders[:] = [name for name in folders if not name.startswith(".")]
            paths += [Path(folder, name) for name in names if not name.startswith(".")]
    files: list[_File] = []
    skipped: Counter[str] = Counter()
    for found in paths:
        kind = _parse_filename(found.name)[1]
        if not kind and corpus.kind == "folder":
            skipped[found.suffix or "(none)"] += 1
            continue
        if not stat.S_ISREG(_stat(found).st_mode):
            raise CorpusError(f"{_shown(found)} is not a regular file; write its contents to a file first")
        if not os.access(found, os.R_OK):
            raise CorpusError(f"{_shown(found)} cannot be read (permission denied); change its permissions")
        relative = found.name if found == path else found.relative_to(path).as_posix()
        files.append(_File(found, _shown(found), _shown(relative), kind))
    if not files:
        raise CorpusError(f"{corpus.location} holds no file that can be read; add files of {' '.join(_KINDS)}")
    return sorted(files, key=lambda file: file.relative), skipped


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:
        return False


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except FileNotFoundError:
        raise CorpusError(f"{_shown(path)} does not exist; check the path") from None
    except (OSError, ValueError) as error:
        _raise(error, path)


def _raise(error: OSError | ValueError, path: Path | str = "") -> NoReturn:
    reason = (error.strerror if isinstance(error, OSError) else None) or error
    shown = _shown(path or getattr(error, "filename", ""))
    raise CorpusError(f"{shown} cannot be read ({reason}); check the path, its permissions and the disk") from error


def _shown(path: Path | str) -> str:
    """The path as text that can be printed: bytes of a name that are not UTF-8 are written out."""
    return str(path).encode(errors="backslashreplace").decode()


# Documents


class _RecordError(Exception):
    """Why a record cannot become a document; never leaves this module."""


class _Record(NamedTuple):
    file: str
    line: int
    fallback_id: str
    fields: dict[str, Any] | str  # text: why there are none


def _documents(corpora: list[_Corpus], options: ReadOptions) -> Iterator[Document | Reject]:
    # Hashes, not keys, which may be long. The chance that two of ten million keys share a hash is 3e-6.
    seen: set[int] = set()
    for corpus in corpora:
        num_before, num_rejects = len(seen), 0
        for record in _records(corpus, options):
            try:
                document = _document(record, corpus, options)
                digest = int.from_bytes(hashlib.blake2b(document.key.encode(), digest_size=8).digest(), "big")
                if digest in seen:
                    raise _RecordError(
                        f"the key {document.key!r} was used by a document before; ids must differ within a corpus"
                    )
            except _RecordError as unusable:
                if options.on_error == "stop":
                    raise CorpusError(
                        f"{_place(record)}: {unusable}. Correct it, or use --on-error skip to leave such records out"
                    ) from None
                num_rejects += 1
                yield Reject(file=record.file, line=record.line, reason=str(unusable))
                continue
            seen.add(digest)
            yield document
            if len(seen) == options.limit:
                return
        if len(seen) == num_before:
            raise CorpusError(
                f"{corpus.location} holds no documents ({num_rejects} records were rejected); check that it is the "
                "right corpus, and the names of its fields (--text-field)"
            )


def _place(record: _Record) -> str:
    return f"{record.file}:{record.line}" if record.line else record.file


def _document(record: _Record, corpus: _Corpus, options: ReadOptions) -> Document:
    fields = record.fields
    if isinstance(fields, str):
        raise _RecordError(fields)
    text = _text(fields, options)
    key = f"{corpus.name}:{_scalar(fields, options.id_field, str | int) or record.fallback_id}"
    title, url = _scalar(fields, options.title_field), _scalar(fields, "url")
    group = _scalar(fields, "group") or key
    split = _SPLITS.get(_scalar(fields, "split"))
    if split is None:
        raise _RecordError(f"the split {fields['split']!r} is not known; use train, valid (validation, dev) or test")
    if any("\0" in value for value in (key, text, title, url, group)):
        raise _RecordError(_NUL)
    read = {options.text_field, options.id_field, options.title_field, "url", "group", "split"}
    try:
        metadata = _canonical_json({name: value for name, value in fields.items() if name not in read})
        content = _canonical_json([text, title, url, group, split, metadata]).encode()
        key.encode()
    except UnicodeEncodeError:
        raise _RecordError(
            "it holds half a surrogate pair (an escape such as \\ud83d alone), which is not a character; remove it"
        ) from None
    except RecursionError:
        raise _RecordError("its fields are nested too deeply; flatten them") from None
    return Document(
        key=key,
        text=text,
        title=title,
        url=url,
        group=group,
        split=split,
        metadata=metadata,
        content_hash=hashlib.blake2b(content, digest_size=16).hexdigest(),
        source=_place(record),
    )


def _text(fields: dict[str, Any], options: ReadOptions) -> str:
    name = options.text_field
    if name not in fields:
        there = ", ".join(map(repr, list(fields)[:20])) or "none"
        raise _RecordError(f"it has no field {name!r} (its fields: {there}); name the right one with --text-field")
    text = fields[name]
    if not isinstance(text, str):
        raise _RecordError(f"the field {name!r} is {_json_type(text)}; it must be a string")
    if len(text) > options.max_document_chars:
        raise _RecordError(
            f"the text has {len(text)} characters, more than the limit of {options.max_document_chars}; split it into "
            "documents or raise --max-document-chars"
        )
    if not text.strip():
        raise _RecordError("the text is empty; a document needs words")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _scalar(fields: dict[str, Any], name: str, types: Any = str | int | float) -> str:
    value = fields.get(name)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, types):
        raise _RecordError(f"the field {name!r} is {_json_type(value)}; it must be a string, a number or null")
    return str(value)


def _json_type(value: object) -> str:
    names: dict[type, str] = {type(None): "null", bool: "a boolean", list: "an array", dict: "an object"}
    names |= {int: "a number", float: "a number", str: "a string"}
    return names.get(type(value), f"of the type {type(value).__name__}")


def _canonical_json(value: object) -> str:
    """Dates, decimals and bytes, which Parquet has and JSON has not, become strings, as do NaN and infinity."""
    dump = functools.partial(json.dumps, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    try:
        return dump(value, allow_nan=False)
    except ValueError:
        return dump(_without_nan(value))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


# Records


def _records(corpus: _Corpus, options: ReadOptions) -> Iterator[_Record]:
    if corpus.dataset is not None:
        for row, values in enumerate(_dataset_rows(corpus.location, corpus.dataset, corpus.path), start=1):
            yield _Record(corpus.location, row, str(row), values)
        return
    files, skipped = _files(corpus)
    if skipped:
        suffixes = ", ".join(
            f"{suffix} {count}" for suffix, count in sorted(skipped.items(), key=lambda item: (-item[1], item[0]))
        )
        _LOG.info("%s: %d files with other suffixes skipped: %s", corpus.location, skipped.total(), suffixes)
    for file in files:
        prefix = f"{file.relative}:" if corpus.kind == "folder" else ""
        for line, fields in _file_records(file, options):
            yield _Record(file.shown, line, f"{prefix}{line}" if line else file.relative, fields)


def _file_records(file: _File, options: ReadOptions) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Line and fields, or what is wrong, of every record of a file."""
    if file.kind == "parquet":
        yield from enumerate(_parquet_rows(file), start=1)
        return
    with _reading(file), _open(file.path) as stream:
        if file.kind in ("text", "markdown", "html"):
            yield 0, _one_document(file, stream, options)
            return
        lines = _Lines(stream, options._max_bytes)
        if file.kind == "jsonl":
            rows: Iterator[dict[str, Any] | None] = map(_json_row, lines)
        else:
            rows = _csv_rows(file, lines, options._max_bytes)
        while True:
            line = lines.number + 1
            try:
                row = next(rows)
            except StopIteration:
                return
            except (_RecordError, csv.Error) as error:
                advice = "; put fields with quotes into quotes, doubled inside" if isinstance(error, csv.Error) else ""
                yield line, f"{error}{advice}"
            else:
                if row is not None:
                    yield line, row


class _Lines:
    """Lines of a binary stream. One of more than `max_bytes` is passed over in pieces: an error, but not the end."""

    def __init__(self, stream: BinaryIO, max_bytes: int) -> None:
        self.number = 0
        self._stream = stream
        self._max_bytes = max_bytes

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> bytes:
        line = self._stream.readline(self._max_bytes + 1)
        if not line:
            raise StopIteration
        self.number += 1
        if len(line) > self._max_bytes:
            while line and not line.endswith(b"\n"):
                line = self._stream.readline(2**16)
            raise _RecordError(
                f"the line has more than {self._max_bytes} bytes; split it into documents or raise --max-document-chars"
            )
        return line.removeprefix(_BOM) if self.number == 1 else line


def _utf8(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _RecordError(
            f"it is not valid UTF-8 (byte 0x{data[error.start]:02x} at position {error.start}); save the file as UTF-8"
        ) from None


def _json_row(line: bytes) -> dict[str, Any] | None:
    if not line.strip():
        return None
    try:
        row = json.loads(_utf8(line))
    except json.JSONDecodeError as error:
        reason = f"{error.msg}, character {error.pos}"
        raise _RecordError(f"it is not valid JSON ({reason}); each line must be one JSON object") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets in thousands of brackets
        raise _RecordError(f"it is JSON that cannot be read ({error}); simplify the record") from None
    if not isinstance(row, dict):
        raise _RecordError(f"it is {_json_type(row)}; each line must be one JSON object")
    return row


def _csv_rows(file: _File, lines: _Lines, max_bytes: int) -> Iterator[dict[str, Any] | None]:
    csv.field_size_limit(max(csv.field_size_limit(), min(max_bytes, 2**31 - 1)))
    # Bytes that are not UTF-8 go through the parser as surrogates, so that one bad record does not cost the rest.
    text = map(operator.methodcaller("decode", errors="surrogateescape"), lines)
    # strict: without it, a quote that is never closed takes the rest of the file into one field.
    reader = csv.reader(text, delimiter="\t" if file.kind == "tsv" else ",", strict=True)
    try:
        header = next(filter(None, reader), [])
        _check_utf8(header)
    except (_RecordError, csv.Error) as error:
        raise CorpusError(f"{file.shown}:{lines.number}: the names of the columns: {error}; correct them") from error
    if twice := [name for name, count in Counter(header).items() if count > 1]:
        raise CorpusError(f"{file.shown}:{lines.number}: columns of the same name, {twice}; rename them")
    return map(functools.partial(_csv_row, header), reader)


def _csv_row(header: list[str], row: list[str]) -> dict[str, Any] | None:
    if not row:
        return None
    if len(row) > len(header):
        raise _RecordError(f"it has {len(row)} fields, the first row has {len(header)}; put its text into quotes")
    _check_utf8(row)
    return dict(zip(header, row, strict=False))


def _check_utf8(fields: list[str]) -> None:
    try:
        "".join(fields).encode()
    except UnicodeEncodeError:
        raise _RecordError("it is not valid UTF-8; save the file as UTF-8") from None


def _parquet_rows(file: _File) -> Iterator[dict[str, Any] | str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file.path) as table:
            for batch in table.iter_batches(batch_size=128):
                try:
                    rows = batch.to_pylist()
                except ValueError:  # text that is not UTF-8, say; row by row, only those with such a value are lost
                    rows = [_parquet_row(batch, index) for index in range(batch.num_rows)]
                yield from rows
    except (pa.ArrowException, OSError) as error:
        raise _damaged(file, error) from error


def _parquet_row(batch: Any, index: int) -> dict[str, Any] | str:
    try:
        return cast("dict[str, Any]", batch.slice(index, 1).to_pylist()[0])
    except ValueError as error:
        return f"a value cannot be read ({error}); correct it"


def _dataset_rows(location: str, dataset: _Dataset, folder: Path | None) -> Iterator[dict[str, Any]]:
    import datasets
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    datasets.disable_progress_bars()
    try:
        yield from datasets.load_dataset(
            dataset.dataset if folder is None else str(folder.absolute()),
            dataset.config,
            revision=dataset.revision,
            split=dataset.split,
            streaming=True,
        )
    except Exception as error:  # the library raises nearly everything
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise CorpusError(
            f"{location} cannot be read ({reason}); check the name, the configuration, the split and the connection"
        ) from error


# Files


@contextmanager
def _reading(file: _File) -> Iterator[None]:
    try:
        yield
    except EOFError as error:
        raise _damaged(file, error) from error
    except OSError as error:
        _raise(error, file.path)


def _damaged(file: _File, error: Exception) -> CorpusError:
    return CorpusError(f"{file.shown} is truncated or damaged ({_first_line(error)}); copy or download it again")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _open(path: Path) -> BinaryIO:
    suffix = path.suffix.lower()
    if suffix not in _COMPRESSIONS:
        return path.open("rb")
    new_frame: Callable[[], Any] = lzma.LZMADecompressor
    error: type[Exception] = lzma.LZMAError
    if suffix == ".gz":
        new_frame, error = functools.partial(zlib.decompressobj, wbits=31), zlib.error
    elif suffix == ".zst":
        import zstandard

        # Archives written with --long=31 need the largest window; others take no more memory for it.
        new_frame = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj
        error = zstandard.ZstdError
    return io.BufferedReader(_Decompressed(path, new_frame, error), 2**17)


class _Decompressed(io.RawIOBase):
    """Bytes of a compressed file, which may hold several frames; EOFError where it is truncated or damaged.

    The readers of the packages do not always say so: `zstandard`'s takes a truncated file for a short one, and `lzma`'s
    ignores a second frame that does not begin well.
    """

    def __init__(self, path: Path, new_frame: Callable[[], Any], error: type[Exception]) -> None:
        self._new_frame = new_frame
        self._error = error
        self._frame = new_frame()
        self._file = path.open("rb")
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        while not self._output:
            # Small pieces, to bound the output: four bytes of Zstandard can stand for 128 KiB.
            data = self._input or self._file.read(2**10)
            if self._frame.eof:
                data = data.lstrip(b"\0")  # gzip and xz may be padded
                if data:
                    self._frame = self._new_frame()
                elif not self._file.peek(1):
                    return 0
            elif not data:
                raise EOFError("it ends too early")
            try:
                self._output = memoryview(self._frame.decompress(data)) if data else self._output
            except self._error as error:
                raise EOFError(str(error)) from error
            self._input = self._frame.unused_data
        with memoryview(buffer).cast("B") as target:
            count = min(len(target), len(self._output))
            target[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


# Files that are one document


def _one_document(file: _File, stream: BinaryIO, options: ReadOptions) -> dict[str, Any] | str:
    try:
        data = stream.read(options._max_bytes + 1)
        if len(data) > options._max_bytes:
            return f"it has more than {options._max_bytes} bytes; split it or raise --max-document-chars"
        data = data.removeprefix(_BOM)
        if b"\0" in data:
            return _NUL
        if file.kind == "html":
            text, title = _html(data)
        else:
            text, title = _utf8(data), _parse_filename(PurePath(file.relative).name)[0]
            if file.kind == "markdown":
                text, title = _markdown(text.replace("\r\n", "\n").replace("\r", "\n"))
    except _RecordError as unusable:
        return str(unusable)
    return {options.text_field: text, options.title_field: title}


def _markdown(text: str) -> tuple[str, str]:
    """Text without YAML front matter, and the title: that of the front matter, else the first heading of level one."""
    title = ""
    if front := _FRONT_MATTER.match(text):
        text = text[front.end() :]
        if found := _FRONT_TITLE.search(front[1]):
            title = found[1].strip().strip("\"'")
    fence = ""
    for line in [] if title else text.split("\n"):
        mark = line.strip()[:3]
        if mark in ("```", "~~~") and fence in ("", mark):
            fence = "" if fence else mark
        elif not fence and (heading := _HEADING.fullmatch(line)):
            title = heading[1]
            break
    return text, title


def _html(data: bytes) -> tuple[str, str]:
    """Text, a line for each paragraph, and title."""
    import bs4
    from bs4.dammit import EncodingDetector

    try:
        html = _utf8(data)
    except _RecordError:
        encoding = EncodingDetector.find_declared_encoding(data, is_html=True)
        try:
            html = data.decode(encoding or "utf-8")
        except (LookupError, UnicodeDecodeError):
            raise _RecordError(f"it is neither UTF-8 nor {encoding}, which it declares; save it as UTF-8") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about XHTML and about text that looks like a path
            soup = bs4.BeautifulSoup(html, "html.parser")
    except (bs4.ParserRejectedMarkup, RecursionError) as error:
        raise _RecordError(f"its HTML cannot be read ({_first_line(error)}); correct or convert it") from None
    titles = [tag for tag in soup.find_all("title") if not tag.find_parent("svg")] or soup.find_all("h1")
    title = " ".join(titles[0].get_text().split()) if titles else ""
    for tag in soup.find_all(list(_DROPPED)):
        tag.decompose()
    # NUL, which the file has none of, marks the ends of paragraphs until white space has been collapsed between them.
    for tag in soup.find_all("pre"):
        tag.replace_with(f"\0\1{tag.get_text()}\0")
    for tag in soup.find_all(lambda tag: _BLOCK.fullmatch(tag.name) is not None):
        tag.insert_before("\0")
        tag.insert_after("\0")
    for tag in soup.find_all(["td", "th"]):
        tag.insert_after(" ")
    pieces = soup.get_text().split("\0")
    lines = [piece[1:].strip("\n") if piece.startswith("\1") else " ".join(piece.split()) for piece in pieces]
    return "\n".join(line for line in lines if line.strip()), title
