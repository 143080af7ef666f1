"""Checks of a sparsifier under every optimizer of torch, with random gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn, optim
from torch.optim import Optimizer

from openwork.core.rng import generator
from openwork.errors import OptimizerError
from openwork.testing._holding import check_count
from openwork.testing._toys import Loop, Make, MakeOptimizer, network, require

REFUSED = (optim.LBFGS, optim.SparseAdam)

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("SGD", {}),
    "SGD with momentum, nesterov, decay": ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "Adam": ("Adam", {"weight_decay": 0.01}),
    "Adam, amsgrad": ("Adam", {"amsgrad": True}),
    "AdamW": ("AdamW", {"foreach": False}),
    "AdamW, fused": ("AdamW", {"fused": True}),
    "AdamW, foreach": ("AdamW", {"foreach": True}),
    "RMSprop": ("RMSprop", {"momentum": 0.9, "centered": True}),
    "Adagrad": ("Adagrad", {"initial_accumulator_value": 0.1}),
    "ASGD": ("ASGD", {"weight_decay": 0.01}),
}
# Every other stepping optimizer of this torch release, with its own defaults.
SETTINGS |= {
    name: (name, {})
    for name, kind in vars(optim).items()
    if isinstance(kind, type)
    and issubclass(kind, Optimizer)
    and kind not in (Optimizer, *REFUSED)
    and name not in [known for known, _ in SETTINGS.values()]
}


def build(kind: str, options: dict[str, Any], model: nn.Module) -> Sequence[Optimizer]:
    """Return the optimizer called `kind`; Muon takes matrices only, so SGD takes the biases."""
    made = getattr(optim, kind)
    if kind != "Muon":
        return [made(model.parameters(), lr=0.01, **options)]
    params = list(model.parameters())
    return [made([p for p in params if p.dim() == 2], lr=0.01), optim.SGD([p for p in params if p.dim() != 2], lr=0.01)]


def zeros(make_optimizer: MakeOptimizer, make: Make, density: float, total_steps: int) -> None:
    """Check that random steps of an optimizer leave masked weights exactly zero, and reach the density."""
    run = Loop(make(density=density, total_steps=total_steps), network(), make_optimizer)
    for step in range(total_steps):
        for name, param in run.model.named_parameters():
            param.grad = torch.randn(param.shape, generator=generator(0, "toy gradient", name, step))
        for one in run.optimizers:
            one.step()
        run.check(f"step {step}: ")
    require(run.sparsifier.step == total_steps, f"{run.sparsifier.step} steps are counted, not {total_steps}")
    check_count(run.sparsifier, density)


def refused(kind: type[Optimizer], make: Make, density: float, total_steps: int) -> None:
    """Check that an optimizer that cannot hold masks is refused, and that nothing was done to the model."""
    model = network(bias=False)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer: Any = kind(model.parameters())  # type: ignore[call-arg]
    try:
        make(density=density, total_steps=total_steps).attach(model, optimizer)
    except OptimizerError as error:
        require(kind.__name__ in str(error), f"the error does not name {kind.__name__}: {error}")
    else:
        raise AssertionError(f"{kind.__name__} is not refused with an OptimizerError")
    changed = [name for name, param in model.named_parameters() if not torch.equal(param, before[name])]
    require(not changed, f"{', '.join(changed)} changed although the optimizer was refused")


CHECKS: dict[str, Callable[[Make, float, int], None]] = {
    f"optimizer {name}": partial(zeros, partial(build, kind, options)) for name, (kind, options) in SETTINGS.items()
}
CHECKS |= {f"refuses {kind.__name__}": partial(refused, kind) for kind in REFUSED}
