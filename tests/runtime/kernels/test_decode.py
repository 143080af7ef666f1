from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from openwork.core.rng import generator
from openwork.runtime.kernels import decode as kernel
from openwork.runtime.kernels.launch import Program
from openwork.runtime.kernels.target import Target, targets

pytestmark = pytest.mark.skipif(not targets(), reason="no LLVM on this machine")
TARGETS = list(targets().values())
EPS, TINY = torch.finfo(torch.float32).eps, torch.finfo(torch.float32).tiny
COLUMNS = st.sampled_from([1, 3, 4, 15, 16, 17, 33, 70])
each_target = pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)


def address(tensor: Tensor) -> int:
    return int(tensor.data_ptr())


def sums(
    target: Target, values: Tensor, indices: Tensor, matrix: Tensor, bias: Tensor, *, run: int = 2, across: int = 1,
    vectors: int | None = None, threads: int = 1, joined: bool = True, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the kernel's sums for codes (rows, entries)."""
    rows, entries = values.shape
    starts = np.arange(rows + 1, dtype=np.int64) * entries
    out = torch.empty(rows, matrix.shape[1]) if out is None else out
    listed = kernel.Entries(
        starts.ctypes.data, starts.ctypes.data + 8, address(indices), address(values),
        "i64" if indices.dtype == torch.int64 else "i32", rows * entries if joined else 0,
    )  # fmt: skip
    kind: kernel.Kind = "f32" if matrix.dtype == torch.float32 else "bf16"
    held = kernel.Rows(address(matrix), matrix.stride(0) * matrix.element_size(), matrix.shape[1], kind)
    calls = kernel.sums(
        target, listed, held, address(bias), address(out), 4 * out.stride(0), rows, run=run, across=across, vectors=vectors
    )  # fmt: skip
    Program([calls], target).run(threads)
    return out


def dots(target: Target, vectors: Tensor, indices: Tensor, matrix: Tensor, threads: int = 1) -> Tensor:
    rows, entries = indices.shape
    found = torch.full((rows, entries), torch.nan)
    kind: kernel.Kind = "f32" if matrix.dtype == torch.float32 else "bf16"
    held = kernel.Rows(address(matrix), matrix.stride(0) * matrix.element_size(), matrix.shape[1], kind)
    index: kernel.Index = "i64" if indices.dtype == torch.int64 else "i32"
    calls = kernel.dots(
        target, address(indices), address(found), held, address(vectors), 4 * vectors.stride(0), rows, entries, index
    )  # fmt: skip
    Program([calls], target).run(threads)
    return found


def drawn(seed: int, rows: int, entries: int, columns: int, atoms: int, halved: bool = False) -> tuple[Tensor, ...]:
    draw = generator(seed, "decode", rows, entries, columns, atoms)
    values = torch.randn(rows, entries, generator=draw)
    indices = torch.randint(atoms, (rows, entries), generator=draw)
    matrix, bias = torch.randn(atoms, columns, generator=draw), torch.randn(columns, generator=draw)
    return values, indices, matrix.bfloat16() if halved else matrix, bias


def exact(values: Tensor, indices: Tensor, matrix: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums in float64 and the error allowed: (k + 1) eps (sum |v||M| + |b|)."""
    rows = matrix.double()[indices]
    found = (values.double()[..., None] * rows).sum(1) + bias.double()
    size = (values.double().abs()[..., None] * rows.abs()).sum(1) + bias.double().abs()
    return found, (values.shape[1] + 1) * (EPS * size + TINY)


@each_target
@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 5), st.integers(0, 9), COLUMNS, st.integers(1, 12), st.booleans(), st.booleans(), st.integers(0, 2**31)
)
def test_sums_are_within_the_bound(
    target: Target, rows: int, entries: int, columns: int, atoms: int, halved: bool, short: bool, seed: int
) -> None:
    values, indices, matrix, bias = drawn(seed, rows, entries, columns, atoms, halved)
    found = sums(target, values, indices.int() if short else indices, matrix, bias)
    expected, allowed = exact(values, indices, matrix, bias)
    assert bool(((found.double() - expected).abs() <= allowed).all())


@each_target
def test_whole_numbers_are_exact(target: Target) -> None:
    draw = generator(1, "whole")
    values = torch.randint(-4, 5, (7, 11), generator=draw).float()
    indices = torch.randint(50, (7, 11), generator=draw)
    matrix, bias = (torch.randint(-9, 10, size, generator=draw).float() for size in ((50, 37), (37,)))
    codes = torch.zeros(7, 50, dtype=torch.long).scatter_add_(1, indices, values.long())
    expected = codes @ matrix.long() + bias.long()
    assert torch.equal(sums(target, values, indices, matrix, bias).long(), expected)
    assert torch.equal(sums(target, values, indices, matrix.bfloat16(), bias).long(), expected)


@each_target
@pytest.mark.parametrize("halved", [False, True], ids=["f32", "bf16"])
def test_no_bit_depends_on_tiles_runs_and_threads(target: Target, halved: bool) -> None:
    values, indices, matrix, bias = drawn(2, 13, 9, 70, 40, halved)
    expected = sums(target, values, indices, matrix, bias)
    for vectors in (1, 2, 3, 5):
        for run, across, threads in ((1, 1, 1), (4, 100, 2), (100, 2, 3)):
            settings = {"vectors": vectors, "run": run, "across": across, "threads": threads}
            found = sums(target, values, indices, matrix, bias, joined=threads < 3, **settings)  # type: ignore[arg-type]
            assert torch.equal(found.view(torch.int32), expected.view(torch.int32)), settings


@each_target
def test_no_bit_depends_on_parts(target: Target) -> None:
    values, _, matrix, bias = drawn(3, 6, 40, 19, 40)
    indices = torch.arange(40).repeat(6, 1)
    expected = sums(target, values, indices, matrix, bias)
    for parts in (2, 5):
        edges = np.arange(6)[None] * 40 + np.arange(parts + 1)[:, None] * (40 // parts)
        begins, ends = (np.ascontiguousarray(part, np.int64) for part in (edges[:-1], edges[1:]))
        listed = kernel.Entries(
            begins.ctypes.data, ends.ctypes.data, address(indices), address(values), parts=parts
        )  # fmt: skip
        out, held = torch.full((6, 19), torch.nan), kernel.Rows(address(matrix), 4 * 19, 19)
        calls = kernel.sums(target, listed, held, address(bias), address(out), 4 * 19, 6, run=4)
        Program([calls], target).run(2)
        assert torch.equal(out.view(torch.int32), expected.view(torch.int32))


@each_target
def test_rows_of_uneven_length_and_strides(target: Target) -> None:
    draw = generator(4, "uneven")
    counts = torch.tensor([0, 3, 1, 0, 7])
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    values, indices = torch.randn(11, generator=draw), torch.randint(9, (11,), generator=draw)
    matrix = torch.randn(9, 50, generator=draw)[:, 5:26]
    bias, out = torch.randn(21, generator=draw), torch.full((5, 30), 7.0)
    listed = kernel.Entries(address(starts), address(starts) + 8, address(indices), address(values), total=11)
    held = kernel.Rows(address(matrix), 4 * 50, 21)
    calls = kernel.sums(target, listed, held, address(bias), address(out), 4 * 30, 5, run=2)
    Program([calls], target).run(1)
    for row, (begin, end) in enumerate(itertools.pairwise(starts.tolist())):
        expected, allowed = exact(values[None, begin:end], indices[None, begin:end], matrix, bias)
        assert bool(((out[row, :21].double() - expected[0]).abs() <= allowed[0]).all())
    assert bool((out[:, 21:] == 7).all())


@each_target
def test_nan_and_infinity_reach_those_that_name_them(target: Target) -> None:
    values, indices, matrix, bias = drawn(5, 8, 3, 21, 10)
    matrix[4], matrix[5, 20], indices[indices == 4], indices[indices == 5] = torch.nan, torch.inf, 0, 0
    indices[2, 1], values[2, 1] = 4, 0.0
    indices[6, 0], values[6, 0] = 5, -2.0
    found = sums(target, values, indices, matrix, bias)
    clean = torch.tensor([0, 1, 3, 4, 5, 7])
    assert bool(found[2].isnan().all())
    assert found[6, 20] == -torch.inf
    assert bool(found[6, :20].isfinite().all())
    assert bool(found[clean].isfinite().all())
    values[0, 0] = torch.nan
    assert bool(sums(target, values, indices, matrix, bias)[0].isnan().all())


@each_target
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 4), st.integers(0, 10), COLUMNS, st.integers(1, 12), st.booleans(), st.integers(0, 2**31))
def test_dots_are_within_the_bound(
    target: Target, rows: int, entries: int, columns: int, atoms: int, halved: bool, seed: int
) -> None:
    _, indices, matrix, _ = drawn(seed, rows, entries, columns, atoms, halved)
    vectors = torch.randn(rows, columns, generator=generator(seed, "vectors"))
    terms = vectors.double()[:, None] * matrix.double()[indices]
    allowed = (columns + 1) * (EPS * terms.abs().sum(-1) + TINY)
    assert bool(((dots(target, vectors, indices, matrix).double() - terms.sum(-1)).abs() <= allowed).all())
    assert torch.equal(dots(target, vectors, indices.int(), matrix), dots(target, vectors, indices, matrix))


@each_target
def test_no_bit_of_a_dot_depends_on_its_neighbours_or_threads(target: Target) -> None:
    _, indices, matrix, _ = drawn(6, 9, 7, 70, 30)
    vectors = torch.randn(9, 70, generator=generator(6, "vectors"))
    expected = dots(target, vectors, indices, matrix)
    for threads in (2, 3):
        assert torch.equal(dots(target, vectors, indices, matrix, threads), expected)
    alone = torch.cat([dots(target, vectors, indices[:, [j]].contiguous(), matrix) for j in range(7)], dim=1)
    assert torch.equal(alone, expected)
    vectors[3, 69] = torch.nan
    spoilt = dots(target, vectors, indices, matrix)
    assert spoilt.isnan().any(dim=1).tolist() == [row == 3 for row in range(9)]
    assert bool(spoilt[3].isnan().all())


@pytest.mark.parametrize("columns", [1, 16, 383, 384, 385, 768, 1000])
@each_target
def test_tiles_are_even_and_fit_the_registers(target: Target, columns: int) -> None:
    most = kernel.widest(target)
    vectors = kernel.even(columns, target, most)
    total = -(-columns // target.lanes)
    assert 1 <= vectors <= most < target.registers
    assert -(-total // vectors) == -(-total // most)
    assert vectors == 1 or -(-total // (vectors - 1)) > -(-total // vectors)
