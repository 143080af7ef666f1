"""What torch's layers and functions without weights do to channels: leave each to itself, move their axis, or neither."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F


class _Plain(Enum):
    PLAIN = "plain"


PLAIN = _Plain.PLAIN
"""A number or size that does not depend on how many channels there are."""


@dataclass(frozen=True)
class Flow:
    """A tensor whose axis holds channels.

    Attributes:
        channels: the set of channels.
        size: how many.
        axis: which axis, counted from the end (-1 is the last).
        ndim: number of axes; None if unknown.
        repeat: neighbouring features for each channel; None if not known yet (flattened pixels).
    """

    channels: int
    size: int
    axis: int
    ndim: int | None
    repeat: int | None = 1


@dataclass(frozen=True)
class Sizes:
    """The shape of a tensor with channels, or a part of it that tells their number."""

    flow: Flow


Value = Flow | Sizes | _Plain | None
"""A value of the graph; None is a tensor that is not followed."""


@dataclass(frozen=True)
class Outcome:
    """What a function does: the value it gives, the sets that it joins; or, not followed, why."""

    is_followed: bool
    value: Value = None
    joins: tuple[tuple[int, int], ...] = ()
    why: str = ""


BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
NORMS: dict[type[nn.Module], int] = dict.fromkeys(BATCH_NORMS, 0) | {
    nn.InstanceNorm1d: -2, nn.InstanceNorm2d: -3, nn.InstanceNorm3d: -4,
}  # fmt: skip
"""Layers with a parameter a channel; the axis of instance norms, from the end."""

_ELEMENTWISE_MODULES = {
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish,
    nn.Hardsigmoid, nn.Hardtanh, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Softplus, nn.Softsign, nn.Sigmoid,
    nn.LogSigmoid, nn.Tanh, nn.Threshold, nn.Identity, nn.Dropout, nn.AlphaDropout,
}  # fmt: skip
_SPATIAL = (
    "MaxPool", "AvgPool", "LPPool", "AdaptiveAvgPool", "AdaptiveMaxPool", "ZeroPad", "ReflectionPad", "ReplicationPad",
    "ConstantPad", "CircularPad", "Dropout",
)  # fmt: skip
_SPATIAL_MODULES: dict[type[nn.Module], int] = {
    kind: rank
    for rank in (1, 2, 3)
    for kind in (getattr(nn, f"{word}{rank}d", None) for word in _SPATIAL)
    if kind is not None
}


def _functions(*names: str) -> set[Any]:
    """Return what torch and torch.nn.functional call by these names."""
    return {getattr(place, name) for place in (torch, F) for name in names if hasattr(place, name)}


_ACTIVATIONS = (
    "relu", "relu_", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish", "hardsigmoid",
    "hardtanh", "hardshrink", "softshrink", "tanhshrink", "softplus", "softsign", "sigmoid", "logsigmoid", "tanh",
    "threshold", "abs", "neg", "exp", "square", "clamp", "clamp_min", "clamp_max", "dropout",
    "alpha_dropout", "clone", "detach",
)  # fmt: skip
_ELEMENTWISE = _functions(*_ACTIVATIONS) | {operator.neg}
_ELEMENTWISE_METHODS = {*_ACTIVATIONS, "contiguous", "float", "double", "half", "bfloat16", "to", "cpu", "cuda", "sigmoid_",
                        "tanh_", "clamp_"}  # fmt: skip
_SPATIAL_FUNCTIONS: dict[Any, int] = {
    function: rank
    for rank in (1, 2, 3)
    for word in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "dropout", "lp_pool")
    for function in _functions(f"{word}{rank}d")
}
BINARY = {
    operator.add, operator.iadd, operator.sub, operator.isub, operator.mul, operator.imul, operator.truediv,
    operator.itruediv, *_functions("add", "sub", "mul", "div", "maximum", "minimum"),
}  # fmt: skip
_DIVISIONS = {operator.truediv, operator.itruediv, torch.div, "div", "div_"}
BINARY_METHODS = {"add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_"}
_REDUCTIONS = _functions("mean", "sum", "amax", "amin")
_REDUCTION_METHODS = {"mean", "sum", "amax", "amin"}
_UNFOLLOWED = Outcome(False)


def of_module(module: nn.Module, x: Flow) -> Flow | None:
    """Return what a layer without weights makes of a tensor with channels; None if it cannot be followed."""
    kind = type(module)
    if kind in _ELEMENTWISE_MODULES:
        return x
    if isinstance(module, nn.Flatten):
        return flatten(x, module.start_dim, module.end_dim)
    if isinstance(module, nn.Upsample):
        return x if _leads_pixels(x) else None
    is_pair = getattr(module, "return_indices", False)
    return x if _SPATIAL_MODULES.get(kind) == -1 - x.axis and not is_pair else None


def of_function(node: fx.Node, values: Mapping[fx.Node, Value]) -> Outcome:
    """Return what a function or method call makes of its arguments."""
    target, is_method = node.target, node.op == "call_method"
    inputs = [values[other] for other in node.all_input_nodes]
    if inputs and all(x is PLAIN for x in inputs) and getattr(target, "__module__", "") == "_operator":
        return Outcome(True, PLAIN)  # numbers of numbers; a tensor made from a number is another matter
    args = [_valued(arg, values) for arg in node.args]
    if target is getattr or (is_method and target in ("size", "dim", "ndimension")):
        return _metadata(str(node.args[1]) if target is getattr else str(target), args)
    if target is operator.getitem:
        return _item(args)
    is_kept = bool(args) and isinstance(args[0], Flow) and inputs.count(PLAIN) + 1 == len(inputs)
    if target in (BINARY_METHODS if is_method else BINARY):
        # a removed channel is zero, and nothing may be divided by it
        is_by_flow = target in _DIVISIONS and len(args) == 2 and isinstance(args[1], Flow)
        return _UNFOLLOWED if is_by_flow else _binary(args, inputs)
    if is_kept and target in (_ELEMENTWISE_METHODS if is_method else _ELEMENTWISE):
        return Outcome(True, args[0])
    if is_kept and not is_method and target in _SPATIAL_FUNCTIONS:
        is_spatial = _SPATIAL_FUNCTIONS[target] == -1 - args[0].axis and not node.kwargs.get("return_indices", False)
        return Outcome(True, args[0]) if is_spatial else _UNFOLLOWED
    if is_kept and target is F.interpolate:
        return Outcome(_leads_pixels(args[0]), args[0])
    if args and isinstance(args[0], Flow):
        return _reshaping(node, args[0], args, is_method)
    return _UNFOLLOWED


def _leads_pixels(x: Flow) -> bool:
    return x.ndim is not None and x.ndim > 2 and x.axis == 1 - x.ndim


def _valued(arg: Any, values: Mapping[fx.Node, Value]) -> Any:
    """Return an argument with the values of its nodes in their places."""
    if isinstance(arg, tuple | list):
        return [_valued(one, values) for one in arg]
    return values[arg] if isinstance(arg, fx.Node) else arg


def _reshaping(node: fx.Node, x: Flow, args: list[Any], is_method: bool) -> Outcome:
    """Follow what may move the axis of the channels."""
    target = node.target
    if target in ("view", "reshape") or target is torch.reshape:
        return _view(x, args[1] if len(args) == 2 and isinstance(args[1], list) else args[1:])
    if any(isinstance(other, Flow | Sizes) for other in args[1:]):
        return _UNFOLLOWED
    value: Flow | None = None
    given = {**dict(zip(_names(target), args[1:], strict=False)), **node.kwargs}
    if target == "flatten" or target is torch.flatten:
        value = flatten(x, given.get("start_dim", 0), given.get("end_dim", -1))
    elif target in (_REDUCTION_METHODS if is_method else _REDUCTIONS):
        value = _reduced(x, given.get("dim"), bool(given.get("keepdim", False)))
    return Outcome(value is not None, value)


def _names(target: Any) -> tuple[str, ...]:
    return ("start_dim", "end_dim") if target == "flatten" or target is torch.flatten else ("dim", "keepdim")


def flatten(x: Flow, start: int, end: int) -> Flow | None:
    """Return `x` with the axes `start` to `end` made one; None if the channels do not lead among them."""
    if x.ndim is None:
        return None
    first, last, channel = start % x.ndim, end % x.ndim, x.ndim + x.axis
    if first == last:
        return x
    rest = x.ndim - (last - first)
    if last < channel:
        return replace(x, ndim=rest)
    if first > channel:
        return replace(x, ndim=rest, axis=channel - rest)
    return replace(x, ndim=rest, axis=channel - rest, repeat=None) if first == channel and x.repeat == 1 else None


def _view(x: Flow, sizes: list[Any]) -> Outcome:
    """Follow `x.view(batch, -1)`, which is flatten(1)."""
    if len(sizes) == 2 and x.ndim is not None and x.axis == 1 - x.ndim and sizes[1] != -1 and isinstance(sizes[1], int):
        return Outcome(False, why=f"a view to the fixed size {sizes[1]} cannot follow them; write x.flatten(1)")
    is_flat = len(sizes) == 2 and (sizes[1] == -1 or isinstance(sizes[1], Sizes))
    is_batch = is_flat and (sizes[0] is PLAIN or (isinstance(sizes[0], int) and sizes[0] > 0))
    if not is_batch or x.ndim is None or x.axis != 1 - x.ndim:
        return Outcome(False, why="a view or reshape other than x.view(batch, -1) is not followed; write x.flatten(1)")
    value = flatten(x, 1, -1)
    return Outcome(value is not None, value)


def _reduced(x: Flow, dim: Any, keep: bool) -> Flow | None:
    """Return `x` after a mean or sum over axes other than that of the channels."""
    dims = [dim] if isinstance(dim, int) else list(dim) if isinstance(dim, tuple | list) else []
    if not dims or not all(isinstance(one, int) for one in dims):
        return None
    if x.ndim is None and any(one >= 0 for one in dims):
        return None
    away = {one if one < 0 else one - (x.ndim or 0) for one in dims}
    if x.axis in away:
        return None
    if keep:
        return x
    return replace(x, axis=x.axis + sum(one > x.axis for one in away), ndim=None if x.ndim is None else x.ndim - len(away))


def _binary(args: list[Any], inputs: list[Value]) -> Outcome:
    """Follow arithmetic of two tensors with the same channels, or of one and a number."""
    if len(args) != 2 or len(inputs) > 2:
        return _UNFOLLOWED
    flows = [arg for arg in args if isinstance(arg, Flow)]
    numbers = [arg for arg in args if arg is PLAIN or isinstance(arg, int | float)]
    if len(flows) == 1 and len(numbers) == 1:
        return Outcome(True, flows[0])
    if len(flows) != 2:
        return _UNFOLLOWED
    one, other = flows
    if (one.axis, one.repeat, one.size) != (other.axis, other.repeat, other.size):
        return _UNFOLLOWED
    ndim = None if one.ndim is None or other.ndim is None else max(one.ndim, other.ndim)
    return Outcome(True, replace(one, ndim=ndim), ((one.channels, other.channels),))


def _metadata(name: str, args: list[Any]) -> Outcome:
    """Follow the question for a shape, a dtype or a number of axes."""
    x = args[0]
    if isinstance(x, Sizes) or name not in ("shape", "size", *_HARMLESS):
        return _UNFOLLOWED
    if not isinstance(x, Flow) or name in _HARMLESS:
        return Outcome(True, PLAIN)
    if name == "size" and len(args) > 1:
        return _item([Sizes(x), args[1]])
    return Outcome(True, Sizes(x))


_HARMLESS = ("dtype", "device", "dim", "ndim", "ndimension")


def _item(args: list[Any]) -> Outcome:
    """Follow the choice of a part of a shape: harmless unless it tells the number of channels."""
    x, index = args
    if not isinstance(x, Sizes):
        return _UNFOLLOWED
    flow = x.flow
    if flow.ndim is None:
        is_other = index == 0  # the batch
    elif isinstance(index, slice):
        bounds = (index.start, index.stop, index.step)
        is_fixed = all(bound is None or isinstance(bound, int) for bound in bounds)
        is_other = is_fixed and flow.ndim + flow.axis not in range(flow.ndim)[index]
    else:
        is_other = isinstance(index, int) and index % flow.ndim != flow.ndim + flow.axis
    return Outcome(True, PLAIN if is_other else x)
