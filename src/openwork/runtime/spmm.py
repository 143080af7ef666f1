"""The product of a sparse weight with dense activations, packed once and multiplied by kernels made for this machine.

Packing and the order of the sums after Elsen, Dukhan, Gale, Simonyan, "Fast Sparse ConvNets", CVPR 2020, and XNNPACK,
which it is part of: groups of R output channels share their input channels; explicit zeros inside a group are stored.

Where there are no kernels (`kernels.target.host` is None) the same functions multiply by torch's compressed rows.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from openwork.errors import ModelError
from openwork.runtime import tuning
from openwork.runtime.formats import _common as common
from openwork.runtime.kernels import arrange
from openwork.runtime.kernels.activations import ACTS, Act
from openwork.runtime.kernels.target import Target, host
from openwork.runtime.product import LINE, Asked, Product
from openwork.runtime.timing import interleave, timed
from openwork.runtime.tuning import Tiling

BLOCKS = (1, 2, 4, 8, 16)
FEW = 4
"""Tilings that are measured against one another in turn, after a first look at all."""
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": functools.partial(functional.gelu, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "hardswish": functional.hardswish,
    "tanh": torch.tanh,
}
"""The activations in torch."""


@dataclass(frozen=True, eq=False)
class PackedSpMM:
    """A sparse weight (out, in) packed by groups of output channels. It never changes and may be shared.

    Attributes:
        sections: groups of `block` rows, then those left over one by one.
        bias: (out) float32, or None.
        shape: (out, in).
        block: output channels of a group.
    """

    sections: tuple[arrange.Section, ...]
    bias: Tensor | None
    shape: tuple[int, int]
    block: int

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """Return itself: a packed weight never changes."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is made anew: programs, and the fallback."""
        return {name: self.__dict__[name] for name in ("sections", "bias", "shape", "block")}

    @property
    def multiplies(self) -> int:
        """Multiply-adds for one column of x: the stored weights, explicit zeros included."""
        return sum(section.values.size for section in self.sections)

    @property
    def nbytes(self) -> int:
        """Bytes of weights, indices and bias."""
        return sum(section.nbytes for section in self.sections) + (0 if self.bias is None else 4 * len(self.bias))

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """Stored blocks of each group (groups); rows left over are groups of their own, at the end."""
        return np.concatenate([np.diff(section.starts) for section in self.sections])

    @property
    def first_channel(self) -> int:
        """Input channel of the first stored block; 0 where there is none."""
        columns = self._columns
        return int(columns[0]) if len(columns) else 0

    @property
    def deltas(self) -> npt.NDArray[np.int64]:
        """Steps from each block's input channel to the next one's; the last leads back to the first: their sum is 0."""
        columns = self._columns.astype(np.int64)
        return np.roll(columns, -1) - columns

    @property
    def values(self) -> npt.NDArray[np.float32]:
        """The stream of numbers: for every group its biases (zero without a bias), then the weights of each block."""
        return np.concatenate([_stream(section, self._product.bias) for section in self.sections])

    @property
    def _columns(self) -> npt.NDArray[np.int32]:
        return np.concatenate([section.columns for section in self.sections])

    @functools.cached_property
    def _product(self) -> Product:
        bias = np.zeros(self.shape[0], np.float32) if self.bias is None else self.bias.numpy()
        return Product(self.sections, bias, self.shape)

    @functools.cached_property
    def _plain(self) -> Any:
        from openwork.runtime.formats import csr_torch

        return csr_torch.pack(*unpack_spmm(self))


