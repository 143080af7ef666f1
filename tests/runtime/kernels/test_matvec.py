from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openwork.runtime.kernels import matvec
from openwork.runtime.kernels.arrange import sections
from openwork.runtime.kernels.precision import PRECISIONS, Precision, scales
from openwork.runtime.kernels.target import Target
from tests.runtime.kernels.sparse_tools import (
    NAMES,
    TARGETS,
    assert_close,
    draws,
    guarded,
    normal,
    run,
    sparse,
    untouched,
)  # fmt: skip

pytestmark = pytest.mark.skipif(not TARGETS, reason="no LLVM on this machine")
WAYS = [
    (target, lanes, rows)
    for target in TARGETS
    for lanes, rows in ((1, 1), (target.lanes, 1), (1, 2), (1, 4), (1, 8), (1, 16))
    if lanes == 1 or target.name in matvec.GATHERING
]


def packed(
    weight: Any, bias: Any, lanes: int, rows: int, kind: Precision = "float32", onto: bool = False
) -> list[matvec.Slices]:
    scale = scales(np.abs(weight).max(axis=1, initial=0), kind)
    return [
        matvec.pack(
            section, weight.shape[1], bias, scale, lanes=lanes if section.rows == 1 else 1, kind=kind, onto=onto
        )
        for section in sections(weight, rows)
    ]  # fmt: skip


def product(
    target: Target, parts: list[matvec.Slices], x: Any, out: int, threads: int = 1, y: Any = None, **after: Any
) -> Any:  # fmt: skip
    columns = len(x)
    result, room = guarded(columns, out)
    if y is not None:
        result[...] = y
    steps = {"columns": columns, "x_step": x.strides[0], "y_step": 4 * out}
    run(
        [c for part in parts for c in matvec.calls(target, part, x.ctypes.data, result.ctypes.data, **steps, **after)],
        target,
        threads,
    )
    assert untouched(room)
    return result


def dense(parts: list[matvec.Slices], shape: tuple[int, int]) -> Any:
    weight = np.zeros(shape, np.float32)
    for part in parts:
        matvec.unpack(part, weight)
    return weight


