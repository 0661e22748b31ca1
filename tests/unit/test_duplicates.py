"""Duplicates against exact Jaccard similarities and Python sets of 13-grams, by brute force."""

import os
import random
import subprocess
import sys
import unicodedata
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from index_builder.duplicates import Deduplicator, KeySet, NearDuplicates, NGrams, signatures, words

Gram = tuple[str, ...]
SIZE = 128  # of a signature


def naive_words(text: str) -> list[str]:
    text = unicodedata.normalize("NFKC", text).lower()
    return "".join(c if c.isalnum() or c == "_" else " " for c in text).split()


def naive_grams(text: str) -> set[Gram]:
    found = naive_words(text)
    if not found:
        return set()
    return {tuple(found[at : at + 13]) for at in range(max(len(found) - 12, 1))}


def jaccard(one: str, other: str) -> float:
    first, second = naive_grams(one), naive_grams(other)
    return float(len(first & second) / len(first | second))


def prose(seed: int, length: int = 1_000) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices("abcdefghij", k=rng.randint(1, 8))) for _ in range(length)]


def changed_each(found: Sequence[str], step: int) -> str:
    """With every `step`th word replaced."""
    return " ".join("changed" + word if at % step == step - 1 else word for at, word in enumerate(found))


def shares(first: NDArray[np.uint32], second: NDArray[np.uint32]) -> float:
    return float(sum(a == b for a, b in zip(first.tolist(), second.tolist(), strict=True)) / SIZE)


# --- words and n-grams --------------------------------------------------------------------------------------------


@given(st.text() | st.text("aB_ .\u00c4\u00e4\ufb01\uff21\u0301\u0660\u2460\u0130\u00df-"))
def test_words_are_runs_of_letters_digits_and_underscores(text: str) -> None:
    assert words(text) == naive_words(text)


def test_words_do_not_depend_on_case_or_unicode_form() -> None:
    assert words("The \ufb01rst, CAFE\u0301 \uff21_1-b\u00b2!") == ["the", "first", "caf\u00e9", "a_1", "b2"]


PERIODS = st.lists(st.sampled_from("aab"), min_size=1, max_size=4)
FEW_WORDS = st.builds(lambda period, length: " ".join((period * length)[:length]), PERIODS, st.integers(0, 18))
REPETITIVE = st.lists(st.builds(" ".join, st.tuples(FEW_WORDS, FEW_WORDS)) | FEW_WORDS, max_size=6)


@given(REPETITIVE, REPETITIVE)
def test_overlap_is_that_of_sets_of_13_grams(collected: list[str], asked: list[str]) -> None:
    everything = set().union(*map(naive_grams, collected))
    ngrams = NGrams.of_texts(iter(collected))
    assert len(ngrams) == len(everything)
    shared = ngrams.overlap(asked)
    assert shared.dtype == np.bool_
    assert shared.tolist() == [bool(naive_grams(text) & everything) for text in asked]


def test_13_words_in_a_row_are_shared_and_12_are_not_wherever_they_stand() -> None:
    found = [f"w{n}" for n in range(40)]
    ngrams = NGrams.of_texts([" ".join(found)])
    for first in range(28):
        run = found[first : first + 13]
        texts = [
            "x " + " ".join(run[:12]) + " y",
            "x " + " ".join(run) + " y",
            " ".join(reversed(run)),
            " ".join(run[:12]),
        ]
        assert ngrams.overlap(texts).tolist() == [False, True, False, False]


def test_no_13_gram_lies_across_two_texts() -> None:
    found = [f"w{n}" for n in range(26)]
    whole, halves = " ".join(found), [" ".join(found[:13]), " ".join(found[13:])]
    assert len(NGrams.of_texts(halves)) == 2
    across = [" ".join(found[at : at + 13]) for at in range(1, 13)]
    assert NGrams.of_texts(across).overlap(halves).tolist() == [False, False]
    assert NGrams.of_texts([whole]).overlap(halves).tolist() == [True, True]


