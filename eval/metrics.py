"""Measures of text, pure functions."""

import re
from collections.abc import Sequence

from retro.errors import ConfigError

_SPACE = re.compile(r"\s+")


def contains_answer(text: str, answers: Sequence[str]) -> bool:
    """Whether one of the answers stands in the text: as whole words, in any case, any white space being one space."""
    return first_with_answer([text], answers) is not None


def first_with_answer(texts: Sequence[str], answers: Sequence[str]) -> int | None:
    """Place of the first text that holds an answer, or None."""
    patterns = [_pattern(answer) for answer in answers if answer.strip()]
    for place, text in enumerate(texts):
        plain = _SPACE.sub(" ", text).casefold()
        if any(pattern.search(plain) for pattern in patterns):
            return place
    return None


def _pattern(answer: str) -> re.Pattern[str]:
    plain = _SPACE.sub(" ", answer.strip()).casefold()
    return re.compile(rf"(?<!\w){re.escape(plain)}(?!\w)")


def answer_recall(ranks: Sequence[int | None], k: int) -> float:
    """Share of questions whose answer stands in one of the first k passages.

    Args:
        ranks: For each question the place of the first passage that holds an answer, from 0; None where there is none.
        k: Passages considered.

    Raises:
        ConfigError: There is no question.
    """
    if not ranks:
        raise ConfigError("there is no question to measure")
    return sum(rank is not None and rank < k for rank in ranks) / len(ranks)
