"""Exact match and F1 on hand-worked cases, and on random ones against the rules written down a second time."""

import math
import re
import string
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.metrics import exact_match, normalized_answer, token_f1
from retro.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Beatles", "beatles"),
        ("a  cat and an\tapple", "cat and apple"),
        ("U.S.", "us"),
        ("rock'n'roll", "rocknroll"),
        ("well-known", "wellknown"),
        ("theatre of the mind", "theatre of mind"),
        ("Caf\u00e9 \u2014 \u00c9lan", "caf\u00e9 \u2014 \u00e9lan"),  # a dash that is not ASCII stays
        ("1,234.5", "12345"),
        ("The", ""),
        ("A.N.", ""),  # punctuation goes first
    ],
)
def test_answers_are_normalized_as_squad_does(text: str, expected: str) -> None:
    assert normalized_answer(text) == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "em", "f1"),
    [
        ("the Eiffel Tower", ["Eiffel Tower"], 1, 1),
        ("Tower of Eiffel", ["Eiffel Tower"], 0, 0.8),  # 2 of 3 words, 2 of 2
        ("Paris, France", ["paris france", "Paris"], 1, 1),
        ("in Paris", ["London", "Paris"], 0, 2 / 3),
        ("new new york", ["new york york"], 0, 2 / 3),  # words count as often as they occur
        ("", ["Paris"], 0, 0),
        ("the", ["a"], 1, 1),  # nothing is left of either
        ("M\u00fcnchen", ["Munchen"], 0, 0),
        ("42", ["42.", "forty-two"], 1, 1),
    ],
)
def test_exact_match_and_f1_by_hand(prediction: str, answers: list[str], em: float, f1: float) -> None:
    assert exact_match(prediction, answers) == em
    assert token_f1(prediction, answers) == pytest.approx(f1, rel=1e-12)


WORDS = st.lists(st.sampled_from(["the", "a", "cat", "Cat!", "dog", "u.s.", "an", "-"]), max_size=5).map(" ".join)


@given(WORDS, st.lists(WORDS, min_size=1, max_size=3))
def test_both_equal_the_rules_written_down_a_second_time(prediction: str, answers: list[str]) -> None:
    def plain(text: str) -> list[str]:
        kept = text.lower().translate(str.maketrans("", "", string.punctuation))
        return [word for word in re.split(r"\s+", kept) if word not in ("", "a", "an", "the")]

    def f1(one: list[str], other: list[str]) -> float:
        if not one or not other:
            return float(one == other)
        rest, same = Counter(other), 0
        for word in one:
            if rest[word] > 0:
                rest[word] -= 1
                same += 1
        return 2 * same / (len(one) + len(other))

    assert exact_match(prediction, answers) == float(any(plain(prediction) == plain(answer) for answer in answers))
    assert token_f1(prediction, answers) == pytest.approx(
        max(f1(plain(prediction), plain(answer)) for answer in answers)
    )


@pytest.mark.parametrize("prediction", [math.nan, None, 3])
def test_a_prediction_that_is_no_text_is_refused(prediction: object) -> None:
    for measure in (exact_match, token_f1):
        with pytest.raises(ConfigError, match="is no text"):
            measure(prediction, ["x"])  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="without any accepted answer"):
            measure("x", [])
