"""Products with few columns, one at a time: a sparse weight packed for the layer of a batch of one.

Three layouts (see `kernels.matvec` and `kernels.nm`): any weight, weights whose rows go in blocks, and N:M weights. A zero
weight skips its x, so that an infinity or NaN there does no harm, except inside a block of rows that is kept.

Weights may be stored in bfloat16 or int8 (a scale a row), which the formats never choose by themselves: the product is
then that of the rounded weights (`unpack`) within `bounds.bound`, and the rounding is bounded by `kernels.precision.error`.

Where there are no kernels, or other ones than the weight was packed for, the same weights go to torch's compressed rows.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from openwork.errors import ModelError
from openwork.runtime.formats import _common as common
from openwork.runtime.kernels import arrange, launch, matvec, nm
from openwork.runtime.kernels import precision as rounding
from openwork.runtime.kernels.activations import Act
from openwork.runtime.kernels.precision import PRECISIONS, Precision
from openwork.runtime.kernels.target import Target, host, targets
from openwork.runtime.launching import Pool, Ready

BLOCKS = (16, 8, 4, 2)
"""Rows of a block, the first that fits is taken."""
GROUPS = (4, 8, 16)
"""The M of N:M that are tried."""
PRICE = 2.5
"""What an entry of sliced rows costs where a place of an N:M part costs 1."""
SMALL = 3 * 2**15
"""Multiply-adds (four times as many of N:M parts) below which a second thread costs more than it brings."""

OPERANDS = (matvec.WORDS.index("x"), matvec.WORDS.index("y"))
"""Slots of x and y, the same in both kernels."""

Part = matvec.Slices | nm.Packed


@dataclass(frozen=True, eq=False)
class PackedMatVec:
    """A sparse weight (out, in) packed for products with few columns. It never changes and may be shared.

    Attributes:
        stages: the parts of each stage: a part of a later one adds to what the earlier ones wrote.
        bias: (out) float32, or None.
        shape: (out, in).
        target: what it was packed for; empty if there are no kernels.
    """

    stages: tuple[tuple[Part, ...], ...]
    bias: Tensor | None
    shape: tuple[int, int]
    target: str

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """Return itself: a packed weight never changes."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is made anew: programs, and the fallback."""
        return {name: self.__dict__[name] for name in ("stages", "bias", "shape", "target")}

    @property
    def parts(self) -> list[Part]:
        """The parts of all stages."""
        return [part for stage in self.stages for part in stage]

    @property
    def nbytes(self) -> int:
        """Bytes of weights, indices and bias."""
        return sum(part.nbytes for part in self.parts)

    @functools.cached_property
    def _work(self) -> int:
        return sum(part.multiplies // (4 if isinstance(part, nm.Packed) else 1) for part in self.parts)

    @functools.cached_property
    def _pool(self) -> Pool[int] | None:
        """The programs by number of columns; None where the kernels are not to be had."""
        if self.target not in targets():
            return None
        return Pool(functools.partial(_ready, (self.stages, self.shape, self.target)))

    @functools.cached_property
    def _plain(self) -> Any:
        from openwork.runtime.formats import csr_torch

        return csr_torch.pack(*unpack(self))


@dataclass(frozen=True)
class Given:
    """What packing starts from.

    Attributes:
        weight: (out, in), without what rounding makes zero.
        bias: (out), zeros where there is none.
        scale: (out) of `rounding.scales`.
        kept: the bias as it was given, copied.
        kind: of the stored weights.
        target: to pack for.
        shape: (out, in); where there are no inputs `weight` has one all the same.
    """

    weight: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]
    scale: npt.NDArray[np.float32]
    kept: Tensor | None
    kind: Precision
    target: Target | None
    shape: tuple[int, int]


def prepare(weight: Tensor, bias: Tensor | None, kind: Precision) -> Given:
    """Check what is to be packed, copy the bias, and drop the weights that rounding makes zero.

    Raises:
        ModelError: as `pack_rows`.
    """
    common.check_weight(weight, bias)
    if weight.dtype != torch.float32:
        raise ModelError(f"cannot pack a weight of {weight.dtype} for the sparse kernels: give float32, or use a csr format")
    if kind not in PRECISIONS:
        raise ModelError(f"there is no precision {kind!r}: choose from {', '.join(PRECISIONS)}")
    dense = weight.detach().resolve_neg().contiguous().numpy()
    kept = None if bias is None else bias.detach().clone(memory_format=torch.contiguous_format)
    added = np.zeros(len(dense), np.float32) if kept is None else kept.numpy()
    largest = np.abs(dense).max(axis=1, initial=0) if kind == "int8" else np.zeros(len(dense), np.float32)
    scale = rounding.scales(largest, kind)
    if kind != "float32":
        dense = np.where(rounding.narrow(dense, scale[:, None], kind) != 0, dense, np.float32(0))
    if dense.shape[1] == 0:
        dense = np.zeros((len(dense), 1), np.float32)  # a column of zeros, which is never read
    return Given(dense, added, scale, kept, kind, host(), (weight.shape[0], weight.shape[1]))


