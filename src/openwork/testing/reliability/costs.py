"""R34, R35: what masks cost beside a dense training, in memory and in time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from openwork.core.rng import generator
from openwork.models import building
from openwork.testing.reliability import _work
from openwork.testing.reliability._rows import Measured, Part, Parts, Scale

LIVE, PACKED = 0.26, 0.032


def remembered(method: str) -> Part:
    """Measure the bytes that a method holds beside a dense training's, live and packed, against float32 weights."""
    model = building.build("mlp-512-512", input_shape=(256,), classes=10, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    held = _work.build(method, 0.1, 50).attach(model, optimizer)
    for step in range(3):
        model(torch.randn(4, 256, generator=generator(step, "memory"))).square().mean().backward()
        optimizer.step()
    weights = 4 * held.masks.total()
    own = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in _tensors(vars(held), model)}
    packed = sum(one.numel() * one.element_size() for one in held.masks.state_dict().values())
    stored = {mask.untyped_storage().data_ptr(): mask.untyped_storage().nbytes() for mask in held.masks.values()}
    live = sum(stored.values()) / weights  # masks may be views of one memory
    return {"cases": 1, "wrong": [], "live": live, "packed": packed / weights, "own": sum(own.values()) / weights - live}


def _tensors(thing: Any, model: nn.Module) -> list[Tensor]:
    """Return the tensors within a value, those of the model left out, each once."""
    given = {param.untyped_storage().data_ptr() for param in model.parameters()}
    found: dict[int, Tensor] = {}
    waiting = [thing]
    while waiting:
        one = waiting.pop()
        if isinstance(one, Tensor) and not isinstance(one, nn.Parameter):
            found.setdefault(one.untyped_storage().data_ptr(), one)
        elif isinstance(one, Mapping):
            waiting += one.values()
        elif isinstance(one, list | tuple | set):
            waiting += one
    return [one for one in found.values() if one.untyped_storage().data_ptr() not in given]


def _memories(scale: Scale) -> Parts:
    return {name: partial(remembered, name) for name in (_work.sparsifiers() if scale == "long" else ["set", "granet"])}


def _judge_memories(found: Mapping[str, Part]) -> Measured:
    live = {name: part["live"] for name, part in found.items()}
    packed = max(part["packed"] for part in found.values())
    worst = max(live, key=lambda name: live[name])
    own = [f"{name} {part['own']:.0%}" for name, part in found.items() if part["own"] > 0.01]
    value = f"packed {packed:.2%}, live {live[worst]:.1%} ({len(found)} methods)"
    note = f"statistics that methods keep beside their masks: {', '.join(own)} of the weights" if own else ""
    return Measured(value, packed <= PACKED and live[worst] <= LIVE, note)


def slowed(model: str, batch: int, repeats: int) -> Part:
    """Time training steps between revisions with a sparsifier and without, in turn."""
    steps = {name: _stepper(name, model, batch) for name in ("dense", "rigl")}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(repeats + 2):
        for name, step in steps.items() if round_ % 2 else reversed(steps.items()):
            began = time.perf_counter()
            step()
            if round_ >= 2:
                times[name].append(time.perf_counter() - began)
    ratio = statistics.median(b / a for a, b in zip(times["dense"], times["rigl"], strict=True))
    return {"cases": repeats, "wrong": [], "ratio": ratio, "dense_ms": 1e3 * statistics.median(times["dense"])}


def _stepper(method: str, name: str, batch: int) -> Callable[[], None]:
    from openwork.methods.sparsify.rigl import RigL

    model = building.build(name, input_shape=(3, 32, 32), classes=10, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    if method != "dense":
        RigL(0.1, total_steps=10**6, every=10**5).attach(model, optimizer)
    draw = generator(0, "reliability", "overhead")
    x, y = torch.randn(batch, 3, 32, 32, generator=draw), torch.randint(0, 10, (batch,), generator=draw)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def _overheads(scale: Scale) -> Parts:
    if scale == "long":
        return {"resnet20, batch 128": partial(slowed, "resnet20", 128, 15)}
    return {"resnet20, batch 16": partial(slowed, "resnet20", 16, 5)}


def _judge_overheads(found: Mapping[str, Part]) -> Measured:
    name, part = next(iter(found.items()))
    more = part["ratio"] - 1
    return Measured(f"{more:+.1%} a step ({name}, dense {part['dense_ms']:.0f} ms)", more <= 0.03)


MEMORY = _memories, _judge_memories
OVERHEAD = _overheads, _judge_overheads
