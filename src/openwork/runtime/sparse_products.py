"""A linear layer whose weight, gradient and everything else is kept at its entries only: the three products of a step.

With activations as features x batch: forward Y = W X + b, backward dX = W^T dY, and dW = dY X^T at the entries of W alone.
The first two are the sparse product of `kernels.spmm`, the last is `kernels.sddmm`. Values are read where they lie, row by
row; the transposed product reads a copy in the order of columns, and so does the forward product of a weight so dense that
it pays to go over it part by part. The transposed product and the gradients run in one stage of one program.

Elsewhere (no kernels, another dtype or device) the same is done by torch, at most `PLAIN` numbers at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from openwork.errors import ModelError
from openwork.runtime import sparse_programs as programs
from openwork.runtime.kernels.target import Target, host
from openwork.runtime.launching import Pool
from openwork.runtime.positions import Positions
from openwork.runtime.sparse_programs import LINE, PAGE, WIDE, Key, Layout, Turn, pitch
from openwork.runtime.tuning import useful_threads

PLAIN = 2**22
"""Numbers that the products by torch have in memory at once, beside their results."""
BATCHES = 8
"""Batch sizes for which programs and offsets are kept."""
_REACH = 2**31  # bytes that the offsets of a kernel, 32 bits with a sign, lead to
_OFTEN = 16  # readings of each row from which on a copy that lies better pays
_LITTLE = 2048  # numbers below which torch transposes as fast
_COPYING = 4  # multiply-adds that a number transposed takes the time of


@dataclass(frozen=True, eq=False)
class Products:
    """The products of a weight with given positions, for any values. Never changes and may be shared among threads.

    What it makes for itself takes four to six int32 numbers an entry for a batch size, and two to four for each further
    one, of which it remembers `BATCHES`.
    """

    positions: Positions

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.positions,)

    def multiply(self, values: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        """Return W x + b as (columns, out), its memory features x batch.

        Args:
            values: (nnz).
            bias: (out), or None.
            x: (in, columns), of the dtype of values.
        """
        y = _features_first(x.shape[1], self.positions.shape[0], values)
        target = _usable(values)
        if target is None or y.numel() == 0:
            return _plain_multiply(self.positions, values, bias, x, y)
        threads = useful_threads(values.numel() * x.shape[1], target, torch.get_num_threads())
        bias = self._zeros if bias is None else bias.contiguous()
        values, scratch = values.contiguous(), torch.empty_like(values)
        operands = [one.data_ptr() for one in (x, y, values, bias, scratch)]
        self._pool("_forward").run(Key(target.name, x.shape[1], 4 * x.stride(0), threads), operands, threads)
        return y

    def differentiate(
        self, values: Tensor, x: Tensor | None, y: Tensor, *, inputs: bool, weights: bool, sums: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of the input (columns, in), the values (nnz) and the bias (out), None where not asked for.

        Args:
            values: (nnz).
            x: (in, columns), the input; needed for the gradient of the values.
            y: (out, columns), the gradient of the output.
            inputs, weights, sums: which gradients to compute.
        """
        dx = _features_first(y.shape[1], self.positions.shape[1], values) if inputs else None
        dv = torch.empty_like(values) if weights else None
        target = _usable(values)
        if target is None or y.numel() == 0:
            return _plain_backward(self.positions, values, x, y, dx, dv, sums)
        db = y.sum(dim=1) if sums and not weights else y.new_empty(y.shape[0]) if sums else None
        threads = useful_threads(values.numel() * y.shape[1] * (inputs + weights), target, torch.get_num_threads())
        x_row = 0 if x is None else 4 * x.stride(0)
        key = Key(target.name, y.shape[1], x_row, threads, 4 * y.stride(0), inputs, weights, sums and weights)
        values = values.contiguous()
        scratch = torch.empty_like(values) if inputs else None
        operands = [0 if one is None else one.data_ptr() for one in (x, y, values, scratch, dx, dv, db)]
        self._pool("_backward").run(key, operands, threads)
        return dx, dv, db

    def features(self, x: Tensor) -> Tensor:
        """Return x (columns, n) as (n, columns) with columns side by side in memory, copied only if it must be or pays.

        A copy has rows that start on cache lines and do not fall on the same lines of the cache.
        """
        y = x.t()
        width, columns = y.shape
        side_by_side = y.stride(1) == 1 or columns <= 1
        if side_by_side and y.stride(0) * width * 4 < _REACH and not self._worth_copying(y):
            return y
        turned = torch.empty((width, pitch(columns)), dtype=x.dtype, device=x.device)[:, :columns]
        target = _usable(x)
        if target is None or y.stride(0) != 1 or x.numel() < _LITTLE:
            return turned.copy_(y)
        threads = useful_threads(x.numel() * _COPYING, target, torch.get_num_threads())
        key = Turn(target.name, columns, width, 4 * x.stride(0))
        self._turns.run(key, (x.data_ptr(), turned.data_ptr()), threads)
        return turned

    def _worth_copying(self, y: Tensor) -> bool:
        """Tell whether rows that lie badly in the cache are read often enough for a copy to pay."""
        row, columns = 4 * y.stride(0), y.shape[1]
        if y.dtype != torch.float32 or columns < WIDE:
            return False
        bad = row % PAGE == 0 or row % LINE or y.data_ptr() % LINE
        return bool(bad) and self.positions.nnz >= _OFTEN * y.shape[0]

    @functools.cached_property
    def _turns(self) -> Pool[Turn]:
        return Pool(programs.turning_program)

    @functools.cached_property
    def _zeros(self) -> Tensor:
        return torch.zeros(self.positions.shape[0])

    def _pool(self, name: str) -> Pool[Key]:
        """Return a pool of programs, a new one when the old has seen many batch sizes, each with offsets of its own."""
        pool: Pool[Key] = getattr(self, name)
        if len(pool) > BATCHES:
            self.__dict__.pop(name, None)
            pool = getattr(self, name)
        return pool

    @functools.cached_property
    def _layout(self) -> Layout:
        positions = self.positions
        return Layout(positions.shape, positions.block, positions.starts.numpy(), positions.columns.numpy())

    @functools.cached_property
    def _forward(self) -> Pool[Key]:
        return Pool(functools.partial(programs.forward_program, self._layout))

    @functools.cached_property
    def _backward(self) -> Pool[Key]:
        return Pool(functools.partial(programs.backward_program, self._layout))


