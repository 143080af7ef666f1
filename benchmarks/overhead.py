"""What a Sparsifier costs a training step between two mask updates: ResNet-20, batch 128, side by side in one process.

    python benchmarks/overhead.py [--batch 128] [--repeats 15] [--method RigL]

Prints the median time of a step with masks over that without, the two taken in turn, and the processor.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn

import openwork
from openwork import models
from openwork.lab import environment


def stepper(method: str | None, batch: int):
    """Return a function that takes one training step of ResNet-20 on fixed data."""
    model = models.build("resnet20", input_shape=(3, 32, 32), classes=10, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    if method is not None:
        # one update at the very start, then none: what is measured is a step between updates
        getattr(openwork, method)(density=0.1, total_steps=10**6, every=10**5).attach(model, optimizer)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, 32, 32, generator=generator)
    y = torch.randint(0, 10, (batch,), generator=generator)

    def step() -> float:
        started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        return time.perf_counter() - started

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--method", default="RigL")
    given = parser.parse_args()
    arms = {"dense": stepper(None, given.batch), given.method: stepper(given.method, given.batch)}
    for step in arms.values():
        for _ in range(3):
            step()
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(given.repeats):
        for name, step in arms.items():
            times[name].append(step())
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    ratio = statistics.median(b / a for a, b in zip(*times.values(), strict=True))
    print(f"{environment.processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name, median in medians.items():
        print(f"{name:8} {1e3 * median:8.1f} ms a step")
    print(f"ratio    {ratio:8.3f} (median of the pairs)")


if __name__ == "__main__":
    main()
