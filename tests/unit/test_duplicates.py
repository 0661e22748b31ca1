"""Duplicates against exact Jaccard similarities and Python sets of 13-grams, by brute force."""

import os
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from index_builder.duplicates import Deduplicator, KeySet, NearDuplicates, NGrams, signatures, words

P = 128  # minima of a signature
VOCABULARY = [f"w{n}" for n in range(500)]


def naive_grams(text: str) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[at : at + 13]) for at in range(max(len(found) - 12, 1))} if found else set()


def jaccard(one: str, other: str) -> float:
    first, second = naive_grams(one), naive_grams(other)
    return len(first & second) / len(first | second)


def prose(seed: int, length: int = 1000) -> list[str]:
    return random.Random(seed).choices(VOCABULARY, k=length)


def changed_each(found: Sequence[str], step: int) -> str:
    """With every `step`th word replaced."""
    return " ".join(f"new{at}" if at % step == step - 1 else word for at, word in enumerate(found))


def variants(num_sources: int, copies: int, max_changes: int, length: int = 600) -> list[str]:
    """Copies of a few texts with up to so many words replaced, in random order: similarities from below 0.4 to 1 occur."""
    rng, texts = random.Random(4), []
    for source in range(num_sources):
        for _ in range(copies):
            found = prose(source, length)
            for at in rng.sample(range(length), rng.randint(0, max_changes)):
                found[at] = f"new{rng.random()}"
            texts.append(" ".join(found))
    rng.shuffle(texts)
    return texts


def share(one_P: NDArray[np.uint32], other_P: NDArray[np.uint32]) -> float:
    return float(np.count_nonzero(one_P == other_P)) / P


def near(texts: Sequence[str]) -> list[int | None]:
    deduplicator = Deduplicator("near")
    return [deduplicator.earlier(text) for text in texts]


# --- words and n-grams --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't -- STOP_it, 3.5!", ["don", "t", "stop_it", "3", "5"]),
        ("Caf\u00e9 CAFE\u0301 \ufb01n \uff21\u00b2", ["caf\u00e9", "caf\u00e9", "fin", "a2"]),
        (
            "\u0939\u093f\u0928\u094d\u0926\u0940 \u092d\u093e\u0937\u093e",
            ["\u0939\u093f\u0928\u094d\u0926\u0940", "\u092d\u093e\u0937\u093e"],
        ),
        ("\u5317\u4eac2008\u5e74\u3002", ["\u5317", "\u4eac", "2008", "\u5e74"]),
        ("\ud55c\uad6d\uc5b4 \ubb38\uc7a5", ["\ud55c\uad6d\uc5b4", "\ubb38\uc7a5"]),
        (" .,!? \n", []),
    ],
    ids=["ASCII", "forms of one letter", "vowel signs", "characters as words", "Korean", "none"],
)
def test_words_of(text: str, expected: list[str]) -> None:
    assert words(text) == expected


FEW = st.lists(st.sampled_from("aab"), max_size=18).map(" ".join)
TEXTS = st.lists(FEW | st.tuples(FEW, FEW).map("a a ".join), max_size=6)


@given(TEXTS, TEXTS)
def test_overlap_is_that_of_sets_of_13_grams(collected: list[str], asked: list[str]) -> None:
    everything = set().union(*map(naive_grams, collected))
    ngrams = NGrams.of_texts(iter(collected))
    assert len(ngrams) == len(everything)
    assert ngrams.overlap(asked).tolist() == [bool(naive_grams(text) & everything) for text in asked]


def test_13_words_in_a_row_are_shared_and_12_are_not_wherever_they_stand() -> None:
    found = prose(0, 60)
    ngrams = NGrams.of_texts([" ".join(found)])
    for first in range(48):
        run = found[first : first + 13]
        texts = ["x " + " ".join(few) + " y" for few in (run, run[:12], run[::-1])]
        assert ngrams.overlap(texts).tolist() == [True, False, False]


def test_batches_change_nothing() -> None:
    """More than a million characters each way: texts before, after and on the border of a batch are themselves."""
    texts = [" ".join(prose(seed, 50_000)) for seed in range(6)]
    ngrams = NGrams.of_texts(texts[:5])
    assert len(ngrams) == len(set().union(*map(naive_grams, texts[:5])))
    asked = [text[-200:] for text in texts] + texts[::-1]
    assert ngrams.overlap(asked).tolist() == [True] * 5 + [False] + [False] + [True] * 5
    np.testing.assert_array_equal(signatures(texts), np.concatenate([signatures([text]) for text in texts]))


def test_no_13_gram_lies_across_two_texts() -> None:
    found = prose(0, 26)
    halves = [" ".join(found[:13]), " ".join(found[13:])]
    assert len(NGrams.of_texts(halves)) == 2
    assert NGrams.of_texts([" ".join(found[5:18])]).overlap(halves).tolist() == [False, False]


# --- sets of hashes -----------------------------------------------------------------------------------------------

