"""BM25 over the rows of an index, and the fusion of rankings. The only importer of bm25s and of PyStemmer.

Arrays: N rows, V words of the corpus, W words of one part, P postings (a word in a row), T tokens, Q queries, K results,
R rows of one passage.

A word is the 64-bit hash of its stem: no list of words is held in memory, words that come later need no number, and two of 20
million words share a hash with a probability of 1e-5. Scores are computed when a part is written, as bm25s does, and
summed up by bm25s. Its own choice of the best rows, an `argpartition` over all of them, took 70 times as long as the sum
(400,000 rows), the one here as long as the sum; with its numba backend questions were 1.3 times as fast, passages 1.8 times.

Source: Robertson and Zaragoza 2009, in Lucene's variant as of Kamphuis et al. 2020 (`method="lucene"` of bm25s): rank by
sum over the query's tokens of ln(1 + (N - df + 0.5) / (df + 0.5)) * tf / (tf + K1 * (1 - B + B * length / average length)).
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, chain, pairwise
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retro.artifact import read_json, write_atomically, write_json
from retro.chunks import load_array, name_hash, save_array
from retro.errors import ConfigError, FormatError

K1 = 1.5
"""How fast repetitions of a word stop counting."""
B = 0.75
"""How much long rows are marked down."""
STATISTICS = "statistics.json"
"""Language and counts of the rows that were there at the build; written last."""
WORDS = "words.npy"
"""Hashes of the words at the build, sorted [V] uint64."""
FREQUENCIES = "frequencies.npy"
"""Rows with each of them [V] int64."""
SCORED, COUNTED = ".bm25", ".counts"
"""Suffixes of a part, and of one that waits for the counts of all."""
PART_POSTINGS = 8_000_000
"""A part ends after the shard with which it reaches so many: 350,000 rows of 50 English words. Bounds the memory of a build:
an English corpus took 400 MiB, a Chinese one with 2 million characters to a shard 600 MiB."""
LANES = 64
"""The best scores are looked for in a table of so many lines."""
SCORES_AT_ONCE = 1 << 22
"""Postings whose scores are computed in one go."""

Words = NDArray[np.uint64]
Int64s = NDArray[np.int64]
Found = tuple[NDArray[np.float32], Int64s]
"""Scores and rows [Q, K], best first; -inf and -1 where there is no further row."""


class LexicalIndex:
    """BM25 over the rows of an index, in parts of consecutive rows, which are memory-mapped.

    All parts are scored with the counts of the rows of the build, so that scores can be compared; rows that are added later do not
    change these counts, and a word that was not there at the build counts as one of no row. Nothing here changes after it
    was opened: any number of threads may search.

    Attributes:
        num_rows: N.
    """

    def __init__(self, statistics: "_Statistics", parts: Sequence["_Part"]) -> None:
        self._statistics = statistics
        self._language = statistics.language
        self._parts = parts
        self._first_rows = list(accumulate((part.num_rows for part in parts), initial=0))
        self.num_rows = self._first_rows[-1]

    @classmethod
    def build(
        cls,
        folder: Path,
        shards: Callable[[], Iterable[Sequence[str]]],
        *,
        language: str = "english",
        part_postings: int = PART_POSTINGS,
        progress: Callable[[int], None] | None = None,
    ) -> list[str]:
        """Makes the index of a corpus; goes on where an earlier call was killed, and ends with the same bytes.

        Every text is tokenized once: parts are counted, then scored when the counts of all are known.

        Args:
            folder: Of this index alone; whoever changes the corpus or the language empties it.
            shards: Gives the texts of all rows in order, shard by shard.
            language: One that Snowball stems, or `none` for words as they stand; see `_tokenizer`.
            part_postings: See PART_POSTINGS.
            progress: Called with the number of rows counted.

        Returns:
            Names of the parts, in the order of rows.

        Raises:
            ConfigError: The language is unknown, or the folder holds an index in another one.
        """
        _tokenizer(language)  # refuses an unknown language
        if (folder / STATISTICS).is_file():
            found = _Statistics.load(folder)
            if found.language != language:
                raise ConfigError(f"{folder} is in the language {found.language!r}, not {language!r}: remove it first")
            return found.parts
        waiting = (texts for texts in shards() if len(texts))
        names: list[str] = []
        done = 0
        for first in waiting:
            names.append(f"part-{len(names):05d}")
            path = _present(folder, names[-1])
            known = _Postings.open(path, np.int32) if path.is_file() else None
            counted: list[_Postings] = []
            rows = postings = 0
            for texts in chain([first], waiting):
                rows += len(texts)
                if known is None:
                    counted.append(_count(texts, language))
                    postings += len(counted[-1].rows_P)
                if progress is not None:
                    progress(done + rows)
                if postings >= part_postings if known is None else rows >= known.num_rows:
                    break
            if known is None:
                _join(counted).write(path)
            done += rows
        _score_parts(folder, names, language)
        return names

    @classmethod
    def add_part(cls, folder: Path, name: str, texts: Sequence[str]) -> None:
        """Writes a part for rows that were added, scored with the counts of the build; no other file is altered.

        Args:
            folder: A finished index.
            name: Of the part; one that is there already (of a call that was killed) is replaced.
            texts: Of the rows: at most some 100,000, which are counted in one go.

        Raises:
            FormatError: The index is missing or damaged.
        """
        statistics = _Statistics.load(folder)
        statistics.score(_count(texts, statistics.language)).write(folder / (name + SCORED))

    @classmethod
    def open(cls, folder: Path, parts: Sequence[str]) -> "LexicalIndex":
        """Opens an index.

        Args:
            folder: Where it was built.
            parts: Names of its parts, in the order of rows.

        Raises:
            FormatError: A part or the statistics are missing or damaged.
        """
        statistics = _Statistics.load(folder)
        return cls(statistics, [_Part(_Postings.open(folder / (name + SCORED), np.float32)) for name in parts])

    @staticmethod
    def files(folder: Path, parts: Sequence[str]) -> list[Path]:
        """All files of an index of these parts."""
        names = [STATISTICS, WORDS, FREQUENCIES, *(name + SCORED for name in parts)]
        return [folder / name for name in names]

    def search(self, queries: Sequence[str], k: int, keep_N: NDArray[np.bool_] | None = None) -> Found:
        """The best rows of each query.

        Args:
            queries: Texts.
            k: How many.
            keep_N: Rows that may be found; None for all.

        Returns:
            Scores and rows [Q, k], best first; of equal scores the lower row comes first. A row that shares no word with the query
            is not found; where there are no more, the score is -inf and the row -1.

        Raises:
            ConfigError: k is below 1, or `keep_N` is not for all rows.
        """
        if k < 1:
            raise ConfigError(f"k = {k}: ask for at least one row")
        if keep_N is not None and keep_N.shape != (self.num_rows,):
            raise ConfigError(f"the filter has shape {list(keep_N.shape)}, there are {self.num_rows:,} rows")
        words = _query_words(queries, self._language)
        scores_QK = np.full((len(queries), k), -np.inf, np.float32)
        rows_QK = np.full((len(queries), k), -1, np.int64)
        for first, part in zip(self._first_rows, self._parts, strict=False):
            keep = None if keep_N is None else keep_N[first : first + part.num_rows]
            if keep is not None and not keep.any():
                continue
            found_scores, found_rows = part.search(part.numbers(*words), min(k, part.num_rows), keep)
            found_rows[found_rows >= 0] += first
            # Stable, and earlier parts come first: of equal scores the lower row wins.
            scores = np.concatenate([scores_QK, found_scores], axis=1)
            order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            scores_QK = np.take_along_axis(scores, order, axis=1)
            rows_QK = np.take_along_axis(np.concatenate([rows_QK, found_rows], axis=1), order, axis=1)
        return scores_QK, rows_QK

    def score(self, queries: Sequence[str], rows_QK: Int64s) -> NDArray[np.float32]:
        """The scores of given rows, bit for bit those of `search`; only their own postings are looked up.

        Args:
            queries: Texts.
            rows_QK: Rows for each query; -1 for none.

        Returns:
            Scores [Q, K]: 0 for a row that shares no word with the query, -inf for the row -1.

        Raises:
            ConfigError: A row that is not there.
        """
        if rows_QK.ndim != 2 or len(rows_QK) != len(queries):
            raise ConfigError(
                f"rows have the shape {list(rows_QK.shape)}: give a line for each of {len(queries)} queries"
            )
        if rows_QK.size and not -1 <= rows_QK.min() <= rows_QK.max() < self.num_rows:
            raise ConfigError(f"rows {rows_QK.min()} to {rows_QK.max()} are asked for, there are {self.num_rows:,}")
        words = _query_words(queries, self._language)
        scores_QK = np.where(rows_QK < 0, -np.inf, 0).astype(np.float32)
        for first, part in zip(self._first_rows, self._parts, strict=False):
            here_QK = (rows_QK >= first) & (rows_QK < first + part.num_rows)
            if not here_QK.any():
                continue
            numbers = part.numbers(*words)
            for query in np.flatnonzero(here_QK.any(axis=1)):
                here_K = here_QK[query]
                scores_QK[query, here_K] = part.score(numbers[query], rows_QK[query, here_K] - first)
        return scores_QK

    def overlap(
        self, queries: Sequence[str], rows_QKR: Int64s, dead_N: NDArray[np.bool_] | None = None
    ) -> NDArray[np.float32]:
        """How much of each query stands in passages, whatever their length and however often.

        A word weighs what it does in BM25, ln(1 + (N - df + 0.5) / (df + 0.5)); one that no row has weighs nothing, nor does one
        that no row had at the build and only removed ones have had since.

        Args:
            queries: Texts.
            rows_QKR: The R rows that each passage consists of; -1 for none.
            dead_N: Whether each row was removed; None where none was. What was removed at last leaves no trace so.

        Returns:
            The sum of the weights of the words that stand in one of the rows, divided by the root of the sum of all the query's
            [Q, K]: the product of a vector of the query, which has length 1, and one of the passage, both of the roots of
            weights. So long queries do not outweigh other evidence.

        Source: the sum is that of Robertson and Sparck Jones 1976 where no relevant rows are known; the root is ours.
        """
        words_T, lengths_Q = _query_words(queries, self._language)
        query_T = np.repeat(np.arange(len(lengths_Q)), lengths_Q)
        known_T = np.zeros(len(words_T), np.bool_)
        is_later_T = _positions(self._statistics.words_V, words_T) < 0  # not there at the build
        found_TK = np.zeros((len(words_T), rows_QKR.shape[1]), np.bool_)
        for first, part in zip(self._first_rows, self._parts, strict=False):
            at_T = _positions(part.postings.words_W, words_T)
            known_T |= (at_T >= 0) & ~is_later_T
            for token in np.flatnonzero((at_T >= 0) & ~known_T).tolist():
                dead_n = None if dead_N is None else dead_N[first : first + part.num_rows]
                known_T[token] = dead_n is None or not dead_n[part.postings.rows_of(at_T[token])].all()
            # Rows of other parts are moved beside this one's, where no word stands: 32 bits may be too few for them.
            local_QKR = np.clip(rows_QKR - first, -1, part.num_rows).astype(np.int32)
            here_Q = np.any((local_QKR >= 0) & (local_QKR < part.num_rows), axis=(1, 2))
            for token in np.flatnonzero((at_T >= 0) & here_Q[query_T]).tolist():
                found_KR, _ = part.postings.look_up(at_T[token], local_QKR[query_T[token]])
                found_TK[token] |= np.any(found_KR, axis=1)
        weight_T = self._statistics.weights(words_T) * known_T
        overlap_QK = np.zeros(rows_QKR.shape[:2])
        np.add.at(overlap_QK, query_T, weight_T[:, None] * found_TK)
        total_Q = np.bincount(query_T, weight_T, len(queries))
        overlap_QK /= np.sqrt(np.where(total_Q > 0, total_Q, 1))[:, None]
        return overlap_QK.astype(np.float32)


def fuse(rankings: Sequence[Found], k: int, constant: int = 60) -> Found:
    """Reciprocal rank fusion: a row scores the sum of 1 / (constant + rank) over the rankings that have it, ranks from 1.

    Args:
        rankings: Scores and rows [Q, K] of each, best first; -1 is skipped. K may differ; no row is twice in one line.
        k: How many rows.
        constant: The larger, the less the first ranks stand out.

    Returns:
        Fused scores and rows [Q, k], best first, the lower row first where scores are equal; -inf and -1 where there are no more.

    Source: Cormack, Clarke and Buettcher, SIGIR 2009.
    """
    num_queries = len(rankings[0][1])
    queries, rows, shares = [], [], []
    for _, rows_QK in rankings:
        keep_QK = rows_QK >= 0
        queries.append(np.nonzero(keep_QK)[0])
        rows.append(rows_QK[keep_QK])
        shares.append(1 / (constant + np.cumsum(keep_QK, axis=1)[keep_QK]))
    query_S, row_S, share_S = np.concatenate(queries), np.concatenate(rows), np.concatenate(shares)
    # Shares are summed from the largest: the same ranks give the same sum to the last bit, whichever rankings they are from.
    order = np.lexsort([-share_S, row_S, query_S])
    query_S, row_S, share_S = query_S[order], row_S[order], share_S[order]
    starts = np.flatnonzero(np.diff(query_S, prepend=-1) | np.diff(row_S, prepend=-1))
    query_S, row_S, score_S = query_S[starts], row_S[starts], np.add.reduceat(np.append(share_S, 0.0), starts)
    order = np.lexsort([row_S, -score_S, query_S])
    query_S, row_S, score_S = query_S[order], row_S[order], score_S[order]
    rank_S = np.arange(len(query_S)) - np.searchsorted(query_S, query_S)
    best = rank_S < k
    scores_QK = np.full((num_queries, k), -np.inf, np.float32)
    rows_QK = np.full((num_queries, k), -1, np.int64)
    scores_QK[query_S[best], rank_S[best]] = score_S[best]
    rows_QK[query_S[best], rank_S[best]] = row_S[best]
    return scores_QK, rows_QK


# --- words ----------------------------------------------------------------------------------------------------------

_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    "\u3005\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff"  # Japanese, Chinese
    "\uac00-\ud7af"  # Korean, whose words carry their particles
)
_RUN = re.compile(f"([{_UNSPACED}]+)|[^{_UNSPACED}]+")


@cache
def _splitter(language: str) -> Callable[[str], list[str]]:
    """Cuts lower-case text into words."""
    # `\w` alone would cut a word at each vowel sign of Hindi, Tamil or Arabic.
    marks = "".join(chr(c) for c in range(0x300, 0x10000) if unicodedata.category(chr(c)).startswith("M"))
    # What an English apostrophe leaves behind is no word: it's, France's, don't, they'll.
    suffix = r"(?:['\u2019](?:s|t|d|m|ll|re|ve)\b)?" if language == "english" else ""
    find_words = re.compile(rf"([\w{marks}]+){suffix}").findall

    def split(text: str) -> list[str]:
        words: list[str] = find_words(text)
        return words if text.isascii() else list(chain.from_iterable(map(_pieces, words)))

    return split


def _pieces(word: str) -> Iterator[str]:
    """A word as it stands; of a script without spaces between words each character and each pair of neighbors."""
    for run in _RUN.finditer(word):
        yield from chain(run[0], map(add, run[0], run[0][1:])) if run[1] else (run[0],)


def _tokenizer(language: str) -> Any:
    """A tokenizer of bm25s with an empty vocabulary.

    Words are runs of letters, digits, marks and underscores, single ones included, in lower case and Unicode's NFKC. Stop words
    (bm25s' list, where it has one) are left out, the rest is stemmed by Snowball. English has the longer list, with question words
    but without single letters, so that "vitamin d" keeps its d: on Simple Wikipedia (400,000 rows, 3,500 questions) it finds as
    many answers as Lucene's short list, with half the postings per question. `none`: no stemming, no stop words.

    Raises:
        ConfigError: The language is unknown.
    """
    import bm25s
    import Stemmer

    if language not in (known := [*Stemmer.algorithms(), "none"]):
        raise ConfigError(f"BM25 does not know the language {language!r}: use one of {', '.join(known)}")
    stop_words: Sequence[str] = getattr(bm25s.stopwords, f"STOPWORDS_{language.upper()}", ())
    if language == "english":
        stop_words = [word for word in bm25s.stopwords.STOPWORDS_EN_PLUS if len(word) > 1 or word in "ai"]
    stemmer = None if language == "none" else Stemmer.Stemmer(language)
    return bm25s.tokenization.Tokenizer(splitter=_splitter(language), stopwords=stop_words, stemmer=stemmer)


def _tokenize(texts: Sequence[str], language: str) -> tuple[Words, Int64s, Int64s]:
    """Words of some texts.

    Returns:
        The different words, sorted [W]; the number of each token's word [T]; tokens of each text [N].
    """
    tokenizer = _tokenizer(language)
    normalized = [unicodedata.normalize("NFKC", text) for text in texts]
    ids = tokenizer.tokenize(normalized, update_vocab=True, show_progress=False, allow_empty=False)
    # A dictionary of word -> id, in the order of ids.
    vocabulary = tokenizer.get_vocab_dict()
    hashes = np.fromiter(map(name_hash, vocabulary), np.uint64, len(vocabulary))
    words_W, numbers = np.unique(hashes, return_inverse=True)
    lengths_N = np.fromiter(map(len, ids), np.int64, len(ids))
    ids_T = np.fromiter(chain.from_iterable(ids), np.int64, lengths_N.sum())
    return words_W, numbers[ids_T], lengths_N


def _query_words(queries: Sequence[str], language: str) -> tuple[Words, Int64s]:
    """Words of all queries, in order and with repetitions [T], and how many each query has [Q]."""
    words_W, numbers_T, lengths_Q = _tokenize(queries, language)
    return words_W[numbers_T], lengths_Q


def _positions(words_W: Words, wanted: Words) -> Int64s:
    """Where words stand in a sorted list; -1 for those that are not in it."""
    if len(words_W) == 0:
        return np.full(len(wanted), -1, np.int64)
    at = np.minimum(np.searchsorted(words_W, wanted), len(words_W) - 1)
    return np.where(words_W[at] == wanted, at, -1)


# --- postings -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Postings:
    """Which words are in which rows, by word: a sparse matrix in compressed columns."""

    words_W: Words
    """Sorted."""
    starts: Int64s
    """Where each word's postings start, and the end of the last [W + 1]."""
    rows_P: NDArray[np.int32]
    """Ascending for each word."""
    values_P: NDArray[Any]
    """Occurrences of the word in the row, int32; or what they add to the row's score, float32."""
    lengths_N: NDArray[np.int32]
    """Tokens of each row."""

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self.lengths_N)

    @property
    def frequencies(self) -> Int64s:
        """Rows with each word [W]."""
        return np.diff(self.starts)

    def rows_of(self, number: int) -> NDArray[np.int32]:
        """Rows that a word stands in, ascending."""
        return self.rows_P[self.starts[number] : self.starts[number + 1]]

    def look_up(self, number: int, rows: NDArray[np.int32]) -> tuple[NDArray[np.bool_], NDArray[Any]]:
        """Whether a word stands in rows of any shape, and its values there; where it does not, the values mean nothing.

        The rows are int32: another type would have searchsorted convert all postings.
        """
        word = slice(self.starts[number], self.starts[number + 1])
        rows_P = self.rows_P[word]
        at = np.minimum(np.searchsorted(rows_P, rows), len(rows_P) - 1)
        return rows_P[at] == rows, self.values_P[word][at]

    def write(self, path: Path) -> None:
        """One file: N, W and P in 64 bits each, then the arrays as they stand."""
        sizes = np.array([self.num_rows, len(self.words_W), len(self.rows_P)], np.int64)

        def write(file: Any) -> None:
            for array in (sizes, self.words_W, self.starts, self.rows_P, self.values_P, self.lengths_N):
                file.write(np.ascontiguousarray(array).data)

        write_atomically(path, write)

    @classmethod
    def open(cls, path: Path, values: type[np.generic]) -> "_Postings":
        """Memory-maps a file, by one descriptor.

        Raises:
            FormatError: It is missing or damaged.
        """
        damaged = FormatError(f"{path} is damaged: build the BM25 index again")
        try:
            content = np.asarray(np.memmap(path, np.uint8, mode="r"))
        except FileNotFoundError as error:
            raise FormatError(f"{path} is missing: build the BM25 index again") from error
        except (OSError, ValueError) as error:
            raise damaged from error
        if len(content) < 24 or min(sizes := content[:24].view(np.int64).tolist()) < 0:
            raise damaged
        N, W, P = sizes
        layout: dict[str, tuple[type[np.generic], int]] = {
            "words_W": (np.uint64, W),
            "starts": (np.int64, W + 1),
            "rows_P": (np.int32, P),
            "values_P": (values, P),
            "lengths_N": (np.int32, N),
        }
        ends = list(accumulate((n * np.dtype(kind).itemsize for kind, n in layout.values()), initial=24))
        if len(content) != ends[-1]:
            raise damaged
        arrays: dict[str, NDArray[Any]] = {
            name: content[first:end].view(kind)
            for (name, (kind, _)), (first, end) in zip(layout.items(), pairwise(ends), strict=True)
        }
        if arrays["starts"][0] != 0 or arrays["starts"][-1] != P:
            raise damaged
        return cls(**arrays)


