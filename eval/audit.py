"""Which documents of evaluation files an index holds: word for word, nearly so, or reworded.

Letters: D evaluation documents, I documents of the index, W words, G n-grams of words, U different ones, P pairs of documents.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.records import Figure, Record
from index_builder.corpus import ReadOptions, describe_corpora, read_documents
from index_builder.duplicates import THRESHOLD, NearDuplicates, signatures, words
from index_builder.shards import Progress
from retro.artifact import fingerprint, read_manifest
from retro.chunks import ChunkStore, Document, load_array

WORDS_IN_A_ROW = 13
"""Words in a row that an evaluation document and the index must not share. Source: arXiv:2005.14165, appendix C."""
REWORDED_GRAM = 5
"""Words of the n-grams by which a copy with some words changed is known: no 13 in a row are left where every tenth is another."""
REWORDED_SHARE = 0.25
"""Share of an evaluation document's 5-grams from which on one document of the index is a reworded copy: every seventh word may be
another. Of 300 articles of Simple English Wikipedia with every tenth word changed this finds 239; those missed were short (mostly
22 words or fewer). Of 2,067 paragraphs of SQuAD it flags 12 in 60,000 of those articles, of 1,921 validation articles 125 in the
others: texts of one mold ("12 is a year ...") overlap without having been copied. Chosen on the same articles, so no held-out
estimate."""
REWORDED_LEAST = 10
"""5-grams that are in both at least: in short texts a phrase is a quarter."""
_COMMON = 64
"""Evaluation documents that share a 5-gram from which on it says nothing about one of them: a template's."""
_LISTED = 100
"""Documents that a record lists; its units have all."""
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def audit_index(
    index: Path, files: Sequence[str], options: ReadOptions | None = None, *, progress: Progress | None = None
) -> tuple[Record, dict[str, list[Any]]]:
    """Looks for the documents of evaluation files in an index, in one pass over it. A document is found there where a document of
    the index

    - shares 13 words in a row with it,
    - or is a near-duplicate: 80% of their 13-grams are the same, as estimated by MinHash,
    - or is a reworded copy: it has a quarter of its 5-grams.

    Of each kind the most similar document is named (of the first kind, one of them). Shorter texts than 13 words can only be
    near-duplicates: the same words. The evaluation files must fit into memory, the index need not.

    Args:
        index: Its folder.
        files: As corpora of `retro index build`; a record for each document, question or passage.
        options: How they are read.
        progress: Told how far it is.

    Returns:
        A record with a table of the files and a list of what was found, and its units, a row for each evaluation document.

    Raises:
        CorpusError: A file cannot be read, or is empty.
        FormatError: The index is missing or damaged.
    """
    began = time.monotonic()
    options = options or ReadOptions()
    manifest = read_manifest(index, "index")
    dead_rows = None if manifest["removed"] is None else load_array(index / manifest["removed"])
    store = ChunkStore(index, manifest["shards"], dead_rows)
    documents = [item for item in read_documents(files, options) if isinstance(item, Document)]
    search = _Search([document.text for document in documents])
    for shard, table in enumerate(store.tables):
        first = int(store.first_document[shard])
        alive = np.setdiff1d(np.arange(first, first + len(table)), store.dead_documents)
        search.look_at(table["text"].take(alive - first).to_pylist(), alive)
        if progress is not None:
            progress("documents of the index", first + len(table), store.num_documents)
    units = search.found(lambda number: store.field("key", number))
    units = {"id": [document.key for document in documents], **units}
    record = _record(index, files, units)
    configuration = record.configuration | {"read": asdict(options)}
    fingerprints = {
        "index": fingerprint({name: entry["sha256"] for name, entry in manifest["files"].items()}),
        "evaluation": fingerprint(describe_corpora(files)),
    }
    seconds = round(time.monotonic() - began, 3)
    return replace(record, configuration=configuration, fingerprints=fingerprints, seconds=seconds), units


