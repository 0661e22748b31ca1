"""The sentences of a corpus by the words they hold: what cloze questions are made of. In memory maps, but for the words' counts.

Letters: D documents, P passages, N sentences, I words of all sentences in order, W different words, B blanks, L postings.

A word is the 64-bit hash of `index_builder.sentences`; those that two sentences share have a number. The words of a document's
title belong to each of its sentences, which are read with the title in front. Shards are made by any number of processes and laid
one after the other; an interrupted reading goes on after the last finished shard.
"""

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from index_builder.sentences import GROUP, INITIAL, TITLE, passages_of, read_sentence, title_name, words_of
from retro.artifact import write_atomically
from retro.chunks import Int64s, load_array, save_array

RARE = 8000
"""Sentences that are listed for a word at most; commoner words find nothing, but count where sentences are compared."""
UNKNOWN = np.uint32(0xFFFFFFFF)
"""Number of all words that only one sentence has."""
POSTINGS_AT_ONCE = 1 << 22
"""Postings that are sorted in one go."""
SENTENCES_AT_ONCE = 1 << 18
LEANS = 1
"""Flag of a sentence that begins with a pronoun."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SentenceArrays:
    """A corpus in flat arrays, as files of their names."""

    text: NDArray[np.uint8]
    """UTF-8 of all passages, one after the other."""
    text_starts: Int64s
    """[P + 1]."""
    titles: NDArray[np.uint8]
    """UTF-8 of all titles."""
    title_starts: Int64s
    """[D + 1]."""
    splits: NDArray[np.uint8]
    """Index into SPLITS [D]."""
    passage_starts: Int64s
    """First passage of each document [D + 1]."""
    sentence_starts: Int64s
    """First sentence of each passage [P + 1]."""
    spans: NDArray[np.uint16]
    """Characters of its passage that a sentence is [N, 2]."""
    flags: NDArray[np.uint8]
    """LEANS or nothing [N]."""
    kinds: NDArray[np.uint8]
    """A bit for each kind of blank that a sentence has [N]."""
    word_starts: Int64s
    """[N + 1]."""
    words: NDArray[Any]
    """Hashes in a shard, numbers in the whole [I]."""
    marks: NDArray[np.uint8]
    """[I], see `index_builder.sentences`."""
    blank_starts: Int64s
    """[N + 1]."""
    blanks: NDArray[np.uint16]
    """Start, end, kind, first and last word, of those of the sentence [B, 5]."""


_ARRAYS = tuple(field.name for field in fields(SentenceArrays))
_STARTS = ("text_starts", "title_starts", "passage_starts", "sentence_starts", "word_starts", "blank_starts")
"""Arrays of first places, which go on from shard to shard."""


@dataclass(frozen=True, slots=True)
class Article:
    """What a shard takes of a document."""

    title: str
    text: str
    split: int


def write_shard(path: Path, articles: Sequence[Article], words: tuple[int, int]) -> None:
    """Reads some documents and writes their sentences.

    Args:
        path: The file, .npz.
        articles: The documents.
        words: See `read_sentence`.
    """
    text, titles = bytearray(), bytearray()
    starts = {name: array("q", [0]) for name in _STARTS}
    numbers = {name: array(code) for name, code in (("spans", "H"), ("words", "Q"), ("blanks", "H"))}
    octets = {name: array("B") for name in ("splits", "flags", "kinds", "marks")}
    num_passages = 0
    for article in articles:
        titles += article.title.encode()
        title_words = array("Q", words_of(title_name(article.title)))
        title_marks = array("B", bytes([TITLE | 1])) * len(title_words)
        for passage, spans in passages_of(article.text):
            text += passage.encode()
            for start, end in spans:
                sentence = read_sentence(passage, start, end, words=words)
                numbers["spans"].extend((start, end))
                numbers["words"].extend(sentence.words + title_words)
                octets["marks"].extend(sentence.marks + title_marks)
                for blank in sentence.blanks:
                    numbers["blanks"].extend(blank)
                octets["flags"].append(LEANS if sentence.leans else 0)
                octets["kinds"].append(_bits(blank.kind for blank in sentence.blanks))
                starts["word_starts"].append(len(numbers["words"]))
                starts["blank_starts"].append(len(numbers["blanks"]) // 5)
            starts["text_starts"].append(len(text))
            starts["sentence_starts"].append(len(numbers["spans"]) // 2)
            num_passages += 1
        octets["splits"].append(article.split)
        starts["title_starts"].append(len(titles))
        starts["passage_starts"].append(num_passages)
    made: dict[str, NDArray[Any]] = {
        name: np.frombuffer(values, values.typecode) for name, values in (starts | numbers | octets).items() if values
    }
    made |= {"text": np.frombuffer(bytes(text), np.uint8), "titles": np.frombuffer(bytes(titles), np.uint8)}
    for name, shape, kind in (("spans", (-1, 2), "H"), ("blanks", (-1, 5), "H"), ("words", (-1,), "Q")):
        made[name] = made.get(name, np.empty(0, kind)).reshape(shape)
    for name in octets:
        made.setdefault(name, np.empty(0, np.uint8))
    made |= _counted(made["words"], made["marks"], made["word_starts"])
    write_atomically(path, lambda file: np.savez(file, allow_pickle=False, **made))


def _bits(kinds: Iterable[int]) -> int:
    bits = 0
    for kind in kinds:
        bits |= 1 << kind
    return bits


def _counted(words_I: NDArray[Any], marks_I: NDArray[np.uint8], word_starts: Int64s) -> dict[str, NDArray[Any]]:
    """The different words of a shard, the sentences that hold each, and how often it was written as part of a name and not, at the
    beginning of a sentence or in a title left out."""
    different, number_I = np.unique(words_I, return_inverse=True)
    sentence_I = np.repeat(np.arange(len(word_starts) - 1), np.diff(word_starts))
    once = np.unique(number_I.astype(np.int64) * len(word_starts) + sentence_I) // len(word_starts)
    inside_I = (marks_I & (INITIAL | TITLE)) == 0
    names_I = inside_I & ((marks_I & GROUP) != 0)
    W = len(different)
    return {
        "different": different,
        "sentences_of": np.bincount(once, minlength=W),
        "inside": np.bincount(number_I[inside_I], minlength=W),
        "as_name": np.bincount(number_I[names_I], minlength=W),
    }


def build_sentence_index(folder: Path, shards: Sequence[Path], progress: Callable[[int], None]) -> None:
    """Lays shards one after the other, numbers their words and lists the sentences of each rare one.

    Args:
        folder: Of the index; the files in it are complete, or not there.
        shards: Made by `write_shard`, in order.
        progress: Called with the number of shards done.
    """
    opened = [np.load(path, allow_pickle=False) for path in shards]  # an array of a shard is read when it is taken out
    hashes_W, sentences_W, is_name_W = _vocabulary(opened)
    for name in _ARRAYS:
        if name != "words":
            parts = (shard[name] for shard in opened)
            _save_joined(folder / f"{name}.npy", _lengths(opened, name), _going_on(parts) if name in _STARTS else parts)
    numbered = _numbered(opened, hashes_W, progress)
    _save_joined(folder / "words.npy", _lengths(opened, "words"), numbered)
    save_array(folder / "is_name.npy", is_name_W)
    save_array(folder / "sentences_of.npy", sentences_W)
    _write_postings(folder, sentences_W)


def _lengths(shards: Sequence[Any], name: str) -> int:
    """Of all arrays of this name, laid one after the other; one first place is shared by each two."""
    return sum(len(shard[name]) for shard in shards) - (len(shards) - 1 if name in _STARTS else 0)


def _going_on(parts: Iterable[Int64s]) -> Iterator[Int64s]:
    """First places that go on where those of the shard before ended."""
    end = -1
    for part in parts:
        yield part if end < 0 else part[1:] + end
        end = max(end, 0) + int(part[-1])


def _numbered(
    shards: Sequence[Any], hashes_W: NDArray[np.uint64], progress: Callable[[int], None]
) -> Iterator[NDArray[np.uint32]]:
    """The words of each shard by their places among the hashes."""
    for number, shard in enumerate(shards, 1):
        words_I = shard["words"]
        at_I = np.minimum(np.searchsorted(hashes_W, words_I), max(len(hashes_W) - 1, 0))
        known_I = hashes_W[at_I] == words_I if len(hashes_W) else np.zeros(len(words_I), np.bool_)
        yield np.where(known_I, at_I, UNKNOWN).astype(np.uint32)
        progress(number)


def _vocabulary(shards: Sequence[Any]) -> tuple[NDArray[np.uint64], Int64s, NDArray[np.bool_]]:
    """Hashes of the words that at least two sentences have, sorted; how many have each; and whether it is mostly a name."""
    hashes, number = np.unique(np.concatenate([shard["different"] for shard in shards]), return_inverse=True)
    totals = {
        name: np.bincount(number, np.concatenate([shard[name] for shard in shards]), minlength=len(hashes))
        for name in ("sentences_of", "inside", "as_name")
    }
    shared_W = totals["sentences_of"] >= 2
    is_name_W = totals["as_name"] >= 0.7 * np.maximum(totals["inside"], 1)
    return hashes[shared_W], totals["sentences_of"][shared_W].astype(np.int64), is_name_W[shared_W]


def _save_joined(path: Path, length: int, parts: Iterator[NDArray[Any]]) -> None:
    """Writes arrays, one after the other, as one .npy of this length, without holding them all."""
    first = next(parts)
    header = {
        "descr": np.lib.format.dtype_to_descr(first.dtype),
        "fortran_order": False,
        "shape": (length, *first.shape[1:]),
    }

    def write(file: Any) -> None:
        np.lib.format.write_array_header_1_0(file, header)
        for part in chain([first], parts):
            file.write(np.ascontiguousarray(part).data)

    write_atomically(path, write)


def _write_postings(folder: Path, sentences_W: Int64s) -> None:
    """The sentences of each word that at most RARE of them have."""
    counts_W = np.where(sentences_W <= RARE, sentences_W, 0)
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts_W)])
    save_array(folder / "posting_starts.npy", starts)
    parts = chain([np.empty(0, np.uint32)], _postings(folder, counts_W, starts))
    _save_joined(folder / "postings.npy", int(starts[-1]), parts)


def _postings(folder: Path, counts_W: Int64s, starts: Int64s) -> Iterator[NDArray[np.uint32]]:
    """The sentences of all words with a count, for as many words at a time as have POSTINGS_AT_ONCE."""
    first = 0
    while first < len(counts_W):
        last = max(first + 1, int(np.searchsorted(starts, starts[first] + POSTINGS_AT_ONCE, side="right")) - 1)
        listed_W = np.zeros(len(counts_W) + 1, np.bool_)
        listed_W[first:last] = counts_W[first:last] > 0
        keys = np.unique(np.concatenate([np.empty(0, np.uint64), *_keys(folder, listed_W)]))
        yield (keys & np.uint64(0xFFFFFFFF)).astype(np.uint32)
        first = last


def _keys(folder: Path, listed_W: NDArray[np.bool_]) -> Iterator[NDArray[np.uint64]]:
    """Word and sentence in one number, for each listed word of each sentence; the last of `listed_W` stands for unknown words."""
    words_I, word_starts = load_array(folder / "words.npy"), load_array(folder / "word_starts.npy")
    num_sentences = len(word_starts) - 1
    for first in range(0, num_sentences, SENTENCES_AT_ONCE):
        last = min(first + SENTENCES_AT_ONCE, num_sentences)
        few_I = np.asarray(words_I[word_starts[first] : word_starts[last]])
        sentence_I = np.repeat(np.arange(first, last, dtype=np.uint64), np.diff(word_starts[first : last + 1]))
        listed_I = listed_W[np.minimum(few_I, len(listed_W) - 1)]
        yield few_I[listed_I].astype(np.uint64) << np.uint64(32) | sentence_I[listed_I]


class SentenceIndex:
    """Read access to the sentences of a corpus.

    Attributes:
        arrays: See SentenceArrays.
        weights_W: ln(N / sentences with the word), float32; the last place stands for words that only one sentence has.
        is_name_W: Whether a word is mostly written with a capital letter, likewise.
    """

    def __init__(self, folder: Path) -> None:
        # As plain arrays: taking a few values out of numpy's own class for memory maps costs ten times as much.
        self.arrays = SentenceArrays(**{name: np.asarray(load_array(folder / f"{name}.npy")) for name in _ARRAYS})
        self.posting_starts = np.asarray(load_array(folder / "posting_starts.npy"))
        self.postings_L = np.asarray(load_array(folder / "postings.npy"))
        counts = np.concatenate([load_array(folder / "sentences_of.npy"), [1]])
        self.weights_W = np.log(self.num_sentences / counts).astype(np.float32)
        self.is_name_W = np.concatenate([load_array(folder / "is_name.npy"), [False]])

    @property
    def num_sentences(self) -> int:
        """N."""
        return len(self.arrays.flags)

    @property
    def num_passages(self) -> int:
        """P."""
        return len(self.arrays.text_starts) - 1

    def passage_of(self, sentences: NDArray[Any]) -> Int64s:
        """The passages that sentences stand in."""
        return np.searchsorted(self.arrays.sentence_starts, sentences, side="right") - 1

    def document_of(self, passages: NDArray[Any]) -> Int64s:
        """The documents that passages stand in."""
        return np.searchsorted(self.arrays.passage_starts, passages, side="right") - 1

    def passage(self, passage: int) -> str:
        """The text of one."""
        first, last = self.arrays.text_starts[passage : passage + 2]
        return self.arrays.text[first:last].tobytes().decode()

    def title(self, document: int) -> str:
        """The title of one, empty where it has none."""
        first, last = self.arrays.title_starts[document : document + 2]
        return self.arrays.titles[first:last].tobytes().decode()
