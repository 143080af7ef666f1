"""Patterns: which masks are legal.

A pattern cuts a weight into units (a weight, a block, a channel) and lays the units out as competitions: rows of which
a given number stays. Selecting, dropping and growing are then the same for every pattern.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from openwork.core.select import count_of, top, top_rows
from openwork.errors import PatternError


class Pattern(ABC):
    """A family of legal masks; subclasses say how units are laid out.

    Attributes:
        balanced: every competition keeps its own number of units, so layers cannot compete with one another.
    """

    balanced: ClassVar[bool] = False

    @abstractmethod
    def tiles(self, score: Tensor) -> Tensor:
        """Return the unit scores as (competitions, units); a unit's score is the sum over its weights.

        Raises:
            PatternError: if the pattern does not divide a weight of this shape.
        """

    @abstractmethod
    def untile(self, units: Tensor, shape: torch.Size) -> Tensor:
        """Return the bool mask of `shape` that the bool `units` (competitions, units) stand for."""

    def sizes(self, shape: torch.Size) -> Tensor:
        """Return how many weights each unit of a weight of `shape` has, int64 in the layout of `tiles`."""
        units = self.tiles(torch.empty(shape, device="meta")).shape
        return torch.full(units, math.prod(shape) // max(1, math.prod(units)))

    def quota(self, density: float, width: int) -> int:
        """Return how many of a competition's `width` units stay at `density`."""
        return count_of(density, width)

    def select(self, score: Tensor, density: float) -> Tensor:
        """Return the best legal mask: the units of the highest scores, an exact number, ties to the lowest index.

        Args:
            score: finite numbers of the weight's shape.
            density: the share of units that stays, in [0, 1].

        Returns:
            bool tensor of the score's shape.

        Raises:
            PatternError: if the pattern does not divide this shape.
            MaskError: if a score is not finite or the density is out of range.
        """
        tiles = self.tiles(score)
        return self.untile(pick(tiles, self.quota(density, tiles.shape[1])), score.shape)

    def check(self, mask: Tensor) -> None:
        """Check that `mask` is legal.

        Raises:
            PatternError: naming the first unit that is kept in part.
        """
        whole = self.untile(self.tiles(mask.double()) > 0, mask.shape)
        if not torch.equal(whole, mask):
            index = tuple(int(i) for i in (whole != mask).nonzero()[0])
            raise PatternError(f"{self}: the unit around index {index} is kept in part; units stay or go whole")

    def divides(self, shape: torch.Size) -> bool:
        """Tell whether the pattern can be laid over a weight of `shape`."""
        try:
            self.tiles(torch.empty(shape, device="meta"))
        except PatternError:
            return False
        return True


def pick(tiles: Tensor, count: int) -> Tensor:
    """Return the bool mask of the `count` highest units of every competition of `tiles` (competitions, units)."""
    return top(tiles, count) if tiles.shape[0] == 1 else top_rows(tiles, count)


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Any weight may stay or go."""

    def tiles(self, score: Tensor) -> Tensor:
        """Return (1, weights)."""
        return score.reshape(1, -1)

    def untile(self, units: Tensor, shape: torch.Size) -> Tensor:
        """Return the units in the weight's shape."""
        return units.reshape(shape)


