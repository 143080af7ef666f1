"""Planes with memory of their own, for tests: what a kernel reads, what it wrote, and whether the gaps are still zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from openwork.runtime.kernels.launch import Call, Program
from openwork.runtime.kernels.planes import LINE, Planes
from openwork.runtime.kernels.target import Target, targets

TARGETS = list(targets().values())
_GUARD = 64


def aligned(count: int, fill: float = 0.0) -> Tensor:
    """Return float32 numbers that start on a cache line."""
    memory = torch.full((count + LINE,), fill)
    return memory[-memory.data_ptr() // 4 % LINE :][:count]


@dataclass(frozen=True)
class Held:
    """Planes and their memory, with NaN before and after it."""

    planes: Planes
    memory: Tensor

    @property
    def pixels(self) -> Tensor:
        """A view (batch, channels, height, width)."""
        planes = self.planes
        shape = (planes.batch, planes.channels, planes.height, planes.width)
        strides = (planes.image, planes.plane, planes.pitch, 1)
        return self.memory.as_strided(shape, strides, self.memory.storage_offset() + _GUARD + planes.origin)

    def check(self) -> None:
        """Assert that everything but the pixels is zero, and the guards untouched."""
        twin = self.memory.clone()
        Held(self.planes, twin).pixels.zero_()
        assert torch.isnan(twin[:_GUARD]).all()
        assert torch.isnan(twin[-_GUARD:]).all()
        assert (twin[_GUARD:-_GUARD] == 0).all()


def hold(planes: Planes, content: Tensor | None = None, *, dirty: bool = False) -> Held:
    """Return planes with memory; `dirty` fills the pixels and the gaps between rows with NaN, to be written over."""
    count = -(-planes.floats // LINE) * LINE
    memory = aligned(_GUARD * 2 + count, float("nan"))
    memory[_GUARD : _GUARD + count] = 0.0
    memory = memory[: 2 * _GUARD + count]
    held = Held(replace(planes, address=memory.data_ptr() + 4 * (_GUARD + planes.origin)), memory)
    if content is not None:
        held.pixels.copy_(content)
    elif dirty and planes.height and planes.width:
        wide = replace(planes, width=planes.pitch, pad=0)
        strides = (planes.image, planes.plane, planes.pitch, 1)
        memory.as_strided(
            (wide.batch, wide.channels, wide.height, wide.width), strides, memory.storage_offset() + _GUARD + planes.origin
        ).fill_(float("nan"))
    return held


def run(calls: Sequence[Call], target: Target, threads: int = 1) -> None:
    """Run one stage."""
    Program([calls], target).run(threads)


def bits(tensor: Tensor) -> bytes:
    """Return the bytes of a tensor: equal only if all bits are."""
    return np.ascontiguousarray(tensor.detach().numpy()).tobytes()
