"""Labels move apart as little as possible."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from openwork.report.labels import apart, beside, legend_columns, legend_height

places = st.lists(st.floats(0, 300), min_size=1, max_size=12).map(sorted)


@given(places, st.floats(1, 20))
@settings(max_examples=80, deadline=None)
def test_gaps_and_bounds(wanted: list[float], gap: float) -> None:
    found = apart(wanted, gap, 0.0, 300.0)
    assert len(found) == len(wanted)
    assert all(b - a >= gap - 1e-9 for a, b in pairwise(found))
    assert min(found) >= -1e-9
    assert max(found) <= 300.0 + 1e-9


@given(places.filter(lambda found: len(found) <= 6), st.floats(5, 20))
@settings(max_examples=25, deadline=None)
def test_least_squares(wanted: list[float], gap: float) -> None:
    found = np.array(apart(wanted, gap, -1e6, 1e6))
    target = np.array(wanted)
    limits = [{"type": "ineq", "fun": lambda x, i=i: x[i + 1] - x[i] - gap} for i in range(len(wanted) - 1)]
    start = target + gap * np.arange(len(wanted))
    best = minimize(lambda x: float(((x - target) ** 2).sum()), start, constraints=limits, method="SLSQP")
    assert float(((found - target) ** 2).sum()) <= best.fun + 1e-3


def test_by_hand() -> None:
    assert apart([10.0, 12.0, 50.0], 10.0, 0.0, 100.0) == [6.0, 16.0, 50.0]
    assert apart([0.0, 1.0], 10.0, 0.0, 100.0) == [0.0, 10.0]
    assert apart([99.0, 100.0], 10.0, 0.0, 100.0) == [90.0, 100.0]
    assert apart([50.0] * 3, 10.0, 0.0, 10.0) == [-10.0, 0.0, 10.0]
    assert apart([], 10.0, 0.0, 100.0) == []


def test_room_for_names() -> None:
    assert beside(["abc"], 640.0) == pytest.approx(40.0 + 3 * 6.4)
    assert beside(["abc"], 350.0) == 14.0
    assert legend_height(["a"] * 9, 640.0) == 0.0
    assert legend_columns(["x" * 10_000], 350.0) == 1
    assert legend_height(["abcdef"] * 9, 350.0) == 15.0 * -(-9 // legend_columns(["abcdef"] * 9, 350.0)) + 14.0