@dataclass(frozen=True)
class NM(Pattern):
    """N of every M consecutive weights along `dim` stay (Mishra et al. 2021: 2:4 along the input dimension).

    A density above n/m keeps more, up to all: gradual methods tighten from M:M over M-1:M to N:M.

    Attributes:
        n: weights that stay of a group.
        m: weights of a group.
        dim: the dimension along which groups lie; 1 is the input dimension of linear and convolution weights.
    """

    n: int
    m: int
    dim: int = 1

    balanced: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.n <= self.m:
            raise PatternError(f"{self.n}:{self.m} is no pattern; N:M needs 0 < N <= M")

    def check_density(self, density: float) -> None:
        """Raise a PatternError unless `density` is n / m, the only one that this pattern has."""
        if abs(density - self.n / self.m) > 1e-9:
            raise PatternError(f"{self.n}:{self.m} keeps {self.n / self.m:g} of every layer, not {density:g}")

    def tiles(self, score: Tensor) -> Tensor:
        """Return (groups, m)."""
        if score.dim() <= self.dim or score.shape[self.dim] % self.m:
            raise PatternError(
                f"{self.n}:{self.m} needs dimension {self.dim} of {tuple(score.shape)} to be a multiple of {self.m}; "
                "exclude this layer or choose another pattern"
            )
        return score.movedim(self.dim, -1).reshape(-1, self.m)

    def untile(self, units: Tensor, shape: torch.Size) -> Tensor:
        """Return the groups back along `dim`."""
        moved = torch.Size([*shape[: self.dim], *shape[self.dim + 1 :], shape[self.dim]])
        return units.reshape(moved).movedim(-1, self.dim).contiguous()

    def quota(self, density: float, width: int) -> int:
        """Return round(density * m), at least n: an N:M weight never keeps fewer."""
        return max(self.n, count_of(density, width))

    def check(self, mask: Tensor) -> None:
        """Check that at most N of every M stay."""
        kept = self.tiles(mask.int()).sum(dim=1)
        if bool((kept > self.n).any()):
            group = int((kept > self.n).int().argmax())
            raise PatternError(f"{self}: group {group} keeps {int(kept[group])} of {self.m}, allowed are {self.n}")


@dataclass(frozen=True)
class Block(Pattern):
    """Blocks of `rows` x `cols` of the weight as a matrix (out, in * kernel) stay or go whole."""

    rows: int
    cols: int = 1

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1:
            raise PatternError(f"a block of {self.rows}x{self.cols} is empty; both sides must be at least 1")

    def tiles(self, score: Tensor) -> Tensor:
        """Return (1, blocks), row by row of blocks."""
        return _blocks(score, self.rows, self.cols, str(self)).sum(dim=(1, 3)).reshape(1, -1)

    def untile(self, units: Tensor, shape: torch.Size) -> Tensor:
        """Return every unit repeated over its block."""
        return _unblock(units, shape, self.rows, self.cols)


