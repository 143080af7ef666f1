from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openwork.runtime.kernels import arrange, spmm
from openwork.runtime.kernels.activations import Act
from openwork.runtime.kernels.launch import Call
from openwork.runtime.kernels.target import Target
from tests.runtime.kernels.sparse_tools import GUARD, TARGETS, assert_close, normal, run, sparse

ids = [target.name for target in TARGETS]


class Case:
    """A product whose x and y lie in memory with guards around every row."""

    def __init__(self, target: Target, weight: Any, x: Any, block: int = 1) -> None:
        self.target, self.weight, self.block = target, weight, block
        self.images, self.width, self.columns = x.shape
        self.bias = normal(9, len(weight))
        self.pitch = -(-self.columns // 16) * 16 + 16
        self.x = np.full((self.images, self.width, self.pitch), np.nan, np.float32)
        self.x[:, :, : self.columns] = x
        self.y = np.full((self.images, len(weight), self.pitch), GUARD, np.float32)
        self.keep: list[Any] = []

    def calls(
        self, vectors: int, part: int, chunks: int = 1, *, act: Act = "none", limits: Any = None, added: Any = None,
        kept: Any = None, rooms: int = 0,
    ) -> list[Call]:  # fmt: skip
        wide = 4 * vectors * self.target.lanes
        rows = np.arange(self.width)
        offsets = rows % part * wide if rooms else rows * 4 * self.pitch
        cut = arrange.sections(self.weight, self.block)
        arranged = [arrange.arrange(section, offsets, part, chunks) for section in cut]
        self.keep += [arranged, limits, added, kept]
        found: list[Call] = []
        step = 4 * self.pitch
        for section, one in zip(cut, arranged, strict=True):
            x = spmm.Matrix(self.x.ctypes.data, step * self.width, step)
            y = spmm.Matrix(self.y.ctypes.data + section.first * step, step * len(self.weight), step)
            plus = None if added is None else spmm.Matrix(added.ctypes.data + section.first * step, y.image, step)
            found += spmm.calls(
                self.target, one, x, y, vectors=vectors, columns=self.columns, images=self.images, act=act, added=plus,
                bias=self.bias.ctypes.data + 4 * section.first, limits=0 if limits is None else limits.ctypes.data,
                kept=0 if kept is None else kept.ctypes.data, staged=self._rooms(rooms, one, vectors, part),
            )  # fmt: skip
        return found

    def _rooms(self, count: int, weights: arrange.Arranged, vectors: int, part: int) -> spmm.Rooms | None:
        if not count:
            return None
        size = spmm.room_bytes(self.target, weights, vectors, part)
        memory = np.full(size * count // 8 + 16, 2**count - 1, np.int64)
        start = memory.ctypes.data + -memory.ctypes.data % 64
        self.keep.append(memory)
        return spmm.Rooms(start + 64, size, start, self.width, part)

    def run(self, *way: Any, threads: int = 1, **after: Any) -> Any:
        self.y.fill(GUARD)
        run(self.calls(*way, **after), self.target, threads)
        return self.y[:, :, : self.columns].copy()


@pytest.mark.parametrize("target", TARGETS, ids=ids)
@given(
    out=st.integers(1, 40),
    width=st.integers(1, 50),
    columns=st.integers(1, 140),
    images=st.integers(0, 2),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    block=st.sampled_from([1, 2, 4, 8, 16]),
    vectors=st.integers(1, 8),
    part=st.integers(1, 60),
    chunks=st.integers(1, 5),
    rooms=st.integers(0, 2),
)
@settings(max_examples=35, deadline=None)
def test_products_and_nothing_beyond(
    target: Target, out: int, width: int, columns: int, images: int, density: float, block: int, vectors: int, part: int,
    chunks: int, rooms: int,
) -> None:  # fmt: skip
    case = Case(target, sparse(0, out, width, density, 2), normal(1, images, width, columns), block)
    y = case.run(vectors, part, chunks, rooms=rooms, threads=2)
    for x, found in zip(case.x, y, strict=True):
        assert_close(found.T, case.weight, case.bias, x[:, :columns].T)
    assert (case.y[:, :, columns:] == GUARD).all()


@pytest.mark.parametrize("target", TARGETS, ids=ids)
@pytest.mark.parametrize("block", [1, 2, 4])
def test_one_order_of_summation(target: Target, block: int) -> None:
    case = Case(target, sparse(2, 29, 90, 0.3, block), normal(3, 2, 90, 70), block)
    expected = case.run(1, 90)
    for vectors, part, chunks, rooms in itertools.product((1, 2, 5), (1, 16, 89), (1, 4), (0, 2)):
        assert np.array_equal(case.run(vectors, part, chunks, rooms=rooms, threads=1 + vectors % 3), expected)


@pytest.mark.parametrize("target", TARGETS, ids=ids)
@pytest.mark.parametrize(("columns", "vectors"), [(5, 1), (48, 2), (70, 3)])
@pytest.mark.parametrize("rooms", [0, 1])
def test_what_follows_the_sum(target: Target, columns: int, vectors: int, rooms: int) -> None:
    case = Case(target, sparse(4, 11, 20, 0.5), normal(5, 2, 20, columns), 2)
    plain = case.run(vectors, 7, rooms=rooms)
    limits = np.array([-0.25, 1.5], np.float32)
    added = np.full_like(case.y, np.nan)
    added[:, :, :columns] = normal(6, *plain.shape)
    more = added[:, :, :columns]
    low, high = limits
    assert np.array_equal(case.run(vectors, 7, rooms=rooms, act="clamp", limits=limits), plain.clip(low, high))
    assert np.array_equal(case.run(vectors, 7, 2, rooms=rooms, added=added), plain + more)
    both = case.run(vectors, 20, rooms=rooms, added=added, act="clamp", limits=limits)
    assert np.array_equal(both, (plain + more).clip(low, high))


@pytest.mark.parametrize("target", TARGETS, ids=ids)
def test_curves_may_follow_the_sum(target: Target) -> None:
    case = Case(target, sparse(4, 11, 20, 0.5), normal(5, 2, 20, 37), 2)
    plain = case.run(1, 7).astype(np.float64)
    silu = case.run(1, 7, act="silu").astype(np.float64)
    assert np.allclose(silu, plain / (1 + np.exp(-plain)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("target", TARGETS, ids=ids)
@pytest.mark.parametrize("columns", [16, 33, 64, 100])
def test_gaps_of_planes_become_zero(target: Target, columns: int) -> None:
    case = Case(target, sparse(7, 9, 15, 0.5), normal(8, 1, 15, columns))
    case.x[:] = np.nan_to_num(case.x)  # planes have room for whole vectors, of zeros
    whole = -(-columns // 16) * 16
    kept = np.zeros(whole, np.int32)
    kept[:columns] = np.arange(columns) % 5 != 3
    plain = case.run(2, 9)
    for vectors in (1, 3, 4):
        found = case.run(vectors, 9, kept=kept, act="clamp", limits=np.array([0.5, 2], np.float32))
        assert np.array_equal(found, np.where(kept[:columns], plain.clip(0.5, 2), 0))
        tail = case.y[:, :, columns : -(-columns // target.lanes) * target.lanes]
        assert (tail == 0).all()
        assert (case.y[:, :, -(-columns // target.lanes) * target.lanes :] == GUARD).all()


@pytest.mark.parametrize("target", TARGETS, ids=ids)
@pytest.mark.parametrize("rooms", [0, 1])
def test_a_zero_weight_skips_its_row_and_a_stored_zero_does_not(target: Target, rooms: int) -> None:
    weight = np.zeros((4, 5), np.float32)
    weight[0, 1] = weight[3, 2] = 1
    x = np.ones((1, 5, 40), np.float32)
    x[0, 0], x[0, 1, 3], x[0, 2, 30] = np.inf, np.nan, np.inf
    single = Case(target, weight, x).run(2, 2, rooms=rooms)[0]
    assert sorted(zip(*np.nonzero(~np.isfinite(single)), strict=True)) == [(0, 3), (3, 30)]
    group = Case(target, weight, x, 4).run(2, 5, rooms=rooms)[0]
    bad = {(int(r), int(c)) for r, c in zip(*np.nonzero(np.isnan(group)), strict=True)}
    assert bad == {(r, 3) for r in range(4)} | {(r, 30) for r in range(3)}
    assert group[3, 30] == np.inf


@pytest.mark.parametrize("target", TARGETS, ids=ids)
def test_tiles_may_lie_anywhere(target: Target) -> None:
    """x and y in panels: the tile is the outer of three dimensions."""
    wide, tiles = 2 * target.lanes, 3
    weight, x = sparse(10, 12, 20, 0.4), normal(11, tiles, 20, wide)
    y, bias = np.full((tiles, 12, wide), GUARD, np.float32), normal(12, 12)
    (section,) = arrange.sections(weight, 1)
    one = arrange.arrange(section, np.arange(20) * 4 * wide, 8, 2)
    made = spmm.calls(
        target, one, spmm.Matrix(x.ctypes.data, 0, 0, 80 * wide), spmm.Matrix(y.ctypes.data, 0, 4 * wide, 48 * wide),
        vectors=2, columns=tiles * wide, bias=bias.ctypes.data,
    )  # fmt: skip
    run(made, target, 2)
    for tile in range(tiles):
        assert_close(y[tile].T, weight, bias, x[tile].T)


@pytest.mark.parametrize("target", TARGETS, ids=ids)
def test_more_threads_than_rooms_wait_for_one(target: Target) -> None:
    case = Case(target, sparse(13, 40, 64, 0.3), normal(14, 3, 64, 100))
    expected = case.run(1, 64)
    for _ in range(20):
        assert np.array_equal(case.run(1, 16, 8, rooms=1, threads=4), expected)