def test_a_short_text_is_shared_as_a_whole_only() -> None:
    ngrams = NGrams.of_texts(["Who wrote Ulysses?", "", "..."])
    asked = [
        "who wrote ulysses",
        "who wrote ulysses then",
        "wrote ulysses",
        "",
        "?!",
        "ulysses wrote who",
        " ".join(prose(0, 30)),
    ]
    assert ngrams.overlap(asked).tolist() == [True] + [False] * 6
    assert len(ngrams) == 1


def test_ngrams_of_more_texts_than_one_batch_holds() -> None:
    texts = [f"question number {n}" for n in range(2_050)]
    ngrams = NGrams.of_texts(texts)
    assert len(ngrams) == 2_050
    assert ngrams.overlap(texts).all()
    assert not ngrams.overlap([text + " more" for text in texts]).any()
    assert len(NGrams.of_texts(texts[:1_024] * 2)) == 1_024


# --- sets of hashes -----------------------------------------------------------------------------------------------

# Keys that fall on the same places of a set of 1024, the last place among them, from where the search goes on at the first.
# Not 0x9E3779B97F4A7C15: 0 is kept under it.
KEYS = st.sampled_from([0, 1, 2, 1023, 1024, 2047, 3 << 40, 5 << 40, 2**63, 2**64 - 1, 2**64 - 1025]) | st.integers(
    0, 2**64 - 1
).filter(lambda key: key != 0x9E3779B97F4A7C15)


@given(st.lists(st.tuples(KEYS, st.integers(0, 2**64 - 1)), max_size=30), st.lists(KEYS, max_size=5))
def test_a_key_set_gives_what_a_dict_gives(pairs: list[tuple[int, int]], others: list[int]) -> None:
    expected: dict[int, int] = {}
    numbered, plain = KeySet(numbered=True), KeySet()
    for key, number in pairs:
        assert plain.add(key) is (key not in expected)
        assert numbered.put(key, number) == expected.get(key)
        expected.setdefault(key, number)
        assert len(numbered) == len(plain) == len(expected)
    for key in [*others, *expected]:
        assert numbered.get(key) == expected.get(key)
        assert plain.get(key) == (0 if key in expected else None)


@pytest.mark.parametrize("numbered", [False, True])
def test_a_key_set_keeps_all_while_it_grows(numbered: bool) -> None:
    rng = random.Random(0)
    keys = [0, 2**64 - 1] + [rng.getrandbits(64) for _ in range(5_000)]
    known = KeySet(numbered=numbered)
    for at, key in enumerate(keys):
        assert known.put(key, at) is None
        assert known.put(key, 9_999_999) == (at if numbered else 0)
    assert len(known) == len(keys)
    assert [known.get(key) for key in keys] == (list(range(len(keys))) if numbered else [0] * len(keys))
    assert all(known.get(rng.getrandbits(64)) is None for _ in range(5_000))


# --- signatures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_changed", [0, 1, 2, 4, 6, 8, 11, 15, 20, 30, 40, 60, 80])
def test_signatures_agree_as_often_as_the_sets_of_13_grams_do(num_changed: int) -> None:
    """Over 40 pairs: within 3.5 standard errors, 0.2 to 1 point, so that a bias shows."""
    errors, variance = [], 0.0
    for seed in range(40):
        found = prose(seed)
        one, other = " ".join(found), found.copy()
        for at in random.Random(seed).sample(range(1_000), num_changed):
            other[at] = f"x{at}"
        exact = jaccard(one, " ".join(other))
        errors.append(shares(*signatures([one, " ".join(other)])) - exact)
        variance += exact * (1 - exact) / SIZE / 40**2
    assert abs(np.mean(errors)) <= 3.5 * variance**0.5
    if num_changed == 0:
        assert errors == [0.0] * 40


def test_unlike_texts_have_no_minimum_in_common() -> None:
    assert shares(*signatures([" ".join(prose(1)), " ".join(prose(2))])) == 0.0