def pack_spmm(weight: Tensor, bias: Tensor | None = None, block: int | Literal["auto"] = "auto") -> PackedSpMM:
    """Return weight (out, in) and bias (out), float32, packed for `spmm_chw` and `spmm_tokens`.

    Args:
        weight: its zeros are left out, except inside a block that has a non-zero.
        bias: or None.
        block: output channels of a group, 1, 2, 4, 8 or 16; "auto" takes 4 or 2 where at least 90 % of what would be
            stored is non-zero, else 1 (XNNPACK's rule).

    Raises:
        ModelError: if they are not float32 on the CPU or do not fit one another, or there is no such block.
    """
    common.check_weight(weight, bias)
    if weight.dtype != torch.float32:
        raise ModelError(f"cannot pack a weight of {weight.dtype} for the sparse kernels: give float32, or use a csr format")
    if block != "auto" and (isinstance(block, bool) or block not in BLOCKS):
        raise ModelError(f"there is no block of {block!r} rows: choose auto, {', '.join(map(str, BLOCKS))}")
    kept = None if bias is None else bias.detach().clone(memory_format=torch.contiguous_format)
    height, width = weight.shape
    if width == 0:
        empty = arrange.Section(0, 1, np.zeros(height + 1, np.int64), np.zeros(0, np.int32), np.zeros((0, 1), np.float32))
        return PackedSpMM((empty,), kept, (height, width), 1)
    dense = weight.detach().contiguous().numpy()
    rows = arrange.choose_block(dense) if block == "auto" else int(block)
    sections = arrange.sections(dense, rows)
    if sum(len(section.columns) for section in sections) >= 2**31:
        raise ModelError("2**31 or more blocks are too many for 32-bit indices: keep this layer dense")
    return PackedSpMM(sections, kept, (height, width), rows)


def unpack_spmm(packed: PackedSpMM) -> tuple[Tensor, Tensor | None]:
    """Return weight (out, in) and bias (out) as they went in; a negative zero may come back as zero."""
    return torch.from_numpy(arrange.dense(packed.sections, packed.shape)), packed.bias


def spmm_chw(
    packed: PackedSpMM,
    x: Tensor,
    out: Tensor | None = None,
    *,
    clamp: tuple[float, float] | None = None,
    act: Act = "none",
    added: Tensor | None = None,
    threads: int | None = None,
    tiling: Tiling | None = None,
) -> Tensor:
    """Return act(W x + b) with columns side by side in memory: x (in, columns) -> (out, columns), or a batch of both.

    The result is the same bit for bit for every tiling and number of threads. A zero weight skips its x, so that an
    infinity or NaN there does no harm; an explicit zero inside a block does not skip it.

    Args:
        packed: from `pack_spmm`.
        x: (in, columns) or (images, in, columns), float32; copied first if columns are not one float apart.
        out: where to write, (out, columns) or (images, out, columns); must not overlap x.
        clamp: low and high: y becomes max(min(y, high), low), a NaN stays. Instead of `act`.
        act: what follows the sum, of `kernels.activations.ACTS`.
        added: a tensor of y's shape that is added before `act`, with columns side by side; must not overlap out.
        threads: at most; None is torch's number, one where the product is small.
        tiling: how to go over the matrices; None takes what was measured (`tune`), else the default for the sizes.

    Raises:
        ModelError: if x, out or added does not fit.
    """
    target, product, place = host(), packed._product, x.data_ptr()
    lies = None if out is None else (out.shape, out.stride(), out.dtype, out.is_cpu)
    clamp = None if clamp is None else (clamp[0], clamp[1])
    asked = (*_lies(x, target), lies, act, clamp, threads, tiling)
    known = product.seen.get(asked) if added is None else None
    if known is not None:
        out = _checked(out, x) if out is not None else torch.empty(known[1], dtype=torch.float32)
        product.run(known[0], place, out.data_ptr())
        return out
    width, columns = packed.shape[1], x.shape[-1] if x.ndim else 0
    if x.ndim not in (2, 3) or x.shape[-2] != width or x.dtype != torch.float32 or x.device.type != "cpu":
        raise ModelError(
            f"cannot multiply an input of shape {tuple(x.shape)}, {x.dtype} on {x.device} with this weight: give "
            f"({width}, columns) or (images, {width}, columns) of torch.float32 on the CPU"
        )
    if x.stride(-1) != 1 and columns > 1:
        x = x.detach().contiguous()
    shape = torch.Size((*x.shape[:-2], packed.shape[0], columns))
    for tensor, what in ((out, "write"), (added, "add")):
        if tensor is not None:
            _check_lies(tensor, shape, what)
    out = _checked(out, x) if out is not None else torch.empty(shape, dtype=torch.float32)
    if added is not None:
        _checked(out, added)
    act = _act(act, clamp)
    if out.numel() == 0:
        return out
    if target is None:
        return _fallback(packed, x, out, act, clamp, added)
    plan = product.plan(product.columns_key(x, out, added, Asked(target, act, clamp, threads, tiling)))
    if added is None and x.data_ptr() == place:
        product.seen[asked] = plan, shape
    product.run(plan, x.data_ptr(), out.data_ptr(), 0 if added is None else added.data_ptr())
    return out


