"""GMP: gradual magnitude pruning along a cubic schedule.

Zhu, Gupta. "To prune, or not to prune: exploring the efficacy of pruning for model compression". ICLR workshop 2018.
Claim: a large network pruned gradually while it trains beats a small dense one of the same size.
Equations: d_t = d_f + (d_i - d_f) (1 - (t - t_0) / (n Dt))^3 at t = t_0, t_0 + Dt, ..., t_0 + n Dt (Eq. 1, for densities).
Departures: all layers compete by magnitude (`scope="layers"` prunes each layer to its allocated density); every layer
keeps at least one weight; the last update reaches the final density exactly; a pruned weight does not return.
Cost: one selection over all weights every `every` steps until `end`; nothing in between.
"""

from __future__ import annotations

from typing import Any, Literal

from openwork.cards import Card
from openwork.core.masks import Masks
from openwork.core.schedules import Every, cubic
from openwork.errors import MethodError
from openwork.methods.sparsify._common import period, unit, updates
from openwork.sparsifier.sparsifier import Grads, Params, Sparsifier

CARD = Card(
    name="gmp",
    title="To prune, or not to prune: exploring the efficacy of pruning for model compression",
    authors=("Michael Zhu", "Suyog Gupta"),
    year=2018,
    venue="ICLR workshop",
    link="https://arxiv.org/abs/1710.01878",
    wing="sparsify",
    claim="A large network pruned gradually by magnitude while it trains beats a small dense one of the same size.",
    entry="GMP",
    departures=(
        "All layers compete by magnitude; scope='layers' prunes each layer to its allocated density.",
        "Every layer keeps at least one weight.",
        "A pruned weight does not return.",
    ),
)


class GMP(Sparsifier):
    """Cubic shrink from `initial` to `density`, by magnitude (Zhu & Gupta 2018, Eq. 1).

    Args:
        density: kept share of the masked weights at the end.
        total_steps: optimizer steps of the whole training.
        initial: kept share at the start; below 1 the start is a random mask at the allocated densities.
        begin: share of training after which pruning starts.
        end: share of training at which the final density is reached.
        every: steps between updates; None is a fortieth of the run, at most 100.
        scope: "global" lets all layers compete, "layers" keeps each at its allocated density.
        options: `allocate`, `pattern`, `parameters`, `exclude`, `seed` of every Sparsifier.

    Raises:
        MethodError: if a share is not in [0, 1], `begin` is not before `end`, or a word is unknown.
    """

    def __init__(
        self,
        density: float,
        *,
        total_steps: int,
        initial: float = 1.0,
        begin: float = 0.0,
        end: float = 0.5,
        every: int | None = None,
        scope: Literal["global", "layers"] = "global",
        **options: Any,
    ) -> None:
        super().__init__(density, **options)
        if scope not in ("global", "layers"):
            raise MethodError(f"scope={scope!r}: use 'global' or 'layers'")
        if not unit("begin", begin) < unit("end", end):
            raise MethodError(f"begin={begin!r} is not before end={end!r}")
        if unit("initial", initial) < density:
            raise MethodError(f"initial={initial!r} is below the final density {density!r}; pruning cannot add weights")
        self.start_density, self.layerwise = initial, scope == "layers"
        steps, first = period(total_steps, every), round(begin * total_steps)
        length = updates(total_steps, steps, first, first + (end - begin) * total_steps) * steps
        self.every = Every(steps, first + steps, first + length + 1)
        self.target = cubic(initial, density, begin=first, steps=length)

    def initial(self, params: Params) -> Masks:
        """Return all ones, or random masks when the start is sparse."""
        if self.start_density >= 1.0:
            return Masks.ones(params)
        return self.random_masks(params, self.start_density)

    def revise(self, params: Params, grads: Grads, step: int) -> Masks | None:
        """Keep the largest magnitudes down to d_t (Eq. 1)."""
        if step not in self.every:
            return None
        return self.shrink(params, self.masks, self.target(step), layerwise=self.layerwise)
