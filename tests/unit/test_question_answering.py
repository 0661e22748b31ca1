"""Questions as files hold them, whose passages are shuffled, frequent answers, and the confidence below which to be silent."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from eval.predictions import Predictions, QaConfig, others
from eval.qa_record import confidences, qa_record, save_chosen_threshold
from eval.questions import Question, frequent_answers, read_questions
from eval.selective import area_interval, choose_threshold, selective_accuracy
from retro.errors import ConfigError, FormatError

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def question(text: str, *answers: str, group: str = "") -> Question:
    return Question(id=text, data_set="d", text=text, answers=answers, group=group)


# Questions


def test_questions_are_read_as_the_data_sets_have_them(tmp_path: Path) -> None:
    plain = {"question": "Who?", "answers": ["me", " "]}
    squad = {**plain, "id": "s", "para_id": "1973_oil_crisis-0"}
    entity = {**plain, "id": 7, "relation": "P106", "gold": [["simple", "12", "title"], ["core", "12", "alias"]]}
    keyed = {**plain, "id": "k", "gold": ["wiki:1", "2"], "relation": None}
    path = write(tmp_path / "q.jsonl", plain, squad, entity, keyed)
    read, notes = read_questions([path], corpora={"simple": "simplewiki_2021"})
    assert notes == ()
    assert [q.id for q in read] == ["q:1", "q:s", "q:7", "q:k"]
    assert [q.gold for q in read] == [
        (),
        ("1973_oil_crisis-0",),
        ("simplewiki_2021:12", "core:12"),
        ("wiki:1", "2"),
    ]
    assert [q.group for q in read] == ["", "", "P106", ""]
    assert {(q.text, q.answers, q.data_set) for q in read} == {("Who?", ("me",), "q")}


def test_the_bundled_questions_are_read_and_limited_evenly() -> None:
    path = EXAMPLES / "squad11_dev.jsonl.xz"
    read, _ = read_questions([path])
    assert len(read) == 10_570
    assert read[0].id == "squad11_dev:5725b33f6a3fe71400b8952d"
    assert read[0].gold == ("1973_oil_crisis-0",)
    few, _ = read_questions([path], limit=3)
    assert few == [read[0], read[round((len(read) - 1) / 2)], read[-1]]


def test_data_sets_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    first = write(tmp_path / "a" / "dev.jsonl", {"question": "Who?", "answers": ["me"]})
    second = tmp_path / "b" / "dev.jsonl.gz"
    second.write_bytes(gzip.compress(first.read_bytes()))
    read, _ = read_questions([first, second, write(tmp_path / "test.jsonl", {"question": "Who?", "answers": ["me"]})])
    assert [q.data_set for q in read] == [str(first), str(second), "test"]
    assert len({q.id for q in read}) == 3


def test_bad_lines_are_counted_or_stop(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"question": "Who?", "answers": ["me"]}\n{"question"\n{"question": "Who?"}\n', encoding="utf-8")
    with pytest.raises(FormatError, match=r"q\.jsonl:2: .*--on-error skip"):
        read_questions([path])
    read, notes = read_questions([path], skip_bad=True)
    assert (len(read), notes) == (1, ("q: 2 lines without a question and answers are left out.",))
    with pytest.raises(ConfigError, match="limit = 0"):
        read_questions([path], limit=0)


# Frequent answers


def test_the_most_frequent_answer_of_each_relation() -> None:
    training = [
        question("a?", "Actor", group="job"),
        question("b?", "an actor!", "actor", group="job"),  # counts once
        question("c?", "Singer", group="job"),
        question("d?", "singer", group="job"),
        question("e?", "the singer", group="job"),
        question("f?", "actor", group="job"),
        question("g?", "Paris", group="place"),
        question("h?", "nothing"),
        *[question(f"asked {n}", "actor", group="job") for n in range(5)],
    ]
    asked = [question(f"Asked {n}?", "x", group="job") for n in range(5)]
    assert frequent_answers(training[:-6], asked) == {"job": ("Singer", 3 / 6), "place": ("Paris", 1.0)}
    # Those that are asked do not count, however they are written.
    assert frequent_answers(training, asked)["job"] == ("Singer", 3 / 6)
    assert frequent_answers(training, [])["job"] == ("actor", 8 / 11)
    with pytest.raises(ConfigError, match="--group-field"):
        frequent_answers([question("h?", "nothing")], asked)


# Shuffling


@given(arrays(np.int64, st.tuples(st.integers(2, 12), st.integers(1, 4)), elements=st.integers(-1, 60)))
def test_no_question_gets_its_own_passages(rows_QK: np.ndarray[Any, np.dtype[np.int64]]) -> None:
    other_Q = others(rows_QK, seed=0)
    assert not np.any(other_Q == np.arange(len(rows_QK)))
    for question, other in enumerate(other_Q.tolist()):
        shared = [shares(rows_QK[question], rows_QK[j]) for j in range(len(rows_QK))]
        del shared[question]
        # With text in common only where every other question has some.
        assert shares(rows_QK[question], rows_QK[other]) == 0 or min(shared) > 0


def shares(first: Any, second: Any) -> int:
    """Pairs of passages, a chunk and the next one each, with a chunk in common."""
    return sum(bool({a, a + 1} & {b, b + 1}) for a in first for b in second if a >= 0 and b >= 0)


def test_whose_passages_a_question_gets_is_drawn() -> None:
    rows_QK = 10 * np.arange(60).reshape(30, 2)
    drawn = [others(rows_QK, seed=seed) for seed in range(3)]
    assert not np.array_equal(drawn[0], drawn[1])
    assert np.array_equal(drawn[0], others(rows_QK, seed=0))
    assert sorted(drawn[2].tolist()) == list(range(30))
    with pytest.raises(ConfigError, match="one question alone"):
        others(rows_QK[:1], seed=0)


# Confidence

CONFIDENCE = np.array([0.9, 0.8, 0.8, 0.7, 0.6, 0.5, 0.4, 0.4])
RIGHT = np.array([1, 1, 0, 1, 0, 1, 0, 0], float)


def test_accuracy_over_coverage_by_hand() -> None:
    order = np.random.default_rng(0).permutation(8)
    found = selective_accuracy(CONFIDENCE[order], RIGHT[order])
    assert found.thresholds.tolist() == [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    assert found.coverage.tolist() == [1 / 8, 3 / 8, 4 / 8, 5 / 8, 6 / 8, 1]
    assert found.accuracy.tolist() == pytest.approx([1, 2 / 3, 3 / 4, 3 / 5, 4 / 6, 1 / 2])
    assert found.area == pytest.approx((1 + 2 * 2 / 3 + 3 / 4 + 3 / 5 + 4 / 6 + 2 * 1 / 2) / 8)
    with pytest.raises(ConfigError, match="no question"):
        selective_accuracy(CONFIDENCE[:0], RIGHT[:0])


@pytest.mark.parametrize(
    ("accuracy", "threshold", "coverage", "reached"),
    [
        (0.5, 0.4, 1.0, 0.5),
        (0.51, 0.5, 0.75, 4 / 6),
        (0.6, 0.5, 0.75, 4 / 6),  # not 0.6, at which it is reached, too: fewer would be answered
        (0.7, 0.7, 0.5, 0.75),
        (0.76, 0.9, 0.125, 1.0),
    ],
)
def test_the_smallest_confidence_that_gives_the_accuracy_is_chosen(
    accuracy: float, threshold: float, coverage: float, reached: float
) -> None:
    found = choose_threshold(CONFIDENCE, RIGHT, accuracy, at_least=1)
    assert found == pytest.approx((threshold, coverage, reached))


def test_an_accuracy_of_few_answers_does_not_count() -> None:
    assert choose_threshold(CONFIDENCE, RIGHT, 0.75, at_least=4)[0] == 0.7
    with pytest.raises(
        ConfigError, match=r"no confidence gives 76% .* most is 75\.0%, of the 50\.0% .* 0\.700 or more"
    ):
        choose_threshold(CONFIDENCE, RIGHT, 0.76, at_least=4)
    with pytest.raises(ConfigError, match="8 questions are too few"):
        choose_threshold(CONFIDENCE, RIGHT, 0.5)
    many = np.repeat(CONFIDENCE, 20), np.repeat(RIGHT, 20)
    assert choose_threshold(*many, 0.76)[0] == 0.9


def test_a_resample_is_as_if_questions_were_asked_several_times() -> None:
    weights = np.array([0, 2, 1, 0, 3, 1, 1, 0], float)
    times = weights.astype(int)
    repeated = selective_accuracy(np.repeat(CONFIDENCE, times), np.repeat(RIGHT, times))
    assert selective_accuracy(CONFIDENCE, RIGHT, weights).area == pytest.approx(repeated.area)
    low, high = area_interval(CONFIDENCE, RIGHT, seed=0)
    assert low < selective_accuracy(CONFIDENCE, RIGHT).area < high
    assert area_interval(CONFIDENCE, np.ones(8), seed=0) == (1.0, 1.0)


# Predictions and records


def line(number: int, **modes: dict[str, Any]) -> dict[str, Any]:
    said = {name: {"answer": "x", "f1": 0.5, **values} for name, values in modes.items()}
    return {"id": f"d:{number}", "data_set": "d", "question": "?", "answers": ["x"], "group": "", "modes": said}


def test_a_mode_that_answered_some_questions_is_compared_on_these() -> None:
    lines = [
        line(0, retrieval={"exact_match": 1.0, "confidence": 0.5}, frequent={"exact_match": 0.0, "confidence": 0.1}),
        line(1, retrieval={"exact_match": 0.0, "confidence": 0.6}, frequent={"exact_match": 1.0, "confidence": 0.1}),
        line(2, retrieval={"exact_match": 1.0, "confidence": 0.7}),
    ]
    record, units = qa_record("m", lines, num_read=0, configuration={}, fingerprints={})
    assert record.figures["retrieval less the others, exact match: most frequent answer"].value == 0
    assert record.figures["exact match, retrieval"].value == pytest.approx(200 / 3)
    assert record.figures["exact match, most frequent answer"].count == 2
    assert units["em_frequent"] == [0.0, 1.0, None]
    assert confidences(lines, "frequent")[1].tolist() == [0.0, 1.0]
    assert not any("on d" in name or "recall" in name for name in record.figures)


def test_a_confidence_is_chosen_on_what_retro_ask_does(tmp_path: Path) -> None:
    lines = [line(n, gold={"exact_match": 1.0, "confidence": 0.5}) for n in range(30)]
    with pytest.raises(ConfigError, match="retrieval or closed book"):
        save_chosen_threshold(tmp_path, lines, 0.5, "dev")


def test_predictions_end_at_whole_lines_and_damage_is_told(tmp_path: Path) -> None:
    kept = Predictions(tmp_path, "m", {"k": 1})
    kept.add([{"a": 1}, {"a": "\ud800\u00e9"}, {"a": 3}])
    assert kept.folder is not None
    path = kept.folder / "predictions.jsonl"
    with path.open("ab") as file:
        file.write(b'{"a": 4')
    again = Predictions(tmp_path, "m", {"k": 1})
    assert [few["a"] for few in again.lines] == [1, "?\u00e9", 3]
    again.cut(2)
    again.add([{"a": 5}])
    assert [json.loads(text)["a"] for text in path.read_bytes().splitlines()] == [1, "?\u00e9", 5]
    assert Predictions(tmp_path, "m", {"k": 2}).lines == []
    path.write_bytes(b"torn\n" + path.read_bytes())
    with pytest.raises(FormatError, match="--overwrite"):
        Predictions(tmp_path, "m", {"k": 1})
    assert Predictions(tmp_path, "m", {"k": 1}, overwrite=True).lines == []
    assert json.loads((kept.folder / "recipe.json").read_text(encoding="utf-8")) == {"k": 1}


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match="'open' is unknown: use retrieval"):
        QaConfig(modes=("open",))  # type: ignore[arg-type]
    wrong: Any
    for wrong in ({"num_neighbors": -1}, {"batch_size": 0}):
        with pytest.raises(ConfigError, match="batch_size must be above 0"):
            QaConfig(**wrong)
