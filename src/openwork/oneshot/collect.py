"""Collecting the statistics of layers while a model runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from openwork.errors import DataError
from openwork.oneshot.feed import Padding
from openwork.oneshot.layers import Layer, inputs
from openwork.oneshot.statistics import Statistics


class Collector:
    """Adds up what layers multiply; calls of one layer, and layers of one weight, go into the same sums.

    Args:
        layers: layers to watch.
        padding: tells which positions count.
        gram: dtype of Gram matrices, None for sums of squares alone.

    Attributes:
        sums: parameter name (of a tied weight the first) -> statistics, for layers that were called.
        calls: parameter name -> what `where` returned at its calls.
    """

    def __init__(self, layers: Iterable[Layer], padding: Padding, gram: torch.dtype | None) -> None:
        self.layers, self.padding, self.gram = list(layers), padding, gram
        self.sums: dict[str, Statistics] = {}
        self.calls: dict[str, set[str]] = {}
        self._names = first_names(self.layers)

    @contextlib.contextmanager
    def watching(self, where: Callable[[], str] | None = None) -> Iterator[Collector]:
        """Collect inside the block."""
        handles = [
            layer.module.register_forward_pre_hook(self._hook(layer, where), with_kwargs=True) for layer in self.layers
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def require(self, layers: Iterable[Layer]) -> None:
        """Check that every one of `layers` was called with at least one input that counts.

        Raises:
            DataError: naming the first that was not.
        """
        for layer in layers:
            found = self.sums.get(self._names[id(layer.weight)])
            if found is None or not found.tokens:
                raise DataError(
                    f"no calibration input reached the layer {layer.name!r}: exclude it, or calibrate with data that use it"
                )

    def _hook(self, layer: Layer, where: Callable[[], str] | None) -> Callable[..., None]:
        name = self._names[id(layer.weight)]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if x is None or layer.kind == "embedding":
                return
            if where is not None:
                self.calls.setdefault(name, set()).add(where())
            if name not in self.sums:
                self.sums[name] = Statistics.zeros(layer.groups, layer.width, gram=self.gram, device=x.device)
            keep = self.padding.keep(layer.name, x) if layer.kind != "conv" else None
            if not all(self.sums[name].add(part) for part in inputs(layer, x, keep)):
                raise DataError(f"the calibration inputs of the layer {layer.name!r} are not finite: check data and weights")

        return hook


def first_names(layers: Iterable[Layer]) -> dict[int, str]:
    """Return the parameter name by the weight's id: of layers that share a weight, the first one's."""
    names: dict[int, str] = {}
    for layer in layers:
        names.setdefault(id(layer.weight), layer.parameter)
    return names


def distinct(layers: Iterable[Layer]) -> list[Layer]:
    """Return the layers without those whose weight an earlier one holds."""
    seen: set[int] = set()
    found = []
    for layer in layers:
        if id(layer.weight) not in seen:
            seen.add(id(layer.weight))
            found.append(layer)
    return found
