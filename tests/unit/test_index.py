"""The vector index against brute force in numpy: ids and scores, for both metrics, exact and with inverted lists."""

import logging
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from index_builder import index as vector_index
from index_builder.index import (
    MARGIN,
    TRAINED,
    VectorIndex,
    Vectors,
    _draw,
    _gpus,
    _sample,
    add_part,
    estimate_gpu_memory,
    merge_parts,
    plan_index,
    train,
    tune,
)
from retro.errors import ConfigError, FormatError, StorageError

Stored = NDArray[np.float16]
Floats = NDArray[np.float32]
Rows = NDArray[np.int64]
Mask = NDArray[np.bool_]
METRICS = pytest.mark.parametrize("normalized", [False, True], ids=["L2", "inner product"])
# In place of OPQ, whose training takes long, mostly PCA: vectors are turned before they come into lists, too.
APPROXIMATE = ["IVF8,Flat", "IVF8,SQfp16", "IVF8,SQ8", "PCA16,IVF4_HNSW4,PQ8x4"]
TURNED = "OPQ4_16,IVF4_HNSW4,PQ4x4"


def make_vectors(n: int, dim: int, *, seed: int = 0, normalized: bool = False) -> Stored:
    vectors_NX = np.random.default_rng(seed).normal(size=(n, dim))
    if normalized:
        vectors_NX /= np.linalg.norm(vectors_NX, axis=1, keepdims=True)
    return vectors_NX.astype(np.float16)


def make_queries(n: int, dim: int) -> Floats:
    return np.random.default_rng(99).normal(size=(n, dim)).astype(np.float32)


def in_shards(vectors_NX: Stored) -> Vectors:
    """In three shards and an empty one."""
    n = len(vectors_NX)
    return Vectors(np.split(vectors_NX, [n // 3, n // 3, n // 3 + n // 4]))


def open_index(
    folder: Path,
    vectors_NX: Stored,
    factory: str = "Flat",
    *,
    normalized: bool = False,
    segments: tuple[int, ...] | None = None,
    num_parts: int = 1,
    dead_N: Mask | None = None,
    max_memory: int | None = None,
    **found: Any,
) -> VectorIndex:
    """Builds an index: `segments` are the rows of each (all rows in one if None), each merged from `num_parts`."""
    vectors = in_shards(vectors_NX)
    records = []
    if factory != "Flat":
        folder.mkdir(parents=True, exist_ok=True)
        plan = plan_index(len(vectors), vectors.dim, factory)
        train(folder / TRAINED, vectors, plan, normalized=normalized, seed=0)
        first = 0
        for number, rows in enumerate(segments or (len(vectors),)):
            borders = np.linspace(first, first + rows, num_parts + 1).astype(int).tolist()
            parts = [folder / f"part{i}" for i in range(num_parts)]
            for part, start, end in zip(parts, borders, borders[1:], strict=False):
                add_part(folder / TRAINED, vectors, start, end, part, base=first)
            merge_parts(folder / TRAINED, parts, folder / f"{number}.faiss")
            records.append({"file": f"{number}.faiss", "rows": rows})
            first += rows
    metric = "inner product" if normalized else "L2"
    description = {"factory": factory, "metric": metric, "segments": records, **found}
    return VectorIndex.open(folder, vectors, description, dead_N=dead_N, max_memory=max_memory)


def brute_force(
    vectors_NX: Stored, queries_QX: Floats, k: int, *, normalized: bool, may_N: Mask | None = None
) -> tuple[Floats, Rows]:
    """All scores in float64, rounded to float32; the order is by score, then by row."""
    stored, asked = vectors_NX.astype(np.float64), queries_QX.astype(np.float64)
    scores_QK = np.full((len(asked), k), -np.inf, np.float32)
    rows_QK = np.full((len(asked), k), -1, np.int64)
    for query, asked_X in enumerate(asked):
        scores_N = (stored * asked_X).sum(axis=1) if normalized else -np.square(stored - asked_X).sum(axis=1)
        rows = np.arange(len(stored)) if may_N is None else np.flatnonzero(may_N)
        best = sorted((-float(np.float32(scores_N[row])), int(row)) for row in rows)[:k]
        for place, (score, row) in enumerate(best):
            scores_QK[query, place], rows_QK[query, place] = -score, row
    return scores_QK, rows_QK


def assert_found(found: tuple[Floats, Rows], expected: tuple[Floats, Rows]) -> None:
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_allclose(found[0], expected[0], rtol=3e-7, atol=1e-12)
    assert [array.dtype.name for array in found] == ["float32", "int64"]


def assert_same(found: tuple[Floats, Rows], expected: tuple[Floats, Rows]) -> None:
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[0], expected[0])


# The stored vectors


def test_vectors_of_rows_are_gathered_from_their_shards() -> None:
    vectors_NX = make_vectors(20, 3)
    vectors = Vectors(np.split(vectors_NX, [0, 7, 7, 8]))
    assert (len(vectors), vectors.dim) == (20, 3)
    rows = np.array([[19, 0, 7], [6, 7, 8]])
    gathered = vectors.gather(rows)
    assert gathered.dtype == np.float32
    np.testing.assert_array_equal(gathered, vectors_NX[rows].astype(np.float32))
    assert vectors.gather(np.empty((2, 0), np.int64)).shape == (2, 0, 3)
    assert (len(Vectors([])), Vectors([]).dim) == (0, 0)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(("first", "end"), [(0, None), (3, 17), (7, 8), (8, 8), (6, 20)])
def test_blocks_of_vectors_cross_the_borders_of_shards(
    tmp_path: Path, first: int, end: int | None, mapped: bool
) -> None:
    vectors_NX = make_vectors(20, 3)
    shards: list[Stored] = list(np.split(vectors_NX, [0, 7, 7, 8]))
    if mapped:
        for number in (1, 3, 4):
            np.save(tmp_path / f"{number}.npy", shards[number])
            shards[number] = np.load(tmp_path / f"{number}.npy", mmap_mode="r")
    for max_rows in (1, 5, 100):
        blocks = list(Vectors(shards).blocks(first, end, max_rows))
        assert [start for start, _ in blocks] == list(range(first, 20 if end is None else end, max_rows))
        assert all(len(block) <= max_rows and block.dtype == np.float32 for _, block in blocks)
        joined = np.concatenate([np.empty((0, 3)), *(block for _, block in blocks)])
        np.testing.assert_array_equal(joined, vectors_NX[first:end].astype(np.float32))


# Exact search


@METRICS
def test_exact_results_equal_brute_force(tmp_path: Path, normalized: bool) -> None:
    vectors_NX = make_vectors(1000, 12, normalized=normalized)
    index = open_index(tmp_path, vectors_NX, normalized=normalized)
    queries_QX = make_queries(50, 12)
    assert_found(index.search(queries_QX, 10), brute_force(vectors_NX, queries_QX, 10, normalized=normalized))
    assert (len(index), index.dim, index.num_lists, index.has_lists) == (1000, 12, 0, False)
    assert index.metric == ("inner product" if normalized else "L2")


def test_l2_and_inner_product_are_not_taken_for_each_other(tmp_path: Path) -> None:
    # The inner product prefers the longer vector, L2 the nearer one.
    vectors_NX = np.array([[1, 0], [10, 1]], np.float16)
    query_1X = np.array([[1, 0.5]], np.float32)
    for normalized, rows, scores in ((False, [0, 1], [-0.25, -81.25]), (True, [1, 0], [10.5, 1])):
        found = open_index(tmp_path, vectors_NX, normalized=normalized).search(query_1X, 2)
        assert (found[0].tolist(), found[1].tolist()) == ([scores], [rows])


@given(data=st.data())
def test_on_grids_full_of_ties_the_lower_row_comes_first(data: st.DataObject) -> None:
    n, dim = data.draw(st.integers(0, 60)), data.draw(st.integers(1, 3))
    grid = st.integers(-1, 2)

    def draw(count: int) -> NDArray[np.int64]:
        return np.array(data.draw(st.lists(grid, min_size=count * dim, max_size=count * dim)), np.int64)

    vectors_NX = draw(n).reshape(n, dim).astype(np.float16)
    num_queries, k = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 12))
    queries_QX = draw(num_queries).reshape(num_queries, dim).astype(np.float32)
    masks = st.none() | st.lists(st.booleans(), min_size=n, max_size=n).map(lambda drawn: np.array(drawn, np.bool_))
    dead_N, keep_N = data.draw(masks), data.draw(masks)
    normalized, max_memory = data.draw(st.booleans()), data.draw(st.sampled_from([None, 8]))
    may_N = np.ones(n, np.bool_)
    if dead_N is not None:
        may_N &= ~dead_N
    if keep_N is not None:
        may_N &= keep_N
    index = open_index(Path("none"), vectors_NX, normalized=normalized, dead_N=dead_N, max_memory=max_memory)
    expected = brute_force(vectors_NX, queries_QX, k, normalized=normalized, may_N=may_N)
    assert_same(index.search(queries_QX, k, keep_N=keep_N), expected)


