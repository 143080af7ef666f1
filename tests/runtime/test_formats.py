from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from openwork.core.rng import generator
from openwork.errors import ModelError
from openwork.runtime import formats
from openwork.runtime.bounds import bound
from openwork.runtime.kernels.target import VARIABLE, targets
from openwork.testing import formats as suite
from openwork.testing.formats import check_format

GENERAL = [name for name in formats.names() if name not in ("block", "nm")]
"""Formats that take any weight; the others have tests of their own."""
DOUBLE = ("dense", "csr_scipy", "csr_torch")
"""Formats that take float64."""


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", GENERAL)
def test_every_format_conforms(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name not in DOUBLE:
        monkeypatch.setattr(suite, "DTYPES", (torch.float32,))
        with pytest.raises(ModelError, match=r"float64 for the sparse kernels: give float32"):
            formats.load(name).pack(torch.ones(2, 3).double())
    check_format(name)


@pytest.mark.parametrize("target", [*list(targets())[1:], "none"])
def test_spmm_conforms_on_other_processors(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "DTYPES", (torch.float32,))
    monkeypatch.setenv(VARIABLE, target)
    check_format("spmm")


@pytest.mark.parametrize("name", GENERAL)
def test_products_of_whole_numbers_are_exact(name: str) -> None:
    draw = generator(0, "whole", name)
    tested = formats.load(name)
    weight = torch.randint(-3, 4, (37, 53), generator=draw).float()
    weight[torch.rand(weight.shape, generator=draw) < 0.7] = 0
    bias = torch.randint(-9, 9, (37,), generator=draw).float()
    x = torch.randint(-5, 6, (4, 11, 53), generator=draw).float()
    expected = torch.einsum("oi,abi->abo", weight.long(), x.long()) + bias.long()
    assert torch.equal(tested.matmul(tested.pack(weight, bias), x).long(), expected)


@pytest.mark.parametrize("name", GENERAL)
def test_two_threads_keep_the_bound(name: str) -> None:
    torch.set_num_threads(2)
    draw = generator(1, "threads")
    weight = torch.randn(200, 300, generator=draw) * (torch.rand(200, 300, generator=draw) < 0.1)
    x = torch.randn(64, 300, generator=draw)
    tested = formats.load(name)
    error = (tested.matmul(tested.pack(weight), x).double() - x.double() @ weight.double().t()).abs()
    assert bool((error <= bound(weight, None, x)).all())


def test_the_folder_is_the_registry() -> None:
    assert formats.names() == ["dense", "block", "csr_scipy", "csr_torch", "few", "nm", "sell", "spmm"]
    with pytest.raises(ModelError, match="there is no format 'nope': choose from dense, block, csr_scipy, csr_torch"):
        formats.load("nope")
    with pytest.raises(ModelError):
        formats.load("_common")


def test_bytes_of_groups_are_those_of_starts_columns_and_blocks() -> None:
    tested = formats.load("spmm")
    weight = torch.eye(10)
    assert tested.nbytes(tested.pack(weight)) == 11 * 8 + 10 * 4 + 10 * 4
    assert tested.nbytes(tested.pack(weight, torch.ones(10))) == 11 * 8 + 10 * 4 + 10 * 4 + 40
    pairs = weight.repeat_interleave(2, dim=0)
    assert tested.nbytes(tested.pack(pairs)) == 11 * 8 + 10 * 4 + 20 * 4


@pytest.mark.parametrize("name", ["csr_scipy", "csr_torch"])
def test_bytes_are_those_of_values_indices_and_bias(name: str) -> None:
    tested = formats.load(name)
    weight = torch.eye(10)
    assert tested.nbytes(tested.pack(weight)) == 10 * 4 + 10 * 4 + 11 * 4
    assert tested.nbytes(tested.pack(weight, torch.ones(10))) == 10 * 4 + 10 * 4 + 11 * 4 + 40
    assert tested.nbytes(tested.pack(weight.double())) == 10 * 8 + 10 * 4 + 11 * 4


@pytest.mark.parametrize("name", GENERAL)
def test_misfits_are_refused_in_a_sentence(name: str) -> None:
    tested = formats.load(name)
    for weight, bias in (
        (torch.ones(3), None),
        (torch.ones(3, 2, dtype=torch.float16), None),
        (torch.ones(3, 2, device="meta"), None),
        (torch.ones(3, 2), torch.ones(2)),
        (torch.ones(3, 2), torch.ones(3).double()),
    ):
        with pytest.raises(ModelError):
            tested.pack(weight, bias)
    packed = tested.pack(torch.ones(3, 2))
    for x in (torch.ones(4, 3), torch.ones(4, 2).double(), torch.tensor(1.0), torch.ones(4, 2).long()):
        with pytest.raises(ModelError, match=r"give \(\.\.\., 2\) of torch\.float32"):
            tested.matmul(packed, x)


@pytest.mark.parametrize("name", GENERAL)
def test_the_packed_weight_is_a_copy_and_is_shared_by_copies(name: str) -> None:
    tested = formats.load(name)
    weight, bias, x = torch.ones(3, 2), torch.ones(3), torch.ones(1, 2)
    packed = tested.pack(weight, bias)
    weight.zero_()
    bias.zero_()
    assert tested.matmul(packed, x).tolist() == [[3, 3, 3]]
    assert copy.deepcopy(packed) is packed
    assert tested.matmul(pickle.loads(pickle.dumps(packed)), x).tolist() == [[3, 3, 3]]


@pytest.mark.parametrize("name", GENERAL)
def test_no_gradient_flows(name: str) -> None:
    tested = formats.load(name)
    weight = torch.ones(3, 2, requires_grad=True)
    y = tested.matmul(tested.pack(weight, weight[:, 0]), torch.ones(5, 2, requires_grad=True))
    assert not y.requires_grad


def broken(**replaced: Any) -> Any:
    dense = formats.load("dense")
    functions = {name: getattr(dense, name) for name in ("pack", "unpack", "matmul", "nbytes")}
    return SimpleNamespace(**{**functions, **replaced})


def _alias(packed: Any, x: Tensor) -> Tensor:
    if packed.bias is not None and x.ndim == 1 and not packed.weight.any():
        return packed.bias  # type: ignore[no-any-return]
    return formats.load("dense").matmul(packed, x)


@pytest.mark.parametrize(
    ("faulty", "words"),
    [
        (broken(matmul=lambda p, x: formats.load("dense").matmul(p, x) * (1 + 1e-4)), "outside the bound"),
        (broken(matmul=lambda p, x: formats.load("dense").matmul(p, x).reshape(-1, p.weight.shape[0])), "has shape"),
        (broken(matmul=lambda p, x: formats.load("dense").matmul(p, x).double()), "has dtype"),
        (broken(matmul=lambda p, x: x @ p.weight.t()), "outside the bound"),
        (broken(matmul=lambda p, x: formats.load("dense").matmul(p, x.add_(1).sub_(1))), "its input|outside"),
        (broken(matmul=_alias), "outside the bound"),
        (broken(unpack=lambda p: (p.weight * (1 + 1e-6), p.bias)), "weight exactly"),
        (broken(unpack=lambda p: (p.weight, None)), "the bias"),
        (broken(unpack=lambda p: (p.weight.t(), p.bias)), "shape or dtype"),
        (broken(nbytes=lambda p: 0), "nbytes"),
    ],
)
def test_the_suite_finds_faults(faulty: Any, words: str) -> None:
    check_format(broken())
    with pytest.raises(AssertionError, match=words):
        check_format(faulty)


def test_the_bound_by_hand() -> None:
    weight = torch.tensor([[1.0, -2.0, 0.0], [0.0, 0.0, 0.0]])
    found = bound(weight, torch.tensor([-3.0, 0.0]), torch.tensor([[4.0, -5.0, 6.0]]))
    eps, tiny = torch.finfo(torch.float32).eps, torch.finfo(torch.float32).tiny
    assert found.tolist() == [[2 * 3 * (eps * 17 + tiny), 2 * tiny]]
