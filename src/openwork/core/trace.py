"""Which part of which parameter a product reads, for any model: one forward pass watched op by op.

Parameters are recognised by their memory, so views (transposes, chunks, reshapes, tied weights) need no rule each.
Copies that keep zeros where they are (casts, layouts, products with a scale or a gate, selected rows) are followed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_Ints = tuple[int, ...]
_aten: Any = torch.ops.aten


@dataclass(frozen=True)
class Region:
    """The elements of a parameter that an operation reads: a strided view of it, or of a copy made on the way.

    Attributes:
        offset, size, stride: the view, in elements, as for `torch.as_strided`.
        home_size, home_stride: how the viewed tensor (the parameter, or the copy) lies in memory.
        source: for a copy, the region that was copied; None for the parameter itself.
        rows: for a copy of selected rows of `source`, their indices.
    """

    offset: int
    size: _Ints
    stride: _Ints
    home_size: _Ints
    home_stride: _Ints
    source: Region | None = None
    rows: _Ints | None = None

    def view(self, mask: Tensor) -> Tensor:
        """Return what the operation sees of `mask`, of the parameter's shape: a view of it wherever possible."""
        base = mask if self.source is None else self.source.view(mask)
        if self.rows is not None:
            base = base[list(self.rows)]
        base = base.reshape(self.home_size)
        if base.stride() != self.home_stride:
            memory = base.new_zeros(_extent(self.home_size, self.home_stride))
            base = memory.as_strided(self.home_size, self.home_stride).copy_(base)
        return base.as_strided(self.size, self.stride, base.storage_offset() + self.offset)

    def simplified(self) -> Region:
        """Return the same elements in as few dimensions as possible, without repeats that are the same for all."""
        size, stride = _merged(self.size, self.stride)
        whole = self.offset == 0 and (size, stride) == _merged(self.home_size, self.home_stride)
        if whole and self.source is not None and self.rows is None:
            return self.source.simplified()
        return replace(self, size=size, stride=stride)


