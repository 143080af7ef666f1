from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from openwork.core.rng import generator
from openwork.errors import ModelError
from openwork.runtime.decode import decode
from openwork.runtime.kernels.target import VARIABLE, targets

EPS, TINY = torch.finfo(torch.float32).eps, torch.finfo(torch.float32).tiny
BACKENDS = [*targets(), "none"]


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(VARIABLE, request.param)
    return str(request.param)


def drawn(samples: int, k: int, atoms: int, features: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = generator(seed, "decode", samples, k, atoms, features)
    indices = torch.randint(atoms, (samples, k), generator=draw)
    shapes = ((samples, k), (atoms, features), (features,))
    values, dictionary, bias = (torch.randn(shape, generator=draw) for shape in shapes)
    return values, indices, dictionary, bias


def reference(values: Tensor, indices: Tensor, dictionary: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the dense product of scattered codes in float64, and the error allowed."""
    codes = torch.zeros(*values.shape[:-1], dictionary.shape[0], dtype=torch.float64)
    sizes = codes.scatter_add(-1, indices.long(), values.double().abs()) @ dictionary.double().abs()
    found = codes.scatter_add(-1, indices.long(), values.double()) @ dictionary.double()
    if bias is not None:
        found, sizes = found + bias.double(), sizes + bias.double().abs()
    return found, (values.shape[-1] + 1) * (EPS * sizes + TINY)


def close(found: Tensor, expected: tuple[Tensor, Tensor]) -> bool:
    return found.shape == expected[0].shape and bool(((found.double() - expected[0]).abs() <= expected[1]).all())


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 3), max_size=2), st.integers(0, 5), st.integers(1, 9), st.sampled_from([0, 1, 4, 17, 33]),
    st.booleans(), st.sampled_from([torch.int64, torch.int32, torch.int16]), st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape_is_within_the_bound(
    batch: list[int], k: int, atoms: int, features: int, with_bias: bool, kind: torch.dtype, seed: int
) -> None:
    draw = generator(seed, "shapes")
    values = torch.randn(*batch, k, generator=draw)
    indices = torch.randint(atoms, values.shape, generator=draw).to(kind)
    dictionary, bias = torch.randn(atoms, features, generator=draw), torch.randn(features, generator=draw)
    added = bias if with_bias else None
    assert close(decode(values, indices, dictionary, added), reference(values, indices, dictionary, added))


def test_every_backend_is_within_the_bound(backend: str) -> None:
    values, indices, dictionary, bias = drawn(30, 8, 50, 40)
    assert close(decode(values, indices, dictionary, bias), reference(values, indices, dictionary, bias))
    halved = dictionary.bfloat16()
    assert close(decode(values, indices, halved, bias), reference(values, indices, halved.float(), bias))


def test_layouts_of_all_operands(backend: str) -> None:
    values, indices, dictionary, bias = drawn(30, 8, 50, 40)
    expected = reference(values, indices, dictionary, bias)
    wide = torch.zeros(50, 2, 40)
    wide[:, 1] = dictionary
    laid = [dictionary.t().contiguous().t(), wide[:, 1], torch.stack((dictionary, dictionary), 2)[..., 0]]
    assert all(close(decode(values, indices, one, bias), expected) for one in laid)
    across = values.t().contiguous().t(), indices.t().contiguous().t()
    assert close(decode(*across, dictionary, bias), expected)
    assert close(decode(values, indices, dictionary, torch.stack((bias, bias), 1)[:, 0]), expected)
    shaped = decode(values.reshape(2, 3, 5, 8), indices.reshape(2, 3, 5, 8), dictionary, bias)
    assert close(shaped.reshape(30, 40), expected)


def test_duplicates_add_up(backend: str) -> None:
    dictionary = torch.arange(12.0).reshape(4, 3)
    found = decode(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[2, 0, 2]]), dictionary)
    assert found.tolist() == [[5 * 6 + 0, 5 * 7 + 2, 5 * 8 + 4]]


def test_threads_do_not_change_a_bit() -> None:
    values, indices, dictionary, bias = drawn(200, 8, 500, 70)
    expected = decode(values, indices, dictionary, bias, threads=1)
    assert all(torch.equal(decode(values, indices, dictionary, bias, threads=n), expected) for n in (2, 3))
    assert torch.equal(torch.cat([decode(values[[i]], indices[[i]], dictionary, bias) for i in range(9)]), expected[:9])


def test_out_is_written_and_returned(backend: str) -> None:
    values, indices, dictionary, bias = drawn(6, 3, 9, 5)
    out = torch.full((6, 5), torch.nan)
    assert decode(values, indices, dictionary, bias, out) is out
    assert torch.equal(out, decode(values, indices, dictionary, bias))
    for wrong in (torch.empty(6, 4), torch.empty(5, 6).t(), torch.empty(6, 5).double()):
        with pytest.raises(ModelError, match="give a contiguous one"):
            decode(values, indices, dictionary, bias, wrong)
    with pytest.raises(ModelError, match="out takes no gradient"):
        decode(values.requires_grad_(), indices, dictionary, bias, out)
    with torch.no_grad():
        assert torch.equal(decode(values, indices, dictionary, bias, out), out)


def test_misfits_are_refused_in_a_sentence(backend: str) -> None:
    values, indices, dictionary, bias = drawn(6, 3, 9, 5)
    cases: list[tuple[str, tuple[Any, ...]]] = [
        (r"give both \(..., k\)", (values[:, :2], indices, dictionary)),
        (r"give both \(..., k\)", (torch.tensor(1.0), torch.tensor(1), dictionary)),
        (r"give \(atoms, features\)", (values, indices, dictionary[0])),
        (r"a bias of \(4,\)", (values, indices, dictionary, bias[:4])),
        ("give one real dtype", (values.double(), indices, dictionary)),
        ("give one real dtype", (values, indices, dictionary, bias.double())),
        ("give one real dtype", (values.long(), indices, dictionary.long())),
        ("give whole numbers", (values, indices.float(), dictionary)),
        ("give whole numbers", (values, indices, dictionary.to("meta"))),
    ]
    for words, operands in cases:
        with pytest.raises(ModelError, match=words):
            decode(*operands)


@pytest.mark.parametrize("wrong", [-1, 9, 2**40])
def test_an_index_out_of_range_is_refused(wrong: int, backend: str) -> None:
    values, indices, dictionary, _ = drawn(6, 3, 9, 5)
    indices[4, 1] = wrong
    with pytest.raises(ModelError, match="the dictionary has 9 atoms: give 0 to 8"):
        decode(values, indices, dictionary)


def gradients(
    function: Any, values: Tensor, indices: Tensor, dictionary: Tensor, bias: Tensor, weights: Tensor
) -> list[Any]:
    leaves = [one.clone().requires_grad_() for one in (values, dictionary, bias)]
    (function(leaves[0], indices, *leaves[1:]) * weights).sum().backward()
    return [leaf.grad for leaf in leaves]


def test_gradients_are_those_of_the_dense_product(backend: str) -> None:
    values, indices, dictionary, bias = drawn(40, 6, 15, 33)
    weights = torch.randn(40, 33, generator=generator(0, "weights"))
    found = gradients(decode, values, indices, dictionary, bias, weights)
    rows, size = dictionary.double()[indices], weights.double().abs()
    to_values = (weights.double()[:, None] * rows).sum(-1)
    codes = torch.zeros(40, 15, dtype=torch.float64)
    to_dictionary = codes.scatter_add(1, indices, values.double()).t() @ weights.double()
    mass = codes.scatter_add(1, indices, values.double().abs()).t() @ size
    assert close(found[0], (to_values, 34 * (EPS * (size[:, None] * rows.abs()).sum(-1) + TINY)))
    assert close(found[1], (to_dictionary, 241 * (EPS * mass + TINY)))
    assert close(found[2], (weights.double().sum(0), 41 * (EPS * size.sum(0) + TINY)))


@pytest.mark.filterwarnings("ignore:Input #:UserWarning")
def test_gradients_are_those_of_finite_differences(backend: str) -> None:
    values, indices, dictionary, bias = (one.double() if one.is_floating_point() else one for one in drawn(4, 3, 5, 6))
    free = [one.requires_grad_() for one in (values, dictionary, bias)]
    assert torch.autograd.gradcheck(lambda v, d, b: decode(v, indices, d, b), free)
    # linear in each operand, so that differences of whole numbers are exact in float32 as well
    draw = generator(0, "whole")
    whole = [torch.randint(-3, 4, one.shape, generator=draw).float().requires_grad_() for one in free]
    assert torch.autograd.gradcheck(lambda v, d, b: decode(v, indices, d, b), whole, eps=0.5, atol=0, rtol=0)


@pytest.mark.skipif(not targets(), reason="no LLVM on this machine")
def test_a_sparse_gradient_holds_the_rows_that_were_named() -> None:
    values, indices, dictionary, bias = drawn(5, 3, 50, 33)
    weights = torch.randn(5, 33, generator=generator(0, "weights"))
    whole = gradients(decode, values, indices, dictionary, bias, weights)[1]
    thin = gradients(lambda *operands: decode(*operands, sparse_grad=True), values, indices, dictionary, bias, weights)[1]
    assert thin.is_sparse
    assert thin._indices()[0].tolist() == sorted(set(indices.flatten().tolist()))
    assert torch.equal(thin.to_dense(), whole)
    with pytest.raises(ModelError, match="give sparse_grad=False"):
        decode(values.double(), indices, dictionary.double(), sparse_grad=True)
    trained = torch.nn.Parameter(dictionary.clone())
    decode(values, indices, trained, sparse_grad=True).sum().backward()
    torch.optim.SparseAdam([trained]).step()
    moved = (trained != dictionary).any(dim=1).nonzero().flatten()
    assert moved.tolist() == thin._indices()[0].tolist()


@pytest.mark.skipif(not targets(), reason="no LLVM on this machine")
def test_gradients_do_not_depend_on_threads_and_partial_needs() -> None:
    values, indices, dictionary, bias = drawn(100, 8, 60, 70)
    weights = torch.randn(100, 70, generator=generator(0, "weights"))
    expected = gradients(decode, values, indices, dictionary, bias, weights)
    for threads in (2, 3):
        found = gradients(lambda *o, n=threads: decode(*o, threads=n), values, indices, dictionary, bias, weights)
        assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
    leaf = values.clone().requires_grad_()
    (decode(leaf, indices, dictionary, bias) * weights).sum().backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, expected[0])
    assert dictionary.grad is None
    leaf = dictionary.clone().requires_grad_()
    decode(values, indices, leaf).sum().backward()  # a gradient that is expanded, with strides of zero
    assert leaf.grad is not None
    sums = torch.zeros(60).index_add_(0, indices.flatten(), values.flatten())
    assert torch.allclose(leaf.grad, sums[:, None].expand(60, 70), atol=1e-4)


@pytest.mark.skipif(not targets(), reason="no LLVM on this machine")
def test_gradients_of_a_halved_dictionary() -> None:
    values, indices, dictionary, bias = drawn(20, 4, 9, 24)
    weights, halved = torch.randn(20, 24, generator=generator(0, "weights")), dictionary.bfloat16()
    found = gradients(decode, values, indices, halved, bias, weights)
    full = gradients(decode, values, indices, halved.float(), bias, weights)
    assert found[1].dtype == torch.bfloat16
    assert torch.equal(found[1], full[1].bfloat16())
    assert torch.equal(found[0], full[0])


def test_the_second_derivative_is_refused_where_there_are_kernels() -> None:
    values, indices, dictionary, bias = drawn(4, 3, 5, 6)
    y = decode(values.requires_grad_(), indices, dictionary.requires_grad_(), bias).square().sum()
    (first,) = torch.autograd.grad(y, values, create_graph=True)
    with pytest.raises(RuntimeError):
        first.sum().backward()


class Largest(TorchDispatchMode):
    """Remembers the most elements of a tensor that torch made."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, operands: Any = (), keywords: Any = None) -> Any:
        made = function(*operands, **(keywords or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                self.elements = max(self.elements, leaf.numel())
        return made


def test_no_dense_codes_are_made_forward_or_backward(backend: str) -> None:
    samples, atoms = 64, 4000
    values, indices, dictionary, bias = drawn(samples, 4, atoms, 5)
    weights = torch.ones(samples, 5)
    with Largest():
        gradients(decode, values, indices, dictionary, bias, weights)
    tracemalloc.start()
    try:
        with Largest() as seen:
            gradients(decode, values, indices, dictionary, bias, weights)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 0 < seen.elements <= atoms * 5
    assert peak < samples * atoms  # numpy's arrays, in bytes: less than one byte a dense code


def test_torch_agrees() -> None:
    values, indices, dictionary, _ = drawn(10, 4, 30, 24)
    bags = functional.embedding_bag(indices, dictionary, per_sample_weights=values, mode="sum")
    assert close(bags, reference(values, indices, dictionary, None))


@pytest.mark.skipif(not targets(), reason="no LLVM on this machine")
def test_float32_runs_on_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("torch was asked")

    monkeypatch.setattr("openwork.runtime.decode._plain", refuse)
    values, indices, dictionary, bias = drawn(4, 3, 9, 5)
    gradients(decode, values, indices, dictionary, bias, torch.ones(4, 5))
    with pytest.raises(AssertionError, match="torch was asked"):
        decode(values.double(), indices, dictionary.double())