# Many that have a part or a place in common, and the two that a mark of empty places could be taken for.
KEYS = (
    st.sampled_from([0, 1, 2**56 - 1, 2**56, 2**64 - 1])
    | st.integers(0, 40).map(lambda n: 8 * n)
    | st.integers(0, 2**64 - 1)
)


@given(st.lists(KEYS, max_size=80))
def test_a_key_set_is_a_set(keys: list[int]) -> None:
    known, expected = KeySet(), set[int]()
    for key in keys:
        assert known.add(key) is (key not in expected)
        expected.add(key)
        assert len(known) == len(expected)
    assert not any(known.add(key) for key in keys)


def test_a_key_set_grows_within_16_bytes_a_hash_and_never_needs_more_than_that() -> None:
    rng = random.Random(0)
    keys = [rng.getrandbits(64) for _ in range(50_000)]
    tracemalloc.start()
    try:
        known = KeySet()
        empty = tracemalloc.get_traced_memory()[0]
        assert all(map(known.add, keys))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert not any(map(known.add, keys))
    assert (peak - empty) / len(keys) < 16.5


# --- signatures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [1, 4, 8, 15, 30, 60])
def test_minima_agree_as_often_as_the_sets_of_13_grams_do(changes: int) -> None:
    """Over 40 pairs within 3.5 standard errors, so that a bias of a point shows; each within 4."""
    errors, variances = [], []
    for seed in range(40):
        one, other = prose(seed), prose(seed)
        for at in random.Random(seed).sample(range(1000), changes):
            other[at] = f"new{at}"
        exact = jaccard(" ".join(one), " ".join(other))
        errors.append(share(*signatures([" ".join(one), " ".join(other)])) - exact)
        variances.append(exact * (1 - exact) / P)
    assert abs(np.mean(errors)) <= 3.5 * (np.mean(variances) / 40) ** 0.5
    assert (np.abs(errors) <= 4 * np.sqrt(variances)).all()


@given(TEXTS)
def test_signatures_are_equal_where_the_sets_of_13_grams_are(texts: list[str]) -> None:
    signatures_DP = signatures(texts)
    assert signatures_DP.shape == (len(texts), P)
    for one, one_P in zip(texts, signatures_DP, strict=True):
        assert (one_P == 2**32 - 1).all() == (not naive_grams(one))
        for other, other_P in zip(texts, signatures_DP, strict=True):
            assert (one_P == other_P).all() == (naive_grams(one) == naive_grams(other))


SAMPLE = (
    "Stately, plump Buck Mulligan came from the stairhead, bearing a bowl of lather on which a mirror lay. \u00c4\ufb01"
)


