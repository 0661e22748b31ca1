"""A corpus in shards: what building an index and building training data have in common when they read."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from index_builder.corpus import ReadOptions, Reject, read_documents
from retro.artifact import storage_error, write_atomically
from retro.chunks import Document

Made = TypeVar("Made")
Progress = Callable[[str, int, int | None], None]
"""Called with the stage, how much of it is done, and of how much (None where that is unknown)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard(Generic[Made]):
    """Some documents in a row, and what was made of each."""

    documents: list[Document]
    made: list[Made]
    records: int
    """Corpus records read up to the end of this shard, rejected ones included."""
    rejects: int
    """Records rejected up to there."""


def read_shards(
    corpora: Sequence[str],
    options: ReadOptions,
    *,
    make: Callable[[Document], Made],
    size: Callable[[Made], int],
    shard_size: int,
    skip_records: int,
    rejects_file: Path,
    rejects_before: int,
) -> Iterator[Shard[Made]]:
    """Streams a corpus; a shard ends after the document with which its size reaches `shard_size`.

    The same corpus gives the same shards, wherever reading begins. Rejected records are appended to `rejects_file` before the
    shard that follows them is handed out.

    Args:
        corpora: See `read_documents`.
        options: Likewise.
        make: Called for each document.
        size: Of what was made.
        shard_size: See above.
        skip_records: Records that earlier shards hold.
        rejects_file: JSON lines of file, line and reason.
        rejects_before: How many of its lines belong to earlier shards; later ones are cut off.
    """
    _keep_lines(rejects_file, rejects_before)
    documents: list[Document] = []
    made: list[Made] = []
    rejects: list[Reject] = []
    total, records, num_rejects = 0, 0, rejects_before
    for item in read_documents(corpora, options):
        records += 1
        if records <= skip_records:
            continue
        if isinstance(item, Reject):
            rejects.append(item)
            num_rejects += 1
            continue
        documents.append(item)
        made.append(make(item))
        total += size(made[-1])
        if total >= shard_size:
            _append(rejects_file, rejects)
            yield Shard(documents=documents, made=made, records=records, rejects=num_rejects)
            documents, made, rejects, total = [], [], [], 0
    _append(rejects_file, rejects)
    if documents:
        yield Shard(documents=documents, made=made, records=records, rejects=num_rejects)


def count_rejects(path: Path) -> int:
    """Lines of a rejects file; 0 where there is none."""
    return len(path.read_bytes().splitlines()) if path.is_file() else 0


def _append(path: Path, rejects: list[Reject]) -> None:
    if not rejects:
        return
    try:
        with path.open("a", encoding="utf-8") as file:
            for reject in rejects:
                row: dict[str, Any] = asdict(reject)
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    except OSError as error:
        raise storage_error(path, error) from error


def _keep_lines(path: Path, count: int) -> None:
    if not path.is_file():
        return
    lines = path.read_bytes().splitlines(keepends=True)[:count]
    if lines:
        write_atomically(path, lambda file: file.writelines(lines))
    else:
        path.unlink()
