from __future__ import annotations

import mmap
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openwork.runtime.kernels import few, matvec
from openwork.runtime.kernels.arrange import sections
from openwork.runtime.kernels.precision import PRECISIONS, Precision, scales
from openwork.runtime.kernels.target import Target
from tests.runtime.kernels import reaching
from tests.runtime.kernels.sparse_tools import NAMES, TARGETS, assert_close, draws, guarded, normal, run, sparse, untouched

pytestmark = pytest.mark.skipif(not TARGETS, reason="no LLVM on this machine")
TILES = [(target, columns) for target in TARGETS for columns in few.widths(target)]


def packed(weight: Any, bias: Any, target: Target, kind: Precision = "float32") -> matvec.Slices:
    scale = scales(np.abs(weight).max(axis=1, initial=0), kind)
    (section,) = sections(weight, 1)
    return matvec.pack(section, weight.shape[1], bias, scale, lanes=few.rows_at_once(target), kind=kind)


def product(target: Target, part: matvec.Slices, x: Any, threads: int = 1, **after: Any) -> Any:
    """x (tiles, in, columns) -> (tiles, out, columns)."""
    tiles, _, columns = x.shape
    y, room = guarded(tiles * part.height, columns)
    steps = {"tiles": tiles, "x_tile": x.strides[0], "y_tile": 4 * part.height * columns}
    run(few.calls(target, part, x.ctypes.data, y.ctypes.data, columns, **steps, **after), target, threads)
    assert untouched(room)
    return y.reshape(tiles, part.height, columns)


@given(
    st.sampled_from(TILES), st.integers(1, 70), st.integers(1, 90), st.sampled_from([0.0, 0.03, 0.2, 0.6, 1.0]),
    st.integers(1, 3), st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_products_are_within_the_bound(
    tile: tuple[Target, int], out: int, width: int, density: float, tiles: int, seed: int
) -> None:
    target, columns = tile
    weight, bias, x = sparse(seed, out, width, density), normal(seed + 1, out), normal(seed + 2, tiles, width, columns)
    y = product(target, packed(weight, bias, target), x)
    for one in range(tiles):
        assert_close(y[one].T, weight, bias, x[one].T)


@pytest.mark.parametrize(("target", "columns"), TILES)
@pytest.mark.parametrize("kind", PRECISIONS)
def test_narrow_weights_multiply_as_what_they_stand_for(target: Target, columns: int, kind: Precision) -> None:
    weight, bias, x = sparse(3, 50, 77, 0.3), normal(4, 50), normal(5, 1, 77, columns)
    part = packed(weight, bias, target, kind)
    stands = np.zeros_like(weight)
    matvec.unpack(part, stands)
    assert_close(product(target, part, x)[0].T, stands, bias, x[0].T)


@pytest.mark.parametrize("target", TARGETS, ids=NAMES)
def test_threads_and_widths_change_no_bit(target: Target) -> None:
    weight, bias, x = sparse(6, 501, 400, 0.2), normal(7, 501), normal(8, 1, 400, 16)
    part = packed(weight, bias, target)
    assert len(part.bounds) > 3
    found = {}
    for columns in few.widths(target):
        panels = np.ascontiguousarray(x[0].reshape(400, -1, columns).transpose(1, 0, 2))
        results = [product(target, part, panels, threads) for threads in (1, 2, 3)]
        assert all(np.array_equal(results[0], other) for other in results)
        found[columns] = results[0].transpose(1, 0, 2).reshape(501, 16)
    assert all(np.array_equal(found[4], other) for other in found.values())


@pytest.mark.parametrize(("target", "columns"), TILES)
def test_what_is_not_finite_reaches_its_own_rows_and_columns_only(target: Target, columns: int) -> None:
    weight, bias, x = sparse(9, 40, 33, 0.3), normal(10, 40), normal(11, 1, 33, columns)
    weight[:8] = 0
    part = packed(weight, bias, target)
    plain = product(target, part, x)[0]
    for place, value in ((4, np.inf), (9, np.nan)):
        bad = x.copy()
        bad[0, place, 1] = value
        y, reached = product(target, part, bad)[0], weight[:, place] != 0
        assert reached.any()
        expected = np.sign(weight[reached, place]) * value
        assert np.array_equal(y[reached, 1], expected.astype(np.float32), equal_nan=True)
        y[reached, 1] = plain[reached, 1]
        assert np.array_equal(y, plain)


@pytest.mark.parametrize("target", TARGETS, ids=NAMES)
def test_what_follows_the_sum_is_applied(target: Target) -> None:
    part, x = packed(sparse(12, 36, 50, 0.4), normal(13, 36), target), normal(14, 2, 50, 4)
    limits = np.array([-0.5, 2.0], np.float32)
    found = product(target, part, x, act="clamp", limits=limits.ctypes.data)
    assert np.array_equal(found, np.clip(product(target, part, x), -0.5, 2.0))


@pytest.mark.parametrize("target", TARGETS, ids=NAMES)
def test_indices_take_32_bits_where_they_need_to(target: Target) -> None:
    width = 2**16 + 1
    weight = np.zeros((9, width), np.float32)
    weight[:, [0, 40000, width - 1]] = normal(15, 9, 3)
    bias, x = normal(16, 9), normal(17, 1, width, 4)
    part = packed(weight, bias, target)
    assert part.indices.itemsize == 4
    assert_close(product(target, part, x)[0].T, weight, bias, x[0].T)


@pytest.mark.parametrize("target", TARGETS, ids=NAMES)
def test_rows_are_summed_in_the_order_of_their_entries(target: Target) -> None:
    weight = sparse(18, 30, 60, 0.4) * np.float32(10) ** draws(19).integers(-4, 5, (30, 60)).astype(np.float32)
    bias, ones = normal(20, 30), np.ones((1, 60, 4), np.float32)
    expected = [np.cumsum(row, dtype=np.float32)[-1] + added for row, added in zip(weight, bias, strict=True)]
    assert np.array_equal(product(target, packed(weight, bias, target), ones)[0], np.array(expected)[:, None].repeat(4, 1))


@pytest.mark.skipif(not hasattr(mmap, "PAGESIZE") or sys.platform == "win32", reason="pages are guarded by POSIX calls")
def test_no_product_reads_or_writes_beyond_its_memory() -> None:
    """Of `kernels.matvec`, `kernels.nm` and `kernels.few`, in a process of its own."""
    done = subprocess.run([sys.executable, "-m", reaching.__name__], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "nothing beyond\n"
