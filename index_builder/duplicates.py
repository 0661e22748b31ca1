"""Texts that say the same: exact and near duplicates, and texts that share 13 words in a row. The only importer of rensa.

Arrays: D documents, Q queries, C candidates, B bands, R minima of a band, P minima of a signature, W words, G n-grams.

Two texts are near-duplicates where their sets of 13-grams of words overlap by 80% (Jaccard). That is estimated from 128 minima of
the hashed n-grams, with a standard error of 3.5 points at 80%, where it finds about every second pair. Only pairs that agree in one
of 16 bands of 6 minima are compared: 0.8% of those at 80% do not (0.1% where 103 of the minima agree, the least that will do), 22%
of those at 50% do.

In short texts that is little: "Urvillers is a commune. ..." of 20 words and the same about Achery share 7 of 9 13-grams, for the
first word is in one of them only. Of the 2,965 articles of Simple English Wikipedia that have an earlier near-duplicate, 96%
differ from it in some 13-gram and have fewer than 60 words.

Source: arXiv:2112.04426, section 2.6 (13-grams, 0.8, MinHash); Broder 1997.
"""

import re
import unicodedata
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, lru_cache
from itertools import chain
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from retro.chunks import name_hash

N_GRAM = 13
"""Words of an n-gram; a shorter text is one n-gram of all its words."""
THRESHOLD = 0.8
"""Share of equal minima from which on two texts are near-duplicates."""
NUM_MINIMA = 128
NUM_BANDS, BAND_MINIMA = 16, 6
MAX_SHARING = 64
"""Kept texts that a `Deduplicator` knows for one value of a band, so that it stays fast where thousands come from one template. On
Simple English Wikipedia it finds all 2,965 near-duplicates with 64, 8 fewer with 16, 192 fewer with 1."""
NUM_PARTS = 256
"""Parts of a hash table. They grow one at a time: nothing large is ever held twice, or moved in one go."""
BATCH_CHARS = 1 << 20
"""Characters that are hashed in one go."""
BLOCK_ROWS = 65_536
"""Signatures that are read in one go."""
_WORDLESS = np.uint32(0xFFFFFFFF)  # the minimum over no n-grams
_FACTOR = 0x9E3779B97F4A7C15
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    "\u3005\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff]"  # Japanese, Chinese
)
Hashes = NDArray[np.uint64]
Signatures = NDArray[np.uint32]


# --- words and n-grams --------------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """Runs of letters, digits, marks and underscores, in lower case and Unicode's NFKC.

    Where a script puts no spaces between words, each character is one: thirteen clauses in a row would find nothing.
    """
    if not text.isascii():
        text = _UNSPACED.sub(r" \g<0> ", unicodedata.normalize("NFKC", text))
    found: list[str] = _word_pattern().findall(text.lower())
    return found


@cache
def _word_pattern() -> re.Pattern[str]:
    # `\w` alone would cut a word at each vowel sign of Hindi, Tamil or Arabic.
    marks = (chr(code) for code in range(0x300, 0x10000) if unicodedata.category(chr(code))[0] == "M")
    return re.compile(f"[\\w{''.join(marks)}]+")


@lru_cache(maxsize=1 << 16)
def _word_hash(word: str) -> int:
    return name_hash(word)


def _ngrams(texts: Sequence[str]) -> tuple[Hashes, NDArray[np.int64]]:
    """Hashes of the n-grams of all texts, one text after the other [G], and where those of each begin [D + 1]."""
    words_of = [words(text) for text in texts]
    lengths_D = np.fromiter(map(len, words_of), np.int64, len(texts))
    words_W = np.fromiter(map(_word_hash, chain.from_iterable(words_of)), np.uint64, int(lengths_D.sum()))
    # A polynomial of 13 words' hashes modulo 2^64, from every word on, over the borders of texts too.
    running_W = np.zeros(max(len(words_W) - N_GRAM + 1, 0), np.uint64)
    for offset in range(N_GRAM):
        running_W = running_W * np.uint64(_FACTOR) + words_W[offset : offset + len(running_W)]
    starts = np.concatenate(
        [[0], np.cumsum(np.where(lengths_D < N_GRAM, np.minimum(lengths_D, 1), lengths_D - N_GRAM + 1))]
    )
    grams_G = np.empty(starts[-1], np.uint64)
    word = 0
    for length, start, end in zip(lengths_D.tolist(), starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        if length >= N_GRAM:
            grams_G[start:end] = running_W[word : word + end - start]
        elif length:
            value = length
            for number in words_W[word : word + length].tolist():
                value = value * _FACTOR + number & 0xFFFFFFFFFFFFFFFF
            grams_G[start] = value
        word += length
    return _mixed(grams_G), starts


def _mixed(values: Hashes) -> Hashes:
    """Lets every bit depend on all (the finalizer of SplitMix64): the low bits of a polynomial know nothing of the high ones."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, chars = [], 0
    for text in texts:
        batch.append(text)
        chars += len(text)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