@dataclass(frozen=True)
class KernelGroup(Pattern):
    """Groups of `out` consecutive output channels share one pattern over the input side (SparseByteNN).

    Where `out` does not divide the output channels, those left over are a smaller group at the end. Its units count
    like any other and compete by their mean: their sums are scaled up to `out` channels. By their plain sums they would
    lose to units of more weights, and the last channels would be cut off.

    Attributes:
        out: output channels of a group.
        unit: "kernel" keeps or drops whole kernels (out, kh, kw), "point" each kernel position by itself.
        balance: "layer" lets all groups compete, "row" keeps the same number in every group.
    """

    out: int
    unit: Literal["kernel", "point"] = "kernel"
    balance: Literal["layer", "row"] = "layer"

    def __post_init__(self) -> None:
        if self.out < 1 or self.unit not in ("kernel", "point") or self.balance not in ("layer", "row"):
            raise PatternError(f"{self}: needs out >= 1, unit 'kernel' or 'point', balance 'layer' or 'row'")

    def tiles(self, score: Tensor) -> Tensor:
        """Return (1, units), or (groups, units of a group) when balanced by row; leftover units scaled to `out` channels."""
        width, name = self._width(score.shape), str(self)
        left = score.shape[0] % self.out if score.dim() > 1 else 0
        whole = score if not left else score[: score.shape[0] - left]
        sums = [_blocks(whole, self.out, width, name).sum(dim=(1, 3))] if whole.numel() or not left else []
        if left:
            sums.append(_blocks(score[-left:], left, width, name).sum(dim=(1, 3)) * (self.out / left))
        units = torch.cat(sums)
        return units if self.balance == "row" else units.reshape(1, -1)

    def untile(self, units: Tensor, shape: torch.Size) -> Tensor:
        """Return every unit repeated over its group of kernels."""
        groups = -(-shape[0] // self.out)
        full = torch.Size([groups * self.out, *shape[1:]])
        return _unblock(units, full, self.out, self._width(shape))[: shape[0]].contiguous()

    def sizes(self, shape: torch.Size) -> Tensor:
        """Return how many weights each unit of a weight of `shape` has, int64 in the layout of `tiles`."""
        groups, width = -(-shape[0] // self.out), self._width(shape)
        rows = torch.full((groups,), self.out)
        rows[-1] = shape[0] - self.out * (groups - 1)
        units = (rows * width).unsqueeze(1).expand(groups, math.prod(shape[1:]) // width)
        return units.contiguous() if self.balance == "row" else units.reshape(1, -1)

    @property
    def balanced(self) -> bool:  # type: ignore[override]
        """Tell whether every group keeps the same number."""
        return self.balance == "row"

    def _width(self, shape: torch.Size) -> int:
        return math.prod(shape[2:]) if self.unit == "kernel" else 1


@dataclass(frozen=True)
class Channel(Pattern):
    """Whole slices along `dim` stay or go: 0 = output channels, 1 = input channels."""

    dim: int = 0

    def tiles(self, score: Tensor) -> Tensor:
        """Return (1, channels)."""
        if score.dim() <= self.dim:
            raise PatternError(f"{self}: a weight of shape {tuple(score.shape)} has no dimension {self.dim}")
        return _wide(score).movedim(self.dim, 0).reshape(score.shape[self.dim], -1).sum(dim=1).reshape(1, -1)

    def untile(self, units: Tensor, shape: torch.Size) -> Tensor:
        """Return every unit repeated over its channel."""
        lines = [1] * len(shape)
        lines[self.dim] = shape[self.dim]
        return units.reshape(lines).expand(shape).contiguous()


@dataclass(frozen=True)
class Layer(Pattern):
    """The weight stays or goes as a whole."""

    def tiles(self, score: Tensor) -> Tensor:
        """Return (1, 1)."""
        return _wide(score).sum().reshape(1, 1)

    def untile(self, units: Tensor, shape: torch.Size) -> Tensor:
        """Return the one unit everywhere."""
        return units.reshape([1] * len(shape)).expand(shape).contiguous()


def parse(text: str) -> Pattern:
    """Return the pattern that `text` names.

    `unstructured`, `2:4` (N:M), `block4x1`, `group8` (kernel groups of 8 output channels), `channel`, `channel1`,
    `layer`.

    Raises:
        PatternError: for any other text.
    """
    word = text.strip().lower()
    if match := re.fullmatch(r"(\d+):(\d+)", word):
        return NM(int(match[1]), int(match[2]))
    if match := re.fullmatch(r"block(\d+)x(\d+)", word):
        return Block(int(match[1]), int(match[2]))
    if match := re.fullmatch(r"group(\d+)", word):
        return KernelGroup(int(match[1]))
    if match := re.fullmatch(r"channel([01]?)", word):
        return Channel(int(match[1] or 0))
    if word == "layer":
        return Layer()
    if word == "unstructured":
        return Unstructured()
    raise PatternError(f"unknown pattern {text!r}: use unstructured, N:M such as 2:4, block4x1, group8, channel or layer")


def _wide(score: Tensor) -> Tensor:
    """Return half-precision scores as float32, in which a unit's sum neither overflows nor loses the order of units."""
    return score.float() if score.dtype in (torch.float16, torch.bfloat16) else score


def _blocks(score: Tensor, rows: int, cols: int, name: str) -> Tensor:
    """View a weight as (row blocks, rows, column blocks, cols)."""
    out = score.shape[0] if score.dim() else 0
    rest = score.numel() // out if out else 0
    if score.dim() < 2 or not rest or out % rows or rest % cols:
        raise PatternError(
            f"{name} does not divide a weight of shape {tuple(score.shape)}, a matrix of {out}x{rest}; "
            "exclude this layer or choose another pattern"
        )
    return _wide(score).reshape(out // rows, rows, rest // cols, cols)


def _unblock(units: Tensor, shape: torch.Size, rows: int, cols: int) -> Tensor:
    out, rest = shape[0], math.prod(shape[1:])
    grid = units.reshape(out // rows, 1, rest // cols, 1)
    return grid.expand(out // rows, rows, rest // cols, cols).reshape(shape)
