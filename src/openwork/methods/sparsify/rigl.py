"""RigL: sparse training that drops by magnitude and grows by gradient.

Evci, Gale, Menick, Castro, Elsen. "Rigging the Lottery: Making All Tickets Winners". ICML 2020.
Claim: trained sparse from scratch at constant density, as good as dense-to-sparse methods at the same budget.
Equations: f(t) = a/2 (1 + cos(pi t / T_end)) (section 3(2)); keep the 1 - f(t) largest |W| of a layer, grow as many of
the largest |dL/dW| where the layer is off, those just dropped included (section 3(3), 3(4); Algorithm 1).
Departures: exact counts and one tie rule instead of noise on the scores; the weight step is also taken at update steps
(`skip_step=True` gives the paper's); optimizer state of new and dropped weights is cleared for every optimizer.
Cost: a dense gradient and one selection every `every` steps, O(weights); nothing in between.
"""

from __future__ import annotations

from typing import Any

from openwork.cards import Card
from openwork.core.masks import Masks
from openwork.core.schedules import Every, cosine
from openwork.methods.sparsify._common import period, unit
from openwork.sparsifier.sparsifier import Grads, Params, Sparsifier

CARD = Card(
    name="rigl",
    title="Rigging the Lottery: Making All Tickets Winners",
    authors=("Utku Evci", "Trevor Gale", "Jacob Menick", "Pablo Samuel Castro", "Erich Elsen"),
    year=2020,
    venue="ICML",
    link="https://arxiv.org/abs/1911.11134",
    wing="sparsify",
    claim="Sparse training at constant density, dropping by magnitude and growing by gradient, matches dense-to-sparse.",
    entry="RigL",
    departures=(
        "Exact counts and one tie rule instead of noise on the scores.",
        "The weight step is also taken at update steps; skip_step=True gives the paper's.",
        "Optimizer state of new and dropped weights is cleared for every optimizer.",
    ),
)


class RigL(Sparsifier):
    """Magnitude drop, gradient growth, constant density (Evci et al. 2020, Algorithm 1).

    Args:
        density: kept share of the masked weights.
        total_steps: optimizer steps of the whole training.
        drop: share of a layer's weights exchanged at the first update (alpha).
        floor: share exchanged at the last update.
        every: steps between updates (Delta T); None is a fortieth of the run, at most 100.
        start: the first step at which to update.
        stop: share of training after which masks stay (T_end / T).
        skip_step: leave the weights alone at update steps.
        options: `allocate`, `pattern`, `parameters`, `exclude`, `seed` of every Sparsifier.

    Raises:
        MethodError: if a share is not in [0, 1] or a number of steps is below 1.
    """

    def __init__(
        self,
        density: float,
        *,
        total_steps: int,
        drop: float = 0.3,
        floor: float = 0.0,
        every: int | None = None,
        start: int = 0,
        stop: float = 0.75,
        skip_step: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(density, **options)
        end = unit("stop", stop) * total_steps
        self.share = cosine(unit("drop", drop), unit("floor", floor), steps=end)
        self.every = Every(period(total_steps, every), start, end)
        self.skip_step = skip_step

    def initial(self, params: Params) -> Masks:
        """Return random masks at the allocated densities (Algorithm 1, line 1)."""
        return self.random_masks(params)

    def needs_dense_gradient(self, step: int) -> bool:
        """Growth ranks the gradients of all weights at every update."""
        return step in self.every

    def revise(self, params: Params, grads: Grads, step: int) -> Masks | None:
        """Exchange f(t) of every layer (Algorithm 1, lines 7 to 12)."""
        if step not in self.every:
            return None
        return self.exchange(params, grads, self.masks, self.share(step))
