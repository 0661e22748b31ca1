"""Neighbors with exclusions against brute force, and passages from an index folder."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from index_builder.encoder import Encoder
from index_builder.index import VectorIndex, Vectors, add_part, merge_parts, plan_index, train
from index_builder.search import Found, IndexRetriever, Method, find_neighbors
from retro.artifact import file_record, read_json, write_json
from retro.chunks import ChunkStore, Document, load_array, name_hash, save_array, write_documents
from retro.errors import ConfigError, FormatError, MismatchError

Floats = NDArray[np.float32]


def make_store(folder: Path, groups: list[str]) -> ChunkStore:
    """A store with a row for each entry of `groups`."""
    documents = [
        Document(
            key=f"c:{row}",
            text="x",
            title="",
            url="",
            group=group,
            split="",
            metadata="{}",
            content_hash="",
            source="",
        )
        for row, group in enumerate(groups)
    ]
    write_documents(folder, 0, documents, [np.array([[0, 1]])] * len(groups))
    return ChunkStore(folder)


def find(
    folder: Path,
    vectors_NX: Floats,
    groups: list[str],
    queries_QX: Floats,
    k: int,
    excluded_QG: NDArray[np.uint64] | None = None,
    factory: str = "Flat",
) -> Found:
    """Neighbors in an index of these vectors, a row for each entry of `groups`."""
    store, vectors = make_store(folder, groups), Vectors([vectors_NX.astype(np.float16)])
    description: dict[str, Any] = {"factory": factory, "metric": "L2", "segments": []}
    if factory != "Flat":
        trained, part = folder / "index" / "trained.faiss", folder / "index" / "part.faiss"
        plan = plan_index(len(vectors), vectors.dim, factory)
        train(trained, vectors, plan, normalized=False, seed=0)
        add_part(trained, vectors, 0, len(vectors), part)
        merge_parts(trained, [part], folder / "index" / "00000.faiss")
        description |= {"segments": [{"file": "00000.faiss", "rows": len(vectors)}], "nprobe": 16}
    index = VectorIndex.open(folder / "index", vectors, description)

    def fetch(few: NDArray[np.int64], n: int) -> Found:
        return index.search(queries_QX[few], n, all_lists=n == len(vectors))

    return find_neighbors(fetch, len(queries_QX), len(vectors), k, store.groups, excluded_QG)


def hashes(groups: list[list[str]]) -> NDArray[np.uint64]:
    return np.array([[name_hash(group) for group in row] for row in groups], np.uint64)


def allowed_scores(vectors_NX: Floats, query_X: Floats, groups: list[str], excluded: set[str]) -> dict[int, float]:
    """Minus the squared distance of every row that may be found."""
    return {
        row: -float(((vector - query_X) ** 2).sum())
        for row, (vector, group) in enumerate(zip(vectors_NX, groups, strict=True))
        if group not in excluded
    }


@st.composite
def searches(draw: st.DrawFn) -> tuple[list[str], Floats, Floats, int, list[list[str]]]:
    """Groups and vectors of rows, queries, k, and two excluded groups for each query. Points of a small grid, so that
    duplicates are common and all distances exact; up to 60 rows in few groups, so that more must be fetched."""
    groups = draw(st.lists(st.sampled_from("abbbbccccccc"), min_size=1, max_size=60))
    points = st.tuples(st.integers(-3, 3), st.integers(-3, 3))
    vectors = draw(st.lists(points, min_size=len(groups), max_size=len(groups)))
    queries = draw(st.lists(points, max_size=5))
    excluded = [[draw(st.sampled_from("abcd")), draw(st.sampled_from("bcd"))] for _ in queries]
    queries_QX = np.array(queries, np.float32).reshape(-1, 2)
    return groups, np.array(vectors, np.float32), queries_QX, draw(st.integers(1, 20)), excluded


@settings(max_examples=60)
@given(searches())
def test_neighbors_are_the_best_rows_of_groups_that_are_not_excluded(
    tmp_path_factory: pytest.TempPathFactory, search: tuple[list[str], Floats, Floats, int, list[list[str]]]
) -> None:
    groups, vectors_NX, queries_QX, k, excluded = search
    excluded_QG = hashes(excluded).reshape(len(queries_QX), 2)
    scores_QK, rows_QK = find(tmp_path_factory.mktemp("store"), vectors_NX, groups, queries_QX, k, excluded_QG)
    assert scores_QK.shape == rows_QK.shape == (len(queries_QX), k)
    for query_X, scores, rows, left_out in zip(queries_QX, scores_QK, rows_QK, excluded, strict=True):
        allowed = allowed_scores(vectors_NX, query_X, groups, set(left_out))
        n = min(k, len(allowed))
        # -1 only where every allowed row has been given.
        assert rows[n:].tolist() == [-1] * (k - n)
        assert scores[n:].tolist() == [-np.inf] * (k - n)
        found = rows[:n].tolist()
        assert len(set(found)) == n
        assert scores[:n].tolist() == sorted(allowed.values(), reverse=True)[:n]
        assert [allowed[row] for row in found] == scores[:n].tolist()


def test_without_exclusion_every_row_can_be_found(tmp_path: Path) -> None:
    vectors_NX = np.arange(5, dtype=np.float32)[:, None]
    queries_QX = np.array([[0], [1.25]], np.float32)
    scores_QK, rows_QK = find(tmp_path, vectors_NX, ["a"] * 5, queries_QX, 3)
    assert rows_QK.tolist() == [[0, 1, 2], [1, 2, 0]]
    assert scores_QK.tolist() == [[0, -1, -4], [-(0.25**2), -(0.75**2), -(1.25**2)]]


def test_a_duplicate_in_another_group_remains_and_only_the_own_group_goes(tmp_path: Path) -> None:
    # Rows 0 to 2 are the same text. Whoever drops the first column instead of the own group loses row 1 or 2, or keeps itself.
    vectors_NX = np.array([[0], [0], [0], [5], [7]], np.float32)
    groups, own = ["a", "b", "c", "a", "d"], hashes([["a"], ["b"], ["c"]])
    scores_QK, rows_QK = find(tmp_path, vectors_NX, groups, vectors_NX[:3], 3, own)
    assert [sorted(rows[:2]) for rows in rows_QK.tolist()] == [[1, 2], [0, 2], [0, 1]]
    assert rows_QK[:, 2].tolist() == [4, 3, 3]
    assert scores_QK.tolist() == [[0, 0, -49], [0, 0, -25], [0, 0, -25]]


def test_a_query_that_is_not_in_the_index_loses_nothing(tmp_path: Path) -> None:
    vectors_NX = np.array([[0], [1], [2]], np.float32)
    _, rows_QK = find(tmp_path, vectors_NX, ["a", "b", "c"], vectors_NX[:1], 3, hashes([["z"]]))
    assert rows_QK.tolist() == [[0, 1, 2]]


def test_each_query_has_its_own_exclusions(tmp_path: Path) -> None:
    vectors_NX = np.array([[0], [1], [2], [3]], np.float32)
    query_QX = np.zeros((3, 1), np.float32)
    excluded = hashes([["a", "c"], ["b", "b"], ["x", "y"]])
    _, rows_QK = find(tmp_path, vectors_NX, ["a", "b", "c", "d"], query_QX, 2, excluded)
    assert rows_QK.tolist() == [[1, 3], [0, 2], [0, 1]]


def test_a_group_larger_than_any_first_fetch_does_not_hide_the_others(tmp_path: Path) -> None:
    # The 500 nearest rows are excluded; fetching stops when k are found.
    vectors_NX = np.arange(510, dtype=np.float32)[:, None]
    groups = ["own"] * 500 + ["other"] * 10
    _, rows_QK = find(tmp_path, vectors_NX, groups, np.zeros((1, 1), np.float32), 3, hashes([["own"]]))
    assert rows_QK.tolist() == [[500, 501, 502]]


def test_where_one_group_holds_everything_there_is_no_neighbor(tmp_path: Path) -> None:
    vectors_NX = np.arange(30, dtype=np.float32)[:, None]
    scores_QK, rows_QK = find(tmp_path, vectors_NX, ["a"] * 30, vectors_NX, 2, hashes([["a"]] * 30))
    assert (rows_QK == -1).all()
    assert (scores_QK == -np.inf).all()


def test_inverted_lists_that_were_not_searched_at_first_are_searched_before_giving_up(tmp_path: Path) -> None:
    # 32 clusters on a line, a list each; 16 lists are searched. The own group fills the 20 nearest.
    centers = np.repeat(np.arange(32) * 8.0, 40)
    vectors_NX = (centers + np.tile(np.arange(40) * 0.125, 32)).astype(np.float32)[:, None]
    groups, query_QX = ["own"] * (20 * 40) + ["other"] * (12 * 40), np.zeros((1, 1), np.float32)
    _, rows_QK = find(tmp_path, vectors_NX, groups, query_QX, 2, hashes([["own"]]), "IVF32,Flat")
    assert rows_QK.tolist() == [[800, 801]]


def test_more_than_the_index_holds_is_filled_with_nothing(tmp_path: Path) -> None:
    vectors_NX = np.arange(2, dtype=np.float32)[:, None]
    for excluded in (None, hashes([["z"]])):
        scores_QK, rows_QK = find(tmp_path, vectors_NX, ["a", "b"], vectors_NX[:1], 4, excluded)
        assert rows_QK.tolist() == [[0, 1, -1, -1]]
        assert scores_QK.tolist() == [[0, -1, -np.inf, -np.inf]]


# The retriever


@pytest.fixture(scope="module")
def retriever(tiny_index: Path) -> IndexRetriever:
    return IndexRetriever.open(tiny_index)


def stored_vectors(folder: Path) -> Floats:
    return np.concatenate([load_array(path) for path in sorted((folder / "vectors").glob("*.npy"))]).astype(np.float32)


def test_passages_are_the_best_rows_with_their_scores(retriever: IndexRetriever) -> None:
    queries = ["When did the oil crisis begin?", "rain forests of South America", "x"]
    found = retriever.retrieve(queries, 7)
    scores_QN = retriever.encoder.encode(queries, "document") @ stored_vectors(retriever.folder).T
    for passages, scores_N in zip(found, scores_QN, strict=True):
        rows = np.argsort(-scores_N, kind="stable")[:7]
        assert [passage.row for passage in passages] == rows.tolist()
        np.testing.assert_allclose([passage.score for passage in passages], scores_N[rows], rtol=1e-4)
        assert passages == [retriever.store.passage(p.row, p.score) for p in passages]


@pytest.mark.parametrize("method", ["dense", "bm25", "hybrid", "rerank"])
def test_hits_of_a_question_that_continue_better_ones_come_last(tiny_index: Path, method: Method) -> None:
    retriever = IndexRetriever.open(tiny_index, method=method)
    store, moved = retriever.store, 0
    questions = ["When did the oil crisis begin?", "rain forests of South America", "the war and the embargo", "x"]
    questions += [store.passage(row).text for row in range(0, store.num_chunks, 9)]
    for k in (1, 4, 10):
        for question, passages in zip(questions, retriever.retrieve(questions, k, role="query"), strict=True):
            scores_QK, rows_QK = retriever.find(
                [question], 2 * k, role="query", excluded_QG=None, keep_N=None, snapshot=retriever.snapshot()
            )
            hits = [row for row in rows_QK[0].tolist() if row >= 0]
            kept: list[int] = []
            for row in hits:
                if not (row - 1 in kept and store.passage(row - 1).key == store.passage(row).key):
                    kept.append(row)
            wanted = [*kept, *(row for row in hits if row not in kept)][:k]
            score_of = dict(zip(rows_QK[0].tolist(), scores_QK[0].tolist(), strict=True))
            assert passages == [store.passage(row, score_of[row]) for row in wanted]
            moved += wanted != hits[:k]
    assert moved > 3 or method == "hybrid"  # where they come last already


def test_all_of_an_index_can_be_asked_for(retriever: IndexRetriever) -> None:
    passages = retriever.retrieve(["oil"], retriever.store.num_chunks, role="query")[0]
    assert sorted(p.row for p in passages) == list(range(retriever.store.num_chunks))


def test_a_stored_chunk_finds_itself(retriever: IndexRetriever) -> None:
    texts = [retriever.store.passage(row).text for row in range(0, retriever.store.num_chunks, 10)]
    found = retriever.retrieve(texts, 1)
    assert [passages[0].text for passages in found] == texts


def test_groups_are_excluded_by_name_and_for_each_query_alone(retriever: IndexRetriever) -> None:
    text = retriever.store.passage(0).text  # the groups of this corpus are its titles
    everything = retriever.retrieve([text], retriever.store.num_chunks)[0]
    for left_out in ([], ["1973 oil crisis"], ["1973 oil crisis", "Amazon rainforest", "no such group"]):
        found = retriever.retrieve([text, text], 5, exclude=[left_out, []])
        allowed = [p.row for p in everything if p.title not in left_out]
        assert [p.row for p in found[0]] == allowed[:5]
        assert [p.row for p in found[1]] == [p.row for p in everything[:5]]


def test_where_all_groups_are_excluded_nothing_is_found(retriever: IndexRetriever) -> None:
    titles = {retriever.store.passage(row).title for row in range(retriever.store.num_chunks)}
    assert retriever.retrieve(["oil"], 3, exclude=[titles]) == [[]]


def test_exclusions_for_another_number_of_queries_are_refused(retriever: IndexRetriever) -> None:
    for exclude in ([], [["a"]], [["a"]] * 3):
        with pytest.raises(ConfigError, match="exclude"):
            retriever.retrieve(["oil", "gas"], 2, exclude=exclude)


def test_no_query_has_no_passages(retriever: IndexRetriever) -> None:
    assert retriever.retrieve([], 3) == []


@pytest.mark.parametrize("k", [0, -1])
def test_fewer_than_one_passage_is_refused(retriever: IndexRetriever, k: int) -> None:
    with pytest.raises(ConfigError, match=f"k = {k}: ask for at least one passage"):
        retriever.retrieve(["oil"], k)


def test_more_passages_than_chunks_are_refused(retriever: IndexRetriever) -> None:
    n = retriever.store.num_chunks
    assert len(retriever.retrieve(["oil"], n)[0]) == n
    with pytest.raises(ConfigError, match=rf"k = {n + 1} is more than the {n} chunks of .*tiny\.index: lower k"):
        retriever.retrieve(["oil"], n + 1)


@pytest.mark.parametrize("query", ["", " \n\t"])
def test_an_empty_question_is_refused(retriever: IndexRetriever, query: str) -> None:
    with pytest.raises(ConfigError, match="the question is empty"):
        retriever.retrieve(["oil", query], 2, role="query")
    with pytest.raises(ConfigError, match="a query is empty"):
        retriever.retrieve(["oil", query], 2, role="document")


def test_another_encoder_is_refused_and_both_are_named(
    tiny_index: Path, tiny_encoder: Path, prompted_encoder: Path
) -> None:
    with pytest.raises(MismatchError) as caught:
        IndexRetriever.open(tiny_index, encoder=str(prompted_encoder))
    message = str(caught.value)
    assert f"was built with the encoder {tiny_encoder} (" in message
    assert f"not with {prompted_encoder} (" in message
    assert message.endswith("their vectors cannot be compared. Use that encoder, or build again")


def test_an_encoder_that_was_moved_can_be_named(tiny_index: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(tiny_encoder, tmp_path / "moved")
    opened = IndexRetriever.open(tiny_index, encoder=str(moved))
    assert opened.encoder.name == str(moved)


def test_words_are_searched_without_the_encoder_which_is_missed_by_whoever_needs_it(
    tiny_index: Path, retriever: IndexRetriever, tmp_path: Path
) -> None:
    opened = IndexRetriever.open(tiny_index, encoder=str(tmp_path / "gone"), method="bm25")
    by_words = IndexRetriever(tiny_index, retriever.encoder, method="bm25")
    assert opened.retrieve(["oil crisis"], 3) == by_words.retrieve(["oil crisis"], 3)
    assert opened.encoder_fingerprint == retriever.encoder.fingerprint
    opened.method = "hybrid"
    with pytest.raises(ConfigError, match="cannot load the encoder"):
        opened.retrieve(["oil crisis"], 3)
    with pytest.raises(ConfigError, match="cannot load the encoder"):
        IndexRetriever.open(tiny_index, encoder=str(tmp_path / "gone"), method="rerank")


def test_an_encoder_that_is_opened_late_is_compared_too(
    tiny_index: Path, prompted_encoder: Path, retriever: IndexRetriever
) -> None:
    opened = IndexRetriever.open(tiny_index, encoder=str(prompted_encoder), method="bm25")
    opened.method = "dense"
    for _ in range(2):
        with pytest.raises(MismatchError, match="their vectors cannot be compared"):
            opened.retrieve(["oil"], 3)
    opened = IndexRetriever.open(tiny_index, method="bm25")
    opened.method = "dense"
    assert opened.retrieve(["oil"], 3) == retriever.retrieve(["oil"], 3)


def test_an_index_that_was_moved_works(tiny_index: Path, retriever: IndexRetriever, tmp_path: Path) -> None:
    moved = IndexRetriever(shutil.copytree(tiny_index, tmp_path / "moved.index"), retriever.encoder)
    assert moved.retrieve(["oil"], 3) == retriever.retrieve(["oil"], 3)
    assert moved.fingerprint == retriever.fingerprint


def test_vectors_and_chunks_that_do_not_match_are_refused(
    tiny_index: Path, retriever: IndexRetriever, tmp_path: Path
) -> None:
    copied = shutil.copytree(tiny_index, tmp_path / "x.index")
    vectors = load_array(copied / "vectors" / "00000.npy")[:-1].copy()
    save_array(copied / "vectors" / "00000.npy", vectors)
    manifest = read_json(copied / "manifest.json")
    manifest["files"]["vectors/00000.npy"] = file_record(copied / "vectors" / "00000.npy")
    write_json(copied / "manifest.json", manifest)
    with pytest.raises(FormatError, match=r"x\.index has .* vectors for .* chunks: build it again"):
        IndexRetriever(copied, retriever.encoder)


def test_a_file_that_the_manifest_does_not_list_is_not_read(
    tiny_index: Path, retriever: IndexRetriever, tmp_path: Path
) -> None:
    copied = shutil.copytree(tiny_index, tmp_path / "x.index")
    shutil.copy(copied / "documents" / "00000.arrow", copied / "documents" / "99999.arrow")
    shutil.copy(copied / "chunks" / "00000.npy", copied / "chunks" / "99999.npy")
    assert IndexRetriever(copied, retriever.encoder).retrieve(["oil"], 3) == retriever.retrieve(["oil"], 3)


def test_indexes_of_other_content_have_other_fingerprints(
    retriever: IndexRetriever, corpus: Path, tiny_encoder: Path, tmp_path: Path, make_encoder: Callable[..., Path]
) -> None:
    from index_builder.build import build_index
    from index_builder.config import BuildConfig
    from index_builder.corpus import ReadOptions

    config = BuildConfig(encoder=str(tiny_encoder), chunk_len=32, shard_chars=6_000, read=ReadOptions(limit=39))
    build_index([str(corpus)], tmp_path / "other.index", config)
    other = IndexRetriever(tmp_path / "other.index", Encoder.open(str(tiny_encoder)))
    assert other.fingerprint != retriever.fingerprint
