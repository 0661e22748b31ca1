"""BM25 against the formula in plain Python and against bm25s over everything; fusion against exact fractions."""

import json
import math
import shutil
import unicodedata
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import bm25s
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from index_builder import lexical
from index_builder.lexical import LexicalIndex, fuse
from retro.errors import ConfigError, FormatError, StorageError

Float64s = NDArray[np.float64]


def in_shards(texts: Sequence[str], *sizes: int) -> Callable[[], Iterator[Sequence[str]]]:
    """Texts in shards of these sizes; the rest is the last."""

    def shards() -> Iterator[Sequence[str]]:
        first = 0
        for size in sizes:
            yield texts[first : first + size]
            first += size
        yield texts[first:]

    return shards


def build(folder: Path, texts: Sequence[str], *sizes: int, language: str = "none", **options: Any) -> LexicalIndex:
    return LexicalIndex.open(folder, LexicalIndex.build(folder, in_shards(texts, *sizes), language=language, **options))


def naive_bm25(
    rows: Sequence[Sequence[str]], queries: Sequence[Sequence[str]], counted: Sequence[Sequence[str]] | None = None
) -> Float64s:
    """The formula, word by word: scores of all rows [Q, N]; frequencies and average length are those of `counted`."""
    counted = rows if counted is None else counted
    frequencies = Counter(word for row in counted for word in set(row))
    average = sum(map(len, counted)) / max(len(counted), 1)
    scores = np.zeros((len(queries), len(rows)))
    for q, query in enumerate(queries):
        for n, row in enumerate(rows):
            for word in query:
                tf = row.count(word)
                if tf:
                    idf = math.log(1 + (len(counted) - frequencies[word] + 0.5) / (frequencies[word] + 0.5))
                    scores[q, n] += idf * tf / (tf + 1.5 * (1 - 0.75 + 0.75 * len(row) / average))
    return scores


def all_scores(index: LexicalIndex, queries: Sequence[str]) -> NDArray[np.float32]:
    return index.score(queries, np.tile(np.arange(index.num_rows), (len(queries), 1)))


def assert_best(
    found: tuple[NDArray[np.float32], NDArray[np.int64]], scores_QN: NDArray[np.float32], k: int, keep_N: Any = True
) -> None:
    """That what was found is what sorting all scores gives, to the last bit; of equal ones the lower row first."""
    ranked = np.where((scores_QN > 0) & keep_N, scores_QN, -np.inf)
    rows = np.argsort(-ranked, axis=1, kind="stable")[:, :k]
    scores = np.take_along_axis(ranked, rows, axis=1)
    rows = np.where(scores > 0, rows, -1)
    missing = ((0, 0), (0, k - rows.shape[1]))
    np.testing.assert_array_equal(found[0], np.pad(scores, missing, constant_values=-np.inf))
    np.testing.assert_array_equal(found[1], np.pad(rows, missing, constant_values=-1))


texts_of_few_words = st.lists(st.sampled_from("abcdefgh"), max_size=9).map(" ".join)


@given(
    texts=st.lists(texts_of_few_words, max_size=40),
    queries=st.lists(texts_of_few_words, max_size=4),
    sizes=st.lists(st.integers(0, 15), max_size=4),
    part_postings=st.integers(1, 200),
    k=st.integers(1, 50),
    data=st.data(),
)
@settings(max_examples=40)
def test_scores_and_ranking_equal_the_formula(
    texts: list[str], queries: list[str], sizes: list[int], part_postings: int, k: int, data: st.DataObject
) -> None:
    keep = data.draw(st.none() | st.lists(st.booleans(), min_size=len(texts), max_size=len(texts)))
    keep_N = None if keep is None else np.array(keep, np.bool_)
    with TemporaryDirectory() as folder:
        index = build(Path(folder) / "lexical", texts, *sizes, part_postings=part_postings)
        assert index.num_rows == len(texts)
        scores_QN = all_scores(index, queries)
        expected_QN = naive_bm25([text.split() for text in texts], [query.split() for query in queries])
        np.testing.assert_allclose(scores_QN, expected_QN, rtol=2e-6)
        assert_best(index.search(queries, k, keep_N), scores_QN, k, True if keep_N is None else keep_N)


