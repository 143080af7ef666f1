from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from openwork.core.rng import generator
from openwork.errors import ModelError
from openwork.runtime.kernels import depthwise
from openwork.runtime.kernels.planes import Planes
from openwork.runtime.kernels.target import Target
from tests.runtime.kernels.planes_tools import TARGETS, Held, aligned, bits, hold, run

pytestmark = pytest.mark.skipif(not TARGETS, reason="no LLVM on this machine")
quick = settings(max_examples=25, deadline=None, derandomize=True)
every = st.sampled_from(TARGETS or [None])
EPS = 2.0**-24


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=generator(seed, "depthwise", *shape))


def size(length: int, kernel: int, stride: int, padding: int) -> int:
    return max(0, (length + 2 * padding - kernel) // stride + 1)


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[int, int, int, int], int, int, int, int, int]:
    kernel, stride = draw(st.sampled_from([1, 2, 3, 3, 4, 5, 7])), draw(st.sampled_from([1, 1, 2, 2, 3, 5]))
    padding = draw(st.integers(0, min(kernel - 1, kernel // 2 + 1)))
    least = max(1, kernel - 2 * padding)
    height, width = draw(st.integers(least, 17) | st.just(33)), draw(st.integers(least, 40))
    shape = (draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 3, 70])), height, width)
    return shape, kernel, stride, padding, padding + draw(st.integers(0, 2)), draw(st.integers(0, 3))


def convolve(
    target: Target, x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int, pad: int, gap: int, threads: int = 1,
    limits: Tensor | None = None,
) -> Held:  # fmt: skip
    kernel = weight.shape[-1]
    source = hold(Planes(*x.shape, pad), x)
    out = hold(Planes(*x.shape[:2], *(size(length, kernel, stride, padding) for length in x.shape[2:]), gap), dirty=True)
    act = "none" if limits is None else "clamp"
    address = 0 if limits is None else limits.data_ptr()
    calls = depthwise.calls(
        target, source.planes, out.planes, weight.data_ptr(), bias.data_ptr(), kernel, stride, padding, act, address
    )
    run(calls, target, threads)
    out.check()
    return out


@quick
@given(every, cases())
def test_it_is_torchs_convolution_in_groups(
    target: Target, case: tuple[tuple[int, int, int, int], int, int, int, int, int]
) -> None:
    shape, kernel, stride, padding, pad, gap = case
    x, weight, bias = draw(shape, 0), draw((shape[1], 1, kernel, kernel), 1), draw((shape[1],), 2)

    def exact(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.conv2d(x.double(), weight.double(), bias.double(), stride, padding, groups=shape[1])

    expected, allowed = exact(x, weight, bias), exact(x.abs(), weight.abs(), bias.abs()) * (kernel * kernel + 1) * EPS
    out = convolve(target, x, weight, bias, stride, padding, pad, gap).pixels
    assert ((out.double() - expected).abs() <= allowed + 1e-38).all()
    for threads in (2, 3):
        assert bits(convolve(target, x, weight, bias, stride, padding, pad, gap, threads).pixels) == bits(out)


@quick
@given(every, cases())
def test_whole_numbers_are_exact_and_then_clamped(
    target: Target, case: tuple[tuple[int, int, int, int], int, int, int, int, int]
) -> None:
    shape, kernel, stride, padding, pad, gap = case
    x, weight, bias = (
        (4 * draw(size, seed)).round() for seed, size in enumerate([shape, (shape[1], 1, kernel, kernel), shape[1:2]])
    )
    expected = torch.conv2d(x, weight, bias, stride, padding, groups=shape[1]).clamp(0, 6)
    limits = torch.tensor([0.0, 6.0])
    assert torch.equal(convolve(target, x, weight, bias, stride, padding, pad, gap, limits=limits).pixels, expected)


@quick
@given(every, st.integers(1, 40), st.integers(1, 20), st.sampled_from([3, 4]), st.sampled_from([1, 2]))
def test_strips_and_vectors_do_not_change_a_bit(target: Target, width: int, height: int, kernel: int, stride: int) -> None:
    padding = kernel // 2
    x, weight, bias = draw((1, 2, height, width), 3), draw((2, 1, kernel, kernel), 4), draw((2,), 5)
    out = convolve(target, x, weight, bias, stride, padding, padding, 0)
    source = hold(Planes(*x.shape, padding), x)
    call = depthwise.calls(target, source.planes, out.planes, weight.data_ptr(), bias.data_ptr(), kernel, stride, padding)[0]
    expected = bits(out.pixels)
    for rows, lanes in ((1, 1), (2, 4), (7, 1)):
        if rows <= out.planes.height and lanes <= out.planes.width:
            out.pixels.fill_(math.nan)
            other = replace(call, address=depthwise.address(target, kernel, stride, rows, lanes))
            run([other], target)
            out.check()
            assert bits(out.pixels) == expected


@pytest.mark.parametrize("target", TARGETS, ids=lambda one: one.name)
def test_a_nan_or_infinity_reaches_its_window_only(target: Target) -> None:
    x, weight = torch.zeros(1, 1, 9, 21), torch.ones(1, 1, 3, 3)
    x[0, 0, 0, 20], x[0, 0, 5, 0] = math.nan, math.inf
    for stride in (1, 2):
        expected = torch.conv2d(x, weight, None, stride, 1)
        out = convolve(target, x, weight, torch.zeros(1), stride, 1, 1, 1).pixels
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


def test_pixels_beyond_the_last_plane_are_never_read_from_foreign_memory() -> None:
    for target in TARGETS:
        for height, width, kernel, stride, padding in ((3, 14, 3, 2, 0), (1, 1, 1, 2, 0), (7, 7, 7, 1, 0), (2, 3, 5, 2, 2)):
            source = Planes(1, 1, height, width, padding)
            out = Planes(1, 1, size(height, kernel, stride, padding), size(width, kernel, stride, padding))
            lanes, masked = depthwise._lanes(target, source, out, kernel, stride, padding)
            vectors = -(-out.width // lanes) * lanes if masked else out.width
            last = (out.height - 1) * stride + kernel - 1 - padding
            read = last * source.pitch + (vectors - 1) * stride + kernel - 1 - padding + stride
            assert source.origin + read < source.floats, (target.name, source, out)


def test_what_cannot_be_right_is_refused() -> None:
    target, weights = TARGETS[0], aligned(18)
    source, out = hold(Planes(1, 2, 5, 5, 1)).planes, hold(Planes(1, 2, 5, 5)).planes
    bad = [
        (source, out, 8, 1, 1, "size of 1 to 7"),
        (source, out, 3, 0, 1, "stride of at least 1"),
        (source, out, 3, 1, 3, "padding below"),
        (source, out, 3, 2, 1, r"\(1, 2, 3, 3\)"),
        (replace(source, pad=0), out, 3, 1, 1, "pad of at least 1"),
    ]
    for one, two, kernel, stride, padding, words in bad:
        with pytest.raises(ModelError, match=words):
            depthwise.calls(target, one, two, weights.data_ptr(), weights.data_ptr(), kernel, stride, padding)
    empty = Planes(0, 2, 5, 5, 1)
    assert depthwise.calls(target, empty, replace(empty, pad=0), weights.data_ptr(), weights.data_ptr(), 3, 1, 1) == []