def _record(index: Path, files: Sequence[str], units: dict[str, list[Any]]) -> Record:
    rows = _file_rows(units)
    listed = sorted(zip(*units.values(), strict=True), key=lambda row: (-max(_shares(row)), row[0]))
    return Record(
        kind="leakage",
        name=index.name,
        figures={
            f"{row['file']}: {name.replace('_', ' ')}": Figure(
                value=100 * row[name] / row["documents"], unit="%", count=row["documents"]
            )
            for row in rows
            for name in ("share_13_words", "near_duplicates", "reworded", "found")
        },
        rows={
            "Evaluation files": rows,
            "Found in the index": [
                dict(zip(units, row, strict=True)) for row in listed[:_LISTED] if max(_shares(row)) > 0
            ],
        },
        configuration={
            "index": str(index),
            "files": list(files),
            "words_in_a_row": WORDS_IN_A_ROW,
            "near_duplicate": THRESHOLD,
            "reworded": {"words": REWORDED_GRAM, "share": REWORDED_SHARE, "least": REWORDED_LEAST},
        },
        notes=_NOTES,
    )


_NOTES = (
    "Found: 13 words in a row, a near-duplicate or a reworded copy; a document may be all three.",
    "In an evaluation text of 13 words or more, 13 in a row may also be a quotation, a title or a template's.",
    f"A list of at most {_LISTED} documents, the most similar ones first; the units beside the record have all.",
)


def _shares(row: tuple[Any, ...]) -> tuple[float, ...]:
    """Of the columns of `_Search.found`, with the id in front, only what counts as found."""
    _, share_13, _, similarity, _, share_5, _ = row
    return (share_13, similarity or 0.0, share_5 or 0.0)


def _file_rows(units: dict[str, list[Any]]) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for row in zip(*units.values(), strict=True):
        name = row[0].partition(":")[0]
        zeros = {"documents": 0, "share_13_words": 0, "near_duplicates": 0, "reworded": 0, "found": 0}
        counts = rows.setdefault(name, {"file": name, **zeros})
        shared, near, reworded = (share > 0 for share in _shares(row))
        counts["documents"] += 1
        counts["share_13_words"] += shared
        counts["near_duplicates"] += near
        counts["reworded"] += reworded
        counts["found"] += shared or near or reworded
    return list(rows.values())


class _Search:
    """What of some evaluation documents was found in the documents of an index that it has been shown."""

    def __init__(self, texts: Sequence[str]) -> None:
        D = len(texts)
        self._numbers: dict[str, int] = {}
        """Of all words of the evaluation documents, from 1; 0 is any other word, and the end of a document."""
        numbers = self._numbers
        words_D = [[numbers.setdefault(word, len(numbers) + 1) for word in words(text)] for text in texts]
        self._rows = _Grams(words_D, WORDS_IN_A_ROW)
        self._row_found_U = np.full(len(self._rows.grams_U), -1, np.int64)
        self._parts = _Grams(words_D, REWORDED_GRAM)
        self._shared_D, self._shared_with_D = np.zeros(D, np.int64), np.full(D, -1, np.int64)
        self._signatures_DP = signatures(texts)
        self._near = NearDuplicates(self._signatures_DP)
        self._similar_D, self._similar_to_D = np.zeros(D), np.full(D, -1, np.int64)

    def look_at(self, texts: list[str], numbers_I: NDArray[np.int64]) -> None:
        """Takes documents of the index, with their numbers."""
        known = self._numbers
        ids: list[int] = []
        ends = []
        for text in texts:
            ids += [known.get(word, 0) for word in words(text)]
            ids.append(0)
            ends.append(len(ids))
        ids_W = np.array(ids, np.uint64)
        number_W = np.repeat(numbers_I, np.diff([0, *ends]))
        at_G, place_G = self._rows.find(ids_W)
        self._row_found_U[at_G] = number_W[place_G]
        self._count_parts(ids_W, number_W)
        signatures_IP = signatures(texts)
        for number, signature_P, found in zip(
            numbers_I.tolist(), signatures_IP, self._near.matches(signatures_IP), strict=True
        ):
            for d in found.tolist():
                similarity = float((self._signatures_DP[d] == signature_P).mean())
                if similarity > self._similar_D[d]:
                    self._similar_D[d], self._similar_to_D[d] = similarity, number

    def _count_parts(self, ids_W: NDArray[np.uint64], number_W: NDArray[np.int64]) -> None:
        """Keeps for each evaluation document the one document that has most of its 5-grams."""
        at_G, place_G = self._parts.find(ids_W)
        rare_G = self._parts.owners_of_U[at_G] <= _COMMON
        pairs = np.unique(np.stack([number_W[place_G[rare_G]], at_G[rare_G]]), axis=1)
        number_P, at_P = pairs
        times_P = self._parts.owners_of_U[at_P]
        first_P = self._parts.first_U[at_P]
        step = np.arange(times_P.sum()) - np.repeat(np.cumsum(times_P) - times_P, times_P)
        owner = self._parts.owner_G[np.repeat(first_P, times_P) + step]
        both, counts = np.unique(np.stack([owner, np.repeat(number_P, times_P)]), axis=1, return_counts=True)
        best = np.lexsort((counts, both[0]))
        d, number, count = both[0][best], both[1][best], counts[best]
        more = count > self._shared_D[d]
        # Ascending, so that the largest count of a document is written last.
        self._shared_D[d[more]], self._shared_with_D[d[more]] = count[more], number[more]

    def found(self, key_of: Callable[[int], str]) -> dict[str, list[Any]]:
        """Columns with a value for each evaluation document: shares, and keys in the index; None where nothing was found."""

        def keys(numbers_D: NDArray[np.int64]) -> list[str | None]:
            return [None if number < 0 else key_of(number) for number in numbers_D.tolist()]

        rows_D, row_with_D = self._rows.per_document(self._row_found_U)
        rare_D = self._parts.rare_per_document()
        share_D = self._shared_D / np.maximum(rare_D, 1)
        reworded_D = (share_D >= REWORDED_SHARE) & (self._shared_D >= REWORDED_LEAST)
        near_D = self._similar_to_D >= 0
        return {
            "share_of_13_grams": rows_D.tolist(),
            "with_13_words": keys(row_with_D),
            "similarity": [s if near else None for s, near in zip(self._similar_D.tolist(), near_D, strict=True)],
            "near_duplicate": keys(self._similar_to_D),
            "share_of_5_grams": [s if r else None for s, r in zip(share_D.tolist(), reworded_D, strict=True)],
            "reworded": keys(np.where(reworded_D, self._shared_with_D, -1)),
        }