@METRICS
@pytest.mark.parametrize("max_memory", [None, 0], ids=["in memory", "read for every search"])
def test_of_hundreds_of_equal_vectors_the_lowest_rows_are_found(
    tmp_path: Path, normalized: bool, max_memory: int | None
) -> None:
    # The third best is there 300 times, far more often than the margin, at rows that float32 has no reason to prefer.
    assert MARGIN < 100
    random = np.random.default_rng(0)
    vectors_NX = make_vectors(400, 33, normalized=True)
    query_X = vectors_NX[0].astype(np.float32)
    best = query_X + np.array([0, 0.02], np.float32)[:, None] * random.normal(size=(2, 33))
    third = query_X + 0.1 * random.normal(size=33)
    many = np.concatenate([vectors_NX[1:].astype(float), best, np.tile(third, (300, 1))])
    stored = (many / np.linalg.norm(many, axis=1, keepdims=True)).astype(np.float16)[random.permutation(len(many))]
    queries_QX = np.stack([query_X, *make_queries(2, 33)])
    index = open_index(tmp_path, stored, normalized=normalized, max_memory=max_memory)
    expected = brute_force(stored, queries_QX, 40, normalized=normalized)
    assert len(set(expected[0][0, 2:].tolist())) == 1
    assert_found(index.search(queries_QX, 40), expected)


@METRICS
def test_a_search_in_blocks_equals_brute_force(tmp_path: Path, normalized: bool) -> None:
    # Ten blocks: more than are collected before they are merged. Each of 900 points is there hundreds of times.
    stored = np.random.default_rng(0).integers(0, 30, (600_000, 2)).astype(np.float16)
    queries_QX = np.array([[3, 4], [29, 0], [-1, 12.5]], np.float32)
    index = open_index(tmp_path, stored, normalized=normalized, max_memory=0)
    scores_QK, rows_QK = index.search(queries_QX, 30)
    for query_X, scores_K, rows_K in zip(queries_QX.astype(float), scores_QK, rows_QK, strict=True):
        wide = stored.astype(float)
        scores_N = wide @ query_X if normalized else -np.square(wide - query_X).sum(axis=1)
        expected = np.argsort(-scores_N, kind="stable")[:30]
        np.testing.assert_array_equal(rows_K, expected)
        np.testing.assert_array_equal(scores_K, scores_N[expected])


def test_scores_are_summed_in_float64(tmp_path: Path) -> None:
    # In float32 4096 ** 2 + 1 is 4096 ** 2, so that one of the three numbers is lost on the way, wherever it stands.
    vectors_NX = np.array([[4096, 1, 1], [1, 4096, 1], [1, 1, 4096]], np.float16)
    index = open_index(tmp_path, vectors_NX)
    assert index.search(np.zeros((1, 3), np.float32), 3)[0].tolist() == [[-(2.0**24) - 2] * 3]
    index = open_index(tmp_path, np.array([[2048, 1, -2048]], np.float16), normalized=True)
    assert index.search(np.array([[2048, 0.25, 2048]], np.float32), 1)[0].tolist() == [[0.25]]


@METRICS
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("place", [None, "cpu"], ids=["numpy", "torch"])
def test_small_blocks_batches_and_pools_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, normalized: bool, seed: int, place: str | None
) -> None:
    # Torch is what searches on a GPU. Here it does so on the CPU.
    for name, size in (("BLOCK_ROWS", 37), ("BATCH", 4), ("MANY", 10)):
        monkeypatch.setattr(vector_index, name, size)
    random = np.random.default_rng(seed)
    n, k = 400, (1, 5, 60, 400, 500, 36)[seed]
    grid = random.integers(-2, 3, (n, 3)).astype(np.float16)  # 125 points: each is there several times
    vectors_NX = np.concatenate([grid, make_vectors(n, 3, seed=seed), np.repeat(grid[:1], 200, axis=0)])
    dead_N, keep_N = random.random(len(vectors_NX)) < 0.2, random.random(len(vectors_NX)) < 0.7
    queries_QX = np.concatenate([grid[:5].astype(np.float32), make_queries(4, 3), np.zeros((1, 3), np.float32)])
    index = open_index(tmp_path, vectors_NX, normalized=normalized, dead_N=dead_N, max_memory=(None, 0)[seed % 2])
    index._place = place
    for keep in (None, keep_N):
        may_N = ~dead_N if keep is None else ~dead_N & keep
        expected = brute_force(vectors_NX, queries_QX, k, normalized=normalized, may_N=may_N)
        assert_found(index.search(queries_QX, k, keep_N=keep), expected)


