"""Layers that hold a packed weight and take the place of linear, convolutional and recurrent ones; inference only."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from openwork.runtime import formats, recurrent
from openwork.runtime.kernels.activations import Act
from openwork.runtime.spmm import then

Limits = tuple[float, float] | None


def is_conv1d(layer: nn.Module) -> bool:
    """Tell whether a layer is the `Conv1D` of transformers (GPT-2): a linear layer whose weight is (in, out)."""
    kind = type(layer)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def obstacle(layer: nn.Module) -> str | None:
    """Return why a layer cannot be packed, None if it can.

    Linear layers, transformers' Conv1D, 2-d convolutions without groups, LSTM and GRU can, with weights of float32 or
    float64 on the CPU.
    """
    if isinstance(layer, nn.Linear):
        problem = "" if type(layer).forward is nn.Linear.forward else "has a forward of its own"
    elif isinstance(layer, nn.Conv2d):
        problem = _of_convolution(layer)
    elif isinstance(layer, (nn.LSTM, nn.GRU)):
        problem = recurrent.obstacle(layer) or ""
    elif is_conv1d(layer):
        problem = ""
    else:
        problem = "is neither linear, a 2-d convolution, an LSTM nor a GRU"
    if problem:
        return problem
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        return "has no weight yet"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "has hooks"
    if hasattr(layer, "parametrizations"):
        return "is parametrized"
    weights = weights_of(layer)
    if any(weight.numel() == 0 for weight in weights):
        return "has no weight yet"
    for weight in weights:
        if weight.dtype not in (torch.float32, torch.float64) or weight.device.type != "cpu":
            return f"is {weight.dtype} on {weight.device}"
    return None


def weights_of(layer: nn.Module) -> list[Tensor]:
    """Return the weights of a layer that can be packed, as they stand in it; several in a recurrent one."""
    if isinstance(layer, (nn.LSTM, nn.GRU)):
        return [value for name, value in layer.named_parameters() if name.startswith("weight_")]
    return [cast(Tensor, layer.weight)]


def matrix_of(layer: nn.Module) -> Tensor:
    """Return the weight of a linear or convolutional layer as a matrix (out, in)."""
    weight = cast(Tensor, layer.weight).detach()
    return weight.t() if is_conv1d(layer) else weight.flatten(1)


def pack(layer: nn.Module, format: str, act: Act = "none", clamp: Limits = None) -> nn.Module:
    """Return the packed twin of a layer, in eval mode. The layer itself is left as it is.

    Args:
        layer: one without an `obstacle`.
        format: one of `formats.names()`.
        act, clamp: an activation that follows, as in `spmm.spmm_chw`; done with the product where the format can. None in
            a recurrent layer.

    Raises:
        ModelError: if there is no such format, or it refuses the weight.
    """
    if isinstance(layer, (nn.LSTM, nn.GRU)):
        return recurrent.pack_recurrent(layer, format)
    packed = formats.load(format).pack(matrix_of(layer), cast("Tensor | None", layer.bias))
    kind = PackedConv2d if isinstance(layer, nn.Conv2d) else PackedConv1D if is_conv1d(layer) else PackedLinear
    return kind(cast(Any, layer), format, packed, act, clamp).eval()


class PackedLayer(nn.Module):
    """A packed weight and its product. Saves the dense weight under the layer's own names; cannot be trained."""

    def __init__(self, layer: nn.Module, format: str, packed: Any, act: Act = "none", clamp: Limits = None) -> None:
        super().__init__()
        self.format = format
        self.packed = packed
        self.shape = cast(Tensor, layer.weight).shape
        self.act, self.clamp = act, clamp
        self._find()

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
        after = "" if not self._after else f", {self.act if self.clamp is None else f'clamp{self.clamp}'}"
        return f"{'x'.join(map(str, self.shape))}, format={self.format}, bytes={size}{after}"

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the functions, which the format's name finds again."""
        return {key: value for key, value in self.__dict__.items() if key not in ("_matmul", "_columns")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Find the functions again."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._find()

    def tune(self, x: Tensor, seconds: float) -> None:
        """Measure how the format multiplies inputs like x fastest, if it can do so in several ways; the result is kept."""
        tune = getattr(formats.load(self.format), "tune", None)
        if tune is not None and x.numel():
            tune(self.packed, *self._asked(x), seconds=seconds)

    def _asked(self, x: Tensor) -> tuple[Tensor, bool]:
        """Return what the product gets for an input, and whether that is (…, in) or (…, in, columns)."""
        return x, True

    @property
    def _after(self) -> bool:
        return self.act != "none" or self.clamp is not None

    def _find(self) -> None:
        """Find the format's products; one with columns side by side takes the activation along."""
        module = cast(Any, formats.load(self.format))
        self._matmul, self._columns = module.matmul, getattr(module, "columns", None)
        if not self._after:
            return
        if self._columns is not None:
            self._matmul = functools.partial(module.matmul, act=self.act, clamp=self.clamp)
            self._columns = functools.partial(module.columns, act=self.act, clamp=self.clamp)
        else:
            self._matmul = functools.partial(_then, module.matmul, self.act, self.clamp)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        errors: list[str] = rest[-1]
        errors.append(f"{prefix.rstrip('.')!r} is packed: load into the original model, then accelerate it again")


class PackedLinear(PackedLayer):
    """A linear layer (…, in) -> (…, out) with a packed weight."""

    def __init__(self, layer: nn.Linear, format: str, packed: Any, act: Act = "none", clamp: Limits = None) -> None:
        super().__init__(layer, format, packed, act, clamp)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Return `x @ weight.T + bias`, without gradients."""
        return cast(Tensor, self._matmul(self.packed, x.detach()))


class PackedConv1D(PackedLayer):
    """The Conv1D of transformers, (…, in) -> (…, out), with a packed weight, which is saved as (in, out)."""

    def __init__(self, layer: nn.Module, format: str, packed: Any, act: Act = "none", clamp: Limits = None) -> None:
        super().__init__(layer, format, packed, act, clamp)
        self.nx, self.nf = self.shape

    @property
    def weight(self) -> Tensor:
        """The dense weight (in, out), unpacked anew at each reading."""
        return formats.load(self.format).unpack(self.packed)[0].t().contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """Return `x @ weight + bias`, without gradients."""
        return cast(Tensor, self._matmul(self.packed, x.detach()))


class PackedConv2d(PackedLayer):
    """A 2-d convolution with a packed weight: a product with the pixels, or with the patches, of its images."""

    def __init__(self, layer: nn.Conv2d, format: str, packed: Any, act: Act = "none", clamp: Limits = None) -> None:
        super().__init__(layer, format, packed, act, clamp)
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        self.kernel_size, self.stride, self.dilation = layer.kernel_size, layer.stride, layer.dilation
        self.padding, self.padding_mode, self.groups = layer.padding, layer.padding_mode, layer.groups

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Return the maps (batch, out, height, width) of images (batch, in, height, width), without gradients.

        A 1x1 convolution keeps the memory format of the images; others give contiguous maps.
        """
        if x.ndim == 3:
            return self.forward(x[None])[0]
        padded, high, wide = self._padded(x)
        if self._is_pixels(padded, high, wide):
            return self._pixels(padded)
        maps = padded.new_empty(len(padded), self.out_channels, high, wide)
        for image, into in zip(padded, maps.flatten(2), strict=True):
            self._multiply(self._patches(image, high, wide), into)
        return maps

    def _asked(self, x: Tensor) -> tuple[Tensor, bool]:
        x = x[None] if x.ndim == 3 else x
        padded, high, wide = self._padded(x)
        if self._is_pixels(padded, high, wide):
            last = x.stride(1) == 1 and x.shape[1] > 1
            return (padded.permute(0, 2, 3, 1), True) if last else (padded.flatten(2), False)
        return self._patches(padded[0], high, wide), False

    def _is_pixels(self, padded: Tensor, high: int, wide: int) -> bool:
        return self.kernel_size == (1, 1) and [high, wide] == list(padded.shape[2:])

    def _padded(self, x: Tensor) -> tuple[Tensor, int, int]:
        """Return the padded images, and height and width of the maps."""
        sides = _padding(self.padding, self.kernel_size, self.dilation)
        padded = functional.pad(x, sides) if any(sides) else x
        settings = zip(padded.shape[2:], self.kernel_size, self.stride, self.dilation, strict=True)
        high, wide = ((size - step * (kernel - 1) - 1) // stride + 1 for size, kernel, stride, step in settings)
        return padded, high, wide

    def _pixels(self, x: Tensor) -> Tensor:
        """Return the maps of a 1x1 convolution of stride 1."""
        batch, channels, high, wide = x.shape
        if self._columns is None or (x.stride(1) == 1 and channels > 1):
            return cast(Tensor, self._matmul(self.packed, x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        maps = x.new_empty(batch, self.out_channels, high, wide)
        if maps.numel():
            self._columns(self.packed, x.detach().flatten(2), maps.flatten(2))
        return maps

    def _multiply(self, patches: Tensor, into: Tensor) -> None:
        """Write the product with patches (in * kernel, positions) to (out, positions)."""
        if self._columns is not None:
            self._columns(self.packed, patches, into)
        else:
            into.copy_(self._matmul(self.packed, patches.t()).t())

    def _patches(self, image: Tensor, high: int, wide: int) -> Tensor:
        """Return the patches of one image (in, height, width) as columns (in * kernel, positions)."""
        channels = len(image)
        (kernel_h, kernel_w), (stride_h, stride_w), (step_h, step_w) = self.kernel_size, self.stride, self.dilation
        by_channel, by_row, by_column = image.stride()
        windows = image.as_strided(
            (channels, kernel_h, kernel_w, high, wide),
            (by_channel, by_row * step_h, by_column * step_w, by_row * stride_h, by_column * stride_w),
        )
        return windows.reshape(channels * kernel_h * kernel_w, high * wide)


def _of_convolution(layer: nn.Conv2d) -> str:
    """Return what stands against packing a convolution, empty if nothing does."""
    if type(layer).forward is not nn.Conv2d.forward or type(layer)._conv_forward is not nn.Conv2d._conv_forward:
        return "has a forward of its own"
    if layer.groups != 1:
        return "has groups"
    return "" if layer.padding_mode == "zeros" else f"pads by {layer.padding_mode}"


def _then(matmul: Any, act: Act, clamp: Limits, packed: Any, x: Tensor) -> Tensor:
    """Multiply, then apply what follows."""
    return then(matmul(packed, x), act, clamp)


def _padding(padding: tuple[int, ...] | str, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> list[int]:
    """Return left, right, top and bottom padding; `same` puts the odd one to the right and bottom, as torch does."""
    if padding == "valid":
        return [0, 0, 0, 0]
    if isinstance(padding, str):
        totals = [step * (size - 1) for size, step in zip(kernel, dilation, strict=True)]
        return [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
    return [int(side) for size in reversed(padding) for side in (size, size)]