def spmm_tokens(
    packed: PackedSpMM,
    x: Tensor,
    *,
    clamp: tuple[float, float] | None = None,
    act: Act = "none",
    threads: int | None = None,
    tiling: Tiling | None = None,
) -> Tensor:
    """Return act(x W^T + b) for x (..., in) of any strides: a contiguous tensor (..., out). As `spmm_chw` otherwise.

    Raises:
        ModelError: if x does not fit.
    """
    target, product, place = host(), packed._product, x.data_ptr()
    clamp = None if clamp is None else (clamp[0], clamp[1])
    asked = ("tokens", *_lies(x, target), act, clamp, threads, tiling)
    known = product.seen.get(asked)
    if known is not None:
        out = torch.empty(known[1], dtype=torch.float32)
        product.run(known[0], place, out.data_ptr())
        return out
    height, width = packed.shape
    common.check_input(x, width, torch.float32)
    act = _act(act, clamp)
    flat = x if x.ndim == 2 else x.detach().reshape(x.shape[:-1].numel(), width)
    count = flat.shape[0]
    out = torch.empty((*x.shape[:-1], height), dtype=torch.float32)
    if target is None or out.numel() == 0:
        if out.numel():
            _fallback(packed, flat.t(), out.view(count, height).t(), act, clamp, None)
        return out
    flat, key = product.tokens_key(flat, Asked(target, act, clamp, threads, tiling))
    if key.columns == count and flat.data_ptr() == place:
        product.seen[asked] = product.plan(key), out.shape
    ahead = 4 if key.layout == "turned" else key.x_row
    for first in range(0, count, key.columns):
        some = product.plan(key._replace(columns=min(key.columns, count - first)))
        product.run(some, flat.data_ptr() + first * ahead, out.data_ptr() + 4 * first * height)
    return out


def tune(
    packed: PackedSpMM, x: Tensor, *, tokens: bool = False, threads: int | None = None,
    seconds: float = tuning.SECONDS, again: bool = False,
) -> Tiling | None:  # fmt: skip
    """Measure tilings on inputs like x and keep the fastest for later calls of its size, in this process and the next.

    Args:
        packed: the weight.
        x: an input of `spmm_chw`, or with `tokens` of `spmm_tokens`; only shape and strides matter.
        tokens: which of the two.
        threads: as they take it.
        seconds: what the measurement may take, unless five rounds of the best few take longer.
        again: measure even if it is known what is fastest.

    Returns:
        The tiling that is kept; None where there is nothing to measure: no kernels, or an empty product.
    """
    target, product = host(), packed._product
    if target is None or packed.multiplies == 0 or x.numel() == 0:
        return None
    x = x.detach()
    if tokens:
        _, key = product.tokens_key(x.reshape(x.shape[:-1].numel(), x.shape[-1]), Asked(target, threads=threads))
    else:
        out = x.new_empty((*x.shape[:-2], packed.shape[0], x.shape[-1]))
        key = product.columns_key(x, out, None, Asked(target, threads=threads))
    known = tuning.recall(product.kept_under(key))
    if known is not None and not again:
        return known
    multiply = spmm_tokens if tokens else spmm_chw
    main, begun = packed.sections[0], time.perf_counter()
    calls: dict[Tiling, Callable[[], object]] = {}
    rough: dict[Tiling, float] = {}
    sizes = (main.rows, len(main.columns), packed.shape, key.columns, target, key.threads, key.images)
    for tiling in tuning.candidates(*sizes):
        calls[tiling] = functools.partial(multiply, packed, x, threads=key.threads, tiling=tiling)
        calls[tiling]()
        rough[tiling] = min(timed(calls[tiling]) for _ in range(3))
        if time.perf_counter() - begun > seconds:
            break
    few = sorted(rough, key=lambda one: rough[one])[:FEW]
    times = interleave({str(number): calls[one] for number, one in enumerate(few)}, seconds=seconds / 2)
    best = few[int(min(times, key=lambda name: times[name]))]
    tuning.keep(product.kept_under(key), best)
    product.forget()
    return best


