"""GraNet: gradual pruning with zero-cost neuroregeneration.

Liu, Chen, Chen, Atashgahi, Yin, Kou, Shen, Pechenizkiy, Wang, Mocanu. "Sparse Training via Boosting Pruning Plasticity
with Neuroregeneration". NeurIPS 2021.
Claim: regrowing by gradient as many connections as were pruned raises a network's ability to recover from pruning;
gradual pruning with it beats dense-to-sparse and sparse-to-sparse methods at the same training length.
Equations: d_t of the cubic schedule (Eq. 2); at every update all layers compete down to d_t by |w|, then each layer drops
ceil(r_t nnz) of the smallest |w| and grows as many of the largest |dL/dw| (Eq. 3 to 5), with
r_t = .005 + (r - .005)/2 (1 + cos(pi t / T)). Pruning plasticity: accuracy after k further epochs minus accuracy before
pruning (section 3.1).
Departures: exact counts and one tie rule; the schedule's last update reaches the final density (the released code stops
one short); every layer keeps at least one weight; optimizer state is cleared for every optimizer, not momentum alone;
the gradient is that of the weights being pruned, not of the step before.
Cost: a dense gradient, one selection over all weights and one per layer every `every` steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any, Literal

from torch import Tensor, nn

from openwork.cards import Card
from openwork.core import criteria
from openwork.core.masks import Masks
from openwork.core.schedules import Every, cosine, cubic
from openwork.errors import MethodError
from openwork.methods.sparsify._common import period, unit, updates
from openwork.sparsifier.procedure import Leg, Train
from openwork.sparsifier.prune_grow import keep
from openwork.sparsifier.sparsifier import Fixed, Grads, Params, Sparsifier

CARD = Card(
    name="granet",
    title="Sparse Training via Boosting Pruning Plasticity with Neuroregeneration",
    authors=(
        "Shiwei Liu", "Tianlong Chen", "Xiaohan Chen", "Zahra Atashgahi", "Lu Yin", "Huanyu Kou", "Li Shen",
        "Mykola Pechenizkiy", "Zhangyang Wang", "Decebal Constantin Mocanu",
    ),
    year=2021,
    venue="NeurIPS",
    link="https://arxiv.org/abs/2106.10404",
    wing="sparsify",
    claim="Gradual pruning that regrows by gradient as many weights as it drops beats gradual pruning and RigL.",
    entry="GraNet",
    departures=(
        "Exact counts and one tie rule; the last update reaches the final density.",
        "Every layer keeps at least one weight.",
        "Optimizer state of new and dropped weights is cleared for every optimizer.",
        "The gradient is that of the weights being pruned, not of the step before.",
    ),
)  # fmt: skip


class GraNet(Sparsifier):
    """Cubic shrink over all layers, then regeneration within each (Liu et al. 2021, Algorithm 1).

    Args:
        density: kept share of the masked weights at the end.
        total_steps: optimizer steps of the whole training.
        initial: kept share at the start, on random masks at the allocated densities; 1 starts dense.
        death: share of a layer's weights exchanged at the start (r).
        floor: share exchanged at the end.
        every: steps between updates (Delta T); None is a fortieth of the run, at most 100.
        end: share of training at which the final density is reached; regeneration goes on.
        grow: "gradient", or "random" for the control that grows anywhere.
        options: `allocate`, `pattern`, `parameters`, `exclude`, `seed` of every Sparsifier.

    Raises:
        MethodError: if a share is not in [0, 1], `initial` is below `density`, or a word is unknown.
    """

    def __init__(
        self,
        density: float,
        *,
        total_steps: int,
        initial: float = 0.5,
        death: float = 0.5,
        floor: float = 0.005,
        every: int | None = None,
        end: float = 0.5,
        grow: Literal["gradient", "random"] = "gradient",
        **options: Any,
    ) -> None:
        super().__init__(density, **options)
        if grow not in ("gradient", "random"):
            raise MethodError(f"grow={grow!r}: use 'gradient' or 'random'")
        if unit("initial", initial) < density:
            raise MethodError(f"initial={initial!r} is below the final density {density!r}; raise it, or use rigl")
        self.start_density = initial
        self.grow = criteria.gradient if grow == "gradient" else criteria.random
        steps = period(total_steps, every)
        self.every = Every(steps, steps)
        self.shrink_until = updates(total_steps, steps, 0, unit("end", end) * total_steps) * steps
        self.target = cubic(initial, density, steps=self.shrink_until)
        self.share = cosine(unit("death", death), unit("floor", floor), steps=total_steps)

    def initial(self, params: Params) -> Masks:
        """Return random masks at the initial density (ERK), or all ones."""
        if self.start_density >= 1.0:
            return Masks.ones(params)
        return self.random_masks(params, self.start_density)

    def needs_dense_gradient(self, step: int) -> bool:
        """Growth ranks the gradients of all weights at every update."""
        return step in self.every and self.grow is criteria.gradient

    def revise(self, params: Params, grads: Grads, step: int) -> Masks | None:
        """Shrink to d_t over all layers (Eq. 2, 3), then regenerate r_t of every layer (Eq. 4, 5)."""
        if step not in self.every:
            return None
        masks = self.masks
        if step <= self.shrink_until:
            masks = self.shrink(params, masks, self.target(step))
        return self.exchange(params, grads, masks, self.share(step), grow=self.grow, round_up=True)


def pruning_plasticity(
    checkpoints: Mapping[str, nn.Module],
    train: Train,
    accuracy: Callable[[nn.Module], float],
    *,
    rates: Sequence[float] = (0.5, 0.9, 0.98),
    steps: int,
    regenerate: Callable[[nn.Module], Mapping[str, Tensor]] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Measure how well trained networks recover from pruning (Liu et al. 2021, section 3.1).

    From each checkpoint the share `rate` of its weights that are not zero goes, by magnitude over all layers, and
    training continues for `steps` with the mask fixed. With `regenerate` a second arm prunes alike and then grows as many
    connections as were pruned, in the same layer, by the gradient at the pruned weights; they start at zero. So it ends
    with as many connections as the checkpoint had.

    Args:
        checkpoints: name (an epoch, say) -> dense or sparse model; they are not changed.
        train: trains a model in place for a leg, with a sparsifier that holds the masks.
        accuracy: accuracy of a model.
        rates: shares that are pruned.
        steps: optimizer steps after pruning.
        regenerate: dense gradients by parameter name for a model; None leaves out the second arm.
        options: options of every Sparsifier.

    Returns:
        a row for each checkpoint, rate and arm: `checkpoint`, `rate`, `regenerated`, `before`, `after`, `plasticity`.
    """
    rows = []
    for name, model in checkpoints.items():
        before = accuracy(model)
        for rate in rates:
            for grown in (False, True) if regenerate else (False,):
                pruned = deepcopy(model)
                masks = _OneShot(1.0 - rate, **options).attach(pruned).finalize()
                if grown and regenerate:
                    masks = _grow_back(model, masks, regenerate(pruned))
                leg = Leg(name=f"{name}-{rate}-{'grown' if grown else 'pruned'}", steps=steps)
                after = accuracy(train(pruned, Fixed(masks), leg))
                rows.append(
                    {"checkpoint": name, "rate": rate, "regenerated": grown, "before": before, "after": after,
                     "plasticity": after - before}
                )  # fmt: skip
    return rows


class _OneShot(Sparsifier):
    """Keeps a share of the weights that are not zero, by magnitude over all layers."""

    def initial(self, params: Params) -> Masks:
        alive = Masks.of(params)
        return self.shrink(params, alive, self.density * alive.density())


def _grow_back(model: nn.Module, masks: Masks, grads: Mapping[str, Tensor]) -> Masks:
    """Grow each layer back to as many weights as `model` has there, where |gradient| is largest."""
    params = dict(model.named_parameters())
    grown = {}
    for name, mask in masks.items():
        missing = int((params[name] != 0).sum()) - int(mask.sum())
        grown[name] = mask | keep(~mask, grads[name].abs(), missing)
    return Masks(grown)
