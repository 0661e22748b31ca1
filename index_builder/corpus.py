"""Documents from files, folders and Hugging Face datasets, streamed: memory is bounded by the longest document allowed.

A corpus is written as one of

    PATH                                 a file or a folder
    hf:NAME[@REVISION][/CONFIG]:SPLIT    a Hugging Face dataset: hf:name:train, hf:org/name:train, hf:org/name@rev:train,
                                         hf:org/name@rev/config:train. Without a revision one slash means org/name and
                                         two mean org/name/config. A revision has no slash.
    hf:FOLDER:SPLIT                      a dataset on disk. FOLDER is . or .. or starts with ./ ../ / and ends at the last colon.

each with an optional `CORPUS=` in front, which names it; a path that exists and holds a `=` is a path. Keys of documents
are `corpus:id`. The name of a file is its stem without the suffixes of formats, that of a folder or dataset its last part.

`index_builder.formats` says which files are read. Folders are read in the order of their posix paths; hidden entries are
left out and links to folders are not followed.
"""

import functools
import hashlib
import json
import logging
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from index_builder.duplicates import Deduplicator, KeySet
from index_builder.formats import (
    COMPRESSIONS,
    KINDS,
    NUL,
    File,
    RecordError,
    dataset_rows,
    json_type,
    parse_filename,
    printable,
    raise_unreadable,
    records,
)
from retro.artifact import sha256
from retro.chunks import Document, name_hash
from retro.errors import ConfigError, CorpusError

_LOG = logging.getLogger(__name__)

_SPLITS = {"": "", "train": "train", "valid": "valid", "validation": "valid", "dev": "valid", "test": "test"}
_HUB = re.compile(r"hf:([\w.-]+(?:/[\w.-]+)?)(?:@([\w.-]+))?(?:/([^/@]+))?:([\w.-]+)")
_LOCAL = re.compile(r"\.{0,2}(/|$)")  # the name of a dataset on disk
_HASH_UP_TO = 64 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Reject:
    """A record that was left out."""

    file: str
    line: int
    """1-based, a row for Parquet and datasets; 0 where the file is one document."""
    reason: str
    duplicate: bool = False
    """Whether it was left out because an earlier document says the same."""


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
    deduplicate: Literal["none", "exact", "near"] = "none"
    """Which documents are left out and yielded as a `Reject`: those whose text is that of an earlier one, or shares 80% of its
    13-grams of words with it."""
    vectors_field: str | None = None
    """Field with a vector that was made elsewhere, for records that are one chunk each."""

    def __post_init__(self) -> None:
        names: tuple[str, ...] = (self.text_field, self.id_field, self.title_field, "url", "group", "split")
        if self.vectors_field is not None:
            names = (*names, self.vectors_field)
        if "" in names or len(set(names)) < len(names):
            raise ConfigError(
                f"text, id and title come from the fields {', '.join(map(repr, names[:3]))}; they need three different "
                "names, none of them empty, 'url', 'group' or 'split'"
            )
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit is {self.limit}; give at least 1, or leave it out to read everything")
        if self.on_error not in ("stop", "skip"):
            raise ConfigError(f"on_error is {self.on_error!r}; use 'stop' or 'skip'")
        if self.deduplicate not in ("none", "exact", "near"):
            raise ConfigError(f"deduplicate is {self.deduplicate!r}; use 'none', 'exact' or 'near'")
        if self.max_document_chars < 1:
            raise ConfigError(f"max_document_chars is {self.max_document_chars}; give at least 1")

    @property
    def _max_bytes(self) -> int:
        """Longest line or one-document file that is held in memory: a \\uXXXX per character, and 1 MiB around it."""
        return 6 * self.max_document_chars + 2**20


def read_documents(corpora: Sequence[str], options: ReadOptions) -> Iterator[Document | Reject]:
    """Streams the documents of all corpora, in order; the module's docstring says how a corpus is written.

    Names and paths are checked at once, everything else as the stream is read.

    Args:
        corpora: Paths and datasets, e.g. `["wiki.jsonl.zst", "manual=docs/", "hf:org/name:train"]`.
        options: Field names and limits.

    Returns:
        Documents, and the records left out: duplicates and, with `on_error="skip"`, those that cannot be used.

    Raises:
        CorpusError: A corpus is missing, cannot be read, is damaged or holds no document; or, with `on_error="stop"`,
            a record cannot be used.
    """
    return _documents(_resolve(corpora), options)