@given(
    st.sampled_from(WAYS), st.integers(1, 70), st.integers(1, 90), st.sampled_from([0.0, 0.03, 0.2, 0.6, 1.0]),
    st.sampled_from([1, 2, 3]), st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_products_are_within_the_bound(
    way: tuple[Target, int, int], out: int, width: int, density: float, columns: int, seed: int
) -> None:
    target, lanes, rows = way
    weight, bias, x = sparse(seed, out, width, density, rows), normal(seed + 1, out), normal(seed + 2, columns, width)
    parts = packed(weight, bias, lanes, rows)
    assert np.array_equal(dense(parts, weight.shape), weight)
    assert_close(product(target, parts, x, out), weight, bias, x)


@pytest.mark.parametrize("kind", PRECISIONS)
@pytest.mark.parametrize(("target", "lanes", "rows"), WAYS)
def test_narrow_weights_multiply_as_what_they_stand_for(target: Target, lanes: int, rows: int, kind: Precision) -> None:
    weight, bias, x = sparse(3, 50, 77, 0.3, rows), normal(4, 50), normal(5, 2, 77)
    parts = packed(weight, bias, lanes, rows, kind)
    stands = dense(parts, weight.shape)
    assert (kind == "float32") == bool(np.array_equal(stands, weight))
    assert_close(product(target, parts, x, 50), stands, bias, x)


@pytest.mark.parametrize("target", TARGETS, ids=NAMES)
def test_every_way_threads_and_columns_give_the_same_bits(target: Target) -> None:
    weight, bias, x = sparse(6, 501, 400, 0.2), normal(7, 501), normal(8, 3, 400)
    weight[::7] = 0
    weight[3] = normal(9, 400)
    one = product(target, packed(weight, bias, 1, 1), x, 501)
    for lanes in {1, target.lanes if target.name in matvec.GATHERING else 1}:
        parts = packed(weight, bias, lanes, 1)
        assert len(parts[0].bounds) > 3
        for threads in (1, 2, 3):
            assert np.array_equal(product(target, parts, x, 501, threads), one)
        alone = [product(target, parts, x[i : i + 1], 501)[0] for i in range(3)]
        assert np.array_equal(np.stack(alone), one)


def test_processors_that_fuse_agree_to_the_bit() -> None:
    fusing = [target for target in TARGETS if target.name in ("avx512", "avx2")]
    weight, bias, x = sparse(10, 100, 300, 0.3), normal(11, 100), normal(12, 1, 300)
    found = [product(target, packed(weight, bias, target.lanes, 1), x, 100) for target in fusing]
    assert all(np.array_equal(found[0], other) for other in found)


@pytest.mark.parametrize(("target", "lanes", "rows"), WAYS)
def test_a_zero_weight_skips_its_x(target: Target, lanes: int, rows: int) -> None:
    out, width = 48, 61
    weight, bias = sparse(13, out, width, 0.3, rows), normal(14, out)
    weight[:16] = 0
    weight[:, [0, 5, 60]] = 0
    x = normal(15, 1, width)
    plain = product(target, packed(weight, bias, lanes, rows), x, out)
    x[0, [0, 5, 60]] = [np.inf, -np.inf, np.nan]
    assert np.array_equal(product(target, packed(weight, bias, lanes, rows), x, out), plain)
    assert np.array_equal(plain[0, :16], bias[:16])


@pytest.mark.parametrize(("target", "lanes"), [(target, lanes) for target, lanes, rows in WAYS if rows == 1])
def test_what_is_not_finite_reaches_its_own_rows_only(target: Target, lanes: int) -> None:
    out, width = 40, 33
    weight, bias, x = sparse(16, out, width, 0.3), normal(17, out), normal(18, 1, width)
    for place, value in ((4, np.inf), (9, np.nan)):
        bad = x.copy()
        bad[0, place] = value
        y = product(target, packed(weight, bias, lanes, 1), bad, out)[0]
        reached = weight[:, place] != 0
        assert reached.any()
        assert not reached.all()
        expected = np.sign(weight[reached, place]) * value
        assert np.array_equal(y[reached], expected.astype(np.float32), equal_nan=True)
        assert np.isfinite(y[~reached]).all()
    weight[7, 3] = np.nan
    assert np.isnan(product(target, packed(weight, bias, lanes, 1), x, out)[0, 7])


@pytest.mark.parametrize(("target", "lanes", "rows"), [way for way in WAYS if way[2] in (1, 4)])
def test_indices_take_32_bits_where_they_need_to(target: Target, lanes: int, rows: int) -> None:
    for width, size in ((2**16, 2), (2**16 + 1, 4)):
        weight = np.zeros((16, width), np.float32)
        weight[:, [0, 1, 40000, width - 1]] = normal(19, 16, 4)
        bias, x = normal(20, 16), normal(21, 1, width)
        parts = packed(weight, bias, lanes, rows)
        assert parts[0].indices.itemsize == size
        assert np.array_equal(dense(parts, weight.shape), weight)
        assert_close(product(target, parts, x, 16), weight, bias, x)


@pytest.mark.parametrize(("target", "lanes", "rows"), [way for way in WAYS if way[2] in (1, 4)])
def test_sums_are_added_to_what_stands_in_y(target: Target, lanes: int, rows: int) -> None:
    weight, y, x = sparse(22, 44, 30, 0.3, rows), normal(23, 2, 44), normal(24, 2, 30)
    for kind in PRECISIONS:
        parts = packed(weight, normal(25, 44), lanes, rows, kind, onto=True)
        found = product(target, parts, x, 44, y=y)
        stands = dense(parts, weight.shape)
        for one in range(2):
            assert_close(found[one : one + 1], stands, y[one], x[one : one + 1])


@pytest.mark.parametrize(("target", "lanes", "rows"), [way for way in WAYS if way[2] in (1, 4)])
def test_what_follows_the_sum_is_applied(target: Target, lanes: int, rows: int) -> None:
    weight, bias, x = sparse(26, 36, 50, 0.4, rows), normal(27, 36), normal(28, 2, 50)
    plain = product(target, packed(weight, bias, lanes, rows), x, 36)
    limits = np.array([-0.5, 2.0], np.float32)
    found = product(target, packed(weight, bias, lanes, rows), x, 36, act="clamp", limits=limits.ctypes.data)
    assert np.array_equal(found, np.clip(plain, -0.5, 2.0))


@pytest.mark.parametrize(("target", "lanes", "rows"), [way for way in WAYS if way[2] in (1, 4)])
def test_the_order_of_summation_is_as_stated(target: Target, lanes: int, rows: int) -> None:
    weight = sparse(36, 48, 60, 0.4, rows) * np.float32(10) ** draws(37).integers(-4, 5, (48, 60)).astype(np.float32)
    bias, ones = normal(38, 48), np.ones((1, 60), np.float32)
    expected = []
    for row, added in zip(weight, bias, strict=True):
        sums = np.zeros(4, np.float32)
        for k, value in enumerate(row[row != 0]):  # times 1, so that it is of no matter whether sums are fused
            sums[k % 4] += value
        expected.append((sums[0] + sums[1]) + (sums[2] + sums[3]) + added)
    assert np.array_equal(product(target, packed(weight, bias, lanes, rows), ones, 48)[0], np.array(expected))


def test_columns_may_lie_apart() -> None:
    target, weight, bias = TARGETS[0], sparse(29, 20, 15, 0.5), normal(30, 20)
    wide = normal(31, 3, 40)
    x = wide[:, 4:19]
    assert_close(product(target, packed(weight, bias, 1, 1), x, 20), weight, bias, x)


def test_slices_survive_pickling_on_a_cache_line() -> None:
    weight, bias, x = sparse(32, 100, 80, 0.3), normal(33, 100), normal(34, 1, 80)
    parts = packed(weight, bias, TARGETS[0].lanes if TARGETS[0].name in matvec.GATHERING else 1, 1)
    back = pickle.loads(pickle.dumps(parts))
    for part in (*parts, *back):
        assert part.values.ctypes.data % 64 == part.indices.ctypes.data % 64 == 0
    assert np.array_equal(product(TARGETS[0], back, x, 100), product(TARGETS[0], parts, x, 100))
    assert back[0].nbytes == parts[0].nbytes


def test_rows_of_a_slice_have_about_as_many_entries() -> None:
    weight = np.where(np.arange(64) < draws(35).integers(0, 65, (640, 1)), 1, 0).astype(np.float32)
    (part,) = packed(weight, np.zeros(640, np.float32), 16, 1)
    assert part.multiplies <= 1.1 * np.count_nonzero(weight)
    assert (np.diff(part.counts.reshape(-1)) <= 0).all()
