"""Other sentences that say what a sentence says: evidence for the questions that are made of it, and what only looks like it.

Letters: S sentences that are asked about, X places for their different words (64: a bit each), Q words of them all, L postings,
T pairs of a sentence and one that was found for it, B blanks of a sentence.

A sentence is looked up by its rare words, and those found are compared with it word by word. For a blank, a sentence that holds
all its words is evidence where it also shares enough of the rest that both speak of the same fact. Sharing is weighed by rarity,
ln(N / sentences with the word); of a name only the rarest word counts in full, for its words come together. It must hold that

- two words or names besides the answer are shared, among them the rarest name (else the rarest word), which is what the
  sentence is about, and a word that is no name, which is what it says of it,
- what is shared weighs at least `COVERAGE` of all but the blank,
- so much would be shared by chance, were words independent, by less than exp(-MARGIN) sentences of the corpus.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from index_builder.sentence_index import RARE, UNKNOWN, SentenceIndex
from index_builder.sentences import FIGURE, GROUP, INITIAL, NAME, TITLE, WORD
from retro.chunks import Int64s

COVERAGE = 0.5
MARGIN = 4.0
BUDGET = 6000
"""Postings that are looked at for a sentence, those of its rarest words first."""
FOUND = 32
"""Sentences that are compared with one, those that share most first."""
BLANKS = 5
"""Blanks of a sentence that are tried, drawn with these weights by kind: single words are most, and least like questions."""
PREFERENCE = np.array([2.0, 1.0, 2.0, 3.0, 2.0])
WITHIN_NAME = 0.3
"""What a word of a name weighs that is not the rarest of it."""
NEARLY_BEST = 0.8
"""What evidence shares at least, of what the best shares."""
_X = 64


@dataclass(frozen=True, slots=True)
class Match:
    """A question that can be asked, with the sentences to read."""

    sentence: int
    titled: bool
    """Whether the title has to stand in front, because the sentence does not name what it is about."""
    blank: tuple[int, int, int]
    """Span of characters of the passage, and the kind."""
    found: list[int]
    """Sentences that share words with it, those that share most besides the answer first."""
    evidence: list[bool]
    """Whether each states the answer."""
    holds: list[bool]
    """Whether each holds all words of the answer."""
    alike: list[bool]
    """Whether each holds something of the answer's kind."""


