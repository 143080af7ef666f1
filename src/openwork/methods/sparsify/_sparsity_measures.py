"""How sparse the weights of a dense network already are, from checkpoint to checkpoint, and how abruptly that changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from openwork.core.rng import derive
from openwork.errors import MethodError

Weights = Mapping[str, Tensor]
Measure = Callable[[Weights], float]


def hoyer(x: Tensor) -> float:
    """Return (sqrt(n) - |x|_1 / |x|_2) / (sqrt(n) - 1): 0 where all are equal, 1 where one is not zero (Hoyer 2004).

    Args:
        x: at least two finite numbers, any shape; all zeros count as 0.
    """
    v = _flat(x, 2)
    norm = float(v.norm())
    if norm == 0.0:
        return 0.0
    root = math.sqrt(v.numel())
    return (root - float(v.abs().sum()) / norm) / (root - 1.0)


def gini(x: Tensor) -> float:
    """Return the Gini index of |x|: sum_i (2 i - n - 1) |x|_(i) / (n sum |x|), magnitudes ascending (Hurley, Rickard 2009).

    Args:
        x: at least one finite number, any shape; all zeros count as 0.
    """
    v = _flat(x, 1).abs().sort().values
    total, n = float(v.sum()), v.numel()
    if total == 0.0:
        return 0.0
    places = 2.0 * torch.arange(1, n + 1, dtype=torch.float64) - n - 1.0
    return float(places @ v) / (n * total)


def near_zero(weights: Weights, threshold: float = 0.01) -> float:
    """Return the share of weights with |w| below a fixed threshold; it moves when all weights are rescaled."""
    return _share(weights, lambda v: threshold)


def small(weights: Weights, share: float = 0.1) -> float:
    """Return the share of weights with |w| below `share` standard deviations of their matrix: free of scale."""
    return _share(weights, lambda v: share * float(v.std(correction=0)))


def mean_hoyer(weights: Weights) -> float:
    """Return Hoyer's measure of the matrices, weighted by their sizes."""
    return _mean(weights, hoyer)


def mean_gini(weights: Weights) -> float:
    """Return the Gini index of the matrices, weighted by their sizes."""
    return _mean(weights, gini)


def measures(threshold: float = 0.01) -> dict[str, Measure]:
    """Return the measures of a track: near zero at a fixed threshold, and three that no rescaling of a matrix moves."""
    return {
        "near_zero": partial(near_zero, threshold=threshold),
        "small": small,
        "hoyer": mean_hoyer,
        "gini": mean_gini,
    }


def sparsity_track(
    checkpoints: Mapping[Any, nn.Module | Weights],
    measures: Mapping[str, Measure],
    select: Callable[[nn.Module], Weights],
) -> list[dict[str, Any]]:
    """Return a row a checkpoint: `checkpoint`, its key, and every measure of the chosen weights.

    Raises:
        MethodError: if there is no checkpoint or no measure, or one checkpoint has other weights than the first.
    """
    if not checkpoints or not measures:
        raise MethodError("a track needs at least one checkpoint and one measure")
    rows: list[dict[str, Any]] = []
    names: list[str] | None = None
    for key, held in checkpoints.items():
        weights = {name: w.detach() for name, w in (select(held) if isinstance(held, nn.Module) else held).items()}
        names = list(weights) if names is None else names
        if list(weights) != names:
            odd = sorted(set(weights) ^ set(names))
            what = ", ".join(odd[:3]) or "another order"
            raise MethodError(f"checkpoint {key!r} has other weights than the first: {what}")
        rows.append({"checkpoint": key, **{name: measure(weights) for name, measure in measures.items()}})
    return rows


@dataclass(frozen=True)
class Abruptness:
    """How much of a series' rise happens in one interval.

    Attributes:
        share: the largest rise of one interval / the sum of all rises; 0 where nothing rises.
        at: the interval's number, from 0.
        even: what an even rise would give, 1 / intervals.
        permuted: mean share of the series in random order.
        p: share of random orders whose share is at least as large, counting this one.
    """

    share: float
    at: int
    even: float
    permuted: float
    p: float


def abruptness(series: Sequence[float], *, permutations: int = 1000, seed: int = 0) -> Abruptness:
    """Return how abruptly a series rises, against the same for the series permuted.

    For a series that never falls the share is the largest one-interval rise over the total rise, last minus first. In
    general the total is the sum of the rises, which is defined for every order of the values.

    Args:
        series: at least three finite numbers.
        permutations: random orders, at least 1.
        seed: of the orders.

    Raises:
        MethodError: if the series is too short or not finite.
    """
    values = np.asarray(list(series), np.float64)
    if len(values) < 3 or not np.isfinite(values).all() or permutations < 1:
        raise MethodError(f"abruptness needs at least 3 finite numbers and 1 permutation, got {values.tolist()}")
    share, at = _largest(values)
    rng = np.random.default_rng(derive(seed, "abruptness"))
    others = np.array([_largest(rng.permutation(values))[0] for _ in range(permutations)])
    p = (1.0 + float((others >= share - 1e-12).sum())) / (permutations + 1.0)
    return Abruptness(share, at, 1.0 / (len(values) - 1), float(others.mean()), p)


def _largest(values: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[float, int]:
    rises = np.maximum(np.diff(values), 0.0)
    total = float(rises.sum())
    at = int(rises.argmax())
    return (float(rises[at]) / total if total > 0.0 else 0.0), at


def _flat(x: Tensor, least: int) -> Tensor:
    v = x.detach().reshape(-1).double().cpu()
    if v.numel() < least or not bool(torch.isfinite(v).all()):
        raise MethodError(f"a measure of sparsity needs at least {least} finite numbers, got {v.numel()} of shape {x.shape}")
    return v


def _share(weights: Weights, threshold: Callable[[Tensor], float]) -> float:
    flat = [_flat(w, 1) for w in weights.values()]
    return sum(int((v.abs() < threshold(v)).sum()) for v in flat) / max(1, sum(v.numel() for v in flat))


def _mean(weights: Weights, measure: Callable[[Tensor], float]) -> float:
    total = sum(w.numel() for w in weights.values())
    return sum(measure(w) * w.numel() for w in weights.values()) / max(1, total)