@given(REPETITIVE)
def test_signatures_are_equal_where_the_sets_of_13_grams_are(texts: list[str]) -> None:
    found = signatures(texts)
    assert found.shape == (len(texts), SIZE)
    assert found.dtype == np.uint32
    for one, first in zip(texts, found, strict=True):
        assert (first == 2**32 - 1).all() == (not naive_grams(one))
        for other, second in zip(texts, found, strict=True):
            assert (first == second).all() == (naive_grams(one) == naive_grams(other))


@given(
    st.lists(FEW_WORDS | st.builds(lambda seed: " ".join(prose(seed, 40)), st.integers(0, 9)), min_size=1, max_size=8)
)
def test_signatures_of_a_batch_are_those_of_each_text(texts: list[str]) -> None:
    assert signatures(texts).tolist() == [signatures([text])[0].tolist() for text in texts]


GOLDEN_TEXT = (
    "Stately, plump Buck Mulligan came from the stairhead, bearing a bowl of lather on which a mirror lay. \u00c4\ufb01"
)
GOLDEN = [3260798472, 3373451531, 253973750, 3278582774]


def test_signatures_are_the_same_on_every_machine() -> None:
    assert signatures([GOLDEN_TEXT])[0, [0, 1, 2, 127]].tolist() == GOLDEN


