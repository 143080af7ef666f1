"""One-shot magnitude pruning: train dense, prune once, fine-tune.

Han, Pool, Tran, Dally. "Learning both Weights and Connections for Efficient Neural Networks". NeurIPS 2015.
Claim: weights of small magnitude can be removed from a trained network and the rest retrained without loss.
Equations: keep the round(density N) largest |w|; N counts the masked weights of all layers.
Departures: one pruning instead of iterations; the dense part and the fine-tuning share one budget and one learning-rate
schedule, so that every arm of a comparison takes the same steps.
Cost: one selection over all weights.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from openwork.cards import Card
from openwork.core.masks import Masks
from openwork.core.schedules import Every
from openwork.errors import MethodError
from openwork.methods.sparsify._common import unit
from openwork.sparsifier.sparsifier import Grads, Params, Sparsifier

CARD = Card(
    name="magnitude",
    title="Learning both Weights and Connections for Efficient Neural Networks",
    authors=("Song Han", "Jeff Pool", "John Tran", "William J. Dally"),
    year=2015,
    venue="NeurIPS",
    link="https://arxiv.org/abs/1506.02626",
    wing="sparsify",
    claim="Weights of small magnitude can be removed from a trained network and the rest retrained without loss.",
    entry="Magnitude",
    aliases=("one-shot",),
    departures=("One pruning instead of iterations.", "Training and fine-tuning share one budget and schedule."),
)


class Magnitude(Sparsifier):
    """Prune once by magnitude at a share of training, then fine-tune what is left.

    Args:
        density: kept share of the masked weights after the pruning.
        total_steps: optimizer steps of the whole training, fine-tuning included.
        at: share of training at which to prune; 0 prunes at initialisation.
        scope: "global" lets all layers compete, "layers" keeps each at its allocated density.
        options: `allocate`, `pattern`, `parameters`, `exclude`, `seed` of every Sparsifier.

    Raises:
        MethodError: if `at` is not in [0, 1] or a word is unknown.
    """

    def __init__(
        self,
        density: float,
        *,
        total_steps: int = 1,
        at: float = 0.5,
        scope: Literal["global", "layers"] = "global",
        **options: Any,
    ) -> None:
        super().__init__(density, **options)
        if scope not in ("global", "layers"):
            raise MethodError(f"scope={scope!r}: use 'global' or 'layers'")
        self.layerwise = scope == "layers"
        step = min(round(unit("at", at) * total_steps), total_steps - 1)
        self.every = Every(1, step, step + 1)

    def initial(self, params: Params) -> Masks:
        """Return all ones, or the pruned masks when pruning is at step 0."""
        if 0 in self.every:
            return self.shrink(params, Masks.ones(params), self.density, layerwise=self.layerwise)
        return Masks.ones(params)

    def revise(self, params: Params, grads: Grads, step: int) -> Masks | None:
        """Prune at the one step."""
        if step not in self.every or step == 0:
            return None
        return self.shrink(params, self.masks, self.density, layerwise=self.layerwise)


def prune(model: nn.Module, density: float, **options: Any) -> Masks:
    """Prune a trained model once by magnitude, in place, and return its masks.

    Args:
        model: any module.
        density: kept share of the masked weights.
        options: `scope`, `allocate`, `pattern`, `parameters`, `exclude` as for `Magnitude`.
    """
    return Magnitude(density, at=0.0, **options).attach(model).finalize()
