"""Reading a traced forward: which nodes are operations of ours, and how they gather into islands.

A model is traced by torch.fx; a child module whose parent cannot be traced is tried by itself. Nodes that are not known
here stay torch's: the islands are what lies between them.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from openwork.runtime.graph.compile import Chain
from openwork.runtime.graph.ops import NOTHING, Conv, Depthwise, Floats, Geometry, Op, Tail
from openwork.runtime.graph.simple import Activate, Add, Mean, Pool, Scale

RELU = Tail("clamp", 0.0, math.inf)


@dataclass(frozen=True)
class Seen:
    """What a node gave when the example ran: the shape of a float32 tensor on the CPU, None for anything else."""

    shape: tuple[int, ...] | None


class _Watch(fx.Interpreter):
    """Runs a graph and notes the shapes."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.seen: dict[fx.Node, Seen] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and note what it gives."""
        value = super().run_node(n)
        fits = isinstance(value, Tensor) and value.dtype == torch.float32 and value.device.type == "cpu"
        self.seen[n] = Seen(tuple(value.shape) if fits else None)
        return value


def shapes(graph: fx.GraphModule, arguments: tuple[Any, ...]) -> dict[fx.Node, Seen]:
    """Run the graph on positional arguments and return what every node gave."""
    watch = _Watch(graph)
    with torch.no_grad():
        watch.run(*arguments)
    return watch.seen


# -- what a node does ---------------------------------------------------------------------------------------------


def operation(node: fx.Node, modules: Mapping[str, nn.Module], seen: Mapping[fx.Node, Seen]) -> Op | None:
    """Return the operation that a node stands for, its inputs numbered as `all_input_nodes`; None if it is not known."""
    inputs = node.all_input_nodes
    if not inputs or seen[node].shape is None or any(seen[one].shape is None for one in inputs):
        return None
    if any(len(seen[one].shape or ()) != 4 for one in inputs) or 0 in (seen[node].shape or (0,)):
        return None
    if node.op == "call_module":
        module = modules[str(node.target)]
        if module._forward_hooks or module._forward_pre_hooks or len(inputs) != 1 or node.kwargs:
            return None
        reader = _MODULES.get(type(module))
        return reader(str(node.target), module) if reader else None
    if node.op in ("call_function", "call_method"):
        found = _FUNCTIONS.get(node.target) if node.op == "call_function" else _METHODS.get(str(node.target))
        return found(node, seen) if found else None
    return None


def activation(node: fx.Node, modules: Mapping[str, nn.Module]) -> Tail | None:
    """Return the activation that a node stands for, for a tensor of any shape; None if it is another or none."""
    if len(node.all_input_nodes) != 1:
        return None
    found: Op | None = None
    if node.op == "call_module":
        module = modules[str(node.target)]
        kind = type(module)
        if module._forward_hooks or module._forward_pre_hooks or node.kwargs:
            return None
        if kind.__module__ == "transformers.activations":
            return _TRANSFORMERS.get(kind.__name__)
        found = _MODULES[kind](str(node.target), module) if kind in _ACTIVATIONS else None
    elif node.target is F.gelu:
        tanh = (*node.args[1:], node.kwargs.get("approximate", "none"))[0]
        return {"none": Tail("gelu"), "tanh": Tail("gelu_tanh")}.get(str(tanh))
    elif node.op == "call_function" and node.target in _FUNCTIONS:
        found = _FUNCTIONS[node.target](node, {}) if len(node.args) == 1 else None
    elif node.op == "call_method" and str(node.target).removesuffix("_") in ("relu", "sigmoid", "tanh"):
        found = _METHODS[str(node.target)](node, {})
    return found.tail if isinstance(found, Activate) and found.factor is None else None


