"""When a model had better be silent: how many of its answers are right where only the most confident ones are given.

Letters: N questions.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from retro.errors import ConfigError

Floats = NDArray[np.float64]

LEAST_ANSWERED = 20
"""Questions that must be answered at a threshold for it to count: a few answers prove no accuracy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What answering only above a confidence gives, for each confidence that occurs, from the highest on."""

    thresholds: Floats
    """Answered is what has at least this confidence."""
    coverage: Floats
    """Share of the questions that are answered then."""
    accuracy: Floats
    """Share of right answers among them."""
    area: float
    """Mean, over the questions, of the accuracy among those of at least the same confidence: under the curve."""


def selective_accuracy(confidence_N: Floats, right_N: Floats, weights_N: Floats | None = None) -> Selection:
    """Accuracy over coverage.

    Args:
        confidence_N: Of each answer.
        right_N: 1 where it is right, else 0.
        weights_N: How often each question counts; default: once.

    Raises:
        ConfigError: There is no question.

    Source: El-Yaniv and Wiener 2010, On the foundations of noise-free selective classification (risk is 1 minus accuracy).
    """
    if not len(confidence_N):
        raise ConfigError("there is no question to measure")
    weights_N = np.ones(len(confidence_N)) if weights_N is None else weights_N
    order = np.argsort(-confidence_N, kind="stable")
    sorted_N = confidence_N[order]
    # Answers of one confidence are given or kept back together.
    last = np.flatnonzero(np.append(sorted_N[1:] != sorted_N[:-1], True))
    answered, right = np.cumsum(weights_N[order])[last], np.cumsum((weights_N * right_N)[order])[last]
    accuracy = right / np.maximum(answered, 1e-12)
    shares = np.diff(answered, prepend=0.0) / answered[-1]
    return Selection(
        thresholds=sorted_N[last],
        coverage=answered / answered[-1],
        accuracy=accuracy,
        area=float((shares * accuracy).sum()),
    )


def choose_threshold(
    confidence_N: Floats, right_N: Floats, accuracy: float, *, at_least: int = LEAST_ANSWERED
) -> tuple[float, float, float]:
    """The smallest confidence from which on the answers have an accuracy.

    Args:
        confidence_N: Of each answer.
        right_N: 1 where it is right, else 0.
        accuracy: Share of right answers among those given, from 0 to 1.
        at_least: Answers that must be left, so that the accuracy is not one of a few.

    Returns:
        The confidence, the share of questions answered and their accuracy.

    Raises:
        ConfigError: There is none.
    """
    found = selective_accuracy(confidence_N, right_N)
    enough = found.coverage * len(confidence_N) > at_least - 0.5
    good = np.flatnonzero(enough & (found.accuracy >= accuracy))
    if not len(good):
        if not enough.any():
            raise ConfigError(
                f"{len(confidence_N)} questions are too few to choose a threshold on: give {at_least} at least"
            )
        best = int(np.argmax(np.where(enough, found.accuracy, -1.0)))
        raise ConfigError(
            f"no confidence gives {100 * accuracy:g}% right answers: the most is {100 * found.accuracy[best]:.1f}%, of the "
            f"{100 * found.coverage[best]:.1f}% of the questions with a confidence of {found.thresholds[best]:.3f} or more "
            f"({at_least} answers at least); ask for less"
        )
    last = int(good[-1])
    return float(found.thresholds[last]), float(found.coverage[last]), float(found.accuracy[last])


def area_interval(confidence_N: Floats, right_N: Floats, seed: int, resamples: int = 1000) -> tuple[float, float]:
    """95% interval of the area under accuracy over coverage: percentiles of resamples of the questions."""
    N = len(right_N)
    rng = np.random.default_rng(seed)
    areas = [
        selective_accuracy(confidence_N, right_N, np.bincount(rng.integers(N, size=N), minlength=N).astype(float)).area
        for _ in range(resamples)
    ]
    low, high = np.percentile(areas, (2.5, 97.5))
    return float(low), float(high)
