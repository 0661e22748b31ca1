"""Intervals and paired tests, against every resample of a tiny sample and against scipy."""

import itertools
from typing import Any

import numpy as np
import pytest
import scipy.stats  # type: ignore[import-untyped]

from eval import metrics
from eval.metrics import bootstrap_mean, bootstrap_ratio, paired_bootstrap
from retro.errors import ConfigError

RNG = np.random.default_rng(0)
BYTES_N = RNG.lognormal(6.0, 1.0, 60)
LOSS_N = BYTES_N * RNG.normal(0.8, 0.2, 60)
OTHER_N = LOSS_N + BYTES_N * RNG.normal(0.03, 0.1, 60)


def every_resample(numerators: list[float], denominators: list[float]) -> np.ndarray[Any, Any]:
    """The ratio of each of the N^N resamples."""
    draws = itertools.product(range(len(numerators)), repeat=len(numerators))
    return np.array([sum(numerators[i] for i in draw) / sum(denominators[i] for i in draw) for draw in draws])


def test_the_interval_of_a_ratio_is_scipys_percentile_interval() -> None:
    expected = scipy.stats.bootstrap(
        (LOSS_N, BYTES_N),
        lambda x, y, axis: x.sum(axis=axis) / y.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=50_000,
        method="percentile",
        rng=np.random.default_rng(1),
    )
    # The standard error of a 2.5% percentile of 10,000 resamples is near 0.03 standard deviations of the statistic.
    tolerance = 5 * 0.03 * expected.standard_error
    np.testing.assert_allclose(bootstrap_ratio(LOSS_N, BYTES_N), expected.confidence_interval, rtol=0, atol=tolerance)


def test_the_interval_of_a_mean_is_scipys_percentile_interval() -> None:
    hits_N = (RNG.random(80) < 0.3).astype(float)
    expected = scipy.stats.bootstrap(
        (hits_N,), np.mean, n_resamples=50_000, method="percentile", rng=np.random.default_rng(1)
    )
    # Means of 80 hits lie 1/80 apart: a percentile is one of them or its neighbor.
    np.testing.assert_allclose(bootstrap_mean(hits_N), expected.confidence_interval, rtol=0, atol=1 / 80)


def test_interval_and_p_value_of_a_tiny_sample_are_those_of_all_its_resamples() -> None:
    first, second, sizes = [2.0, 5.0, 3.0, 7.0, 1.0], [1.0, 6.0, 1.5, 4.0, 1.5], [4.0, 9.0, 5.0, 11.0, 3.0]
    exact_N = every_resample([a - b for a, b in zip(first, second, strict=True)], sizes)
    share = min(float((exact_N <= 0).mean()), float((exact_N >= 0).mean()))
    found = paired_bootstrap(np.array(first), np.array(second), np.array(sizes), resamples=200_000)
    assert found.value == pytest.approx((18 - 14) / 32, abs=1e-15)
    assert share > 0.05
    assert found.p_value == pytest.approx(2 * share, abs=5 * 2 * (share / 200_000) ** 0.5)
    np.testing.assert_allclose((found.low, found.high), np.percentile(exact_N, (2.5, 97.5)), rtol=0, atol=0.005)


def test_pairs_are_drawn_together() -> None:
    """Two systems that differ by the same in every unit differ for certain, however much units differ from each other."""
    noise_N = RNG.normal(0.0, 100.0, 50)
    found = paired_bootstrap(noise_N + 1.0, noise_N)
    assert (found.value, found.low, found.high) == pytest.approx((1.0, 1.0, 1.0), abs=1e-9)
    assert found.p_value == 2 / 10_001


def test_equal_systems_do_not_differ() -> None:
    found = paired_bootstrap(LOSS_N, LOSS_N, BYTES_N)
    assert (found.value, found.low, found.high, found.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_exchanging_the_systems_turns_the_sign_only() -> None:
    one, other = paired_bootstrap(LOSS_N, OTHER_N, BYTES_N, seed=3), paired_bootstrap(OTHER_N, LOSS_N, BYTES_N, seed=3)
    assert (other.value, other.low, other.high) == pytest.approx((-one.value, -one.high, -one.low))
    assert other.p_value == one.p_value
    assert (one.p_value < 0.05) == (one.high < 0 or one.low > 0)


def test_resamples_do_not_depend_on_how_many_are_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = paired_bootstrap(LOSS_N, OTHER_N, BYTES_N, seed=7)
    monkeypatch.setattr(metrics, "_DRAWN_AT_ONCE", 1000)
    assert paired_bootstrap(LOSS_N, OTHER_N, BYTES_N, seed=7) == whole
    assert paired_bootstrap(LOSS_N, OTHER_N, BYTES_N, seed=8) != whole


def test_resamples_without_any_denominator_are_left_out() -> None:
    """Documents that show no neighbor to any token have 0 bytes of such tokens."""
    low, high = bootstrap_ratio(np.array([0.0, 0.0, 3.0]), np.array([0.0, 0.0, 2.0]))
    assert (low, high) == (1.5, 1.5)


@pytest.mark.parametrize(
    ("numerators", "denominators", "message"),
    [
        ([], [], "at least one"),
        ([1.0], [1.0, 2.0], "as many of both"),
        ([1.0, np.nan], [1.0, 1.0], "not finite"),
        ([1.0, 1.0], [1.0, np.inf], "not finite"),
        ([1.0, 1.0], [2.0, -1.0], "must not be negative"),
        ([1.0, 1.0], [0.0, 0.0], "above 0"),
    ],
)
def test_what_has_no_ratio_is_refused(numerators: list[float], denominators: list[float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bootstrap_ratio(np.array(numerators), np.array(denominators))


def test_systems_measured_on_other_numbers_of_units_are_no_pairs() -> None:
    with pytest.raises(ConfigError, match="2 and 1 values are no pairs"):
        paired_bootstrap(np.array([1.0, 2.0]), np.array([1.0]))