@METRICS
def test_rows_that_float32_cannot_tell_apart_are_ranked_by_their_exact_scores(tmp_path: Path, normalized: bool) -> None:
    # Large numbers that all vectors share cancel in the end; until then they swallow what the small ones add.
    random = np.random.default_rng(0)
    n, dim = 3000, 64
    common = random.permutation(dim)[: dim // 2]
    vectors_NX = (random.integers(0, 8, (n, dim)) / 64).astype(np.float16)
    vectors_NX[:, common] = 30_000 * np.resize([1, -1], dim // 2)
    queries_QX = (random.random((3, dim)) / 8).astype(np.float32)
    queries_QX[:, common] = 1 if normalized else vectors_NX[0, common]
    product_QN = queries_QX @ vectors_NX.astype(np.float32).T
    if not normalized:
        product_QN = 2 * product_QN - np.square(vectors_NX, dtype=np.float32).sum(axis=1)
    expected = brute_force(vectors_NX, queries_QX, 10, normalized=normalized)
    for best_N, rows_K in zip(np.argsort(-product_QN, axis=1, kind="stable"), expected[1], strict=True):
        assert not set(rows_K.tolist()) <= set(best_N[: 10 + MARGIN].tolist())
    assert_found(open_index(tmp_path, vectors_NX, normalized=normalized).search(queries_QX, 10), expected)


@METRICS
def test_what_is_not_there_is_minus_one_with_the_score_minus_infinity(tmp_path: Path, normalized: bool) -> None:
    index = open_index(tmp_path, make_vectors(3, 4), normalized=normalized)
    scores_QK, rows_QK = index.search(make_queries(2, 4), 5)
    assert (rows_QK[:, 3:] == -1).all()
    assert (scores_QK[:, 3:] == -np.inf).all()
    assert (np.sort(rows_QK[:, :3], axis=1) == np.arange(3)).all()


def test_no_query_and_no_vector_have_no_result(tmp_path: Path) -> None:
    scores_QK, rows_QK = open_index(tmp_path, make_vectors(3, 4)).search(np.empty((0, 4), np.float32), 5)
    assert scores_QK.shape == rows_QK.shape == (0, 5)
    empty = VectorIndex.open(tmp_path, Vectors([]), {"metric": "L2", "segments": []})
    scores_QK, rows_QK = empty.search(make_queries(2, 4), 3)
    assert (rows_QK.tolist(), scores_QK.tolist()) == ([[-1] * 3] * 2, [[-np.inf] * 3] * 2)


@METRICS
def test_zero_vectors_are_vectors_like_others(tmp_path: Path, normalized: bool) -> None:
    vectors_NX = np.array([[1, 0], [0, 0], [-1, 0], [0, 0]], np.float16)
    index = open_index(tmp_path, vectors_NX, normalized=normalized)
    queries_QX = np.array([[0, 0], [0.25, 0]], np.float32)
    rows = [[0, 1, 2, 3], [0, 1, 3, 2]] if normalized else [[1, 3, 0, 2], [1, 3, 0, 2]]
    assert index.search(queries_QX, 4)[1].tolist() == rows


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_query_that_is_not_finite_is_refused(tmp_path: Path, bad: float) -> None:
    queries_QX = make_queries(3, 4)
    queries_QX[1, 2] = bad
    with pytest.raises(ConfigError, match="a query vector holds NaN or infinity"):
        open_index(tmp_path, make_vectors(10, 4)).search(queries_QX, 2)


def test_a_filter_for_another_number_of_rows_is_refused(tmp_path: Path) -> None:
    index = open_index(tmp_path, make_vectors(1234, 4))
    with pytest.raises(ConfigError, match=r"the filter has shape \[1233\], there are 1,234 rows"):
        index.search(make_queries(1, 4), 2, keep_N=np.ones(1233, np.bool_))


def test_filters_do_not_see_each_other(tmp_path: Path) -> None:
    # What the last filter left stays in memory: it must be that of this filter.
    vectors_NX = make_vectors(300, 6)
    index = open_index(tmp_path, vectors_NX, dead_N=np.arange(300) % 7 == 0)
    queries_QX = make_queries(4, 6)
    masks = [np.arange(300) % n == 1 for n in (2, 3, 150)] + [np.zeros(300, np.bool_), np.ones(300, np.bool_)]

    def check(mask: Mask) -> None:
        expected = brute_force(vectors_NX, queries_QX, 5, normalized=False, may_N=mask & (np.arange(300) % 7 != 0))
        assert_found(index.search(queries_QX, 5, keep_N=mask), expected)

    for mask in [*masks, *masks[::-1]]:
        check(mask)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(check, masks * 10))


@METRICS
@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat", "IVF8,SQ8"])
def test_a_score_depends_on_the_two_vectors_alone(tmp_path: Path, factory: str, normalized: bool) -> None:
    n, dim = 400, 24
    vectors_NX = make_vectors(n, dim, normalized=normalized)
    queries_QX = make_queries(9, dim)
    random = np.random.default_rng(3)
    dead_N = random.random(n) < 0.2
    by_vector: list[dict[tuple[int, int], float]] = []
    for number in range(3):
        order = random.permutation(n) if number else np.arange(n)
        index = open_index(
            tmp_path / str(number),
            vectors_NX[order],
            factory,
            normalized=normalized,
            segments=((n,), (250, 100), (n,))[number],
            dead_N=dead_N[order] if number == 2 else None,
            nprobe=8,
            rescore=20,
            max_memory=0 if number == 1 else None,
        )
        parts = [index.search(queries_QX, n)] if number else [index.search(queries_QX[q : q + 1], n) for q in range(9)]
        scores_QK, rows_QK = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        pairs = [(q, place) for q in range(9) for place in range(n) if rows_QK[q, place] >= 0]
        by_vector.append({(q, int(order[rows_QK[q, place]])): float(scores_QK[q, place]) for q, place in pairs})
    assert len(by_vector[0]) == len(by_vector[1]) == 9 * n
    assert by_vector[1] == by_vector[0]
    assert by_vector[2] == {(q, row): score for (q, row), score in by_vector[0].items() if not dead_N[row]}


# Inverted lists


@METRICS
@pytest.mark.parametrize("factory", [*APPROXIMATE, TURNED])
def test_with_all_lists_and_many_candidates_results_equal_brute_force(
    tmp_path: Path, factory: str, normalized: bool
) -> None:
    n, dim = 600, 16
    vectors_NX = make_vectors(n, dim, normalized=normalized)
    queries_QX = make_queries(20, dim)
    index = open_index(tmp_path, vectors_NX, factory, normalized=normalized, nprobe=8, ef_search=16, rescore=60)
    assert (index.has_lists, index.has_graph) == (True, "HNSW" in factory)
    assert index.num_lists == (4 if "HNSW" in factory else 8)
    assert_found(index.search(queries_QX, 10), brute_force(vectors_NX, queries_QX, 10, normalized=normalized))


@METRICS
def test_only_the_nearest_lists_are_searched_unless_all_are_wanted(tmp_path: Path, normalized: bool) -> None:
    vectors_NX = make_vectors(600, 8, normalized=normalized)
    queries_QX = make_queries(20, 8)
    index = open_index(tmp_path / "i", vectors_NX, "IVF8,Flat", normalized=normalized, nprobe=2)
    # Which these are, from the centroids and the vectors alone: the two best centroids of a query, the best one of a vector.
    ivf: Any = faiss.read_index(str(tmp_path / "i" / "0.faiss"))
    centroids_LX = ivf.quantizer.reconstruct_n(0, 8)

    def nearest(asked_QX: Floats, count: int) -> Rows:
        if normalized:
            return np.argsort(-(asked_QX @ centroids_LX.T), axis=1)[:, :count]
        return np.argsort(np.square(asked_QX[:, None] - centroids_LX).sum(axis=2), axis=1)[:, :count]

    list_N = nearest(vectors_NX.astype(np.float32), 1)[:, 0]
    differ = 0
    for query_X, lists in zip(queries_QX, nearest(queries_QX, 2), strict=True):
        expected = brute_force(
            vectors_NX, query_X[None], 10, normalized=normalized, may_N=np.isin(list_N, lists.astype(np.int64))
        )
        assert_found(index.search(query_X[None], 10), expected)
        everything = brute_force(vectors_NX, query_X[None], 10, normalized=normalized)
        assert_found(index.search(query_X[None], 10, all_lists=True), everything)
        differ += expected[1].tolist() != everything[1].tolist()
    assert differ > 5


def test_more_candidates_scored_again_find_more(tmp_path: Path) -> None:
    vectors_NX = make_vectors(600, 16)
    queries_QX = make_queries(50, 16)
    index = open_index(tmp_path, vectors_NX, "IVF4,PQ4x4", nprobe=4)
    truth = brute_force(vectors_NX, queries_QX, 10, normalized=False)[1]
    recalls = []
    for rescore in (1, 4, 59):
        index.rescore = rescore
        found = index.search(queries_QX, 10)[1]
        recalls.append(np.mean([len(set(f) & set(t)) for f, t in zip(found.tolist(), truth.tolist(), strict=True)]))
    assert recalls[0] < recalls[1] - 1
    assert recalls[2] == 10


@pytest.mark.parametrize("factory", [*APPROXIMATE, TURNED])
def test_a_segment_merged_from_parts_equals_one_that_was_filled_in_memory(tmp_path: Path, factory: str) -> None:
    vectors_NX = make_vectors(500, 16)
    for name, num_parts in (("one", 1), ("several", 5)):
        open_index(tmp_path / name, vectors_NX, factory, num_parts=num_parts)
    memory = faiss.read_index(str(tmp_path / "one" / TRAINED))
    memory.add(vectors_NX.astype(np.float32))
    expected: Any = faiss.extract_index_ivf(memory).invlists
    for name in ("one", "several"):
        merged = faiss.read_index(str(tmp_path / name / "0.faiss"))
        assert merged.ntotal == 500
        ivf: Any = faiss.extract_index_ivf(merged)
        assert (ivf.ntotal, ivf.nlist) == (500, expected.nlist)
        for number in range(ivf.nlist):
            size = ivf.invlists.list_size(number)
            assert size == expected.list_size(number)
            for method, count in (("get_ids", size), ("get_codes", size * ivf.code_size)):
                arrays = [
                    faiss.rev_swig_ptr(getattr(lists, method)(number), count) if count else np.empty(0)
                    for lists in (ivf.invlists, expected)
                ]
                np.testing.assert_array_equal(arrays[0], arrays[1])


def test_parts_without_rows_in_some_lists_are_merged(tmp_path: Path) -> None:
    # Sorted, so that a part has rows of few lists only; the lists are empty in the other parts.
    vectors_NX = np.sort(make_vectors(400, 1), axis=0)
    index = open_index(tmp_path / "i", vectors_NX, "IVF8,Flat", num_parts=8, nprobe=8)
    queries_QX = make_queries(10, 1)
    assert_found(index.search(queries_QX, 5), brute_force(vectors_NX, queries_QX, 5, normalized=False))


@pytest.mark.parametrize("factory", APPROXIMATE)
@pytest.mark.parametrize("segments", [(300, 200), (350,), (100, 100, 100)])
def test_rows_of_all_segments_and_after_the_last_one_are_found(
    tmp_path: Path, factory: str, segments: tuple[int, ...]
) -> None:
    vectors_NX = make_vectors(500, 16)
    index = open_index(
        tmp_path, vectors_NX, factory, segments=segments, num_parts=2, nprobe=8, ef_search=16, rescore=100
    )
    assert len(index) == 500
    queries_QX = make_queries(20, 16)
    assert_found(index.search(queries_QX, 5), brute_force(vectors_NX, queries_QX, 5, normalized=False))
    itself = index.search(vectors_NX.astype(np.float32), 1)
    assert itself[1][:, 0].tolist() == list(range(500))
    assert (itself[0] == 0).all()


@pytest.mark.parametrize("factory", APPROXIMATE)
@pytest.mark.parametrize("exact_below", [50_000, 0], ids=["few rows are compared directly", "through the lists"])
def test_filters_and_removed_rows_hold_with_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factory: str, exact_below: int
) -> None:
    monkeypatch.setattr(vector_index, "EXACT_BELOW", exact_below)
    n = 500
    vectors_NX = make_vectors(n, 16)
    rows = np.arange(n)
    dead_N = rows % 5 == 0
    queries_QX = make_queries(10, 16)
    for number, dead in enumerate((None, dead_N)):
        index = open_index(
            tmp_path / str(number),
            vectors_NX,
            factory,
            segments=(203, 200),
            dead_N=dead,
            nprobe=8,
            ef_search=16,
            rescore=100,
        )
        for keep_N in (None, rows % 3 == 1, rows < 4, rows > 450, rows == 7, np.zeros(n, np.bool_)):
            may_N = np.ones(n, np.bool_) if keep_N is None else keep_N.copy()
            if dead is not None:
                may_N &= ~dead
            expected = brute_force(vectors_NX, queries_QX, 6, normalized=False, may_N=may_N)
            assert_found(index.search(queries_QX, 6, keep_N=keep_N), expected)
            assert_found(index.search(queries_QX, 6, keep_N=keep_N, all_lists=True), expected)


