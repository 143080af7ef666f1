from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openwork.core.schedules import Every, constant, cosine, cubic, linear
from tests.strategies import quick

shares = st.floats(0.0, 1.0)
lengths = st.integers(1, 1000)


def test_cubic_from_half_to_a_tenth_in_eight_updates():
    target = cubic(0.5, 0.1, steps=8)
    expected = [0.5, 0.367969, 0.26875, 0.197656, 0.15, 0.121094, 0.10625, 0.100781, 0.1]
    assert [target(j) for j in range(9)] == pytest.approx(expected, abs=5e-7)


def test_cubic_from_dense_halfway():
    assert cubic(1.0, 0.05, steps=10)(5) == pytest.approx(0.16875, abs=1e-12)


def test_cubic_may_begin_later():
    later, now = cubic(1.0, 0.05, begin=100, steps=10), cubic(1.0, 0.05, steps=10)
    assert [later(100 + j) for j in range(12)] == [now(j) for j in range(12)]
    assert later(0) == 1.0


def test_share_of_granet():
    share = cosine(0.5, 0.005, steps=1000)
    expected = [0.5, 0.427509, 0.2525, 0.077491, 0.005]
    assert [share(t) for t in (0, 250, 500, 750, 1000)] == pytest.approx(expected, abs=5e-7)


def test_share_of_rigl():
    share = cosine(0.3, 0.0, steps=750)
    assert [share(t) for t in (100, 250, 500, 750)] == pytest.approx([0.287032, 0.225, 0.075, 0.0], abs=5e-7)


@given(shares, shares, lengths)
@quick
def test_schedules_start_and_end_where_they_say(start, end, steps):
    for make in (linear, cosine, cubic):
        schedule = make(start, end, steps=steps)
        assert schedule(0) == pytest.approx(start, abs=1e-12)
        assert schedule(steps) == pytest.approx(end, abs=1e-12)
        assert schedule(2 * steps) == schedule(steps)
        assert schedule(-5) == schedule(0)
        values = [schedule(t) for t in range(steps + 1)]
        slopes = [(b - a) * (end - start) for a, b in pairwise(values)]
        assert min(slopes) >= -1e-12


@given(shares, lengths, st.floats(-10, 2000))
@quick
def test_constant(value, steps, at):
    assert constant(value)(at) == value
    assert linear(value, value, steps=steps)(at) == pytest.approx(value)


def test_a_schedule_without_length_is_at_its_end():
    assert [make(0.3, 0.1, steps=0)(0) for make in (linear, cosine, cubic)] == pytest.approx([0.1] * 3)


@given(st.integers(1, 20), st.integers(0, 30), st.one_of(st.none(), st.integers(0, 100)))
@quick
def test_every_is_a_range(period, start, stop):
    every = Every(period, start, stop)
    expected = range(start, 200 if stop is None else min(stop, 200), period)
    assert [step for step in range(200) if step in every] == list(expected)


def test_every_holds_whole_steps_only():
    assert 10 in Every(5)
    assert 10.0 not in Every(5)
    assert "10" not in Every(5)
    assert 74 in Every(1, 0, 0.75 * 99)
    assert math.ceil(0.75 * 99) not in Every(1, 0, 0.75 * 99)
