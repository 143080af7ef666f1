"""Dense torch, eager, channels last (NHWC): often the faster layout for convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from openwork.bench.folding import folded
from openwork.bench.peers import Unavailable
from openwork.bench.peers._planes import sides
from openwork.runtime.timing import run

ABOUT = "dense torch, eager, NHWC"
DENSE, APART = True, False


def operator(weight: Tensor, bias: Tensor | None, x: Tensor) -> Callable[[], Tensor]:
    """Return the product as a 1x1 convolution of a channels-last image; its result is read as (out, columns)."""
    image = x.reshape(1, x.shape[0], *sides(x.shape[1])).contiguous(memory_format=torch.channels_last)
    kernel = weight[:, :, None, None].contiguous(memory_format=torch.channels_last)
    return lambda: functional.conv2d(image, kernel, bias).flatten(2)[0]


def network(model: nn.Module, example: Any) -> Callable[[], Tensor]:
    """Return a channels-last twin of the model, batch norm folded; its input is laid out beforehand.

    Raises:
        Unavailable: unless the input is one batch of images, to which alone the layout applies.
    """
    if not isinstance(example, Tensor) or example.dim() != 4:
        raise Unavailable("channels last is a layout of images (batch, channels, height, width): nothing to install")
    fused = folded(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    laid = example.contiguous(memory_format=torch.channels_last)
    return lambda: run(fused, laid)