def pack_rows(weight: Tensor, bias: Tensor | None = None, precision: Precision = "float32") -> PackedMatVec:
    """Return weight (out, in) and bias (out), float32, packed row by row; any weight will do.

    Where the target can permute registers, the first N non-zeros of every 8 or 16 columns go to an N:M part, whose
    columns cost 4 bits and no gather; what is left over goes to sliced rows. N is the one that costs least.

    Args:
        weight: its zeros are left out.
        bias: or None.
        precision: of the stored weights.

    Raises:
        ModelError: if they are not float32 on the CPU or do not fit one another; if int8 is asked for and a weight is
            not finite.
    """
    given = prepare(weight, bias, precision)
    target = given.target
    lanes = target.lanes if target is not None and gathers(target) else 1
    if target is None or target.name not in nm.PERMUTING:
        return _packed(given, [_rows(given, given.weight)])
    m = target.lanes
    n = nm.level(given.weight, m, PRICE)
    if n == 0:
        return _packed(given, [_rows(given, given.weight, lanes)])
    first, rest = nm.split(given.weight, n, m)
    stages: list[Sequence[Part]] = [[_balanced(given, first, n, m, target)]]
    if rest.any():
        stages.append(_rows(given, rest, lanes, onto=True))
    return _packed(given, stages)


def pack_blocks(weight: Tensor, bias: Tensor | None = None, precision: Precision = "float32") -> PackedMatVec:
    """Return weight (out, in) and bias (out), float32, packed by blocks of 16, 8, 4 or 2 rows with the same columns.

    An explicit zero inside a block is multiplied like any weight. Rows left over at the end are packed one by one.

    Raises:
        ModelError: as `pack_rows`, and if fewer than 90 % of the weights of every size of block would be non-zero.
    """
    given = prepare(weight, bias, precision)
    rows = arrange.choose_block(given.weight, BLOCKS)
    if rows == 1:
        raise ModelError(
            f"the non-zeros of this weight of shape {tuple(weight.shape)} do not come in blocks of {BLOCKS[-1]} or more "
            "rows of a column: use the format sell"
        )
    return _packed(given, [[_slices(given, section) for section in arrange.sections(given.weight, rows)]])


def pack_nm(weight: Tensor, bias: Tensor | None = None, precision: Precision = "float32") -> PackedMatVec:
    """Return weight (out, in) and bias (out), float32, packed by the tightest N:M that they have.

    N is at most half of M, M is 4, 8 or 16; of those with the same N / M the smallest M. The last group of a row may be
    shorter. Groups may have fewer than N non-zeros.

    Raises:
        ModelError: as `pack_rows`, and if there is no such N:M, with the first group that has too many.
    """
    given = prepare(weight, bias, precision)
    n, m = _tightest(given.weight)
    if given.target is None or given.target.name not in nm.PERMUTING or not given.weight.any():
        return _packed(given, [_rows(given, given.weight)])
    return _packed(given, [[_balanced(given, given.weight, n, m, given.target)]])


def unpack(packed: PackedMatVec) -> tuple[Tensor, Tensor | None]:
    """Return weight (out, in) and bias (out) as they went in, a negative zero as zero; narrow weights as they are stored."""
    weight = np.zeros(packed.shape, np.float32)
    for part in packed.parts:
        if isinstance(part, nm.Packed):
            nm.unpack(part, weight)
        else:
            matvec.unpack(part, weight)
    return torch.from_numpy(weight), packed.bias


def multiply(packed: PackedMatVec, x: Tensor) -> Tensor:
    """Return `x @ weight.T + bias` for x (..., in) of any strides, without gradients: a contiguous tensor (..., out).

    Every row of x is a product by itself; the result is the same bit for bit for every number of threads and rows.

    Raises:
        ModelError: if x does not fit.
    """
    out, width = packed.shape
    common.check_input(x, width, torch.float32)
    pool = packed._pool
    if pool is None:
        return by_torch(packed._plain, x)
    leading = x.shape[:-1]
    if x.is_neg() or not x.is_contiguous():
        x = x.resolve_neg().contiguous()
    y = x.new_empty((*leading, out))
    if y.numel():
        columns = leading.numel()
        threads = torch.get_num_threads() if columns * packed._work >= SMALL else 1
        pool.run(columns, (x.data_ptr(), y.data_ptr()), threads)
    return y


def by_torch(packed: Any, x: Tensor) -> Tensor:
    """Return the product with a weight that the format csr_torch has packed, which may have no inputs."""
    from openwork.runtime.formats import csr_torch

    if x.shape[-1]:
        return csr_torch.matmul(packed, x)
    bias: Tensor = packed.bias
    return bias.expand(*x.shape[:-1], len(bias)).clone()