@pytest.fixture(scope="module")
def passages(paragraphs: list[dict[str, Any]]) -> list[str]:
    """Pieces of 20 words of real text."""
    words = [paragraph["text"].split() for paragraph in paragraphs]
    return [" ".join(text[i : i + 20]) for text in words for i in range(0, len(text), 20)]


QUESTIONS = ["When did the 1973 oil crisis begin?", "who built the Amazon rainforest river", "price of oil, oil, OIL"]


def test_scores_equal_those_of_bm25s_over_everything_to_the_last_bit(tmp_path: Path, passages: list[str]) -> None:
    plain = [
        " ".join(bm25s.tokenize(text, stopwords=[], return_ids=False, show_progress=False)[0]) for text in passages
    ]
    peer = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    peer.index([text.split() for text in plain], show_progress=False)
    index = build(tmp_path, plain, 50, 30, part_postings=1)
    assert len(list(tmp_path.glob("*.bm25"))) == 3
    queries = ["oil crisis of the 1973 embargo oil", "amazon rainforest", *plain[::20]]
    expected = [peer.get_scores(query.split()) for query in queries]
    np.testing.assert_array_equal(all_scores(index, queries), expected)
    assert_best(index.search(queries, 10), np.array(expected), 10)


@pytest.mark.parametrize("sizes", [(), (1,), (7, 0, 50, 3), (20, 20, 20)])
def test_many_parts_give_what_one_gives(tmp_path: Path, passages: list[str], sizes: tuple[int, ...]) -> None:
    one = build(tmp_path / "one", passages, language="english")
    many = build(tmp_path / "many", passages, *sizes, language="english", part_postings=1)
    assert len(many._parts) == len([size for size in sizes if size]) + 1
    for found, expected in zip(many.search(QUESTIONS, 30), one.search(QUESTIONS, 30), strict=True):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(all_scores(many, QUESTIONS), all_scores(one, QUESTIONS))


