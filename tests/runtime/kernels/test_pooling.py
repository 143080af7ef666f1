from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from openwork.core.rng import generator
from openwork.errors import ModelError
from openwork.runtime.kernels import pooling
from openwork.runtime.kernels.planes import Planes
from openwork.runtime.kernels.target import Target
from tests.runtime.kernels.planes_tools import TARGETS, bits, hold, run

pytestmark = pytest.mark.skipif(not TARGETS, reason="no LLVM on this machine")
quick = settings(max_examples=30, deadline=None, derandomize=True)
every = st.sampled_from(TARGETS or [None])
Pair = tuple[int, int]
EPS = 2.0**-24


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=generator(seed, "pooling", *shape))


@st.composite
def windows(draw: st.DrawFn) -> tuple[Pair, Pair, Pair, tuple[int, int, int, int], int, int]:
    sizes = st.sampled_from([1, 2, 3, 3, 5, 11])
    kernel = (draw(sizes), draw(sizes))
    stride = (draw(st.integers(1, 5)), draw(st.sampled_from([1, 2, 2, 3, 5])))
    padding = (draw(st.integers(0, kernel[0] // 2)), draw(st.integers(0, kernel[1] // 2)))
    height = draw(st.integers(max(1, kernel[0] - 2 * padding[0]), 16))
    width = draw(st.integers(max(1, kernel[1] - 2 * padding[1]), 45))
    shape = (draw(st.integers(1, 2)), draw(st.sampled_from([1, 3, 40])), height, width)
    return kernel, stride, padding, shape, max(padding) + draw(st.integers(0, 1)), draw(st.integers(0, 2))


def pooled(
    target: Target, x: Tensor, kind: pooling.Kind, kernel: Pair, stride: Pair, padding: Pair, pad: int, gap: int,
    counts: bool = True, threads: int = 1,
) -> Tensor:  # fmt: skip
    sizes = [(size + 2 * p - k) // s + 1 for size, k, s, p in zip(x.shape[2:], kernel, stride, padding, strict=True)]
    source, out = hold(Planes(*x.shape, pad), x), hold(Planes(*x.shape[:2], *sizes, gap), dirty=True)
    calls = pooling.pool(
        target, source.planes, out.planes, kind=kind, kernel=kernel, stride=stride, padding=padding, counts_padding=counts
    )
    run(calls, target, threads)
    out.check()
    return out.pixels


@quick
@given(every, windows(), st.booleans())
def test_the_largest_is_torchs_bit_for_bit(
    target: Target, window: tuple[Pair, Pair, Pair, tuple[int, int, int, int], int, int], special: bool
) -> None:
    kernel, stride, padding, shape, pad, gap = window
    x = draw(shape, 0) - 3  # mostly negative: a border that counted would show
    if special:
        chosen = torch.rand(shape, generator=generator(1, "pooling"))
        x[chosen < 0.1], x[chosen > 0.8], x[(chosen > 0.4) & (chosen < 0.45)] = math.nan, -math.inf, math.inf
    expected = F.max_pool2d(x, kernel, stride, padding)
    results = [pooled(target, x, "max", kernel, stride, padding, pad, gap, threads=threads) for threads in (1, 2, 3)]
    torch.testing.assert_close(results[0], expected, rtol=0, atol=0, equal_nan=True)
    assert len({bits(result) for result in results}) == 1


@quick
@given(every, windows(), st.booleans())
def test_the_mean_is_torchs(
    target: Target, window: tuple[Pair, Pair, Pair, tuple[int, int, int, int], int, int], counts: bool
) -> None:
    kernel, stride, padding, shape, pad, gap = window
    x = draw(shape, 2)
    expected = F.avg_pool2d(x.double(), kernel, stride, padding, count_include_pad=counts)
    allowed = F.avg_pool2d(x.abs().double(), kernel, stride, padding, count_include_pad=counts)
    results = [pooled(target, x, "mean", kernel, stride, padding, pad, gap, counts, threads) for threads in (1, 2, 3)]
    assert ((results[0].double() - expected).abs() <= (kernel[0] * kernel[1] + 1) * EPS * allowed + 1e-40).all()
    assert len({bits(result) for result in results}) == 1


@pytest.mark.parametrize("target", TARGETS, ids=lambda one: one.name)
def test_all_widths_of_vectors_agree(target: Target) -> None:
    x = draw((1, 1, 9, 40), 3)
    wide = {kind: pooled(target, x, kind, (3, 3), (1, 1), (1, 1), 1, 0) for kind in ("max", "mean")}
    for width in range(3, 40):
        for kind, whole in wide.items():
            part = pooled(target, x[..., :width], kind, (3, 3), (1, 1), (1, 1), 1, 0)  # type: ignore[arg-type]
            assert bits(part[..., :-1]) == bits(whole[..., : width - 1])


@quick
@given(every, st.integers(1, 3), st.integers(1, 40), st.integers(1, 20), st.integers(1, 40), st.integers(0, 2))
def test_the_mean_of_planes_is_exact_to_rounding(
    target: Target, batch: int, channels: int, height: int, width: int, pad: int
) -> None:
    x = draw((batch, channels, height, width), 4)
    source, out = hold(Planes(*x.shape, pad), x), hold(Planes(batch, channels, 1, 1, pad), dirty=True)
    expected = x.double().mean((2, 3))
    allowed = x.abs().double().mean((2, 3)) * (height * width + 1) * EPS
    results = []
    for threads in (1, 2, 3):
        flat = torch.full((batch * channels + 1,), 7.0)
        run(pooling.mean(target, source.planes, out.planes), target, threads)
        run(pooling.mean(target, source.planes, flat.data_ptr()), target, threads)
        out.check()
        assert flat[-1] == 7
        assert bits(flat[:-1]) == bits(out.pixels)
        results.append(flat[:-1].view(batch, channels))
    assert ((results[0].double() - expected).abs() <= allowed).all()
    assert len({bits(result) for result in results}) == 1


@pytest.mark.parametrize("target", TARGETS, ids=lambda one: one.name)
def test_nan_and_infinity_reach_the_means_that_hold_them(target: Target) -> None:
    x = torch.ones(1, 4, 6, 20)
    x[0, 1, 5, 19], x[0, 2, 0, 0] = math.nan, math.inf
    out = hold(Planes(1, 4, 1, 1))
    run(pooling.mean(target, hold(Planes(1, 4, 6, 20, 1), x).planes, out.planes), target)
    torch.testing.assert_close(out.pixels, x.mean((2, 3), keepdim=True), rtol=0, atol=0, equal_nan=True)
    expected = F.avg_pool2d(x, 3, 2, 1)
    torch.testing.assert_close(
        pooled(target, x, "mean", (3, 3), (2, 2), (1, 1), 1, 0), expected, rtol=1e-6, atol=0, equal_nan=True
    )


def test_what_cannot_be_right_is_refused() -> None:
    target, source = TARGETS[0], Planes(1, 2, 6, 6, 1)
    out = replace(source, height=3, width=3)

    def refused(
        words: str, source: Planes = source, out: Planes = out, kernel: Pair = (3, 3), padding: Pair = (1, 1)
    ) -> None:
        with pytest.raises(ModelError, match=words):
            pooling.pool(target, source, out, kind="max", kernel=kernel, stride=(2, 2), padding=padding)

    refused("at most half", padding=(2, 1))
    refused("at least 1", kernel=(0, 3), padding=(0, 1))
    refused(r"\(1, 2, 3, 3\)", out=source)
    refused("pad of at least 1", source=replace(source, pad=0))
    with pytest.raises(ModelError, match="one pixel"):
        pooling.mean(target, source, out)
    with pytest.raises(ModelError, match="no mean"):
        pooling.mean(target, replace(source, height=0), 0)
    empty = replace(source, batch=0)
    assert pooling.pool(target, empty, replace(out, batch=0), kind="max", kernel=(3, 3), stride=(2, 2), padding=(1, 1)) == []
    assert all(call.units == 0 for call in pooling.mean(target, empty, 0))
