"""What every CUDA format checks before it packs or multiplies."""

from __future__ import annotations

import torch
from torch import Tensor

from openwork.errors import ModelError


def weight_obstacle(weight: Tensor, bias: Tensor | None, dtypes: tuple[torch.dtype, ...], device: str) -> str | None:
    """Return why a weight is no matrix of one of `dtypes` on a device of this type, or the bias does not fit it."""
    if weight.ndim != 2 or weight.numel() == 0:
        return f"has a weight of shape {tuple(weight.shape)}, not (out, in)"
    if weight.device.type != device:
        return f"is on {weight.device}, not on {device}"
    if weight.dtype not in dtypes:
        return f"is {weight.dtype}, not one of {', '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)}"
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype or bias.device != weight.device):
        return f"has a bias of shape {tuple(bias.shape)}, {bias.dtype} on {bias.device}, which does not fit the weight"
    return None


def refuse(reason: str | None) -> None:
    """Raise a ModelError where there is a reason."""
    if reason is not None:
        raise ModelError(f"cannot pack this weight: it {reason}")


def check_input(x: Tensor, columns: int, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse an input that is not (..., columns) of the weight's dtype on its device.

    Raises:
        ModelError: with what was given and what is expected.
    """
    if x.ndim < 1 or x.shape[-1] != columns or x.dtype != dtype or x.device != device:
        raise ModelError(
            f"cannot multiply an input of shape {tuple(x.shape)}, {x.dtype} on {x.device} with this weight: give "
            f"(..., {columns}) of {dtype} on {device}"
        )
