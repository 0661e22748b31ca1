"""`retro eval retrieval` against rankings, recalls and differences worked out here."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval import retrieval
from eval.judgments import Questions
from eval.metrics import contains_answer
from eval.records import read_records, read_units
from eval.retrieval import measure_retrieval
from index_builder.build import build_index
from index_builder.config import BuildConfig
from index_builder.search import IndexRetriever, Method
from retro.chunks import load_array
from retro.errors import ConfigError, DependencyError, MismatchError

Retro = Callable[..., Any]
METHODS: tuple[Method, ...] = ("bm25", "dense", "hybrid", "rerank")
ASKED = [
    ("When did the oil crisis begin?", ["October 1973"]),
    ("Which river is in the rainforest?", ["Amazon", "Amazon River"]),
    ("Which company owns ABC?", ["Disney"]),
    ("What was the Apollo program's aim?", ["Moon"]),
    ("Who killed?", ["no such answer at all"]),
    ("Black Death in Europe", ["fleas", "Silk Road"]),
]


@pytest.fixture(scope="module")
def questions() -> Questions:
    return Questions(
        ids=tuple(f"q{i}" for i in range(len(ASKED))),
        texts=tuple(text for text, _ in ASKED),
        answers=tuple(tuple(answers) for _, answers in ASKED),
    )


@pytest.fixture(scope="module")
def judged(questions: Questions, paragraphs: list[dict[str, Any]]) -> Questions:
    """The first paragraphs of an article are relevant, the very first one most; of each another article."""
    titles = list(dict.fromkeys(r["title"] for r in paragraphs))
    relevance = {}
    for question, title in zip(questions.ids, titles, strict=False):
        own = [r["id"] for r in paragraphs if r["title"] == title]
        relevance[question] = {own[0]: 2, own[1]: 1, own[2]: 0, "not there": 1}
    return Questions(ids=questions.ids, texts=questions.texts, relevance=relevance, notes=("A note.",))


def passages(index: Path, method: Method, k: int, **options: Any) -> list[list[Any]]:
    """As they are ranked; for a reader, what continues a better one would come last."""
    retriever = IndexRetriever.open(index, method=method, **options)
    now = retriever.snapshot()
    questions, keep_N = [text for text, _ in ASKED], now.rows_where(retriever.where)
    _, rows_QK = retriever.find(questions, k, role="query", excluded_QG=None, keep_N=keep_N, snapshot=now)
    return [[now.store.passage(row) for row in rows if row >= 0] for rows in rows_QK.tolist()]


def first(hits: list[bool]) -> int | None:
    return hits.index(True) + 1 if any(hits) else None


# Answers


def test_ranks_of_answers_are_those_of_a_search_of_every_passage(tiny_index: Path, questions: Questions) -> None:
    record, units = measure_retrieval(IndexRetriever.open(tiny_index), questions, methods=METHODS, ks=(20, 1, 5))
    assert units["id"] == list(questions.ids)
    recalls: dict[str, list[float]] = {}
    for method in METHODS:
        found = passages(tiny_index, method, 20)
        for what, texts in (
            ("rank in chunks alone", [[p.text for p in few] for few in found]),
            ("rank", [[p.full_text for p in few] for few in found]),
        ):
            ranks = [
                first([contains_answer(text, answers) for text in few])
                for few, (_, answers) in zip(texts, ASKED, strict=True)
            ]
            assert units[f"{method} {what}"] == ranks
            for k in (1, 5, 20):
                hits = [float(rank is not None and rank <= k) for rank in ranks]
                measure = f"recall@{k}" + (" with continuation" if what == "rank" else "")
                assert units[f"{method} {measure}"] == hits
                assert record.figures[f"{method}: {measure}"].value == pytest.approx(100 * np.mean(hits))
                recalls[f"{method} {measure}"] = hits
    assert 0 < sum(rank is not None for rank in units["bm25 rank"]) < len(ASKED)
    rows = record.rows["Differences"]
    assert len(rows) == 3 * 6
    for row in rows:
        assert row["less"] == "bm25"
        here, there = recalls[f"{row['retriever']} {row['measure']}"], recalls[f"bm25 {row['measure']}"]
        assert row["value"] == pytest.approx(100 * (np.mean(here) - np.mean(there)))
        assert row["low"] <= row["value"] <= row["high"]
    curve = record.curves["Recall"]
    assert curve.x == (1, 2, 3, 5, 10, 20)
    assert curve.series["dense"][3] == record.figures["dense: recall@5 with continuation"].value
    assert [row["retriever"] for row in record.rows["Speed"]] == list(METHODS)
    assert all(0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"] for row in record.rows["Speed"])


def test_only_documents_that_fulfil_a_filter_are_found(tiny_index: Path, questions: Questions) -> None:
    where = 'title = "1973 oil crisis"'
    _, units = measure_retrieval(IndexRetriever.open(tiny_index, where=where), questions, methods=("bm25",), ks=(20,))
    found = passages(tiny_index, "bm25", 20, where=where)
    expected = [
        first([contains_answer(p.text, answers) for p in few]) for few, (_, answers) in zip(found, ASKED, strict=True)
    ]
    assert units["bm25 rank in chunks alone"] == expected
    assert expected[0] is not None
    assert expected[1] is None


def test_questions_are_limited_evenly_and_more_passages_than_there_are_are_all(
    tiny_index: Path, questions: Questions
) -> None:
    retriever = IndexRetriever.open(tiny_index)
    _, units = measure_retrieval(retriever, questions, methods=("dense",), ks=(10_000,), limit=3)
    assert units["id"] == ["q0", "q2", "q5"]
    found = passages(tiny_index, "dense", retriever.store.num_live_chunks)[2]
    assert units["dense rank"][1] == first([contains_answer(p.full_text, ASKED[2][1]) for p in found])


# Relevance judgments


@pytest.mark.parametrize("depth", [30, 100])
def test_documents_rank_where_their_best_chunks_do(
    tiny_index: Path, judged: Questions, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For 30 documents it takes more chunks than the 30 that are looked up at first."""
    pytest.importorskip("pytrec_eval")
    monkeypatch.setattr(retrieval, "DEPTH", depth)
    monkeypatch.setattr(retrieval, "CHUNKS", 1)
    record, units = measure_retrieval(IndexRetriever.open(tiny_index), judged, methods=("dense", "bm25"), ks=(1, 5))
    assert judged.relevance is not None
    everything = IndexRetriever.open(tiny_index).store.num_live_chunks
    for method in ("dense", "bm25"):
        gains = []
        for few, grades in zip(passages(tiny_index, method, everything), judged.relevance.values(), strict=True):
            ranking = list(dict.fromkeys(p.key.partition(":")[2] for p in few))[:depth]
            gains.append([grades.get(name, 0) for name in ranking])
        ideal = 2 / math.log2(2) + 1 / math.log2(3) + 1 / math.log2(4)  # with the one that is not there
        ndcg = [sum(g / math.log2(i + 2) for i, g in enumerate(few[:10])) / ideal for few in gains]
        assert units[f"{method} nDCG@10"] == pytest.approx(ndcg, abs=1e-12)
        assert units[f"{method} rank"] == [first([g > 0 for g in few]) for few in gains]
        assert units[f"{method} MRR@10"] == [1 / r if r and r <= 10 else 0 for r in units[f"{method} rank"]]
        for k in (1, 5, depth):
            recall = [sum(g > 0 for g in few[:k]) / 3 for few in gains]
            assert units[f"{method} recall@{k}"] == pytest.approx(recall, abs=1e-12)
        assert record.figures[f"{method}: nDCG@10"].value == pytest.approx(np.mean(ndcg))
        assert record.figures[f"{method}: nDCG@10"].unit == ""
        assert method != "bm25" or 0 < np.mean(ndcg) < 1
    assert record.notes[0] == "A note."
    assert "1 of 13 relevant documents are not in the index: they count as not found." in record.notes


