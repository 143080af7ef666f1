"""Random search: draw sparse sub-networks, keep the one whose untrained loss is the lowest, train it.

Farahani. "Random Search as a Baseline for Sparse Neural Network Architecture Search". arXiv 2403.08265, 2024.
Claim: sub-networks found by random search in node space, though they start lower in the loss landscape, neither end better
nor converge faster than random ones of the same sparsity; so random search is a neutral baseline for sparsity search.
Equations: node configuration z_l in {0,1}^(n_l) with k_l = round((1 - s) n_l) ones, uniform; masks M_l = z_l x z_(l-1) on
weights and z_l on biases; keep argmin of L_0(z), the loss of the untrained masked network, over B draws; weight density
delta(s) = (k_1 d_in + sum k_l k_(l-1) + d_out k_L) / (n_1 d_in + sum n_l n_(l-1) + d_out n_L).
Departures: the score is a callable, cross-entropy on a fixed subset of the training data by default; the density asked
for is that of weights, and the node density is solved for; convolutional and residual networks are searched by coupled
channels; no layer loses its last node; spaces of single weights and of widths are ours, and so are the default settings.
Cost: B forward passes over the scoring subset (a third of a step a batch, charged to `steps`), then one training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from openwork.cards import Card
from openwork.core.allocation import Allocation
from openwork.core.cost import Cost
from openwork.core.masks import Masks
from openwork.core.patterns import Pattern, Unstructured, parse
from openwork.core.rng import generator
from openwork.errors import MethodError
from openwork.methods.sparsify._retrain import run_leg
from openwork.methods.sparsify._spaces import NodeSpace, Space, WeightSpace, WidthSpace, check_densities
from openwork.sparsifier.parameters import Choice, maskable, unwrap
from openwork.sparsifier.procedure import Leg, Probe, Train
from openwork.sparsifier.sparsifier import Fixed

__all__ = [
    "CARD", "NodeSpace", "RandomSearch", "Search", "Space", "WeightSpace", "WidthSpace", "as_baseline", "draw", "search",
    "untrained",
]  # fmt: skip

CARD = Card(
    name="random-search",
    title="Random Search as a Baseline for Sparse Neural Network Architecture Search",
    authors=("Rezsa Farahani",),
    year=2024,
    venue="arXiv",
    link="https://arxiv.org/abs/2403.08265",
    wing="sparsify",
    claim="Sparse sub-networks found by random search train no better and no faster than random ones.",
    entry="RandomSearch",
    aliases=("search",),
    departures=(
        "The score is a callable; by default cross-entropy on a fixed subset of the training data.",
        "The density asked for is that of weights; the node density is solved for.",
        "Convolutional and residual networks are searched by coupled channels.",
        "No layer loses its last node.",
        "Spaces of single weights and of widths are ours, and so are the default settings.",
    ),
)

Keep = Literal["min", "median", "max"]
KEEPS = ("min", "median", "max")
SPACES = ("nodes", "weights", "widths")


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        best_index: the draw that is kept; `draw(space, seed, best_index)` makes it again.
        masks: its masks.
        scores: the score of every draw, in order.
    """

    best_index: int
    masks: Masks
    scores: tuple[float, ...]

    @property
    def score(self) -> float:
        """The score of the draw that is kept."""
        return self.scores[self.best_index]


def draw(space: Space, seed: int, index: int) -> Masks:
    """Return draw number `index` of a space: a function of the seed and the number alone, so no mask need be stored."""
    return space.draw(generator(seed, "draw", index))


