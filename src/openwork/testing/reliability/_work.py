"""What the measurements train and prune: a data source in memory, small networks, every method by name."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from openwork import registry
from openwork.core.rng import generator
from openwork.sparsifier.sparsifier import Sparsifier

FEATURES, CLASSES = 12, 3


class Clusters:
    """Gaussian clusters, one a class: a data source of examples (12,) with 3 classes."""

    name = "clusters"

    def __init__(self, n: int = 40) -> None:
        draw = generator(0, "reliability", "clusters")
        self.y = torch.arange(n) % CLASSES
        self.x = torch.randn(CLASSES, FEATURES, generator=draw)[self.y] + torch.randn(n, FEATURES, generator=draw)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Return how many whole batches there are."""
        return max(1, len(self.y) // batch_size)

    def train_batches(self, seed: int, epoch: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch, a function of the arguments."""
        order = torch.randperm(len(self.y), generator=generator(seed, "order", epoch))
        for chosen in torch.split(order, batch_size)[: self.steps_per_epoch(batch_size)]:
            yield self.x[chosen], self.y[chosen]


def net(seed: int = 0, *, norm: bool = True) -> nn.Module:
    """Return a perceptron with dropout and batch norm; without `norm`, one whose parameters are all matrices."""
    with torch.random.fork_rng(devices=[]):
        layers = [nn.Linear(FEATURES, 16, bias=norm), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, CLASSES, bias=norm)]
        if norm:
            layers.insert(1, nn.BatchNorm1d(16))
    model = nn.Sequential(*layers)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(0.3 * torch.randn(param.shape, generator=generator(seed, "reliability", name)))
    return model


def sparsifiers() -> list[str]:
    """Return the names of all methods that are one Sparsifier."""
    return [name for name in registry.names() if _is_sparsifier(registry.load(name))]


def build(name: str, density: float, total_steps: int) -> Sparsifier:
    """Return a method, ready to attach, with its own defaults."""
    made = registry.load(name)
    takes = inspect.signature(made).parameters
    found: Sparsifier = made(density, total_steps=total_steps) if "total_steps" in takes else made(density)
    return found


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a digest of names, dtypes, shapes and every bit."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return total.hexdigest()[:16]


def _is_sparsifier(thing: object) -> bool:
    return inspect.isclass(thing) and issubclass(thing, Sparsifier)
