"""R8: a model under masks is the model that it was: its keys, copies, files and graphs, and no hook when they are let go."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from openwork.core.rng import generator
from openwork.models import building
from openwork.testing.reliability import _children, _work
from openwork.testing.reliability._rows import Measured, Part, Parts, Scale, complaints

ARCHITECTURES: dict[str, tuple[str, tuple[int, ...], int]] = {
    **{name: (name, (1, 28, 28), 10) for name in ("mlp-32", "mlp-64-32", "lenet-300-100", "lenet5")},
    **{name: (name, (3, 32, 32), 10) for name in (
        "cnn", "resnet20", "resnet32", "resnet18", "resnet50", "wrn-10-1", "wrn-16-2", "mobilenet-v1", "mobilenet-v2",
        "efficientnet-b0", "vit-tiny",
    )},
    "gpt-small": ("gpt-small", (16,), 64),
}  # fmt: skip
"""Reference models to be masked: name -> (name, input shape, classes); torch's own layers are added to them."""


def layered() -> dict[str, Callable[[], tuple[nn.Module, Tensor]]]:
    """Return networks of torch's own layers that the reference models do not have, each with an input."""

    def image(*layers: nn.Module) -> tuple[nn.Module, Tensor]:
        return nn.Sequential(*layers), torch.randn(4, 3, 8, 8, generator=generator(0, "layered"))

    def series(*layers: nn.Module) -> tuple[nn.Module, Tensor]:
        return nn.Sequential(*layers), torch.randn(4, 3, 16, generator=generator(0, "layered"))

    return {
        "1d convolutions": lambda: series(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Conv1d(8, 4, 3), nn.Flatten()),
        "grouped convolutions": lambda: image(
            nn.Conv2d(3, 6, 3, groups=3), nn.GELU(), nn.Conv2d(6, 6, 3, groups=2), nn.Flatten()
        ),
        "transposed convolutions": lambda: image(nn.ConvTranspose2d(3, 6, 3), nn.Tanh(), nn.Conv2d(6, 2, 3), nn.Flatten()),
        "group norm": lambda: image(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(288, 4)),
        "bilinear head": lambda: image(nn.Flatten(), nn.Linear(192, 12), nn.LayerNorm(12), nn.Linear(12, 4)),
        "transformer encoder": lambda: (
            nn.Sequential(nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True), nn.Flatten()),
            torch.randn(4, 3, 16, generator=generator(0, "layered")),
        ),
    }  # fmt: skip


def untouched(name: str) -> Part:
    """Hold masks over a model for a few steps: keys, deepcopy, file, graphs and hooks are those of the dense model."""
    model, x = _architecture(name)
    keys, hooks = list(model.state_dict()), _hooks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    held = _work.build("set", 0.5, 12)
    held.every = type(held.every)(1)  # masks change at every step
    graphs: list[Any] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    fast: Any = torch.compile(model, backend=backend)
    held.attach(model, optimizer)
    seen = []
    for _ in range(4):
        optimizer.zero_grad()
        fast(x).float().square().mean().backward()
        optimizer.step()
        seen.append(len(graphs))
    wrong = [] if list(model.state_dict()) == keys else ["keys changed"]
    wrong += [] if _same_output(copy.deepcopy(model), model, x) else ["a deepcopy computes something else"]
    wrong += _kept_in_a_file(model)
    wrong += [] if seen[0] == seen[-1] else [f"{seen[-1] - seen[0]} graphs were compiled again as masks changed"]
    held.detach()
    wrong += [] if _hooks(model) == hooks else ["hooks are left on the model"]
    wrong += [] if not any(v for k, v in vars(optimizer).items() if "hook" in k) else ["hooks are left on the optimizer"]
    return {"cases": 1, "wrong": wrong}


def _architecture(name: str) -> tuple[nn.Module, Tensor]:
    if name in layered():
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return layered()[name]()
    ref, shape, classes = ARCHITECTURES[name]
    model = building.build(ref, input_shape=shape, classes=classes, seed=0)
    draw = generator(0, "reliability", name)
    tokens = len(shape) == 1
    x = torch.randint(classes, (2, *shape), generator=draw) if tokens else torch.randn(4, *shape, generator=draw)
    return model, x


def _hooks(model: nn.Module) -> int:
    return sum(len(v) for m in model.modules() for k, v in vars(m).items() if "hook" in k and isinstance(v, dict))


def _same_output(one: nn.Module, other: nn.Module, x: Tensor) -> bool:
    with torch.no_grad():
        return torch.equal(one.eval()(x), other.eval()(x))


def _kept_in_a_file(model: nn.Module) -> list[str]:
    from safetensors.torch import load_model, save_model

    with _children.folder() as place:
        save_model(model, str(place / "model.safetensors"))
        again = copy.deepcopy(model)
        with torch.no_grad():
            for param in again.parameters():
                param.zero_()
        load_model(again, str(place / "model.safetensors"))
    same = _work.digest(again.state_dict()) == _work.digest(model.state_dict())
    return [] if same else ["safetensors does not give the same state back"]


def _architectures(scale: Scale) -> Parts:
    names = [*ARCHITECTURES, *layered()] if scale == "long" else ["mlp-32", "cnn", "grouped convolutions"]
    return {name: partial(untouched, name) for name in names}


def _judge_architectures(found: Mapping[str, Part]) -> Measured:
    good = sum(not part["wrong"] for part in found.values())
    return Measured(f"5 of 5 for {good} of {len(found)} architectures", good == len(found), complaints(found))


INTRUSION = _architectures, _judge_architectures
