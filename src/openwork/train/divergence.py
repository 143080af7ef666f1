"""Which tensor went wrong first, asked once, after a loss that is no number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from openwork.errors import DivergedError


def report(model: nn.Module, x: Tensor, step: int, loss: float) -> DivergedError:
    """Return the error for a non-finite loss, naming the first non-finite tensor on the way to it.

    The order is input, parameters, activations in the order of execution. The forward pass is repeated for that, with
    the noise that the caller has brought back, and the buffers are left as they were.
    """
    culprit = _named("parameter", model.named_parameters()) if _finite(x) else "the input batch"
    if culprit is None:
        culprit = _first_activation(model, x) or "the loss itself"
    return DivergedError(
        f"training diverged at step {step}: the loss is {loss} and the first non-finite tensor is {culprit}; lower "
        "the learning rate, clip the gradient or check the data"
    )


def report_gradient(model: nn.Module, step: int) -> DivergedError:
    """Return the error for a gradient that is not finite under a loss that is."""
    grads = ((name, param.grad) for name, param in model.named_parameters() if param.grad is not None)
    culprit = _named("gradient of", grads) or "the gradient's norm"
    return DivergedError(
        f"training diverged at step {step}: the loss is finite but {culprit} is not; lower the learning rate"
    )


def check_parameters(model: nn.Module, step: int) -> None:
    """Check that all parameters are finite after `step` steps.

    Raises:
        DivergedError: naming the first parameter that is not.
    """
    culprit = _named("parameter", model.named_parameters())
    if culprit is not None:
        raise DivergedError(f"training diverged within {step} steps: {culprit} is not finite; lower the learning rate")


def _named(kind: str, tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    return next((f"{kind} {name!r}" for name, tensor in tensors if not _finite(tensor)), None)


def _finite(tensor: Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    # A sum in float64 is finite unless an element is not: far cheaper than a bool tensor of the same size.
    total = tensor.detach().sum(dtype=torch.complex128 if tensor.is_complex() else torch.float64)
    return math.isfinite(abs(total.item())) or bool(tensor.detach().isfinite().all())


def _first_activation(model: nn.Module, x: Tensor) -> str | None:
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not _finite(output):
                found.append(f"the output of {name!r}" if name else "the output of the model")

        return hook

    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            model(x)
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