def find_evidence(index: SentenceIndex, sentences_S: NDArray[Any], seed: int) -> list[Match]:
    """Looks for evidence for blanks of some sentences; those without any are left out.

    Args:
        index: All sentences.
        sentences_S: Their numbers, a thousand or so.
        seed: Of the choice of blanks.
    """
    queries = _Queries.of(index, sentences_S)
    row_T, sentence_T = _search(index, queries)
    if not len(row_T):
        return []
    shared_T = _shared(index, queries, row_T, sentence_T)
    return _Matching(index, queries, row_T, sentence_T, shared_T).matches(seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Queries:
    """The different words of each sentence, and how much each weighs."""

    sentences_S: Int64s
    passages_S: Int64s
    splits_S: NDArray[np.uint8]
    titled_S: NDArray[np.bool_]
    row_Q: Int64s
    """Which of the sentences each word is of; sorted, as is `word_Q` within a sentence."""
    word_Q: NDArray[np.uint32]
    slot_Q: Int64s
    """Its place, in [0, X)."""
    weight_SX: NDArray[np.float32]
    """0 where there is no word."""
    counts_SX: NDArray[np.bool_]
    """Whether it counts: no name counts twice."""
    name_SX: NDArray[np.bool_]
    """Whether it is the word that a name counts by."""
    slots_of: Sequence[Int64s]
    """The places of the words of each sentence in order, repetitions included."""
    initial_S: NDArray[np.bool_]
    """Whether the first word is a name in spite of its place."""

    @classmethod
    def of(cls, index: SentenceIndex, sentences_S: NDArray[Any]) -> "_Queries":
        arrays = index.arrays
        S = len(sentences_S)
        sentences_S = sentences_S.astype(np.int64)
        passages_S = index.passage_of(sentences_S)
        documents_S = index.document_of(passages_S)
        starts_S = arrays.word_starts[sentences_S]
        row_I, place_I = _ranges(starts_S, arrays.word_starts[sentences_S + 1] - starts_S)
        word_I, mark_I = arrays.words[place_I].astype(np.int64), arrays.marks[place_I]
        weight_I = index.weights_W[np.minimum(word_I, len(index.weights_W) - 1)]
        key_I = row_I << 33 | np.where(word_I == UNKNOWN, 1 << 32 | place_I - starts_S[row_I], word_I)
        title_I = (mark_I & TITLE) != 0
        titled_S = _titled(S, row_I, key_I, weight_I, title_I)
        kept_I = ~title_I | titled_S[row_I]
        row_I, word_I, mark_I, weight_I, key_I, title_I = (
            a[kept_I] for a in (row_I, word_I, mark_I, weight_I, key_I, title_I)
        )

        # Each different word gets a place, in the order in which they first come.
        _, first_U, of_I = np.unique(key_I, return_index=True, return_inverse=True)
        order_U = np.argsort(first_U)
        number_U = np.empty(len(order_U), np.int64)
        number_U[order_U] = np.arange(len(order_U))
        row_U = row_I[first_U]
        slot_U = number_U - np.searchsorted(np.sort(row_U), row_U)
        slot_I = slot_U[of_I]

        name_I = ((mark_I & GROUP) != 0) & ((mark_I & GROUP) != FIGURE)
        name_I &= ((mark_I & INITIAL) == 0) | index.is_name_W[np.minimum(word_I, len(index.is_name_W) - 1)]
        group_I = np.where(name_I, (mark_I & GROUP).astype(np.int64) + np.where(title_I, _X, 0), 0)
        fits_U = slot_U < _X
        at = row_U[fits_U], slot_U[fits_U]
        weight_SX = np.zeros((S, _X), np.float32)
        counts_SX, name_SX = np.zeros((S, _X), np.bool_), np.zeros((S, _X), np.bool_)
        full_U = weight_I[first_U]
        group_U = group_I[first_U]
        best = np.zeros((S, 2 * _X), np.float32)
        np.maximum.at(best, (row_U, group_U), full_U)
        leads_U = (group_U > 0) & (full_U == best[row_U, group_U])
        name_SX[at] = leads_U[fits_U]
        counts_SX[at] = (leads_U | (group_U == 0))[fits_U]
        weight_SX[at] = np.where(leads_U | (group_U == 0), full_U, WITHIN_NAME * full_U)[fits_U]
        known_U = fits_U & (word_I[first_U] != UNKNOWN)
        begins = np.searchsorted(row_I, np.arange(S + 1))
        return cls(
            sentences_S=sentences_S,
            passages_S=passages_S,
            splits_S=arrays.splits[documents_S],
            titled_S=titled_S,
            row_Q=row_U[known_U],
            word_Q=word_I[first_U][known_U].astype(np.uint32),
            slot_Q=slot_U[known_U],
            weight_SX=weight_SX,
            counts_SX=counts_SX,
            name_SX=name_SX,
            slots_of=[slot_I[a:b] for a, b in pairwise(begins.tolist())],
            initial_S=_first(name_I, begins),
        )


def _titled(
    S: int, row_I: Int64s, key_I: Int64s, weight_I: NDArray[np.float32], title_I: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Which sentences do not hold the rarest word of their title."""
    titled_S = np.zeros(S, np.bool_)
    row_J, key_J = row_I[title_I], key_I[title_I]
    best_S = np.zeros(S, np.float32)
    np.maximum.at(best_S, row_J, weight_I[title_I])
    rarest_J = weight_I[title_I] == best_S[row_J]
    titled_S[row_J[rarest_J & ~np.isin(key_J, key_I[~title_I])]] = True
    return titled_S


def _first(values_I: NDArray[np.bool_], begins: Int64s) -> NDArray[np.bool_]:
    """The first value of each part; False for an empty one."""
    filled = np.diff(begins) > 0
    first = np.zeros(len(filled), np.bool_)
    first[filled] = values_I[begins[:-1][filled]]
    return first


def _ranges(starts: NDArray[Any], lengths: NDArray[Any]) -> tuple[Int64s, Int64s]:
    """The numbers of several ranges, one after the other, and which range each is of."""
    row = np.repeat(np.arange(len(starts)), lengths)
    place = np.arange(len(row)) + np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
    return row, place


def _search(index: SentenceIndex, queries: _Queries) -> tuple[Int64s, Int64s]:
    """For each sentence those of its split, in other passages, that share most of its rare words, best first."""
    word_Q = queries.word_Q.astype(np.int64)
    starts_Q = index.posting_starts[word_Q]
    lengths_Q = index.posting_starts[word_Q + 1] - starts_Q
    order = np.lexsort((lengths_Q, queries.row_Q))
    running = np.cumsum(lengths_Q[order])
    before = np.searchsorted(queries.row_Q[order], queries.row_Q[order])
    spent = running - np.concatenate([[0], running])[before]
    order = order[(spent <= BUDGET + RARE) & (spent - lengths_Q[order] < BUDGET)]
    which_L, place_L = _ranges(starts_Q[order], lengths_Q[order])
    row_L, slot_L = queries.row_Q[order][which_L], queries.slot_Q[order][which_L]

    # Row, sentence and word in one number: numbers sort five times as fast as their order is found.
    key_L = row_L.astype(np.uint64) << np.uint64(38)
    key_L |= index.postings_L[place_L].astype(np.uint64) << np.uint64(6)
    key_L |= slot_L.astype(np.uint64)
    key_L.sort()
    pair_L = key_L >> np.uint64(6)
    same_L = pair_L[1:] == pair_L[:-1]
    several_L = np.zeros(len(key_L), np.bool_)
    several_L[1:] = same_L
    several_L[:-1] |= same_L
    # Most share one word only: they go before anything is computed of them.
    key_L, pair_L = key_L[several_L], pair_L[several_L]
    if not len(key_L):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    first_G = np.flatnonzero(np.concatenate([[True], pair_L[1:] != pair_L[:-1]]))
    row_L, slot_L = (key_L >> np.uint64(38)).astype(np.int64), (key_L & np.uint64(63)).astype(np.int64)
    score_G = np.add.reduceat(queries.weight_SX[row_L, slot_L], first_G)
    row_G = row_L[first_G]
    sentence_G = (pair_L[first_G] & np.uint64(0xFFFFFFFF)).astype(np.int64)
    passage_G = index.passage_of(sentence_G)
    fit_G = passage_G != queries.passages_S[row_G]
    fit_G &= index.arrays.splits[index.document_of(passage_G)] == queries.splits_S[row_G]
    row_G, sentence_G, score_G = row_G[fit_G], sentence_G[fit_G], score_G[fit_G]
    order = np.lexsort((sentence_G, -score_G, row_G))
    row_G, sentence_G = row_G[order], sentence_G[order]
    rank_G = np.arange(len(row_G)) - np.searchsorted(row_G, row_G)
    return row_G[rank_G < FOUND], sentence_G[rank_G < FOUND]


def _shared(index: SentenceIndex, queries: _Queries, row_T: Int64s, sentence_T: Int64s) -> NDArray[np.bool_]:
    """Which words of its sentence each one that was found has [T, X], common words included."""
    starts_T = index.arrays.word_starts[sentence_T]
    pair_J, place_J = _ranges(starts_T, index.arrays.word_starts[sentence_T + 1] - starts_T)
    key_Q = queries.row_Q << 32 | queries.word_Q
    key_J = row_T[pair_J] << 32 | index.arrays.words[place_J]
    at_J = np.minimum(np.searchsorted(key_Q, key_J), len(key_Q) - 1)
    hit_J = key_Q[at_J] == key_J
    shared_TX = np.zeros((len(row_T), _X), np.bool_)
    shared_TX[pair_J[hit_J], queries.slot_Q[at_J[hit_J]]] = True
    return shared_TX


class _Matching:
    """Which of the sentences found are evidence for which blanks."""

    def __init__(
        self,
        index: SentenceIndex,
        queries: _Queries,
        row_T: Int64s,
        sentence_T: Int64s,
        shared_TX: NDArray[np.bool_],
    ) -> None:
        self._index, self._queries = index, queries
        self._sentence_T, self._shared_TX = sentence_T, shared_TX
        self._begins = np.searchsorted(row_T, np.arange(len(queries.sentences_S) + 1))
        sizes_T = index.arrays.word_starts[sentence_T + 1] - index.arrays.word_starts[sentence_T]
        # The same sentence again, as in two editions of an encyclopedia, teaches nothing but to copy.
        words_S = (queries.weight_SX > 0).sum(axis=1)
        self._same_T: NDArray[np.bool_] = (shared_TX.sum(axis=1) >= 0.9 * words_S[row_T]) & (
            sizes_T <= 1.2 * words_S[row_T]
        )
        self._chance = float(np.log(index.num_sentences)) + MARGIN

    def matches(self, seed: int) -> list[Match]:
        """All that can be asked, sentence by sentence."""
        made = []
        for row, sentence in enumerate(self._queries.sentences_S.tolist()):
            if self._begins[row] == self._begins[row + 1]:
                continue
            blanks = self._index.arrays.blanks[slice(*self._index.arrays.blank_starts[sentence : sentence + 2])]
            draws = np.random.default_rng([seed, sentence]).exponential(size=len(blanks))
            order = np.argsort(draws / PREFERENCE[blanks[:, 2]])
            for start, end, kind, first, last in blanks[order[:BLANKS]].tolist():
                if kind in (NAME, WORD) and first == 0 and not self._queries.initial_S[row]:
                    continue
                match = self._match(row, (start, end, kind), self._queries.slots_of[row][first:last])
                if match is not None:
                    made.append(match)
        return made

    def _match(self, row: int, blank: tuple[int, int, int], slots: Int64s) -> Match | None:
        queries = self._queries
        few = slice(self._begins[row], self._begins[row + 1])
        slots = slots[slots < _X]
        if not len(slots):
            return None
        weight_X, counts_X = queries.weight_SX[row].copy(), queries.counts_SX[row].copy()
        answer = float(weight_X[slots].max())
        weight_X[slots] = 0
        counts_X[slots] = False
        names_X = np.where(queries.name_SX[row] & counts_X, weight_X, 0)
        about = int(np.argmax(names_X if names_X.any() else weight_X))
        shared_TX = self._shared_TX[few]
        holds_T = np.asarray(shared_TX[:, slots].all(axis=1))
        weight_T = shared_TX @ weight_X
        fits_T: NDArray[np.bool_] = holds_T & shared_TX[:, about] & ~self._same_T[few]
        fits_T &= (shared_TX & counts_X).sum(axis=1) >= 2
        # Names alone are shared by any two lists of them.
        fits_T &= (shared_TX & (counts_X & ~queries.name_SX[row])).any(axis=1)
        fits_T &= (weight_T >= COVERAGE * weight_X.sum()) & (weight_T + answer >= self._chance)
        if not fits_T.any():
            return None
        order = np.argsort(-weight_T, kind="stable")
        fits_T &= weight_T >= NEARLY_BEST * weight_T[fits_T].max()
        found_T = self._sentence_T[few][order]
        return Match(
            sentence=int(queries.sentences_S[row]),
            titled=bool(queries.titled_S[row]),
            blank=blank,
            found=found_T.tolist(),
            evidence=fits_T[order].tolist(),
            holds=holds_T[order].tolist(),
            alike=((self._index.arrays.kinds[found_T] & (1 << blank[2])) != 0).tolist(),
        )
