"""Overlap of chunks and neighbors against a naive search, and bits per byte by allowed overlap against sums made by hand."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from eval import leakage
from eval.leakage import chunk_overlaps, overlap, overlap_curve, overlap_differences, overlap_intervals
from eval.metrics import bootstrap_ratio, paired_bootstrap


def naive_overlap(chunk: list[int], neighbors: list[list[int]]) -> float:
    """Looks for every run of the chunk at every place of every neighbor."""
    longest = 0
    for start in range(len(chunk)):
        for end in range(start + 1, len(chunk) + 1):
            run = chunk[start:end]
            if any(run == n[at : at + len(run)] for n in neighbors for at in range(len(n))):
                longest = max(longest, end - start)
    return longest / len(chunk) if chunk else 0.0


def as_arrays(rows: list[list[int]]) -> list[np.ndarray[tuple[int], np.dtype[np.int32]]]:
    return [np.array(row, np.int32) for row in rows]


TOKENS = st.lists(st.integers(0, 3), max_size=12)
PAIRS = st.lists(st.tuples(TOKENS, st.lists(TOKENS, max_size=4)), max_size=5)


@given(PAIRS, st.sampled_from([1, 20, 1 << 17]))
def test_overlap_is_that_of_a_naive_search_in_blocks_of_any_size(
    pairs: list[tuple[list[int], list[list[int]]]], block: int
) -> None:
    expected = [naive_overlap(chunk, neighbors) for chunk, neighbors in pairs]
    before, leakage._BLOCK_CELLS = leakage._BLOCK_CELLS, block
    try:
        found = chunk_overlaps(as_arrays([c for c, _ in pairs]), [as_arrays(n) for _, n in pairs])
    finally:
        leakage._BLOCK_CELLS = before
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.array(expected, np.float32))


@pytest.mark.parametrize(
    ("chunk", "neighbors", "expected"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8], [[9, 2, 3, 4, 9]], 3 / 8),
        ([1, 2, 3, 4, 5, 6, 7, 8], [[1, 2, 9], [5, 6, 7, 8], [3, 4]], 4 / 8),
        ([1, 2, 3, 4], [[0, 0, 1, 2, 3, 4, 0]], 1.0),
        # A run that goes on from one neighbor to the next is none of either.
        ([1, 2, 3, 4], [[9, 1, 2], [3, 4, 9]], 2 / 4),
        # What is in common must stand in one piece and in order.
        ([1, 2, 3, 4], [[1, 9, 2, 9, 3, 9, 4]], 1 / 4),
        ([1, 2, 3, 4], [[4, 3, 2, 1]], 1 / 4),
        # A short last chunk is measured by its own length.
        ([7, 7, 7], [[7, 7, 7, 7, 7]], 1.0),
        ([1], [[2]], 0.0),
        ([1, 2], [], 0.0),
        ([], [[1, 2]], 0.0),
        ([1, 2], [[]], 0.0),
        ([0, 0], [[0]], 0.5),
    ],
)
def test_overlap_of_pairs_worked_out_by_hand(chunk: list[int], neighbors: list[list[int]], expected: float) -> None:
    assert overlap(np.array(chunk, np.int32), as_arrays(neighbors)) == pytest.approx(expected, abs=1e-7)


def test_a_run_of_300_tokens_and_token_ids_beyond_16_bits_are_counted() -> None:
    rng = np.random.default_rng(0)
    chunk = rng.integers(1 << 16, 1 << 18, 400)
    neighbor = np.concatenate([rng.integers(0, 9, 20), chunk[40:340], chunk[:30] - (1 << 16)])
    assert overlap(chunk, [neighbor]) == pytest.approx(300 / 400, abs=1e-7)


# Bits per byte by allowed overlap

LOSS_N = np.array([3.0, 5.0, 1.0, 2.0])
BYTES_N = np.array([10.0, 20.0, 5.0, 8.0])
OVERLAP_N = np.array([0.0, 0.125, 0.5, 1.0], np.float32)


def test_bits_per_byte_are_over_the_chunks_that_overlap_at_most_so_much() -> None:
    found = overlap_curve(LOSS_N, BYTES_N, OVERLAP_N, (0.0, 0.1, 0.125, 0.5, 1.0))
    expected = (3 / 10, 3 / 10, 8 / 30, 9 / 35, 11 / 43)
    np.testing.assert_allclose(np.array(found, float), np.array(expected) / math.log(2), rtol=1e-14)


def test_at_overlap_1_bits_per_byte_are_the_plain_ones_to_the_last_bit() -> None:
    rng = np.random.default_rng(0)
    loss_N, bytes_N = rng.lognormal(3, 1, 10_001), rng.uniform(1, 300, 10_001)
    plain = math.fsum(loss_N) / math.log(2) / math.fsum(bytes_N)
    order = rng.permutation(10_001)
    for overlap_N in (rng.uniform(0, 1, 10_001), np.ones(10_001)):
        assert overlap_curve(loss_N[order], bytes_N[order], overlap_N, (1.0,)) == (plain,)


def test_a_threshold_allows_the_overlap_that_is_written_like_it() -> None:
    overlaps_N = chunk_overlaps([np.arange(10)], [[np.array([0])]])
    assert overlap_curve(np.ones(1), np.ones(1), overlaps_N, (0.1,)) == (1 / math.log(2),)


def test_there_is_no_value_where_no_chunk_is_left() -> None:
    assert overlap_curve(LOSS_N[1:], BYTES_N[1:], OVERLAP_N[1:], (0.0, 0.1)) == (None, None)
    assert overlap_curve(np.zeros(0), np.zeros(0), np.zeros(0), (1.0,)) == (None,)
    assert overlap_curve(np.zeros(1), np.zeros(1), np.zeros(1), (1.0,)) == (None,)


# Intervals, drawing documents

DOCUMENTS = ("a", "b", "a", "b")


def test_the_interval_at_a_threshold_is_that_of_the_sums_of_documents() -> None:
    found = overlap_intervals(LOSS_N, BYTES_N, OVERLAP_N, DOCUMENTS, (0.125, 0.5, 1.0), seed=3)
    sums = [([3.0, 5.0], [10.0, 20.0]), ([4.0, 5.0], [15.0, 20.0]), ([4.0, 7.0], [15.0, 28.0])]
    for interval, (losses, sizes) in zip(found, sums, strict=True):
        expected = bootstrap_ratio(np.array(losses) / math.log(2), np.array(sizes), seed=3)
        assert interval == pytest.approx(expected, rel=1e-12)


def test_two_systems_are_compared_on_the_same_documents() -> None:
    other_N = LOSS_N + np.array([1.0, 0.0, 1.0, -3.0])
    none, half, whole = overlap_differences(LOSS_N, other_N, BYTES_N, OVERLAP_N, DOCUMENTS, (-1.0, 0.5, 1.0), seed=3)
    assert none is None
    assert half is not None
    assert whole is not None
    assert half.value == pytest.approx(-2 / math.log(2) / 35, rel=1e-12)
    assert whole.value == pytest.approx(1 / math.log(2) / 43, rel=1e-12)
    losses = (np.array([4.0, 7.0]) / math.log(2), np.array([6.0, 4.0]) / math.log(2))
    assert whole.low == pytest.approx(paired_bootstrap(*losses, np.array([15.0, 28.0]), seed=3).low, rel=1e-12)