def test_signatures_and_13_grams_are_the_same_on_every_machine_and_with_every_hash_seed() -> None:
    """Another release of rensa that draws other permutations fails here: signatures of two releases must not be compared."""
    program = (
        "import sys; from index_builder.duplicates import *\n"
        "print(signatures(sys.argv[1:])[:, [0, 1, 127]].tolist(), NGrams.of_texts(sys.argv[1:2]).overlap(sys.argv[1:]))"
    )
    for seed in ("1", "2"):
        ran = subprocess.run(
            [sys.executable, "-c", program, SAMPLE, "a"],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert (
            ran.stdout == "[[3260798472, 3373451531, 3278582774], [3566698661, 4280957660, 4024882477]] [ True False]\n"
        )


# --- near-duplicates among documents ------------------------------------------------------------------------------


def test_matches_are_the_near_duplicates_by_brute_force() -> None:
    texts = variants(num_sources=6, copies=30, max_changes=14)
    texts[7] = texts[90] = "?"
    signatures_DP = signatures(texts)
    found = NearDuplicates(signatures_DP).matches(signatures_DP)
    expected = [
        [
            d
            for d, other_P in enumerate(signatures_DP)
            if "?" not in (texts[q], texts[d]) and share(one_P, other_P) >= 0.8
        ]
        for q, one_P in enumerate(signatures_DP)
    ]
    assert [numbers.tolist() for numbers in found] == expected
    assert {len(numbers) for numbers in expected} > {0, 1}
    # And what the estimate is of: far from the threshold nothing is missed and nothing added.
    for q in range(0, len(texts), 9):
        exact = {d: jaccard(texts[q], text) for d, text in enumerate(texts) if "?" not in (texts[q], text)}
        assert {d for d in exact if exact[d] >= 0.92} <= set(expected[q]) <= {d for d in exact if exact[d] >= 0.66}
        assert any(0.4 < similarity < 0.66 for similarity in exact.values()) or not exact


def test_fewer_than_one_in_a_hundred_pairs_at_the_threshold_shares_no_band() -> None:
    rng = np.random.default_rng(0)
    signatures_DP = rng.integers(0, 2**32, (70_000, P), np.uint32)  # more than are read in one go
    asked_QP = signatures_DP[60_000:].copy()
    differing = rng.permuted(np.broadcast_to(np.arange(P) >= 103, asked_QP.shape), axis=1)  # 103 of 128: just above 0.8
    asked_QP[differing] += np.uint32(1)
    found = NearDuplicates(signatures_DP).matches(asked_QP)
    counts = np.array([len(numbers) for numbers in found])
    assert all(numbers[0] == 60_000 + q for q, numbers in enumerate(found) if len(numbers))
    assert counts.max() == 1
    assert 0 < (counts == 0).mean() < 0.01


@pytest.mark.parametrize("equal", [102, 103])
def test_103_of_128_minima_make_a_near_duplicate(equal: int) -> None:
    one_1P = np.arange(P, dtype=np.uint32)[None]
    other_1P = np.where(np.arange(P) < equal, one_1P, one_1P + np.uint32(1000))
    assert [numbers.tolist() for numbers in NearDuplicates(one_1P).matches(other_1P)] == [[0] if equal == 103 else []]


def test_documents_without_words_are_no_near_duplicates() -> None:
    asked_QP = signatures(["", "one", " ".join(prose(0))])
    for known in ([], ["", "?"], ["", "two", "?"]):
        assert [numbers.tolist() for numbers in NearDuplicates(signatures(known)).matches(asked_QP)] == [[], [], []]
    assert NearDuplicates(asked_QP).matches(signatures([])) == []


def test_a_word_in_150_changed_leaves_a_near_duplicate_and_one_in_ten_does_not() -> None:
    """A changed word takes 13 13-grams with it: one in 150 leaves 84%, one in a hundred 77% and is no near-duplicate."""
    documents = [" ".join(prose(seed, 3000)) for seed in range(8)]
    slightly, heavily = (changed_each(prose(5, 3000), step) for step in (150, 10))
    assert jaccard(slightly, documents[5]) == pytest.approx(137 / 163, abs=0.01)
    assert jaccard(changed_each(prose(5, 3000), 100), documents[5]) == pytest.approx(87 / 113, abs=0.01)
    assert jaccard(heavily, documents[5]) == 0
    found = NearDuplicates(signatures(documents)).matches(signatures([slightly, heavily]))
    assert [numbers.tolist() for numbers in found] == [[5], []]
    assert near([*documents, slightly, heavily]) == [None] * 8 + [5, None]
    surviving = " ".join([*heavily.split()[:500], *prose(5, 3000)[600:613]])
    assert NGrams.of_texts(documents).overlap([slightly, heavily, surviving]).tolist() == [True, False, True]


# --- a stream of texts --------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from(["", " ", "a", "A", "a.", "b", "b b"]), max_size=12))
def test_exact_duplicates_are_the_same_to_the_letter(texts: list[str]) -> None:
    deduplicator, kept = Deduplicator("exact"), list(dict.fromkeys(texts))
    seen: set[str] = set()
    for text in texts:
        assert deduplicator.earlier(text) == (kept.index(text) if text in seen else None)
        seen.add(text)


def test_short_texts_are_near_duplicates_where_they_have_the_same_words_and_texts_without_words_never() -> None:
    texts = ["a b", "?", "A, b!", "b a", "?", "a b c", "", "", "(a b c)"]
    assert near(texts) == [None, None, 0, None, None, None, None, None, 4]


def test_a_near_duplicate_is_one_of_the_first_kept_text_that_is_similar_enough() -> None:
    """Where a band led to the first of the texts that share it only, 192 of 2,965 near-duplicates in Simple Wikipedia were kept."""
    texts = variants(num_sources=2, copies=150, max_changes=6, length=300)
    kept, expected = list[NDArray[np.uint32]](), list[int | None]()
    for signature_P in signatures(texts):
        similar = [number for number, earlier_P in enumerate(kept) if share(earlier_P, signature_P) >= 0.8]
        expected.append(similar[0] if similar else None)
        if not similar:
            kept.append(signature_P)
    assert near(texts) == expected
    assert min(len(kept), len(texts) - len(kept)) > 30


def test_more_texts_from_one_template_than_a_band_remembers_are_still_told_apart() -> None:
    template = prose(0, 200)
    texts = [" ".join([*template, *prose(seed, 90)]) for seed in range(1, 151)]
    assert 0.4 < jaccard(texts[0], texts[1]) < 0.7
    assert near(texts) == [None] * 150
    assert near(texts * 2)[150:] == list(range(150))


def test_a_stream_takes_less_than_600_bytes_a_text() -> None:
    rng = random.Random(0)
    texts = [" ".join(rng.sample(VOCABULARY, 14)) for _ in range(2000)]
    signatures(texts)  # remembers the hashes of the words
    tracemalloc.start()
    try:
        deduplicator = Deduplicator("near")
        empty = tracemalloc.get_traced_memory()[0]
        assert all(deduplicator.earlier(text) is None for text in texts)
        taken = tracemalloc.get_traced_memory()[0] - empty
    finally:
        tracemalloc.stop()
    assert taken / len(texts) < 600