class _Grams:
    """The different n-grams of words of each evaluation document."""

    def __init__(self, words_D: Sequence[Sequence[int]], n: int) -> None:
        self._n, self._num_documents = n, len(words_D)
        grams = [np.unique(_gram_hashes(np.array(ids, np.uint64), n)[0]) for ids in words_D]
        owner_G = np.repeat(np.arange(len(grams)), [len(few) for few in grams])
        grams_G = np.concatenate([np.empty(0, np.uint64), *grams])
        order = np.argsort(grams_G, kind="stable")
        self.owner_G = owner_G[order]
        """Documents, in the order of their n-grams."""
        self.grams_U, self.first_U, self.owners_of_U = np.unique(grams_G[order], return_index=True, return_counts=True)
        """Hashes, where the owners of each begin, and how many these are."""

    def find(self, ids_W: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Which of them stand in a text, and where."""
        hashes_G, place_G = _gram_hashes(ids_W, self._n)
        if not len(self.grams_U):
            return np.empty(0, np.int64), np.empty(0, np.int64)
        at_G = np.minimum(np.searchsorted(self.grams_U, hashes_G), len(self.grams_U) - 1)
        same_G = self.grams_U[at_G] == hashes_G
        return at_G[same_G], place_G[same_G]

    def per_document(self, found_U: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """The share of each document's n-grams that were found (a number, or -1), and the number of one of them."""
        found_G = np.repeat(found_U, self.owners_of_U)
        D = self._num_documents
        hits_D = np.bincount(self.owner_G, weights=found_G >= 0, minlength=D)
        with_D = np.full(D, -1, np.int64)
        np.maximum.at(with_D, self.owner_G, found_G)
        share_D: NDArray[np.float64] = hits_D / np.maximum(np.bincount(self.owner_G, minlength=D), 1)
        return share_D, with_D

    def rare_per_document(self) -> NDArray[np.int64]:
        """How many of each document's n-grams are in few enough others."""
        rare_G = np.repeat(self.owners_of_U <= _COMMON, self.owners_of_U)
        return np.bincount(self.owner_G[rare_G], minlength=self._num_documents)


def _gram_hashes(ids_W: NDArray[np.uint64], n: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Hashes of the n-grams that hold no 0, and the place of the first word of each."""
    running_W = np.zeros(max(len(ids_W) - n + 1, 0), np.uint64)
    for offset in range(n):
        running_W = running_W * _FACTOR + ids_W[offset : offset + len(running_W)]
    zeros = np.concatenate([[0], np.cumsum(ids_W == 0)])
    place_G = np.flatnonzero(zeros[n:] == zeros[: len(zeros) - n]) if len(running_W) else np.empty(0, np.int64)
    return running_W[place_G], place_G