def test_scores_are_the_same_in_pieces_of_any_size(
    tmp_path: Path, passages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = all_scores(build(tmp_path / "one", passages), QUESTIONS)
    monkeypatch.setattr(lexical, "SCORES_AT_ONCE", 7)
    np.testing.assert_array_equal(all_scores(build(tmp_path / "many", passages), QUESTIONS), expected)


def test_of_equal_scores_the_lower_row_comes_first_over_all_parts(tmp_path: Path) -> None:
    index = build(tmp_path, ["x", "a b", "a c", "y"] * 100, 90, 101, 53, part_postings=1)
    scores_QK, rows_QK = index.search(["a"], 150)
    assert rows_QK.tolist() == [sorted([*range(1, 400, 4)[:100], *range(2, 400, 4)])[:150]]
    assert len(set(scores_QK[0].tolist())) == 1


def test_the_best_of_many_scores_are_those_that_sorting_gives() -> None:
    random = np.random.default_rng(0)
    for levels in (2, 10, 10**6):  # many equal ones, few, none
        scores_N = random.integers(0, levels, 64 * 50).astype(np.float32)
        scores_N[random.random(len(scores_N)) < 0.5] = 0
        for k in (1, 10, 49, 50, 51, 1000, 5000):
            scores, rows = lexical._best(scores_N, k)
            expected = np.argsort(-scores_N, kind="stable")[: min(k, np.count_nonzero(scores_N))]
            np.testing.assert_array_equal(rows, expected)
            np.testing.assert_array_equal(scores, scores_N[expected])


def test_a_filter_acts_before_the_ranking(tmp_path: Path, passages: list[str]) -> None:
    index = build(tmp_path, passages, 60, 60, language="english", part_postings=1)
    scores_QN = all_scores(index, QUESTIONS)
    last_found = index.search(QUESTIONS, index.num_rows)[1][0]
    # All but the three worst rows of the first question are filtered out: the three come.
    keep_N = np.zeros(index.num_rows, np.bool_)
    keep_N[last_found[last_found >= 0][-3:]] = True
    found = index.search(QUESTIONS, 3, keep_N)
    assert set(found[1][0].tolist()) == set(np.flatnonzero(keep_N).tolist())
    assert_best(found, scores_QN, 3, keep_N)
    assert (index.search(QUESTIONS, 3, np.zeros(index.num_rows, np.bool_))[1] == -1).all()
    assert_best(index.search(QUESTIONS, 3, np.ones(index.num_rows, np.bool_)), scores_QN, 3)


def test_scores_of_given_rows_are_those_of_the_search(tmp_path: Path, passages: list[str]) -> None:
    index = build(tmp_path, passages, 60, 60, language="english", part_postings=1)
    scores_QK, rows_QK = index.search(QUESTIONS, index.num_rows)
    assert (rows_QK == -1).any()
    shuffled = np.random.default_rng(0).permutation(index.num_rows)
    np.testing.assert_array_equal(index.score(QUESTIONS, rows_QK[:, shuffled]), scores_QK[:, shuffled])


def test_a_word_that_is_asked_twice_counts_twice(tmp_path: Path) -> None:
    index = build(tmp_path, ["a b", "b c", "c d"])
    once, twice = all_scores(index, ["a b", "a a b"])
    assert twice[0] - once[0] == pytest.approx(all_scores(index, ["a"])[0, 0], rel=1e-6)


def naive_overlap(
    rows: Sequence[Sequence[str]],
    query: Sequence[str],
    passage: Sequence[int],
    counted: Sequence[Sequence[str]],
    known: Sequence[Sequence[str]],
) -> float:
    """Weights of the query's words that stand in rows of a passage, over the root of those of all that a known row has."""
    found = total = 0.0
    for word in query:
        df = sum(word in row for row in counted)
        weight = math.log(1 + (len(counted) - df + 0.5) / (df + 0.5))
        total += weight * any(word in row for row in known)
        here = any(word in rows[row] for row in passage if row >= 0)
        found += weight * here * any(word in row for row in known)
    return found / math.sqrt(total) if total else 0.0


@given(
    texts=st.lists(texts_of_few_words, max_size=30),
    added=st.lists(texts_of_few_words, max_size=5),
    queries=st.lists(texts_of_few_words, max_size=4),
    sizes=st.lists(st.integers(0, 15), max_size=4),
    data=st.data(),
)
@settings(max_examples=40)
def test_overlap_is_the_weight_of_the_words_that_stand_in_any_row_of_a_passage(
    texts: list[str], added: list[str], queries: list[str], sizes: list[int], data: st.DataObject
) -> None:
    queries = [*queries, "a a b", "a missing"]
    row = st.integers(-1, len(texts) + len(added) - 1)
    passages_QKR = data.draw(
        st.lists(
            st.lists(st.lists(row, min_size=2, max_size=2), min_size=5, max_size=5),
            min_size=len(queries),
            max_size=len(queries),
        )
    )
    total = len(texts) + len(added)
    dead_N = np.array(data.draw(st.lists(st.booleans(), min_size=total, max_size=total)), np.bool_)
    with TemporaryDirectory() as name:
        folder = Path(name) / "lexical"
        names = LexicalIndex.build(folder, in_shards(texts, *sizes), language="none", part_postings=1)
        LexicalIndex.add_part(folder, "new", added)
        index = LexicalIndex.open(folder, [*names, "new"])
        overlaps = [index.overlap(queries, np.array(passages_QKR, np.int64), mask) for mask in (None, dead_N)]
    old = [text.split() for text in texts]
    rows = [*old, *(text.split() for text in added)]
    for mask, overlap_QK in zip((np.zeros_like(dead_N), dead_N), overlaps, strict=True):
        known = [*old, *(row for row, dead in zip(rows[len(old) :], mask[len(old) :], strict=True) if not dead)]
        expected_QK = [
            [naive_overlap(rows, query.split(), passage, old, known) for passage in passages_K]
            for query, passages_K in zip(queries, passages_QKR, strict=True)
        ]
        assert overlap_QK.dtype == np.float32
        np.testing.assert_allclose(overlap_QK, expected_QK, rtol=2e-6)


def test_overlap_by_hand(tmp_path: Path) -> None:
    index = build(tmp_path, ["a b", "b c c c", "b"])
    rare, common = math.log(1 + 2.5 / 1.5), math.log(1 + 0.5 / 3.5)
    whole = math.sqrt(2 * rare + common)
    passages = np.array([[[0, 1], [1, -1], [2, 2], [-1, -1]]])
    expected = [whole, (rare + common) / whole, common / whole, 0]
    np.testing.assert_allclose(index.overlap(["a b c z"], passages), [expected], rtol=1e-6)


def test_several_threads_find_what_one_finds(tmp_path: Path, passages: list[str]) -> None:
    index = build(tmp_path, passages, 60, 60, language="english", part_postings=1)
    expected = [index.search([text], 5)[1].tolist() for text in passages]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda text: index.search([text], 5)[1].tolist(), passages)) == expected