def test_a_document_that_bears_the_id_of_the_query_is_left_out(
    tiny_index: Path, paragraphs: list[dict[str, Any]]
) -> None:
    pytest.importorskip("pytrec_eval")
    own, other = paragraphs[3], paragraphs[4]
    asked = {"ids": (own["id"],), "texts": (own["text"],)}
    retriever = IndexRetriever.open(tiny_index)
    keys = list(dict.fromkeys(p.key for p in passages_of(retriever, own["text"])))
    _, units = measure_retrieval(
        retriever, Questions(**asked, relevance={own["id"]: {other["id"]: 1}}), methods=("bm25",), ks=(5,)
    )
    assert keys[0] == f"squad:{own['id']}"
    assert units["bm25 rank"] == [keys.index(f"squad:{other['id']}")]
    # Unless it is judged relevant.
    _, units = measure_retrieval(
        retriever, Questions(**asked, relevance={own["id"]: {own["id"]: 1}}), methods=("bm25",), ks=(5,)
    )
    assert units["bm25 rank"] == [1]


def passages_of(retriever: IndexRetriever, text: str) -> list[Any]:
    other = IndexRetriever(retriever.folder, retriever.encoder, method="bm25")
    return other.retrieve([text], other.store.num_live_chunks, role="query")[0]


# Exact search


def test_an_exact_index_finds_all_that_exact_search_finds(tiny_index: Path, questions: Questions) -> None:
    retriever = IndexRetriever.open(tiny_index)
    stored, units = measure_retrieval(retriever, None, ks=(1, 10), limit=20)
    assert [stored.figures[f"vector index: recall@{k} of exact search"].value for k in (1, 10)] == [100.0, 100.0]
    assert len(units["id"]) == len(set(units["id"])) == 20
    asked, units = measure_retrieval(retriever, questions, methods=("bm25",), ks=(1, 10), exact=True)
    assert asked.figures["vector index: recall@10 of exact search"].value == 100.0
    assert units["vector index recall@10 of exact search"] == [1.0] * len(ASKED)
    assert set(asked.curves) == {"Recall", "Recall of exact search"}


