"""What each layer of a model gets as input, and which format multiplies its weight fastest."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from openwork.core.rng import generator
from openwork.errors import ModelError
from openwork.runtime import formats, modules
from openwork.runtime.bounds import bound
from openwork.runtime.timing import interleave, refusal, run, timed

MARGIN = 1.05
"""A format replaces a dense layer only if it is this many times as fast."""
DENSEST = 0.8
"""Above this density no format is tried."""
HOPELESS = 3.0
"""A format whose product takes this many times the dense layer's time at first sight is not measured further."""
SECONDS = 1.0
"""What the measurement of one layer may take, unless five rounds take longer."""
ROWS = 32
"""Input rows on which a format must be right before it is measured."""


@dataclass(frozen=True)
class Choice:
    """What was measured for one layer and what was chosen.

    `ms` has the milliseconds of one call by format, on an input of the shape and strides that the layer gets in the
    example; `gain` is dense over chosen; `calls` is how often the example calls the layer.
    """

    layer: str
    kind: str
    shape: tuple[int, ...]
    input_shape: tuple[int, ...]
    calls: int
    density: float
    ms: dict[str, float] = field(default_factory=dict)
    chosen: str = "dense"
    gain: float = 1.0
    note: str = ""


@dataclass(frozen=True)
class Seen:
    """The input of one layer while the example ran: the largest, if there were several."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    calls: int = 1


def capture(model: nn.Module, example: Any) -> dict[nn.Module, Seen]:
    """Run the example and return what came into each layer that could be packed.

    Raises:
        ModelError: if the model refuses the example.
    """
    seen: dict[nn.Module, Seen] = {}

    def look(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and isinstance(inputs[0], Tensor):
            x, before = inputs[0], seen.get(layer)
            now = Seen(tuple(x.shape), x.stride(), x.dtype)
            if before is not None:
                now = replace(max(before, now, key=lambda one: math.prod(one.shape)), calls=before.calls + 1)
            seen[layer] = now

    layers = [layer for layer in model.modules() if modules.obstacle(layer) is None]
    handles = [layer.register_forward_pre_hook(look) for layer in layers]
    try:
        run(model, example)
    except Exception as error:
        raise refusal(type(model).__name__, error) from error
    finally:
        for handle in handles:
            handle.remove()
    return seen


def choose(name: str, layer: nn.Linear | nn.Conv2d, seen: Seen | None, repeats: int) -> tuple[Choice, nn.Module | None]:
    """Measure a layer dense and in every format; return the choice and the packed layer, None where dense stays."""
    weight = layer.weight
    density = _density(weight)
    blank = Choice(name, type(layer).__name__, tuple(weight.shape), seen.shape if seen else (), 0, density)
    reason = modules.obstacle(layer)
    if reason is not None or seen is None:
        return replace(blank, note=reason or "is not called by the example"), None
    blank = replace(blank, calls=seen.calls)
    if density > DENSEST:
        return replace(blank, note="is dense"), None
    if seen.dtype != weight.dtype or 0 in seen.shape:
        return replace(blank, note=f"gets {seen.dtype} of shape {seen.shape}"), None
    x = _input(name, seen)
    packed, rough = _candidates(name, layer, x)
    fair = {"dense": layer, **{key: twin for key, twin in packed.items() if rough[key] <= HOPELESS * rough["dense"]}}
    calls = {key: (lambda module=module: module(x)) for key, module in fair.items()}
    times = interleave(calls, repeats=repeats, seconds=SECONDS)
    ms = {key: 1e3 * times.get(key, rough[key]) for key in rough}
    best = min(times, key=lambda key: times[key])
    if times["dense"] < MARGIN * times[best]:
        return replace(blank, ms=ms), None
    return replace(blank, ms=ms, chosen=best, gain=times["dense"] / times[best]), packed[best]


def _density(weight: Tensor) -> float:
    """Return the share of weights that are not zero, 1 where there are no values yet."""
    if weight.is_meta or nn.parameter.is_lazy(weight) or weight.numel() == 0:
        return 1.0
    return int(torch.count_nonzero(weight)) / weight.numel()


def _candidates(name: str, layer: nn.Linear | nn.Conv2d, x: Tensor) -> tuple[dict[str, nn.Module], dict[str, float]]:
    """Return the layer in every format that takes it and is right, and the rough seconds of a call of each."""
    packed: dict[str, nn.Module] = {}
    rough = {"dense": _at_first_sight(layer, x)}
    rows = torch.randn(ROWS, layer.weight[0].numel(), generator=generator(0, "rows", name), dtype=layer.weight.dtype)
    for key in formats.names():
        if key == "dense":
            continue
        try:
            twin = modules.pack(layer, key)
        except ModelError:
            continue
        if _is_right(key, twin, layer, rows):
            rough[key] = _at_first_sight(twin, x)
            packed[key] = twin
    return packed, rough


def _at_first_sight(layer: nn.Module, x: Tensor) -> float:
    """Return the seconds of the best of three calls after a first one."""
    layer(x)
    return min(timed(lambda: layer(x)) for _ in range(3))


def _is_right(key: str, twin: modules.PackedLinear | modules.PackedConv2d, layer: nn.Module, rows: Tensor) -> bool:
    """Hold a format to its bound on this very weight: a wrong product is never a fast one."""
    weight = twin.weight.flatten(1)
    expected = rows.double() @ weight.double().t() + (0.0 if twin.bias is None else twin.bias.double())
    error = (formats.load(key).matmul(twin.packed, rows).double() - expected).abs()
    same = torch.equal(weight, layer.weight.flatten(1)) if isinstance(layer, (nn.Linear, nn.Conv2d)) else False
    return same and bool((error <= bound(weight, twin.bias, rows)).all())


def _input(name: str, seen: Seen) -> Tensor:
    """Return normal noise of the shape and strides that the layer sees."""
    x = torch.randn(seen.shape, generator=generator(0, "input", name), dtype=seen.dtype)
    return x if 0 in seen.stride else torch.empty_strided(seen.shape, seen.stride, dtype=seen.dtype).copy_(x)
