from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from openwork.core.rng import generator
from openwork.core.select import top_rows
from openwork.errors import ModelError
from openwork.runtime.kernels import topk as kernel
from openwork.runtime.kernels.launch import Program
from openwork.runtime.kernels.target import VARIABLE, Target, targets
from openwork.runtime.topk import topk

TARGETS = list(targets().values())
each_target = pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
KINDS = ("normal", "whole", "rising", "falling", "constant", "signed zeros", "special", "two bits apart")


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[*targets(), "none"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(VARIABLE, request.param)
    return str(request.param)


def drawn(kind: str, rows: int, columns: int, seed: int = 0) -> Tensor:
    draw = generator(seed, "topk", kind, rows, columns)
    x = torch.randn(rows, columns, generator=draw)
    if kind == "whole":
        return (2 * x).round()
    if kind in ("rising", "falling"):
        return x.sort(dim=1, descending=kind == "falling").values
    if kind == "constant":
        return torch.full_like(x, -3.5)
    if kind == "signed zeros":
        return torch.where(torch.rand(x.shape, generator=draw) < 0.4, torch.tensor(-0.0), x.clamp(min=0) * 0)
    if kind == "special":
        numbers = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38])
        return numbers[torch.randint(len(numbers), x.shape, generator=draw)]
    if kind == "two bits apart":
        return (1 + torch.randint(3, x.shape, generator=draw) * 2.0**-23).float()
    return x


def sorted_first(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    found = x.sort(dim=-1, descending=True, stable=True)
    return found.values[..., :k], found.indices[..., :k]


def same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    """Return whether values, bit by bit, and indices are the same."""
    words = [value.contiguous().view(torch.int32) for value in (found[0], expected[0])]
    return torch.equal(*words) and torch.equal(found[1], expected[1])


def run(target: Target, x: Tensor, k: int, *, ordered: bool = True, threads: int = 1) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    values, indices = torch.full((rows, k), torch.nan), torch.full((rows, k), -1)
    size = kernel.units(rows, columns, k) * kernel.need(columns, k)
    room = np.full(size + 128, 77, np.uint8)
    offset = -room.ctypes.data % 64
    start = room.ctypes.data + offset
    places = values.data_ptr(), indices.data_ptr(), start
    calls = kernel.calls(target, x.data_ptr(), 4 * x.stride(0), rows, columns, k, *places, ordered=ordered)
    Program([calls], target).run(threads)
    assert (room[offset + size :] == 77).all(), "written beyond the buffer"
    return values, indices


@each_target
@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), st.integers(1, 4), st.integers(1, 300), st.data())
def test_the_first_of_a_stable_sort(target: Target, kind: str, rows: int, columns: int, data: Any) -> None:
    k = data.draw(st.integers(1, min(columns, kernel.SORTED)))
    x = drawn(kind, rows, columns)
    expected = sorted_first(x, k)
    assert same(run(target, x, k), expected)
    _, by_column = run(target, x, k, ordered=False)
    assert torch.equal(by_column, expected[1].sort(dim=1).values)


@each_target
@pytest.mark.parametrize("kind", KINDS)
def test_long_rows_that_are_cut_many_times(target: Target, kind: str) -> None:
    x = drawn(kind, 2, 5003)
    for k in (1, 7, 64, 200):
        assert same(run(target, x, k), sorted_first(x, k)), k


@each_target
@pytest.mark.parametrize("k", [1, 40, 96, 97, 200])
def test_the_buffer_holds_what_comes_before_a_cut(target: Target, k: int) -> None:
    """The most that may be there: an unrolled step after one number less than the cut, then the end of the row."""
    for columns in range(max(k, k + 96 - 70), 2 * k + 96 + 140, 9):
        x = drawn("rising", 1, columns)
        assert same(run(target, x, k), sorted_first(x, k)), columns


@each_target
def test_rows_apart_and_threads(target: Target) -> None:
    wide = torch.full((37, 400), torch.inf)
    wide[:, 3:333] = drawn("normal", 37, 330)
    x = wide[:, 3:333]
    expected = sorted_first(x, 20)
    for threads in (1, 2, 3):
        assert same(run(target, x, 20, threads=threads), expected)


