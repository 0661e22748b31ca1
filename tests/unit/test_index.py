"""The vector index against brute force in numpy: ids and scores, for both metrics, exact and with inverted lists."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from index_builder.index import VectorIndex, plan_index
from retro.errors import ConfigError, FormatError, StorageError

Vectors = NDArray[np.float16]


def make_vectors(n: int, dim: int, *, seed: int = 0, normalized: bool = False) -> Vectors:
    vectors_NX = np.random.default_rng(seed).normal(size=(n, dim))
    if normalized:
        vectors_NX /= np.linalg.norm(vectors_NX, axis=1, keepdims=True)
    return vectors_NX.astype(np.float16)


def in_shards(vectors_NX: Vectors, *sizes: int) -> Callable[[], Iterable[Vectors]]:
    return lambda: np.split(vectors_NX, np.cumsum(sizes))


def build(vectors_NX: Vectors, factory: str = "Flat", *, normalized: bool = False, seed: int = 0) -> VectorIndex:
    n, dim = vectors_NX.shape
    shards = in_shards(vectors_NX, n // 3, n // 4)
    return VectorIndex.build(shards, num_vectors=n, dim=dim, factory=factory, normalized=normalized, seed=seed)


def brute_force(
    vectors_NX: Vectors, queries_QX: NDArray[np.float32], k: int, *, normalized: bool
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Scores and rows by computing all of them in float64; an inner product, or minus the squared distance."""
    stored, asked = vectors_NX.astype(np.float64), queries_QX.astype(np.float64)
    scores_QN = asked @ stored.T if normalized else -((asked[:, None] - stored[None]) ** 2).sum(axis=2)
    rows_QK = np.argsort(-scores_QN, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores_QN, rows_QK, axis=1), rows_QK


@pytest.mark.parametrize("normalized", [False, True], ids=["L2", "inner product"])
@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat"])
def test_results_equal_brute_force(factory: str, normalized: bool) -> None:
    vectors_NX = make_vectors(1000, 12, normalized=normalized)
    queries_QX = make_vectors(50, 12, seed=1).astype(np.float32)
    # With eight inverted lists all are searched (at most 16 are left alone).
    index = build(vectors_NX, factory, normalized=normalized)
    scores_QK, rows_QK = index.search(queries_QX, 10)
    expected_scores, expected_rows = brute_force(vectors_NX, queries_QX, 10, normalized=normalized)
    np.testing.assert_array_equal(rows_QK, expected_rows)
    np.testing.assert_allclose(scores_QK, expected_scores, rtol=1e-4, atol=1e-5)
    assert rows_QK.dtype == np.int64
    assert scores_QK.dtype == np.float32
    assert index.metric == ("inner product" if normalized else "L2")


def test_l2_and_inner_product_are_not_taken_for_each_other() -> None:
    # The inner product prefers the longer vector, L2 the nearer one.
    vectors_NX = np.array([[1, 0], [10, 1]], np.float16)
    query_1X = np.array([[1, 0.1]], np.float32)
    for normalized, rows in ((False, [0, 1]), (True, [1, 0])):
        index = build(vectors_NX, normalized=normalized)
        assert index.search(query_1X, 2)[1].tolist() == [rows]


def test_every_vector_finds_itself() -> None:
    vectors_NX = make_vectors(500, 16)
    scores_QK, rows_QK = build(vectors_NX).search(vectors_NX.astype(np.float32), 1)
    assert rows_QK[:, 0].tolist() == list(range(500))
    np.testing.assert_allclose(scores_QK[:, 0], 0, atol=1e-4)


def test_vectors_keep_their_rows_over_shards_of_any_size() -> None:
    vectors_NX = make_vectors(20, 4)
    done: list[int] = []
    index = VectorIndex.build(
        in_shards(vectors_NX, 1, 0, 7),
        num_vectors=20,
        dim=4,
        factory="Flat",
        normalized=False,
        seed=0,
        progress=done.append,
    )
    assert (len(index), index.dim) == (20, 4)
    assert done == [1, 1, 8, 20]
    assert index.search(vectors_NX.astype(np.float32), 1)[1][:, 0].tolist() == list(range(20))


def test_what_is_not_found_is_minus_one_with_the_score_minus_infinity() -> None:
    for normalized in (False, True):
        scores_QK, rows_QK = build(make_vectors(3, 4), normalized=normalized).search(np.ones((2, 4), np.float32), 5)
        assert (rows_QK[:, 3:] == -1).all()
        assert (scores_QK[:, 3:] == -np.inf).all()
        assert (np.sort(rows_QK[:, :3], axis=1) == np.arange(3)).all()


def test_no_query_has_no_result() -> None:
    scores_QK, rows_QK = build(make_vectors(3, 4)).search(np.empty((0, 4), np.float32), 5)
    assert scores_QK.shape == rows_QK.shape == (0, 5)


# Which index


@pytest.mark.parametrize(
    ("num_vectors", "factory"),
    [
        (1, "Flat"),
        (49_999, "Flat"),
        # 4 sqrt(50,000) is 894; the nearest power of two, by ratio, is 1024.
        (50_000, "IVF1024,Flat"),
        (1_000_000, "IVF4096,Flat"),
        # 4 sqrt(32,000,000) is 22,627: less than 2 ** 14.5 = 23,170.
        (32_000_000, "IVF16384,Flat"),
    ],
)
def test_the_kind_of_index_follows_from_the_number_of_vectors(num_vectors: int, factory: str) -> None:
    plan = plan_index(num_vectors)
    assert plan.factory == factory
    assert f"{num_vectors:,} vectors" in plan.reason


