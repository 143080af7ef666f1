"""Layers that hold a packed weight and take the place of `nn.Linear` and `nn.Conv2d`; inference only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from openwork.runtime import formats


def obstacle(layer: nn.Module) -> str | None:
    """Return why a layer cannot be packed, None if it can: plain linear layers and convolutions without groups can."""
    if isinstance(layer, nn.Linear):
        if type(layer).forward is not nn.Linear.forward:
            return "has a forward of its own"
    elif isinstance(layer, nn.Conv2d):
        own = type(layer).forward is nn.Conv2d.forward and type(layer)._conv_forward is nn.Conv2d._conv_forward
        if not own:
            return "has a forward of its own"
        if layer.groups != 1:
            return "has groups"
        if layer.padding_mode != "zeros":
            return f"pads by {layer.padding_mode}"
    else:
        return "is neither linear nor a 2-d convolution"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "has hooks"
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin) or layer.weight.numel() == 0:
        return "has no weight yet"
    if layer.weight.dtype not in (torch.float32, torch.float64) or layer.weight.device.type != "cpu":
        return f"is {layer.weight.dtype} on {layer.weight.device}"
    return None


def pack(layer: nn.Linear | nn.Conv2d, format: str) -> PackedLinear | PackedConv2d:
    """Return the packed twin of a layer, in eval mode. The layer itself is left as it is.

    Raises:
        ModelError: if there is no such format, or it refuses the weight.
    """
    packed = formats.load(format).pack(layer.weight.detach().flatten(1), layer.bias)
    made = PackedConv2d(layer, format, packed) if isinstance(layer, nn.Conv2d) else PackedLinear(layer, format, packed)
    return made.eval()


class _PackedLayer(nn.Module):
    """A packed weight and its product. Saves the dense weight under the layer's own names; cannot be trained."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, format: str, packed: Any) -> None:
        super().__init__()
        self.format = format
        self.packed = packed
        self.shape = layer.weight.shape
        self._matmul = formats.load(format).matmul

    @property
    def weight(self) -> Tensor:
        """The dense weight, unpacked anew at each reading."""
        return formats.load(self.format).unpack(self.packed)[0].reshape(self.shape)

    @property
    def bias(self) -> Tensor | None:
        """The bias (out), or None."""
        return formats.load(self.format).unpack(self.packed)[1]

    def extra_repr(self) -> str:
        """Return what `print` shows."""
        size = formats.load(self.format).nbytes(self.packed)
        return f"{'x'.join(map(str, self.shape))}, format={self.format}, bytes={size}"

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the function, which the format's name finds again."""
        return {key: value for key, value in self.__dict__.items() if key != "_matmul"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Find the function again."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._matmul = formats.load(self.format).matmul

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        errors: list[str] = rest[-1]
        errors.append(f"{prefix.rstrip('.')!r} is packed: load into the original model, then accelerate it again")


class PackedLinear(_PackedLayer):
    """A linear layer (…, in) -> (…, out) with a packed weight."""

    def __init__(self, layer: nn.Linear, format: str, packed: Any) -> None:
        super().__init__(layer, format, packed)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Return `x @ weight.T + bias`, without gradients."""
        return self._matmul(self.packed, x.detach())


class PackedConv2d(_PackedLayer):
    """A 2-d convolution with a packed weight: a product with the image's patches, example by example."""

    def __init__(self, layer: nn.Conv2d, format: str, packed: Any) -> None:
        super().__init__(layer, format, packed)
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        self.kernel_size, self.stride, self.dilation = layer.kernel_size, layer.stride, layer.dilation
        self.padding, self.padding_mode, self.groups = layer.padding, layer.padding_mode, layer.groups

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Return the maps (batch, out, height, width) of images (batch, in, height, width), without gradients."""
        if x.ndim == 3:
            return self.forward(x[None])[0]
        sides = _padding(self.padding, self.kernel_size, self.dilation)
        padded = functional.pad(x, sides) if any(sides) else x
        high, wide = (
            (size - step * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, step in zip(
                padded.shape[2:], self.kernel_size, self.stride, self.dilation, strict=True
            )
        )
        maps = [
            self._matmul(self.packed, self._patches(image, high, wide).t()).t().reshape(-1, high, wide) for image in padded
        ]
        if len(maps) == 1:
            return maps[0][None]
        return torch.stack(maps) if maps else x.new_empty(0, self.out_channels, high, wide)

    def _patches(self, image: Tensor, high: int, wide: int) -> Tensor:
        """Return the patches of one image (in, height, width) as columns (in * kernel, positions)."""
        channels, *size = image.shape
        if self.kernel_size == (1, 1) and [high, wide] == size:
            return image.reshape(channels, -1)
        (kernel_h, kernel_w), (stride_h, stride_w), (step_h, step_w) = self.kernel_size, self.stride, self.dilation
        by_channel, by_row, by_column = image.stride()
        windows = image.as_strided(
            (channels, kernel_h, kernel_w, high, wide),
            (by_channel, by_row * step_h, by_column * step_w, by_row * stride_h, by_column * stride_w),
        )
        return windows.reshape(channels * kernel_h * kernel_w, high * wide)


def _padding(padding: tuple[int, ...] | str, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> list[int]:
    """Return left, right, top and bottom padding; `same` puts the odd one to the right and bottom, as torch does."""
    if padding == "valid":
        return [0, 0, 0, 0]
    if isinstance(padding, str):
        totals = [step * (size - 1) for size, step in zip(kernel, dilation, strict=True)]
        return [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
    return [int(side) for size in reversed(padding) for side in (size, size)]
