"""Readers of judgments, and ranking measures against numbers worked out by hand and the examples of pytrec_eval."""

import gzip
import json
import lzma
import math
from pathlib import Path
from typing import Any

import pytest

from eval.judgments import Questions, judged_documents, rank_measures, read_beir, read_judged, read_questions
from retro.errors import ConfigError, CorpusError, FormatError, MismatchError

# Measures


def test_measures_of_rankings_are_those_worked_out_by_hand() -> None:
    pytest.importorskip("pytrec_eval")
    relevance = {"q1": {"a": 2, "b": 1, "c": 0, "d": 1}, "q2": {"x": 1}, "q3": {"y": 1}, "q4": {"z": 3}}
    rankings: dict[str, list[str]] = {
        "q1": ["c", "b", "other", "a"],
        "q2": [*(f"n{i}" for i in range(10)), "x"],
        "q3": [],
        "q4": ["z", "n"],
    }
    found = rank_measures(rankings, relevance, (1, 2, 4, 20))
    dcg = 1 / math.log2(3) + 2 / math.log2(5)
    ideal = 2 / math.log2(2) + 1 / math.log2(3) + 1 / math.log2(4)
    assert found["nDCG@10"] == pytest.approx([dcg / ideal, 0.0, 0.0, 1.0], abs=1e-12)
    assert found["MRR@10"] == [0.5, 0.0, 0.0, 1.0]
    assert found["recall@1"] == [0.0, 0.0, 0.0, 1.0]
    assert found["recall@2"] == pytest.approx([1 / 3, 0.0, 0.0, 1.0], abs=1e-12)
    assert found["recall@4"] == pytest.approx([2 / 3, 0.0, 0.0, 1.0], abs=1e-12)
    assert found["recall@20"] == pytest.approx([2 / 3, 1.0, 0.0, 1.0], abs=1e-12)


def test_measures_are_those_of_the_packages_own_example() -> None:
    """The qrel and the run of its README: q1 has d3 d1 d2 by score, q2 has d1 d3 d2."""
    pytrec_eval = pytest.importorskip("pytrec_eval")
    relevance = {"q1": {"d1": 0, "d2": 1, "d3": 0}, "q2": {"d2": 1, "d3": 1}}
    run = {"q1": {"d1": 1.0, "d2": 0.0, "d3": 1.5}, "q2": {"d1": 1.5, "d2": 0.2, "d3": 0.5}}
    expected = pytrec_eval.RelevanceEvaluator(relevance, {"ndcg_cut.10", "recip_rank", "recall.2"}).evaluate(run)
    found = rank_measures({"q1": ["d3", "d1", "d2"], "q2": ["d1", "d3", "d2"]}, relevance, (2,))
    assert found["nDCG@10"] == [expected[q]["ndcg_cut_10"] for q in ("q1", "q2")]
    assert found["MRR@10"] == [expected[q]["recip_rank"] for q in ("q1", "q2")]
    assert found["recall@2"] == [expected[q]["recall_2"] for q in ("q1", "q2")]
    # What its README prints for both (ndcg over three documents).
    assert found["nDCG@10"] == pytest.approx([0.5, 0.6934264036172708], abs=1e-12)


def test_no_ranking_has_no_measure() -> None:
    with pytest.raises(ConfigError, match="no question"):
        rank_measures({}, {}, (1,))


# Files


def test_questions_are_read_from_compressed_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl.xz"
    records = [{"question": "when?", "answers": ["1973", "in 1973"], "id": 7}, {"question": "who?", "answers": []}]
    with lzma.open(path, "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))
    assert read_questions(path) == Questions(ids=("7", "2"), texts=("when?", "who?"), answers=(("1973", "in 1973"), ()))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no questions"),
        ('{"question": "a", "answers": "b"}\n', "q.jsonl:1: `answers`"),
        ('{"question": "a", "answers": ["b"]}\n{"answers": ["b"]}\n', "q.jsonl:2: `question`"),
        ('{"question": " ", "answers": ["b"]}\n', "q.jsonl:1: `question`"),
        ("[1]\n", "q.jsonl:1: "),
    ],
)
def test_a_file_that_holds_no_questions_is_refused_with_its_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "q.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(FormatError, match=message):
        read_questions(tmp_path / "q.jsonl")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"none\.jsonl"):
        read_questions(tmp_path / "none.jsonl")
    with pytest.raises(FormatError, match=r"none\.txt is missing"):
        read_judged(tmp_path / "none.txt", tmp_path / "none.qrels")


def beir(folder: Path, qrels: str) -> Path:
    queries = [{"_id": "1", "text": "first?"}, {"_id": "PLAIN-2", "text": "second?"}, {"_id": "3", "text": "third?"}]
    (folder / "qrels").mkdir()
    (folder / "queries.jsonl").write_text("".join(json.dumps(q) + "\n" for q in queries), encoding="utf-8")
    (folder / "qrels" / "test.tsv").write_text(qrels, encoding="utf-8")
    return folder


