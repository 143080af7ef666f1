"""A linear layer that multiplies by a format outside of the folder `formats`: one that wants more than a weight to pay.

`skipping` wants zeros in the input, the formats of `cuda` want a device. They cannot be measured on noise on every layer,
as those of the folder are: `worth_trying` says for a layer and an input which of them make sense.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from openwork.errors import ModelError
from openwork.runtime import modules
from openwork.runtime.bounds import bound
from openwork.runtime.formats import Format

PLACES = ("skipping", "cuda.semi_structured", "cuda.blocks")
"""Modules of `openwork.runtime` with the functions of `formats.Format`."""
LEAST_ZEROS = 0.25
"""Share of an input's zeros from which skipping them is worth a measurement."""
ROWS = 32
"""Input rows on which a packed layer must be right."""


def load(name: str) -> Format:
    """Return a format by its place in `openwork.runtime`.

    Raises:
        ModelError: if there is no such format.
    """
    if name not in PLACES:
        raise ModelError(f"there is no format {name!r} outside of formats: choose from {', '.join(PLACES)}")
    return cast(Format, importlib.import_module(f"openwork.runtime.{name}"))


def worth_trying(layer: nn.Module, x: Tensor) -> list[str]:
    """Return which of `PLACES` could be faster than a layer on an input that it gets, the input's zeros counted.

    Args:
        layer: any module; only plain linear layers have such formats.
        x: (..., in), real input: zeros in noise say nothing.
    """
    if (
        not isinstance(layer, nn.Linear)
        or x.numel() == 0
        or x.dtype != layer.weight.dtype
        or x.device != layer.weight.device
    ):
        return []
    if x.device.type != "cuda" and modules.obstacle(layer) is None:
        return ["skipping"] if has_zeros(x) else []
    from openwork.runtime import cuda

    return [f"cuda.{name}" for name in cuda.names() if cuda.obstacle(layer, name) is None]


def has_zeros(x: Tensor) -> bool:
    """Tell whether x is on the CPU and so many of its entries are zero that skipping them may pay."""
    return x.device.type == "cpu" and x.numel() > 0 and 1.0 - int(torch.count_nonzero(x)) / x.numel() >= LEAST_ZEROS


def pack(layer: nn.Linear, name: str) -> WrappedLinear:
    """Return the packed twin of a linear layer, in eval mode. The layer itself is left as it is.

    Raises:
        ModelError: if there is no such format, or it does not take the layer, with the reason.
    """
    load(name)
    if name == "skipping":
        from openwork.runtime.skipping import SkippingLinear

        return SkippingLinear(layer)
    from openwork.runtime import cuda

    return cuda.pack(layer, name.removeprefix("cuda."))


def is_right(twin: WrappedLinear, layer: nn.Linear, x: Tensor) -> bool:
    """Hold a packed layer to the bound of its products on some rows of x (..., in): a wrong product is never a fast one."""
    rows = x.detach().reshape(math.prod(x.shape[:-1]), x.shape[-1])[:ROWS]
    weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
    exact = rows.double() @ weight.double().t() + (0.0 if bias is None else bias.double())
    return bool(((twin(rows).double() - exact).abs() <= bound(weight, bias, rows)).all())


class WrappedLinear(nn.Module):
    """A linear layer (..., in) -> (..., out) with a packed weight; inference only.

    Saves the dense weight under the layer's own names.
    """

    def __init__(self, layer: nn.Linear, format: str, packed: Any) -> None:
        """Take the place of a layer, in eval mode.

        Args:
            layer: gives the sizes; it is left as it is.
            format: of `PLACES`.
            packed: what the format's `pack` made of the layer's weight and bias.
        """
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.format, self.packed = format, packed
        self._matmul = load(format).matmul
        self.eval()

    @property
    def weight(self) -> Tensor:
        """The dense weight (out, in), unpacked anew at each reading."""
        return load(self.format).unpack(self.packed)[0]

    @property
    def bias(self) -> Tensor | None:
        """The bias (out), or None."""
        return load(self.format).unpack(self.packed)[1]

    def forward(self, x: Tensor) -> Tensor:
        """Return `x @ weight.T + bias`, without gradients."""
        return self._matmul(self.packed, x.detach())

    def extra_repr(self) -> str:
        """Return what `print` shows."""
        size = load(self.format).nbytes(self.packed)
        return f"{self.out_features}x{self.in_features}, format={self.format}, bytes={size}"

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the function, which the format's name finds again."""
        return {key: value for key, value in self.__dict__.items() if key != "_matmul"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Find the function again."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._matmul = load(self.format).matmul

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        errors: list[str] = rest[-1]
        errors.append(f"{prefix.rstrip('.')!r} is packed: load into the original model, then accelerate it again")