def test_all_lists_find_as_many_as_there_are(tmp_path: Path) -> None:
    vectors_NX = make_vectors(300, 4)
    keep_N = np.arange(300) % 2 == 0
    index = open_index(tmp_path / "i", vectors_NX, "IVF16,Flat", dead_N=np.arange(300) % 4 == 0, nprobe=1)
    queries_QX = make_queries(5, 4)
    assert (index.search(queries_QX, 60)[1] == -1).any()  # one list has not so many
    found = index.search(queries_QX, 80, keep_N=keep_N, all_lists=True)[1]
    assert (np.sort(found[:, :75], axis=1) == np.arange(2, 300, 4)).all()
    assert (found[:, 75:] == -1).all()


def test_an_index_may_be_moved(tmp_path: Path) -> None:
    vectors_NX = make_vectors(300, 8)
    index = open_index(tmp_path / "here", vectors_NX, "IVF8,SQ8", segments=(200, 100), num_parts=2, nprobe=3)
    queries_QX = make_queries(10, 8)
    expected = index.search(queries_QX, 5)
    shutil.move(tmp_path / "here", tmp_path / "there")
    records = [{"file": "0.faiss", "rows": 200}, {"file": "1.faiss", "rows": 100}]
    description = {"metric": "L2", "segments": records, "nprobe": 3}
    moved = VectorIndex.open(tmp_path / "there", in_shards(vectors_NX), description)
    assert_same(moved.search(queries_QX, 5), expected)