def test_the_recall_of_inverted_lists_is_that_of_numpy(corpus: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    config = BuildConfig(encoder=str(tiny_encoder), chunk_len=8, index_type="IVF16,Flat", recall=0.5, lexical="off")
    build_index([str(corpus)], tmp_path / "lists.index", config)
    retriever = IndexRetriever.open(tmp_path / "lists.index")
    index = retriever.snapshot().index
    index.nprobe = 1
    _, units = measure_retrieval(retriever, None, ks=(1, 10), limit=50, seed=3)
    vectors = np.concatenate([load_array(p) for p in sorted((tmp_path / "lists.index" / "vectors").glob("*.npy"))])
    scores = vectors.astype(np.float64) @ vectors.astype(np.float64).T
    np.fill_diagonal(scores, -np.inf)
    rows = np.array(units["id"], int)
    truth = np.argsort(-scores[rows], axis=1, kind="stable")[:, :10]
    found = [
        [row for row in few if row not in (own, -1)][:10]
        for few, own in zip(index.search(vectors[rows].astype(np.float32), 11)[1].tolist(), rows.tolist(), strict=True)
    ]
    expected = [len(set(few) & set(best)) / 10 for few, best in zip(found, truth.tolist(), strict=True)]
    assert units["vector index recall@10 of exact search"] == pytest.approx(expected, abs=1e-12)
    assert 0 < np.mean(expected) < 1


# The command, and bad input


def test_the_command_adds_a_record_with_a_row_for_each_question(retro: Retro, tiny_index: Path, tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text("".join(json.dumps({"question": q, "answers": a}) + "\n" for q, a in ASKED), encoding="utf-8")
    arguments = ("--questions", file, "--retriever", "dense,bm25", "--retriever", "hybrid", "-k", "1,5")
    done = retro("eval", "retrieval", tiny_index, *arguments, "--device", "cpu", "--out", tmp_path / "report")
    assert done.code == 0
    assert "hybrid: recall@5" in done.out
    [(path, record)] = read_records(tmp_path / "report").items()
    assert (record.kind, record.name) == ("retrieval", "tiny.index")
    assert record.configuration["methods"] == ["dense", "bm25", "hybrid"]
    units = read_units(path, record)
    assert units["id"] == [str(line) for line in range(1, len(ASKED) + 1)]
    assert len(units["hybrid rank"]) == len(ASKED)


def test_the_command_reads_judgments_of_beir(
    retro: Retro, tiny_index: Path, paragraphs: list[dict[str, Any]], tmp_path: Path
) -> None:
    pytest.importorskip("pytrec_eval")
    (tmp_path / "qrels").mkdir()
    (tmp_path / "queries.jsonl").write_text('{"_id": "1", "text": "oil crisis"}\n', encoding="utf-8")
    qrels = f"query-id\tcorpus-id\tscore\n1\t{paragraphs[0]['id']}\t1\n"
    (tmp_path / "qrels" / "test.tsv").write_text(qrels, encoding="utf-8")
    done = retro("eval", "retrieval", tiny_index, "--beir", tmp_path, "--retriever", "bm25", "--json", "-k", "100")
    assert done.code == 0
    assert json.loads(done.out)["figures"]["bm25: recall@100"]["value"] == 100.0
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n1\tMED-1\t1\n", encoding="utf-8")
    refused = retro("eval", "retrieval", tiny_index, "--beir", tmp_path)
    assert (refused.code, refused.err.count("\n")) == (1, 1)
    assert "name no document of" in refused.err
    assert "--id-field _id" in refused.err


def test_bad_input_is_named(retro: Retro, tiny_index: Path, tmp_path: Path, questions: Questions) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("", encoding="utf-8")
    refused = retro("eval", "retrieval", tiny_index, "--questions", empty)
    assert (refused.code, "holds no questions" in refused.err) == (1, True)
    for wrong in (
        ("--retriever", "sparse"),
        ("-k", "0"),
        ("--qrels", empty),
        ("--beir", tmp_path, "--questions", empty),
    ):
        assert retro("eval", "retrieval", tiny_index, *wrong).code == 2
    retriever = IndexRetriever.open(tiny_index)
    unknown: Any = "sparse"
    with pytest.raises(ConfigError, match="'sparse' is unknown: use dense, bm25"):
        measure_retrieval(retriever, questions, methods=(unknown,))
    with pytest.raises(ConfigError, match="at least"):
        measure_retrieval(retriever, questions, ks=(0, 5))
    with pytest.raises(ConfigError, match="limit = 0"):
        measure_retrieval(retriever, questions, limit=0)
    with pytest.raises(ConfigError, match="nothing to measure"):
        measure_retrieval(IndexRetriever.open(tiny_index, where='title = "none"'), None)
    with pytest.raises(MismatchError, match="name no document"):
        measure_retrieval(retriever, Questions(ids=("1",), texts=("a",), relevance={"1": {"b": 1}}))


def test_without_the_package_the_extra_is_named(
    tiny_index: Path, judged: Questions, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pytrec_eval", None)
    with pytest.raises(DependencyError, match=r"retro-lm\[eval\]"):
        measure_retrieval(IndexRetriever.open(tiny_index), judged, methods=("bm25",), ks=(1,))
