"""Search by meaning, by words, by both, with filters and exclusions, against compositions written out here."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from index_builder.build import build_index
from index_builder.config import BuildConfig, DataConfig
from index_builder.corpus import ReadOptions
from index_builder.neighbors import build_training_data
from index_builder.search import METHODS, IndexRetriever, Method
from retro.chunks import TrainingData
from retro.errors import ConfigError, CorpusError, FormatError, MismatchError
from retro.tokenizer import Tokenizer

QUESTIONS = ["When did the oil crisis begin?", "rain forest and the river", "ABC television network", "zzz"]
FolderBytes = Callable[[Path], dict[str, bytes]]


def write_corpus(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def records(paragraphs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**record, "number": n, "even": n % 2 == 0} for n, record in enumerate(paragraphs)]


@pytest.fixture(scope="module")
def index(records: list[dict[str, Any]], tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    config = BuildConfig(encoder=str(tiny_encoder), chunk_len=32, shard_chars=6_000)
    build_index([str(write_corpus(folder / "wiki.jsonl", records))], folder / "x.index", config)
    return folder / "x.index"


def opened(index: Path, method: str, **options: Any) -> IndexRetriever:
    known: Method = method  # type: ignore[assignment]
    return IndexRetriever.open(index, method=known, **options)


def rows(retriever: IndexRetriever, k: int, **options: Any) -> list[list[int]]:
    return [[p.row for p in passages] for passages in retriever.retrieve(QUESTIONS, k, role="query", **options)]


def continuations_last(scores: dict[int, float], retriever: IndexRetriever, depth: int) -> dict[int, float]:
    """The best rows with their scores, best first; those that continue a better one are lowered below all others."""
    store = retriever.store
    best = sorted(scores, key=lambda row: (-scores[row], row))[:depth]
    drop = 1 + scores[best[0]] - scores[best[-1]]
    lowered: dict[int, float] = {}
    taken: list[int] = []
    for row in best:
        if row - 1 in taken and store.passage(row - 1).key == store.passage(row).key:
            lowered[row] = scores[row] - drop
        else:
            taken.append(row)
            lowered[row] = scores[row]
    return {row: lowered[row] for row in sorted(lowered, key=lambda row: (-lowered[row], row))}


def test_chunks_are_looked_up_by_the_reciprocal_rank_fusion_of_both_rankings_with_continuations_last(
    index: Path,
) -> None:
    retriever = opened(index, "hybrid")
    dense, words = (
        [[p.row for p in passages] for passages in opened(index, method).retrieve(QUESTIONS, 100, role="document")]
        for method in ("dense", "bm25")
    )
    found = retriever.retrieve(QUESTIONS, 10, role="document")
    for passages, by_meaning, by_words in zip(found, dense, words, strict=True):
        shares: dict[int, list[float]] = {}
        for ranking in (by_meaning, by_words):
            for rank, row in enumerate(ranking, 1):
                shares.setdefault(row, []).append(1 / (10 + rank))
        fused = {row: sum(sorted(parts, reverse=True)) for row, parts in shares.items()}
        expected = list(continuations_last(fused, retriever, 100).items())[:10]
        assert [p.row for p in passages] == [row for row, _ in expected]
        np.testing.assert_allclose([p.score for p in passages], [score for _, score in expected], rtol=1e-6)


@pytest.mark.parametrize("where", [None, "number < 40"])
def test_questions_are_looked_up_by_similarity_and_words_together(index: Path, where: str | None) -> None:
    retriever = opened(index, "hybrid")
    store, lexical = retriever.store, retriever.snapshot().lexical
    assert lexical is not None
    n = store.num_chunks
    vectors_NX = np.concatenate([np.load(path) for path in sorted((index / "vectors").glob("*.npy"))]).astype(float)
    random = np.random.default_rng(0)
    first = random.integers(n, size=500)
    second = (first + random.integers(1, n, size=500)) % n
    first_PX = vectors_NX[first] / np.linalg.norm(vectors_NX[first], axis=1, keepdims=True)
    unit = (first_PX * vectors_NX[second]).sum(axis=1).std()
    queries_QX = retriever.encoder.encode(QUESTIONS, "query").astype(float)
    by_meaning, by_words = (rows(opened(index, method), 100, where=where) for method in ("dense", "bm25"))
    assert n > 120  # some rows are candidates of one ranking alone, some of none
    found = retriever.retrieve(QUESTIONS, 10, role="query", where=where)
    for q, question in enumerate(QUESTIONS):
        scores: dict[int, float] = {}
        for row in {*by_meaning[q], *by_words[q]}:
            is_continued = row + 1 < n and store.passage(row + 1).key == store.passage(row).key
            [[overlap]] = lexical.overlap([question], np.array([[[row, row + 1 if is_continued else -1]]])).tolist()
            scores[row] = float(queries_QX[q] @ vectors_NX[row]) / unit + 1.75 * overlap
        expected = list(continuations_last(scores, retriever, min(100, n)).items())[:10]
        assert [p.row for p in found[q]] == [row for row, _ in expected]
        np.testing.assert_allclose([p.score for p in found[q]], [score for _, score in expected], rtol=1e-5)


def test_the_scale_of_similarities_does_not_change_what_hybrid_finds(
    records: list[dict[str, Any]], tiny_encoder: Path, index: Path, tmp_path: Path
) -> None:
    texts = [record["text"] for record in records]
    vectors = opened(index, "dense").encoder.encode(texts, "document").astype(np.float16)
    found = []
    for scale in (1, 4):
        given = [{"text": text, "v": (scale * v).tolist()} for text, v in zip(texts, vectors, strict=True)]
        corpus = write_corpus(tmp_path / f"{scale}.jsonl", given)
        config = BuildConfig(encoder=str(tiny_encoder), read=ReadOptions(vectors_field="v"))
        build_index([str(corpus)], tmp_path / f"{scale}.index", config)
        passages = opened(tmp_path / f"{scale}.index", "hybrid").retrieve(QUESTIONS, 20, role="query")
        found.append([[(p.row, p.score) for p in few] for few in passages])
    assert found[0] == found[1]


def test_hybrid_needs_no_second_passage_to_compare_with(
    records: list[dict[str, Any]], tiny_encoder: Path, tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "wiki.jsonl", [{"text": "oil and rain"}])
    build_index([str(corpus)], tmp_path / "x.index", BuildConfig(encoder=str(tiny_encoder)))
    [[passage]] = opened(tmp_path / "x.index", "hybrid").retrieve(["oil"], 1, role="query")
    assert passage.text == "oil and rain"


def test_rerank_orders_the_best_by_meaning_by_their_words(index: Path) -> None:
    retriever = opened(index, "rerank")
    lexical = retriever.snapshot().lexical
    assert lexical is not None
    n = retriever.store.num_chunks
    everything = lexical.search(QUESTIONS, n)
    dense = opened(index, "dense")
    _, found_QK = dense.find(QUESTIONS, 100, role="query", excluded_QG=None, keep_N=None, snapshot=dense.snapshot())
    for question, best in enumerate(found_QK.tolist()):
        scores = dict(zip(everything[1][question].tolist(), everything[0][question].tolist(), strict=True))
        # Stable: where no word counts, the order by meaning stays.
        hits = sorted(best, key=lambda row: -scores.get(row, 0.0))[:20]
        kept: list[int] = []
        for row in hits:  # what continues a better one comes last
            if row - 1 not in kept or retriever.store.passage(row - 1).continuation == "":
                kept.append(row)
        expected = [*kept, *(row for row in hits if row not in kept)][:10]
        assert rows(retriever, 10)[question] == expected


@pytest.mark.parametrize("method", METHODS)
def test_a_filter_leaves_k_results_wherever_there_are_k(
    index: Path, records: list[dict[str, Any]], method: str
) -> None:
    retriever = opened(index, method)
    n = retriever.store.num_chunks
    key_of_row = [retriever.store.passage(row).key for row in range(n)]
    number = {f"wiki:{record['id']}": record["number"] for record in records}
    for where, wanted in (
        ("even = true", lambda m: m % 2 == 0),
        ("number < 3", lambda m: m < 3),
        ("number >= 100", lambda m: False),
        ('id like "%"', lambda m: True),
    ):
        allowed = {row for row in range(n) if wanted(number[key_of_row[row]])}
        found = rows(retriever, 5, where=where)
        if method in ("dense", "bm25"):  # a filter does not change the order of what it leaves
            unfiltered = rows(retriever, n)
            assert found == [[row for row in ranking if row in allowed][:5] for ranking in unfiltered]
        for question, few in enumerate(found):
            assert set(few) <= allowed
            if method != "bm25" or question < 3:
                assert len(few) == min(5, len(allowed)) or method == "bm25"


@pytest.mark.parametrize("method", METHODS)
def test_excluded_groups_are_never_found(index: Path, method: str) -> None:
    retriever = opened(index, method)
    titles = {p.title for few in retriever.retrieve(QUESTIONS, 5, role="query") for p in few}
    found = retriever.retrieve(QUESTIONS, 5, role="query", exclude=[list(titles)[:1]] * 4)
    assert {p.title for few in found for p in few}.isdisjoint(list(titles)[:1])


def test_an_index_with_words_is_searched_by_both_where_nobody_says(index: Path) -> None:
    auto, dense, hybrid = (opened(index, method) for method in ("auto", "dense", "hybrid"))
    assert rows(auto, 5) == rows(hybrid, 5) != rows(dense, 5)
    # A text like the stored ones is looked up by meaning alone, as neighbors are in training.
    as_texts = [[[p.row for p in few] for few in r.retrieve(QUESTIONS, 5)] for r in (auto, dense)]
    assert as_texts[0] == as_texts[1]


def test_a_retriever_that_is_confined_can_only_be_narrowed(index: Path) -> None:
    confined = opened(index, "dense", where="even = true")
    assert rows(confined, 5) == rows(opened(index, "dense"), 5, where="even = true")
    narrowed = rows(confined, 5, where="number < 9 or even = false")
    assert narrowed == rows(opened(index, "dense"), 5, where="number < 9 and even = true")


def test_without_a_bm25_index_only_search_by_meaning_works(
    records: list[dict[str, Any]], tiny_encoder: Path, tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "wiki.jsonl", records[:5])
    build_index([str(corpus)], tmp_path / "x.index", BuildConfig(encoder=str(tiny_encoder), lexical="off"))
    assert opened(tmp_path / "x.index", "dense").retrieve(["oil"], 1)
    for method in ("bm25", "hybrid", "rerank"):
        with pytest.raises(ConfigError, match="has no BM25 index"):
            opened(tmp_path / "x.index", method)
    for role in ("query", "document"):
        alone, auto = (
            opened(tmp_path / "x.index", method).retrieve(["oil"], 3, role=role) for method in ("dense", "auto")
        )
        assert [p.row for p in auto[0]] == [p.row for p in alone[0]]
    with pytest.raises(ConfigError, match="retriever 'sparse' is unknown"):
        opened(tmp_path / "x.index", "sparse")


# Vectors and neighbors made elsewhere


def test_vectors_made_elsewhere_are_stored_as_they_are(
    records: list[dict[str, Any]], tiny_encoder: Path, index: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = opened(index, "dense").encoder
    texts = [record["text"][:100] for record in records[:9]]
    vectors = encoder.encode(texts, "document").astype(np.float16)
    given = [{"id": n, "text": t, "v": v} for n, (t, v) in enumerate(zip(texts, vectors.tolist(), strict=True))]
    corpus = write_corpus(tmp_path / "wiki.jsonl", given)
    config = BuildConfig(encoder=str(tiny_encoder), chunk_len=4, read=ReadOptions(vectors_field="v"))
    manifest = build_index([str(corpus)], tmp_path / "x.index", config)
    assert (manifest["chunks"], manifest["truncated_chunks"]) == (9, 0)  # a record is one chunk, however long
    retriever = opened(tmp_path / "x.index", "dense")
    np.testing.assert_array_equal(np.load(tmp_path / "x.index" / "vectors" / "00000.npy"), vectors)
    assert [few[0].text for few in retriever.retrieve(texts, 1)] == texts
    assert "v" not in json.loads(retriever.retrieve(texts, 1)[0][0].metadata)
    assert "do not look like" not in caplog.text
    turned = write_corpus(tmp_path / "t.jsonl", [g | {"v": g["v"][::-1]} for g in given])
    build_index([str(turned)], tmp_path / "t.index", config)
    assert "the vectors of the corpus do not look like those of" in caplog.text


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        (None, "must be a list of finite numbers"),
        ([1, "x"], "must be a list of finite numbers"),
        ([], "must be a list of finite numbers"),
        ([[1.0]], "must be a list of finite numbers"),
        ([1.0, 2.0], "has 2 numbers, that of wiki:0 has 32"),
    ],
)
def test_vectors_that_cannot_be_used_are_refused(tiny_encoder: Path, tmp_path: Path, vector: Any, message: str) -> None:
    records = [{"id": 0, "text": "a", "v": [0.5] * 32}, {"id": 1, "text": "b", "v": vector}]
    corpus = write_corpus(tmp_path / "wiki.jsonl", records)
    config = BuildConfig(encoder=str(tiny_encoder), read=ReadOptions(vectors_field="v"))
    with pytest.raises(CorpusError, match=rf"wiki\.jsonl:2: .*{message}"):
        build_index([str(corpus)], tmp_path / "x.index", config)


def test_vectors_of_another_width_than_the_encoder_are_refused(tiny_encoder: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "wiki.jsonl", [{"id": 0, "text": "a", "v": [0.5] * 33}])
    config = BuildConfig(encoder=str(tiny_encoder), read=ReadOptions(vectors_field="v"))
    with pytest.raises(MismatchError, match=r"the vectors of the corpus have 33 numbers, those of the encoder .* 32"):
        build_index([str(corpus)], tmp_path / "x.index", config)


# Training data


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.load(str(tokenizer_folder))


def data_of(
    folder: Path, corpus: Path, tokenizer: Tokenizer, retriever: IndexRetriever, **settings: Any
) -> TrainingData:
    config = DataConfig(**{"num_neighbors": 2, "chunk_len": 16, "lead_share": 0.0} | settings)
    build_training_data([str(corpus)], folder, tokenizer=tokenizer, retriever=retriever, config=config)
    return TrainingData(folder)


def index_rows(data: TrainingData) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Rows of the index [N, K], -1 where there is none."""
    numbers = data.arrays.neighbors
    return np.where(numbers >= 0, data.arrays.index_rows[np.maximum(numbers, 0)], -1)


