"""A user's own training loop, and a problem small enough to prune and retrain in a fraction of a second."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from openwork.core.rng import generator
from openwork.sparsifier.procedure import Leg, Probe
from openwork.sparsifier.sparsifier import Sparsifier

DRAW = generator(5, "clusters")
LABELS = torch.arange(240) % 4
INPUTS = 1.5 * torch.randn(4, 10, generator=DRAW)[LABELS] + torch.randn(240, 10, generator=DRAW)
TRAIN, HELD = slice(0, 160), slice(160, 240)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models train fastest on one thread; a test module takes this fixture up by importing it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network(seed: int = 0, *, norm: bool = True) -> nn.Sequential:
    parts: list[nn.Module] = [nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 4)]
    if norm:
        parts.insert(1, nn.BatchNorm1d(20))
    model = nn.Sequential(*parts)
    draw = generator(seed, "network")
    for name, param in model.named_parameters():
        if param.dim() == 2:
            nn.init.normal_(param, std=0.3, generator=draw)
        elif not (norm and name == "1.weight"):
            nn.init.zeros_(param)
    return model


class Loop:
    """Plain SGD over `Train`'s signature; remembers its legs, and rates and models on the way."""

    def __init__(self, rate: float = 0.1) -> None:
        self.rate, self.legs = rate, []
        self.rates: dict[str, list[float]] = {}
        self.before: dict[str, dict[str, torch.Tensor]] = {}
        self.after: dict[str, dict[str, torch.Tensor]] = {}

    def __call__(self, model: nn.Module, sparsifier: Sparsifier | None, leg: Leg) -> nn.Module:
        self.legs.append(leg)
        self.rates[leg.name] = []
        self.before[leg.name] = copy(model)
        optimizer = torch.optim.SGD(model.parameters(), self.rate, momentum=0.9, weight_decay=leg.weight_decay or 0.0)
        if sparsifier is not None:
            sparsifier.attach(model, optimizer)
        draw = generator(0, "batches", leg.stream)
        model.train()
        for step in range(leg.steps):
            multiple = 1.0 if leg.schedule is None else leg.schedule(step / leg.steps)
            self.rates[leg.name].append(multiple)
            optimizer.param_groups[0]["lr"] = self.rate * multiple
            chosen = torch.randint(0, 160, (32,), generator=draw)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(INPUTS[chosen]), LABELS[chosen]).backward()
            optimizer.step()
        if sparsifier is not None:
            sparsifier.finalize()
        self.after[leg.name] = copy(model)
        return model


def copy(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


@torch.no_grad()
def accuracy(model: nn.Module, part: slice = HELD) -> float:
    model.eval()
    return float((model(INPUTS[part]).argmax(dim=1) == LABELS[part]).double().mean())


def loss(model: nn.Module) -> float:
    model.eval()
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(INPUTS[TRAIN]), LABELS[TRAIN]))


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(INPUTS[i : i + 40], LABELS[i : i + 40]) for i in range(0, 160, 40)]


PROBE = Probe(batches=batches, accuracy=accuracy, loss=loss)
