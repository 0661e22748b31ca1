"""Texts that say the same: exact and near duplicates, and texts that share 13 words in a row. The only importer of rensa.

Arrays: D documents, Q queried ones, P minima of a signature, W words, G n-grams. Nearly the same means that the sets of 13-grams of
words overlap by at least 80% (Jaccard), estimated from 128 minima (standard error 3.5 points).
Source: arXiv:2112.04426, section 2.6 (13-grams, 0.8, MinHash); Broder 1997.
"""

import functools
import re
import unicodedata
from array import array
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from retro.chunks import name_hash

N_GRAM = 13
"""Words of an n-gram; a shorter text is one n-gram of all its words."""
THRESHOLD = 0.8
"""Jaccard similarity from which on texts are near-duplicates."""
NUM_MINIMA = 128
BANDS, BAND_ROWS = 21, 6
"""Texts are compared where one of 21 bands of 6 minima is equal: a pair at 0.8 is missed in 0.2% of the cases, one at 0.5 compared
in 28%."""
MAX_CHAIN = 100
"""Kept texts that one band of a stream may have in common; it bounds the time where many texts share a template."""
_EMPTY = np.uint32(0xFFFFFFFF)
_WORD = re.compile(r"\w+")
_FACTOR = 0x9E3779B97F4A7C15
Hashes = NDArray[np.uint64]