def search(space: Space, score: Callable[[Masks], float], *, budget: int, seed: int = 0, keep: Keep = "min") -> Search:
    """Score `budget` random configurations and keep one.

    The draws of a smaller budget are the first ones of a larger one under the same seed, so that with more draws the
    lowest score never rises.

    Args:
        space: anything with `draw(generator) -> Masks`.
        score: value of a configuration, lower is better (see `untrained` for that of a masked model).
        budget: number of draws, at least 1.
        seed: seed of the draws.
        keep: "min" the lowest score; "max" the highest; "median" the lower one of the middle. The first of equals.

    Raises:
        MethodError: if the budget or `keep` make no sense, or a score is not a number.
    """
    if keep not in KEEPS:
        raise MethodError(f"keep={keep!r}: use one of {', '.join(KEEPS)}")
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise MethodError(f"budget={budget!r}: a search takes a whole number of draws, at least 1")
    scores: list[float] = []
    for index in range(budget):
        value = float(score(draw(space, seed, index)))
        if math.isnan(value):
            raise MethodError(f"the score of draw {index} is not a number; the untrained network gives NaN, or the scorer")
        scores.append(value)
    if keep == "max":
        best = scores.index(max(scores))
    else:
        order = sorted(range(budget), key=scores.__getitem__)  # stable: the first of equals
        best = order[(budget - 1) // 2 if keep == "median" else 0]
    return Search(best, draw(space, seed, best), tuple(scores))


def untrained(model: nn.Module, score: Callable[[nn.Module], float | Tensor]) -> Callable[[Masks], float]:
    """Return L_0: masks -> `score` of a masked copy of `model`; the model itself is never changed.

    The copy has the model's modes and batch-norm statistics, and may be trained by the scorer.
    """
    plain = unwrap(model)

    def scored(masks: Masks) -> float:
        copy = deepcopy(plain)
        masks.apply(copy)
        value = score(copy)
        return float(value.detach() if isinstance(value, Tensor) else value)

    return scored


def as_baseline(
    flops: float, cost: Cost, *, total_steps: int, masks: Mapping[str, Tensor] | None = None, scoring_batches: int = 16
) -> int:
    """Return the number of draws with which random search spends the FLOPs that another search method spent.

    Args:
        flops: FLOPs of the other method's search and training together.
        cost: cost of the network on one batch (`openwork.core.cost.count`).
        total_steps: steps of the training that follows the search.
        masks: any draw of the space; None charges dense forward passes and training.
        scoring_batches: batches of the scoring subset.

    Returns:
        floor((flops - training) / (scoring_batches * forward pass)).

    Raises:
        MethodError: if what remains after training does not pay for one draw.
    """
    train, each = total_steps * cost.training_flops(masks), scoring_batches * cost.flops(masks)
    draws = int((flops - train) // each) if each > 0 else 0
    if draws < 1:
        raise MethodError(
            f"{flops:.4g} FLOPs do not pay for {total_steps} steps of training ({train:.4g}) and one scored draw "
            f"({each:.4g}); lower total_steps or scoring_batches"
        )
    return draws


class RandomSearch:
    """Train the sub-network of lowest untrained loss among random ones (Farahani 2024).

    `budget=1` is the random arm: draw 0, bit for bit. An arm that the search has not looked at has another seed.

    Args:
        density: kept share of the masked weights. Of nodes, the nearest that whole nodes reach.
        total_steps: optimizer steps of the training after the search.
        space: "nodes", the paper's: hidden units and feature maps; "weights": single weights; "widths": nodes, with a
            random width a layer under the same weight budget; or a function model -> Space.
        budget: number of draws (B).
        scorer: (masked, untrained model) -> score, lower is better; None takes the probe's loss (L_0).
        keep: "min" trains the best draw; "median" and "max", for diagnosis, the middle and the worst.
        seed: seed of the draws.
        node_density: kept share of every layer's nodes, given instead of `density`; "nodes" only.
        scoring_batches: batches that scoring one draw runs forward; charged to `steps`. For a scorer that trains, three
            times its steps.
        allocate: layer-wise densities; "weights" only.
        pattern: which masks are legal; other than "unstructured" for "weights" only.
        parameters: which parameters get a mask (see `openwork.sparsifier.parameters.maskable`).
        exclude: names or globs of parameters to leave dense.

    Attributes:
        density: as given; with `node_density`, that share until `run` has found the weight density.
        steps: total_steps + budget * scoring_batches / 3.
        masks: what is kept, after `run`: all masked weights, biases and norms of removed nodes.
        found: the search, after `run`.
        kept: the kept nodes of each group after `run`, as `openwork.sparsifier.physical.compact` takes them; None for
            spaces without nodes.
        weight_density: kept share of the masked weights, exact, after `run`.
        node_density: kept share of the nodes, exact, after `run`; None for spaces without nodes.

    Raises:
        MethodError: if an option is unknown or does not go with the space.
        MaskError: if a density is out of range.
    """

    def __init__(
        self,
        density: float | None = None,
        *,
        total_steps: int,
        space: str | Callable[[nn.Module], Space] = "nodes",
        budget: int = 40,
        scorer: Callable[[nn.Module], float] | None = None,
        keep: Keep = "min",
        seed: int = 0,
        node_density: float | None = None,
        scoring_batches: int = 16,
        allocate: str | Mapping[str, float] | Allocation = "erk",
        pattern: str | Pattern = "unstructured",
        parameters: Choice = None,
        exclude: Iterable[str] = (),
    ) -> None:
        if not callable(space) and space not in SPACES:
            raise MethodError(f"space={space!r}: use {', '.join(SPACES)}, or a function model -> Space")
        if node_density is not None and space != "nodes":
            raise MethodError("node_density goes with space='nodes'; give density, the kept share of weights")
        pattern = parse(pattern) if isinstance(pattern, str) else pattern
        if space in ("nodes", "widths") and not isinstance(pattern, Unstructured):
            raise MethodError(f"whole nodes have no pattern {pattern}; use space='weights'")
        if keep not in KEEPS:
            raise MethodError(f"keep={keep!r}: use one of {', '.join(KEEPS)}")
        for name, value in (("total_steps", total_steps), ("budget", budget), ("scoring_batches", scoring_batches)):
            if value < 1:
                raise MethodError(f"{name}={value!r} must be at least 1")
        self.density = check_densities(density, node_density)
        self.total_steps, self.budget, self.keep, self.seed = total_steps, budget, keep, seed
        self.steps: float = total_steps + budget * scoring_batches / 3
        self.masks = Masks({})
        self.found: Search | None = None
        self.kept: dict[str, Tensor] | None = None
        self.weight_density: float | None = None
        self.node_density = node_density
        self._space, self._scorer, self._given = space, scorer, (density, node_density)
        self._weights: dict[str, Any] = {"allocation": allocate, "pattern": pattern}
        names = parameters is not None and not callable(parameters) and not isinstance(parameters, str)
        self._choice: dict[str, Any] = {
            "parameters": list(parameters) if names else parameters,  # type: ignore[arg-type]
            "exclude": exclude if isinstance(exclude, str) else list(exclude),
        }

    def space(self, model: nn.Module, example: Any = None) -> Space:
        """Return the space of `model` that is searched; `example` is an input, for forwards that need shapes.

        Raises:
            MaskError: if no node can be removed, or not so many.
            ModelError: if the forward cannot be traced.
        """
        density, node_density = self._given
        if not isinstance(self._space, str):
            return self._space(model)
        if self._space == "nodes":
            return NodeSpace(model, density, node_density=node_density, example=example, **self._choice)
        if self._space == "widths":
            return WidthSpace(model, self.density, example=example, **self._choice)
        return WeightSpace(model, self.density, **self._weights, **self._choice)

    def run(self, model: nn.Module, train: Train, probe: Probe) -> nn.Module:
        """Return the model, masked by the draw that is kept and trained in place, exactly zero where it is masked.

        Raises:
            MaskError: as for `space`.
            MethodError: if a score is not a number, or `train` does not hold the masks.
        """
        space = self.space(model, self._example(model, probe))
        score = untrained(model, self._scorer or probe.loss)
        found = search(space, score, budget=self.budget, seed=self.seed, keep=self.keep)
        self.found, self.masks, self.kept = found, found.masks, None
        if isinstance(space, NodeSpace | WidthSpace):
            self.kept = space.kept(generator(self.seed, "draw", found.best_index))
            self.node_density = space.node_share({name: len(nodes) for name, nodes in self.kept.items()})
        weights = maskable(unwrap(model), self._choice["parameters"], self._choice["exclude"])
        kept = sum(int(found.masks[n].sum()) if n in found.masks else p.numel() for n, p in weights.items())
        self.weight_density = kept / sum(param.numel() for param in weights.values())
        if self._given[0] is None:
            self.density = self.weight_density
        return run_leg(train, model, Fixed(found.masks), Leg("train", self.total_steps))

    def _example(self, model: nn.Module, probe: Probe) -> Any:
        """Return two training inputs, for the shapes; None where they are not needed or there are none."""
        if self._space not in ("nodes", "widths"):
            return None
        batch = next(iter(probe.batches()), None)
        if batch is None or not isinstance(batch[0], Tensor):
            return None
        device = next((param.device for param in model.parameters()), batch[0].device)
        return batch[0][:2].to(device)