# What is hardly there


def test_what_shares_no_word_is_not_found(tmp_path: Path) -> None:
    index = build(tmp_path, ["a b", "", "c"], 1, part_postings=1)
    scores_QK, rows_QK = index.search(["c a", "z", "", "?!"], 4)
    assert rows_QK.tolist() == [[2, 0, -1, -1], [-1] * 4, [-1] * 4, [-1] * 4]
    assert (scores_QK[rows_QK < 0] == -np.inf).all()
    assert scores_QK.dtype == np.float32
    assert rows_QK.dtype == np.int64
    given = index.score(["c a", "", "z"], np.array([[1, -1, 2], [0, 1, -1], [-1, -1, -1]]))
    assert given.dtype == np.float32
    assert given.tolist()[1:] == [[0, 0, -math.inf], [-math.inf] * 3]
    assert given[0].tolist() == [0, -math.inf, scores_QK[0, 0]]


@pytest.mark.parametrize("texts", [[], [""], ["", ""], ["a"], ["a a a"]])
def test_tiny_corpora_can_be_searched_and_added_to(tmp_path: Path, texts: list[str]) -> None:
    names = LexicalIndex.build(tmp_path, in_shards(texts), language="none")
    LexicalIndex.add_part(tmp_path, "new", ["b a", ""])
    LexicalIndex.add_part(tmp_path, "none", [])
    rows = [text.split() for text in texts]
    for parts, expected_rows in ((names, rows), ([*names, "none", "new"], [*rows, ["b", "a"], []])):
        index = LexicalIndex.open(tmp_path, parts)
        assert index.num_rows == len(expected_rows)
        scores_QN = all_scores(index, ["a", "b"])
        assert_best(index.search(["a", "b"], 3), scores_QN, 3)
        assert ((scores_QN > 0) == [[word in row for row in expected_rows] for word in "ab"]).all()
        if any(rows):  # else there is no average length
            np.testing.assert_allclose(scores_QN, naive_bm25(expected_rows, [["a"], ["b"]], rows), rtol=2e-6)


def test_no_query_has_no_result(tmp_path: Path) -> None:
    index = build(tmp_path, ["a", "b"], 1, part_postings=1)
    assert [found.shape for found in index.search([], 3)] == [(0, 3), (0, 3)]
    assert index.score([], np.empty((0, 5), np.int64)).shape == (0, 5)
    assert index.score(["a"], np.empty((1, 0), np.int64)).shape == (1, 0)
    assert index.overlap([], np.empty((0, 5, 2), np.int64)).shape == (0, 5)
    assert index.overlap(["a", ""], np.empty((2, 0, 2), np.int64)).shape == (2, 0)


def test_what_cannot_be_asked_is_refused(tmp_path: Path) -> None:
    index = build(tmp_path, ["a", "b"])
    with pytest.raises(ConfigError, match="k = 0: ask for at least one row"):
        index.search(["a"], 0)
    with pytest.raises(ConfigError, match=r"the filter has shape \[3\], there are 2 rows"):
        index.search(["a"], 1, np.ones(3, np.bool_))
    for rows in ([0, 2], [-2, 0]):
        with pytest.raises(ConfigError, match=rf"rows {min(rows)} to {max(rows)} are asked for, there are 2"):
            index.score(["a"], np.array([rows]))
    with pytest.raises(ConfigError, match=r"rows have the shape \[1, 1\]: give a line for each of 2 queries"):
        index.score(["a", "b"], np.array([[0]]))


# Rows that come later