def words(text: str) -> list[str]:
    """Runs of letters, digits and underscores, in lower case and Unicode's NFKC."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return _WORD.findall(text.lower())


class KeySet:
    """A growing set of 64-bit hashes in 12 to 24 bytes each; optionally each with the number it came with first (twice as much)."""

    def __init__(self, *, numbered: bool = False) -> None:
        self._keys = array("Q", bytes(8 << 10))
        self._numbers = array("Q", bytes(8 << 10)) if numbered else None
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, key: int) -> bool:
        """Whether the key is new."""
        return self.put(key, 0) is None

    def get(self, key: int) -> int | None:
        """The number that the key came with; None where it is not there."""
        key = key or _FACTOR
        mask = len(self._keys) - 1
        place = key & mask
        while self._keys[place]:
            if self._keys[place] == key:
                return 0 if self._numbers is None else self._numbers[place]
            place = (place + 1) & mask
        return None

    def put(self, key: int, number: int) -> int | None:
        """The number that the key came with first; None where it is new, and now there."""
        key = key or _FACTOR  # 0 marks an empty place, and one hash more is confused with another
        keys, mask = self._keys, len(self._keys) - 1
        place = key & mask
        while keys[place]:
            if keys[place] == key:
                return 0 if self._numbers is None else self._numbers[place]
            place = (place + 1) & mask
        keys[place] = key
        if self._numbers is not None:
            self._numbers[place] = number
        self._count += 1
        if 3 * self._count > 2 * len(keys):
            self._grow()
        return None

    def _grow(self) -> None:
        old_keys, old_numbers = self._keys, self._numbers
        self._keys = keys = array("Q", bytes(16 * len(old_keys)))
        self._numbers = None if old_numbers is None else array("Q", bytes(16 * len(old_keys)))
        mask = len(keys) - 1
        for at, key in enumerate(old_keys):
            if key:
                place = key & mask
                while keys[place]:
                    place = (place + 1) & mask
                keys[place] = key
                if self._numbers is not None and old_numbers is not None:
                    self._numbers[place] = old_numbers[at]


class Deduplicator:
    """Says of each text in a stream whether an earlier one says the same.

    Memory: 24 to 48 bytes a document for `exact`, about 1.3 kB for `near`.
    """

    def __init__(self, kind: Literal["exact", "near"]) -> None:
        self._kind = kind
        self._texts = KeySet(numbered=True)
        self._bands = KeySet(numbered=True)
        self._signatures = np.empty((1024, NUM_MINIMA), np.uint32)
        self._kept = 0

    def earlier(self, text: str) -> int | None:
        """Number (in the order of texts that were kept, from 0) of an earlier text that says the same; None keeps this one."""
        found = self._near(text) if self._kind == "near" else self._texts.put(name_hash(text), self._kept)
        if found is None:
            self._kept += 1
        return found

    def _near(self, text: str) -> int | None:
        signature_P = signatures([text])[0]
        if _is_empty(signature_P[None])[0]:  # without a word: only the very same text
            return self._texts.put(name_hash(text), self._kept)
        ends, candidates = [], set()
        for band_key in _band_keys(signature_P[None])[0].tolist():
            key = band_key
            for _ in range(MAX_CHAIN):
                number = self._bands.get(key)
                if number is None:
                    ends.append(key)
                    break
                candidates.add(number)
                key = (key * _FACTOR + 1) & 0xFFFFFFFFFFFFFFFF  # of the next text with the same band
        numbers = np.array(sorted(candidates), np.int64)
        similar = numbers[(self._signatures[numbers] == signature_P).mean(axis=1) >= THRESHOLD]
        if len(similar):
            return int(similar[0])
        for key in ends:
            self._bands.put(key, self._kept)
        if self._kept >= len(self._signatures):
            longer = np.empty((2 * self._kept, NUM_MINIMA), np.uint32)
            longer[: len(self._signatures)] = self._signatures
            self._signatures = longer
        self._signatures[self._kept] = signature_P
        return None


def signatures(texts: Sequence[str]) -> NDArray[np.uint32]:
    """Minima of the hashed 13-grams of each text [n, P], the same on every machine; all bits set where a text has no word."""
    import rensa

    grams_G, starts = _ngrams(texts)
    if not len(texts):
        return np.empty((0, NUM_MINIMA), np.uint32)
    made = rensa.RMinHash.digest_matrix_from_flat_token_hashes(grams_G, starts, NUM_MINIMA, 1)
    signatures_DP = np.array(made.to_rows(), np.uint32)
    signatures_DP[np.diff(starts.astype(np.int64)) == 0] = _EMPTY
    return signatures_DP


class NearDuplicates:
    """Finds the documents that are nearly the same as others; 250 bytes a document beside the signatures."""

    def __init__(self, signatures_DP: NDArray[np.uint32]) -> None:
        self._signatures_DP = signatures_DP
        self._full = np.flatnonzero(~_is_empty(signatures_DP)).astype(np.uint32)
        keys = np.concatenate(
            [np.empty((0, BANDS), np.uint64)]
            + [_band_keys(signatures_DP[self._full[i : i + 65_536]]) for i in range(0, len(self._full), 65_536)]
        )
        orders = [np.argsort(keys[:, band], kind="stable").astype(np.uint32) for band in range(BANDS)]
        self._bands = [(keys[order, band], order) for band, order in enumerate(orders)]

    def matches(self, signatures_QP: NDArray[np.uint32]) -> list[NDArray[np.int64]]:
        """Numbers of the near-duplicates of each queried document, ascending; its own where it is among them."""
        keys_QB = _band_keys(signatures_QP)
        empty_Q = _is_empty(signatures_QP)
        spans = [
            (np.searchsorted(keys, keys_QB[:, band], "left"), np.searchsorted(keys, keys_QB[:, band], "right"), order)
            for band, (keys, order) in enumerate(self._bands)
        ]
        found = []
        for query, signature_P in enumerate(signatures_QP):
            parts = [order[left[query] : right[query]] for left, right, order in spans]
            candidates = self._full[np.unique(np.concatenate(parts))].astype(np.int64)
            equal = (self._signatures_DP[candidates] == signature_P).mean(axis=1)
            found.append(candidates[(equal >= THRESHOLD) & ~empty_Q[query]])
        return found


class NGrams:
    """All 13-grams of words of some texts."""

    def __init__(self, hashes: Hashes) -> None:
        self._hashes = hashes

    def __len__(self) -> int:
        return len(self._hashes)

    @classmethod
    def of_texts(cls, texts: Iterable[str]) -> "NGrams":
        """Collects them; texts of fewer than 13 words (questions, for instance) count as one n-gram of all their words."""
        parts, batch = [np.empty(0, np.uint64)], []
        for text in texts:
            batch.append(text)
            if len(batch) == 1024:
                parts.append(np.unique(_ngrams(batch)[0]))
                batch = []
        parts.append(_ngrams(batch)[0])
        return cls(np.unique(np.concatenate(parts)))

    def overlap(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """Which texts share one."""
        grams_G, starts = _ngrams(texts)
        if not len(self._hashes) or not len(grams_G):
            return np.zeros(len(texts), np.bool_)
        at = np.minimum(np.searchsorted(self._hashes, grams_G), len(self._hashes) - 1)
        shared = np.concatenate([[0], np.cumsum(self._hashes[at] == grams_G)])
        return np.asarray(np.diff(shared[starts.astype(np.int64)]) > 0)


@functools.lru_cache(maxsize=1 << 20)
def _word_hash(word: str) -> int:
    return name_hash(word)


def _ngrams(texts: Sequence[str]) -> tuple[Hashes, Hashes]:
    """Hashes of the n-grams of all texts, one after the other, and where those of each begin [n + 1]."""
    lists = [words(text) for text in texts]
    lengths = np.array([len(few) for few in lists], np.int64)
    words_W = np.fromiter(map(_word_hash, chain.from_iterable(lists)), np.uint64, int(lengths.sum()))
    ends = np.cumsum(lengths)
    # A polynomial of the words' hashes modulo 2**64; that of a short text goes over all its words.
    grams = np.zeros(max(len(words_W) - N_GRAM + 1, 0), np.uint64)
    for offset in range(N_GRAM):
        grams = grams * np.uint64(_FACTOR) + words_W[offset : offset + len(grams)]
    counts = np.where(lengths >= N_GRAM, lengths - N_GRAM + 1, np.minimum(lengths, 1))
    starts = np.concatenate([[0], np.cumsum(counts)])
    result = np.empty(starts[-1], np.uint64)
    for text in range(len(texts)):
        first, place = int(ends[text] - lengths[text]), slice(int(starts[text]), int(starts[text + 1]))
        if lengths[text] >= N_GRAM:
            result[place] = grams[first : first + counts[text]]
        elif lengths[text]:
            value = int(lengths[text])
            for number in words_W[first : ends[text]].tolist():
                value = (value * _FACTOR + number) & 0xFFFFFFFFFFFFFFFF
            result[place] = value
    return _mixed(result), starts.astype(np.uint64)


def _mixed(values: Hashes) -> Hashes:
    """Spreads every bit over all others (the finalizer of SplitMix64): low bits of a polynomial know little of the high ones."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _band_keys(signatures_DP: NDArray[np.uint32]) -> Hashes:
    """A hash of each band of each signature [D, BANDS]."""
    rows = signatures_DP[:, : BANDS * BAND_ROWS].astype(np.uint64).reshape(len(signatures_DP), BANDS, BAND_ROWS)
    keys = np.broadcast_to(np.arange(1, BANDS + 1, dtype=np.uint64), rows.shape[:2]).copy()
    for row in range(BAND_ROWS):
        keys = _mixed(keys * np.uint64(_FACTOR) + rows[:, :, row])
    return keys


def _is_empty(signatures_DP: NDArray[np.uint32]) -> NDArray[np.bool_]:
    return np.asarray((signatures_DP == _EMPTY).all(axis=1))
