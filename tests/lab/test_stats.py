"""Intervals, tests and corrections against scipy.stats, closed forms and brute force."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats as reference

from openwork.errors import RecipeError
from openwork.lab.stats import Interval, contrast, equivalence_test, holm, mean_interval, paired_interval, t_test

numbers = st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=12)


def spread(values: list[float]) -> bool:
    return max(values) - min(values) > 1e-3 * max(1e-3, *map(abs, values))


@given(numbers, st.sampled_from([0.5, 0.9, 0.95, 0.99]))
@settings(max_examples=60, deadline=None)
def test_interval_is_scipys(values: list[float], level: float) -> None:
    assume(spread(values))
    found = mean_interval(values, level)
    result = reference.ttest_1samp(values, 0.0).confidence_interval(level)
    scale = max(map(abs, values))
    assert found.low == pytest.approx(result.low, rel=1e-7, abs=1e-7 * scale)
    assert found.high == pytest.approx(result.high, rel=1e-7, abs=1e-7 * scale)
    assert found.mean == pytest.approx(math.fsum(values) / len(values), rel=1e-12, abs=1e-12 * scale)
    assert found.n == len(values)


def test_interval_by_hand() -> None:
    # mean 2, standard deviation 1, n = 3: half width 4.302653 / sqrt(3)
    found = mean_interval([1.0, 2.0, 3.0])
    assert (found.mean, found.n) == (2.0, 3)
    assert found.high - 2.0 == pytest.approx(4.302652729911275 / math.sqrt(3.0), rel=1e-9)


def test_degenerate_intervals() -> None:
    none, one = mean_interval([]), mean_interval([0.7])
    assert none.n == 0
    assert all(map(math.isnan, (none.mean, none.low, none.high)))
    assert (one.mean, one.n) == (0.7, 1)
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    assert mean_interval([0.1, 0.1, 0.1]) == Interval(0.1, 0.1, 0.1, 3)
    assert mean_interval([0.0, 0.0]) == Interval(0.0, 0.0, 0.0, 2)
    assert one.as_dict() == {"mean": 0.7, "low": None, "high": None}
    endless = mean_interval([1.0, math.inf, 2.0])
    assert endless.mean == math.inf
    assert endless.as_dict() == {"mean": None, "low": None, "high": None}


@pytest.mark.parametrize("size", [1e-310, 1e-200, 1.0, 1e200, 1e307])
def test_intervals_scale_without_overflow(size: float) -> None:
    found, unit = mean_interval([size, 2 * size, 3 * size]), mean_interval([1.0, 2.0, 3.0])
    assert found.mean == pytest.approx(2 * size, rel=1e-9)
    assert found.low / size == pytest.approx(unit.low, rel=1e-9)


@pytest.mark.parametrize("level", [0.0, 1.0, 95, -0.5, math.nan])
def test_level_is_checked(level: float) -> None:
    with pytest.raises(RecipeError, match=r"0\.95"):
        mean_interval([1.0, 2.0], level)


@given(numbers, st.floats(-10, 10), st.sampled_from(["greater", "less", "two-sided"]))
@settings(max_examples=80, deadline=None)
def test_p_is_scipys(values: list[float], null: float, alternative: str) -> None:
    assume(spread(values))
    expected = reference.ttest_1samp(values, null, alternative=alternative).pvalue
    assert t_test(values, null, alternative) == pytest.approx(expected, rel=1e-6, abs=1e-12)  # type: ignore[arg-type]


def test_p_of_values_alike() -> None:
    up = [0.2, 0.2, 0.2]
    assert [t_test(up, 0.0, side) for side in ("greater", "less", "two-sided")] == [0.0, 1.0, 0.0]  # type: ignore[arg-type]
    assert [t_test(up, 0.2, side) for side in ("greater", "less", "two-sided")] == [1.0, 1.0, 1.0]  # type: ignore[arg-type]
    assert math.isnan(t_test([0.2]))
    assert math.isnan(t_test([]))
    assert math.isnan(t_test([1.0, math.nan]))
    with pytest.raises(RecipeError, match="'upwards'"):
        t_test(up, 0.0, "upwards")  # type: ignore[arg-type]


def test_rounding_is_no_difference() -> None:
    a = dict.fromkeys(range(4), 0.1 + 0.2)  # 0.30000000000000004
    b = dict.fromkeys(range(4), 0.3)
    assert paired_interval(a, b) == Interval(0.0, 0.0, 0.0, 4)
    rises = {seed: 0.1 * seed + 0.01 for seed in range(5)}
    level = {seed: 0.1 * seed for seed in range(5)}
    found = paired_interval(rises, level)  # 0.01 on every seed, up to the last bits
    assert found.low == found.high == pytest.approx(0.01, rel=1e-9)


def test_pairs_are_the_common_seeds() -> None:
    found = paired_interval({0: 5.0, 1: 6.0, 2: 9.0, 7: 100.0}, {2: 7.0, 1: 5.0, 0: 2.0, 8: -100.0})
    expected = reference.ttest_1samp([3.0, 1.0, 2.0], 0.0).confidence_interval(0.95)
    assert (found.mean, found.n) == (2.0, 3)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-9)
    assert paired_interval({0: 1.0}, {1: 1.0}).n == 0


def test_contrast_by_hand() -> None:
    values = {"a": {0: 4.0, 1: 6.0, 3: 1.0}, "b": {0: 1.0, 1: 2.0, 2: 9.0}, "c": {1: 3.0, 0: 2.0, 3: 0.0}}
    assert contrast(values, {"a": 1.0, "b": -0.5, "c": -0.5}) == {0: 2.5, 1: 3.5}
    assert contrast(values, {"a": 1.0, "c": -1.0}) == {0: 2.0, 1: 3.0, 3: 1.0}
    assert list(contrast(values, {"c": 2.0})) == [1, 0, 3]
    assert contrast({"a": {0: 0.7}, "b": {0: 0.7}}, {"a": 3.0, "b": -3.0}) == {0: 0.0}
    with pytest.raises(RecipeError, match="'d'"):
        contrast(values, {"a": 1.0, "d": -1.0})
    with pytest.raises(RecipeError, match="without arms"):
        contrast(values, {})


def test_contrast_of_equals_is_exactly_zero() -> None:
    arms = {name: {seed: 0.1 + 0.7 * seed for seed in range(6)} for name in "abcd"}
    assert set(contrast(arms, {"a": 1.0, "b": -1 / 3, "c": -1 / 3, "d": -1 / 3}).values()) == {0.0}


def test_contrast_beyond_floats_is_not_finite() -> None:
    found = contrast({"a": {0: 1e308, 1: math.inf}, "b": {0: -1e308, 1: math.inf}}, {"a": 1.0, "b": -1.0})
    assert not math.isfinite(found[0])
    assert not math.isfinite(found[1])


@given(numbers, st.floats(0.01, 1e6))
@settings(max_examples=80, deadline=None)
def test_equivalence_against_two_one_sided_tests(values: list[float], margin: float) -> None:
    assume(spread(values))
    found = equivalence_test(values, margin)
    lower = reference.ttest_1samp(values, -margin, alternative="greater").pvalue
    upper = reference.ttest_1samp(values, margin, alternative="less").pvalue
    assert found.p == pytest.approx(max(lower, upper), rel=1e-6, abs=1e-12)
    inside = -margin < found.interval.low and found.interval.high < margin
    if abs(found.p - 0.05) > 1e-6:
        assert (found.p < 0.05) == inside  # the 90 % interval says the same


def test_equivalence_by_the_closed_form() -> None:
    # mean 0.02, standard error 0.01, 3 degrees of freedom: P(t > (0.05 - 0.02) / 0.01) = P(t_3 > 3)
    step = 0.02 * math.sqrt(3.0) / 2.0  # standard deviation 0.02
    values = [0.02 - step, 0.02 - step, 0.02 + step, 0.02 + step]
    t = 3.0
    tail = 0.5 - (math.atan(t / math.sqrt(3.0)) + math.sqrt(3.0) * t / (3.0 + t * t)) / math.pi
    assert equivalence_test(values, 0.05).p == pytest.approx(tail, rel=1e-6)


def test_degenerate_equivalence() -> None:
    assert equivalence_test([0.0, 0.0, 0.0], 0.01).p == 0.0
    assert equivalence_test([0.02, 0.02, 0.02], 0.01).p == 1.0
    assert equivalence_test([0.01, 0.01, 0.01], 0.01).p == 1.0
    assert math.isnan(equivalence_test([0.0], 0.01).p)
    for margin in (0.0, -0.1, math.nan, math.inf):
        with pytest.raises(RecipeError, match="margin"):
            equivalence_test([0.0, 0.1], margin)


def closed_test(p_values: list[float]) -> list[float]:
    """Holm's procedure is the closure of Bonferroni's test: the largest m * min(p) of any subset with i in it."""
    n = len(p_values)
    subsets = [set(chosen) for size in range(1, n + 1) for chosen in combinations(range(n), size)]
    return [min(1.0, max(len(s) * min(p_values[j] for j in s) for s in subsets if i in s)) for i in range(n)]


@given(st.lists(st.floats(0.0, 1.0), max_size=7))
@settings(max_examples=100, deadline=None)
def test_holm_is_the_closed_bonferroni_test(p_values: list[float]) -> None:
    assert holm(p_values) == pytest.approx(closed_test(p_values), rel=1e-12, abs=0.0)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    found = holm([0.02, math.nan, 0.04])
    assert (found[0], found[2]) == pytest.approx((0.04, 0.04))
    assert math.isnan(found[1])
    assert holm([]) == []
    with pytest.raises(RecipeError, match=r"1\.5"):
        holm([0.1, 1.5])
