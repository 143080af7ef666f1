"""DPF: dynamic pruning with feedback, dense weights behind a mask that is chosen anew.

Lin, Stich, Barba, Dmitriev, Jaggi. "Dynamic Model Pruning with Feedback". ICLR 2020.
Claim: updating the dense weights with the gradient taken at the pruned ones lets wrongly pruned weights come back, and
gives pruned networks as good as dense ones in a single training run.
Equations: w_{t+1} = w_t - lr g(m_t * w_t) (Eq. DPF); m_t = the largest |w_t| at the density of a cubic schedule, chosen
anew every p steps (Algorithm 1).
Departures: exact counts, one tie rule, at least one weight a layer.
Cost: one dense copy of the masked weights, copied in and out at every step; one selection every `every` steps. Training
is dense: the copy and its optimizer state are not sparse, only the network that is evaluated is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from openwork.cards import Card
from openwork.core.masks import Masks
from openwork.core.schedules import Every, cubic
from openwork.methods.sparsify._common import period, unit, updates
from openwork.sparsifier.sparsifier import Grads, Params, Sparsifier, State

CARD = Card(
    name="dpf",
    title="Dynamic Model Pruning with Feedback",
    authors=("Tao Lin", "Sebastian U. Stich", "Luis Barba", "Daniil Dmitriev", "Martin Jaggi"),
    year=2020,
    venue="ICLR",
    link="https://arxiv.org/abs/2006.07253",
    wing="sparsify",
    claim="Dense weights updated by the gradient at the pruned ones let wrongly pruned weights return in one run.",
    entry="DPF",
    departures=("Exact counts, one tie rule, at least one weight a layer.",),
)


class DPF(Sparsifier):
    """Dense weights behind the mask, updated by the gradient at the masked ones (Lin et al. 2020, Algorithm 1).

    Args:
        density: kept share of the masked weights at the end.
        total_steps: optimizer steps of the whole training.
        every: steps between two choices of the mask (p); None is a fortieth of the run, at most 100.
        end: share of training at which the final density is reached.
        stop: share of training after which the mask stays.
        options: `allocate`, `pattern`, `parameters`, `exclude`, `seed` of every Sparsifier.

    Raises:
        MethodError: if a share is not in [0, 1] or a number of steps is below 1.
    """

    clears_state = False  # the dense weights live on behind the mask, and so does their momentum

    def __init__(
        self,
        density: float,
        *,
        total_steps: int,
        every: int | None = None,
        end: float = 0.5,
        stop: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(density, **options)
        steps = period(total_steps, every)
        length = updates(total_steps, steps, 0, unit("end", end) * total_steps) * steps
        self.every = Every(steps, steps, max(unit("stop", stop) * total_steps, length + 1))
        self.target = cubic(1.0, density, steps=length)
        self.behind: dict[str, Tensor] = {}

    def initial(self, params: Params) -> Masks:
        """Return all ones and remember the dense weights."""
        self.behind = {name: param.detach().clone() for name, param in params.items()}
        return Masks.ones(params)

    def needs_dense_gradient(self, step: int) -> bool:
        """Every step updates the dense weights."""
        return True

    def revise(self, params: Params, grads: Grads, step: int) -> Masks | None:
        """Choose the largest of the dense weights, whatever the mask was."""
        if step not in self.every:
            return None
        dense = {name: torch.nn.Parameter(weight, requires_grad=False) for name, weight in self.behind.items()}
        return self.shrink(dense, Masks.ones(params), self.target(step))

    def mask_gradients(self) -> None:
        """Leave the gradients dense: they are what brings weights back."""

    @torch.no_grad()
    def before_step(self, params: Params) -> None:
        """Put the dense weights in place for the optimizer."""
        for name, param in params.items():
            param.copy_(self.behind[name])

    @torch.no_grad()
    def after_step(self, params: Params) -> None:
        """Take the dense weights away again and mask what the network shows."""
        for name, param in params.items():
            self.behind[name].copy_(param)
        self.project()

    def between_steps(self, params: Params) -> None:
        """Leave the dense weights in place for the next of several optimizers."""

    def extra_state(self) -> State:
        """Return the dense weights."""
        return dict(self.behind)

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Restore the dense weights."""
        self.behind = {name: weight.clone() for name, weight in state.items()}
