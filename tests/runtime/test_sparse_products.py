from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from openwork.errors import ModelError
from openwork.runtime import sparse_products
from openwork.runtime.bounds import bound
from openwork.runtime.kernels.target import VARIABLE, targets
from openwork.runtime.positions import Positions, from_mask
from openwork.runtime.sparse_products import BATCHES, Products, Scout, multiply
from openwork.runtime.timing import limited_threads
from tests.runtime.kernels.planes_tools import bits
from tests.runtime.test_positions import blocks_mask
from tests.strategies import densities, quick, seeds, tensor

ROUTES = (*targets(), "none")
everywhere = pytest.mark.parametrize("route", ROUTES)
sizes = {
    "block": st.sampled_from([1, 2, 4]), "groups": st.integers(1, 9), "width": st.integers(1, 30),
    "columns": st.sampled_from([0, 1, 2, 5, 16, 17, 33, 64, 65, 128, 130, 300]),
}  # fmt: skip


def weight(block: int, groups: int, width: int, density: float, seed: int) -> tuple[Positions, Tensor, Tensor, Tensor]:
    """Return positions, values, bias and the dense weight."""
    found = from_mask(blocks_mask(groups, block, width, density, seed), block)
    values = tensor(torch.Size((found.nnz,)), seed, torch.float32)
    bias = tensor(torch.Size((groups * block,)), seed + 1, torch.float32)
    dense = torch.zeros(found.shape)
    dense[found.pairs()] = values
    return found, values, bias, dense


