"""Measures of text, pure functions."""

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from retro.errors import ConfigError

Floats = np.ndarray[Any, np.dtype[np.floating[Any]]]

_SPACE = re.compile(r"\s+")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)


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


def normalized_answer(text: str) -> str:
    """An answer as SQuAD compares it: lower case, no punctuation, no articles, single spaces.

    Punctuation is ASCII's and goes without leaving a space, as in `u.s.` = `us`; articles are whole words.

    Source: the evaluation script of arXiv:1606.05250.
    """
    plain = "".join(character for character in text.lower() if character not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", plain).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 where the prediction is one of the answers after `normalized_answer`, else 0.

    Raises:
        ConfigError: The prediction is no text, or there is no answer.
    """
    _check_prediction(prediction, answers)
    return float(any(normalized_answer(prediction) == normalized_answer(answer) for answer in answers))


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """Best F1 of the words of the prediction and of an answer, counted as often as they occur, after `normalized_answer`.

    Where one of the two is empty, 1 if both are, else 0.

    Raises:
        ConfigError: The prediction is no text, or there is no answer.
    """
    _check_prediction(prediction, answers)
    return max(_one_f1(normalized_answer(prediction).split(), normalized_answer(answer).split()) for answer in answers)


def _one_f1(prediction: list[str], answer: list[str]) -> float:
    if not prediction or not answer:
        return float(prediction == answer)
    common = sum((Counter(prediction) & Counter(answer)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(prediction), common / len(answer)
    return 2 * precision * recall / (precision + recall)


def _check_prediction(prediction: object, answers: Sequence[str]) -> None:
    if not isinstance(prediction, str):
        raise ConfigError(f"the prediction {prediction!r} is no text: a question without an answer is an empty string")
    if not answers:
        raise ConfigError("a question without any accepted answer cannot be scored")


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


# --- intervals and tests: the bootstrap over units (documents, questions) -----------------------------------------


RESAMPLES = 10_000
_DRAWN_AT_ONCE = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Of two systems on the same units."""

    value: float
    low: float
    """Lower end of the 95% interval."""
    high: float
    """Upper end."""
    p_value: float
    """Two-sided: twice the share of resamples whose difference has the other sign; not below 2 / (resamples + 1)."""


def bootstrap_mean(values_N: Floats, *, seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float]:
    """95% interval of a mean.

    Args:
        values_N: One value a unit.
        seed: Of the resamples.
        resamples: How many.

    Returns:
        Lower and upper end.

    Raises:
        ConfigError: There is no unit, or a value is not finite.
    """
    return bootstrap_ratio(values_N, np.ones(len(values_N)), seed=seed, resamples=resamples)


def bootstrap_ratio(
    numerators_N: Floats, denominators_N: Floats, *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """95% interval of sum(numerators) / sum(denominators), as of losses over bytes.

    Args:
        numerators_N: One value a unit.
        denominators_N: Not negative; their sum is above 0. A resample that holds only zeros is left out.
        seed: Of the resamples.
        resamples: How many.

    Returns:
        Lower and upper end: the 2.5th and 97.5th percentile of the resamples' ratios.

    Raises:
        ConfigError: There is no unit, a value is not finite, or the denominators cannot be divided by.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13: the percentile interval.
    """
    ratios = _resampled_ratios(numerators_N, denominators_N, seed, resamples)
    low, high = np.percentile(ratios, (2.5, 97.5))
    return float(low), float(high)


def paired_bootstrap(
    first_N: Floats,
    second_N: Floats,
    denominators_N: Floats | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Difference:
    """Compares two systems on the same units: (sum(first) - sum(second)) / sum(denominators), units drawn in pairs.

    Args:
        first_N: One value a unit.
        second_N: The other system's, in the same order.
        denominators_N: What the sums are divided by, the same for both, as the bytes of documents; by default 1 each: means.
        seed: Of the resamples.
        resamples: How many.

    Raises:
        ConfigError: As bootstrap_ratio.

    Source: Koehn 2004, Statistical significance tests for machine translation evaluation; here two-sided, so that p is below
        0.05 where 0 is outside the 95% interval.
    """
    if len(first_N) != len(second_N):
        raise ConfigError(f"{len(first_N)} and {len(second_N)} values are no pairs: both must be of the same units")
    denominators_N = np.ones(len(first_N)) if denominators_N is None else denominators_N
    difference_N = np.asarray(first_N, float) - np.asarray(second_N, float)
    ratios = _resampled_ratios(difference_N, denominators_N, seed, resamples)
    low, high = np.percentile(ratios, (2.5, 97.5))
    beyond = min(int((ratios <= 0).sum()), int((ratios >= 0).sum()))
    return Difference(
        value=float(difference_N.sum() / np.sum(denominators_N)),
        low=float(low),
        high=float(high),
        p_value=min(1.0, 2 * (beyond + 1) / (len(ratios) + 1)),
    )


def _resampled_ratios(numerators_N: Floats, denominators_N: Floats, seed: int, resamples: int) -> Floats:
    numerators_N, denominators_N = np.asarray(numerators_N, float), np.asarray(denominators_N, float)
    N = len(numerators_N)
    if not N or len(denominators_N) != N:
        raise ConfigError(f"{N} values over {len(denominators_N)}: there must be as many of both, and at least one")
    if not (np.isfinite(numerators_N).all() and np.isfinite(denominators_N).all()):
        raise ConfigError("a value is not finite: look for NaN or infinity in the units of the record")
    if denominators_N.min() < 0 or not denominators_N.sum() > 0:
        raise ConfigError("the denominators must not be negative, and their sum must be above 0")
    rng = np.random.default_rng(seed)
    block = max(1, _DRAWN_AT_ONCE // N)
    ratios = []
    for begin in range(0, resamples, block):
        drawn = rng.integers(N, size=(min(block, resamples - begin), N))
        sums = denominators_N[drawn].sum(axis=1)
        ratios.append(numerators_N[drawn].sum(axis=1)[sums > 0] / sums[sums > 0])
    return np.concatenate(ratios)