@pytest.mark.parametrize("num_parts", [1, 3])
@pytest.mark.parametrize(
    "part", [slice(0, 0), slice(0, 3), slice(0, 60), slice(0, -1), slice(0, -9000), slice(7, None)]
)
def test_a_damaged_segment_is_refused(tmp_path: Path, part: slice, num_parts: int) -> None:
    vectors_NX = make_vectors(400, 8)
    open_index(tmp_path / "i", vectors_NX, "IVF4,Flat", num_parts=num_parts)
    path = tmp_path / "i" / "0.faiss"
    path.write_bytes(path.read_bytes()[part])
    description = {"metric": "L2", "segments": [{"file": "0.faiss", "rows": 400}]}
    with pytest.raises(FormatError, match=r"0\.faiss is no FAISS index or is damaged: build it again"):
        VectorIndex.open(tmp_path / "i", in_shards(vectors_NX), description)


def test_a_damaged_part_is_not_merged(tmp_path: Path) -> None:
    open_index(tmp_path / "i", make_vectors(400, 8), "IVF4,Flat")
    (tmp_path / "part").write_bytes((tmp_path / "i" / "0.faiss").read_bytes()[:-5])
    with pytest.raises(FormatError, match="part is no FAISS index or is damaged"):
        merge_parts(tmp_path / "i" / TRAINED, [tmp_path / "i" / "0.faiss", tmp_path / "part"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_segment_that_is_not_the_described_one_is_refused(tmp_path: Path) -> None:
    vectors_NX = make_vectors(400, 8)
    open_index(tmp_path / "i", vectors_NX, "IVF4,Flat")

    def open_with(name: str, rows: int, vectors: Vectors) -> None:
        VectorIndex.open(tmp_path / "i", vectors, {"metric": "L2", "segments": [{"file": name, "rows": rows}]})

    with pytest.raises(FormatError, match=r"0\.faiss holds 400 vectors of 8 numbers, not 401 of 8: build the index"):
        open_with("0.faiss", 401, in_shards(vectors_NX))
    with pytest.raises(FormatError, match=r"0\.faiss holds 400 vectors of 8 numbers, not 400 of 7"):
        open_with("0.faiss", 400, in_shards(make_vectors(400, 7)))
    with pytest.raises(FormatError, match="has more rows than there are vectors"):
        open_with("0.faiss", 400, in_shards(vectors_NX[:399]))
    with pytest.raises(FormatError, match=r"1\.faiss is missing: build the index again"):
        open_with("1.faiss", 400, in_shards(vectors_NX))
    faiss.write_index(faiss.IndexFlatL2(8), str(tmp_path / "i" / "flat"))
    with pytest.raises(FormatError, match="flat holds 0 vectors"):
        open_with("flat", 0, in_shards(vectors_NX))


# Training


@METRICS
def test_training_twice_gives_the_same_bytes(tmp_path: Path, normalized: bool) -> None:
    vectors = in_shards(make_vectors(400, 16, normalized=normalized))
    plan = plan_index(400, 16, TURNED)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(tmp_path / name, vectors, plan, normalized=normalized, seed=seed)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()
    trained = faiss.read_index(str(tmp_path / "a"))
    assert (trained.ntotal, trained.is_trained) == (0, True)
    assert trained.metric_type == (faiss.METRIC_INNER_PRODUCT if normalized else faiss.METRIC_L2)


@METRICS
@pytest.mark.parametrize("factory", ["IVF8,SQ8", "PCA16,IVF8,PQ8x4", TURNED])
def test_training_through_files_gives_what_faiss_itself_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factory: str, normalized: bool
) -> None:
    monkeypatch.setattr(vector_index, "BLOCK_BYTES", 64 * 24 * 4)  # 64 rows: the sample is gathered in several blocks
    vectors_NX = make_vectors(500, 24, normalized=normalized)
    plan = plan_index(500, 24, factory)
    train(tmp_path / "trained", in_shards(vectors_NX), plan, normalized=normalized, seed=5)
    theirs = faiss.index_factory(24, factory, faiss.METRIC_INNER_PRODUCT if normalized else faiss.METRIC_L2)
    faiss.extract_index_ivf(theirs).cp.seed = 1234 + 5
    theirs.train(vectors_NX.astype(np.float32))
    assert (tmp_path / "trained").read_bytes() == faiss.serialize_index(theirs).tobytes()
    assert [path.name for path in tmp_path.iterdir()] == ["trained"]  # nothing is left of the sample


def test_a_sample_for_which_there_is_no_room_says_so(
    tmp_path: Path, file_limit: Callable[[int], AbstractContextManager[None]]
) -> None:
    vectors = in_shards(make_vectors(500, 24))
    with file_limit(10_000), pytest.raises(StorageError, match=r"the disk is full .* cannot write .*trained\.faiss"):
        train(tmp_path / TRAINED, vectors, plan_index(500, 24, "IVF8,SQ8"), normalized=False, seed=0)
    assert list(tmp_path.iterdir()) == []


def test_a_rotation_of_wide_vectors_is_learned_from_fewer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # 300 vectors of 24 numbers of 4 bytes are allowed: a training of FAISS on no more has the same result.
    monkeypatch.setattr(vector_index, "OPQ_BYTES", 300 * 24 * 4)
    monkeypatch.setattr(vector_index, "MIN_OPQ", 100)
    vectors_NX = make_vectors(500, 24)
    train(tmp_path / "few", in_shards(vectors_NX), plan_index(500, 24, TURNED), normalized=False, seed=0)
    rotations = []
    for most in (300, 500):
        opq = faiss.OPQMatrix(24, 4, 16)
        opq.max_train_points = most
        opq.train(vectors_NX.astype(np.float32))
        rotations.append(faiss.vector_to_array(opq.A))
    index: Any = faiss.read_index(str(tmp_path / "few"))
    found: Any = faiss.downcast_VectorTransform(index.chain.at(0))
    np.testing.assert_array_equal(faiss.vector_to_array(found.A), rotations[0])
    assert not np.array_equal(rotations[0], rotations[1])


@pytest.mark.parametrize("factory", APPROXIMATE)
def test_lists_of_merged_parts_are_those_of_adding_everything_at_once(tmp_path: Path, factory: str) -> None:
    # The second part has one row, so that FAISS writes the sizes of its lists sparsely; the third has none.
    vectors_NX = make_vectors(300, 24)
    vectors, plan = in_shards(vectors_NX), plan_index(300, 24, factory)
    train(tmp_path / "trained", vectors, plan, normalized=False, seed=0)
    borders = [0, 150, 151, 151, 300]
    parts = [tmp_path / f"part{number}" for number in range(4)]
    for part, first, end in zip(parts, borders, borders[1:], strict=False):
        add_part(tmp_path / "trained", vectors, first, end, part)
    merge_parts(tmp_path / "trained", parts, tmp_path / "merged")
    expected = faiss.read_index(str(tmp_path / "trained"))
    expected.add_with_ids(vectors_NX.astype(np.float32), np.arange(300))
    assert (tmp_path / "merged").read_bytes() == faiss.serialize_index(expected).tobytes()


def test_parts_of_wide_vectors_have_fewer_rows() -> None:
    def part(dim: int, factory: str = "IVF1024,Flat") -> int:
        return plan_index(10_000_000, dim, factory).part_rows

    assert part(384) == 262_144
    assert part(1024) == (400 << 20) // (4 * 1024 + 8)
    assert part(768, "IVF65536_HNSW32,SQ8") == (400 << 20) // (768 + 8)
    assert part(384, "OPQ96_384,IVF65536_HNSW32,PQ96") == 16 * 65_536


def test_blocks_of_wide_vectors_have_fewer_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vector_index, "BLOCK_BYTES", 5 * 4 * 3)
    vectors_NX = make_vectors(12, 3)
    blocks = list(in_shards(vectors_NX).blocks())
    assert [(first, len(block)) for first, block in blocks] == [(0, 5), (5, 5), (10, 2)]
    np.testing.assert_array_equal(np.concatenate([block for _, block in blocks]), vectors_NX.astype(np.float32))


