"""Convolutional networks from torch to LiteRT: convolutions, linear layers, pooling, sums and ReLU, traced by torch.fx."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from openwork.bench.folding import folded
from openwork.bench.peers import Unavailable
from openwork.bench.peers._tflite import Writer

SPARSE_FROM = 2 / 3
"""Share of zeros from which XNNPACK considers a 1x1 convolution sparse."""
_PASS = (nn.Identity, nn.Dropout)
_RELU, _RELU6 = (nn.ReLU, torch.relu, nn.functional.relu), (nn.ReLU6, nn.functional.relu6)


def convert(model: nn.Module, example: Tensor, *, sparse: bool) -> bytes:
    """Return the network as a LiteRT model for images (batch, height, width, channels).

    Args:
        model: in eval mode; batch norm is folded.
        example: one batch of images (batch, channels, height, width).
        sparse: store weights of 1x1 convolutions and linear layers with at least two thirds zeros as compressed rows.

    Raises:
        Unavailable: if the network has a step that this conversion does not know.
    """
    if not isinstance(example, Tensor) or example.dim() != 4:
        raise Unavailable("the conversion to LiteRT takes networks on images only; others need litert-torch, which holds "
                          "torch at an older version")  # fmt: skip
    try:
        traced = fx.symbolic_trace(folded(model))
    except Exception as error:  # the user's code, traced
        raise Unavailable(f"torch.fx cannot trace this model ({error}), which the conversion to LiteRT needs") from error
    return _Conversion(traced, sparse).run(example)


class _Conversion:
    def __init__(self, traced: fx.GraphModule, sparse: bool) -> None:
        self.traced, self.sparse = traced, sparse
        self.modules = dict(traced.named_modules())
        self.out = Writer()
        self.made: dict[fx.Node, int] = {}
        self.plain = self.out.schema.ActivationFunctionType.NONE

    def run(self, example: Tensor) -> bytes:
        batch, channels, high, wide = example.shape
        start = self.out.tensor((batch, high, wide, channels))
        result = start
        for node in self.traced.graph.nodes:
            if node.op == "placeholder":
                self.made[node] = start
            elif node.op == "output":
                result = self.made[node.args[0]]
            else:
                self.made[node] = self.step(node)
        return self.out.finish([start], [result])

    def step(self, node: fx.Node) -> int:
        module = self.modules.get(str(node.target)) if node.op == "call_module" else None
        kind: Any = type(module) if module is not None else node.target
        x = self.made[node.args[0]] if node.args and isinstance(node.args[0], fx.Node) else -1
        if isinstance(module, nn.Conv2d) and module.padding_mode == "zeros":
            return self.convolution(x, module)
        if isinstance(module, nn.Linear):
            return self.linear(x, module)
        if isinstance(module, nn.MaxPool2d):
            return self.pool(x, module)
        if isinstance(module, _PASS) or (isinstance(module, nn.Sequential) and not len(module)):
            return x
        if kind in _RELU or kind in _RELU6:
            return self.out.operator("RELU" if kind in _RELU else "RELU6", [x], self.out.tensor(self.out.shapes[x]))
        if kind in (operator.add, torch.add, operator.iadd, "add", "add_"):
            return self.add(x, self.made[node.args[1]])  # type: ignore[index]
        if (kind in ("mean", torch.mean) and self.dims(node) == (2, 3)) or self.is_global(module):
            return self.mean(x)
        if kind in ("flatten", torch.flatten, nn.Flatten):
            return self.flat(x)
        raise Unavailable(f"the conversion to LiteRT does not know {getattr(kind, '__name__', kind)!r}: convolutions, "
                          "linear layers, max pooling, global means, sums and ReLU are converted")  # fmt: skip

    def convolution(self, x: int, layer: nn.Conv2d) -> int:
        out, schema = self.out, self.out.schema
        sides = layer.padding if not isinstance(layer.padding, str) else None
        if sides is None or layer.groups not in (1, layer.in_channels):
            raise Unavailable("the conversion to LiteRT takes convolutions with padding in numbers, plain or depthwise")
        x = self.padded(x, sides, None)
        batch, *size, _ = out.shapes[x]
        high, wide = (
            (n - step * (k - 1) - 1) // stride + 1
            for n, k, stride, step in zip(size, layer.kernel_size, layer.stride, layer.dilation, strict=True)
        )
        bias = np.zeros(layer.out_channels, np.float32) if layer.bias is None else layer.bias.detach().numpy()
        common = {
            "padding": schema.Padding.VALID, "strideH": layer.stride[0], "strideW": layer.stride[1],
            "dilationHFactor": layer.dilation[0], "dilationWFactor": layer.dilation[1],
            "fusedActivationFunction": self.plain,
        }  # fmt: skip
        y, weight = out.tensor((batch, high, wide, layer.out_channels)), layer.weight.detach()
        if layer.groups == 1:
            kernel = self.weight(weight.permute(0, 2, 3, 1), sparse=layer.kernel_size == (1, 1))
            return out.operator("CONV_2D", [x, kernel, out.tensor(bias.shape, bias)], y, "Conv2D", **common)
        kernel = self.weight(weight.permute(1, 2, 3, 0), sparse=False)
        common["depthMultiplier"] = layer.out_channels // layer.groups
        places = [x, kernel, out.tensor(bias.shape, bias)]
        return out.operator("DEPTHWISE_CONV_2D", places, y, "DepthwiseConv2D", **common)

    def linear(self, x: int, layer: nn.Linear) -> int:
        shape = self.out.shapes[x]
        bias = np.zeros(layer.out_features, np.float32) if layer.bias is None else layer.bias.detach().numpy()
        y = self.out.tensor((math.prod(shape[:-1]), layer.out_features))
        places = [x, self.weight(layer.weight.detach(), sparse=True), self.out.tensor(bias.shape, bias)]
        return self.out.operator("FULLY_CONNECTED", places, y, "FullyConnected")

    def weight(self, weight: Tensor, *, sparse: bool) -> int:
        if self.sparse and sparse and int((weight == 0).sum()) >= SPARSE_FROM * weight.numel():
            return self.out.densified(weight)
        return self.out.tensor(weight.shape, weight.contiguous().numpy())

    def padded(self, x: int, sides: tuple[int, ...], value: float | None) -> int:
        if not any(sides):
            return x
        batch, high, wide, channels = self.out.shapes[x]
        y = self.out.tensor((batch, high + 2 * sides[0], wide + 2 * sides[1], channels))
        amounts = np.array([[0, 0], [sides[0]] * 2, [sides[1]] * 2, [0, 0]], np.int32)
        places = [x, self.out.tensor(amounts.shape, amounts)]
        if value is None:
            return self.out.operator("PAD", places, y, "Pad")
        return self.out.operator("PADV2", [*places, self.out.tensor((1,), np.array([value], np.float32))], y, "PadV2")

    def pool(self, x: int, layer: nn.MaxPool2d) -> int:
        kernel, stride, sides = (_pair(value) for value in (layer.kernel_size, layer.stride, layer.padding))
        if layer.ceil_mode or layer.return_indices or _pair(layer.dilation) != (1, 1):
            raise Unavailable("the conversion to LiteRT takes plain max pooling only")
        x = self.padded(x, sides, float(np.finfo(np.float32).min))
        batch, high, wide, channels = self.out.shapes[x]
        size = ((high - kernel[0]) // stride[0] + 1, (wide - kernel[1]) // stride[1] + 1)
        return self.out.operator(
            "MAX_POOL_2D", [x], self.out.tensor((batch, *size, channels)), "Pool2D",
            padding=self.out.schema.Padding.VALID, strideH=stride[0], strideW=stride[1], filterHeight=kernel[0],
            filterWidth=kernel[1], fusedActivationFunction=self.plain,
        )  # fmt: skip

    def add(self, one: int, two: int) -> int:
        y = self.out.tensor(self.out.shapes[one])
        return self.out.operator("ADD", [one, two], y, "Add", fusedActivationFunction=self.plain)

    def mean(self, x: int) -> int:
        batch, _, _, channels = self.out.shapes[x]
        axes = self.out.tensor((2,), np.array([1, 2], np.int32))
        return self.out.operator("MEAN", [x, axes], self.out.tensor((batch, channels)), "Reducer", keepDims=False)

    def flat(self, x: int) -> int:
        if len(self.out.shapes[x]) == 2:
            return x
        raise Unavailable("the conversion to LiteRT flattens vectors only: maps lie in another order there")

    def dims(self, node: fx.Node) -> tuple[int, ...]:
        found: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else ())
        return tuple(int(d) % 4 for d in (found if isinstance(found, (tuple, list)) else (found,)))

    def is_global(self, module: nn.Module | None) -> bool:
        return isinstance(module, nn.AdaptiveAvgPool2d) and _pair(module.output_size) == (1, 1)


def _pair(value: Any) -> tuple[int, int]:
    return (int(value[0]), int(value[1])) if isinstance(value, (tuple, list)) else (int(value), int(value))


def laid(example: Tensor) -> Tensor:
    """Return images as LiteRT takes them: (batch, height, width, channels)."""
    return example.permute(0, 2, 3, 1).contiguous()


def reader() -> Callable[[Tensor], Tensor]:
    """Return what turns an output into torch's: maps back to (batch, channels, height, width)."""
    return lambda y: y.permute(0, 3, 1, 2) if y.dim() == 4 else y