def describe_corpora(corpora: Sequence[str]) -> list[dict[str, Any]]:
    """Says what the corpora are, so that a later call can tell whether one has changed.

    Moving or touching files is no change; only of files over 64 MiB, which are not read for this, the time counts.

    Returns:
        JSON values, one object a corpus: `name`; `kind`, a format, "folder" or "hf"; `files`, the `path` (relative to the
        corpus), `bytes` and `sha256` or, over 64 MiB, `mtime_ns` of each, none for a dataset of the hub; for any dataset
        `dataset` (null on disk), `revision`, `config` and `split`.

    Raises:
        CorpusError: A corpus is missing, cannot be read or has no file of a known format, or two share a name.
    """
    described: list[dict[str, Any]] = []
    for corpus in _resolve(corpora):
        files = [_describe(file) for file in _files(corpus)[0]]
        parts = {} if corpus.dataset is None else corpus.dataset._asdict()
        if corpus.dataset and corpus.path:
            parts["dataset"] = None
        described.append({"name": corpus.name, "kind": corpus.kind, "files": files, **parts})
    return described


def _describe(file: File) -> dict[str, str | int]:
    info = _stat(file.path)
    described: dict[str, str | int] = {"path": file.relative, "bytes": info.st_size}
    if info.st_size > _HASH_UP_TO:
        return described | {"mtime_ns": info.st_mtime_ns}
    try:
        return described | {"sha256": sha256(file.path)}
    except OSError as error:
        raise_unreadable(error, file.path)


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
        folder = Path(dataset.dataset) if _LOCAL.match(dataset.dataset) else None
        if folder and not stat.S_ISDIR(_stat(folder).st_mode):
            raise CorpusError(f"{folder} is not a folder; write hf:FOLDER:SPLIT, or its path alone to read one file")
        name = name or (folder.resolve().name if folder else dataset.dataset.rpartition("/")[2])
        return _Corpus(name, location, "hf", folder, dataset)
    path = Path(location)
    if stat.S_ISDIR(_stat(path).st_mode):
        return _Corpus(name or path.resolve().name, location, "folder", path, None)
    stem, kind = parse_filename(path.name)
    if not kind:
        raise CorpusError(
            f"{printable(path)} has a suffix that is not known; convert it to one of {' '.join(KINDS)}, all but .parquet "
            f"with {' '.join(COMPRESSIONS)} as well"
        )
    return _Corpus(name or stem, location, kind, path, None)


def _parse_dataset(location: str) -> _Dataset:
    name, _, split = location.removeprefix("hf:").rpartition(":")
    if name and split and _LOCAL.match(name):
        return _Dataset(name, None, None, split)
    match = _HUB.fullmatch(location)
    if match is None:
        raise CorpusError(
            f"{location} is not a dataset; write hf:NAME[@REVISION][/CONFIG]:SPLIT or hf:./FOLDER:SPLIT, and use "
            "--limit instead of a slice of a split"
        )
    return _Dataset(*match.groups())


def _files(corpus: _Corpus) -> tuple[list[File], Counter[str]]:
    """Files of a local corpus in order, and how many of which other suffixes were skipped."""
    path = corpus.path
    if path is None:  # the hub has them
        return [], Counter()
    paths = [path]
    if corpus.kind in ("folder", "hf"):
        paths = []
        for folder, folders, names in os.walk(path, onerror=raise_unreadable):
            folders[:] = [name for name in folders if not name.startswith(".")]
            paths += [Path(folder, name) for name in names if not name.startswith(".")]
    files: list[File] = []
    skipped: Counter[str] = Counter()
    for found in paths:
        kind = parse_filename(found.name)[1]
        if not kind and corpus.kind == "folder":
            skipped[found.suffix or "(none)"] += 1
            continue
        if not stat.S_ISREG(_stat(found).st_mode):
            raise CorpusError(f"{printable(found)} is not a regular file; write its contents to a file first")
        if not os.access(found, os.R_OK):
            raise CorpusError(f"{printable(found)} cannot be read (permission denied); change its permissions")
        relative = found.name if found == path else found.relative_to(path).as_posix()
        files.append(File(found, printable(found), printable(relative), kind))
    if not files:
        raise CorpusError(f"{corpus.location} holds no file that can be read; add files of {' '.join(KINDS)}")
    return sorted(files, key=lambda file: file.relative), skipped


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:
        return False


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except (OSError, ValueError) as error:
        raise_unreadable(error, path)


# Documents


class _Record(NamedTuple):
    file: str
    line: int
    fallback_id: str
    fields: dict[str, Any] | str  # text: why there are none

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


def _records(corpus: _Corpus, options: ReadOptions) -> Iterator[_Record]:
    if corpus.dataset is not None:
        name, revision, config, split = corpus.dataset
        path = name if corpus.path is None else str(corpus.path.absolute())
        for row, values in dataset_rows(path, config=config, revision=revision, split=split, shown=corpus.location):
            yield _Record(corpus.location, row, str(row), values)
        return
    files, skipped = _files(corpus)
    if skipped:
        ordered = sorted(skipped.items(), key=lambda item: (-item[1], item[0]))
        suffixes = ", ".join(f"{suffix} {count}" for suffix, count in ordered)
        _LOG.info("%s: %d files with other suffixes skipped: %s", corpus.location, skipped.total(), suffixes)
    names = {"text_field": options.text_field, "title_field": options.title_field}
    for file in files:
        prefix = f"{file.relative}:" if corpus.kind == "folder" else ""
        for line, fields in records(file, max_bytes=options._max_bytes, **names):
            yield _Record(file.shown, line, f"{prefix}{line}" if line else file.relative, fields)