class NGrams:
    """The 13-grams of words of some texts: 8 bytes for each one that is different."""

    def __init__(self, grams_G: Hashes) -> None:
        self._grams_G = grams_G

    def __len__(self) -> int:
        return len(self._grams_G)

    @classmethod
    def of_texts(cls, texts: Iterable[str]) -> "NGrams":
        """Collects them; a text of fewer than 13 words is one n-gram, which only a text of the same words shares."""
        parts = [np.unique(_ngrams(batch)[0]) for batch in _batches(texts)]
        return cls(np.unique(np.concatenate([np.empty(0, np.uint64), *parts])))

    def overlap(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """Which texts share one [D]."""
        parts = [np.empty(0, np.bool_)]
        for batch in _batches(texts):
            grams_G, starts = _ngrams(batch)
            counts = np.concatenate([[0], np.cumsum(self._contain(grams_G))])[starts]
            parts.append(np.diff(counts) > 0)
        return np.concatenate(parts)

    def _contain(self, grams_G: Hashes) -> NDArray[np.bool_]:
        if not len(self._grams_G):
            return np.zeros(len(grams_G), np.bool_)
        # Sorted, they walk through the others from start to end, which is faster than jumping about.
        order = np.argsort(grams_G)
        at = np.searchsorted(self._grams_G, grams_G[order])
        shared_G = np.empty(len(grams_G), np.bool_)
        shared_G[order] = self._grams_G[np.minimum(at, len(self._grams_G) - 1)] == grams_G[order]
        return shared_G


# --- signatures ---------------------------------------------------------------------------------------------------


def signatures(texts: Sequence[str]) -> Signatures:
    """Minima of the hashed 13-grams of each text [D, P], alike on all machines; all bits are set where a text has no word."""
    import rensa

    parts = [np.empty((0, NUM_MINIMA), np.uint32)]
    for batch in _batches(texts):
        grams_G, starts = _ngrams(batch)
        matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(grams_G, starts.astype(np.uint64), NUM_MINIMA, 1)
        parts.append(np.array(matrix.to_rows(), np.uint32))
    return np.concatenate(parts)


_WEIGHTS_BR = _mixed(np.arange(1, NUM_BANDS * BAND_MINIMA + 1, dtype=np.uint64)).reshape(NUM_BANDS, BAND_MINIMA)
_WEIGHTS_BR |= np.uint64(1)


def _band_keys(signatures_DP: Signatures) -> Hashes:
    """A hash of each band's minima [D, B], different for each band."""
    minima_DBR = signatures_DP[:, : NUM_BANDS * BAND_MINIMA].reshape(-1, NUM_BANDS, BAND_MINIMA).astype(np.uint64)
    return _mixed((minima_DBR * _WEIGHTS_BR).sum(axis=2, dtype=np.uint64))


def _wordless(signatures_DP: Signatures) -> NDArray[np.bool_]:
    return np.asarray((signatures_DP == _WORDLESS).all(axis=1))


class NearDuplicates:
    """Finds near-duplicates among all documents of an index: 80 to 100 bytes a document beside the signatures.

    Each band sorts the documents into buckets of two to four on average; whoever shares one is compared.

    Args:
        signatures_DP: Of all documents, by number; may be memory-mapped.
    """

    def __init__(self, signatures_DP: Signatures) -> None:
        self._signatures_DP = signatures_DP
        D = len(signatures_DP)
        self._bucket_bits = max(0, D.bit_length() - 2)
        num_buckets = 1 << self._bucket_bits
        self._documents_BD = np.empty((NUM_BANDS, D), np.uint32)
        """Documents, by bucket and number."""
        self._starts = np.zeros((NUM_BANDS, num_buckets + 1), np.uint32)
        """Where each bucket begins [B, buckets + 1]."""
        for first in range(0, D, BLOCK_ROWS):
            block_DP = np.asarray(signatures_DP[first : first + BLOCK_ROWS])
            self._documents_BD[:, first : first + BLOCK_ROWS] = self._buckets(block_DP).T
        for band in range(NUM_BANDS):
            bucket_D = self._documents_BD[band]
            self._starts[band, 1:] = np.cumsum(np.bincount(bucket_D, minlength=num_buckets))
            self._documents_BD[band] = np.argsort(bucket_D, kind="stable")

    def matches(self, signatures_QP: Signatures) -> list[NDArray[np.int64]]:
        """Numbers of the near-duplicates of each queried document, ascending; its own where it is among them."""
        found = map(self._of_one, self._buckets(signatures_QP).tolist(), signatures_QP)
        return [
            np.empty(0, np.int64) if wordless else numbers
            for wordless, numbers in zip(_wordless(signatures_QP), found, strict=True)
        ]

    def _of_one(self, buckets: list[int], signature_P: Signatures) -> NDArray[np.int64]:
        parts = [
            documents_D[starts[bucket] : starts[bucket + 1]]
            for documents_D, starts, bucket in zip(self._documents_BD, self._starts, buckets, strict=True)
        ]
        documents_C = np.unique(np.concatenate(parts)).astype(np.int64)
        # In blocks, because thousands of documents may be made from one template.
        blocks = np.split(documents_C, range(BLOCK_ROWS, len(documents_C), BLOCK_ROWS))
        return np.concatenate([few[_similar(self._signatures_DP[few], signature_P)] for few in blocks])

    def _buckets(self, signatures_DP: Signatures) -> NDArray[np.int64]:
        return (_band_keys(signatures_DP) >> np.uint64(32) >> np.uint64(32 - self._bucket_bits)).astype(np.int64)


def _similar(minima_CP: NDArray[np.unsignedinteger], minima_P: NDArray[np.unsignedinteger]) -> NDArray[np.bool_]:
    return np.asarray((minima_CP == minima_P).mean(axis=1) >= THRESHOLD)


# --- a stream of texts --------------------------------------------------------------------------------------------


class _HashTable:
    """Numbers (or none) by 64-bit hashes, by open addressing; a hash may be there several times. Half to three quarters full."""

    def __init__(self, *, bits: Literal[32, 64], numbered: bool) -> None:
        """With 32 bits, only these and the highest 8 are kept of each hash."""
        self._mask = (1 << bits) - 1
        self._keys = [array("Q" if bits == 64 else "I", bytes(bits)) for _ in range(NUM_PARTS)]
        self._numbers = [array("I", bytes(32 if numbered else 0)) for _ in range(NUM_PARTS)]
        self._counts = [0] * NUM_PARTS

    def __len__(self) -> int:
        return sum(self._counts)

    def find(self, key: int) -> list[int]:
        """The numbers that came with a hash, in no certain order; zeros where there are none."""
        keys, numbers = self._keys[key >> 56], self._numbers[key >> 56]
        stored, size = key & self._mask or self._mask, len(keys)
        place = stored % size
        found = []
        while keys[place]:
            if keys[place] == stored:
                found.append(numbers[place] if numbers else 0)
            place = place + 1 if place + 1 < size else 0
        return found

    def insert(self, key: int, number: int = 0) -> None:
        part = key >> 56
        self._counts[part] += 1
        if 4 * self._counts[part] > 3 * len(self._keys[part]):
            keys, numbers = self._keys[part], self._numbers[part]
            size = 3 * len(keys) // 2
            self._keys[part] = array(keys.typecode, bytes(size * keys.itemsize))
            self._numbers[part] = array("I", bytes(4 * size if numbers else 0))
            for place, stored in enumerate(keys):
                if stored:
                    self._put(part, stored, numbers[place] if numbers else 0)
        # 0 marks an empty place. All bits set, which stand for it, no other hash of its part has: that one is in the last part.
        self._put(part, key & self._mask or self._mask, number)

    def _put(self, part: int, stored: int, number: int) -> None:
        keys, numbers = self._keys[part], self._numbers[part]
        size = len(keys)
        place = stored % size
        while keys[place]:
            place = place + 1 if place + 1 < size else 0
        keys[place] = stored
        if numbers:
            numbers[place] = number


class KeySet:
    """A growing set of 64-bit hashes in 11 to 16 bytes each."""

    def __init__(self) -> None:
        self._table = _HashTable(bits=64, numbered=False)

    def __len__(self) -> int:
        return len(self._table)

    def add(self, key: int) -> bool:
        """Whether the hash is new."""
        new = not self._table.find(key)
        if new:
            self._table.insert(key)
        return new


class Deduplicator:
    """Says of each text in a stream whether an earlier one says the same.

    Memory: 16 to 24 bytes for each text that is kept with `exact`, 430 to 550 with `near`.
    """

    def __init__(self, kind: Literal["exact", "near"]) -> None:
        self._kind = kind
        self._num_kept = 0
        self._texts = _HashTable(bits=64, numbered=True)
        self._bands = _HashTable(bits=32, numbered=True)
        self._minima = bytearray()
        """Lower 16 bits of the minima of the texts kept [D, P]: two that differ agree in them once in 65,536 times."""

    def earlier(self, text: str) -> int | None:
        """Number (of the texts that were kept, from 0) of the first one that says the same; None keeps this one.

        A text without a word is no near-duplicate of anything.
        """
        number = self._exact(text) if self._kind == "exact" else self._near(text)
        self._num_kept += number is None
        return number

    def _exact(self, text: str) -> int | None:
        key = name_hash(text)
        for number in self._texts.find(key):
            return number
        self._texts.insert(key, self._num_kept)
        return None

    def _near(self, text: str) -> int | None:
        signatures_1P = signatures([text])
        minima_1P = signatures_1P.astype("<u2")
        keys = [] if _wordless(signatures_1P)[0] else _band_keys(signatures_1P)[0].tolist()
        sharing = [self._bands.find(key) for key in keys]
        if numbers := sorted(set(chain.from_iterable(sharing))):
            minima_CP = np.frombuffer(self._minima, "<u2").reshape(-1, NUM_MINIMA)[numbers]
            similar = np.flatnonzero(_similar(minima_CP, minima_1P))
            if len(similar):
                return int(numbers[similar[0]])
        self._minima += minima_1P.tobytes()
        for key, others in zip(keys, sharing, strict=True):
            if len(others) < MAX_SHARING:
                self._bands.insert(key, self._num_kept)
        return None
