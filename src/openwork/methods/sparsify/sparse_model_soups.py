"""Sparse model soups: iterative magnitude pruning whose every phase ends in an average of models with one mask.

Zimmer, Spiegel, Pokutta. "Sparse Model Soups: A Recipe for Improved Pruning via Model Averaging". ICLR 2024.
Claim: models retrained from the same pruned one, differing in batch order, weight decay, length or rate, share its mask
and can be averaged; the average generalises better than they do, and starting every next phase from it improves IMP a lot.
Equations: phase k prunes to density d^(k/P) and retrains m copies to w_1..w_m; the next phase starts from
sum_i l_i w_i, l_i >= 0, sum_i l_i = 1 (Algorithm 1), either l_i = 1/m or the greedy soup of Wortsman et al. (2022).
Departures: those of `imp`; recalibration averages over all batches rather than exponentially; step counters of batch norm
are copied, not averaged; lengths and rates of members are given as multiples of the phase's own; every phase has batch
orders of its own.
Cost: m retrainings a phase, independent of one another (`map`); m models in memory; recalibration and validation of every
member and of every soup that is tried, which is not in `steps`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from openwork.cards import Card
from openwork.core.masks import Masks
from openwork.core.schedules import Schedule
from openwork.errors import MethodError, ModelError
from openwork.methods.sparsify._retrain import SCHEDULES, base_rate, count_nonzero, run_leg
from openwork.methods.sparsify.gmp import GMP
from openwork.methods.sparsify.imp import IMP
from openwork.nn.batchnorm import recalibrate_norm
from openwork.sparsifier.averaging import average_state, greedy_soup, same_masks
from openwork.sparsifier.parameters import maskable, unwrap
from openwork.sparsifier.procedure import Leg, Probe, Train
from openwork.sparsifier.sparsifier import Fixed, Sparsifier, State

CARD = Card(
    name="sparse-model-soups",
    title="Sparse Model Soups: A Recipe for Improved Pruning via Model Averaging",
    authors=("Max Zimmer", "Christoph Spiegel", "Sebastian Pokutta"),
    year=2024,
    venue="ICLR",
    link="https://arxiv.org/abs/2306.16788",
    wing="sparsify",
    claim="Starting every phase of iterative pruning from the average of models retrained from one mask beats IMP.",
    entry="SparseModelSoup",
    aliases=("soups", "sms"),
    departures=(
        "Those of imp.",
        "Batch-norm recalibration averages over all batches rather than exponentially.",
        "Lengths and rates of members are multiples of the phase's own.",
        "Every phase has batch orders of its own.",
    ),
)

Mapper = Callable[..., Iterable[Any]]


class SparseModelSoup(IMP):
    """IMP whose phases train several copies of the pruned model and go on from their average (Algorithm 1).

    Args:
        density: kept share of the masked weights at the end.
        total_steps: optimizer steps of one path: pretraining, then one member a phase.
        members: copies that are retrained in a phase (m).
        vary: what differs between the members of a phase: "seed" (batch order and noise), "weight_decay", "length" or
            "schedule" (the rate).
        values: one per member: weight decays; lengths as multiples of the phase's steps (None: evenly from 2/3 to 4/3);
            rates as multiples of the phase's own, or names of schedules (None: evenly from 1/2 to 3/2). Batch orders
            are counted through and take no values.
        soup: "uniform" averages all; "greedy" adds members, best first, while validation accuracy does not fall; "best"
            averages nothing and goes on from the best member, the rival with the same training.
        last_only: train one model a phase, as IMP does, and several in the last phase only.
        map: calls a function for every leg and returns the results in order, as the builtin `map` does one after the
            other; for example `joblib.Parallel` over `delayed` calls, where `train` allows it.
        options: `phases`, `pretrain`, `schedule`, `base_schedule`, `scope`, `recalibrate` of `IMP`, and the options of
            every Sparsifier.

    Attributes:
        steps: optimizer steps in all, every member's counted.
        masks: what is kept, after `run`.
        members: the models of the last phase, with recalibrated statistics, after `run`.
        report: a row a phase, as IMP's.

    Raises:
        MethodError: if a word is unknown or the values do not fit.
        MaskError: if the density is out of range.
    """

    def __init__(
        self,
        density: float,
        *,
        total_steps: int,
        members: int = 3,
        vary: Literal["seed", "weight_decay", "length", "schedule"] = "seed",
        values: Sequence[float | str] | None = None,
        soup: Literal["uniform", "greedy", "best"] = "uniform",
        last_only: bool = False,
        map: Mapper = map,
        **options: Any,
    ) -> None:
        if members < 1:
            raise MethodError(f"members={members!r}: a soup needs at least one")
        if soup not in ("uniform", "greedy", "best"):
            raise MethodError(f"soup={soup!r}: use 'uniform', 'greedy' or 'best'")
        self.size, self.vary, self.soup, self.last_only, self.map = members, vary, soup, last_only, map
        self.values = _values(vary, values, members)
        self.members: list[nn.Module] = []
        super().__init__(density, total_steps=total_steps, **options)

    def lengths(self, phase: int) -> list[int]:
        """Return the steps of every member in phase 1, 2, ..."""
        steps = self.retrain_steps[phase - 1]
        if self.last_only and phase < len(self.densities):
            return [steps]
        if self.vary != "length":
            return [steps] * self.size
        return [max(1, round(float(value) * steps)) for value in self.values]

    def legs(self, phase: int, lost: float) -> list[Leg]:
        """Return the members' trainings in phase 1, 2, ..."""
        if self.last_only and phase < len(self.densities):
            return super().legs(phase, lost)
        lengths = self.lengths(phase)
        return [self._leg(f"phase{phase}-member{i}", phase, i, steps, lost) for i, steps in enumerate(lengths)]

    def _leg(self, name: str, phase: int, place: int, steps: int, lost: float) -> Leg:
        value = self.values[place]
        stream = (phase - 1) * self.size + place + 1 if self.vary == "seed" else phase
        named, scale, decay = None, 1.0, None
        if self.vary == "schedule":
            named, scale = (value, 1.0) if isinstance(value, str) else (None, float(value))
        elif self.vary == "weight_decay":
            decay = float(value)
        rate = self.rate(steps, lost, name=named, scale=scale)
        return Leg(name, steps, schedule=rate, stream=stream, weight_decay=decay)

    def run(self, model: nn.Module, train: Train, probe: Probe) -> nn.Module:
        """Return the last soup, in the model that was given, exactly zero where it is masked.

        Raises:
            MethodError: if `train` returns no model or does not hold the masks that it is given.
        """
        self.members = []
        return super().run(model, train, probe)

    def retrain(
        self, model: nn.Module, masks: Masks, legs: Sequence[Leg], train: Train, probe: Probe
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Train a copy of the pruned model for every leg; return their soup and its row of the report."""
        if self.last_only and len(legs) == 1:
            return super().retrain(model, masks, legs, train, probe)
        members = list(self.map(partial(_train_copy, train, model, masks), legs))
        scores = [self.measure(member, probe) for member in members]
        states = [unwrap(member).state_dict() for member in members]
        evaluate = partial(self._evaluate, model, probe)
        chosen = list(range(len(members)))
        if self.soup == "greedy":
            state, chosen = greedy_soup(states, evaluate, scores=scores, masks=masks)
        else:
            if self.soup == "best":
                chosen = [max(chosen, key=scores.__getitem__)]
            state = average_state([states[i] for i in chosen], masks=masks)
        accuracy = self._evaluate(model, probe, state)
        masks.apply(unwrap(model))
        self.members = members
        return model, {"members": scores, "chosen": chosen, "accuracy": accuracy}

    def _evaluate(self, model: nn.Module, probe: Probe, state: Mapping[str, Any]) -> float:
        unwrap(model).load_state_dict(state)
        return self.measure(model, probe)


class GradualSoup:
    """Soups in pruning during training: replicas of a gradual method, averaged before every next pruning.

    The run of a Sparsifier is cut where its masks may change. Up to the first pruning one model is trained; from each
    pruning to the next, several copies are, and their average, that of the sparsifier's own weights included (the dense
    weights of DPF), is what the next pruning sees. The optimizer starts afresh after each cut.

    Args:
        density: kept share of the masked weights at the end.
        total_steps: optimizer steps of one path.
        members: copies that are trained between two prunings.
        phases: prunings until the final density, when `every` is not given.
        make: builds the Sparsifier from `density`, `total_steps`, `every` and `options`: GMP, DPF, or any other whose
            masks depend on the weights alone, so that all members prune alike.
        base_schedule: learning rate of the whole run as for `IMP`; None falls from 1 to 0 in a line.
        recalibrate: share of the training batches from which batch-norm statistics are measured after an average.
        map: as for `SparseModelSoup`.
        options: further arguments of `make`.

    Attributes:
        steps: optimizer steps in all, every member's counted.
        cuts: the steps at which the run is cut, its beginning and end included.
        masks: what is kept, after `run`.
        members: the models of the last stretch, with recalibrated statistics, after `run`.
        report: a row a stretch, as that of `IMP`, with the `step` at which it ended for `phase`.

    Raises:
        MethodError: if the method's masks may change at any step, so that there is nowhere to cut.
    """

    def __init__(
        self,
        density: float,
        *,
        total_steps: int,
        members: int = 3,
        phases: int = 5,
        make: Callable[..., Sparsifier] = GMP,
        base_schedule: Schedule | Sequence[float] | None = None,
        recalibrate: float = 1.0,
        map: Mapper = map,
        **options: Any,
    ) -> None:
        if members < 1 or phases < 1:
            raise MethodError(f"members={members!r} and phases={phases!r} must be at least 1")
        every = options.pop("every", None) or max(1, round(options.get("end", 0.5) * total_steps / phases))
        self._make = partial(make, density, total_steps=total_steps, every=every, **options)
        updates = self._make().every
        if updates == Sparsifier.every:
            raise MethodError(f"{make.__name__} does not say when its masks change, so its run cannot be cut; use GMP")
        stop = total_steps if updates.stop is None else min(total_steps, updates.stop)
        inner = [step for step in range(updates.start, total_steps, updates.period) if 0 < step < stop]
        self.cuts = [0, *inner, total_steps]
        self.density, self.size, self.recalibrate, self.map = float(density), members, recalibrate, map
        self._rate = base_rate(base_schedule)
        first = self.cuts[1] if inner else 0
        self.steps: float = first + members * (total_steps - first)
        self.masks = Masks({})
        self.members: list[nn.Module] = []
        self.report: list[dict[str, Any]] = []

    def run(self, model: nn.Module, train: Train, probe: Probe) -> nn.Module:
        """Return the last average, in the model that was given, exactly zero where it is masked.

        Raises:
            MethodError: if `train` returns no model or does not attach the sparsifier.
            MaskError: if the members of a stretch came to different masks.
        """
        self.masks, self.report = Masks({}), []
        state: State | None = None
        for place, end in enumerate(self.cuts[1:]):
            legs = self._legs(place)
            results = list(self.map(partial(_train_gradual, train, model, self._make, state), legs))
            self.members = [member for member, _ in results]
            states = [found for _, found in results]
            self.masks = same_masks([_masks_of(found) for found in states])
            state = average_state(states) | {"step": end}
            scores = [self._measure(member, probe) for member in self.members]
            mean = average_state([unwrap(member).state_dict() for member in self.members], masks=self.masks)
            unwrap(model).load_state_dict(mean)
            nonzero = count_nonzero(model, self.masks) / self.masks.total()
            row: dict[str, Any] = {"step": end, "density": self.masks.density(), "nonzero": nonzero}
            row |= {"members": scores, "chosen": list(range(len(scores)))}
            self.report.append(row | {"accuracy": self._measure(model, probe)})
        return model

    def _legs(self, place: int) -> list[Leg]:
        start, end, total = self.cuts[place], self.cuts[place + 1], self.cuts[-1]

        def rate(t: float) -> float:
            return self._rate((start + t * (end - start)) / total)

        if place == 0 and len(self.cuts) > 2:
            return [Leg("start", end, schedule=rate)]
        streams = range(place * self.size, (place + 1) * self.size)
        return [Leg(f"stretch{place}-member{i}", end - start, rate, s + 1) for i, s in enumerate(streams)]

    def _measure(self, model: nn.Module, probe: Probe) -> float:
        recalibrate_norm(model, probe.batches(), share=self.recalibrate)
        return probe.accuracy(model)


def soup(
    models: Sequence[nn.Module],
    *,
    weights: Sequence[float] | None = None,
    masks: Mapping[str, Tensor] | None = None,
    batches: Iterable[Any] | None = None,
) -> nn.Module:
    """Return a new model that is the average of `models`, as sparse as each of them.

    Args:
        models: models of one architecture with one mask.
        weights: one per model, at least 0, summing to 1; None is the uniform average.
        masks: the masks that all of them must keep; None reads each model's masks off the zeros of its weight matrices
            and kernels.
        batches: training inputs from which to measure batch-norm statistics again; without them a network with batch
            norm should not be used before `recalibrate_norm`, since averaged statistics are not those of the average.

    Raises:
        MaskError: if the models' masks differ, or a model is not zero where `masks` says.
        MethodError: if there is no model, or the weights do not fit.
        ModelError: if the models are not of one architecture.
    """
    if not models:
        raise MethodError("a soup needs at least one model, got none")
    inner = [unwrap(model) for model in models]
    if masks is None:
        common = same_masks([Masks.of(maskable(model)) for model in inner])
    else:
        common = Masks(masks)
        for model in inner:
            common.check(model)
    mixed = deepcopy(inner[0])
    mixed.load_state_dict(average_state([model.state_dict() for model in inner], weights, common))
    if batches is not None:
        recalibrate_norm(mixed, batches)
    return mixed


@torch.no_grad()
def soup_report(states: Sequence[Mapping[str, Any]], names: Iterable[str] | None = None) -> dict[str, Any]:
    """Return how far the members of a soup lie apart.

    Args:
        states: state dicts of one kind.
        names: the tensors to compare; None is every floating-point tensor. Name the parameters to leave out running
            statistics.

    Returns:
        `distance` and `cosine`, lists of lists, a row and a column a member: Euclidean distances and cosines (0 where a
        member is zero); `to_mean`, a list: the distances from the members' mean.

    Raises:
        MethodError: if there is no state.
        ModelError: if there is nothing to compare.
    """
    if not states:
        raise MethodError("a report needs at least one state, got none")
    first = states[0]
    keys = [k for k, v in first.items() if isinstance(v, Tensor) and v.is_floating_point()] if names is None else names
    keys = list(keys)
    missing = [key for key in keys for state in states if key not in state]
    if missing or not keys:
        raise ModelError(f"{missing[0]!r} is not in all states" if missing else "the states hold no numbers to compare")
    rows = torch.stack([torch.cat([state[k].detach().double().reshape(-1).cpu() for k in keys]) for state in states])
    units = nn.functional.normalize(rows, dim=1, eps=1e-300)
    return {
        "distance": [[float((a - b).norm()) for b in rows] for a in rows],
        "cosine": (units @ units.T).tolist(),
        "to_mean": (rows - rows.mean(dim=0)).norm(dim=1).tolist(),
    }


def _values(vary: str, values: Sequence[float | str] | None, members: int) -> list[float | str]:
    defaults = {"seed": (1.0, 1.0), "length": (2 / 3, 4 / 3), "schedule": (0.5, 1.5)}
    if vary not in (*defaults, "weight_decay"):
        raise MethodError(f"vary={vary!r}: use 'seed', 'weight_decay', 'length' or 'schedule'")
    if values is None:
        if vary == "weight_decay":
            raise MethodError("vary='weight_decay' needs values, the weight decay of every member")
        low, high = defaults[vary]
        return [low + (high - low) * (i / (members - 1) if members > 1 else 0.5) for i in range(members)]
    if vary == "seed":
        raise MethodError("vary='seed' takes no values: members differ in their batch order, which is counted through")
    if len(values) != members:
        raise MethodError(f"got {len(values)} values for {members} members; give one a member")
    for value in values:
        named = isinstance(value, str)
        if (named and (vary != "schedule" or value not in SCHEDULES)) or (not named and not float(value) >= 0):
            raise MethodError(f"values={list(values)!r} do not fit vary={vary!r}: {value!r} is no number of at least 0")
    return list(values)


def _train_copy(train: Train, model: nn.Module, masks: Masks, leg: Leg) -> nn.Module:
    return run_leg(train, deepcopy(model), Fixed(masks), leg)


def _train_gradual(
    train: Train, model: nn.Module, make: Callable[[], Sparsifier], state: State | None, leg: Leg
) -> tuple[nn.Module, State]:
    sparsifier = make()
    if state is not None:
        sparsifier.load_state_dict(state)
    trained = run_leg(train, deepcopy(model), sparsifier, leg)
    return trained, sparsifier.state_dict()


def _masks_of(state: State) -> Masks:
    return Masks.load({k.removeprefix("masks."): v for k, v in state.items() if k.startswith("masks.")})  # type: ignore[misc]
