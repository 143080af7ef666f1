"""Cells have exactly the zeros they say, ratios are against the best dense arm, and crossings are exact."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openwork.bench import operators
from openwork.bench.operators import Cell, crossover
from openwork.bench.results import Arm, Row
from openwork.bench.roofline import Limits, block_of


@pytest.mark.parametrize(("pattern", "block"), [("unstructured", 1), ("blocks of 2", 2), ("blocks of 4", 4)])
@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.95])
def test_a_cell_has_exactly_its_zeros(pattern, block, sparsity):
    weight, bias, x = operators.make(Cell(40, 50, 7, sparsity, pattern))
    assert int(torch.count_nonzero(weight)) == block * round((1.0 - sparsity) * 2000 / block)
    assert block_of(weight) == block
    assert (bias.shape, x.shape) == ((40,), (50, 7))
    assert torch.equal(weight, operators.make(Cell(40, 50, 7, sparsity, pattern))[0])


def test_every_combination_is_a_cell_of_its_own():
    found = operators.cells()
    assert len(found) == len(operators.SHAPES) * len(operators.SPARSITIES) * len(operators.PATTERNS)
    assert len({cell.key for cell in found}) == len(found)
    shapes = [cell.shape for cell in found]
    assert shapes == sorted(shapes, key=shapes.index)  # dense arms are prepared once a shape


def test_ratios_are_against_the_best_dense_arm():
    arms = {"a": Arm("ok", dense=True), "b": Arm("ok", dense=True), "c": Arm("ok"), "d": Arm("wrong", reason="no")}
    found = operators.row("cell", "operator", {}, 2, 1e-3, arms, {"a": 8e-3, "b": 4e-3, "c": 2e-3})
    assert found.key == "cell 2"
    assert {name: arm.ratio for name, arm in found.arms.items()} == {"a": 0.5, "b": 1.0, "c": 2.0, "d": None}
    assert found.arms["c"].share == 0.5
    assert found.arms["c"].ms == 2.0
    assert (found.dense_ms, found.least_ms) == (4.0, 1.0)
    assert Row.from_json(found.to_json()) == found


def test_a_cell_is_measured_with_every_arm_once():
    limits = Limits("avx2", 8, 1, 1e9, ((2**14, 1e9),), 1e9)
    said: list[str] = []
    held = operators.Held()
    cell = Cell(16, 16, 9, 0.75, "unstructured")
    with_all = operators.measure(cell, ["matmul", "scipy_csr", "openwork"], limits, seconds=0.01, held=held, say=said.append)
    assert said == ["matmul", "scipy_csr", "openwork", ""]
    assert set(held.calls) == {"matmul"}
    assert all(arm.status == "ok" and arm.ms > 0.0 for arm in with_all.arms.values())
    assert with_all.least_ms == pytest.approx(1e3 * 4 * 16 * 64 / 1e9)  # 64 non-zeros, 9 columns in two vectors of 8
    call = held.calls["matmul"]
    operators.measure(Cell(16, 16, 9, 0.5, "unstructured"), ["matmul"], None, seconds=0.01, held=held)
    assert held.calls["matmul"] is call  # dense does not depend on the zeros
    operators.measure(Cell(16, 16, 8, 0.5, "unstructured"), ["matmul"], None, seconds=0.01, held=held)
    assert held.calls["matmul"] is not call


def test_crossings_are_exact():
    assert crossover([(0.5, 0.5), (0.7, 1.5)]) == pytest.approx(0.6)
    assert crossover([(0.9, 3.0), (0.5, 0.8), (0.7, 1.2)]) == pytest.approx(0.6)  # in any order
    assert crossover([(0.5, 1.2), (0.7, 0.8), (0.9, 1.6)]) == pytest.approx(0.75)  # the last crossing counts
    assert crossover([(0.5, 1.0), (0.9, 2.0)]) == 0.5
    assert crossover([(0.5, 0.2), (0.9, 0.9)]) is None
    assert crossover([]) is None


@given(st.floats(0.2, 0.95), st.floats(0.5, 20.0))
def test_a_line_is_crossed_where_it_is_one(place, slope):
    line = [(x, 1.0 + slope * (x - place)) for x in (0.1, 0.3, 0.5, 0.7, 0.9, 0.99)]
    found = crossover(line)
    assert found == pytest.approx(max(place, 0.1), abs=1e-6)