def test_signatures_are_the_same_in_processes_with_other_hash_seeds() -> None:
    program = (
        "from index_builder.duplicates import *; import sys; text = sys.argv[1]; print(signatures([text, 'a']).tolist(), "
        "NGrams.of_texts([text])._hashes.tolist())"
    )
    made = [
        subprocess.run(
            [sys.executable, "-c", program, GOLDEN_TEXT],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert made[0] == made[1]
    assert made[0].startswith(str(signatures([GOLDEN_TEXT, "a"]).tolist()))


# --- near-duplicates among documents ------------------------------------------------------------------------------


def pair_with(differing: Sequence[int]) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Two signatures [1, P] that differ in these minima."""
    first = np.arange(1, SIZE + 1, dtype=np.uint32)[None]
    second = first.copy()
    second[0, list(differing)] += 1_000_000
    return first, second


def test_near_duplicates_are_those_that_share_80_percent_of_the_minima() -> None:
    for num_differing in range(SIZE):
        first, second = pair_with(range(SIZE - num_differing, SIZE))
        expected = [0] if (SIZE - num_differing) / SIZE >= 0.8 else []
        assert [m.tolist() for m in NearDuplicates(first).matches(second)] == [expected]


@pytest.mark.parametrize("band", range(21))
def test_one_band_of_six_equal_minima_is_enough_to_be_compared(band: int) -> None:
    others = [6 * other + (other + band) % 6 for other in range(21) if other != band]
    first, second = pair_with(others)
    assert [m.tolist() for m in NearDuplicates(first).matches(second)] == [[0]]
    first, second = pair_with([*others, 6 * band + band % 6])  # no band is equal, though 107 of 128 minima are
    assert [m.tolist() for m in NearDuplicates(first).matches(second)] == [[]]


def test_matches_are_the_near_duplicates_by_brute_force() -> None:
    """Families of texts with 0 to 50 changed words: all similarities from 0.5 to 1 occur."""
    rng = random.Random(3)
    texts = []
    for family in range(6):
        for _ in range(25):
            found = prose(family)
            for at in rng.sample(range(1_000), rng.randint(0, 12)):
                found[at] = "new"
            texts.append(" ".join(found))
    texts[7] = texts[90] = ""
    rng.shuffle(texts)
    found_DP = signatures(texts)
    near = NearDuplicates(found_DP)
    expected = [
        [d for d, other in enumerate(found_DP) if texts[q] and texts[d] and shares(one, other) >= 0.8]
        for q, one in enumerate(found_DP)
    ]
    assert [m.tolist() for m in near.matches(found_DP)] == expected
    assert {len(numbers) for numbers in expected} > {0, 1}  # some empty, some alone, some in company
    assert [m.tolist() for m in near.matches(found_DP[40:45])] == expected[40:45]


def test_a_text_with_every_200th_word_changed_is_found_and_one_with_every_tenth_is_not() -> None:
    documents = [" ".join(prose(seed)) for seed in range(20)]
    near = NearDuplicates(signatures(documents))
    slightly, heavily = changed_each(prose(5), 200), changed_each(prose(5), 10)
    assert jaccard(slightly, documents[5]) > 0.87  # 13 grams a changed word: every hundredth changed comes to 0.77
    assert jaccard(heavily, documents[5]) < 0.1
    found = near.matches(signatures([slightly, heavily, documents[5], "", "!", " ".join(prose(50))]))
    assert [numbers.tolist() for numbers in found] == [[5], [], [5], [], [], []]
    assert all(numbers.dtype == np.int64 for numbers in found)


def test_near_duplicates_of_no_or_only_empty_documents() -> None:
    asked = signatures(["", "one", " ".join(prose(0))])
    for known in (signatures([]), signatures(["", "?"])):
        assert [numbers.tolist() for numbers in NearDuplicates(known).matches(asked)] == [[], [], []]
    assert NearDuplicates(asked).matches(signatures([])) == []


# --- a stream of texts --------------------------------------------------------------------------------------------


def answers(kind: str, texts: Sequence[str]) -> list[int | None]:
    deduplicator = Deduplicator(kind)  # type: ignore[arg-type]  # parametrized
    return [deduplicator.earlier(text) for text in texts]


@given(st.lists(st.sampled_from(["", " ", "a", "A", "a.", "b", "b b"]), max_size=12))
def test_exact_duplicates_are_the_same_to_the_letter(texts: list[str]) -> None:
    order = list(dict.fromkeys(texts))
    assert answers("exact", texts) == [
        None if text not in texts[:at] else order.index(text) for at, text in enumerate(texts)
    ]


@given(st.lists(st.sampled_from(["", " ", "?", "a", "A", "a.", "b", "b b", "B, b!"]), max_size=12))
def test_near_duplicates_of_short_texts_have_the_same_words_and_those_without_words_the_same_letters(
    texts: list[str],
) -> None:
    same = [tuple(naive_words(text)) or text for text in texts]
    order = list(dict.fromkeys(same))
    assert answers("near", texts) == [None if key not in same[:at] else order.index(key) for at, key in enumerate(same)]


def test_numbers_count_only_the_texts_that_were_kept() -> None:
    a, b, c = (" ".join(prose(seed)) for seed in range(3))
    assert answers("near", [a, a, b, a.upper(), b.replace(" ", ", "), c, c]) == [None, 0, None, 0, 1, None, 2]
    assert answers("exact", [a, a, b, a.upper(), b, c, c]) == [None, 0, None, None, 1, None, 3]


def test_a_near_duplicate_is_one_of_the_first_kept_text_that_is_similar_enough() -> None:
    """A band that several kept texts share once led to the first of them only, and text 130 was kept besides its near-duplicate."""
    rng = random.Random(1)
    texts = []
    for _ in range(200):
        found = prose(rng.randint(0, 4), 600)
        for at in rng.sample(range(600), rng.randint(0, 12)):
            found[at] = f"new{rng.random()}"
        texts.append(" ".join(found))
    kept: list[NDArray[np.uint32]] = []
    expected: list[int | None] = []
    for signature in signatures(texts):
        similar = [number for number, earlier in enumerate(kept) if shares(earlier, signature) >= 0.8]
        expected.append(similar[0] if similar else None)
        if not similar:
            kept.append(signature)
    found_numbers = answers("near", texts)
    assert found_numbers == expected
    assert len(kept) > 20
    assert sum(number is not None for number in expected) > 20


def test_a_changed_word_in_two_hundred_makes_a_near_duplicate_and_one_in_ten_does_not() -> None:
    found = prose(0)
    assert answers("near", [" ".join(found), changed_each(found, 200), changed_each(found, 10)]) == [None, 0, None]
    assert answers("exact", [" ".join(found), changed_each(found, 200), changed_each(found, 10)]) == [None, None, None]


def test_more_texts_than_the_first_signatures_have_room_for() -> None:
    texts = [f"text number {n}" for n in range(2_100)]
    assert answers("near", texts * 2) == [None] * 2_100 + list(range(2_100))