def then(y: Tensor, act: Act, clamp: tuple[float, float] | None) -> Tensor:
    """Return what follows a product, done by torch."""
    return FUNCTIONS[act](y) if clamp is None else y.clamp(max=clamp[1]).clamp(min=clamp[0])


def _act(act: Act, clamp: tuple[float, float] | None) -> Act:
    """Return what follows the sum, `clamp` where it has bounds.

    Raises:
        ModelError: if there is no such thing.
    """
    if act == "none":
        return act if clamp is None else "clamp"
    if act not in ACTS or act == "clamp" or clamp is not None:
        raise ModelError(f"act is {act!r} with clamp {clamp!r}: give clamp=(low, high), or act of {', '.join(ACTS)}")
    return act


def _lies(x: Tensor, target: Target | None) -> tuple[object, ...]:
    """Return what the plan of a product depends on besides what is asked for."""
    name = None if target is None else target.name
    return x.shape, x.stride(), x.dtype, x.is_cpu, x.data_ptr() % LINE == 0, name, torch.get_num_threads()


def _checked(out: Tensor, x: Tensor) -> Tensor:
    """Return an output that does not overlap x (or what is added to it).

    Raises:
        ModelError: if it does.
    """
    if out.numel() and x.numel() and _end(out) > x.data_ptr() and _end(x) > out.data_ptr():
        raise ModelError("out overlaps x or added, which is read while out is written: give another out")
    return out


def _check_lies(y: Tensor, shape: torch.Size, what: str) -> None:
    """Refuse a tensor that is not of this shape, or has columns apart or rows over one another.

    Raises:
        ModelError: says how it lies.
    """
    fits = y.shape == shape and y.dtype == torch.float32 and y.device.type == "cpu"
    if not fits or ((y.stride(-1) != 1 or y.stride(-2) < shape[-1]) and shape[-1] > 1 and y.numel()):
        raise ModelError(
            f"cannot {what} a tensor of shape {tuple(y.shape)}, {y.dtype} with strides {y.stride()} for a product of shape "
            f"{tuple(shape)}: give torch.float32 with columns side by side"
        )


def _end(tensor: Tensor) -> int:
    """Return the address after the last element of (…, rows, columns), columns side by side."""
    reach = (tensor.shape[-2] - 1) * tensor.stride(-2) + tensor.shape[-1]
    if tensor.ndim == 3:
        reach += (tensor.shape[0] - 1) * tensor.stride(0)
    return tensor.data_ptr() + 4 * reach


def _fallback(
    packed: PackedSpMM, x: Tensor, out: Tensor, act: Act, clamp: tuple[float, float] | None, added: Tensor | None
) -> Tensor:
    """Multiply by torch's compressed rows."""
    from openwork.runtime.formats import csr_torch

    if packed.multiplies:
        y = csr_torch.matmul(packed._plain, x.transpose(-1, -2)).transpose(-1, -2)
    else:
        y = torch.zeros(out.shape) if packed.bias is None else packed.bias[:, None].expand(out.shape)
    y = y if added is None else y + added
    return out.copy_(then(y, act, clamp))


def _stream(section: arrange.Section, bias: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return biases and weights of a section's groups in one row."""
    rows, groups = section.rows, section.groups
    stream = np.empty((groups + len(section.columns), rows), np.float32)
    heads = section.starts[:-1] + np.arange(groups)
    body = np.ones(len(stream), np.bool_)
    body[heads] = False
    stream[heads] = bias[section.first : section.first + groups * rows].reshape(groups, rows)
    stream[body] = section.values
    return stream.reshape(-1)
