"""Batch norm folded into the convolution before it: what every runtime does to a network before it runs it."""

from __future__ import annotations

import copy

import torch
from torch import nn


def folded(model: nn.Module) -> nn.Module:
    """Return a twin of a model in eval mode with its batch norms folded; a plain copy where torch.fx cannot trace it.

    The fold is exact in real numbers: w' = w gamma / sqrt(var + eps), b' = (b - mean) gamma / sqrt(var + eps) + beta.
    """
    from torch.fx.experimental.optimization import fuse

    twin = copy.deepcopy(model).eval().requires_grad_(False)
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in twin.modules()):
        return twin
    try:
        with torch.no_grad():
            fused: nn.Module = fuse(twin, inplace=False)
    except Exception:  # tracing runs the user's code and fails in any way it likes
        return twin
    return fused.eval()
