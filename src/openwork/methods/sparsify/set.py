"""SET: sparse evolutionary training, dropping the smallest weights and growing random ones.

Mocanu, Mocanu, Stone, Nguyen, Gibescu, Liotta. "Scalable training of artificial neural networks with adaptive sparse
connectivity inspired by network science". Nature Communications 9, 2018.
Claim: sparse layers that evolve from an Erdos-Renyi start replace dense ones before training, at no loss of accuracy.
Equations: P(on) = epsilon (n_in + n_out) / (n_in n_out) (Eq. 1); after each epoch the share zeta of the smallest positive
and largest negative weights leaves and as many random positions come on (Algorithm 1).
Departures: exact numbers instead of Bernoulli draws; updates every so many steps rather than epochs; magnitude drop by
default (`removal="by_sign"` gives the paper's thresholds); ERK rather than ER unless `epsilon` is given.
Cost: one selection and random draw every `every` steps, O(weights); no dense gradient is needed.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from openwork.cards import Card
from openwork.core import criteria
from openwork.core.masks import Masks
from openwork.core.schedules import Every
from openwork.errors import MethodError
from openwork.methods.sparsify._common import period, unit
from openwork.sparsifier.prune_grow import keep
from openwork.sparsifier.sparsifier import Grads, Params, Sparsifier

CARD = Card(
    name="set",
    title="Scalable training of artificial neural networks with adaptive sparse connectivity inspired by network science",
    authors=(
        "Decebal Constantin Mocanu", "Elena Mocanu", "Peter Stone", "Phuong H. Nguyen", "Madeleine Gibescu",
        "Antonio Liotta",
    ),
    year=2018,
    venue="Nature Communications",
    link="https://doi.org/10.1038/s41467-018-04316-3",
    wing="sparsify",
    claim="Sparse layers that drop their smallest weights and grow random ones train as well as dense layers.",
    entry="SET",
    departures=(
        "Exact numbers instead of Bernoulli draws.",
        "Updates every so many steps rather than after each epoch.",
        "Magnitude drop by default; removal='by_sign' gives the paper's thresholds.",
        "ERK densities unless epsilon is given.",
    ),
)  # fmt: skip


class SET(Sparsifier):
    """Magnitude drop, random growth, constant density (Mocanu et al. 2018, Algorithm 1).

    Args:
        density: kept share of the masked weights; not used when `epsilon` is given.
        total_steps: optimizer steps of the whole training.
        zeta: share of a layer's weights exchanged at each update.
        every: steps between updates, the paper's epoch; None is a fortieth of the run, at most 100.
        epsilon: Erdos-Renyi parameter (Eq. 1): every layer keeps epsilon (n_in + n_out) weights, at most all.
        removal: "magnitude", or "by_sign": the share zeta of the positives and of the negatives nearest to zero leave.
        new_value: "zero", or "normal": new weights are drawn from N(0, 1) / 10 as in the authors' sparse code.
        options: `allocate`, `pattern`, `parameters`, `exclude`, `seed` of every Sparsifier.

    Raises:
        MethodError: if a share is not in [0, 1], a number of steps is below 1, or a word is unknown.
    """

    def __init__(
        self,
        density: float = 0.1,
        *,
        total_steps: int,
        zeta: float = 0.3,
        every: int | None = None,
        epsilon: float | None = None,
        removal: Literal["magnitude", "by_sign"] = "magnitude",
        new_value: Literal["zero", "normal"] = "zero",
        **options: Any,
    ) -> None:
        super().__init__(density, **options)
        if removal not in ("magnitude", "by_sign") or new_value not in ("zero", "normal"):
            raise MethodError(f"removal={removal!r}, new_value={new_value!r}: use magnitude or by_sign, zero or normal")
        self.zeta, self.epsilon = unit("zeta", zeta), epsilon
        self.removal, self.new_value = removal, new_value
        steps = period(total_steps, every)
        self.every = Every(steps, steps, total_steps)

    def initial(self, params: Params) -> Masks:
        """Return random masks at the allocated densities, or at Erdos-Renyi's for `epsilon` (Eq. 1)."""
        if self.epsilon is None:
            return self.random_masks(params)
        return self.select(params, criteria.random, {n: _er_density(p.shape, self.epsilon) for n, p in params.items()})

    def revise(self, params: Params, grads: Grads, step: int) -> Masks | None:
        """Drop the smallest and grow random positions (Algorithm 1)."""
        if step not in self.every:
            return None
        if self.removal == "magnitude":
            return self.exchange(params, dict(params), self.masks, self.zeta, grow=criteria.random)
        draws = self.score(params, criteria.random)
        return Masks({name: self._by_sign(mask, params[name], draws[name]) for name, mask in self.masks.items()})

    def born(self, name: str, weight: Tensor, where: Tensor) -> None:
        """Draw new weights from N(0, 1) / 10 if asked to."""
        if self.new_value == "normal":
            draw = torch.randn(weight.shape, generator=self.generator, dtype=torch.float64) / 10
            weight[where] = draw.to(weight)[where]

    def _by_sign(self, mask: Tensor, weight: Tensor, draw: Tensor) -> Tensor:
        survivors = by_sign(weight, self.zeta) & mask
        grown = keep(~survivors, draw, int(mask.sum()) - int(survivors.sum()))
        return survivors | grown


def by_sign(weight: Tensor, zeta: float) -> Tensor:
    """Return what the authors' code keeps: weights strictly beyond two thresholds of the sorted values.

    With v the sorted weights, `first` the index of the first that is not negative and `last` that of the first positive,
    kept are w < v[floor((1 - zeta) first)] and w > v[floor(last + zeta (len - last))], indices held inside the list.
    """
    values = weight.detach().reshape(-1).sort().values
    first, last = int((values < 0).sum()), int((values <= 0).sum())
    low = min(first - 1, math.floor((1 - zeta) * first))
    high = min(values.numel() - 1, math.floor(last + zeta * (values.numel() - last)))
    negative = weight < values[low] if first else torch.zeros_like(weight, dtype=torch.bool)
    positive = weight > values[high] if last < values.numel() else torch.zeros_like(weight, dtype=torch.bool)
    return negative | positive


def _er_density(shape: torch.Size, epsilon: float) -> float:
    return min(1.0, epsilon * sum(shape[:2]) / math.prod(shape[:2]))