def test_added_rows_are_scored_with_the_counts_of_the_build(tmp_path: Path, passages: list[str]) -> None:
    old, new = passages[:100], [*passages[100:], "quagga quagga oil", ""]
    names = LexicalIndex.build(tmp_path, in_shards(old, 40), language="none", part_postings=1)
    before = contents(tmp_path)
    LexicalIndex.add_part(tmp_path, "00007", new[:20])
    LexicalIndex.add_part(tmp_path, "v1.2", new[20:])
    assert {name: content for name, content in contents(tmp_path).items() if name in before} == before
    index = LexicalIndex.open(tmp_path, [*names, "00007", "v1.2"])
    queries = ["the oil crisis of 1973", "quagga", passages[-1].lower()]
    rows = [words_of(text) for text in [*old, *new]]
    expected_QN = naive_bm25(rows, [words_of(query) for query in queries], [words_of(text) for text in old])
    scores_QN = all_scores(index, queries)
    np.testing.assert_allclose(scores_QN, expected_QN, rtol=5e-6)
    assert_best(index.search(queries, 20), scores_QN, 20)
    assert index.search(["quagga"], 1)[1].tolist() == [[index.num_rows - 2]]
    # The caller says which parts there are.
    assert LexicalIndex.open(tmp_path, names).search(["quagga"], 1)[1].tolist() == [[-1]]


def words_of(text: str) -> list[str]:
    return bm25s.tokenize(text, stopwords=[], token_pattern=r"\w+", return_ids=False, show_progress=False)[0]  # type: ignore[no-any-return]


def test_a_part_that_is_written_again_does_not_disturb_those_who_have_it_open(tmp_path: Path) -> None:
    names = LexicalIndex.build(tmp_path, in_shards(["a b"]), language="none")
    LexicalIndex.add_part(tmp_path, "new", ["a c"] * 1000)
    index = LexicalIndex.open(tmp_path, [*names, "new"])
    expected = all_scores(index, ["a c"])
    LexicalIndex.add_part(tmp_path, "new", ["d"])
    np.testing.assert_array_equal(all_scores(index, ["a c"]), expected)
    assert LexicalIndex.open(tmp_path, [*names, "new"]).num_rows == 2


# Words


def matches(tmp_path: Path, texts: Sequence[str], query: str, language: str = "english") -> list[int]:
    index = build(tmp_path / unicodedata.name(query[0]), texts, language=language)
    return sorted(row for row in index.search([query], len(texts))[1][0].tolist() if row >= 0)


@pytest.mark.parametrize(
    ("language", "text", "query", "found"),
    [
        ("english", "The running foxes", "fox run", True),
        ("english", "The running foxes", "the", False),
        ("english", "Running", "runner", False),
        ("english", "When was it built?", "what when who did does", False),
        ("english", "France's capital", "FRANCE", True),
        ("english", "France\u2019s capital", "s", False),
        ("english", "it isn't so", "t", False),
        ("english", "vitamin D and the T cell", "d", True),
        ("english", "vitamin D and the T cell", "t", True),
        ("english", "7 up", "7", True),
        ("english", "x=3.14", "14", True),
        ("none", "The foxes", "the", True),
        ("none", "The foxes", "fox", False),
        ("none", "isn't", "t", True),
        ("german", "Die H\u00e4user der Stadt", "haus", True),
        ("german", "Die H\u00e4user der Stadt", "die der", False),
        ("french", "l'\u00e9t\u00e9 continuait", "continuation", True),
        ("french", "l'\u00e9t\u00e9 continuait", "\u00e9t\u00e9", False),  # been, a stop word
        ("french", "l'h\u00f4tel", "h\u00f4tels", True),
        ("russian", "\u043a\u043d\u0438\u0433\u0438", "\u043a\u043d\u0438\u0433\u0430", True),
        ("finnish", "talossa", "talo", True),  # Snowball stems it; bm25s has no stop words for it
    ],
)
def test_words_are_stemmed_and_stop_words_left_out(
    tmp_path: Path, language: str, text: str, query: str, found: bool
) -> None:
    assert matches(tmp_path, [text], query, language) == ([0] if found else [])


