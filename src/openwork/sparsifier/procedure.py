"""Procedures: methods that need several stretches of training, or none, rather than one run with masks revised in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from openwork.core.masks import Masks
from openwork.core.schedules import Schedule
from openwork.sparsifier.sparsifier import Sparsifier


@dataclass(frozen=True)
class Leg:
    """One stretch of training that a procedure asks for; the optimizer starts afresh in each.

    Attributes:
        name: unique within the procedure, for example "phase1-member0"; finished legs are found again by it.
        steps: optimizer steps.
        schedule: learning rate as a multiple of the run's base rate, a function of the leg's progress in [0, 1); None
            is the run's own schedule.
        stream: which batch order and noise; legs that differ only in it differ only in that.
        weight_decay: this leg's weight decay; None is the run's own.
    """

    name: str
    steps: int
    schedule: Schedule | None = None
    stream: int = 0
    weight_decay: float | None = None


Train = Callable[[nn.Module, Sparsifier | None, Leg], nn.Module]
"""Trains the model in place for one leg, with the sparsifier attached to a fresh optimizer, and returns it."""


@dataclass(frozen=True)
class Probe:
    """What a procedure may ask about the data.

    Attributes:
        batches: gives training batches (x, y), the same ones at every call.
        accuracy: accuracy of a model on validation data, never on test data.
        loss: mean loss of a model on a fixed subset of the training data.
    """

    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]]
    accuracy: Callable[[nn.Module], float]
    loss: Callable[[nn.Module], float]


@runtime_checkable
class Procedure(Protocol):
    """A method of several legs.

    Attributes:
        density: kept share at the end.
        steps: optimizer steps in all; a forward pass of one batch counts a third of a step.
        masks: what is kept, after `run`.
    """

    density: float
    steps: float
    masks: Masks

    def run(self, model: nn.Module, train: Train, probe: Probe) -> nn.Module:
        """Return the finished model, trained by calls to `train` and exactly zero where it is masked."""
        ...