def test_a_factory_string_overrides_the_rule() -> None:
    plan = plan_index(1_000_000, "HNSW32")
    assert (plan.factory, plan.reason) == ("HNSW32", "HNSW32, as asked for")


def test_one_list_in_sixteen_is_searched_and_never_fewer_than_sixteen_lists() -> None:
    probes = {}
    for lists in (4, 16, 32, 512):
        index = build(make_vectors(max(40 * lists, 200), 2), f"IVF{lists},Flat")
        probes[lists] = index._index.nprobe
    assert probes == {4: 4, 16: 16, 32: 16, 512: 32}


@pytest.mark.parametrize("factory", ["Nonsense", "IVF", "", "IVF8,PQ5"])
def test_an_unknown_kind_of_index_is_refused_with_examples(factory: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(make_vectors(500, 12), factory)
    assert str(caught.value) == (
        f"FAISS does not know the index type {factory!r} for 12 dimensions; examples: Flat, IVF1024,Flat, IVF4096,SQ8"
    )


def test_too_few_vectors_to_train_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        build(make_vectors(10, 4), "IVF16,Flat")
    assert str(caught.value) == ("10 vectors are too few for the index type 'IVF16,Flat': take a smaller one or auto")


@pytest.mark.parametrize("factory", ["IVF8,SQ8", "HNSW16", "PCA4,IVF8,Flat", "SQ8", "PQ2x4"])
def test_other_kinds_of_index_are_built_and_find_most_vectors(factory: str) -> None:
    vectors_NX = make_vectors(2000, 8)
    index = build(vectors_NX, factory)
    assert len(index) == 2000
    rows_QK = index.search(vectors_NX[:200].astype(np.float32), 20)[1]
    # None of these is exact. Against chance (one in a hundred), each finds the vector itself among twenty for most.
    assert (rows_QK == np.arange(200)[:, None]).any(axis=1).mean() > 0.5


# The sample that trains it


def centroids_of(index: VectorIndex) -> NDArray[np.float32]:
    quantizer = index._index.quantizer
    centroids: NDArray[np.float32] = quantizer.reconstruct_n(0, quantizer.ntotal)
    return centroids


def test_the_training_sample_is_uniform_over_all_rows() -> None:
    # Four clusters, one in each quarter of the rows. 10,000 of 40,000 are drawn: the first 10,000 would be one cluster.
    random = np.random.default_rng(0)
    corners = ((-50, -50), (-50, 50), (50, -50), (50, 50))
    vectors_NX = np.concatenate([random.normal(corner, 1, (10_000, 2)) for corner in corners]).astype(np.float16)
    centroids = centroids_of(build(vectors_NX, "IVF64,Flat"))
    assert {tuple(np.sign(centroid)) for centroid in centroids.tolist()} == {tuple(np.sign(c)) for c in corners}


def test_the_training_sample_follows_from_the_seed() -> None:
    vectors_NX = make_vectors(12_000, 2)
    one, again, other = (centroids_of(build(vectors_NX, "IVF4,Flat", seed=seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


def test_the_training_sample_is_what_numpy_draws_in_the_order_of_the_rows() -> None:
    from index_builder.index import _sample

    vectors_NX = np.arange(2000, dtype=np.float16)[:, None]
    sample = _sample(in_shards(vectors_NX, 500, 0, 999), 2000, 300, seed=7)
    rows = np.sort(np.random.default_rng(7).choice(2000, 300, replace=False))
    assert sample.dtype == np.float32
    np.testing.assert_array_equal(sample[:, 0], rows)
    # Not more than there are.
    assert len(_sample(in_shards(vectors_NX), 2000, 10_000, seed=0)) == 2000


# On disk


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("factory", ["Flat", "IVF64,Flat", "IVF8,SQ8"])
def test_a_saved_index_gives_the_same_results(tmp_path: Path, factory: str, normalized: bool) -> None:
    index = build(make_vectors(4000, 8, normalized=normalized), factory, normalized=normalized)
    index.save(tmp_path / "index" / "vectors.faiss")
    loaded = VectorIndex.load(tmp_path / "index" / "vectors.faiss")
    queries_QX = make_vectors(20, 8, seed=1).astype(np.float32)
    for expected, found in zip(index.search(queries_QX, 5), loaded.search(queries_QX, 5), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert (loaded.metric, len(loaded), loaded.dim) == (index.metric, 4000, 8)


def test_an_index_that_does_not_fit_on_the_disk_leaves_nothing_behind(
    tmp_path: Path, file_limit: Callable[[int], AbstractContextManager[None]]
) -> None:
    index = build(make_vectors(4000, 8))
    with pytest.raises(StorageError, match="the disk is full"), file_limit(10_000):
        index.save(tmp_path / "vectors.faiss")
    assert list(tmp_path.iterdir()) == []


def test_building_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        build(make_vectors(3000, 8), "IVF16,Flat").save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("part", [slice(0, 0), slice(0, 3), slice(0, 60), slice(0, -1), slice(7, None)])
def test_a_damaged_index_is_refused(tmp_path: Path, part: slice) -> None:
    path = tmp_path / "vectors.faiss"
    build(make_vectors(100, 4)).save(path)
    path.write_bytes(path.read_bytes()[part])
    with pytest.raises(FormatError, match=r"vectors\.faiss is no FAISS index or is damaged: build it again"):
        VectorIndex.load(path)


def test_a_missing_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"vectors\.faiss is no FAISS index"):
        VectorIndex.load(tmp_path / "vectors.faiss")
