"""The operations without a product: sums, activations, scales, pools. All keep the channels apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from openwork.runtime.graph.ops import NOTHING, Floats, Geometry, Setting, Shape, Stage, Tail
from openwork.runtime.kernels import elementwise, pooling
from openwork.runtime.kernels.planes import Planes


class _Pointwise:
    """What works pixel by pixel: the shape stays, nothing beyond the border is read, no memory of its own is needed."""

    inputs: tuple[int, ...]

    def tied(self) -> tuple[int, ...]:
        """Return all inputs."""
        return self.inputs

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """Return the shape of the first input."""
        return shapes[0]

    def reach(self) -> int:
        """Return how many zeros are read beyond the border: none."""
        return 0

    def scratch(self, ins: Sequence[Planes], out: Planes) -> list[Planes]:
        """Return the planes that it needs for itself: none."""
        return []


@dataclass(frozen=True, eq=False)
class Add(_Pointwise):
    """The sum of two images of one shape, then an activation."""

    name: str
    inputs: tuple[int, ...]
    tail: Tail = NOTHING

    def stages(self, s: Setting, ins: Sequence[Planes], out: Planes, scratch: Sequence[Planes]) -> list[Stage]:
        """Return one stage."""
        return [elementwise.add(s.target, ins[0], ins[1], out, act=self.tail.act, limits=s.held(self.tail.limits))]


@dataclass(frozen=True, eq=False)
class Activate(_Pointwise):
    """An activation by itself, after a factor and a shift for each channel where there are any (a batch norm)."""

    name: str
    inputs: tuple[int, ...]
    tail: Tail = NOTHING
    factor: Floats | None = None
    shift: Floats | None = None

    def stages(self, s: Setting, ins: Sequence[Planes], out: Planes, scratch: Sequence[Planes]) -> list[Stage]:
        """Return one stage."""
        limits = s.held(self.tail.limits)
        if self.factor is None or self.shift is None:
            return [elementwise.activate(s.target, ins[0], out, act=self.tail.act, limits=limits)]
        factor, shift = s.held(self.factor), s.held(self.shift)
        return [elementwise.affine(s.target, ins[0], out, factor, shift, act=self.tail.act, limits=limits)]


@dataclass(frozen=True, eq=False)
class Scale(_Pointwise):
    """An image times one number a channel: the second input is (batch, channels, 1, 1). Squeeze and excitation."""

    name: str
    inputs: tuple[int, ...]

    def tied(self) -> tuple[int, ...]:
        """Return the image; the numbers are planes of one pixel."""
        return self.inputs[:1]

    def stages(self, s: Setting, ins: Sequence[Planes], out: Planes, scratch: Sequence[Planes]) -> list[Stage]:
        """Return one stage."""
        return [elementwise.scale(s.target, ins[0], ins[1], out)]


@dataclass(frozen=True, eq=False)
class Pool(_Pointwise):
    """The largest or the mean of a window."""

    name: str
    inputs: tuple[int, ...]
    geometry: Geometry
    kind: Literal["max", "mean"] = "max"
    counts_padding: bool = True

    def tied(self) -> tuple[int, ...]:
        """Return nothing: rows are addressed one by one."""
        return ()

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """Return (batch, channels, height, width)."""
        batch, channels, height, width = shapes[0]
        return (batch, channels, *self.geometry.out(height, width))

    def reach(self) -> int:
        """Return how many pixels the window reaches beyond the border."""
        return max(self.geometry.padding)

    def stages(self, s: Setting, ins: Sequence[Planes], out: Planes, scratch: Sequence[Planes]) -> list[Stage]:
        """Return one stage."""
        return [
            pooling.pool(
                s.target, ins[0], out, kind=self.kind, kernel=self.geometry.kernel, stride=self.geometry.stride,
                padding=(self.geometry.padding[0], self.geometry.padding[2]), counts_padding=self.counts_padding,
            )
        ]  # fmt: skip


@dataclass(frozen=True, eq=False)
class Mean(_Pointwise):
    """The mean over all pixels: (batch, channels, 1, 1)."""

    name: str
    inputs: tuple[int, ...]

    def tied(self) -> tuple[int, ...]:
        """Return nothing: rows are addressed one by one."""
        return ()

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """Return (batch, channels, 1, 1)."""
        return (*shapes[0][:2], 1, 1)

    def stages(self, s: Setting, ins: Sequence[Planes], out: Planes, scratch: Sequence[Planes]) -> list[Stage]:
        """Return one stage."""
        return [pooling.mean(s.target, ins[0], out)]
