from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from openwork.core.rng import generator
from openwork.errors import ModelError
from openwork.runtime.kernels import elementwise
from openwork.runtime.kernels.activations import Act
from openwork.runtime.kernels.launch import Call
from openwork.runtime.kernels.planes import Planes
from openwork.runtime.kernels.target import Target
from tests.runtime.kernels.planes_tools import TARGETS, Held, bits, hold, run

pytestmark = pytest.mark.skipif(not TARGETS, reason="no LLVM on this machine")
quick = settings(max_examples=30, deadline=None, derandomize=True)
every = st.sampled_from(TARGETS or [None])
shapes = st.tuples(
    st.integers(1, 2),
    st.sampled_from([1, 2, 5, 33]),
    st.integers(1, 20),
    st.integers(1, 40) | st.just(130),
    st.integers(0, 3),
)
acts = st.sampled_from(["none", "clamp", "silu", "sigmoid"])
EXACT: dict[Act, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "clamp": lambda x: x.clamp(0.5, 2.0),
    "sigmoid": torch.sigmoid,
    "silu": torch.nn.functional.silu,
}
LIMITS = torch.tensor([0.5, 2.0])
EPS = 2.0**-23


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=generator(seed, "elementwise", *shape))


def near(found: Tensor, exact: Tensor, size: Tensor) -> None:
    """What an activation is given is off by a few roundings of `size`; none here is steeper than 1.1."""
    assert ((found.double() - exact).abs() <= 2 * EPS * size.double() + 4 * EPS * exact.abs()).all()


def results(target: Target, out: Held, calls: list[Call]) -> Tensor:
    found = []
    for threads in (1, 2, 3):
        run(calls, target, threads)
        out.check()
        found.append(out.pixels.clone())
    assert len({bits(one) for one in found}) == 1
    return found[0]


@quick
@given(every, shapes, acts)
def test_sums_and_activations_are_exact_to_rounding(target: Target, shape: tuple[int, int, int, int, int], act: Act) -> None:
    x, y = draw(shape[:4], 0), draw(shape[:4], 1)
    planes = Planes(*shape)
    one, two, out = hold(planes, x), hold(planes, y), hold(planes, dirty=True)
    limits = LIMITS.data_ptr()
    found = results(target, out, elementwise.add(target, one.planes, two.planes, out.planes, act=act, limits=limits))
    near(found, EXACT[act](x.double() + y.double()), x.abs() + y.abs())
    found = results(target, out, elementwise.activate(target, one.planes, out.planes, act=act, limits=limits))
    near(found, EXACT[act](x.double()), torch.zeros(()))
    run(elementwise.activate(target, one.planes, one.planes, act=act, limits=limits), target)
    one.check()
    assert bits(one.pixels) == bits(found)


@quick
@given(every, shapes, acts, st.integers(0, 1))
def test_factors_and_shifts_are_exact_to_rounding(
    target: Target, shape: tuple[int, int, int, int, int], act: Act, pad: int
) -> None:
    x, factor, shift, gates = draw(shape[:4], 2), draw(shape[1:2], 3), draw(shape[1:2], 4), draw(shape[:2], 5)
    planes = Planes(*shape)
    source, out = hold(planes, x), hold(planes, dirty=True)
    limits = LIMITS.data_ptr()
    calls = elementwise.affine(
        target, source.planes, out.planes, factor.data_ptr(), shift.data_ptr(), act=act, limits=limits
    )
    times, plus = factor.double()[:, None, None], shift.double()[:, None, None]
    found = results(target, out, calls)
    near(found, EXACT[act](x.double() * times + plus), (x.double() * times).abs() + plus.abs())
    held = hold(Planes(*shape[:2], 1, 1, pad), gates[:, :, None, None])
    exact = x.double() * gates.double()[:, :, None, None]
    found = results(target, out, elementwise.scale(target, source.planes, held.planes, out.planes, act=act, limits=limits))
    near(found, EXACT[act](exact), exact.abs())


@pytest.mark.parametrize("target", TARGETS, ids=lambda one: one.name)
def test_gaps_stay_zero_whatever_is_done_to_zero(target: Target) -> None:
    x = draw((2, 3, 5, 7), 6)
    x[0, 0, 0, 0], x[1, 2, 4, 6] = math.nan, math.inf
    planes = Planes(2, 3, 5, 7, 2)
    source, out = hold(planes, x), hold(planes, dirty=True)
    gates = torch.tensor([math.inf, math.nan, 2.0] * 2).view(2, 3, 1, 1)
    run(elementwise.scale(target, source.planes, hold(Planes(2, 3, 1, 1), gates).planes, out.planes), target)
    out.check()
    torch.testing.assert_close(out.pixels, x * gates, rtol=0, atol=0, equal_nan=True)
    factor, shift = torch.tensor([math.inf, 0.0, 1.0]), torch.tensor([1.0, 5.0, math.nan])
    run(elementwise.affine(target, source.planes, out.planes, factor.data_ptr(), shift.data_ptr()), target)
    out.check()
    expected = x * factor[:, None, None] + shift[:, None, None]
    torch.testing.assert_close(out.pixels, expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    run(elementwise.add(target, source.planes, source.planes, out.planes, act="sigmoid"), target)
    out.check()
    torch.testing.assert_close(out.pixels, torch.sigmoid(2 * x), rtol=1e-6, atol=0, equal_nan=True)


def test_layouts_that_differ_are_refused() -> None:
    target, planes = TARGETS[0], Planes(1, 2, 5, 5, 1)
    for other in (replace(planes, pad=0), replace(planes, channels=3), replace(planes, width=4)):
        with pytest.raises(ModelError, match="lay them out alike"):
            elementwise.add(target, planes, other, planes)
        with pytest.raises(ModelError, match="lay them out alike"):
            elementwise.activate(target, planes, other, act="silu")
    with pytest.raises(ModelError, match="one pixel for each channel"):
        elementwise.scale(target, planes, planes, planes)
    empty = replace(planes, batch=0)
    assert elementwise.add(target, empty, empty, empty) == []
