from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from openwork.core.rng import generator
from openwork.errors import ModelError
from openwork.runtime import skipping, wrapping
from openwork.runtime.bounds import bound
from openwork.runtime.kernels import skipping as kernel
from openwork.runtime.kernels.launch import Program
from openwork.runtime.kernels.target import VARIABLE, Target, targets
from openwork.runtime.skipping import SkippingLinear, matmul, nbytes, pack, unpack
from openwork.testing.formats import check_format

TARGETS = list(targets().values())
each_target = pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)


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


def drawn(rows: int, columns: int, density: float, seed: int = 0) -> Tensor:
    draw = generator(seed, "skipping", rows, columns)
    x = torch.randn(rows, columns, generator=draw)
    return x * (torch.rand(x.shape, generator=draw) < density)


def layer_of(out: int, columns: int, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(columns, out, bias=bias)
    draw = generator(0, "layer", out, columns)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    return layer


@each_target
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 4), st.integers(0, 120), st.sampled_from([16, 32, 128]), st.floats(0, 1), st.integers(0, 2**31))
def test_lists_hold_the_non_zeros_in_order(
    target: Target, rows: int, columns: int, part: int, density: float, seed: int
) -> None:
    x = drawn(rows, columns + 2, density, seed)[:, 1 : columns + 1]
    if x.numel() > 2:
        x[0, 0], x[-1, -1] = torch.nan, -0.0
    parts, size = max(1, -(-columns // part)), kernel.room(columns)
    begins, ends = np.full((parts, rows), -1), np.full((parts, rows), -1)
    indices, values = np.full(rows * size, -1, np.int32), np.full(rows * size, 7, np.float32)
    places = [array.ctypes.data for array in (begins, ends, indices, values)]
    calls = kernel.calls(target, x.data_ptr(), 4 * (columns + 2), rows, columns, part, *places)
    Program([calls], target).run(2)
    for row in range(rows):
        for number in range(parts):
            own = x[row, number * part : (number + 1) * part]
            kept = own.nonzero().flatten()
            first, last = begins[number, row], ends[number, row]
            assert indices[first:last].tolist() == (kept + number * part).tolist()
            assert np.array_equal(values[first:last], own[kept].numpy(), equal_nan=True)
            assert row * size <= first <= last <= (row + 1) * size


def test_it_conforms_as_a_format() -> None:
    check_format(skipping)  # type: ignore[arg-type]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 4), max_size=2), st.integers(0, 70), st.sampled_from([0, 1, 17, 40]), st.floats(0, 1),
    st.booleans(), st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape_is_within_the_bound(
    batch: list[int], columns: int, out: int, density: float, with_bias: bool, seed: int
) -> None:
    draw = generator(seed, "shapes")
    weight, bias = torch.randn(out, columns, generator=draw), torch.randn(out, generator=draw) if with_bias else None
    x = drawn(int(np.prod(batch, dtype=int)), columns, density, seed).reshape(*batch, columns)
    y = matmul(pack(weight, bias), x)
    expected = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    assert y.shape == expected.shape
    assert bool(((y.double() - expected).abs() <= bound(weight, bias, x)).all())


def test_every_backend_is_within_the_bound(backend: str) -> None:
    layer, x = layer_of(130, 700), drawn(9, 700, 0.1)
    for dtype in (torch.float32, torch.float64):
        weight, bias = layer.weight.detach().to(dtype), layer.bias.detach().to(dtype)
        exact = x.double() @ weight.double().t() + bias.double()
        found = matmul(pack(weight, bias), x.to(dtype))
        assert bool(((found.double() - exact).abs() <= bound(weight, bias, x.to(dtype))).all())
    rounded = layer.weight.detach().bfloat16().float()
    exact = x.double() @ rounded.double().t() + layer.bias.detach().double()
    halved = pack(layer.weight, layer.bias, halved=True)
    assert bool(((matmul(halved, x).double() - exact).abs() <= bound(rounded, layer.bias.detach(), x)).all())
    assert torch.equal(unpack(halved)[0], rounded)
    assert nbytes(halved) == 130 * 700 * 2 + 130 * 4


def test_no_bit_depends_on_threads_or_on_other_rows() -> None:
    layer, x = layer_of(300, 3000), drawn(7, 3000, 0.2)
    packed = pack(layer.weight, layer.bias)
    expected = matmul(packed, x, threads=1)
    assert all(torch.equal(matmul(packed, x, threads=threads), expected) for threads in (2, 3))
    assert torch.equal(torch.cat([matmul(packed, row[None], threads=2) for row in x]), expected)


def test_nan_is_not_skipped_and_zeros_are(backend: str) -> None:
    weight = torch.ones(5, 40)
    weight[:, 3], weight[2, 4] = torch.inf, torch.nan
    x = drawn(3, 40, 0.5)
    x[:, 3], x[:, 4] = -0.0, 0.0
    x[1, 20], x[2, 21] = torch.nan, torch.inf
    y = matmul(pack(weight), x)
    assert bool(y[0].isfinite().all())
    assert bool(y[1].isnan().all())
    assert bool((y[2] == torch.inf).all())


def test_dense_inputs_are_multiplied_densely_beyond_the_share(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(8, 50)
    asked: list[int] = []
    whole = skipping._product
    monkeypatch.setattr(skipping, "_product", lambda *operands: asked.append(1) or whole(*operands))
    twin = SkippingLinear(layer, densest=0.3)
    thin, thick = torch.zeros(2, 50), torch.ones(2, 50)
    thin[:, :15] = 1.0
    for x, times in ((thin, 1), (thick, 1), (thin, 2)):
        exact = x.double() @ layer.weight.detach().double().t() + layer.bias.detach().double()
        assert bool(((twin(x).double() - exact).abs() <= bound(layer.weight.detach(), layer.bias.detach(), x)).all())
        assert len(asked) == times
    twin.until(1.0)
    twin(thick)
    assert len(asked) == 3
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(ModelError, match="give the share of non-zero inputs"):
            twin.until(wrong)
        with pytest.raises(ModelError, match="give the share of non-zero inputs"):
            pack(layer.weight, densest=wrong)


@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_saves_copies_and_pickles_as_the_dense_one(bias: bool) -> None:
    layer, x = layer_of(6, 20, bias), drawn(3, 20, 0.4)
    twin = SkippingLinear(layer)
    state = twin.state_dict()
    assert state.keys() == layer.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in layer.state_dict().items())
    for other in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin))):
        assert torch.equal(other(x), twin(x))
    assert copy.deepcopy(twin).packed is twin.packed
    assert not list(twin.parameters())
    assert not twin.training
    assert not twin(x.requires_grad_()).requires_grad
    assert f"6x20, format=skipping, bytes={(120 + 6 * bias) * 4}, densest=1" in repr(twin)
    with pytest.raises(RuntimeError, match="load into the original model"):
        nn.Sequential(twin).load_state_dict({"0." + name: value for name, value in state.items()})