def calls(
    stages: tuple[tuple[Part, ...], ...], target: Target, x: int, y: int, *, columns: int = 1, x_step: int = 0,
    y_step: int = 0, act: Act = "none", limits: int = 0,
) -> list[list[launch.Call]]:  # fmt: skip
    """Return the stages of a program that multiplies: y[c] = act(W x[c] + b); OPERANDS are the slots of x and y.

    Args:
        stages: of a packed weight, which must stay alive as long as the calls.
        target: what it was packed for.
        x: address of the first column, (in) float32 side by side.
        y: address of the first column, (out) float32.
        columns: how many.
        x_step: bytes from a column of x to the next.
        y_step: bytes from a column of y to the next.
        act: what follows the sum.
        limits: address of two float32 for `clamp`.
    """
    made: list[list[launch.Call]] = []
    for number, stage in enumerate(stages):
        after: Act = act if number + 1 == len(stages) else "none"
        found: list[launch.Call] = []
        for part in stage:
            one: Callable[..., list[launch.Call]] = nm.calls if isinstance(part, nm.Packed) else matvec.calls
            found += one(target, part, x, y, columns=columns, x_step=x_step, y_step=y_step, act=after, limits=limits)
        made.append(found)
    return made


def gathers(target: Target) -> bool:
    """Return whether x is gathered faster than read one by one: measured once a process, the results are the same."""
    return target.name in matvec.GATHERING and _gathers(target)


@functools.cache
def _gathers(target: Target) -> bool:
    draw = np.random.Generator(np.random.PCG64(0))
    rows, width, each = 16 * target.lanes, 4096, 64
    section = arrange.Section(
        0,
        1,
        np.arange(rows + 1) * each,
        np.sort(draw.integers(0, width, (rows, each)), axis=1).astype(np.int32).reshape(-1),
        np.ones((rows * each, 1), np.float32),
    )
    x, y, ones = np.ones(width, np.float32), np.empty(rows, np.float32), np.ones(rows, np.float32)
    best = {}
    for lanes in (1, target.lanes):
        slices = matvec.pack(section, width, ones, ones, lanes=lanes)
        program = launch.Program([matvec.calls(target, slices, x.ctypes.data, y.ctypes.data)], target)
        times = []
        for _ in range(7):
            begun = time.perf_counter()
            program.run(1)
            times.append(time.perf_counter() - begun)
        best[lanes] = min(times)
    return best[target.lanes] < best[1]


def _slices(given: Given, section: arrange.Section, lanes: int = 1, onto: bool = False) -> matvec.Slices:
    width = given.weight.shape[1]
    return matvec.pack(section, width, given.bias, given.scale, lanes=lanes, kind=given.kind, onto=onto)


def _rows(given: Given, weight: npt.NDArray[np.float32], lanes: int = 1, onto: bool = False) -> list[matvec.Slices]:
    return [_slices(given, section, lanes, onto) for section in arrange.sections(weight, 1)]


def _balanced(given: Given, weight: npt.NDArray[np.float32], n: int, m: int, target: Target) -> nm.Packed:
    return nm.pack(weight, given.bias, given.scale, n, m, target, given.kind)


def _packed(given: Given, stages: Sequence[Sequence[Part]]) -> PackedMatVec:
    name = "" if given.target is None else given.target.name
    return PackedMatVec(tuple(tuple(stage) for stage in stages), given.kept, given.shape, name)


def _tightest(weight: npt.NDArray[np.float32]) -> tuple[int, int]:
    """Return N and M of the tightest pattern of a weight."""
    found = [(nm.fits(weight, m), m) for m in GROUPS]
    n, m = min(found, key=lambda pair: (pair[0] / pair[1], pair[1]))
    if 2 * n <= m:
        return n, m
    group, allowed = GROUPS[0], GROUPS[0] // 2
    kept = np.pad(weight != 0, ((0, 0), (0, -weight.shape[1] % group))).reshape(len(weight), -1, group).sum(axis=2)
    row, place = (int(places[0]) for places in np.nonzero(kept > allowed))
    raise ModelError(
        f"columns {group * place} to {group * place + group - 1} of row {row} keep {int(kept[row, place])} of {group}: N:M "
        f"needs N at most half of M, for an M of {', '.join(map(str, GROUPS))}; use the format sell"
    )


def _ready(packed: tuple[tuple[tuple[Part, ...], ...], tuple[int, int], str], columns: int) -> Ready:
    """Return the program for a number of columns that follow each other in memory."""
    stages, (out, width), name = packed
    made = calls(stages, targets()[name], 0, 0, columns=columns, x_step=4 * width, y_step=4 * out)
    patches = tuple((call.slots, word, operand) for stage in made for call in stage for operand, word in enumerate(OPERANDS))
    return Ready(launch.Program(made, targets()[name]), patches, stages)
