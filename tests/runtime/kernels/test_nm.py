from __future__ import annotations

import itertools
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openwork.runtime.kernels import nm
from openwork.runtime.kernels.precision import PRECISIONS, Precision, scales
from openwork.runtime.kernels.target import Target
from tests.runtime.kernels.sparse_tools import (
    TARGETS,
    assert_close,
    balanced,
    draws,
    guarded,
    normal,
    run,
    sparse,
    untouched,
)

PERMUTING = [target for target in TARGETS if target.name in nm.PERMUTING]
NAMES = [target.name for target in PERMUTING]
PATTERNS = [(2, 4), (1, 4), (3, 6), (4, 8), (7, 13), (1, 16), (16, 16)]

needs_target = pytest.mark.skipif(not PERMUTING, reason="no processor here permutes registers")


def packed(weight: Any, bias: Any, n: int, m: int, target: Target, kind: Precision = "float32") -> nm.Packed:
    return nm.pack(weight, bias, scales(np.abs(weight).max(axis=1, initial=0), kind), n, m, target, kind)


def product(target: Target, part: nm.Packed, x: Any, threads: int = 1, **after: Any) -> Any:
    y, room = guarded(len(x), part.shape[0])
    steps = {"columns": len(x), "x_step": x.strides[0], "y_step": y.strides[0]}
    run(nm.calls(target, part, x.ctypes.data, y.ctypes.data, **steps, **after), target, threads)
    assert untouched(room)
    return y


def dense(part: nm.Packed) -> Any:
    weight = np.zeros(part.shape, np.float32)
    nm.unpack(part, weight)
    return weight


@needs_target
@given(
    st.sampled_from(PERMUTING or [None]), st.sampled_from(PATTERNS), st.integers(1, 40), st.integers(1, 150),
    st.sampled_from([0.0, 0.2]), st.integers(1, 3), st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=120, deadline=None)
def test_products_are_within_the_bound(
    target: Target, pattern: tuple[int, int], out: int, width: int, hollow: float, columns: int, seed: int
) -> None:
    weight, bias, x = balanced(seed, out, width, *pattern, hollow), normal(seed + 1, out), normal(seed + 2, columns, width)
    part = packed(weight, bias, *pattern, target)
    assert np.array_equal(dense(part), weight)
    assert_close(product(target, part, x), weight, bias, x)


@needs_target
@pytest.mark.parametrize("target", PERMUTING, ids=NAMES)
@pytest.mark.parametrize("kind", PRECISIONS)
@pytest.mark.parametrize("pattern", [(2, 4), (8, 16)])
def test_narrow_weights_multiply_as_what_they_stand_for(target: Target, kind: Precision, pattern: tuple[int, int]) -> None:
    weight, bias, x = balanced(3, 35, 83, *pattern), normal(4, 35), normal(5, 2, 83)
    part = packed(weight, bias, *pattern, target, kind)
    assert (kind == "float32") == bool(np.array_equal(dense(part), weight))
    assert_close(product(target, part, x), dense(part), bias, x)


@needs_target
@pytest.mark.parametrize("target", PERMUTING, ids=NAMES)
def test_threads_and_columns_change_no_bit(target: Target) -> None:
    weight, bias, x = balanced(6, 300, 400, 2, 4), normal(7, 300), normal(8, 7, 400)
    part = packed(weight, bias, 2, 4, target)
    assert len(part.bounds) > 3
    one = product(target, part, x)
    for threads in (2, 3):
        assert np.array_equal(product(target, part, x, threads), one)
    for count in (1, 2, 3, 5):
        assert np.array_equal(product(target, part, x[:count]), one[:count])


@needs_target
@pytest.mark.parametrize("target", PERMUTING, ids=NAMES)
@pytest.mark.parametrize("pattern", [(2, 4), (4, 8), (3, 6), (8, 16)])
@pytest.mark.parametrize("hollow", [0.0, 0.4])
def test_filling_up_makes_no_nan(target: Target, pattern: tuple[int, int], hollow: float) -> None:
    """What is not finite reaches the rows that have a weight for it and no others, filled-up groups included."""
    for width in (96, 97, 5):
        weight, bias, x = balanced(9, 37, width, *pattern, hollow), normal(10, 37), normal(11, 1, width)
        part = packed(weight, bias, *pattern, target)
        plain = product(target, part, x)[0]
        for place, value in itertools.product({0, 2, width - 1}, (np.inf, np.nan)):
            bad = x.copy()
            bad[0, place] = value
            y, reached = product(target, part, bad)[0], weight[:, place] != 0
            expected = np.sign(weight[reached, place]) * value
            assert np.array_equal(y[reached], expected.astype(np.float32), equal_nan=True)
            assert np.array_equal(y[~reached], plain[~reached])


