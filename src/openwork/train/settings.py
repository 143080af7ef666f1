"""The settings of one training run, checked when they are made."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

from openwork.errors import RecipeError
from openwork.train import optimizers, rates


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
        steps: optimizer steps.
        batch_size: examples a step.
        lr: base learning rate; `schedule` multiplies it.
        optimizer: a stepping optimizer of torch.optim by its lower-case name.
        momentum: for the optimizers that have one (sgd, rmsprop, muon); others ignore it.
        nesterov: Nesterov's momentum, where the optimizer has it and momentum is not 0.
        weight_decay: on all parameters, biases and norms included, in the optimizer's own way (an L2 term for sgd,
            decoupled for adamw); optimizers without it ignore it.
        schedule: "constant", "cosine", "linear" or "step".
        warmup: share of the steps over which the rate first rises from 0.
        label_smoothing: share of the target probability that is spread over all classes.
        clip: largest global L2 norm of the gradient; None for no limit.
        device: where to train, as torch names it.

    Raises:
        RecipeError: naming the field, its value and what is allowed.
    """

    steps: int
    batch_size: int = 128
    lr: float = 0.1
    optimizer: str = "sgd"
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    warmup: float = 0.0
    label_smoothing: float = 0.0
    clip: float | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            _whole(name, getattr(self, name))
        for name in ("momentum", "warmup", "label_smoothing"):
            value = _real(self, name, "a number of at least 0 and below 1")
            if not 0 <= value < 1:
                raise _refusal(name, value, "a number of at least 0 and below 1")
        for name in ("lr", "clip"):
            if name == "clip" and self.clip is None:
                continue
            value = _real(self, name, "a number above 0")
            if value <= 0:
                raise _refusal(name, value, "a number above 0")
        if _real(self, "weight_decay", "a number of at least 0") < 0:
            raise _refusal("weight_decay", self.weight_decay, "a number of at least 0")
        if not isinstance(self.nesterov, bool):
            raise _refusal("nesterov", self.nesterov, "true or false")
        _member("optimizer", self.optimizer, optimizers.names())
        _member("schedule", self.schedule, sorted(rates.RATES))
        try:
            torch.device(self.device)
        except (RuntimeError, TypeError) as error:
            raise _refusal("device", self.device, "a torch device such as 'cpu' or 'cuda:0'") from error


def _refusal(name: str, value: object, allowed: str) -> RecipeError:
    return RecipeError(f"training setting {name!r} is {value!r}; it must be {allowed}")


def _whole(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _refusal(name, value, "a whole number of at least 1")


def _real(settings: Settings, name: str, allowed: str) -> float:
    value = getattr(settings, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise _refusal(name, value, allowed)
    # 1 and 1.0 are the same setting and must have the same digest.
    object.__setattr__(settings, name, float(value))
    return float(value)


def _member(name: str, value: Any, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise _refusal(name, value, "one of " + ", ".join(allowed))
