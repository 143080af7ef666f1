"""Formats for weights on a CUDA device. The folder is the registry, as `runtime.formats` is: one file is one format.

A format here has one function more, `obstacle`, which says why it cannot take a weight: its hardware, its libraries, its
shapes and the zeros it needs. float16, bfloat16 and, for blocks, float32; sums are float32. Inference only.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Protocol, cast

from torch import Tensor, nn

from openwork.errors import ModelError
from openwork.runtime.formats import Format
from openwork.runtime.wrapping import WrappedLinear


class DeviceFormat(Format, Protocol):
    """A format that can say why it does not take a weight."""

    def obstacle(self, weight: Tensor, bias: Tensor | None = None) -> str | None:
        """Return why `pack` would refuse weight (out, in) and bias (out), None if it would not."""


def names() -> list[str]:
    """Return the names of the formats."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def load(name: str) -> DeviceFormat:
    """Return a format by name.

    Raises:
        ModelError: if there is no such format.
    """
    if name not in names():
        raise ModelError(f"there is no CUDA format {name!r}: choose from {', '.join(names())}")
    return cast(DeviceFormat, importlib.import_module(f"{__name__}.{name}"))


def obstacle(layer: nn.Module, name: str) -> str | None:
    """Return why a layer cannot be held in a format, None if it can.

    Args:
        layer: any module; only plain linear layers can.
        name: of the format.
    """
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        return "is no plain linear layer"
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        return "has no weight yet"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "has hooks"
    return load(name).obstacle(layer.weight, layer.bias)


def pack(layer: nn.Linear, name: str) -> WrappedLinear:
    """Return the packed twin of a linear layer, in eval mode, on the layer's device. The layer itself is left as it is.

    Raises:
        ModelError: if the layer cannot be held in the format, with the reason.
    """
    reason = obstacle(layer, name)
    if reason is not None:
        raise ModelError(f"cannot hold this {type(layer).__name__} in the format {name}: it {reason}")
    return WrappedLinear(layer, f"cuda.{name}", load(name).pack(layer.weight.detach(), layer.bias))