def test_an_index_is_trained_on_rows_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Four clusters, one in each quarter of the rows; 64 lists take 4,096 of 40,000, and the first of them would be one cluster.
    monkeypatch.setattr(vector_index, "MIN_TRAIN", 1)
    random = np.random.default_rng(0)
    corners = ((-50, -50), (-50, 50), (50, -50), (50, 50))
    vectors_NX = np.concatenate([random.normal(corner, 1, (10_000, 2)) for corner in corners]).astype(np.float16)
    plan = plan_index(40_000, 2, "IVF64,Flat")
    train(tmp_path / "trained", in_shards(vectors_NX), plan, normalized=False, seed=0)
    trained: Any = faiss.read_index(str(tmp_path / "trained"))
    centroids = trained.quantizer.reconstruct_n(0, 64)
    per_corner = [int((np.sign(centroids) == np.sign(corner)).all(axis=1).sum()) for corner in corners]
    assert sum(per_corner) == 64
    assert min(per_corner) >= 8


def test_the_training_sample_is_seeded_uniform_and_in_the_order_of_rows(tmp_path: Path) -> None:
    # Two numbers tell the row, which float16 could not hold in one.
    n = 100_000
    vectors = Vectors(np.split(np.stack(np.divmod(np.arange(n), 1000), axis=1).astype(np.float16), [30_001, 30_001]))

    def rows(size: int, seed: int) -> Rows:
        drawn = _sample(vectors, size, seed, tmp_path).astype(np.int64)
        return drawn[:, 0] * 1000 + drawn[:, 1]

    drawn = rows(70_000, 7)  # more than are gathered in one go
    np.testing.assert_array_equal(drawn, np.sort(np.random.default_rng(7).choice(n, 70_000, replace=False)))
    few = rows(1000, 7)
    assert (np.diff(few) > 0).all()
    # Of a thousand draws 100 are expected in each tenth; 60 or 140 would be four standard deviations away.
    assert (np.abs(np.bincount(few // 10_000, minlength=10) - 100) < 40).all()
    assert rows(1000, 8).tolist() != few.tolist()
    assert rows(n, 0).tolist() == list(range(n))


@pytest.mark.parametrize(("n", "size"), [(1000, 300), (1000, 700), (1000, 1000), (1_000_000, 20_000)])
def test_numbers_of_very_many_rows_are_drawn_alike(monkeypatch: pytest.MonkeyPatch, n: int, size: int) -> None:
    monkeypatch.setattr(vector_index, "DRAWN_BY_SHUFFLE", 0)
    drawn = _draw(n, size, 7)
    assert (len(drawn), drawn.dtype.name) == (size, "int64")
    assert (np.diff(drawn) > 0).all()
    assert 0 <= drawn[0] <= drawn[-1] < n
    np.testing.assert_array_equal(drawn, _draw(n, size, 7))
    # Each number is as probable as any other: the share of the lower half is that of all, to five standard deviations.
    lower = sum(int((_draw(n, size, seed) < n // 2).sum()) for seed in range(20))
    assert abs(lower - 10 * size) <= 5 * np.sqrt(20 * size * (n - size) / n / 4)


def test_too_few_vectors_to_train_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        train(
            tmp_path / "trained",
            in_shards(make_vectors(10, 4)),
            plan_index(10, 4, "IVF16,Flat"),
            normalized=False,
            seed=0,
        )
    assert str(caught.value) == "10 vectors are too few for the index type 'IVF16,Flat': take a smaller one or auto"
    assert list(tmp_path.iterdir()) == []


# Which index


@pytest.mark.parametrize(
    ("num_vectors", "dim", "max_memory", "factory", "memory"),
    [
        (0, 384, None, "Flat", 0),
        (49_999, 384, None, "Flat", 49_999 * 384 * 4),
        # 4 sqrt(50,000) is 894; the nearest power of two, by ratio, is 1024. A row number takes 8 bytes, a centroid 4 * 384.
        (50_000, 384, None, "IVF1024,SQfp16", 50_000 * (768 + 8) + 1024 * 1536),
        (1_000_000, 384, None, "IVF4096,SQfp16", 1_000_000 * 776 + 4096 * 1536),
        (1_000_000, 384, 782_291_456, "IVF4096,SQfp16", 782_291_456),
        (1_000_000, 384, 782_291_455, "IVF4096,SQ8", 1_000_000 * (384 + 8) + 4096 * 1536),
        (1_000_000, 384, 384_000_000, "OPQ96_384,IVF4096,PQ96", 1_000_000 * (96 + 8) + 4096 * 1536),
        # 96 codes would take 110 MB. 64 codes of four numbers: centroids have 256.
        (1_000_000, 384, 100_000_000, "OPQ64_256,IVF4096,PQ64", 1_000_000 * (64 + 8) + 4096 * 1024),
        # Exact search of few vectors that do not fit: 40,000 KB. 4 sqrt(10,000) is 400, so 512 lists; 39 vectors each allow 256.
        (10_000, 1000, 39_999_999, "IVF256,SQfp16", 10_000 * 2008 + 256 * 4000),
        # 4 sqrt(32,000,000) is 22,627, less than 2 ** 14.5; a graph has 64 neighbors of 4 bytes.
        (32_000_000, 128, None, "IVF16384_HNSW32,SQfp16", 32_000_000 * (256 + 8) + 16384 * (512 + 256)),
        # 4 sqrt(19e9) is 551,362. 72 bytes a vector would be 1.37e12, a TiB is 1.10e12.
        (
            19_000_000_000,
            384,
            2**40,
            "OPQ48_192,IVF524288_HNSW32,PQ48",
            19_000_000_000 * (48 + 8) + 524_288 * (768 + 256),
        ),
    ],
)
def test_the_kind_of_index_follows_from_number_width_and_memory(
    num_vectors: int, dim: int, max_memory: int | None, factory: str, memory: int
) -> None:
    plan = plan_index(num_vectors, dim, max_memory=max_memory)
    assert (plan.factory, plan.memory_bytes) == (factory, memory)
    assert f"{num_vectors:,} vectors" in plan.reason
    assert max_memory is None or memory <= max_memory


@pytest.mark.parametrize("memory", [1 << 40, 1000])
def test_lists_are_fetched_beforehand_only_where_memory_cannot_hold_them(
    memory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("index_builder.index.physical_memory", lambda: memory)
    vectors_NX = make_vectors(400, 24)
    index = open_index(tmp_path / "i", vectors_NX, "IVF8,SQfp16", num_parts=2, nprobe=8)
    assert index._segments
    for segment in index._segments:
        ivf: Any = faiss.extract_index_ivf(segment)
        lists: Any = faiss.downcast_InvertedLists(ivf.invlists)
        assert (lists.prefetch_nthread == 0) == (memory > 1000)
    assert index.search(vectors_NX[:50].astype(np.float32), 1)[1][:, 0].tolist() == list(range(50))


@pytest.mark.parametrize("normalized", [True, False])
def test_scores_do_not_depend_on_how_many_are_computed_at_once(
    normalized: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors_NX = make_vectors(400, 24)
    index = open_index(tmp_path / "i", vectors_NX, "IVF8,SQfp16", normalized=normalized, nprobe=8)
    scores_QK, rows_QK = index.search(vectors_NX[:50].astype(np.float32), 7)
    monkeypatch.setattr("index_builder.index.SCORED_AT_ONCE", 24 * 5)
    again_QK, same_QK = index.search(vectors_NX[:50].astype(np.float32), 7)
    assert np.array_equal(scores_QK, again_QK)
    assert np.array_equal(rows_QK, same_QK)


@pytest.mark.parametrize(
    ("dim", "kinds"),
    [
        # X/4, X/6, X/8, X/12, X/24 codes of at most four numbers.
        (32, ["OPQ8_32,{},PQ8", "OPQ5_20,{},PQ5", "OPQ4_16,{},PQ4", "OPQ2_8,{},PQ2", "OPQ1_4,{},PQ1"]),
        (100, ["OPQ25_100,{},PQ25", "OPQ16_64,{},PQ16", "OPQ12_48,{},PQ12", "OPQ8_32,{},PQ8", "OPQ4_16,{},PQ4"]),
        (
            768,
            [
                "OPQ192_768,{},PQ192",
                "OPQ128_512,{},PQ128",
                "OPQ96_384,{},PQ96",
                "OPQ64_256,{},PQ64",
                "OPQ32_128,{},PQ32",
            ],
        ),
        (
            1024,
            [
                "OPQ256_1024,{},PQ256",
                "OPQ170_680,{},PQ170",
                "OPQ128_512,{},PQ128",
                "OPQ85_340,{},PQ85",
                "OPQ42_168,{},PQ42",
            ],
        ),
    ],
)
def test_the_most_accurate_index_that_fits_is_taken(dim: int, kinds: list[str]) -> None:
    n = 1_000_000
    factories = ["IVF4096,SQfp16", "IVF4096,SQ8", *(kind.format("IVF4096") for kind in kinds)]
    sizes = []
    for factory in factories:
        whole = faiss.index_factory(dim, factory)
        made = faiss.extract_index_ivf(whole)  # FAISS itself says how many bytes a code has
        sizes.append(n * (made.code_size + 8) + 4096 * 4 * made.d)
    assert sizes == sorted(sizes, reverse=True)
    for number, (factory, size) in enumerate(zip(factories, sizes, strict=True)):
        plan = plan_index(n, dim, max_memory=size)
        assert (plan.factory, plan.memory_bytes) == (factory, size)
        if number + 1 < len(factories):
            assert plan_index(n, dim, max_memory=size - 1).factory == factories[number + 1]
    with pytest.raises(ConfigError, match="are missing"):
        plan_index(n, dim, max_memory=sizes[-1] - 1)


def test_what_does_not_fit_says_how_much_is_missing() -> None:
    # 16 bytes and 8 of the row; centroids of 64 numbers in a graph: 456,268,435,456 bytes, which are 424.93 GiB.
    with pytest.raises(ConfigError) as caught:
        plan_index(19_000_000_000, 384)
    assert str(caught.value) == (
        "the smallest index of 19,000,000,000 vectors of 384 numbers takes 424.93 GiB, 8.00 GiB are allowed: 416.93 GiB are "
        "missing. Raise --max-memory, or take an encoder with fewer dimensions"
    )
    # 24,000,000 + 4096 * 256 bytes are 23.89 MiB.
    with pytest.raises(ConfigError, match=r"takes 23\.89 MiB, 20\.00 MiB are allowed: 3\.89 MiB are missing"):
        plan_index(1_000_000, 384, max_memory=20 << 20)
    # Product codes are out of the question where every neighbor is wanted: 398,291,456 bytes.
    with pytest.raises(ConfigError, match=r"takes 379\.84 MiB, 100\.00 MiB are allowed"):
        plan_index(1_000_000, 384, max_memory=100 << 20, recall=1.0)


def test_a_factory_string_overrides_the_rule() -> None:
    plan = plan_index(20_000_000, 384, "IVF4096,Flat")  # over what is free
    assert (plan.factory, plan.reason) == ("IVF4096,Flat", "IVF4096,Flat, as asked for")
    assert plan.memory_bytes == 20_000_000 * 1544 + 4096 * 1536
    assert plan_index(1_000_000, 8, "Flat").memory_bytes == 32_000_000
    assert plan_index(1_000_000, 384, "IVF4096,Flat", max_memory=1_550_291_456).bytes_per_vector == 1544
    with pytest.raises(ConfigError) as caught:
        plan_index(1_000_000, 384, "IVF4096,Flat", max_memory=1 << 30)
    assert str(caught.value) == (
        "IVF4096,Flat takes 1.44 GiB for 1,000,000 vectors, 1.00 GiB are allowed (454.47 MiB are missing): "
        "raise --max-memory or choose another --index-type"
    )


@pytest.mark.parametrize("factory", ["Nonsense", "IVF", "", "IVF8,PQ5"])
def test_an_unknown_kind_of_index_is_refused_with_examples(factory: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_index(500, 12, factory)
    assert str(caught.value) == (
        f"FAISS does not know the index type {factory!r} for 12 dimensions; "
        "examples: Flat, IVF1024,SQfp16, IVF4096,SQ8, OPQ64_256,IVF16384_HNSW32,PQ64"
    )


@pytest.mark.parametrize("factory", ["HNSW32", "SQ8", "PQ2x4"])
def test_an_index_without_inverted_lists_is_refused(factory: str) -> None:
    with pytest.raises(ConfigError, match=f"index type '{factory}' has no inverted lists: use Flat, or one with IVF"):
        plan_index(500, 12, factory)


# Tuning


def clustered(n: int, dim: int) -> Stored:
    random = np.random.default_rng(5)
    centers = random.normal(size=(n // 20, dim))
    vectors_NX = centers[random.integers(0, len(centers), n)] + 0.6 * random.normal(size=(n, dim))
    stored: Stored = (vectors_NX / np.linalg.norm(vectors_NX, axis=1, keepdims=True)).astype(np.float16)
    return stored


def leave_one_out(vectors_NX: Stored, index: VectorIndex, k: int, wanted: int) -> float:
    """Mean share of the k nearest other rows among k rows that a search for one more finds, without the row itself."""
    scores_NN = vectors_NX.astype(np.float64) @ vectors_NX.astype(np.float64).T
    np.fill_diagonal(scores_NN, -np.inf)
    hits = 0
    found = index.search(vectors_NX.astype(np.float32), wanted + 1)[1].tolist()
    for row, scores_N in enumerate(scores_NN):
        others = [other for other in found[row] if other != row][:k]
        hits += len(set(others) & set(np.argsort(-scores_N.astype(np.float32), kind="stable")[:k].tolist()))
    return hits / (k * len(vectors_NX))


@pytest.mark.parametrize("factory", ["IVF16,Flat", "IVF16,SQ8", "PCA16,IVF16_HNSW4,PQ8x4"])
def test_tuning_reaches_the_wanted_recall_and_says_what_it_measured(tmp_path: Path, factory: str) -> None:
    vectors_NX = clustered(1000, 16)  # few enough for each of them to be a query
    index = open_index(tmp_path / "i", vectors_NX, factory, normalized=True)
    cheap = leave_one_out(vectors_NX, index, 10, 10)
    assert cheap < 0.9
    found = tune(in_shards(vectors_NX), index, recall=0.9, seed=0)
    measured = found["measured"]
    assert measured["recall_at_10"] == round(leave_one_out(vectors_NX, index, 10, 10), 4) >= 0.9
    assert measured["recall_at_100"] == round(leave_one_out(vectors_NX, index, 100, 100), 4)
    assert (found["nprobe"], found["ef_search"] or 0, found["rescore"]) == (
        index.nprobe,
        index.ef_search,
        index.rescore,
    )
    assert (found["ef_search"] is not None) == index.has_graph
    assert measured["bytes_per_vector"] == plan_index(1000, 16, factory).bytes_per_vector
    assert (measured["queries"], measured["queries_per_s"] > 0) == (1000, True)
    # The settings before, with fewer lists, are not good enough.
    assert 1 < index.nprobe < 16
    index.nprobe -= 1
    assert leave_one_out(vectors_NX, index, 10, 10) < 0.9
    # An index that is opened with them searches with them.
    described = {"metric": "inner product", "segments": [{"file": "0.faiss", "rows": 1000}], **found}
    reopened = VectorIndex.open(tmp_path / "i", in_shards(vectors_NX), described)
    assert round(leave_one_out(vectors_NX, reopened, 10, 10), 4) == measured["recall_at_10"]


def test_tuning_follows_from_its_seed(tmp_path: Path) -> None:
    vectors_NX = clustered(3000, 4)
    index = open_index(tmp_path / "i", vectors_NX, "IVF16,Flat", normalized=True)
    measured = [tune(in_shards(vectors_NX), index, recall=0.8, seed=seed)["measured"] for seed in (0, 0, 1)]
    recalls = [(each["recall_at_10"], each["recall_at_100"]) for each in measured]
    assert recalls[0] == recalls[1] != recalls[2]
    assert measured[0]["queries"] == 1000


def test_a_recall_that_cannot_be_reached_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # Two bits for sixteen numbers: what is nearest by them is not nearest.
    vectors_NX = make_vectors(1000, 16, normalized=True)
    index = open_index(tmp_path / "i", vectors_NX, "IVF4,PQ1x2", normalized=True)
    with caplog.at_level(logging.WARNING):
        found = tune(in_shards(vectors_NX), index, recall=1.0, seed=0)
    reached = leave_one_out(vectors_NX, index, 10, 10)
    assert reached < 1
    assert caplog.messages == [f"recall@10 is {reached:.3f} at most, 1.000 was wanted: allow more memory"]
    assert (found["nprobe"], found["rescore"]) == (4, 16)
    assert found["measured"]["recall_at_10"] == round(reached, 4)


@pytest.mark.parametrize("n", [0, 1, 2, 50, 200])
def test_exact_search_has_a_recall_of_one(tmp_path: Path, n: int) -> None:
    index = open_index(tmp_path, make_vectors(n, 4))
    found = tune(in_shards(make_vectors(n, 4)), index, recall=0.95, seed=0)
    measured = found.pop("measured")
    assert found == {"nprobe": None, "ef_search": None, "rescore": None}
    assert (measured["recall_at_10"], measured["recall_at_100"], measured["queries"]) == (1.0, 1.0, n)
    assert measured["bytes_per_vector"] == 16


# GPUs


@pytest.mark.parametrize(
    ("device", "numbers"),
    [("cpu", []), ("cuda", [0]), ("cuda:1", [1]), ("cuda:0,cuda:3", [0, 3]), ("cpu,cpu", [])],
)
def test_devices_are_numbers_of_gpus(device: str, numbers: list[int]) -> None:
    assert _gpus(device) == numbers


def test_what_does_not_fit_on_the_gpus_is_refused_before_it_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {0: 10 << 30, 1: 4 << 30}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (free[gpu], 80 << 30))
    # Half of 5 GiB and 1.5 GiB are just what the second one has.
    estimate_gpu_memory(5 << 30, "cuda:0,cuda:1", what="the index")
    estimate_gpu_memory(17 << 29, "cuda:0", what="the index")
    with pytest.raises(ConfigError, match=r"the index needs 10\.00 GiB on each of 1 GPUs, 10\.00 GiB are free"):
        estimate_gpu_memory((17 << 29) + 1, "cuda", what="the index")
    with pytest.raises(ConfigError) as caught:
        estimate_gpu_memory(8 << 30, "cuda:0,cuda:1", what="adding vectors")
    assert str(caught.value) == (
        "adding vectors needs 5.50 GiB on each of 2 GPUs, 4.00 GiB are free (1.50 GiB missing): use --device cpu, more GPUs, "
        "or a smaller index (--max-memory)"
    )


@pytest.mark.skipif(hasattr(faiss, "StandardGpuResources"), reason="this FAISS can use GPUs")
def test_without_gpu_support_the_index_is_searched_on_the_cpu(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    vectors_NX = make_vectors(300, 8)
    expected = open_index(tmp_path / "i", vectors_NX, "IVF8,SQ8", nprobe=2)
    description = {"metric": "L2", "segments": [{"file": "0.faiss", "rows": 300}], "nprobe": 2}
    with caplog.at_level(logging.WARNING):
        index = VectorIndex.open(tmp_path / "i", in_shards(vectors_NX), description, device="cuda:0")
    assert caplog.messages == [
        "the installed FAISS has no GPU support: the index is searched on the CPU (retro-lm[gpu])"
    ]
    queries_QX = make_queries(5, 8)
    assert_same(index.search(queries_QX, 5), expected.search(queries_QX, 5))