@pytest.fixture(scope="module")
def corpus(index: Path) -> Path:
    return index.parent / "wiki.jsonl"


@pytest.mark.parametrize("method", METHODS)
def test_training_data_has_the_neighbors_that_a_search_finds(
    index: Path, corpus: Path, tokenizer: Tokenizer, tmp_path: Path, records: list[dict[str, Any]], method: str
) -> None:
    retriever = opened(index, method)
    data = data_of(tmp_path / "x.data", corpus, tokenizer, retriever, where="number < 30")
    rows_NK = index_rows(data)
    for number, record in enumerate(records[:6]):
        text, spans = record["text"], tokenizer.encode(record["text"]).spans
        query = text[: spans[14, 1]]  # the first chunk: BOS and 15 tokens
        [passages] = retriever.retrieve([query], 2, exclude=[[record["group"]]], where="number < 30")
        assert rows_NK[data.chunk_starts[number]].tolist() == [*(p.row for p in passages), -1, -1][:2]


def test_chunks_that_share_words_with_an_evaluation_file_are_nobodys_neighbors(
    index: Path, corpus: Path, tokenizer: Tokenizer, records: list[dict[str, Any]], tmp_path: Path
) -> None:
    retriever = opened(index, "dense")
    plain = index_rows(data_of(tmp_path / "plain.data", corpus, tokenizer, retriever))
    words = records[3]["text"].split()
    leaked = " ".join(words[4:24])
    evaluation = write_corpus(tmp_path / "eval.jsonl", [{"id": 1, "text": f"Some other words before. {leaked}"}])
    data = data_of(tmp_path / "x.data", corpus, tokenizer, retriever, exclude_ngrams_of=(str(evaluation),))
    found = set(np.unique(index_rows(data)).tolist())
    texts = {row: " ".join(retriever.store.passage(row).full_text.split()) for row in range(retriever.store.num_chunks)}
    windows = [" ".join(words[4:24][i : i + 13]) for i in range(8)]
    leaking = {row for row, text in texts.items() if any(window in text for window in windows)}
    assert leaking
    assert leaking & set(np.unique(plain).tolist())
    assert not leaking & found


