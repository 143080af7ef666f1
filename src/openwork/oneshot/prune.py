"""Pruning one layer from its statistics, and the checks and counts that come before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from openwork.core.patterns import NM
from openwork.core.select import count_of
from openwork.errors import DataError, ModelError, PatternError
from openwork.oneshot import allocation
from openwork.oneshot.layers import Layer, matrix, outputs_first
from openwork.oneshot.magnitude import magnitude
from openwork.oneshot.report import LayerReport
from openwork.oneshot.settings import Settings
from openwork.oneshot.sparsegpt import sparsegpt
from openwork.oneshot.statistics import Statistics, relative_error
from openwork.oneshot.wanda import score, wanda


def check_layer(layer: Layer, settings: Settings) -> None:
    """Check that the method and the pattern can do this layer; its values are not looked at.

    Raises:
        ModelError: for an embedding under a method that weighs inputs.
        PatternError: if the pattern does not divide the layer.
    """
    if layer.kind == "embedding" and settings.method != "magnitude":
        raise ModelError(
            f"{layer.name!r} is an embedding, whose inputs are no activations that {settings.method} could weigh: "
            "exclude it, or use method='magnitude'"
        )
    try:
        settings.pattern.tiles(torch.empty(layer.shape, device="meta"))
    except PatternError as error:
        raise PatternError(f"layer {layer.name!r} has {layer.width} inputs and {layer.shape[0]} outputs: {error}") from error


def check_weight(layer: Layer, weight: Tensor) -> None:
    """Raise a ModelError unless every entry of the layer's weight is finite."""
    if not bool(torch.isfinite(weight).all()):
        bad = int((~torch.isfinite(weight)).sum())
        raise ModelError(
            f"{bad} of {weight.numel()} weights of {layer.parameter!r} are not finite: load a sound model or exclude it"
        )


def allocate(
    settings: Settings,
    sizes: Mapping[str, int],
    *,
    shares: Mapping[str, float] | None = None,
    weights: Callable[[], Iterable[tuple[str, Tensor]]] | None = None,
) -> dict[str, int]:
    """Return how many weights of each layer stay.

    Args:
        settings: the settings.
        sizes: parameter name -> weights, in model order.
        shares: OWL's outlier shares, where the allocation is "owl".
        weights: goes through (name, weight), where it is "global".

    Raises:
        AllocationError: if no counts fit.
        PatternError: if explicit densities are not the pattern's.
    """
    rule, density = settings.allocation, settings.density
    if not isinstance(rule, str):
        counts = allocation.explicit(sizes, rule, density)
        if isinstance(settings.pattern, NM):
            _only_the_pattern(settings.pattern, sizes, counts)
        return counts
    assert density is not None
    if rule == "owl":
        assert shares is not None
        return allocation.owl(sizes, shares, density, settings.spread)
    if rule == "global":
        assert weights is not None
        return allocation.by_global_magnitude(weights, density)
    return allocation.uniform(sizes, density)


def block_share(parts: Iterable[tuple[Layer, Tensor, Statistics]], multiple: float) -> float:
    """Return OWL's outlier share of a block: the scores of all its layers against their common mean."""
    scores = [score(outputs_first(layer, weight), sums.squares).reshape(-1) for layer, weight, sums in parts]
    return allocation.outlier_share(torch.cat(scores), multiple)


def prune_layer(
    layer: Layer, weight: Tensor, sums: Statistics | None, count: int, settings: Settings
) -> tuple[Tensor, Tensor, LayerReport]:
    """Return the pruned weight, its mask and the row of the report; nothing is changed.

    Args:
        layer: where the weight belongs.
        weight: as the module holds it, finite.
        sums: what the layer's inputs add up to; None without calibration.
        count: how many weights stay.
        settings: the settings.

    Returns:
        weight and mask in the shape of `weight`; the weight in its dtype, exactly zero off the mask.

    Raises:
        DataError: if SparseGPT's equations cannot be solved.
        ModelError: if an updated weight overflows its dtype.
    """
    W = outputs_first(layer, weight.detach())
    density = count / W.numel()
    if count == W.numel():
        pruned, mask = W, torch.ones_like(W, dtype=torch.bool)
    elif settings.method == "sparsegpt":
        assert sums is not None
        assert sums.gram is not None
        try:
            updated, mask = sparsegpt(
                W, sums.gram, density, settings.pattern, damping=settings.damping, block_size=settings.block_size
            )
        except DataError as error:
            raise DataError(f"layer {layer.name!r}: {error}") from error
        pruned = updated.to(W.dtype).masked_fill(~mask, 0)
        if not bool(torch.isfinite(pruned).all()):
            raise ModelError(
                f"an updated weight of {layer.parameter!r} overflows {W.dtype}: raise the damping, or use wanda"
            )
    else:
        mask = (
            magnitude(W, density, settings.pattern)
            if settings.method == "magnitude"
            else wanda(W, _squares(sums), density, settings.pattern)
        )
        pruned = W.masked_fill(~mask, 0)
    gram = sums.gram if sums is not None and settings.errors else None
    lost = None if gram is None else relative_error(matrix(layer, W), matrix(layer, pruned), gram)
    row = LayerReport(
        layer.parameter, tuple(weight.shape), int(mask.sum()), W.numel(), lost, sums.tokens if sums is not None else 0
    )
    return outputs_first(layer, pruned), outputs_first(layer, mask), row


def _squares(sums: Statistics | None) -> Tensor:
    assert sums is not None
    return sums.squares


def _only_the_pattern(pattern: NM, sizes: Mapping[str, int], counts: Mapping[str, int]) -> None:
    for name, count in counts.items():
        if count not in (sizes[name], count_of(pattern.n / pattern.m, sizes[name])):
            raise PatternError(
                f"allocation keeps {count / sizes[name]:g} of {name!r}, but {pattern.n}:{pattern.m} keeps "
                f"{pattern.n / pattern.m:g}; give that, or 1 for a dense layer"
            )
