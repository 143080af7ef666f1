"""Layers as matrices: which modules are pruned, how their weights become (groups, outputs, inputs), and what they multiply.

Every layer here computes, for each of its groups g, y_go = sum_i W_goi x_gi. Linear layers have one group; a convolution's
inputs are the patches under its kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openwork.errors import ModelError

Select = str | Iterable[str] | Callable[[str, nn.Module], bool] | None

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_CHUNK = 2**24  # entries of unfolded patches held at a time


@dataclass(frozen=True)
class Layer:
    """A module whose weight can be pruned.

    Attributes:
        name: the module's name in the model; "" for the model itself.
        module: the module.
        kind: "linear", "transposed" (transformers' Conv1D holds (inputs, outputs)), "conv" or "embedding".
    """

    name: str
    module: nn.Module
    kind: str

    @property
    def parameter(self) -> str:
        """The weight's name in the model."""
        return f"{self.name}.weight" if self.name else "weight"

    @property
    def weight(self) -> nn.Parameter:
        """The weight as the module holds it."""
        weight = self.module.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def groups(self) -> int:
        """Groups of a convolution, 1 for other layers."""
        return int(self.module.groups) if isinstance(self.module, nn.Conv1d | nn.Conv2d) else 1

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight with outputs first: (out, in, *kernel)."""
        shape = self.weight.shape
        return torch.Size((shape[1], shape[0])) if self.kind == "transposed" else shape

    @property
    def width(self) -> int:
        """Inputs of one output: in * kernel."""
        return math.prod(self.shape[1:])


def outputs_first(layer: Layer, tensor: Tensor) -> Tensor:
    """Return a tensor of the weight's own shape as (out, in, *kernel), or the other way round: it is its own inverse."""
    return tensor.t().contiguous() if layer.kind == "transposed" else tensor


def matrix(layer: Layer, weight: Tensor) -> Tensor:
    """Return a weight (out, in, *kernel) as (groups, outputs of a group, inputs of an output)."""
    return weight.reshape(layer.groups, weight.shape[0] // layer.groups, -1)


def inputs(layer: Layer, x: Tensor, keep: Tensor | None = None) -> Iterator[Tensor]:
    """Yield what the layer multiplies, as (groups, tokens, inputs of an output), in pieces of bounded size.

    Args:
        layer: a linear layer or a convolution.
        x: the input that it was called with, (..., in) or (batch, in, *space).
        keep: bool, the first dimensions of x: positions that count. None counts all; convolutions do not look at it.
    """
    if layer.kind == "conv":
        yield from _patches(layer, x)
        return
    rows = x.detach().reshape(-1, x.shape[-1])
    if keep is not None:
        keep = keep.reshape(*keep.shape, *[1] * (x.dim() - 1 - keep.dim())).expand(x.shape[:-1])
        rows = rows[keep.reshape(-1).to(rows.device)]
    yield rows.unsqueeze(0)


def _patches(layer: Layer, x: Tensor) -> Iterator[Tensor]:
    conv = layer.module
    assert isinstance(conv, nn.Conv1d | nn.Conv2d)
    flat = isinstance(conv, nn.Conv1d)
    x = x.detach() if x.dim() == len(conv.kernel_size) + 2 else x.detach().unsqueeze(0)
    sides = list(conv._reversed_padding_repeated_twice)
    if any(sides):
        x = F.pad(x, sides, mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode)
    if flat:  # a line is an image of one row
        x = x.unsqueeze(-2)
    kernel, dilation, stride = ((1, *size) if flat else size for size in (conv.kernel_size, conv.dilation, conv.stride))
    step = max(1, _CHUNK // max(1, math.prod(x.shape[1:]) * math.prod(kernel)))
    for part in torch.split(x, step):
        columns = F.unfold(part, kernel, dilation=dilation, stride=stride)  # (batch, in * kernel, positions)
        grouped = columns.reshape(part.shape[0], layer.groups, layer.width, -1)
        yield grouped.permute(1, 0, 3, 2).reshape(layer.groups, -1, layer.width)


def all_layers(model: nn.Module) -> list[Layer]:
    """Return every module of `model` that is a layer, embeddings included, in model order; a shared module once.

    What torch.nn.MultiheadAttention holds is left out: it multiplies its weights without calling a layer.
    """
    found = []
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention))
    for name, module in model.named_modules():
        kind = _kind(module)
        if kind and not (inside and name.startswith(inside)):
            found.append(Layer(name, module, kind))
    return found


def _kind(module: nn.Module) -> str:
    weight = module._parameters.get("weight")
    if weight is None or not weight.is_floating_point():
        return ""
    if isinstance(module, nn.Linear) and weight.dim() == 2:
        return "linear"
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return "conv"
    if isinstance(module, nn.Embedding):
        return "embedding"
    named = any(cls.__name__ == "Conv1D" for cls in type(module).__mro__)
    bias = module._parameters.get("bias")
    if named and weight.dim() == 2 and (bias is None or bias.shape == weight.shape[1:]):
        return "transposed"
    return ""


def choose(model: nn.Module, select: Select, exclude: str | Iterable[str], stack: str | None) -> list[Layer]:
    """Return the layers to prune, in model order; a tied weight once for every layer that holds it.

    Args:
        model: any module.
        select: names or globs of layers or parameters, or a function (name, module) -> bool. None leaves out embeddings,
            layers inside a module whose name says embedding, and the head: the layer of `get_output_embeddings`, and
            with a list of blocks the linear layers behind it, otherwise the last linear layer unless it is the only layer.
        exclude: names or globs to leave dense.
        stack: the name of the list of blocks, None without one.

    Raises:
        ModelError: if a name matches nothing, nothing is left, or a weight is of a dtype that cannot be pruned.
    """
    every = all_layers(model)
    without = _matching(every, [exclude] if isinstance(exclude, str) else list(exclude))
    if select is None:
        chosen = _default(model, every, stack)
    elif callable(select):
        chosen = [layer for layer in every if select(layer.name, layer.module)]
    else:
        named = _matching(every, [select] if isinstance(select, str) else list(select))
        chosen = [layer for layer in every if layer.name in named]
    chosen = [layer for layer in chosen if layer.name not in without]
    if not chosen:
        names = ", ".join(layer.name or "(the model itself)" for layer in every[:20]) or "none"
        raise ModelError(f"nothing to prune in {type(model).__name__}: name layers with select; its layers are {names}")
    for layer in chosen:
        if layer.weight.dtype not in DTYPES:
            dtype = str(layer.weight.dtype).removeprefix("torch.")
            raise ModelError(f"{layer.parameter!r} is {dtype}: convert it to float32, float16 or bfloat16, or exclude it")
        if layer.weight.numel() == 0:
            raise ModelError(f"{layer.parameter!r} of shape {tuple(layer.weight.shape)} is empty: exclude it")
    return chosen


def _default(model: nn.Module, every: list[Layer], stack: str | None) -> list[Layer]:
    tables = [layer for layer in every if layer.kind == "embedding"]
    tied = {id(layer.weight) for layer in tables}
    body = [layer for layer in every if id(layer.weight) not in tied and "emb" not in layer.name.lower()]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    body = [layer for layer in body if layer.module is not head]
    linear = [layer for layer in body if layer.kind != "conv"]
    if stack is not None:
        last = max(index for index, layer in enumerate(every) if layer.name.startswith(f"{stack}."))
        behind = {layer.name for layer in every[last + 1 :] if layer.kind != "conv"}
        return [layer for layer in body if layer.name not in behind]
    if head is None and linear and len(body) > 1:
        body.remove(linear[-1])
    return body


def _matching(every: list[Layer], globs: list[str]) -> set[str]:
    """Return the names of the layers that the globs name, by layer, by parameter, or by a module around them."""
    found: set[str] = set()
    for glob in globs:
        names = {layer.name for layer in every if _matches(layer, glob)}
        if not names:
            known = ", ".join(layer.name for layer in every[:20])
            raise ModelError(f"no layer is called or matches {glob!r}; the first of the model's {len(every)} are {known}")
        found |= names
    return found


def _matches(layer: Layer, glob: str) -> bool:
    return fnmatchcase(layer.name, glob) or fnmatchcase(layer.parameter, glob) or layer.name.startswith(f"{glob}.")


def left_dense(model: nn.Module, pruned: Iterable[str]) -> tuple[str, ...]:
    """Return the names of the parameters of two or more dimensions that are not among `pruned`, ties by first name."""
    done = set(pruned)
    return tuple(name for name, param in model.named_parameters() if param.dim() >= 2 and name not in done)
