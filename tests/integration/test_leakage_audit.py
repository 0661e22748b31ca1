"""`retro eval leakage`: planted leaks are found, clean documents are not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval.audit import audit_index
from eval.records import read_records, read_units
from index_builder.build import build_index
from index_builder.config import BuildConfig
from index_builder.duplicates import NGrams, signatures, words
from index_builder.live import remove_documents
from retro.chunks import ChunkStore

Retro = Callable[..., Any]
EVERY = 10


def reworded(text: str) -> str:
    """Every tenth word changed."""
    return " ".join("qqq" + str(i) if i % EVERY == EVERY - 1 else word for i, word in enumerate(text.split()))


@pytest.fixture(scope="module")
def evaluation(paragraphs: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first paragraph of each article."""
    path = tmp_path_factory.mktemp("evaluation") / "test.jsonl"
    firsts = {record["title"]: record for record in reversed(paragraphs)}
    path.write_text("".join(json.dumps(r) + "\n" for r in firsts.values()), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def texts(evaluation: Path) -> dict[str, str]:
    return {f"test:{r['id']}": r["text"] for r in map(json.loads, evaluation.read_text(encoding="utf-8").splitlines())}


@pytest.fixture(scope="module")
def leaky_index(
    paragraphs: list[dict[str, Any]],
    texts: dict[str, str],
    tiny_encoder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The other paragraphs, the first evaluation document, the second one reworded, 13 words of the third, 12 of the fourth.

    22 words of the sixth stand at the end of one document and the beginning of the next.
    """
    folder = tmp_path_factory.mktemp("leaky")
    clean = [{"id": r["id"], "text": r["text"]} for r in paragraphs if r["text"] not in set(texts.values())]
    first, second, third, fourth = list(texts.values())[:4]
    planted = {
        "copied": first.upper() + "!",
        "reworded": reworded(second),
        "quoted": "He said: " + " ".join(third.split()[5:18]) + " - and left.",
        "short": "He said: " + " ".join(fourth.split()[5:17]) + " - and left.",
        "removed": list(texts.values())[4],
        "until": "It ended so: " + " ".join(list(texts.values())[5].split()[20:31]),
        "from": " ".join(list(texts.values())[5].split()[31:42]) + " was how it began.",
    }
    assert len(words(" ".join(third.split()[5:18]))) == 13
    assert len(words(" ".join(fourth.split()[5:17]))) == 12
    records = [*clean[:9], *({"id": name, "text": text} for name, text in planted.items()), *clean[9:]]
    corpus = folder / "wiki.jsonl"
    corpus.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    build_index(
        [str(corpus)], folder / "wiki.index", BuildConfig(encoder=str(tiny_encoder), chunk_len=32, shard_chars=6_000)
    )
    remove_documents(folder / "wiki.index", ["wiki:removed"])
    return folder / "wiki.index"


def test_planted_leaks_are_found_and_clean_documents_are_not(
    leaky_index: Path, evaluation: Path, texts: dict[str, str]
) -> None:
    record, units = audit_index(leaky_index, [str(evaluation)])
    first, second, third, *rest = texts
    assert units["id"] == list(texts)
    assert units["near_duplicate"] == ["wiki:copied", *[None] * (len(texts) - 1)]
    assert units["similarity"] == [1.0, *[None] * (len(texts) - 1)]
    assert units["reworded"] == ["wiki:copied", "wiki:reworded", *[None] * (len(texts) - 2)]
    assert units["with_13_words"] == ["wiki:copied", None, "wiki:quoted", *[None] * len(rest)]
    assert units["share_of_13_grams"][0] == 1.0
    assert units["share_of_13_grams"][2] == pytest.approx(1 / (len(words(texts[third])) - 12))
    assert units["share_of_5_grams"][0] == 1.0
    assert record.rows["Evaluation files"] == [
        {
            "file": "test",
            "documents": len(texts),
            "share_13_words": 2,
            "near_duplicates": 1,
            "reworded": 2,
            "found": 3,
        }
    ]
    assert record.figures["test: found"].value == pytest.approx(100 * 3 / len(texts))
    assert [row["id"] for row in record.rows["Found in the index"]] == [first, second, third]


def test_the_share_of_5_grams_is_that_of_a_plain_count(
    leaky_index: Path, evaluation: Path, texts: dict[str, str]
) -> None:
    _, units = audit_index(leaky_index, [str(evaluation)])

    def grams(text: str) -> set[tuple[str, ...]]:
        found = words(text)
        return {tuple(found[i : i + 5]) for i in range(len(found) - 4)}

    second = list(texts.values())[1]
    expected = len(grams(second) & grams(reworded(second))) / len(grams(second))
    assert 0.4 < expected < 0.6
    assert units["share_of_5_grams"][1] == pytest.approx(expected, abs=1e-12)


def test_which_documents_share_13_words_is_what_ngrams_say(
    leaky_index: Path, paragraphs: list[dict[str, Any]], tmp_path: Path
) -> None:
    texts = [" ".join(record["text"].split()[i : i + 40]) for i, record in enumerate(paragraphs)]
    file = tmp_path / "parts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    held = [
        text
        for table in ChunkStore(leaky_index).tables
        for key, text in zip(table["key"].to_pylist(), table["text"].to_pylist(), strict=True)
        if key != "wiki:removed"
    ]
    expected = NGrams.of_texts(held).overlap(texts)
    _, units = audit_index(leaky_index, [str(file)])
    assert 0 < expected.sum() < len(texts)
    np.testing.assert_array_equal(np.array(units["share_of_13_grams"]) > 0, expected)


def test_the_nearest_of_several_near_duplicates_is_named(
    tiny_encoder: Path, paragraphs: list[dict[str, Any]], tmp_path: Path
) -> None:
    text = " ".join(record["text"] for record in paragraphs[:3])
    corpus, file = tmp_path / "wiki.jsonl", tmp_path / "test.jsonl"
    copies = {"other": paragraphs[9]["text"], "near": text + " One more.", "far": text[: int(0.93 * len(text))]}
    corpus.write_text("".join(json.dumps({"id": k, "text": t}) + "\n" for k, t in copies.items()), encoding="utf-8")
    file.write_text(json.dumps({"id": 1, "text": text}) + "\n", encoding="utf-8")
    build_index([str(corpus)], tmp_path / "x.index", BuildConfig(encoder=str(tiny_encoder), lexical="off"))
    _, units = audit_index(tmp_path / "x.index", [str(file)])
    near, far, own = signatures([copies["near"], copies["far"], text])
    assert 0.8 < (far == own).mean() < (near == own).mean()
    assert units["near_duplicate"] == units["reworded"] == ["wiki:near"]
    assert units["similarity"] == [pytest.approx((near == own).mean())]


# The command


def test_the_command_lists_what_it_found_and_fails_above_a_share(
    retro: Retro, leaky_index: Path, evaluation: Path, texts: dict[str, str], tmp_path: Path
) -> None:
    share = 3 / len(texts)
    done = retro("eval", "leakage", leaky_index, evaluation, "--out", tmp_path / "report", "--fail-above", share)
    assert (done.code, "more than" in done.err) == (0, False)
    for key in list(texts)[:3]:
        assert key in done.out
    assert list(texts)[3] not in done.out
    assert all(name in done.out for name in ("wiki:copied", "wiki:reworded", "wiki:quoted"))
    [(path, record)] = read_records(tmp_path / "report").items()
    assert (record.kind, record.name) == ("leakage", "wiki.index")
    assert read_units(path, record)["id"] == list(texts)
    failed = retro("eval", "leakage", leaky_index, evaluation, "--fail-above", share - 0.01, "--json")
    assert failed.code == 1
    assert "more than" in failed.err
    assert json.loads(failed.out)["figures"]["test: found"]["value"] == pytest.approx(100 * share)


def test_a_clean_file_passes_even_where_nothing_may_be_found(
    retro: Retro, leaky_index: Path, texts: dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "clean.jsonl"
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in list(texts.values())[3:]), encoding="utf-8")
    done = retro("eval", "leakage", leaky_index, file, "--fail-above", 0)
    assert (done.code, "more than" in done.err) == (0, False)
    assert "wiki:" not in done.out


def test_bad_input_is_named(retro: Retro, leaky_index: Path, evaluation: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("", encoding="utf-8")
    refused = retro("eval", "leakage", leaky_index, evaluation, empty)
    assert (refused.code, refused.err.count("\n")) == (1, 1)
    assert "empty.jsonl holds no documents" in refused.err
    assert retro("eval", "leakage", tmp_path / "none.index", evaluation).code == 1
    assert retro("eval", "leakage", leaky_index, evaluation, "--fail-above", 5).code == 2
    assert retro("eval", "leakage", leaky_index).code == 2
