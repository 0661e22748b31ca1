"""A corpus in shards: what building an index and building training data have in common when they read."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from index_builder.corpus import ReadOptions, Reject, read_documents
from retro.artifact import TEMPORARY, storage_error, sync_folder
from retro.chunks import Document

Made = TypeVar("Made")
Progress = Callable[[str, int, int | None], None]
"""Called with the stage, how much of it is done, and of how much (None where that is unknown)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard(Generic[Made]):
    """Some documents in a row, and what was made of each."""

    number: int
    documents: list[Document]
    made: list[Made]


class ShardReader(Generic[Made]):
    """Streams a corpus once, in shards that follow from the corpus alone.

    A shard ends after the document with which its texts reach `shard_chars` characters. So whoever reads the corpus, from whatever
    interruption on and for whichever of its shards, finds the same ones. Records that were left out are listed, as JSON lines of
    file, line and reason, in a file that is there once the corpus was read to its end; none, no file.

    Attributes:
        num_documents: Documents read so far, those of unwanted shards included; so are the other counts.
        num_rejects: Records that could not be used.
        num_duplicates: Documents that were left out because an earlier one says the same.
        num_shards: Shards, once the corpus was read.
    """

    def __init__(
        self,
        corpora: Sequence[str],
        options: ReadOptions,
        *,
        make: Callable[[Document], Made],
        shard_chars: int,
        rejects_file: Path | None,
        wanted: Callable[[int], bool],
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Does not read yet.

        Args:
            corpora: See `read_documents`.
            options: Likewise.
            make: Called for each document of a wanted shard.
            shard_chars: See above.
            rejects_file: See above; None writes none.
            wanted: Whether the shard of a number is to be made.
            progress: Called with the number of documents read, now and then.
        """
        self._corpora = corpora
        self._options = options
        self._make = make
        self._shard_chars = shard_chars
        self._rejects_file = rejects_file
        self._wanted = wanted
        self._progress = progress
        self.num_documents = self.num_rejects = self.num_duplicates = self.num_shards = 0

    def __iter__(self) -> Iterator[Shard[Made]]:
        documents: list[Document] = []
        made: list[Made] = []
        chars, wanted = 0, self._wanted(0)
        with _RejectsFile(self._rejects_file) as rejects:
            for item in read_documents(self._corpora, self._options):
                if isinstance(item, Reject):
                    rejects.add(item)
                    self.num_duplicates += item.duplicate
                    self.num_rejects += not item.duplicate
                    continue
                self.num_documents += 1
                chars += len(item.text)
                if wanted:
                    documents.append(item)
                    made.append(self._make(item))
                if self._progress is not None and self.num_documents % 256 == 0:
                    self._progress(self.num_documents)
                if chars >= self._shard_chars:
                    if wanted:
                        yield Shard(number=self.num_shards, documents=documents, made=made)
                    documents, made, chars = [], [], 0
                    self.num_shards += 1
                    wanted = self._wanted(self.num_shards)
            if documents:
                yield Shard(number=self.num_shards, documents=documents, made=made)
            self.num_shards += chars > 0
            if self._progress is not None:
                self._progress(self.num_documents)


class _RejectsFile:
    """JSON lines under a temporary name, renamed at the end of a whole reading."""

    def __init__(self, path: Path | None) -> None:
        self._path = path or Path(os.devnull)
        self._temporary = self._path.with_name(self._path.name + TEMPORARY)
        self._wanted = path is not None
        self._file: Any = None

    def __enter__(self) -> "_RejectsFile":
        return self

    def add(self, reject: Reject) -> None:
        if not self._wanted:
            return
        try:
            self._file = self._file or self._temporary.open("w", encoding="utf-8")
            self._file.write(json.dumps(asdict(reject), ensure_ascii=False) + "\n")
        except OSError as error:
            raise storage_error(self._path, error) from error

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self._file is None:
            return
        try:
            self._file.close()
            if kind is None:
                self._temporary.replace(self._path)
                sync_folder(self._path.parent)
        except OSError as error:
            raise storage_error(self._path, error) from error
