"""What the Sparsifier needs to know about optimizers, without a table of their types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer, SparseAdam

from openwork.errors import OptimizerError


def check_optimizers(optimizers: Sequence[Optimizer], params: Mapping[str, nn.Parameter]) -> None:
    """Check that the optimizers step the masked parameters in a way that masks survive.

    Raises:
        OptimizerError: for LBFGS and SparseAdam, for what is no optimizer, and where none holds any of `params`.
    """
    for optimizer in optimizers:
        _check_kind(optimizer)
    held = {id(param) for one in optimizers for group in one.param_groups for param in group["params"]}
    if optimizers and not any(id(param) in held for param in params.values()):
        raise OptimizerError(
            "the optimizer holds none of the model's masked parameters; build it from the parameters of this very model"
        )


def _check_kind(optimizer: object) -> None:
    if not isinstance(optimizer, Optimizer):
        raise OptimizerError(f"attach(model, optimizer) takes a torch.optim.Optimizer, not {type(optimizer).__name__}")
    if isinstance(optimizer, LBFGS):
        raise OptimizerError(
            "LBFGS evaluates the loss several times inside one step and moves along dense directions, so masks cannot "
            "be held; use a stepping optimizer such as SGD or AdamW"
        )
    if isinstance(optimizer, SparseAdam):
        raise OptimizerError("SparseAdam takes sparse gradients of embeddings, which have no mask; use Adam or AdamW")


def overflowed(optimizer: Optimizer) -> bool:
    """Tell whether a gradient scaler has found an overflow, so that this (fused) step will change nothing."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def fresh_values(optimizer: Optimizer) -> dict[str, float]:
    """Return what the optimizer's per-weight state holds before a weight has ever had a gradient.

    Zero for almost all; Rprop's step size and Adagrad's accumulator start elsewhere. Found by stepping an optimizer of
    the same type and settings once over a zero parameter with a zero gradient; zero where that is not possible.
    """
    param = nn.Parameter(torch.zeros(2, 2))
    param.grad = torch.zeros_like(param)
    try:
        twin = type(optimizer)([param], **optimizer.defaults)
        twin.step()
    except Exception:  # a user's own optimizer may need anything; zero is right for all but exotic state
        return {}
    state = twin.state[param]
    return {
        key: float(value.flatten()[0])
        for key, value in state.items()
        if isinstance(value, Tensor) and value.shape == param.shape and bool(value.isfinite().all())
    }


def clear_state(optimizer: Optimizer, param: nn.Parameter, where: Tensor, fresh: dict[str, float]) -> None:
    """Reset every state tensor of the parameter's shape at the positions `where` to its fresh value."""
    for key, value in optimizer.state.get(param, {}).items():
        if isinstance(value, Tensor) and value.shape == param.shape:
            value.masked_fill_(where, fresh.get(key, 0.0))