@needs_target
@pytest.mark.parametrize("target", PERMUTING, ids=NAMES)
def test_nothing_is_read_beyond_a_row_of_x(target: Target) -> None:
    for n, m in ((2, 4), (3, 6), (7, 13)):
        for width in range(1, 70):
            weight, bias = balanced(width, 3, width, n, m), normal(12, 3)
            room = np.full(width + 64, np.nan, np.float32)  # a NaN that is read by mistake does not go away
            room[32 : 32 + width] = normal(13, width)
            x = room[None, 32 : 32 + width]
            assert_close(product(target, packed(weight, bias, n, m, target), x), weight, bias, x)


@needs_target
@pytest.mark.parametrize("target", PERMUTING, ids=NAMES)
@pytest.mark.parametrize("pattern", [(2, 4), (3, 6), (1, 8), (7, 13)])
def test_the_order_of_summation_is_as_stated(target: Target, pattern: tuple[int, int]) -> None:
    weight = balanced(20, 21, 130, *pattern) * np.float32(10) ** draws(21).integers(-4, 5, (21, 130)).astype(np.float32)
    bias, ones, cut = normal(22, 21), np.ones((1, 130), np.float32), nm.steps(target, *pattern)
    expected = []
    for row, added in zip(weight, bias, strict=True):
        sums = np.zeros(4, np.float32)
        for begin in range(0, 130, cut.columns):
            group = row[begin : begin + cut.columns]
            filled = [
                np.append(one[one != 0], np.zeros(cut.n))[: cut.n]
                for one in np.split(group, range(cut.m, len(group), cut.m))
            ]
            for q, value in enumerate(np.concatenate(filled).astype(np.float32)):
                sums[q % 4] += value
        expected.append((sums[0] + sums[1]) + (sums[2] + sums[3]) + added)
    assert np.array_equal(product(target, packed(weight, bias, *pattern, target), ones)[0], np.array(expected))


@needs_target
@pytest.mark.parametrize("target", PERMUTING, ids=NAMES)
def test_what_follows_the_sum_is_applied(target: Target) -> None:
    part, x = packed(balanced(14, 36, 50, 2, 4), normal(15, 36), 2, 4, target), normal(16, 2, 50)
    limits = np.array([-0.5, 2.0], np.float32)
    found = product(target, part, x, act="clamp", limits=limits.ctypes.data)
    assert np.array_equal(found, np.clip(product(target, part, x), -0.5, 2.0))


@needs_target
@pytest.mark.parametrize("target", PERMUTING, ids=NAMES)
def test_bytes_are_those_of_weights_and_four_bits(target: Target) -> None:
    part = packed(balanced(17, 64, 480, 2, 4), normal(18, 64), 2, 4, target)
    entries = 64 * 480 // 2
    assert part.multiplies == entries
    assert part.values.nbytes == 4 * entries
    assert part.indices.nbytes == entries // 2
    back = pickle.loads(pickle.dumps(part))
    assert back.values.ctypes.data % 64 == 0
    x = normal(19, 1, 480)
    assert np.array_equal(product(target, back, x), product(target, part, x))


@given(st.integers(1, 6), st.integers(0, 40), st.integers(1, 16), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_the_fullest_group_by_hand(out: int, width: int, m: int, density: float, seed: int) -> None:
    weight = sparse(seed, out, width, density)
    groups = [np.count_nonzero(row[first : first + m]) for row in weight for first in range(0, width, m)]
    assert nm.fits(weight, m) == max(groups, default=0)


@given(st.integers(0, 8), st.integers(1, 40), st.sampled_from([4, 8, 16]), st.floats(0, 1), st.integers(1, 16))
@settings(max_examples=80, deadline=None)
def test_a_matrix_is_split_into_its_first_entries_and_the_rest(out: int, width: int, m: int, density: float, n: int) -> None:
    weight = sparse(out, out, width, density)
    first, rest = nm.split(weight, n, m)
    assert np.array_equal(first + rest, weight)
    assert nm.fits(first, m) <= n
    for row, early, late in zip(weight, first, rest, strict=True):
        for at in range(0, width, m):
            kept = np.flatnonzero(row[at : at + m])
            assert np.flatnonzero(early[at : at + m]).tolist() == kept[:n].tolist()
            assert np.flatnonzero(late[at : at + m]).tolist() == kept[n:].tolist()


@given(st.integers(1, 20), st.integers(1, 60), st.sampled_from([8, 16]), st.floats(0, 1), st.floats(1.5, 6))
@settings(max_examples=80, deadline=None)
def test_the_level_is_the_cheapest(out: int, width: int, m: int, density: float, price: float) -> None:
    weight = sparse(width, out, width, density)
    places = out * -(-width // m)

    def cost(n: int) -> float:
        rest = np.count_nonzero(nm.split(weight, n, m)[1]) if n else np.count_nonzero(weight)
        return n * places + price * rest

    assert cost(nm.level(weight, m, price)) <= min(cost(n) for n in range(m + 1)) + 1e-9 * price * weight.size