def step(
    products: Products, values: Tensor, bias: Tensor | None, x: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return the output and the gradients of input, values and bias."""
    leaves = [one.detach().requires_grad_() for one in (x, values) + (() if bias is None else (bias,))]
    y = multiply(leaves[0], leaves[1], leaves[2] if bias is not None else None, products)
    y.backward(grad)
    return y.detach(), leaves[0].grad, leaves[1].grad, leaves[2].grad if bias is not None else None


def laid(rows: int, columns: int, seed: int) -> Tensor:
    """Return numbers (rows, columns) in one of the ways that a tensor may lie."""
    if seed % 5 == 4:
        return tensor(torch.Size((1, columns)), seed, torch.float32).expand(rows, columns)
    content = tensor(torch.Size((rows, columns)), seed, torch.float32)
    if seed % 5 == 0:
        return content
    if seed % 5 == 1:
        return content.t().contiguous().t()
    wide = torch.full((columns, rows + 3), float("nan"))
    if seed % 5 == 2:
        wide[:, 1 : rows + 1] = content.t()
        return wide[:, 1 : rows + 1].t()
    apart = torch.full((rows, 2 * columns), float("nan"))
    apart[:, ::2] = content
    return apart[:, ::2]


def check(
    found: Positions, dense: Tensor, bias: Tensor | None, x: Tensor, grad: Tensor, results: tuple[Tensor | None, ...]
) -> None:
    """Assert that a step's results are those of the dense weight in float64, to within the bound of their sums."""
    y, dx, dv, db = results
    exact = x.double() @ dense.double().t() + (0 if bias is None else bias.double())
    assert y is not None
    assert ((y - exact).abs() <= bound(dense, bias, x)).all()
    assert dx is not None
    assert ((dx - grad.double() @ dense.double()).abs() <= bound(dense.t(), None, grad)).all()
    assert dv is not None
    allowed = bound(grad.t(), None, x.t()).t()[found.pairs()]
    assert ((dv - (grad.double().t() @ x.double())[found.pairs()]).abs() <= allowed).all()
    assert (db is None) == (bias is None)
    if db is not None:
        kind, size = torch.finfo(torch.float32), grad.abs().double().sum(dim=0)
        assert ((db - grad.double().sum(dim=0)).abs() <= (len(x) + 1) * (kind.eps * size + kind.tiny)).all()


@everywhere
@given(**sizes, density=densities, seed=seeds, with_bias=st.booleans())
@quick
def test_the_step_is_that_of_the_dense_layer(
    route: str, block: int, groups: int, width: int, columns: int, density: float, seed: int, with_bias: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, route)
        found, values, bias, dense = weight(block, groups, width, density, seed)
        x, grad = laid(columns, width, seed), laid(columns, len(dense), seed // 5)
        y, dx, dv, db = step(Products(found), values, bias if with_bias else None, x, grad)
    check(found, dense, bias if with_bias else None, x, grad, (y, dx, dv, db))
    if columns > 1:
        assert y.stride(0) == 1


@pytest.mark.parametrize("route", list(targets()))
@pytest.mark.parametrize(("block", "columns", "density"), [(1, 128, 0.6), (1, 100, 0.05), (2, 512, 0.3), (4, 33, 0.9)])
def test_every_bit_is_right_and_the_same_for_all_numbers_of_threads(
    route: str, block: int, columns: int, density: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, route)
    monkeypatch.setattr(sparse_products, "useful_threads", lambda work, target, threads: threads)
    found, values, bias, dense = weight(block, 160 // block, 300, density, 5)
    x, grad = laid(columns, 300, 10), laid(columns, len(dense), 11)
    steps = []
    for threads in (1, 2, 3, 7):
        with limited_threads(threads):
            results = step(Products(found), values, bias, x, grad)
            steps.append([bits(one) for one in results if one is not None])
    check(found, dense, bias, x, grad, results)
    assert all(other == steps[0] for other in steps[1:])


@everywhere
def test_only_what_is_asked_for_is_computed(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, route)
    found, values, bias, _ = weight(1, 12, 20, 0.4, 9)
    x, grad = laid(40, 20, 10), laid(40, 12, 10)
    whole = step(Products(found), values, bias, x, grad)
    products = Products(found)
    for asked in range(1, 8):
        leaves = [one.detach().clone().requires_grad_(bool(asked >> k & 1)) for k, one in enumerate((x, values, bias))]
        multiply(*leaves, products).backward(grad)
        for k, (leaf, expected) in enumerate(zip(leaves, whole[1:], strict=True)):
            assert expected is not None
            if not asked >> k & 1:
                assert leaf.grad is None
            else:
                assert torch.allclose(leaf.grad, expected, rtol=1e-5, atol=1e-5)  # the bias alone is summed by torch
    assert not multiply(x, values, bias, products).requires_grad


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("columns", [0, 1, 4])
def test_gradients_are_those_of_finite_differences(block: int, density: float, columns: int) -> None:
    found, values, bias, _ = weight(block, 4 // block, 5, density, 2)
    leaves = [laid(columns, 5, 11), values, bias]
    doubles = [one.double().requires_grad_() for one in leaves]
    products = Products(found)
    assert torch.autograd.gradcheck(lambda x, v, b: multiply(x, v, b, products), doubles)


def test_a_second_derivative_is_refused() -> None:
    found, values, bias, _ = weight(1, 4, 5, 0.5, 2)
    x = torch.ones(3, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(multiply(x, values, bias, Products(found)).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_single(dtype: torch.dtype) -> None:
    found, values, bias, _ = weight(1, 6, 400, 0.9, 4)
    values, bias, x, grad = (one.to(dtype) for one in (values, bias, laid(9, 400, 10), laid(9, 6, 10)))
    products = Products(found)
    y, dx, dv, db = step(products, values, bias, x, grad)
    exact = step(products, values.double(), bias.double(), x.double(), grad.double())
    assert y.dtype == dtype
    for one, other in zip((y, dx, dv, db), exact, strict=True):
        assert one is not None
        assert other is not None
        allowed = torch.finfo(dtype).eps * other.abs() + 400 * torch.finfo(torch.float32).eps * 40
        assert ((one - other).abs() <= allowed).all()


@everywhere
def test_more_dimensions_are_flattened_and_given_back(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, route)
    found, values, bias, _ = weight(1, 6, 8, 0.5, 4)
    products = Products(found)
    x = tensor(torch.Size((2, 3, 5, 8)), 0, torch.float32)
    y = multiply(x, values, bias, products)
    flat = multiply(x.reshape(-1, 8), values, bias, products)
    assert y.shape == (2, 3, 5, 6)
    assert torch.equal(y.reshape(-1, 6), flat)
    assert torch.equal(multiply(x[0, 0, 0], values, bias, products), y[0, 0, 0])
    empty = multiply(x[:, :0], values, bias, products)
    assert empty.shape == (2, 0, 5, 6)


def test_inputs_beyond_the_reach_of_offsets_are_taken_in_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    found, values, bias, _ = weight(1, 6, 8, 0.5, 4)
    x, grad = laid(50, 8, 11), laid(50, 6, 10)
    products = Products(found)
    whole = step(products, values, bias, x, grad)
    monkeypatch.setattr(sparse_products, "_REACH", 4 * 8 * 7 + 1)  # seven columns
    parts = step(products, values, bias, x, grad)
    assert torch.equal(parts[0], whole[0])
    for one, other in zip(parts[1:], whole[1:], strict=True):
        assert one is not None
        assert other is not None
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("route", list(targets()))
def test_inputs_that_lie_badly_are_copied_where_that_pays_and_give_the_same_bits(
    route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, route)
    found, values, bias, _ = weight(1, 40, 50, 0.9, 4)
    good = laid(512, 50, 11)
    products = Products(found)
    features = products.features(good)
    assert features.data_ptr() != good.data_ptr()
    assert features.stride(0) > 512
    assert torch.equal(features, good.t())
    monkeypatch.setattr(sparse_products, "_OFTEN", 10**9)
    assert products.features(good).data_ptr() == good.data_ptr()
    straight = products.multiply(values, bias, good.t())
    assert bits(straight) == bits(products.multiply(values, bias, features))


def test_a_stack_is_read_as_it_lies() -> None:
    found, values, bias, _ = weight(1, 64, 64, 0.2, 4)
    products = Products(found)
    y = torch.relu(multiply(laid(128, 64, 10), values, bias, products))
    assert products.features(y).data_ptr() == y.data_ptr()


@everywhere
def test_an_absent_weight_multiplies_nothing(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, route)
    found, values, bias, dense = weight(1, 10, 12, 0.4, 4)
    x = laid(20, 12, 10).clone()
    x[:, 3], x[7, 5] = float("nan"), float("inf")
    y = multiply(x, values, bias, Products(found))
    touched = (dense[:, 3] != 0)[None] | ((torch.arange(20) == 7)[:, None] & (dense[:, 5] != 0)[None])
    assert touched.any()
    assert not touched.all()
    assert torch.equal(~torch.isfinite(y), touched)


@everywhere
def test_scouts_collect_the_gradients_of_other_positions(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, route)
    found, values, bias, _ = weight(2, 5, 12, 0.4, 4)
    others = from_mask(~found.mask(), 2)
    scout = Scout(Products(others), torch.zeros(others.nnz))
    x, grad = laid(20, 12, 10), laid(20, 10, 10)
    for _ in range(2):
        multiply(x, values.requires_grad_(), bias, Products(found), scout).backward(grad)
    exact = 2 * (grad.double().t() @ x.double())
    allowed = 2 * bound(grad.t(), None, x.t()).t()[others.pairs()]
    assert scout.passes == 2
    assert ((scout.grad - exact[others.pairs()]).abs() <= allowed).all()


@pytest.mark.skipif(not targets(), reason="no LLVM on this machine")
def test_programs_are_kept_for_a_few_batch_sizes_only() -> None:
    found, values, bias, dense = weight(1, 10, 12, 0.4, 4)
    products = Products(found)
    for columns in range(1, 4 * BATCHES):
        x = laid(columns, 12, 11)
        y = multiply(x, values.requires_grad_(), bias, products)
        assert ((y.detach() - x.double() @ dense.double().t() - bias).abs() <= bound(dense, bias, x)).all()
        y.sum().backward()
        assert len(products._forward) <= BATCHES + 1
        assert len(products._backward) <= BATCHES + 1


def test_products_are_copied_without_what_they_made() -> None:
    found, values, bias, _ = weight(1, 10, 12, 0.4, 4)
    products = Products(found)
    y = multiply(laid(20, 12, 10), values, bias, products)
    for other in (copy.deepcopy(products), pickle.loads(pickle.dumps(products))):
        assert "_forward" not in other.__dict__
        assert torch.equal(multiply(laid(20, 12, 10), values, bias, other), y)


def test_inputs_that_do_not_fit_are_refused() -> None:
    found, values, bias, _ = weight(1, 10, 12, 0.4, 4)
    products = Products(found)
    for bad in (torch.ones(3, 11), torch.ones(3, 12, dtype=torch.float64), torch.tensor(1.0), torch.ones(3, 12).to("meta")):
        with pytest.raises(ModelError, match="cannot multiply an input"):
            multiply(bad, values, bias, products)