def _count(texts: Sequence[str], language: str) -> _Postings:
    """Counts words in rows."""
    words_W, numbers_T, lengths_N = _tokenize(texts, language)
    keys_T = numbers_T * len(texts) + np.repeat(np.arange(len(texts)), lengths_N)
    keys_P, counts_P = np.unique(keys_T, return_counts=True)
    numbers_P, rows_P = np.divmod(keys_P, max(len(texts), 1))
    return _Postings(
        words_W=words_W,
        starts=np.searchsorted(numbers_P, np.arange(len(words_W) + 1)),
        rows_P=rows_P.astype(np.int32),
        values_P=counts_P.astype(np.int32),
        lengths_N=lengths_N.astype(np.int32),
    )


def _join(shards: Sequence[_Postings]) -> _Postings:
    """The postings of shards that follow each other, as one."""
    words_W = np.unique(np.concatenate([shard.words_W for shard in shards]))
    numbers = [np.searchsorted(words_W, shard.words_W) for shard in shards]
    frequencies_W = np.zeros(len(words_W), np.int64)
    for shard, number in zip(shards, numbers, strict=True):
        frequencies_W[number] += shard.frequencies
    starts = np.concatenate([[0], np.cumsum(frequencies_W)])
    rows_P, counts_P = np.empty(starts[-1], np.int32), np.empty(starts[-1], np.int32)
    free_W = starts[:-1].copy()
    first = 0
    for shard, number in zip(shards, numbers, strict=True):
        # Each word's postings of this shard go, in one piece, behind those of the shards before.
        moved = np.repeat(free_W[number] - shard.starts[:-1], shard.frequencies)
        target = moved + np.arange(len(shard.rows_P))
        rows_P[target] = shard.rows_P + first
        counts_P[target] = shard.values_P
        free_W[number] += shard.frequencies
        first += shard.num_rows
    lengths_N = np.concatenate([shard.lengths_N for shard in shards])
    return _Postings(words_W=words_W, starts=starts, rows_P=rows_P, values_P=counts_P, lengths_N=lengths_N)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Statistics:
    """What the scores depend on beside the row itself."""

    language: str
    rows: int
    """N at the build."""
    tokens: int
    """Of all these rows."""
    parts: list[str]
    """Names of the parts of the build."""
    words_V: Words
    """Sorted."""
    frequencies_V: Int64s
    """Rows with each word."""

    @classmethod
    def load(cls, folder: Path) -> "_Statistics":
        """Raises FormatError where they are missing or damaged."""
        record = read_json(folder / STATISTICS)
        if not isinstance(record, dict) or set(record) != {"language", "rows", "tokens", "parts"}:
            raise FormatError(f"{folder / STATISTICS} is damaged: build the BM25 index again")
        words_V, frequencies_V = load_array(folder / WORDS), load_array(folder / FREQUENCIES)
        if words_V.dtype != np.uint64 or frequencies_V.dtype != np.int64 or words_V.shape != frequencies_V.shape:
            raise FormatError(f"{folder / WORDS} and {FREQUENCIES} do not fit together: build the BM25 index again")
        return cls(words_V=words_V, frequencies_V=frequencies_V, **record)

    def weights(self, words: Words) -> NDArray[np.float32]:
        """Of each word, ln(1 + (N - df + 0.5) / (df + 0.5)): the rarer, the larger."""
        at = _positions(self.words_V, words)
        df = np.zeros(len(at), np.int64)
        df[at >= 0] = self.frequencies_V[at[at >= 0]]
        # float32, as in bm25s.
        weights: NDArray[np.float32] = np.log(1 + (self.rows - df + 0.5) / (df + 0.5)).astype(np.float32)
        return weights

    def score(self, counts: _Postings) -> _Postings:
        """The same postings with scores in place of counts."""
        idf_P = self.weights(counts.words_W).repeat(counts.frequencies)
        average = self.tokens / max(self.rows, 1) or 1.0
        damping_N = K1 * ((1 - B) + B * counts.lengths_N / average)
        scores_P = np.empty(len(idf_P), np.float32)
        for first in range(0, len(scores_P), SCORES_AT_ONCE):
            block = slice(first, first + SCORES_AT_ONCE)
            tf = counts.values_P[block]
            scores_P[block] = idf_P[block] * (tf / (damping_N[counts.rows_P[block]] + tf))
        return replace(counts, values_P=scores_P)


