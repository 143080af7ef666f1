from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from openwork.core.rng import generator
from openwork.errors import ModelError
from openwork.runtime.kernels import jit, layout
from openwork.runtime.kernels.emit import Emitter
from openwork.runtime.kernels.launch import Call
from openwork.runtime.kernels.layout import Images
from openwork.runtime.kernels.planes import Planes
from openwork.runtime.kernels.target import Target
from tests.runtime.kernels.planes_tools import TARGETS, aligned, bits, hold, run

pytestmark = pytest.mark.skipif(not TARGETS, reason="no LLVM on this machine")
quick = settings(max_examples=60, deadline=None, derandomize=True)
every = st.sampled_from(TARGETS or [None])
orders = st.sampled_from([(0, 1, 2, 3), (0, 2, 3, 1), (1, 0, 2, 3), (3, 2, 1, 0), (0, 1, 3, 2)])
sizes = st.tuples(
    st.integers(1, 2), st.integers(1, 5) | st.sampled_from([12, 35, 70]), st.integers(1, 9), st.integers(1, 40)
)


def random(shape: tuple[int, ...], seed: int) -> Tensor:
    values = torch.randn(shape, generator=generator(seed, "layout"))
    if values.numel() > 2:
        values.view(-1)[:2] = torch.tensor([float("nan"), float("inf")])
    return values


def strided(shape: tuple[int, int, int, int], order: tuple[int, ...], step: int, seed: int) -> Tensor:
    """A tensor whose axes lie in memory in the given order, every `step`-th number of the last one."""
    lying = [shape[axis] for axis in order]
    memory = random((*lying[:-1], lying[-1] * step), seed)[..., ::step]
    return memory.permute(*np.argsort(order).tolist())


def images(tensor: Tensor) -> Images:
    return Images(tensor.data_ptr(), *tensor.shape, strides=tuple(tensor.stride()))  # type: ignore[arg-type]


def phases(x: Tensor, stride: int, height: int, width: int) -> Tensor:
    """The definition, pixel by pixel."""
    n, c, h, w = x.shape
    out = torch.zeros(n, c * stride * stride, height, width)
    for a in range(stride):
        for b in range(stride):
            part = x[:, :, a::stride, b::stride][:, :, :height, :width]
            for channel in range(c):
                out[:, (channel * stride + a) * stride + b, : part.shape[2], : part.shape[3]] = part[:, channel]
    assert h >= 1
    assert w >= 1
    return out