def _documents(corpora: list[_Corpus], options: ReadOptions) -> Iterator[Document | Reject]:
    # Hashes, not keys, which may be long. The chance that two of ten million keys share a hash is 3e-6.
    seen, kept = KeySet(), 0
    earlier = None if options.deduplicate == "none" else Deduplicator(options.deduplicate).earlier
    for corpus in corpora:
        num_before, num_rejects, num_duplicates = kept, 0, 0
        for record in _records(corpus, options):
            try:
                document = _document(record, corpus, options)
                if not seen.add(name_hash(document.key)):
                    raise RecordError(
                        f"the key {document.key!r} was used by a document before; ids must differ within a corpus"
                    )
            except RecordError as unusable:
                if options.on_error == "stop":
                    raise CorpusError(
                        f"{record.place}: {unusable}. Correct it, or use --on-error skip to leave such records out"
                    ) from None
                num_rejects += 1
                yield Reject(file=record.file, line=record.line, reason=str(unusable))
                continue
            if earlier is not None and (number := earlier(document.text)) is not None:
                same = "the same text as" if options.deduplicate == "exact" else "nearly the text of"
                reason = f"{document.key} has {same} document {number} (counted from 0 over those kept)"
                num_duplicates += 1
                yield Reject(file=record.file, line=record.line, reason=reason, duplicate=True)
                continue
            kept += 1
            yield document
            if kept == options.limit:
                return
        if kept == num_before and not num_duplicates:
            raise CorpusError(
                f"{corpus.location} holds no documents ({num_rejects} records were rejected); check that it is the "
                "right corpus, and the names of its fields (--text-field)"
            )


def _document(record: _Record, corpus: _Corpus, options: ReadOptions) -> Document:
    fields = record.fields
    if isinstance(fields, str):
        raise RecordError(fields)
    text = _text(fields, options)
    key = f"{corpus.name}:{_scalar(fields, options.id_field, number=int) or record.fallback_id}"
    title, url = _scalar(fields, options.title_field), _scalar(fields, "url")
    group = _scalar(fields, "group") or key
    split = _SPLITS.get(_scalar(fields, "split"))
    if split is None:
        raise RecordError(f"the split {fields['split']!r} is not known; use train, valid (validation, dev) or test")
    if any("\0" in value for value in (key, text, title, url, group)):
        raise RecordError(NUL)
    read = {options.text_field, options.id_field, options.title_field, "url", "group", "split", options.vectors_field}
    try:
        metadata = _canonical_json({name: value for name, value in fields.items() if name not in read})
        content = _canonical_json([text, title, url, group, split, metadata]).encode()
        key.encode()
    except UnicodeEncodeError:
        raise RecordError(
            "it holds half a surrogate pair (an escape such as \\ud83d alone), which is not a character; remove it"
        ) from None
    except RecursionError:
        raise RecordError("its fields are nested too deeply; flatten them") from None
    return Document(
        key=key,
        text=text,
        title=title,
        url=url,
        group=group,
        split=split,
        metadata=metadata,
        content_hash=hashlib.blake2b(content, digest_size=16).hexdigest(),
        source=record.place,
        vector=None if options.vectors_field is None else _vector(fields, options.vectors_field),
    )


def _vector(fields: dict[str, Any], name: str) -> NDArray[np.float32]:
    try:
        vector = np.array(fields.get(name), np.float32)
    except (TypeError, ValueError):
        vector = np.empty(0, np.float32)
    if vector.ndim != 1 or not vector.size or not np.isfinite(vector).all():
        raise RecordError(f"the field {name!r} must be a list of finite numbers, the vector of the text")
    return vector


def _text(fields: dict[str, Any], options: ReadOptions) -> str:
    name = options.text_field
    if name not in fields:
        there = ", ".join(map(repr, list(fields)[:20])) or "none"
        raise RecordError(f"it has no field {name!r} (its fields: {there}); name the right one with --text-field")
    text = fields[name]
    if not isinstance(text, str):
        raise RecordError(f"the field {name!r} is {json_type(text)}; it must be a string")
    if len(text) > options.max_document_chars:
        raise RecordError(
            f"the text has {len(text)} characters, more than the limit of {options.max_document_chars}; split it into "
            "documents or raise --max-document-chars"
        )
    if not text.strip():
        raise RecordError("the text is empty; a document needs words")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _scalar(fields: dict[str, Any], name: str, *, number: type = float) -> str:
    value = fields.get(name)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int, number)):
        wanted = "a number" if number is float else "an integer"
        raise RecordError(f"the field {name!r} is {json_type(value)}; it must be a string, {wanted} or null")
    return str(value)


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