@pytest.mark.parametrize("language", ["english", "none"])
@pytest.mark.parametrize(
    ("text", "query", "found"),
    [
        ("Beyonc\u00e9", "beyonce\u0301", True),  # composed or not
        ("Beyonc\u00e9", "beyonce", False),
        ("\uff28\uff32\uff12", "h\uff32\uff12", True),  # wide letters
        ("\u6771\u4eac\u90fd\u306b\u4f4f\u3080", "\u4eac\u90fd", True),  # Chinese and Japanese: pairs
        ("\u6771\u4eac\u90fd\u306b\u4f4f\u3080", "\u90fd", True),  # and single characters
        ("\u6771\u4eac\u90fd\u306b\u4f4f\u3080", "\u5927", False),
        ("iPhone\u624b\u673a", "iphone", True),  # scripts without a space between them
        ("\uc11c\uc6b8\uc5d0\uc11c", "\uc11c\uc6b8", True),  # Korean: the particle does not hide the noun
        ("\u0e01\u0e23\u0e38\u0e07\u0e40\u0e17\u0e1e", "\u0e40\u0e17\u0e1e", True),  # Thai
        ("\u0939\u093f\u0928\u094d\u0926\u0940", "\u0939", False),  # Hindi: a vowel sign does not end a word
        ("\u0939\u093f\u0928\u094d\u0926\u0940", "\u0939\u093f\u0928\u094d\u0926\u0940", True),
        ("\ud800 lone surrogate", "lone", True),
    ],
)
def test_words_of_all_scripts_are_kept(tmp_path: Path, language: str, text: str, query: str, found: bool) -> None:
    assert matches(tmp_path, [text], query, language) == ([0] if found else [])


def test_rows_with_the_pair_come_before_rows_with_its_characters(tmp_path: Path) -> None:
    index = build(tmp_path, ["\u4eac\u6771\u4eac", "\u4eac\u5927\u6771", "\u6771\u4eac\u5927"], language="none")
    assert index.search(["\u6771\u4eac"], 3)[1][0, 2] == 1


def test_all_languages_of_snowball_can_be_used_and_others_are_refused(tmp_path: Path) -> None:
    import Stemmer

    for language in Stemmer.algorithms():
        assert build(tmp_path / language, ["word", "other"], language=language).search(["word"], 2)[1][0, 0] == 0
    for language in ("klingon", "English", "en", ""):
        with pytest.raises(
            ConfigError, match=rf"BM25 does not know the language '{language}': use one of arabic, .* none"
        ):
            LexicalIndex.build(tmp_path / "new", in_shards(["a"]), language=language)
    assert not (tmp_path / "new").exists()


# On disk


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_files_are_those_that_are_listed(tmp_path: Path, passages: list[str]) -> None:
    names = LexicalIndex.build(tmp_path, in_shards(passages, 50), part_postings=1)
    assert names == ["part-00000", "part-00001"]
    assert sorted(LexicalIndex.files(tmp_path, names)) == sorted(tmp_path.iterdir())


class KilledError(Exception):
    pass


def test_a_killed_build_goes_on_to_the_same_bytes(tmp_path: Path, passages: list[str]) -> None:
    sizes = (30, 0, 40, 20, 0)
    options: dict[str, Any] = {"part_postings": 300}
    names = LexicalIndex.build(tmp_path / "whole", in_shards(passages, *sizes), **options)
    expected = contents(tmp_path / "whole")
    assert len(names) == 3
    for kill_at in range(len(sizes) + 2):
        folder = tmp_path / f"killed-{kill_at}"
        tokenized: list[int] = []

        def shards(kill_at: int = kill_at) -> Iterator[Sequence[str]]:
            for number, texts in enumerate(in_shards(passages, *sizes)()):
                if number == kill_at:
                    raise KilledError
                yield texts
            raise KilledError

        with pytest.raises(KilledError):
            LexicalIndex.build(folder, shards, **options)
        with pytest.raises(FormatError, match=r"statistics\.json is missing"):
            LexicalIndex.open(folder, names)
        finished = {path: path.read_bytes() for path in folder.glob("*.counts")}
        assert LexicalIndex.build(folder, in_shards(passages, *sizes), progress=tokenized.append, **options) == names
        assert contents(folder) == expected, kill_at
        assert tokenized == [30, 70, 90, len(passages)]
        assert len(finished) == [0, 1, 1, 2, 2, 2, 3][kill_at]