@dataclass(eq=False)
class Scout:
    """Positions without a weight whose gradients are wanted.

    Attributes:
        products: of the positions.
        grad: (nnz), the sum of their gradients over the backward passes so far.
        passes: how many those were.
    """

    products: Products
    grad: Tensor
    passes: int = 0

    def look(self, x: Tensor, y: Tensor) -> None:
        """Add the gradients of a backward pass with input x (in, columns) and gradient y (out, columns)."""
        found = self.products.differentiate(self.grad, x, y, inputs=False, weights=True, sums=False)[1]
        assert found is not None
        self.grad += found
        self.passes += 1


@torch.compiler.disable  # type: ignore[untyped-decorator]
def multiply(x: Tensor, values: Tensor, bias: Tensor | None, products: Products, scout: Scout | None = None) -> Tensor:
    """Return x W^T + b, differentiable once by x, values and bias.

    Args:
        x: (..., in). Where its memory is features x batch it is read as it lies, else it is transposed first.
        values: (nnz) of x's dtype and device.
        bias: (out), or None.
        products: of the weight's positions.
        scout: further positions whose gradients the backward pass is to collect.

    Returns:
        (..., out), whose memory is features x batch: what follows element by element keeps it so.

    Raises:
        ModelError: if x does not fit.
    """
    out, width = products.positions.shape
    if x.ndim == 0 or x.shape[-1] != width or x.dtype != values.dtype or x.device != values.device:
        raise ModelError(
            f"cannot multiply an input of shape {tuple(x.shape)}, {x.dtype} on {x.device} with this weight: give "
            f"(..., {width}) of {values.dtype} on {values.device}"
        )
    flat = x if x.ndim == 2 else x.reshape(-1, width)
    most = max(1, (_REACH - 1) // (4 * max(out, width)))
    apply: Callable[..., Tensor] = _Product.apply
    if flat.shape[0] <= most:
        y = apply(flat, values, bias, products, scout)
    else:  # byte offsets are 32 bits wide
        y = torch.cat([apply(part, values, bias, products, scout) for part in torch.split(flat, most)])
    return y if x.ndim == 2 else y.reshape(*x.shape[:-1], out)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, products: Products, scout: Scout | None) -> Tensor:
        features = products.features(x)
        ctx.products, ctx.scout = products, scout
        keeps = ctx.needs_input_grad[1] or scout is not None
        ctx.save_for_backward(values, features if keeps else None)
        return products.multiply(values, bias, features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, x = ctx.saved_tensors
        y = ctx.products.features(grad)
        inputs, weights, sums = ctx.needs_input_grad[:3]
        found = ctx.products.differentiate(values, x, y, inputs=inputs, weights=weights, sums=sums)
        if ctx.scout is not None:
            ctx.scout.look(x, y)
        return (*found, None, None)


def _features_first(columns: int, features: int, like: Tensor) -> Tensor:
    """Return an empty tensor (columns, features) with columns side by side."""
    return torch.empty_strided((columns, features), (1, columns), dtype=like.dtype, device=like.device)


def _usable(values: Tensor) -> Target | None:
    """Return the target of the kernels, None if values cannot be given to them."""
    return host() if values.dtype == torch.float32 and values.device.type == "cpu" else None


# -- by torch -----------------------------------------------------------------------------------------------------------


def _plain_multiply(positions: Positions, values: Tensor, bias: Tensor | None, x: Tensor, y: Tensor) -> Tensor:
    rows, columns = positions.pairs()
    kind = _sum_dtype(values)
    total = torch.zeros((positions.shape[0], x.shape[1]), dtype=kind, device=x.device)
    for run in _runs(values.numel(), x.shape[1]):
        total.index_add_(0, rows[run], values[run, None].to(kind) * x[columns[run]].to(kind))
    if bias is not None:
        total += bias[:, None].to(kind)
    return y.copy_(total.t())


def _plain_backward(
    positions: Positions, values: Tensor, x: Tensor | None, y: Tensor, dx: Tensor | None, dv: Tensor | None, sums: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    rows, columns = positions.pairs()
    kind = _sum_dtype(values)
    total = torch.zeros((positions.shape[1], y.shape[1]), dtype=kind, device=y.device)
    for run in _runs(values.numel(), y.shape[1]):
        lines = y[rows[run]].to(kind)
        if dx is not None:
            total.index_add_(0, columns[run], values[run, None].to(kind) * lines)
        if dv is not None and x is not None:
            dv[run] = (lines * x[columns[run]].to(kind)).sum(dim=1).to(dv.dtype)
    return None if dx is None else dx.copy_(total.t()), dv, y.sum(dim=1) if sums else None


def _runs(count: int, width: int) -> Iterator[slice]:
    size = max(1, PLAIN // max(1, width))
    for start in range(0, count, size):
        yield slice(start, min(count, start + size))


def _sum_dtype(values: Tensor) -> torch.dtype:
    """Return what sums are kept in: float32 at least."""
    return torch.promote_types(values.dtype, torch.float32)
