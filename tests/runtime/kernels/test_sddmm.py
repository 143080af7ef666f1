from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from openwork.core.rng import generator
from openwork.runtime.bounds import bound
from openwork.runtime.kernels import sddmm
from openwork.runtime.kernels.target import Target
from tests.runtime.kernels.planes_tools import TARGETS, bits, run
from tests.strategies import densities, quick, seeds, tensor

pytestmark = pytest.mark.skipif(not TARGETS, reason="no LLVM on this machine")
BLOCKS = (1, 2, 4)
GUARD = 8

everywhere = pytest.mark.parametrize("target", TARGETS, ids=lambda one: one.name)
sizes = {
    "block": st.sampled_from(BLOCKS), "groups": st.integers(1, 9), "width": st.integers(1, 20),
    "columns": st.sampled_from([1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 33, 64, 127, 128, 129, 130, 257, 300]),
}  # fmt: skip


def gradient(
    target: Target, mask: Tensor, block: int, x: Tensor, y: Tensor, *, part: int = 1000, chunks: int = 1, threads: int = 1,
    summed: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the values (entries, block) and the sums (groups * block), with guards around both checked."""
    starts = np.concatenate(([0], np.cumsum(mask.sum(1).numpy())))
    columns = mask.nonzero()[:, 1].int().numpy()
    entries = sddmm.cut(block, columns, starts, mask.shape[1], part, chunks)
    values, sums = (torch.full((count + 2 * GUARD,), float("nan")) for count in (len(columns) * block, len(y)))
    calls = sddmm.calls(
        target, entries, x.data_ptr(), y.data_ptr(), x_row=4 * x.stride(0), y_row=4 * y.stride(0), width=x.shape[1],
        values=values.data_ptr() + 4 * GUARD, sums=sums.data_ptr() + 4 * GUARD if summed else 0,
    )  # fmt: skip
    run(calls, target, threads)
    for one in (values, sums):
        assert torch.isnan(one[:GUARD]).all()
        assert torch.isnan(one[-GUARD:]).all()
    return values[GUARD:-GUARD].reshape(-1, block), sums[GUARD:-GUARD]


def matrix(rows: int, columns: int, seed: int, pad: int) -> Tensor:
    """Rows of `columns` numbers with NaN between them, which nothing may read into a result."""
    memory = torch.full((rows, columns + pad), float("nan"))
    memory[:, :columns] = tensor(torch.Size((rows, columns)), seed, torch.float32)
    return memory[:, :columns]


def case(block: int, groups: int, width: int, columns: int, density: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    mask = torch.rand(groups, width, generator=generator(seed, "sddmm")) < density
    return mask, matrix(width, columns, seed, seed % 3), matrix(groups * block, columns, seed + 1, seed % 5)


@everywhere
@given(**sizes, density=densities, seed=seeds, part=st.integers(1, 25), chunks=st.integers(1, 4))
@quick
def test_it_is_the_gradient_at_the_entries(
    target: Target, block: int, groups: int, width: int, columns: int, density: float, seed: int, part: int, chunks: int
) -> None:
    mask, x, y = case(block, groups, width, columns, density, seed)
    values, sums = gradient(target, mask, block, x, y, part=part, chunks=chunks)
    group, column = mask.nonzero(as_tuple=True)
    exact = (y.double() @ x.double().t()).reshape(groups, block, width)
    allowed = bound(y, None, x).t().reshape(groups, block, width)
    assert ((values - exact[group, :, column]).abs() <= allowed[group, :, column]).all()
    kind = torch.finfo(torch.float32)
    total = y.double().sum(dim=1)
    assert ((sums - total).abs() <= columns * (kind.eps * y.abs().double().sum(dim=1) + kind.tiny)).all()


@everywhere
@given(**sizes, density=densities, seed=seeds, part=st.integers(1, 25), chunks=st.integers(2, 12))
@quick
def test_every_bit_is_the_same_for_all_parts_chunks_and_threads(
    target: Target, block: int, groups: int, width: int, columns: int, density: float, seed: int, part: int, chunks: int
) -> None:
    mask, x, y = case(block, groups, width, columns, density, seed)
    values, sums = gradient(target, mask, block, x, y)
    for threads in (1, 2, 3):
        again = gradient(target, mask, block, x, y, part=part, chunks=chunks, threads=threads)
        assert bits(again[0]) == bits(values)
        assert bits(again[1]) == bits(sums)


@everywhere
@pytest.mark.parametrize("block", BLOCKS)
def test_without_sums_the_values_are_the_same_and_nothing_else_is_written(target: Target, block: int) -> None:
    mask, x, y = case(block, 5, 11, 37, 0.4, 3)
    values, sums = gradient(target, mask, block, x, y, summed=False)
    assert torch.isnan(sums).all()
    assert bits(values) == bits(gradient(target, mask, block, x, y)[0])


@everywhere
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("column", [0, 129])
def test_what_is_not_finite_reaches_the_entries_that_multiply_it_only(target: Target, bad: float, column: int) -> None:
    mask, x, y = case(2, 6, 9, 130, 0.6, 8)
    x[4, column] = bad
    values, sums = gradient(target, mask, 2, x, y)
    hit = mask.nonzero()[:, 1] == 4
    assert hit.any()
    assert not torch.isfinite(values[hit]).any()
    assert torch.isfinite(values[~hit]).all()
    assert torch.isfinite(sums).all()
    mask, x, y = case(2, 6, 9, 130, 0.6, 8)
    y[5, column] = bad
    values, sums = gradient(target, mask, 2, x, y)
    hit = mask.nonzero()[:, 0] == 2
    assert torch.equal(~torch.isfinite(values), torch.stack((torch.zeros_like(hit), hit), dim=1))
    assert torch.isfinite(sums).logical_not().nonzero().tolist() == [[5]]


@given(counts=st.lists(st.integers(0, 9), min_size=1, max_size=12), chunks=st.integers(1, 15))
@quick
def test_chunks_cover_all_groups_once(counts: list[int], chunks: int) -> None:
    found = sddmm.split(np.concatenate(([0], np.cumsum(counts))), chunks)
    assert (found[0], found[-1], len(found)) == (0, len(counts), chunks + 1)
    assert (np.diff(found) >= 0).all()


@given(seed=seeds, width=st.integers(1, 20), part=st.integers(1, 22), density=densities)
@quick
def test_cuts_put_every_entry_into_the_part_of_its_column(seed: int, width: int, part: int, density: float) -> None:
    mask = torch.rand(4, width, generator=generator(seed, "cuts")) < density
    starts = np.concatenate(([0], np.cumsum(mask.sum(1).numpy())))
    columns = mask.nonzero()[:, 1].int().numpy()
    entries = sddmm.cut(1, columns, starts, width, part, 1)
    for number in range(len(entries.cuts) - 1):
        for group in range(4):
            inside = columns[entries.cuts[number, group] : entries.cuts[number + 1, group]]
            assert (inside // part == number).all()
    assert (entries.cuts[0] == starts[:-1]).all()
    assert (entries.cuts[-1] == starts[1:]).all()