def _present(folder: Path, name: str) -> Path:
    """The file of a part while it is built: scored, or else counted or to be counted. Both have all but the scores in common."""
    scored = folder / (name + SCORED)
    return scored if scored.is_file() else folder / (name + COUNTED)


def _score_parts(folder: Path, names: Sequence[str], language: str) -> None:
    """From counts to scores, and the statistics, last."""
    words_V, frequencies_V = np.empty(0, np.uint64), np.empty(0, np.int64)
    rows = tokens = 0
    for name in names:
        part = _Postings.open(_present(folder, name), np.int32)
        at_W = _positions(words_V, part.words_W)
        known_W = at_W >= 0
        frequencies_V[at_W[known_W]] += part.frequencies[known_W]
        new_at = np.searchsorted(words_V, part.words_W[~known_W])
        words_V = np.insert(words_V, new_at, part.words_W[~known_W])
        frequencies_V = np.insert(frequencies_V, new_at, part.frequencies[~known_W])
        rows += part.num_rows
        tokens += int(part.lengths_N.sum(dtype=np.int64))
    record: dict[str, Any] = {"language": language, "rows": rows, "tokens": tokens, "parts": list(names)}
    statistics = _Statistics(words_V=words_V, frequencies_V=frequencies_V, **record)
    save_array(folder / WORDS, words_V)
    save_array(folder / FREQUENCIES, frequencies_V)
    for name in names:
        scored, counted = (folder / (name + suffix) for suffix in (SCORED, COUNTED))
        if not scored.is_file():
            statistics.score(_Postings.open(counted, np.int32)).write(scored)
        counted.unlink(missing_ok=True)
    write_json(folder / STATISTICS, record)


