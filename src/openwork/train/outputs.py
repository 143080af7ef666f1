"""What a model returned, read as logits, and its cross-entropy: the same for images and for words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from openwork.core.metrics import IGNORED
from openwork.errors import ModelError


def logits(output: Any) -> Tensor:
    """Return the logits of a model's output: a tensor, a tuple that starts with one, or an object with `.logits`.

    Raises:
        ModelError: if the output is none of these.
    """
    if isinstance(output, Tensor):
        return output
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, (tuple, list)) and output:
        found = output[0]
    if not isinstance(found, Tensor):
        raise ModelError(
            f"the model returned a {type(output).__name__}; expected logits as a tensor, as the first item of a "
            "tuple, or as the attribute 'logits'"
        )
    return found


def cross_entropy(scores: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return the mean cross-entropy of logits (..., classes) against class numbers (...), in nats.

    Targets equal to `core.metrics.IGNORED` do not count.

    Raises:
        ModelError: if the shapes disagree.
    """
    if scores.shape[:-1] != targets.shape:
        raise ModelError(
            f"the model returned logits of shape {tuple(scores.shape)} for targets of shape {tuple(targets.shape)}; "
            "expected the shape of the targets with the classes as a last axis"
        )
    flat = scores.reshape(-1, scores.shape[-1]) if scores.dim() != 2 else scores
    return functional.cross_entropy(flat, targets.reshape(-1), ignore_index=IGNORED, label_smoothing=smoothing)


def device_of(model: nn.Module) -> torch.device:
    """Return where the model's first parameter lies, the CPU for a model without parameters."""
    return next((param.device for param in model.parameters()), torch.device("cpu"))
