"""Optimizers by name: every stepping optimizer that torch.optim has, found there rather than listed here."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from openwork.errors import RecipeError

# LBFGS evaluates the loss itself, several times a step; SparseAdam takes sparse gradients only.
NOT_STEPPING = frozenset({"lbfgs", "sparseadam"})


def names() -> list[str]:
    """Return the names of the optimizers, sorted."""
    return sorted(_classes())


def build(
    name: str,
    params: Iterable[nn.Parameter],
    *,
    lr: float,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
) -> Optimizer:
    """Return the optimizer `name` over those of `params` that require a gradient.

    Momentum, Nesterov and weight decay are passed to the optimizers that take them and left out for the others;
    weight decay acts on all parameters alike.

    Raises:
        RecipeError: if torch has no such stepping optimizer, or it refuses these parameters or values.
    """
    found = _classes().get(name)
    if found is None:
        raise RecipeError(f"there is no stepping optimizer {name!r} in torch.optim; there are: {', '.join(names())}")
    trained = [param for param in params if param.requires_grad]
    wanted = {"lr": lr, "momentum": momentum, "nesterov": nesterov and momentum > 0, "weight_decay": weight_decay}
    taken = inspect.signature(found).parameters
    options: dict[str, Any] = {key: value for key, value in wanted.items() if key in taken}
    try:
        return found(trained, **options)
    except ValueError as error:
        raise RecipeError(f"optimizer {name!r} refuses this model or its settings: {error}") from error


def _classes() -> dict[str, type[Optimizer]]:
    found = (value for value in vars(torch.optim).values() if isinstance(value, type))
    return {
        value.__name__.lower(): value
        for value in found
        if issubclass(value, Optimizer) and value is not Optimizer and value.__name__.lower() not in NOT_STEPPING
    }