def test_near_duplicates_of_a_document_are_not_its_neighbors(
    tokenizer: Tokenizer, tiny_encoder: Path, records: list[dict[str, Any]], tmp_path: Path
) -> None:
    texts = [record["text"] for record in records[:4]]
    words = texts[0].split()
    words[-1] = "indeed"
    given = [{"id": n, "text": text} for n, text in enumerate([*texts, " ".join(words)])]
    corpus = write_corpus(tmp_path / "wiki.jsonl", given)
    build_index([str(corpus)], tmp_path / "x.index", BuildConfig(encoder=str(tiny_encoder), chunk_len=16))
    retriever = opened(tmp_path / "x.index", "dense")
    keys = [retriever.store.passage(row).key for row in range(retriever.store.num_chunks)]
    for excluded in (False, True):
        data = data_of(tmp_path / f"{excluded}.data", corpus, tokenizer, retriever, exclude_near_duplicates=excluded)
        rows_NK = index_rows(data)[: data.chunk_starts[1]]
        neighbors = {keys[row] for row in rows_NK[rows_NK >= 0].tolist()}
        assert ("wiki:4" in neighbors) != excluded
        assert "wiki:0" not in neighbors


@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_a_table_of_neighbors_made_elsewhere_is_taken_without_the_own_group(
    index: Path, corpus: Path, tokenizer: Tokenizer, records: list[dict[str, Any]], tmp_path: Path, kind: str
) -> None:
    retriever = opened(index, "dense")
    plain = data_of(tmp_path / "plain.data", corpus, tokenizer, retriever)
    chunks, n = int(plain.chunk_starts[-1]), retriever.store.num_chunks
    table = np.random.default_rng(0).integers(-1, n, (chunks, 4))
    path = tmp_path / f"table.{kind}"
    if kind == "npy":
        np.save(path, table)
    else:
        order = np.random.default_rng(1).permutation(chunks)
        pq.write_table(pa.table({"chunk": order, "neighbors": table[order].tolist()}), path)
    rows_NK = index_rows(data_of(tmp_path / "x.data", corpus, tokenizer, retriever, neighbors=str(path)))
    group_of_key = {f"wiki:{record['id']}": record["group"] for record in records}
    group_of_row = [group_of_key[retriever.store.passage(row).key] for row in range(n)]
    searched = [any(n >= 0 for n in row) for row in plain.arrays.neighbors.tolist()]  # finished chunks
    for document, record in enumerate(records):
        for chunk in range(*plain.chunk_starts[document : document + 2].tolist()):
            kept = [r for r in table[chunk].tolist() if r >= 0 and group_of_row[r] != record["group"]][:2]
            expected = [*kept, -1, -1][:2] if searched[chunk] else [-1, -1]
            assert rows_NK[chunk].tolist() == expected