def is_nothing(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Tell whether a node gives its input back: dropout in eval mode, identity, contiguous."""
    if node.op == "call_module":
        return type(modules[str(node.target)]) in _NOTHINGS
    if node.op == "call_method":
        return node.target in ("contiguous", "detach") and len(node.args) == 1 and not node.kwargs
    return node.op == "call_function" and node.target is F.dropout and node.kwargs.get("training") is False


_NOTHINGS = {nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout}


def _floats(tensor: Tensor) -> Floats:
    return np.array(tensor.detach().numpy(), np.float32, order="C")


def _conv(name: str, module: nn.Module) -> Op | None:
    assert isinstance(module, nn.Conv2d)
    weight = module.weight.detach()
    if module.padding_mode != "zeros" or weight.dtype != torch.float32 or weight.device.type != "cpu":
        return None
    geometry = _geometry(module)
    out, per_group, *kernel = weight.shape
    bias = np.zeros(out, np.float32) if module.bias is None else _floats(module.bias)
    square = kernel[0] == kernel[1] and geometry.stride[0] == geometry.stride[1] and len(set(geometry.padding)) == 1
    plain = geometry.dilation == (1, 1) and geometry.stride[0] in (1, 2) and kernel[0] <= 7
    if module.groups == out == module.in_channels and square and plain and geometry.padding[0] <= kernel[0] // 2:
        return Depthwise(name, (0,), _floats(weight).reshape(out, -1), bias, geometry, layer=name)
    if geometry.stride[0] != geometry.stride[1] or geometry.stride[0] > 4:
        return None
    full = np.zeros((out, module.in_channels, *kernel), np.float32)
    members = out // module.groups
    for group in range(module.groups):
        rows, columns = slice(group * members, (group + 1) * members), slice(group * per_group, (group + 1) * per_group)
        full[rows, columns] = weight[rows].numpy()
    return Conv(name, (0,), full.reshape(out, -1), bias, geometry, layer=name)


def _geometry(module: nn.Conv2d) -> Geometry:
    high, wide = module.kernel_size
    row, column = module.dilation
    if module.padding == "same":
        totals = ((high - 1) * row, (wide - 1) * column)
        sides = (totals[0] // 2, totals[0] - totals[0] // 2, totals[1] // 2, totals[1] - totals[1] // 2)
    elif module.padding == "valid":
        sides = (0, 0, 0, 0)
    else:
        top, left = (int(side) for side in module.padding)
        sides = (top, top, left, left)
    return Geometry((high, wide), (module.stride[0], module.stride[1]), sides, (row, column))


def _norm(name: str, module: nn.Module) -> Op | None:
    assert isinstance(module, nn.BatchNorm2d)
    if module.running_mean is None or module.running_var is None:
        return None
    scale = (module.running_var.double() + module.eps).rsqrt()
    if module.weight is not None:
        scale = scale * module.weight.detach().double()
    shift = -module.running_mean.double() * scale
    if module.bias is not None:
        shift = shift + module.bias.detach().double()
    return Activate(name, (0,), NOTHING, _floats(scale.float()), _floats(shift.float()))


def _tail(tail: Tail) -> Callable[[str, nn.Module], Op]:
    return lambda name, module: Activate(name, (0,), tail)


def _hardtanh(name: str, module: nn.Module) -> Op:
    return Activate(name, (0,), Tail("clamp", float(module.min_val), float(module.max_val)))  # type: ignore[arg-type]


def _gelu(name: str, module: nn.Module) -> Op:
    return Activate(name, (0,), Tail("gelu_tanh" if module.approximate == "tanh" else "gelu"))


def _pool(name: str, module: nn.Module) -> Op | None:
    kind: Literal["max", "mean"] = "max" if isinstance(module, nn.MaxPool2d) else "mean"
    kernel, padding = _pair(module.kernel_size), _pair(module.padding)
    stride = _pair(module.stride if module.stride is not None else module.kernel_size)
    if module.ceil_mode or _pair(getattr(module, "dilation", 1)) != (1, 1) or getattr(module, "return_indices", False):
        return None
    if getattr(module, "divisor_override", None) is not None:
        return None
    geometry = Geometry(kernel, stride, (padding[0], padding[0], padding[1], padding[1]))
    return Pool(name, (0,), geometry, kind, bool(getattr(module, "count_include_pad", True)))


def _adaptive(name: str, module: nn.Module) -> Op | None:
    return Mean(name, (0,)) if _pair(module.output_size) == (1, 1) else None


def _pair(value: Any) -> tuple[int, int]:
    one, two = value if isinstance(value, (tuple, list)) else (value, value)
    return int(one), int(two)


_MODULES: dict[type[nn.Module], Callable[[str, Any], Op | None]] = {
    nn.Conv2d: _conv,
    nn.BatchNorm2d: _norm,
    nn.ReLU: _tail(RELU),
    nn.ReLU6: _tail(Tail("clamp", 0.0, 6.0)),
    nn.Hardtanh: _hardtanh,
    nn.SiLU: _tail(Tail("silu")),
    nn.GELU: _gelu,
    nn.Sigmoid: _tail(Tail("sigmoid")),
    nn.Hardswish: _tail(Tail("hardswish")),
    nn.Tanh: _tail(Tail("tanh")),
    nn.MaxPool2d: _pool,
    nn.AvgPool2d: _pool,
    nn.AdaptiveAvgPool2d: _adaptive,
}


_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Hardswish, nn.Tanh)
_TRANSFORMERS = {
    "GELUActivation": Tail("gelu"),
    "GELUTanh": Tail("gelu_tanh"),
    "NewGELUActivation": Tail("gelu_tanh"),
    "PytorchGELUTanh": Tail("gelu_tanh"),
    "FastGELUActivation": Tail("gelu_tanh"),
    "SiLUActivation": Tail("silu"),
}


def _plain(tail: Tail) -> Callable[[fx.Node, Mapping[fx.Node, Seen]], Op | None]:
    def reader(node: fx.Node, seen: Mapping[fx.Node, Seen]) -> Op | None:
        extra = set(node.kwargs) - {"inplace", "input"}
        return (
            Activate(node.name, (0,), tail) if len(node.all_input_nodes) == 1 and len(node.args) <= 1 and not extra else None
        )

    return reader


def _sum(node: fx.Node, seen: Mapping[fx.Node, Seen]) -> Op | None:
    inputs = node.all_input_nodes
    if len(node.args) != 2 or node.kwargs or not all(isinstance(one, fx.Node) for one in node.args):
        return None
    if len(inputs) == 1:
        return None
    return Add(node.name, (0, 1)) if seen[inputs[0]].shape == seen[inputs[1]].shape else None


def _product(node: fx.Node, seen: Mapping[fx.Node, Seen]) -> Op | None:
    inputs = node.all_input_nodes
    if len(node.args) != 2 or node.kwargs or len(inputs) != 2:
        return None
    one, two = (seen[each].shape or () for each in inputs)
    if one[:2] != two[:2]:
        return None
    if two[2:] == (1, 1):
        return Scale(node.name, (0, 1))
    return Scale(node.name, (1, 0)) if one[2:] == (1, 1) else None


def _mean(node: fx.Node, seen: Mapping[fx.Node, Seen]) -> Op | None:
    given = dict(zip(("dim", "keepdim"), node.args[1:], strict=False)) | dict(node.kwargs)
    dims = given.pop("dim", None)
    keep = given.pop("keepdim", False)
    if given or not isinstance(dims, (tuple, list)) or sorted(int(one) % 4 for one in dims) != [2, 3]:
        return None
    return Mean(node.name, (0,)) if isinstance(keep, bool) else None


def _adaptive_function(node: fx.Node, seen: Mapping[fx.Node, Seen]) -> Op | None:
    size = node.args[1] if len(node.args) > 1 else node.kwargs.get("output_size")
    return Mean(node.name, (0,)) if isinstance(size, (int, tuple, list)) and _pair(size) == (1, 1) else None


_FUNCTIONS: dict[Any, Callable[[fx.Node, Mapping[fx.Node, Seen]], Op | None]] = {
    **dict.fromkeys((F.relu, torch.relu, torch.relu_), _plain(RELU)),
    F.relu6: _plain(Tail("clamp", 0.0, 6.0)),
    F.silu: _plain(Tail("silu")),
    F.hardswish: _plain(Tail("hardswish")),
    **dict.fromkeys((torch.sigmoid, F.sigmoid), _plain(Tail("sigmoid"))),
    **dict.fromkeys((torch.tanh, F.tanh), _plain(Tail("tanh"))),
    **dict.fromkeys((operator.add, operator.iadd, torch.add), _sum),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul), _product),
    torch.mean: _mean,
    F.adaptive_avg_pool2d: _adaptive_function,
}
_METHODS: dict[str, Callable[[fx.Node, Mapping[fx.Node, Seen]], Op | None]] = {
    **dict.fromkeys(("relu", "relu_"), _plain(RELU)),
    **dict.fromkeys(("sigmoid", "sigmoid_"), _plain(Tail("sigmoid"))),
    **dict.fromkeys(("tanh", "tanh_"), _plain(Tail("tanh"))),
    **dict.fromkeys(("add", "add_"), _sum),
    **dict.fromkeys(("mul", "mul_"), _product),
    "mean": _mean,
}


# -- fusing -------------------------------------------------------------------------------------------------------


def fuse(chain: Chain) -> Chain:
    """Fold what follows a product into it: a batch norm into weight and bias, a sum and an activation into the tail."""
    ops: list[Op | None] = list(chain.ops)
    source = list(range(chain.inputs + len(ops)))  # where each value is made now

    def users(value: int) -> int:
        return sum(source[i] == value for op in ops if op is not None for i in op.inputs) + sum(
            source[i] == value for i in chain.outputs
        )

    def maker(value: int) -> tuple[int, Op | None]:
        number = source[value] - chain.inputs
        return number, ops[number] if number >= 0 else None

    for n, op in enumerate(list(ops)):
        if isinstance(op, Activate):
            before, made = maker(op.inputs[0])
            if made is None or users(source[op.inputs[0]]) != 1 or getattr(made, "tail", None) != NOTHING:
                continue
            merged = _merged(made, op)
            if merged is not None:
                ops[before], ops[n] = merged, None
                source[chain.inputs + n] = source[op.inputs[0]]
        elif isinstance(op, Add):
            order = sorted(op.inputs, key=lambda i: source[i], reverse=True)
            for value, other in (order, order[::-1]):
                before, made = maker(value)
                if isinstance(made, Conv) and len(made.inputs) == 1 and made.tail == NOTHING and users(source[value]) == 1:
                    # the product moves to the place of the sum, where both summands exist
                    ops[before], ops[n] = (
                        None,
                        replace(made, inputs=(made.inputs[0], other), name=f"{made.name} + {op.name}"),
                    )
                    break
    kept = [(n, op) for n, op in enumerate(ops) if op is not None]
    numbers = {i: i for i in range(chain.inputs)} | {chain.inputs + n: chain.inputs + k for k, (n, _) in enumerate(kept)}
    renamed = tuple(replace(op, inputs=tuple(numbers[source[i]] for i in op.inputs)) for _, op in kept)  # type: ignore[type-var]
    return Chain(chain.inputs, renamed, tuple(numbers[source[i]] for i in chain.outputs))


def _merged(made: Any, op: Activate) -> Op | None:
    """Return the operation that does both, None if there is none."""
    if op.factor is None or op.shift is None:
        with_tail: Op | None = replace(made, tail=op.tail) if isinstance(made, (Conv, Depthwise, Add, Activate)) else None
        return with_tail
    if not isinstance(made, (Conv, Depthwise)) or len(made.inputs) > 1:
        return None
    factor = op.factor.astype(np.float64)
    weight = (made.weight * factor[:, None]).astype(np.float32)
    bias = (made.bias * factor + op.shift).astype(np.float32)
    fresh: dict[str, Any] = {"cuts": {}} if isinstance(made, Conv) else {}  # those of the other weight
    folded: Op = replace(made, weight=weight, bias=bias, tail=op.tail, **fresh)
    return folded
