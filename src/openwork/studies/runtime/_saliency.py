"""What groups of kernels keep of |W|, with the channels left, sorted and searched: the table and its metrics."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from openwork.methods.runtime.fast_sparse_convnets import pointwise
from openwork.methods.runtime.sparse_byte_nn import Report, rearrange
from openwork.models.outputs import logits

ROUNDING = 1e-6
"""Share of a layer's saliency below which a difference does not count: saliencies are sums in single precision."""

Row = dict[str, Any]


def kept_shares(
    model: nn.Module, example: Tensor, groups: Sequence[int], densities: Sequence[float], seed: int
) -> list[Row]:
    """Return what the 1x1 convolutions of a network keep of their |W|, by group size and density.

    Args:
        model: the network; not changed.
        example: a batch of inputs on the model's device.
        groups: group sizes.
        densities: kept shares of the units of every layer.
        seed: of the search.

    Returns:
        rows of `group`, `density`; `identity`, `sort` and `swap`, the shares kept with the channels as they are, sorted by
        norm and searched; `unstructured`, the share of as many best single weights; `recovered`; `misordered`, the layers
        whose shares are not in this order; `drift`, the largest change of an output against the largest output.
    """
    return [_row(model, example, group, density, seed) for group in groups for density in densities]


def recovered(before: float, after: float, bound: float) -> float:
    """Return the share of the gap from `before` to `bound` that `after` closes; 0 where there is no gap."""
    return (after - before) / (bound - before) if bound > before else 0.0


def misordered(report: Report) -> int:
    """Return how many layers keep less after a rearrangement than before, or more than the best single weights."""
    gaps = [(min(one.after - one.before, one.bound - one.after), one.total) for one in report.layers]
    return sum(gap < -ROUNDING * total for gap, total in gaps)


def change(before: Tensor, after: Tensor) -> float:
    """Return the largest difference against the largest entry of `before`."""
    return float((after - before).abs().max() / before.abs().max())


def summary(trained: Sequence[Row], untrained: Sequence[Row]) -> dict[str, float]:
    """Return the metrics of the tables of a trained and of an untrained network: means over densities, by group size."""
    sizes = sorted({row["group"] for row in trained})
    values: dict[str, float] = {}
    for size in sizes:
        words = ("identity", "sort", "swap", "unstructured")
        values |= {f"kept_{word}_g{size}": _mean(trained, size, word) for word in words}
        values[f"recovered_g{size}"] = _mean(trained, size, "recovered")
        values[f"random_recovered_g{size}"] = _mean(untrained, size, "recovered")
        values[f"trained_over_random_g{size}"] = values[f"recovered_g{size}"] - values[f"random_recovered_g{size}"]
    first, last = values[f"recovered_g{sizes[0]}"], values[f"recovered_g{sizes[-1]}"]
    return values | {
        "recovered": first,
        "recovered_fall": first - last,
        "least_sort_gain": min(row["sort"] - row["identity"] for row in trained),
        "least_swap_gain": min(row["swap"] - row["sort"] for row in trained),
        "misordered": float(sum(row["misordered"] for row in (*trained, *untrained))),
        "drift": max(row["drift"] for row in (*trained, *untrained)),
    }


def _row(model: nn.Module, example: Tensor, group: int, density: float, seed: int) -> Row:
    before = _outputs(model, example)
    reports, drifts = {}, []
    for search in ("sort", "greedy+swap"):
        twin = deepcopy(model)
        names = tuple(pointwise(twin))
        reports[search] = rearrange(twin, f"group{group}", density, search=search, seed=seed, parameters=names)
        drifts.append(change(before, _outputs(twin, example)))
    found = reports["greedy+swap"]
    return {
        "group": group,
        "density": density,
        "identity": found.kept_before,
        "sort": reports["sort"].kept_after,
        "swap": found.kept_after,
        "unstructured": found.bound,
        "recovered": recovered(found.kept_before, found.kept_after, found.bound),
        "misordered": sum(map(misordered, reports.values())),
        "drift": max(drifts),
    }


def _outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return logits(deepcopy(model).eval()(x)).double()


def _mean(rows: Sequence[Row], group: int, word: str) -> float:
    values = [float(row[word]) for row in rows if row["group"] == group]
    return sum(values) / len(values)