def test_a_build_that_was_killed_while_it_scored_goes_on_to_the_same_bytes(tmp_path: Path, passages: list[str]) -> None:
    shards = in_shards(passages, 30, 40, 20)

    def then_killed() -> Iterator[Sequence[str]]:
        yield from shards()
        raise KilledError

    names = LexicalIndex.build(tmp_path / "whole", shards, part_postings=1)
    with pytest.raises(KilledError):
        LexicalIndex.build(tmp_path / "counted", then_killed, part_postings=1)
    assert sorted(path.name for path in (tmp_path / "counted").iterdir()) == [f"{name}.counts" for name in names]
    expected = contents(tmp_path / "whole")
    for scored in range(len(names) + 1):
        for left in (False, True):  # killed before or after the counts of the last scored part were deleted
            folder = tmp_path / f"{scored}-{left}"
            shutil.copytree(tmp_path / "counted", folder)
            for number, name in enumerate(names[:scored]):
                shutil.copy(tmp_path / "whole" / f"{name}.bm25", folder)
                if not left or number < scored - 1:
                    (folder / f"{name}.counts").unlink()
            (folder / "words.npy.tmp").write_bytes(b"half")
            LexicalIndex.build(folder, shards, part_postings=1)
            assert contents(folder) == expected


def test_a_finished_index_is_left_alone(tmp_path: Path) -> None:
    names = LexicalIndex.build(tmp_path, in_shards(["a b", "c"], 1), part_postings=1)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}

    def unread() -> Iterator[Sequence[str]]:
        raise AssertionError("read again")

    assert LexicalIndex.build(tmp_path, unread) == names
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == stamps
    with pytest.raises(ConfigError, match="is in the language 'english', not 'german': remove it first"):
        LexicalIndex.build(tmp_path, unread, language="german")


class Texts(list[str]):
    """A list that can be watched."""


def test_only_few_shards_are_held_in_memory(tmp_path: Path) -> None:
    watched: list[weakref.ref[Texts]] = []
    alive: list[int] = []

    def shards() -> Iterator[Sequence[str]]:
        for number in range(20):
            texts = Texts([f"word{number}", "a"])
            watched.append(weakref.ref(texts))
            alive.append(sum(reference() is not None for reference in watched))
            yield texts

    LexicalIndex.build(tmp_path, shards)
    assert len(alive) == 20
    assert max(alive) <= 3


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "short": lambda content: content[:20],
    "header only": lambda content: content[:24],
    "cut": lambda content: content[:-1],
    "longer": lambda content: content + b"\0",
    "zeros": lambda content: bytes(len(content)),
    "ones": lambda content: b"\xff" * len(content),
    "first posting": lambda content: content[: 24 + 8 * content[8]] + b"\1" + content[25 + 8 * content[8] :],
    "last posting": lambda content: content[: 24 + 16 * content[8]] + b"\1" + content[25 + 16 * content[8] :],
    "shifted": lambda content: content[8:] + content[:8],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_part_is_refused(tmp_path: Path, damage: str) -> None:
    names = LexicalIndex.build(tmp_path, in_shards(["a b c d", "a c d e"], 1), part_postings=1)
    path = tmp_path / "part-00001.bm25"
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(FormatError, match=r"part-00001\.bm25 is damaged: build the BM25 index again"):
        LexicalIndex.open(tmp_path, names)
    assert LexicalIndex.open(tmp_path, names[:1]).num_rows == 1


def test_missing_or_damaged_files_are_refused(tmp_path: Path) -> None:
    names = LexicalIndex.build(tmp_path, in_shards(["a b"]))
    with pytest.raises(FormatError, match=r"other\.bm25 is missing"):
        LexicalIndex.open(tmp_path, ["other"])
    with pytest.raises(FormatError, match=r"statistics\.json is missing"):
        LexicalIndex.open(tmp_path / "nowhere", names)
    whole = contents(tmp_path)
    record = json.loads(whole["statistics.json"])
    for name, content in (
        ("statistics.json", b"{"),
        ("statistics.json", b"[]"),
        *(("statistics.json", json.dumps({k: v for k, v in record.items() if k != key}).encode()) for key in record),
        ("words.npy", whole["words.npy"][:-1]),
        ("words.npy", whole["frequencies.npy"]),
        ("frequencies.npy", b""),
    ):
        (tmp_path / name).write_bytes(content)
        for use in (
            lambda: LexicalIndex.open(tmp_path, names),
            lambda: LexicalIndex.add_part(tmp_path, "new", ["a"]),
            lambda: LexicalIndex.build(tmp_path, in_shards(["a b"])),
        ):
            with pytest.raises(FormatError, match=name):
                use()
        (tmp_path / name).write_bytes(whole[name])
    assert LexicalIndex.open(tmp_path, names).num_rows == 1