def test_tables_that_do_not_fit_are_refused(index: Path, corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    retriever = opened(index, "dense")
    chunks = int(data_of(tmp_path / "p.data", corpus, tokenizer, retriever).chunk_starts[-1])
    n = retriever.store.num_chunks
    for number, (table, error, message) in enumerate(
        (
            (
                np.zeros((chunks + 1, 2), np.int64),
                MismatchError,
                f"has rows for {chunks + 1:,} chunks, the corpus has {chunks:,}",
            ),
            (np.zeros((chunks - 40, 2), np.int64), MismatchError, "the corpus has more"),
            (np.full((chunks, 2), n), FormatError, f"names rows from {n} to {n}; the index has rows 0 to {n - 1}"),
            (np.zeros((chunks, 2)), FormatError, "holds float64"),
            (np.zeros(chunks, np.int64), FormatError, "not integers of"),
        )
    ):
        np.save(tmp_path / "table.npy", table)
        with pytest.raises(error, match=message):
            data_of(tmp_path / f"{number}.data", corpus, tokenizer, retriever, neighbors=str(tmp_path / "table.npy"))
    (tmp_path / "table.parquet").write_bytes(b"no table")
    with pytest.raises(FormatError, match="is no table of neighbors"):
        data_of(tmp_path / "y.data", corpus, tokenizer, retriever, neighbors=str(tmp_path / "table.parquet"))


# De-duplication


def test_duplicates_are_left_out_and_listed(tiny_encoder: Path, records: list[dict[str, Any]], tmp_path: Path) -> None:
    texts = [record["text"] for record in records[:4]]
    words = texts[1].split()
    words[-1] = "indeed"
    given = [{"id": n, "text": text} for n, text in enumerate([*texts, texts[2], " ".join(words)])]
    corpus = write_corpus(tmp_path / "wiki.jsonl", given)
    for kind, duplicates in (("none", []), ("exact", [5]), ("near", [5, 6])):
        read = ReadOptions(deduplicate=kind)  # type: ignore[arg-type]
        out = tmp_path / f"{kind}.index"
        manifest = build_index([str(corpus)], out, BuildConfig(encoder=str(tiny_encoder), read=read))
        assert (manifest["documents"], manifest["duplicates"]) == (6 - len(duplicates), len(duplicates))
        listed = (out / "rejects.jsonl").read_text().splitlines() if duplicates else []
        assert [json.loads(line)["line"] for line in listed] == duplicates
        assert (out / "rejects.jsonl").is_file() == bool(duplicates)
