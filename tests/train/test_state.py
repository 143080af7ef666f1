from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from openwork.core.rng import generator
from openwork.errors import DivergedError, FormatError, StoreError
from openwork.methods.sparsify.rigl import RigL
from openwork.train import state
from tests.train.toys import assert_same, net, weights

DTYPES = [torch.bool, torch.uint8, torch.int16, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64]
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


def there_and_back(value: Any) -> Any:
    tensors: dict[str, Tensor] = {}
    packed = json.loads(json.dumps(state.pack(value, "key", tensors), allow_nan=False))
    return state.unpack(packed, tensors)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and math.isnan(one):
        return isinstance(other, float) and math.isnan(other)
    if isinstance(one, dict):
        return type(other) is dict and list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other and str(one) == str(other)


@given(plain)
def test_plain_values_come_back_with_their_types(value: Any) -> None:
    assert same(value, there_and_back(value))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 2)])
def test_tensors_come_back_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (10 * torch.randn(shape, generator=generator(0, "tensor"))).to(dtype)
    back = there_and_back({"step": tensor, "list": [tensor, None]})
    for found in (back["step"], back["list"][0]):
        assert found.dtype == dtype
        assert found.shape == tensor.shape
        assert torch.equal(found, tensor)
        assert found.data_ptr() != tensor.data_ptr() or tensor.numel() == 0


@pytest.mark.parametrize("value", [object(), {1: 2}, {"a": [nn.ReLU()]}, 1j, b"x"])
def test_what_cannot_be_kept_is_refused(value: Any) -> None:
    with pytest.raises(StoreError, match=r"'key.*which a checkpoint cannot keep"):
        state.pack(value, "key", {})


@pytest.mark.parametrize(
    "packed", [{}, {"tensor": "gone", "device": "cpu"}, {"float": "1e5"}, {"tuple": 3}, {"dict": []}, {"a": 1, "b": 2}]
)
def test_what_was_never_packed_is_refused(packed: Any) -> None:
    with pytest.raises(FormatError, match="no packed value"):
        state.unpack(packed, {})


class Odd(nn.Module):
    """Tied weights, a frozen one, buffers that are not saved, expanded, infinite, and laid out otherwise."""

    mask: Tensor
    wide: Tensor
    hidden: Tensor

    def __init__(self, value: float) -> None:
        super().__init__()
        self.one = nn.Linear(3, 3)
        self.two = nn.Linear(3, 3)
        self.two.weight = self.one.weight
        self.frozen = nn.Parameter(torch.full((2,), value), requires_grad=False)
        self.narrow = nn.Parameter(torch.full((2, 2), value, dtype=torch.bfloat16))
        self.conv = nn.Conv2d(2, 2, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.register_buffer("mask", torch.full((2,), -math.inf))
        self.register_buffer("wide", torch.full((1, 2), value).expand(4, 2))
        self.register_buffer("hidden", torch.full((2,), int(value)), persistent=False)
        self.register_buffer("nothing", None)
        with torch.no_grad():
            for place, param in enumerate(self.parameters()):
                param.fill_(value + place)


def test_any_module_comes_back() -> None:
    source, target = Odd(2.0), Odd(-0.0)
    snapshot = state.capture(source, torch.optim.SGD(source.parameters(), lr=0.1), None, 5)
    assert snapshot.step == snapshot.manifest["step"] == 5
    assert len([key for key in snapshot.tensors if key.startswith("parameter.")]) == 7, "tied weights are kept once"
    assert all(tensor.is_contiguous() for tensor in snapshot.tensors.values())
    state.restore(snapshot, target, torch.optim.SGD(target.parameters(), lr=0.1), None)
    for name, value in {**dict(source.named_parameters()), **dict(source.named_buffers())}.items():
        found = {**dict(target.named_parameters()), **dict(target.named_buffers())}[name]
        assert found.dtype == value.dtype
        assert found.stride() == value.stride()
        assert torch.equal(found, value)
    assert target.two.weight is target.one.weight


def test_negative_zero_is_not_zero() -> None:
    source, target = nn.Linear(2, 2), nn.Linear(2, 2)
    with torch.no_grad():
        source.weight.fill_(-0.0)
        target.weight.fill_(0.0)
    state.restore(
        state.capture(source, torch.optim.SGD(source.parameters()), None, 1),
        target,
        torch.optim.SGD(target.parameters()),
        None,
    )
    assert bool(target.weight.signbit().all())


OPTIMIZERS: dict[str, Any] = {
    "amsgrad": lambda params: torch.optim.AdamW(params, lr=0.01, amsgrad=True),
    "maximize": lambda params: torch.optim.Adam(params, lr=0.01, maximize=True, foreach=False),
    "tensor lr": lambda params: torch.optim.Adam(params, lr=torch.tensor(0.01), foreach=False),
    "centered": lambda params: torch.optim.RMSprop(params, lr=0.01, centered=True, momentum=0.5),
    "dampened": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9, dampening=0.1),
    "decayed": lambda params: torch.optim.Adagrad(params, lr=0.1, lr_decay=0.1),
    "half": lambda params: torch.optim.NAdam(params, lr=0.01),
    "fused": lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_options_go_on_bit_for_bit(name: str) -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = net()
        if name == "half":
            model.to(torch.bfloat16)
        first, *rest = model.parameters()
        return model, OPTIMIZERS[name]([{"params": [first], "weight_decay": 0.1}, {"params": rest}])

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, begin: int, end: int) -> None:
        for step in range(begin, end):
            draw = generator(0, "gradient", step)
            for param in model.parameters():
                param.grad = torch.randn(param.shape, generator=draw).to(param.dtype)
            group = optimizer.param_groups[0]
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(0.01 / (step + 1))
            else:
                group["lr"] = 0.01 / (step + 1)
            optimizer.step()

    whole, stepped = make()
    steps(whole, stepped, 0, 14)
    first, opt = make()
    steps(first, opt, 0, 7)
    snapshot = state.capture(first, opt, None, 7)
    steps(first, opt, 7, 9)  # what happens afterwards must not reach the snapshot
    second, opt = make()
    state.restore(snapshot, second, opt, None)
    steps(second, opt, 7, 14)
    assert [torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True)] == [True] * 6
    assert all(isinstance(value, type(opt.param_groups[0][key])) for key, value in stepped.param_groups[0].items()), (
        "groups keep the types of their values"
    )


