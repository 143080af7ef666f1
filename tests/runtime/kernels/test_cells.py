from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from openwork.core.rng import generator
from openwork.runtime.kernels import cells
from openwork.runtime.kernels.launch import Program
from openwork.runtime.kernels.target import targets

pytestmark = pytest.mark.skipif(not targets(), reason="no LLVM on this machine")
EPS = torch.finfo(torch.float32).eps


def reference(cell: cells.Cell, hidden: Tensor, x: Tensor, c: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """c' and h' of gates (tiles, gates, count) in float64."""
    hidden, x, c, h = (one.double() for one in (hidden, x, c, h))
    if cell == "lstm":
        i, f, g, o = (hidden + x).unbind(1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return c, o.sigmoid() * c.tanh()
    r, z = (hidden + x)[:, :2].sigmoid().unbind(1)
    n = (x[:, 2] + r * hidden[:, 2]).tanh()
    return c, n + z * (h - n)


def run(cell: cells.Cell, name: str, threads: int, *parts: Tensor) -> tuple[Tensor, Tensor]:
    hidden, x, c, h = (part.clone() for part in parts)
    after = torch.full_like(h, torch.nan)
    places = [(one.data_ptr(), 4 * one.stride(0)) for one in (hidden, x, c, h, after)]
    target = targets()[name]
    made = cells.calls(target, cell, *places, gate=4 * hidden.stride(1), count=hidden.shape[2], tiles=len(hidden))
    Program([made], target).run(threads)
    return c, after


@pytest.mark.parametrize("name", targets())
@given(
    cell=st.sampled_from(["lstm", "gru"]),
    tiles=st.integers(0, 3),
    count=st.one_of(st.integers(1, 70), st.integers(2000, 2100)),
    size=st.sampled_from([0.0, 1.0, 30.0]),
)
@settings(max_examples=30, deadline=None)
def test_cells_are_those_of_the_equations(name: str, cell: cells.Cell, tiles: int, count: int, size: float) -> None:
    draw = generator(0, "cells", tiles, count)
    gates = [size * torch.randn(tiles, cells.GATES[cell], count, generator=draw) for _ in range(2)]
    states = [torch.randn(tiles, count, generator=draw) for _ in range(2)]
    c, h = run(cell, name, 1, *gates, *states)
    exact_c, exact_h = reference(cell, *gates, *states)
    allowed = 40 * EPS * (1 + size) * (1 + states[0].abs() + states[1].abs())  # the sums of two gates are rounded too
    assert bool(((h - exact_h).abs() <= allowed).all())
    assert bool(((c - exact_c).abs() <= allowed).all())
    for threads in (2, 3):
        again = run(cell, name, threads, *gates, *states)
        assert torch.equal(again[0], c)
        assert torch.equal(again[1], h)


@pytest.mark.parametrize("name", targets())
@pytest.mark.parametrize("cell", cells.GATES)
def test_not_a_number_stays_in_its_place(name: str, cell: cells.Cell) -> None:
    for gate in range(cells.GATES[cell]):
        hidden, x = (torch.ones(1, cells.GATES[cell], 37) for _ in range(2))
        hidden[0, gate, 20] = torch.nan
        _, h = run(cell, name, 1, hidden, x, torch.ones(1, 37), torch.ones(1, 37))
        assert h.isnan().nonzero().tolist() == [[0, 20]]
