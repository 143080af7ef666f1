"""A data source in memory, two small models and a sparsifier with generator, masks and revisions."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from openwork.core.rng import generator


class Toy:
    """Gaussian clusters, one a class; standardised inputs of shape (12,)."""

    name = "toy"

    def __init__(self, n: int = 40, classes: int = 3, spread: float = 1.0) -> None:
        draw = generator(7, "toy")
        self.y = torch.arange(n) % classes
        self.x = torch.randn(classes, 12, generator=draw)[self.y] + spread * torch.randn(n, 12, generator=draw)

    def steps_per_epoch(self, batch_size: int) -> int:
        return max(1, len(self.y) // batch_size)

    def train_batches(self, seed: int, epoch: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.y), generator=generator(seed, "order", epoch))
        for index in range(self.steps_per_epoch(batch_size)):
            chosen = order[index * batch_size : (index + 1) * batch_size]
            yield self.x[chosen], self.y[chosen]


def net(seed: int = 0, *, norm: bool = True) -> nn.Module:
    """A perceptron with dropout and batch norm, or (norm=False) one that has only matrices as parameters."""
    bias = norm
    layers = [nn.Linear(12, 16, bias=bias), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3, bias=bias)]
    if norm:
        layers.insert(1, nn.BatchNorm1d(16))
    model = nn.Sequential(*layers)
    draw = generator(seed, "weights")
    for param in model.parameters():
        nn.init.normal_(param, std=0.3, generator=draw)
    return model


def stop_at(step: int) -> Callable[[int, float], None]:
    """Return a callback that interrupts training after `step` steps."""

    def on_step(now: int, _loss: float) -> None:
        if now == step - 1:
            raise KeyboardInterrupt

    return on_step


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Every bit is equal, the sign of a zero included."""
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype
        assert one[name].numpy().tobytes() == other[name].numpy().tobytes(), name
