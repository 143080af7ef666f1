"""Putting islands into a model: the whole forward where it can be traced, else the largest parts of it that can."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from openwork.runtime.graph.island import Island, Runner, traced
from openwork.runtime.graph.ops import Way
from openwork.runtime.graph.tune import Timed, profile, tune
from openwork.runtime.kernels.target import host
from openwork.runtime.timing import run


def twin(model: nn.Module) -> nn.Module:
    """Return a copy of a model that shares its tensors."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def graft(model: nn.Module, example: Any) -> list[Island]:
    """Put islands into `model` in place; return them, none where there are no kernels or nothing to put.

    A module that gets islands keeps its class, its parameters and its submodules; its `forward` is replaced.

    Args:
        model: in eval mode, on the CPU.
        example: what it is called with.
    """
    if host() is None or not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return []
    arguments = _positional(model, example)
    runner = traced(model, arguments) if arguments is not None else None
    if runner is not None:
        _replace_forward(model, runner)
        return runner.islands
    found: list[Island] = []
    calls = _calls(model, example)
    pending = list(model.named_children())
    while pending:
        name, child = pending.pop(0)
        if not any(isinstance(module, nn.Conv2d) for module in child.modules()) or isinstance(child, nn.Conv2d):
            continue
        runner = traced(child, calls[child], f"{name}.") if child in calls else None
        if runner is None:
            pending += [(f"{name}.{key}", one) for key, one in child.named_children()]
        else:
            _replace_forward(child, runner)
            found += runner.islands
    return found


def shapes(model: nn.Module, islands: Iterable[Island], example: Any) -> dict[Island, tuple[tuple[int, ...], ...]]:
    """Return the shapes of what every island gets while the example runs: of its last call."""
    seen: dict[Island, tuple[tuple[int, ...], ...]] = {}

    def look(island: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if isinstance(island, Island):
            seen[island] = tuple(tuple(x.shape) for x in inputs)

    _watched(islands, look, lambda: run(model, example))
    return seen


def tuned(islands: Mapping[Island, tuple[tuple[int, ...], ...]], threads: int) -> dict[Any, Way]:
    """Measure how every product is run best, set the islands so, and return the ways by island and spot."""
    found: dict[Any, Way] = {}
    target = host()
    for number, (island, sizes) in enumerate(islands.items()):
        if target is not None:
            ways = tune(island.piece(sizes), target, threads)
            island.set_ways(ways)
            found |= {(number, spot): way for spot, way in ways.items()}
    return found


def profiles(islands: Mapping[Island, tuple[tuple[int, ...], ...]], threads: int) -> list[Timed]:
    """Return what every operation of every island takes for all images of the example."""
    target = host()
    found = []
    for island, sizes in islands.items():
        if target is not None:
            made = island.piece(sizes)
            share = sizes[0][0] / made.planes[0].batch
            found += [Timed(one.name, one.layer, one.ms * share, one.way) for one in profile(made, target, threads)]
    return found


def _positional(model: nn.Module, example: Any) -> tuple[Any, ...] | None:
    """Return the example as positional arguments, None if it cannot be written so."""
    if isinstance(example, Tensor):
        return (example,)
    if isinstance(example, (tuple, list)):
        return tuple(example)
    if not isinstance(example, Mapping):
        return None
    try:
        bound = inspect.signature(model.forward).bind(**example)
    except (TypeError, ValueError):
        return None
    bound.apply_defaults()
    return tuple(bound.args) if not bound.kwargs else None


def _calls(model: nn.Module, example: Any) -> dict[nn.Module, tuple[Any, ...]]:
    """Return the positional arguments of the first call of every module that gets no others."""
    seen: dict[nn.Module, tuple[Any, ...]] = {}

    def look(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if not keywords:
            seen.setdefault(module, inputs)

    holders = [module for module in model.modules() if any(isinstance(one, nn.Conv2d) for one in module.modules())]
    _watched(holders, look, lambda: run(model, example))
    return seen


def _watched(modules: Iterable[nn.Module], look: Callable[..., None], call: Callable[[], Any]) -> None:
    handles = [module.register_forward_pre_hook(look, with_kwargs=True) for module in modules]
    try:
        with torch.no_grad():
            call()
    finally:
        for handle in handles:
            handle.remove()


def _replace_forward(module: nn.Module, runner: Runner) -> None:
    object.__setattr__(module, "forward", runner)