def test_a_forgotten_optimizer_would_be_noticed() -> None:
    """The test above can fail: without the optimizer's state the weights differ."""
    model, twin = net(), net()
    one, other = (torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, twin))
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    one.step()
    snapshot = state.capture(model, one, None, 1)
    snapshot.manifest["optimizer"]["state"] = {}
    state.restore(snapshot, twin, other, None)
    for each, optimizer in ((model, one), (twin, other)):
        for param in each.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
    assert not torch.equal(next(model.parameters()), next(twin.parameters()))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def test_the_sparsifier_comes_back() -> None:
    model, twin = net(), net(1)
    rigl, fresh = RigL(0.3, total_steps=10, seed=1), RigL(0.3, total_steps=10, seed=2)
    optimizer, other = sgd(model), sgd(twin)
    rigl.attach(model, optimizer)
    snapshot = state.capture(model, optimizer, rigl, 0)
    fresh.attach(twin, other)
    assert any(bool((rigl.masks[name] != fresh.masks[name]).any()) for name in rigl.masks)
    state.restore(snapshot, twin, other, fresh)
    assert all(torch.equal(rigl.masks[name], fresh.masks[name]) for name in rigl.masks)
    assert torch.equal(rigl.generator.get_state(), fresh.generator.get_state())
    assert_same(weights(model), weights(twin))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_parameters_are_never_kept(bad: float) -> None:
    model = net()
    with torch.no_grad():
        model[-1].weight[1, 2] = bad  # type: ignore[index]
    with pytest.raises(DivergedError, match=r"within 9 steps: parameter '4.weight' is not finite"):
        state.capture(model, sgd(model), None, 9)


def test_a_snapshot_of_something_else_is_refused() -> None:
    model = net()
    snapshot = state.capture(model, sgd(model), None, 0)

    def refused(other: nn.Module, message: str) -> None:
        with pytest.raises(StoreError, match=message):
            state.restore(snapshot, other, sgd(other), None)

    refused(net(norm=False), "only the checkpoint has buffer '1.num_batches_tracked'")
    extra = net()
    extra.register_parameter("bonus", nn.Parameter(torch.ones(1)))
    refused(extra, "only the model has parameter 'bonus'")
    refused(net().double(), r"parameter '0.weight' is torch.float32 \(16, 12\), the model's torch.float64")
    with pytest.raises(StoreError, match="optimizer SGD, this run has Adam"):
        state.restore(snapshot, net(), torch.optim.Adam(model.parameters()), None)
    with pytest.raises(StoreError, match="sparsifier None, this run has RigL"):
        state.restore(snapshot, net(), sgd(model), RigL(0.5, total_steps=4))
    parts = [{"params": [param]} for param in model.parameters()]
    with pytest.raises(FormatError, match="parameter groups"):
        state.restore(snapshot, net(), torch.optim.SGD(parts, lr=0.1), None)


def test_state_of_strangers_is_refused() -> None:
    model = net()
    optimizer = sgd(model)
    optimizer.state["global"] = {"step": 1}  # type: ignore[index]
    with pytest.raises(StoreError, match="not one of its parameters"):
        state.capture(model, optimizer, None, 0)