def test_a_full_disk_leaves_no_half_file(
    tmp_path: Path, passages: list[str], file_limit: Callable[[int], AbstractContextManager[None]]
) -> None:
    with pytest.raises(StorageError, match="the disk is full"), file_limit(1000):
        LexicalIndex.build(tmp_path, in_shards(passages))
    assert list(tmp_path.iterdir()) == []


# Fusion


def naive_fusion(rankings: Sequence[Sequence[int]], constant: int) -> list[tuple[Fraction, int]]:
    scores: dict[int, Fraction] = {}
    for ranking in rankings:
        for rank, row in enumerate([row for row in ranking if row >= 0], 1):
            scores[row] = scores.get(row, Fraction(0)) + Fraction(1, constant + rank)
    return sorted(((score, row) for row, score in scores.items()), key=lambda item: (-item[0], item[1]))


@st.composite
def rankings(draw: st.DrawFn) -> list[NDArray[np.int64]]:
    """Several rankings of the same queries, with gaps."""
    num_queries = draw(st.integers(0, 3))
    tables = []
    for width in draw(st.lists(st.integers(0, 8), min_size=1, max_size=4)):
        lines = [draw(st.permutations(range(12)))[:width] for _ in range(num_queries)]
        keep = [[draw(st.booleans()) for _ in range(width)] for _ in range(num_queries)]
        table = np.array(lines, np.int64).reshape(num_queries, width)
        tables.append(np.where(np.array(keep, np.bool_).reshape(table.shape), table, -1))
    return tables


@given(tables=rankings(), k=st.integers(1, 15), constant=st.sampled_from([1, 60]))
def test_fusion_equals_exact_fractions(tables: list[NDArray[np.int64]], k: int, constant: int) -> None:
    found = [(np.zeros(table.shape, np.float32), table) for table in tables]
    scores_QK, rows_QK = fuse(found, k, constant)
    assert (scores_QK.shape, rows_QK.shape) == ((len(tables[0]), k),) * 2
    assert scores_QK.dtype == np.float32
    assert rows_QK.dtype == np.int64
    for q in range(len(tables[0])):
        expected = naive_fusion([table[q].tolist() for table in tables], constant)[:k]
        missing = k - len(expected)
        assert rows_QK[q].tolist() == [row for _, row in expected] + [-1] * missing
        np.testing.assert_allclose(scores_QK[q], [float(s) for s, _ in expected] + [-np.inf] * missing, rtol=1e-6)


def test_the_same_ranks_in_three_rankings_tie_whatever_their_order() -> None:
    # 1/61 + 1/62 + 1/67 in floating point: summed in another order it is one unit in the last place more.
    ranks = {3: (1, 2, 7), 4: (2, 7, 1), 5: (7, 1, 2)}
    assert len({1 / (60 + a) + 1 / (60 + b) + 1 / (60 + c) for a, b, c in ranks.values()}) == 2
    tables = []
    for ranking in range(3):
        line = np.arange(100, 107) + 10 * ranking
        for row, places in ranks.items():
            line[places[ranking] - 1] = row
        tables.append((np.zeros((1, 7), np.float32), line[None]))
    assert fuse(tables, 3)[1].tolist() == [[3, 4, 5]]


def test_fusion_by_hand() -> None:
    dense = (np.array([[9.0, 8.0, 7.0]], np.float32), np.array([[10, 20, 30]]))
    words = (np.array([[3.0, 2.0, -np.inf]], np.float32), np.array([[30, 40, -1]]))
    scores_QK, rows_QK = fuse([dense, words], 5)
    assert rows_QK.tolist() == [[30, 10, 20, 40, -1]]
    np.testing.assert_allclose(scores_QK, [[1 / 63 + 1 / 61, 1 / 61, 1 / 62, 1 / 62, -np.inf]], rtol=1e-6)
