"""The model that comes with the project: what it is, that it reads, and the demo that shows it."""

import json
import lzma
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from commands import Outcome, done, refused

from eval.metrics import exact_match
from retro import demo
from retro.answer import answer_config, ask_many
from retro.checkpoint import load_model
from retro.chunks import Passage
from retro.demo import CORPUS, FACT_QUESTION, QUESTIONS, bundled_model, examples_folder
from retro.threshold import Threshold, load_threshold, save_threshold

MIB = 1 << 20


def records(name: str) -> list[dict[str, Any]]:
    with lzma.open(examples_folder() / name, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_it_is_small_has_a_card_and_no_file_that_is_too_large() -> None:
    sizes = {path.name: path.stat().st_size for path in bundled_model().iterdir()}
    assert sum(sizes.values()) <= 44 * MIB
    assert max(sizes.values()) <= 16 * MIB
    card = (bundled_model() / "README.md").read_text(encoding="utf-8")
    assert "license: apache-2.0" in card
    assert "## Training" in card


def test_it_reads_its_answers_from_passages_of_articles_it_was_not_trained_on() -> None:
    """Questions on one article, each with the paragraph that holds the answer and two others."""
    model, tokenizer, _ = load_model(bundled_model())
    paragraphs = {r["id"]: r for r in records(CORPUS) if r["title"] == "Super Bowl 50"}
    asked = [r for r in records(QUESTIONS) if r["para_id"] in paragraphs][::12][:40]
    names = list(paragraphs)
    found = [
        [
            Passage(
                row=n,
                key=name,
                title="Super Bowl 50",
                url="",
                text=text[:600],
                continuation="",
                score=1.0,
                metadata="{}",
            )
            for n, name in enumerate((names[number], r["para_id"], names[-1 - number]))
            if (text := _around(paragraphs[name]["text"], r["answers"][0] if name == r["para_id"] else ""))
        ]
        for number, r in enumerate(asked)
    ]

    def right(k: int) -> float:
        answers = ask_many(model, tokenizer, [r["question"] for r in asked], found, answer_config(k))
        return sum(exact_match(a.text, r["answers"]) for a, r in zip(answers, asked, strict=True)) / len(asked)

    assert right(3) >= 0.25
    assert right(0) <= 0.05


def _around(text: str, answer: str) -> str:
    """The part of a paragraph that begins with the sentence of the answer."""
    end = text.find(answer)
    return text[max(text.rfind(". ", 0, end) + 1, 0) if end > 0 else 0 :].strip()


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Examples as they are bundled, but for a corpus of 60 paragraphs."""
    folder = tmp_path_factory.mktemp("examples")
    wanted = ("1973 oil crisis", "Warsaw", "Super Bowl 50")
    chosen = [r for title in wanted for r in [p for p in records(CORPUS) if p["title"] == title][:20]]
    with lzma.open(folder / CORPUS, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in chosen)
    shutil.copytree(bundled_model(), folder / demo.MODEL)
    return folder


def test_it_knows_when_not_to_answer() -> None:
    """The confidence was chosen on the development questions of EntityQuestions."""
    threshold = load_threshold(bundled_model())
    assert threshold is not None
    assert 0.3 < threshold.min_confidence < 0.7
    assert threshold.accuracy >= 0.5
    assert "entityquestions_dev" in threshold.chosen_on


def test_the_demo_answers_and_knows_a_fact_as_long_as_the_index_holds_it(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "examples_folder", lambda: few)
    chosen = Threshold(min_confidence=0.9, coverage=0.5, accuracy=0.5, chosen_on="dev", command="retro eval qa")
    save_threshold(few / demo.MODEL, chosen)
    for _ in range(2):
        demo.run_demo(tmp_path, device="cpu", bars=lambda: nullcontext(None))
        out = capsys.readouterr().out
        said = re.findall(rf"{re.escape(FACT_QUESTION)}\n  -> (.*?)   \(", out)
        assert said[1] == "Lisbon", out
        assert "Lisbon" not in (said[0], said[2]), out
        shown = re.findall(r"-> (.*?) .*confidence (0\.\d\d)\)", out)
        assert len(shown) == 8
        for first, confidence in shown:
            assert (first == "I") == (float(confidence) < 0.9)
        assert len(re.findall(r"-> ", out)) == 8


def test_ask_takes_it_where_no_model_is_named(tiny_index: Path, retro: Callable[..., Outcome]) -> None:
    outcome = done("ask", "When did the 1973 oil crisis begin?", "--index", tiny_index, "--retriever", "bm25", "--json")
    answer = json.loads(outcome.out)
    assert "1973" in answer["answer"]
    assert len(answer["passages"]) == 10
    refused(
        retro("ask", "Who?", "--index", tiny_index, "--mode", "prompt"), "--mode prompt needs a causal language model"
    )
