"""IMP: iterative magnitude pruning, train dense, then prune and retrain in phases.

Renda, Frankle, Carbin. "Comparing Rewinding and Fine-tuning in Neural Network Pruning". ICLR 2020; after Han, Pool, Tran,
Dally. "Learning both Weights and Connections for Efficient Neural Networks". NeurIPS 2015.
Claim: retraining after pruning with the last learning rates of the original training (rewinding the rate) beats
fine-tuning at the last, small rate, and matches rewinding the weights too.
Equations: density d_k = d^(k/P) after phase k of P, each phase pruning the smallest |w| of all layers together; retraining
rates FT (Han et al.), LRW (Renda et al., Algorithm 3), SLR and CLR (Le & Hua, ICLR 2021), LLR and ALLR (Zimmer, Spiegel,
Pokutta, ICLR 2023), written out in `_retrain.retrain_schedule`.
Departures: every layer keeps at least one weight; batch-norm statistics are measured again after each retraining; the
whole of pretraining and retraining is one budget; warm-up of pretraining is what comes before its highest rate; the norm
in ALLR is that of the masked weights.
Cost: one selection over all weights a phase. Recalibration runs the training data forward once a phase and is not in
`steps`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from openwork.cards import Card
from openwork.core.masks import Masks
from openwork.core.schedules import Schedule
from openwork.errors import MethodError
from openwork.methods.sparsify._retrain import (
    SCHEDULES,
    Pruning,
    base_rate,
    count_nonzero,
    history_of,
    phase_densities,
    prune,
    retrain_schedule,
    run_leg,
    share_steps,
)
from openwork.nn.batchnorm import recalibrate_norm
from openwork.sparsifier.procedure import Leg, Probe, Train
from openwork.sparsifier.sparsifier import Fixed

CARD = Card(
    name="imp",
    title="Comparing Rewinding and Fine-tuning in Neural Network Pruning",
    authors=("Alex Renda", "Jonathan Frankle", "Michael Carbin"),
    year=2020,
    venue="ICLR",
    link="https://arxiv.org/abs/2003.02389",
    wing="sparsify",
    claim="Retraining with the learning rate rewound beats fine-tuning after each pruning of a trained network.",
    entry="IMP",
    aliases=("iterative-magnitude-pruning",),
    departures=(
        "Every layer keeps at least one weight.",
        "Batch-norm statistics are measured again after each retraining.",
        "Pretraining and retraining share one budget.",
        "Warm-up of pretraining is what comes before its highest rate.",
        "The norm in ALLR is that of the masked weights.",
    ),
)


class IMP:
    """Dense pretraining, then phases of global magnitude pruning and retraining with the masks fixed.

    Args:
        density: kept share of the masked weights at the end.
        total_steps: optimizer steps of pretraining and all retraining.
        phases: prunings (P), each followed by a retraining; they share the steps after pretraining equally.
        pretrain: share of `total_steps` that is trained dense; 0 prunes the model as it is handed over.
        schedule: learning rate of a retraining: "ft", "lrw", "slr", "clr", "llr" or "allr".
        base_schedule: learning rate of pretraining as a multiple of the run's base rate: a function of progress, or
            the rates step by step; None falls from 1 to 0 in a line, as in the papers on LLR and soups.
        scope: "global" lets all layers compete, "layers" keeps each at its allocated density.
        recalibrate: share of the training batches from which batch-norm statistics are measured after a retraining.
        options: `allocate`, `pattern`, `parameters`, `exclude`, `seed` of every Sparsifier. By default first and last
            layers are pruned too.

    Attributes:
        steps: optimizer steps in all; `total_steps`.
        masks: what is kept, after `run`.
        report: a row a phase: `phase`; `density` of the masks and `nonzero`, the share that is really not zero; the
            validation accuracies of the `members` that were trained, which of them were `chosen`, and the `accuracy`
            of the model with which the next phase starts.

    Raises:
        MethodError: if a phase would have no step, a word is unknown, or a schedule lacks the rates of pretraining.
        MaskError: if the density is out of range.
    """

    def __init__(
        self,
        density: float,
        *,
        total_steps: int,
        phases: int = 3,
        pretrain: float = 0.5,
        schedule: str = "llr",
        base_schedule: Schedule | Sequence[float] | None = None,
        scope: Literal["global", "layers"] = "global",
        recalibrate: float = 1.0,
        **options: Any,
    ) -> None:
        if scope not in ("global", "layers"):
            raise MethodError(f"scope={scope!r}: use 'global' or 'layers'")
        if schedule not in SCHEDULES:
            raise MethodError(f"schedule={schedule!r} is unknown; use one of {', '.join(SCHEDULES)}")
        if not 0.0 < recalibrate <= 1.0:
            raise MethodError(f"recalibrate={recalibrate!r} is not in (0, 1]; it is a share of the training batches")
        self._pruning: dict[str, Any] = {"density": density, "layerwise": scope == "layers", **options}
        Pruning(masks=None, target=density, **self._pruning)  # refuses wrong options before anything is trained
        self.density, self.densities = float(density), phase_densities(density, phases)
        self.pretrain_steps, self.retrain_steps = share_steps(total_steps, pretrain, phases)
        self.schedule, self.recalibrate = schedule, recalibrate
        self._base, self._base_rate = base_schedule, base_rate(base_schedule)
        if schedule != "llr" and not self.pretrain_steps and (base_schedule is None or callable(base_schedule)):
            raise MethodError(
                f"schedule={schedule!r} needs the rates of a pretraining: give them step by step as base_schedule, "
                "set pretrain above 0, or use 'llr'"
            )
        self.steps: float = self.pretrain_steps + sum(sum(self.lengths(k)) for k in range(1, phases + 1))
        self.masks = Masks({})
        self.report: list[dict[str, Any]] = []

    def run(self, model: nn.Module, train: Train, probe: Probe) -> nn.Module:
        """Return the model, pruned and trained in place, exactly zero where it is masked.

        Raises:
            MethodError: if `train` returns no model or does not hold the masks that it is given.
        """
        self.masks, self.report = Masks({}), []
        if self.pretrain_steps:
            model = run_leg(train, model, None, Leg("pretrain", self.pretrain_steps, schedule=self._base_rate))
        masks = None
        for phase, density in enumerate(self.densities, start=1):
            masks, lost = prune(model, masks, density, **self._pruning)
            model, row = self.retrain(model, masks, self.legs(phase, lost), train, probe)
            nonzero = count_nonzero(model, masks) / masks.total()
            self.report.append({"phase": phase, "density": masks.density(), "nonzero": nonzero, **row})
            self.masks = masks
        return model

    def lengths(self, phase: int) -> list[int]:
        """Return the steps of every training in phase 1, 2, ...: here a single one."""
        return [self.retrain_steps[phase - 1]]

    def legs(self, phase: int, lost: float) -> list[Leg]:
        """Return the trainings of phase 1, 2, ... whose pruning lost the share `lost` of the norm."""
        (steps,) = self.lengths(phase)
        return [Leg(f"phase{phase}", steps, schedule=self.rate(steps, lost), stream=phase)]

    def rate(self, steps: int, lost: float, *, name: str | None = None, scale: float = 1.0) -> Schedule:
        """Return the learning rate of a retraining of `steps` steps."""
        history = history_of(self._base, self.pretrain_steps)
        pruned = 1.0 - self.densities[0]
        return retrain_schedule(name or self.schedule, history, steps, lost=lost, pruned=pruned, scale=scale)

    def retrain(
        self, model: nn.Module, masks: Masks, legs: Sequence[Leg], train: Train, probe: Probe
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Train the pruned model for the one leg; return it and its row of the report."""
        model = run_leg(train, model, Fixed(masks), legs[0])
        accuracy = self.measure(model, probe)
        return model, {"members": [accuracy], "chosen": [0], "accuracy": accuracy}

    def measure(self, model: nn.Module, probe: Probe) -> float:
        """Measure batch-norm statistics again, then return the validation accuracy."""
        recalibrate_norm(model, probe.batches(), share=self.recalibrate)
        return probe.accuracy(model)