@quick
@given(every, sizes, orders, st.sampled_from([1, 1, 2]), st.integers(0, 3), st.sampled_from([1, 2, 3, 4, 5]), st.data())
def test_planes_hold_the_phases_of_any_tensor(
    target: Target,
    shape: tuple[int, int, int, int],
    order: tuple[int, ...],
    step: int,
    pad: int,
    stride: int,
    data: st.DataObject,
) -> None:
    x = strided(shape, order, step, 0)
    height = -(-shape[2] // stride) + data.draw(st.integers(-1, 1))
    width = -(-shape[3] // stride) + data.draw(st.integers(-1, 2))
    expected = phases(x, stride, height, width)
    results = []
    for threads in (1, 2, 3):
        out = hold(Planes(*expected.shape, pad), dirty=True)
        run(layout.split(target, images(x), out.planes, stride), target, threads)
        out.check()
        results.append(bits(out.pixels))
    assert results == [bits(expected)] * 3


@quick
@given(every, sizes, orders, st.sampled_from([1, 1, 2]), st.integers(0, 3))
def test_planes_become_tensors_of_any_strides(
    target: Target, shape: tuple[int, int, int, int], order: tuple[int, ...], step: int, pad: int
) -> None:
    content = random(shape, 1)
    source = hold(Planes(*shape, pad), content)
    for threads in (1, 3):
        out = strided(shape, order, step, 2)
        storage = out.as_strided((out.untyped_storage().nbytes() // 4,), (1,), 0)
        before, mine = storage.clone(), torch.zeros_like(storage)
        mine.as_strided(out.shape, out.stride()).fill_(1)
        run(layout.merge(target, source.planes, images(out)), target, threads)
        assert bits(out) == bits(content)
        assert bits(storage[mine == 0]) == bits(before[mine == 0])


@quick
@given(every, sizes, st.integers(0, 3), st.integers(0, 3))
def test_planes_are_copied_to_planes_of_another_pad(
    target: Target, shape: tuple[int, int, int, int], pad: int, other: int
) -> None:
    source, out = hold(Planes(*shape, pad), random(shape, 3)), hold(Planes(*shape, other), dirty=True)
    run(layout.split(target, source.planes, out.planes), target)
    out.check()
    assert bits(out.pixels) == bits(source.pixels)


def test_a_strided_convolution_is_one_of_stride_1_over_phases() -> None:
    x = torch.randn(1, 3, 11, 14, generator=generator(0, "phases"))
    weight = torch.randn(4, 3, 3, 3, generator=generator(1, "phases"))
    expected = torch.conv2d(x.double(), weight.double(), stride=2, padding=1)
    for target in TARGETS:
        out = hold(Planes(1, 12, 6, 7, 1))
        run(layout.split(target, images(x), out.planes, 2), target)
        wide = torch.nn.functional.pad(out.pixels.double(), (1, 1, 1, 1))
        taps = torch.zeros(4, 12, 3, 3, dtype=torch.float64)
        for dy in range(3):
            for dx in range(3):
                (q, a), (r, b) = divmod(dy - 1, 2), divmod(dx - 1, 2)
                taps[:, 2 * a + b :: 4, q + 1, r + 1] = weight[:, :, dy, dx].double()
        found = torch.conv2d(wide, taps)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


tokens = st.integers(1, 40) | st.sampled_from([64, 65, 100, 130])
features = st.integers(1, 40) | st.sampled_from([64, 65, 130, 200])


@quick
@given(every, tokens, features, st.integers(1, 4), st.integers(0, 5), st.sampled_from([1, 2, 3]))
def test_tokens_become_panels_and_panels_tokens(
    target: Target, count: int, width: int, vectors: int, gap: int, threads: int
) -> None:
    wide = vectors * target.lanes
    tiles = -(-count // wide)
    x = random((count, width + gap), 4)[:, :width]
    panels = aligned(tiles * width * wide, float("nan")).view(tiles, width, wide)
    run(layout.pack_tokens(target, x.data_ptr(), width + gap, count, width, panels.data_ptr(), wide), target, threads)
    expected = torch.zeros(tiles * wide, width)
    expected[:count] = x
    assert bits(panels) == bits(expected.view(tiles, wide, width).transpose(1, 2))
    panels[-1, :, wide - (tiles * wide - count) :] = float("inf")
    back = torch.full((count + 1, width + gap), 7.0)
    run(layout.unpack_tokens(target, panels.data_ptr(), count, width, back.data_ptr(), width + gap, wide), target, threads)
    assert bits(back[:count, :width]) == bits(x)
    assert (back[:, width:] == 7).all()
    assert (back[count] == 7).all()


@pytest.mark.parametrize("target", TARGETS, ids=lambda one: one.name)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16])
def test_vectors_are_transposed_and_taken_apart(target: Target, count: int) -> None:
    for lanes, kind in ((count, "transpose"), (target.lanes, "deinterleave"), (1, "deinterleave")):
        if kind == "transpose" and count & (count - 1):
            continue

        def build(name: str, lanes: int = lanes, kind: str = kind) -> str:
            e = Emitter(name, target)
            x, y = e.pointer(0), e.pointer(1)
            vectors = [e.load(e.item(x, e.int(k * lanes), e.f32), e.vector(lanes=lanes)) for k in range(count)]
            for k, value in enumerate(getattr(e, kind)(vectors)):
                e.store(value, e.item(y, e.int(k * lanes), e.f32))
            return e.text()

        name = f"test_{kind}_{count}_{lanes}_{target.name}"
        x, y = torch.arange(float(count * lanes)), torch.full((count * lanes,), -1.0)
        where = jit.address(name, target, lambda name=name, build=build: build(name))
        run([Call(where, np.array([x.data_ptr(), y.data_ptr()], np.int64), 1)], target)
        shape = (count, lanes) if kind == "transpose" else (lanes, count)
        assert torch.equal(y, x.view(shape).t().reshape(-1))


def test_sizes_that_do_not_fit_are_refused() -> None:
    x = torch.zeros(1, 3, 4, 4)
    with pytest.raises(ModelError, match="12 planes and not 1 of 3"):
        layout.split(TARGETS[0], images(x), Planes(1, 3, 2, 2), 2)
    with pytest.raises(ModelError, match="same sizes"):
        layout.merge(TARGETS[0], Planes(1, 3, 4, 5), images(x))
    assert layout.split(TARGETS[0], images(torch.zeros(0, 3, 4, 4)), Planes(0, 3, 4, 4)) == []
    assert layout.pack_tokens(TARGETS[0], 0, 4, 0, 4, 0, 16)[0].units == 0