def test_units_leave_room_within_bounds() -> None:
    for rows, columns, k in ((1, 1, 1), (2048, 32768, 32), (2048, 32768, 16384), (10**6, 64, 64)):
        count = kernel.units(rows, columns, k)
        assert 1 <= count <= min(rows, 256)
        assert count <= 16 or count * kernel.need(columns, k) <= 2**24


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 3), max_size=2), st.integers(0, 40), st.booleans(), st.sampled_from(KINDS[:6]), st.data()
)  # fmt: skip
def test_any_shape(batch: list[int], columns: int, ordered: bool, kind: str, data: Any) -> None:
    k = data.draw(st.integers(0, columns))
    x = drawn(kind, int(np.prod(batch, dtype=int)), columns).reshape(*batch, columns)
    values, indices = topk(x, k, ordered=ordered)
    expected = sorted_first(x, k)
    if not ordered:
        places = expected[1].sort(dim=-1).values
        expected = x.gather(-1, places), places
    assert values.shape == indices.shape == (*batch, k)
    assert indices.dtype == torch.int64
    assert same((values, indices), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32])
def test_every_dtype_and_backend(dtype: torch.dtype, backend: str) -> None:
    x = (3 * drawn("normal", 6, 700)).to(dtype)
    for k in (5, 300, 700):
        values, indices = topk(x, k)
        expected = sorted_first(x, k)
        assert values.dtype == dtype
        assert torch.equal(values, expected[0])
        assert torch.equal(indices, expected[1])


def test_ties_go_to_the_lowest_index_as_in_the_house_rule(backend: str) -> None:
    x = drawn("whole", 5, 90)
    _, indices = topk(x, 13)
    assert torch.equal(torch.zeros_like(x, dtype=torch.bool).scatter_(1, indices, True), top_rows(x, 13))


def test_nan_counts_as_greatest_as_in_torch(backend: str) -> None:
    x = drawn("normal", 3, 50)
    x[1, 40], x[1, 7], x[2] = -torch.nan, torch.nan, torch.nan
    values, indices = topk(x, 4)
    assert torch.equal(values.isnan(), x.topk(4).values.isnan())
    assert indices[1, :2].tolist() == [7, 40]
    assert indices[2].tolist() == [0, 1, 2, 3]


def test_layouts(backend: str) -> None:
    x = drawn("normal", 24, 330)
    expected = topk(x, 9)
    for laid in (x.t().contiguous().t(), torch.stack((x, x), 2)[..., 1], x.reshape(2, 3, 4, 330)):
        found = topk(laid, 9)
        assert torch.equal(found[0].reshape(24, 9), expected[0])
        assert torch.equal(found[1].reshape(24, 9), expected[1])
    assert same(topk(x[:1].expand(5, 330), 9), topk(x[[0] * 5], 9))


def test_threads_do_not_change_a_thing() -> None:
    x = drawn("whole", 50, 700)
    expected = topk(x, 30, threads=1)
    assert all(same(topk(x, 30, threads=threads), expected) for threads in (2, 3))


def test_gradients_go_to_what_was_kept(backend: str) -> None:
    x = drawn("normal", 4, 60).requires_grad_()
    values, indices = topk(x, 5)
    weights = torch.arange(20.0).reshape(4, 5)
    (values * weights).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.zeros(4, 60).scatter_(1, indices, weights))
    with torch.no_grad():
        assert not topk(x, 5)[0].requires_grad


@pytest.mark.parametrize("k", [-1, 61, 2.0, True, None])
def test_a_count_that_makes_no_sense_is_refused(k: Any) -> None:
    with pytest.raises(ModelError, match=r"cannot keep .* of the last dimension of \(4, 60\)"):
        topk(torch.zeros(4, 60), k)


def test_a_number_has_no_rows() -> None:
    with pytest.raises(ModelError, match="cannot keep 0"):
        topk(torch.tensor(1.0), 0)