def test_misfits_are_refused_in_a_sentence() -> None:
    hooked = nn.Linear(2, 2)
    hooked.register_forward_hook(lambda *_: None)
    for layer, words in ((hooked, "has hooks"), (nn.Conv2d(2, 2, 1), "is no linear layer"), (nn.ReLU(), "neither linear")):
        with pytest.raises(ModelError, match=words):
            SkippingLinear(layer)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="give float32"):
        pack(torch.ones(2, 2).double(), halved=True)
    with pytest.raises(ModelError, match="no format 'dense' outside of formats: choose from skipping"):
        wrapping.load("dense")
    packed = pack(torch.ones(3, 2))
    for x in (torch.ones(4, 3), torch.ones(4, 2).double(), torch.tensor(1.0), torch.ones(4, 2).long()):
        with pytest.raises(ModelError, match=r"give \(\.\.\., 2\) of torch\.float32"):
            matmul(packed, x)


def test_parts_do_not_lose_inputs() -> None:
    weight = torch.randint(-3, 4, (40, 5000), generator=generator(0, "whole")).float()
    x = drawn(5, 5000, 0.3).mul(4).round()
    assert torch.equal(matmul(pack(weight), x).long(), x.long() @ weight.long().t())


def test_skipping_is_worth_trying_on_inputs_with_zeros() -> None:
    layer, thin, thick = layer_of(8, 40), drawn(5, 40, 0.5), torch.ones(5, 40)
    assert wrapping.worth_trying(layer, thin) == ["skipping"]
    assert wrapping.worth_trying(layer, thick) == []
    assert wrapping.has_zeros(thin)
    assert not wrapping.has_zeros(thick)
    assert not wrapping.has_zeros(thin.to("meta"))
    assert wrapping.worth_trying(layer, thin.double()) == []
    assert wrapping.worth_trying(layer, thin[:0]) == []
    assert wrapping.worth_trying(nn.Conv2d(1, 1, 1), thin) == []
    assert wrapping.worth_trying(layer.half(), thin.half()) == []


def test_a_packed_layer_is_held_to_its_bound() -> None:
    layer, x = layer_of(8, 40), drawn(50, 40, 0.5).reshape(5, 10, 40)
    twin = wrapping.pack(layer, "skipping")
    assert isinstance(twin, SkippingLinear)
    assert wrapping.is_right(twin, layer, x)
    assert not wrapping.is_right(wrapping.pack(layer_of(8, 40, bias=False), "skipping"), layer, x)
    with pytest.raises(ModelError, match="no format 'nope'"):
        wrapping.pack(layer, "nope")
    with pytest.raises(ModelError, match="cannot hold this Linear in the format blocks"):
        wrapping.pack(layer.double(), "cuda.blocks")
