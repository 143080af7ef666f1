"""Dense torch, eager, in its usual layout (NCHW): a 1x1 convolution, or the network with batch norm folded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from openwork.bench.folding import folded
from openwork.bench.peers._planes import sides
from openwork.runtime.timing import run

ABOUT = "dense torch, eager, NCHW"
DENSE, APART = True, False


def operator(weight: Tensor, bias: Tensor | None, x: Tensor) -> Callable[[], Tensor]:
    """Return the product as a 1x1 convolution of an image whose pixels are the columns."""
    image, kernel = x.reshape(1, x.shape[0], *sides(x.shape[1])), weight[:, :, None, None].contiguous()
    return lambda: functional.conv2d(image, kernel, bias).reshape(weight.shape[0], -1)


def network(model: nn.Module, example: Any) -> Callable[[], Tensor]:
    """Return the model as it is, batch norm folded into the convolutions before it where torch.fx can trace it."""
    fused = folded(model)
    return lambda: run(fused, example)
