from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from openwork.core.rng import generator
from openwork.runtime.kernels import jit
from openwork.runtime.kernels.activations import ACTS, Act, apply, keeps_zero
from openwork.runtime.kernels.emit import Emitter
from openwork.runtime.kernels.launch import Call
from openwork.runtime.kernels.target import Target
from tests.runtime.kernels.planes_tools import TARGETS, bits, run

pytestmark = pytest.mark.skipif(not TARGETS, reason="no LLVM on this machine")
on_every = pytest.mark.parametrize("target", TARGETS, ids=lambda one: one.name)
EXACT: dict[Act, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "clamp": lambda x: x.clamp(-1, 6),
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: 0.5 * x * torch.special.erfc(-x / math.sqrt(2)),
    "gelu_tanh": lambda x: x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)),
    "sigmoid": torch.sigmoid,
    "hardswish": lambda x: x * (x + 3).clamp(0, 6) / 6,
    "tanh": torch.tanh,
}
TORCH: dict[Act, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "hardswish": torch.nn.functional.hardswish,
}
WITHIN: dict[Act, float] = {"none": 0, "clamp": 0, "sigmoid": 3, "hardswish": 3, "tanh": 2}
SHARES: tuple[Act, ...] = ("gelu", "gelu_tanh")


def applied(target: Target, act: Act, x: Tensor, lanes: int | None = None) -> Tensor:
    lanes = lanes or target.lanes
    name = f"test_{act}_{lanes}_{target.name}"

    def build() -> str:
        e = Emitter(name, target)
        source, out, count, limits = e.pointer(0), e.pointer(1), e.slot(2), e.pointer(3)
        with e.loop(e.int(0), count, lanes) as i:
            value = e.load(e.item(source, i, e.f32), e.vector(lanes=lanes))
            e.store(apply(e, act, value, limits), e.item(out, i, e.f32))
        return e.text()

    count = -(-len(x) // lanes) * lanes
    source, out = torch.zeros(count), torch.zeros(count)
    source[: len(x)] = x
    limits = torch.tensor([-1.0, 6.0])
    slots = np.array([source.data_ptr(), out.data_ptr(), count, limits.data_ptr()], np.int64)
    run([Call(jit.address(name, target, build), slots, 1)], target)
    return out[: len(x)]


def everywhere() -> Tensor:
    """Numbers of every exponent and sign, the denormals among them, and more where the functions bend."""
    source = generator(0, "activations")
    any_bits = torch.randint(-(2**31), 2**31, (1 << 14,), generator=source).to(torch.int32).view(torch.float32)
    near = torch.randn(1 << 14, generator=source)
    small = near * 10 ** (60 * torch.rand(1 << 14, generator=source) - 55)
    wide = 130 * torch.rand(1 << 14, generator=source) - 110
    edges = torch.tensor([0.0, -0.0, 0.625, -0.625, 3, -3, 18.765, -18.765, 88, -88, -103.9, -176, -1e38, 1e38])
    edges = torch.cat(
        [edges, torch.tensor([torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max, 1e-45, -1e-45])]
    )
    found = torch.cat([any_bits, near, 5 * near, small, wide, edges])
    return found[torch.isfinite(found)]


def ulps(found: Tensor, exact: Tensor) -> Tensor:
    """The distance in units in the last place of the exact result."""
    exponent = torch.frexp(exact).exponent.clamp(min=-125) - 24
    return (found.double() - exact).abs() / torch.exp2(exponent.double())


@on_every
@pytest.mark.parametrize("act", SHARES)
def test_the_share_of_a_gelu_is_right(target: Target, act: Act) -> None:
    x = everywhere()
    exact, found = EXACT[act](x.double()), applied(target, act, x)
    off = (found.double() - exact).abs() / x.double().abs().clamp(min=1e-38)
    assert off.max() <= 2.5e-7, float(x[off.argmax()])
    assert not bool(((found < 0) & (x > 0)).any() or ((found > 0) & (x < 0)).any())


@on_every
@pytest.mark.parametrize("act", [one for one in ACTS if one not in SHARES])
def test_it_is_exact_to_a_few_units_everywhere(target: Target, act: Act) -> None:
    x = everywhere()
    exact = EXACT[act](x.double())
    assert torch.isfinite(exact.float()).all()
    found = applied(target, act, x)
    worst = ulps(found, exact)
    assert worst.max() <= WITHIN.get(act, 4), (act, float(x[worst.argmax()]))
    if act != "none":
        assert worst.mean() < 0.6


@on_every
@pytest.mark.parametrize("act", ACTS)
def test_nan_stays_and_infinities_are_torchs(target: Target, act: Act) -> None:
    x = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, 0.0])
    expected = TORCH.get(act, EXACT[act])(x.double()).float()
    torch.testing.assert_close(applied(target, act, x), expected, rtol=0, atol=0, equal_nan=True)


@on_every
@pytest.mark.parametrize("act", ACTS)
def test_the_width_of_the_vector_changes_nothing(target: Target, act: Act) -> None:
    x = everywhere()[::37]
    assert len({bits(applied(target, act, x, lanes)) for lanes in (1, 4, 8, 16)}) == 1


@pytest.mark.parametrize("act", ACTS)
def test_what_keeps_zero_is_known(act: Act) -> None:
    value = float(applied(TARGETS[0], act, torch.zeros(1))[0])
    assert value == 0 or not keeps_zero(act)
    assert keeps_zero(act) == (act not in ("clamp", "sigmoid"))


def test_an_unknown_activation_is_an_error() -> None:
    with pytest.raises(KeyError):
        applied(TARGETS[0], "relu", torch.zeros(1))  # type: ignore[arg-type]
