"""What the sparsifier's suite trains: small networks and batches, drawn from named generators, and a plain loop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from openwork.core.rng import generator
from openwork.sparsifier.sparsifier import Sparsifier

INPUTS, CLASSES, BATCH = 12, 4, 8

Make = Callable[..., Sparsifier]
"""(density=..., total_steps=...) -> a fresh, unattached sparsifier."""
MakeOptimizer = Callable[[nn.Module], "Optimizer | Sequence[Optimizer]"]


def linear(inputs: int, outputs: int, *, bias: bool = True) -> nn.Linear:
    """Return a linear layer whose weights are not drawn yet."""
    return nn.Linear(inputs, outputs, bias=bias, device="meta").to_empty(device="cpu")


class Tied(nn.Module):
    """A network that uses one weight in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = linear(INPUTS, 16)
        self.middle = linear(16, 16)
        self.again = linear(16, 16)
        self.again.weight = self.middle.weight
        self.last = linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (batch, 4) of inputs (batch, 12)."""
        return self.last(self.again(self.middle(self.first(x).relu()).relu()).relu())  # type: ignore[no-any-return]


def fill(model: nn.Module, seed: int) -> nn.Module:
    """Draw all parameters from N(0, 1/4), apart from torch's global generator."""
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(0.5 * torch.randn(param.shape, generator=generator(seed, "toy", name)))
    return model


def network(seed: int = 0, *, bias: bool = True) -> nn.Module:
    """Return a network (12) -> 16 -> 8 -> (4) whose sides patterns of 4 divide: 192 + 128 + 32 weights."""
    sides = [(INPUTS, 16), (16, 8), (8, CLASSES)]
    one, two, three = (linear(*side, bias=bias) for side in sides)
    return fill(nn.Sequential(one, nn.Tanh(), two, nn.Tanh(), three), seed)


def tied(seed: int = 0) -> nn.Module:
    """Return a network with a shared weight."""
    return fill(Tied(), seed)


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Return the inputs (8, 12) and labels (8,) of a step."""
    source = generator(0, "toy batch", step)
    return torch.randn(BATCH, INPUTS, generator=source), torch.randint(CLASSES, (BATCH,), generator=source)


def sgd(model: nn.Module) -> Optimizer:
    """Return SGD with all that it can remember and decay."""
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)


class Loop:
    """A user's training loop around one sparsifier.

    Args:
        sparsifier: attached here.
        model: by default `network()`.
        optimizer: model -> optimizer or optimizers; by default `sgd`.
        forward: what is called instead of the model (a compiled one).
        attach: False leaves attaching to the caller.
    """

    def __init__(
        self,
        sparsifier: Sparsifier,
        model: nn.Module | None = None,
        optimizer: MakeOptimizer = sgd,
        *,
        forward: Callable[[Tensor], Tensor] | None = None,
        attach: bool = True,
    ) -> None:
        self.model = network() if model is None else model
        made = optimizer(self.model)
        self.optimizers = [made] if isinstance(made, Optimizer) else list(made)
        self.sparsifier, self.forward = sparsifier, forward or self.model
        if attach:
            self.attach()

    def attach(self) -> None:
        """Attach the sparsifier to model and optimizers."""
        self.sparsifier.attach(self.model, self.optimizers)

    @property
    def optimizer(self) -> Optimizer:
        """Return the first optimizer."""
        return self.optimizers[0]

    def backward(self, step: int | None = None) -> Tensor:
        """Set gradients anew, of the batch of this step; return the loss."""
        x, y = batch(self.sparsifier.step if step is None else step)
        for one in self.optimizers:
            one.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self.forward(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    def step(self) -> None:
        """Take one optimizer step."""
        self.backward()
        for one in self.optimizers:
            one.step()

    def check(self, case: str = "") -> None:
        """Require that masked weights are zero and everything is finite."""
        self.sparsifier.masks.check(self.model)
        for name, param in self.model.named_parameters():
            require(bool(torch.isfinite(param).all()), f"{case}{name!r} is not finite after a step")

    def run(self, steps: int, *, take: Callable[[], None] | None = None) -> Loop:
        """Take `steps` steps (by `take` instead of `step`), each checked."""
        for _ in range(steps):
            (take or self.step)()
            self.check()
        return self

    def states(self) -> dict[str, Any]:
        """Return a copy of every state that a checkpoint would hold."""
        return copy.deepcopy({
            "model": self.model.state_dict(),
            "optimizers": [one.state_dict() for one in self.optimizers],
            "sparsifier": self.sparsifier.state_dict(),
        })  # fmt: skip


def same_weights(one: nn.Module, other: nn.Module, case: str) -> None:
    """Require bit-equal parameters."""
    theirs = dict(other.named_parameters())
    for name, param in one.named_parameters():
        require(torch.equal(param, theirs[name]), f"{case}: {name!r} differs")


def same_masks(one: Sparsifier, other: Sparsifier, case: str) -> None:
    """Require equal masks, steps and history of changes."""
    require(one.step == other.step, f"{case}: {one.step} steps are counted, not {other.step}")
    require(list(one.masks) == list(other.masks), f"{case}: other parameters have masks")
    for name, mask in one.masks.items():
        apart = int((mask != other.masks[name]).sum())
        require(apart == 0, f"{case}: the masks of {name!r} differ at {apart} positions")
    require(one.history == other.history, f"{case}: the masks changed at other steps or by other numbers")


def same_run(one: Loop, other: Loop, case: str) -> None:
    """Require that two runs ended bit-equal, in masks and weights."""
    same_masks(one.sparsifier, other.sparsifier, case)
    same_weights(one.model, other.model, case)


def hooks_of(modules: Iterable[nn.Module]) -> list[str]:
    """Return which hooks there are on modules and their parameters."""
    found = []
    for module in modules:
        found += [key for key, value in vars(module).items() if "hook" in key and isinstance(value, dict) and value]
        for name, param in module.named_parameters(recurse=False):
            if param._backward_hooks or getattr(param, "_post_accumulate_grad_hooks", None):
                found.append(f"a hook on parameter {name!r}")
    return found


def require(holds: bool, problem: str) -> None:
    """Raise an AssertionError that says what broke, also where Python runs without assertions."""
    if not holds:
        raise AssertionError(problem)
