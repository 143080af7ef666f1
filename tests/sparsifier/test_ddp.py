"""A user's own loop with DistributedDataParallel: the masks and weights are those of one process with the whole batch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from openwork.core.masks import Masks
from openwork.core.rng import generator
from openwork.core.schedules import Every
from openwork.methods.sparsify.dpf import DPF
from openwork.methods.sparsify.gmp import GMP
from openwork.methods.sparsify.granet import GraNet
from openwork.methods.sparsify.magnitude import Magnitude
from openwork.methods.sparsify.random_pruning import RandomPruning, snip_scores
from openwork.methods.sparsify.rigl import RigL
from openwork.methods.sparsify.set import SET
from openwork.sparsifier import Sparsifier, peers
from openwork.train.ddp import mean_of_all, rows
from tests import ranks

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no fork server")

STEPS, EXAMPLES, BATCH = 12, 46, 16  # the third batch of an epoch has 14: parts of 4, 4, 3 and 3 on four ranks


class Activations(Sparsifier):
    """Scores |w| times the norm of the layer's inputs, which each process measures on its own rows (Sun et al. 2024)."""

    every = Every(4, 4)

    def __init__(self, model: nn.Sequential, **options: Any) -> None:
        super().__init__(0.3, allocate="uniform", **options)
        self.squares: dict[str, Tensor] = {}
        self.seen = 0
        for name, layer in model.named_children():
            if isinstance(layer, nn.Linear):
                layer.register_forward_pre_hook(self._watch(f"{name}.weight"))

    def revise(self, params: Mapping[str, nn.Parameter], grads: Any, step: int) -> Masks | None:
        if step not in self.every:
            return None
        squares = self.averaged({name: total / self.seen for name, total in self.squares.items()}, self.seen)
        return Masks(
            {name: self.pattern.select(param.detach().abs() * squares[name].sqrt(), 0.3) for name, param in params.items()}
        )

    def _watch(self, name: str) -> Callable[[nn.Module, Any], None]:
        def hook(_layer: nn.Module, inputs: Any) -> None:
            self.squares[name] = inputs[0].detach().square().sum(0)
            self.seen = len(inputs[0])

        return hook


METHODS: dict[str, Callable[[nn.Sequential], Sparsifier]] = {
    "set": lambda model: SET(0.3, total_steps=STEPS, every=3),
    "rigl": lambda model: RigL(0.3, total_steps=STEPS, every=3, stop=1.0),
    "rigl 2:4": lambda model: RigL(0.5, total_steps=STEPS, every=3, pattern="2:4", exclude=["4"]),
    "gmp": lambda model: GMP(0.2, total_steps=STEPS, every=2, end=0.9),
    "granet": lambda model: GraNet(0.2, total_steps=STEPS, every=2),
    "dpf": lambda model: DPF(0.2, total_steps=STEPS, every=2),
    "magnitude": lambda model: Magnitude(0.3, total_steps=STEPS),
    "activations": Activations,
}


def network(dtype: torch.dtype) -> nn.Sequential:
    """Weights from the global generator, which differs between ranks: DistributedDataParallel takes rank 0's."""
    layers = [nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 3)]
    return nn.Sequential(*layers).to(dtype)


def batches(dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    draw = generator(5, "data")
    x, y = torch.randn(EXAMPLES, 12, generator=draw).to(dtype), torch.arange(EXAMPLES) % 3
    for epoch in range(STEPS):
        order = torch.randperm(EXAMPLES, generator=generator(5, "order", epoch))
        for places in order.split(BATCH):
            yield x[places], y[places]


def part(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    all_of_us = peers.everyone()
    own = rows(len(x), all_of_us.world, all_of_us.place)
    return x[own], y[own]


def train(method: str, dtype: torch.dtype, *, bare: bool = False, micro: int = 1, clip: bool = False) -> dict[str, Any]:
    """The loop of a user, alone or in a group; gradients of `micro` parts of a batch may be accumulated."""
    inner = network(dtype)
    if peers.everyone().alone:
        model: nn.Module = inner
    else:
        model = DistributedDataParallel(inner, gradient_as_bucket_view=clip)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    sparsifier = scored(inner, dtype) if method == "snip" else METHODS[method](inner)
    sparsifier.attach(inner if bare else model, optimizer)
    for _, (x, y) in zip(range(STEPS), batches(dtype), strict=False):
        optimizer.zero_grad()
        own = part(x, y)
        pieces = list(zip(own[0].tensor_split(micro), own[1].tensor_split(micro), strict=True))
        for number, (a, b) in enumerate(pieces, start=1):
            waits = model.no_sync() if number < micro and isinstance(model, DistributedDataParallel) else nullcontext()
            with waits:
                mean_of_all(F.cross_entropy(model(a), b, reduction="none"), of=len(x) if micro > 1 else None).backward()
        if clip:
            sparsifier.mask_gradients()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    sparsifier.check_agreement()
    sparsifier.masks.check(inner)
    kept = sparsifier.masks.state_dict()
    assert not any(name.startswith("module.") for name in kept)
    return {"masks": kept, "weights": dict(inner.state_dict()), "history": sparsifier.history}


def scored(model: nn.Module, dtype: torch.dtype) -> Sparsifier:
    """Layer-wise ratios from SNIP on the first batch, of which this process has a part."""
    own = part(*next(batches(dtype)))
    return RandomPruning(0.2, ratios=snip_scores(model, own, redraw=False))


JOBS: list[tuple[str, dict[str, Any]]] = [
    *((method, {}) for method in [*METHODS, "snip"]),
    ("rigl", {"bare": True}),
    ("rigl", {"micro": 2}),
    ("granet", {"clip": True}),
]


def train_all(rank: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    found = []
    for method, how in JOBS:
        torch.manual_seed(1000 + 17 * rank)
        found.append(train(method, dtype, **how))
    return found


@pytest.mark.parametrize(("world", "dtype", "bound"), [(2, torch.float32, 1e-6), (4, torch.float64, 1e-13)])
def test_many_processes_are_one(world: int, dtype: torch.dtype, bound: float) -> None:
    whole = train_all(0, dtype)
    found = ranks.values(ranks.run(world, train_all, dtype))
    for (method, how), one, *others in zip(JOBS, whole, *found, strict=True):
        assert len(one["history"]) > 1 or method in ("snip", "magnitude"), "masks that never change test nothing"
        for other in others:
            assert other["history"] == one["history"], (method, how)
            for name, bits in one["masks"].items():
                assert torch.equal(bits, other["masks"][name]), (method, how, name)
            for name, weight in one["weights"].items():
                assert float((weight - other["weights"][name]).abs().max()) <= bound, (method, how, name)
            for name, weight in others[0]["weights"].items():
                assert torch.equal(weight, other["weights"][name]), (method, how, name)  # among ranks, bit for bit