def test_a_folder_of_beir_gives_the_queries_that_have_a_relevant_document(tmp_path: Path) -> None:
    qrels = (
        "query-id\tcorpus-id\tscore\nPLAIN-2\tMED 10\t2\n1\tMED-9\t1\nPLAIN-2\tMED-9\t0\n3\tMED-9\t0\n99\tMED-9\t1\n"
    )
    assert read_beir(beir(tmp_path, qrels)) == Questions(
        ids=("1", "PLAIN-2"),
        texts=("first?", "second?"),
        relevance={"1": {"MED-9": 1}, "PLAIN-2": {"MED 10": 2, "MED-9": 0}},
        notes=("1 queries without a relevant document are left out.",),
    )


TOPICS = """<top>
<num> Number: 301
<title> International Organized
 Crime

<desc> Description:
Identify organizations.
</top>
<top>
<num>302</num>
<title>Topic: Polio</title>
</top>
"""


def test_topics_of_trec_are_asked_by_their_titles(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "topics.gz", "wt", encoding="utf-8") as file:
        file.write(TOPICS)
    (tmp_path / "qrels").write_text("301 0 FBIS3-1 1\n301 0 FT-2 -1\n302  0 FT-2  1\n", encoding="utf-8")
    found = read_judged(tmp_path / "topics.gz", tmp_path / "qrels")
    assert (found.ids, found.texts) == (("301", "302"), ("International Organized Crime", "Polio"))
    assert found.relevance == {"301": {"FBIS3-1": 1, "FT-2": -1}, "302": {"FT-2": 1}}


def test_queries_may_be_lines_of_id_and_text(tmp_path: Path) -> None:
    (tmp_path / "q.tsv").write_text("7\twhat is\tthis\n\n8\tand that\n", encoding="utf-8")
    (tmp_path / "qrels").write_text("7 0 d 1\n8 0 e 1\n", encoding="utf-8")
    assert read_judged(tmp_path / "q.tsv", tmp_path / "qrels").texts == ("what is\tthis", "and that")


@pytest.mark.parametrize(
    ("queries", "qrels", "error", "message"),
    [
        ("", "1 0 d 1\n", FormatError, "q.txt holds no queries"),
        ("1\tone\n", "", FormatError, "qrels holds no judgments"),
        ("1\tone\n", "2 0 d 1\n", MismatchError, "do not belong together"),
        ("1\tone\n", "1 0 d 0\n", MismatchError, "do not belong together"),
        ("1\tone\n", "1 0 d 1\n1 0 d\n1 d\n", FormatError, "qrels:2"),
        ("1\tone\n", "1 0 d high\n", FormatError, "qrels:1"),
        ("1 one\n", "1 0 d 1\n", FormatError, "q.txt:1"),
        ("<top><num>1</num></top>", "1 0 d 1\n", FormatError, "topic 1 has no"),
    ],
)
def test_malformed_judgments_are_refused(
    tmp_path: Path, queries: str, qrels: str, error: type[Exception], message: str
) -> None:
    (tmp_path / "q.txt").write_text(queries, encoding="utf-8")
    (tmp_path / "qrels").write_text(qrels, encoding="utf-8")
    with pytest.raises(error, match=message):
        read_judged(tmp_path / "q.txt", tmp_path / "qrels")


# Documents of an index


class Keys:
    """What is needed of a chunk store."""

    folder = Path("x.index")

    def __init__(self, *keys: str) -> None:
        self._keys = keys

    def numbered_keys(self) -> Any:
        return iter(enumerate(self._keys))


def test_documents_are_named_by_their_keys_with_and_without_the_corpus() -> None:
    store: Any = Keys("wiki:a", "wiki:b:c", "wiki:d", "news:a2", "wiki:q")
    relevance = {"q": {"a": 1, "b:c": 1, "news:a2": 1, "missing": 1}}
    assert judged_documents(store, relevance) == {0: "a", 1: "b:c", 3: "news:a2", 4: "q"}


def test_judgments_of_another_corpus_or_of_two_documents_of_a_name_are_refused() -> None:
    one: Any = Keys("wiki:q", "wiki:b")
    with pytest.raises(
        MismatchError, match=r"name no document of x\.index: they are about a \.\.\., its keys are wiki:q"
    ):
        judged_documents(one, {"q": {"a": 1}})
    two: Any = Keys("wiki:a", "news:a")
    with pytest.raises(MismatchError, match="'a' may be wiki:a or news:a"):
        judged_documents(two, {"q": {"a": 1}})
    assert judged_documents(two, {"q": {"news:a": 1}}) == {1: "news:a"}