class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode that sums the FLOPs of every product by the region of the parameter that it reads.

    Attributes:
        flops: (parameter name, region) -> dense FLOPs; every element of the region has the same share.
        fixed: FLOPs of products of which no operand is recognised as part of a parameter.
        uncounted: names of custom operations that ran and have no formula.
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops: dict[tuple[str, Region], int] = {}
        self.fixed = 0
        self.uncounted: set[str] = set()
        self._homes: dict[int, list[_Home]] = {}
        for name, parameter in model.named_parameters():
            if parameter.layout is torch.strided:
                self._homes.setdefault(_storage(parameter), []).append(_Home(name, parameter.detach()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one op, count it if it is a product, follow it if it copies a parameter."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        op = getattr(func, "_overloadpacket", func)  # a higher-order operator has no overloads
        formula = flop_registry.get(op) or _FORMULAS.get(op)
        if op is _aten._grouped_mm:
            self._charge_groups(args[0], args[1], args[2] if len(args) > 2 else None)
        elif formula is not None:
            self._charge(formula(*args, **kwargs, out_val=out), _operands(op, args))
        elif op is func or func.namespace not in _BUILT_IN:
            self.uncounted.add(str(op))
        else:
            self._follow(op, args, out)
        return out

    def _charge(self, flops: int, operands: list[Tensor]) -> None:
        """Charge `flops` to the first of `operands` that is part of a parameter."""
        found = next(filter(None, map(self._find, operands)), None)
        if found is None:
            self.fixed += flops
        else:
            key = found[0], found[1].simplified()
            self.flops[key] = self.flops.get(key, 0) + flops

    def _charge_groups(self, a: Tensor, b: Tensor, ends: Tensor | None) -> None:
        """Charge a grouped product: rows of `a` up to each of `ends` meet their own matrix of `b`, as routed."""
        if a.dim() == 2 and b.dim() == 3 and ends is not None and ends.device.type != "meta":
            start = 0
            for matrix, end in zip(b, ends.tolist(), strict=True):
                self._charge(2 * (end - start) * matrix.numel(), [matrix])
                start = end
            return
        batch = a.shape[0] if a.dim() == b.dim() == 3 else 1
        self._charge(2 * batch * a.shape[-2] * a.shape[-1] * b.shape[-1], [b, a])

    def _find(self, tensor: Tensor) -> tuple[str, Region] | None:
        """Return the parameter that `tensor` is a part of, and which part."""
        if tensor.layout is not torch.strided or tensor.numel() == 0:
            return None
        for home in self._homes.get(_storage(tensor), ()):
            (size, stride), (home_size, home_stride) = _layout(tensor), _layout(home.held)
            offset = int(tensor.storage_offset()) - int(home.held.storage_offset())
            inside = 0 <= offset <= _extent(home_size, home_stride) - _extent(size, stride)
            if inside and tensor.dtype == home.held.dtype:
                return home.name, Region(offset, size, stride, home_size, home_stride, home.source, home.rows)
        return None

    def _follow(self, op: Any, args: Any, out: Any) -> None:
        """Remember `out` if its elements, or those of selected rows, are a parameter's, zeros staying zeros."""
        if op is _aten._weight_norm_interface:
            out = out[0]
        if not isinstance(out, Tensor) or out.layout is not torch.strided:
            return
        key = _storage(out)
        if key in self._homes:
            if args and out is args[0] and op not in _ZERO_KEEPING:  # written in place: no longer a copy
                self._homes[key] = [home for home in self._homes[key] if home.source is None]
            return
        for origin, rows in _origins(op, args, out):
            found = self._find(origin)
            if found is not None:
                self._homes[key] = [_Home(found[0], out, found[1], rows)]
                return


@dataclass(frozen=True)
class _Home:
    """A tensor that holds a parameter, or a copy of a part of one; holding it keeps its memory from being reused."""

    name: str
    held: Tensor
    source: Region | None = None
    rows: _Ints | None = None


def _origins(op: Any, args: Any, out: Tensor) -> Iterator[tuple[Tensor, _Ints | None]]:
    """Yield the tensors, and the rows of them, that `out` may be a copy of."""
    filled = op is _aten.masked_fill and not isinstance(args[2], Tensor) and args[2] == 0
    if op in _COPYING or op in _ZERO_KEEPING or filled:
        for arg in args[:1] if op in (_aten.div, _aten.div_) else args:
            # a vector times a vector is a norm's scale on activations, not a gate on a weight
            if isinstance(arg, Tensor) and arg.shape == out.shape and (arg.dim() > 1 or op in _COPYING):
                yield arg, None
    index = None
    if op is _aten.index_select and args[1] == 0:
        index = args[2]
    elif op is _aten.index and all(other is None for other in args[1][1:]):
        index = args[1][0]
    if index is not None and index.device.type != "meta" and index.dtype in (torch.int64, torch.int32):
        yield args[0], tuple(index.reshape(-1).tolist())


def _operands(op: Any, args: Any) -> list[Tensor]:
    """Return the arguments of a counted op that may be a weight, the likeliest first."""
    if op in _WEIGHTS:
        return [args[i] for i in _WEIGHTS[op]]
    if "attention" in str(op):
        return []
    return sorted((arg for arg in args if isinstance(arg, Tensor)), key=Tensor.numel, reverse=True)


def _bilinear(*args: Any, **_: Any) -> int:
    shapes: list[_Ints] = []
    for tensor, dims in zip(args[:3], args[3:6], strict=True):
        for dim in dims:
            tensor = tensor.unsqueeze(dim)
        shapes.append(tuple(tensor.shape))
    return int(2 * math.prod([max(sizes) for sizes in zip(*shapes, strict=True)]))


def _linear(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return 2 * x.numel() * weight.shape[0]


def _first(a: Tensor, *_: Any, **__: Any) -> int:
    return 2 * a.numel()


def _second(_: Any, a: Tensor, *__: Any, **___: Any) -> int:
    return 2 * a.numel()


# Products that torch's registry leaves out. The CPU's attention kernel is among them.
_attention: Callable[..., int] = flop_registry[_aten._scaled_dot_product_flash_attention]
_FORMULAS: dict[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_fused_attention_overrideable: _attention,
    _aten._scaled_dot_product_attention_math_for_mps: _attention,
    _aten._trilinear: _bilinear, _aten.linear: _linear, _aten.mv: _first, _aten.dot: _first, _aten.addmv: _second,
}  # fmt: skip
_WEIGHTS: dict[Any, _Ints] = {
    _aten.mm: (1, 0), _aten.bmm: (1, 0), _aten.addmm: (2, 1), _aten.baddbmm: (2, 1), _aten._scaled_mm: (1, 0),
    _aten.mv: (0, 1), _aten.addmv: (1, 2), _aten.dot: (1, 0), _aten.linear: (1, 0), _aten._trilinear: (1, 0, 2),
    _aten.convolution: (1, 0), _aten._convolution: (1, 0), _aten.cudnn_convolution: (1, 0),
}  # fmt: skip
_COPYING = {_aten.clone, _aten._to_copy}
_ZERO_KEEPING = {
    _aten.mul, _aten.mul_, _aten.div, _aten.div_, _aten.neg, _aten.neg_, _aten.sign, _aten.abs, _aten.tanh,
    _aten._weight_norm_interface,
}  # fmt: skip
_BUILT_IN = ("aten", "prim", "prims", "profiler")


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)  # unlike data_ptr(), it tells tensors apart on the meta device too


def _layout(tensor: Tensor) -> tuple[_Ints, _Ints]:
    return tuple(map(int, tensor.shape)), tuple(map(int, tensor.stride()))


def _extent(size: _Ints, stride: _Ints) -> int:
    """Return how many elements of memory a view spans."""
    return 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if math.prod(size) else 0


def _merged(size: _Ints, stride: _Ints) -> tuple[_Ints, _Ints]:
    """Return the canonical form of a layout: no dimension of one or of repeats, longest stride first, runs joined."""
    dims: list[tuple[int, int]] = []
    for step, length in sorted(((s, n) for n, s in zip(size, stride, strict=True) if n > 1 and s > 0), reverse=True):
        run = dims.pop()[1] if dims and dims[-1][0] == step * length else 1
        dims.append((step, length * run))
    return tuple(length for _, length in dims), tuple(step for step, _ in dims)