class _Part:
    """Scored postings, summed up by bm25s."""

    def __init__(self, postings: _Postings) -> None:
        import bm25s

        self.postings = postings
        self.num_rows = postings.num_rows
        self._bm25 = bm25s.BM25(method="lucene", k1=K1, b=B)
        # Scores for a few rows more, which have no postings and stay 0, so that they fill a table.
        self._padded_rows = -(-self.num_rows // LANES) * LANES
        self._bm25.nonoccurrence_array = None
        self._bm25.scores = {
            "data": postings.values_P,
            "indices": postings.rows_P,
            "indptr": postings.starts,
            "num_docs": self._padded_rows,
        }

    def numbers(self, words_T: Words, lengths_Q: Int64s) -> list[NDArray[np.int32]]:
        """Numbers in this part of each query's words; those that it lacks are left out."""
        at_T = _positions(self.postings.words_W, words_T).astype(np.int32)
        query_T = np.repeat(np.arange(len(lengths_Q)), lengths_Q)
        ends_Q = np.searchsorted(query_T[at_T >= 0], np.arange(len(lengths_Q)), side="right")
        return np.split(at_T[at_T >= 0], ends_Q)[:-1]

    def search(self, numbers_Q: Sequence[NDArray[np.int32]], k: int, keep_N: NDArray[np.bool_] | None) -> Found:
        """The best rows of each query, numbered in this part."""
        weights_N = None
        if keep_N is not None and not keep_N.all():
            weights_N = np.zeros(self._padded_rows, np.float32)
            weights_N[: self.num_rows] = keep_N
        scores_QK = np.full((len(numbers_Q), k), -np.inf, np.float32)
        rows_QK = np.full((len(numbers_Q), k), -1, np.int64)
        for query, numbers in enumerate(numbers_Q):
            if len(numbers):
                scores, rows = _best(self._bm25.get_scores_from_ids(numbers, weight_mask=weights_N), k)
                scores_QK[query, : len(rows)] = scores
                rows_QK[query, : len(rows)] = rows
        return scores_QK, rows_QK

    def score(self, numbers: NDArray[np.int32], rows_K: Int64s) -> NDArray[np.float32]:
        """Scores of given rows, numbered in this part."""
        wanted_K = rows_K.astype(np.int32)
        scores_K = np.zeros(len(wanted_K), np.float32)
        for number in numbers.tolist():
            found_K, values_K = self.postings.look_up(number, wanted_K)
            scores_K += np.where(found_K, values_K, np.float32(0))
        return scores_K


def _best(scores_N: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], Int64s]:
    """The k largest of many scores, without those that are 0; of equal ones the first."""
    table = scores_N.reshape(LANES, -1)
    width = table.shape[1]
    # The k-th largest of the columns' maxima: at least k scores reach it, and only few columns have to be looked at.
    maxima = table.max(axis=0)
    threshold = np.partition(maxima, width - k)[width - k] if k < width else np.float32(0)
    threshold = max(threshold, np.finfo(np.float32).tiny)
    columns = np.flatnonzero(maxima >= threshold)
    found = table[:, columns]
    lane, column = np.nonzero(found >= threshold)
    scores = found[lane, column]
    order = np.argsort(-scores, kind="stable")[:k]
    return scores[order], lane[order] * width + columns[column[order]]
