"""Sparse model soups against iterative magnitude pruning (IMP), and what may be averaged.

Compared, from one dense parent of the same first weights: IMP; IMP with every retraining m times as long, which is what
the soups spend; the best of m members a phase, with the same training as soups and no average; a soup in the last phase
only; soups of all members and greedy soups in every phase; and the average of m IMP runs that came to different masks,
pruned again, once with runs from one parent and once with runs that share nothing. IMP and soups also on a small
convolutional network with batch norm, for fewer steps.
True would be: a soup at least as accurate as its mean member, on clean and on corrupted test images; exactly as sparse;
no barrier on the line between members; a barrier between IMP runs that share nothing, and an average of different masks
that keeps more weights than they do; soups above IMP, above IMP of the same training, and above the pruned average. The
contest with IMP of the same training is close; the verdict is whatever the interval says.
The members' mean and best and the ensemble of their probabilities are measured beside the soup, on the test images;
which members enter a greedy soup, and which is best in a phase, is decided on validation images.
Departures and limits: small networks and few epochs; corrupted Fashion-MNIST stands in for CIFAR-C; members differ in
batch order only. Batch-norm statistics are measured again for every network that is evaluated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from itertools import combinations
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import nn

from openwork.core import metrics, schedules
from openwork.core.masks import Masks
from openwork.core.patterns import Unstructured
from openwork.core.rng import derive
from openwork.data.source import Source
from openwork.lab.claims import Claim
from openwork.lab.spec import Arm
from openwork.lab.study import Outcome, Study, Work
from openwork.lab.training import Trainer, layer_table
from openwork.methods.sparsify.imp import IMP
from openwork.methods.sparsify.sparse_model_soups import SparseModelSoup
from openwork.nn.batchnorm import recalibrate_norm
from openwork.sparsifier import Leg
from openwork.sparsifier.averaging import average_state
from openwork.sparsifier.parameters import maskable
from openwork.sparsifier.prune_grow import shrink
from openwork.studies import _common
from openwork.studies._common import Training
from openwork.train.evaluate import evaluate, predictions

KINDS = ("gaussian-noise", "blur", "rotation", "contrast")


class _Entry(NamedTuple):
    """What makes an arm: its options, whether it runs on the convolutional network too, and a note."""

    kind: str
    options: Mapping[str, Any] = {}
    core: bool = False
    note: str = ""


ARMS: Mapping[str, _Entry] = {
    "imp": _Entry("imp", core=True),
    "imp-long": _Entry("imp", {"longer": True}, note="every retraining as long as all members' of a soup together"),
    "imp-best": _Entry("soup", {"soup": "best"}, note="goes on from the best member; nothing is averaged"),
    "imp-soup": _Entry("soup", {"last_only": True}, note="a soup in the last phase only"),
    "sms": _Entry("soup", core=True),
    "sms-greedy": _Entry("soup", {"soup": "greedy"}),
    "naive": _Entry("naive", {"shared": True}, note="average of IMP runs from one parent, pruned again"),
    "apart": _Entry("naive", {"shared": False}, note="average of IMP runs that share nothing, pruned again"),
}


class Config(Training):
    """What the study trains on, and how."""

    plan: ClassVar[frozenset[str]] = Training.plan | {"no_barrier", "barrier"}

    network: str = Field("mlp-300-100", description="network of all arms")
    conv: str | None = Field("cnn", description="second network, of IMP and soups; none to leave out")
    conv_share: float = Field(0.15, gt=0, description="training length of the second network, as a share of the first's")
    conv_density: float = Field(0.05, gt=0, le=1, description="share of its weights that the second network keeps")
    density: tuple[float, ...] = Field((0.02,), description="shares of weights to keep")
    epochs: float = Field(12.0, gt=0, description="length of IMP: pretraining and all retraining, in epochs")
    weight_decay: float = Field(1e-4, ge=0, description="weight decay")
    pretrain: float = Field(0.5, gt=0, lt=1, description="share of it that is dense pretraining")
    phases: int = Field(3, ge=1, description="prunings, each followed by a retraining")
    members: int = Field(3, ge=2, description="members of a soup")
    severity: int = Field(3, ge=1, le=5, description="severity of the corruptions")
    points: int = Field(3, ge=1, description="points on the line between two networks where the barrier is measured")
    recalibrate: float = Field(0.1, gt=0, le=1, description="share of the training images for batch-norm statistics")
    no_barrier: float = Field(0.002, ge=0, description="a fall of accuracy below this is no barrier")
    barrier: float = Field(0.02, ge=0, description="a fall of accuracy above this is a barrier")


def arms(cfg: Config) -> list[Arm]:
    """Return every arm at every density; IMP and soups of the first density carry the second network."""
    found = []
    for place, density in enumerate(cfg.density):
        for name, entry in ARMS.items():
            conv = [cfg.conv] if entry.core and place == 0 and cfg.conv is not None else []
            settings = {"kind": entry.kind, "density": density, "options": dict(entry.options), "conv": conv}
            found.append(Arm(f"{name}@{density:g}", settings, name, density, entry.note))
    return found


def run(cfg: Config, arm: Arm, seed: int, work: Work) -> Outcome:
    """Train an arm on its networks and measure it."""
    source = _common.load_source(cfg)
    networks = [(cfg.network, cfg.epochs, arm.settings["density"], "")]
    networks += [(conv, cfg.epochs * cfg.conv_share, cfg.conv_density, "conv_") for conv in arm.settings["conv"]]
    found = Outcome({})
    for index, (network, epochs, density, prefix) in enumerate(networks):
        path = _Path(cfg.model_copy(update={"epochs": epochs}), source, network, density, seed)
        part = _common.share_of(work, network, index, len(networks))
        kind, options = arm.settings["kind"], arm.settings["options"]
        one = _naive(path, part, **options) if kind == "naive" else _trained(path, part, kind, **options)
        found.metrics |= {f"{prefix}{name}": value for name, value in one.metrics.items()}
        if not index:
            found.curves, found.layers, found.details = one.curves, one.layers, one.details
    return found


def claims(cfg: Config) -> list[Claim]:
    """Return what would count as true; for the mean over the densities where there are several."""

    def of(text: str, metric: str, weights: Mapping[str, float], margin: float = 0.0) -> Claim:
        share = 1.0 / len(cfg.density)
        return Claim(text, metric, {f"{a}@{d:g}": w * share for a, w in weights.items() for d in cfg.density}, margin=margin)

    def first(text: str, metric: str, weights: Mapping[str, float]) -> Claim:
        return Claim(text, metric, {f"{arm}@{cfg.density[0]:g}": weight for arm, weight in weights.items()})

    low, high = 100 * cfg.no_barrier, 100 * cfg.barrier
    found = [
        of("A soup is more accurate than its members on average", "gain", {"sms": 1.0}),
        of("A soup is more accurate than its members on corrupted images", "corrupted_gain", {"sms": 1.0}),
        of("A soup keeps no weight that its members do not keep", "extra", {"sms": -1.0}, -1e-9),
        of(f"No barrier above {low:g} points lies between members of a soup", "barrier", {"sms": -1.0}, -cfg.no_barrier),
        of(f"A barrier above {high:g} points lies between IMP runs that share nothing", "barrier", {"apart": 1.0},
           cfg.barrier),
        of("An average of differently pruned networks is denser than they are", "extra", {"naive": 1.0}),
        of("Soups in every phase are more accurate than IMP", "accuracy", {"sms": 1.0, "imp": -1.0}),
        of("Soups in every phase are more accurate than IMP of the same training", "accuracy",
           {"sms": 1.0, "imp-long": -1.0}),
        of("Soups in every phase are more accurate than a pruned average of IMP runs", "accuracy",
           {"sms": 1.0, "naive": -1.0}),
        of("Soups in every phase are more accurate than IMP on corrupted images", "corrupted", {"sms": 1.0, "imp": -1.0}),
    ]  # fmt: skip
    if cfg.conv is not None:
        found += [
            first("A convolutional soup is more accurate than its members on average", "conv_gain", {"sms": 1.0}),
            first("Convolutional soups are more accurate than IMP", "conv_accuracy", {"sms": 1.0, "imp": -1.0}),
        ]
    return found


class _Path(NamedTuple):
    """What is trained: a network on data, to a density, with the seed of its first weights and of its batches."""

    cfg: Config
    source: Source
    network: str
    density: float
    seed: int

    def lengths(self) -> tuple[int, int]:
        """Return the steps of pretraining and of all retraining together, of one path."""
        total = _common.total_steps(self.cfg, self.source)
        dense = min(max(1, round(self.cfg.pretrain * total)), total - self.cfg.phases)
        return dense, total - dense

    def options(self) -> dict[str, Any]:
        """Return what all procedures of the study are given."""
        return {"phases": self.cfg.phases, "recalibrate": self.cfg.recalibrate, "seed": self.seed}

    def trainer(self, work: Work, steps: float, seed: int | None = None) -> Trainer:
        """Return what trains `steps` steps, with the batches of the seed."""
        return _common.new_trainer(self.cfg, self.source, self.seed if seed is None else seed, work, steps)

    def model(self, seed: int | None = None) -> nn.Module:
        """Return the network with its first weights."""
        return _common.build_model(self.source, self.network, self.seed if seed is None else seed)

    def recalibrated(self, model: nn.Module) -> nn.Module:
        """Measure the batch-norm statistics of `model` again and return it."""
        recalibrate_norm(model, self.source.batches("train", self.cfg.batch_size), share=self.cfg.recalibrate)
        return model


def _trained(
    path: _Path, work: Work, kind: str, *, longer: bool = False, soup: str = "uniform", last_only: bool = False
) -> Outcome:
    """Train IMP or a soup, from its own pretraining on, and measure the result and its members."""
    dense, retrain = path.lengths()
    if kind == "imp":
        total = dense + (path.cfg.members if longer else 1) * retrain
        method = IMP(path.density, total_steps=total, pretrain=dense / total, **path.options())
    else:
        total = dense + retrain
        method = SparseModelSoup(
            path.density, total_steps=total, pretrain=dense / total, members=path.cfg.members, soup=soup,  # type: ignore[arg-type]
            last_only=last_only, **path.options(),
        )  # fmt: skip
    trainer = path.trainer(work, method.steps)
    model, masks = trainer.run(path.model(), method, total)
    found = _measured(path, model, masks, trainer, method.steps)
    found.details["phases"] = method.report
    if isinstance(method, SparseModelSoup):
        found.metrics |= _beside(path, model, method.members, found.metrics)
        gains = [row["accuracy"] - _mean(row["members"]) for row in method.report]
        found.metrics |= {f"gain_phase{place}": gain for place, gain in enumerate(gains, start=1)}
    return found


def _naive(path: _Path, work: Work, *, shared: bool) -> Outcome:
    """Average several IMP runs, prune the average again, and measure it; `shared`: all start from one dense parent."""
    dense, retrain = path.lengths()
    count = path.cfg.members
    steps = count * retrain + (1 if shared else count) * dense
    parent, flops = path.model(), 0.0
    trainer = path.trainer(_common.share_of(work, "parent", 0, count + 1), dense)
    if shared:
        straight = schedules.linear(1.0, 0.0, steps=1.0)
        trainer.train(parent, None, Leg("pretrain", dense, schedule=straight))
    runs, masks = [], []
    for index in range(count):
        seed = derive(path.seed, "run", index)
        total = retrain if shared else dense + retrain
        flops += trainer.flops
        trainer = path.trainer(_common.share_of(work, f"run{index}", index + 1, count + 1), total, seed)
        method = IMP(path.density, total_steps=total, pretrain=1.0 - retrain / total, **path.options())
        runs.append(trainer.run(deepcopy(parent) if shared else path.model(seed), method, total)[0])
        masks.append(method.masks)
    trainer.flops += flops
    model = deepcopy(parent)
    model.load_state_dict(average_state([one.state_dict() for one in runs]))
    before = Masks.of(maskable(model))
    pruned = _prune(model, path.density)
    found = _measured(path, path.recalibrated(model), pruned, trainer, steps)
    found.metrics |= {
        "barrier": _barrier(path, runs),
        "extra": before.density() / _mean([one.density() for one in masks]) - 1.0,
        "member_mean": _mean([evaluate(one, path.source.batches("test"), path.cfg.device).accuracy for one in runs]),
        "density_averaged": before.density(),
    }
    return found


def _prune(model: nn.Module, density: float) -> Masks:
    """Keep the largest weights of `model` over all layers."""
    params = maskable(model)
    sizes = {name: param.detach().abs() for name, param in params.items()}
    masks = Masks(shrink(Masks.ones(params), sizes, density, Unstructured()))
    masks.apply(model)
    return masks


def _measured(path: _Path, model: nn.Module, masks: Masks, trainer: Trainer, steps: float) -> Outcome:
    """Return what every arm reports; FLOPs and steps are multiples of those of a dense run as long as IMP."""
    total = sum(path.lengths())
    dense = 3.0 * total * path.cfg.batch_size * trainer.cost(model).flops()
    scores = evaluate(model, path.source.batches("test"), path.cfg.device)
    found = _common.Trained(model, masks, scores, trainer, dense).metrics() | _corrupted(path, model)
    return Outcome({**found, "steps": steps / total}, {"loss": trainer.curve}, layer_table(masks))


def _beside(path: _Path, model: nn.Module, members: Sequence[nn.Module], soup: Mapping[str, float]) -> dict[str, float]:
    """Return how the members of the last phase did, alone and as an ensemble of their probabilities."""
    logits, targets = zip(*(predictions(m, path.source.batches("test"), path.cfg.device) for m in members), strict=True)
    own, _ = predictions(model, path.source.batches("test"), path.cfg.device)
    alone = [metrics.accuracy(one, targets[0]) for one in logits]
    mixed = torch.stack([one.double().softmax(-1) for one in logits]).mean(0)
    right = mixed.argmax(-1) == targets[0]
    kept = Masks.of(maskable(model))
    theirs = [Masks.of(maskable(member)) for member in members]
    union = {name: torch.stack([one[name] for one in theirs]).any(0) for name in kept}
    found = {
        "member_mean": _mean(alone),
        "member_best": max(alone),
        "member_ece": _mean([metrics.ece(one.double().softmax(-1), one.argmax(-1) == targets[0]) for one in logits]),
        "ensemble": float(right.double().mean()),
        "ensemble_ece": metrics.ece(mixed, right),
        "agreement": float((own.argmax(-1) == mixed.argmax(-1)).double().mean()),
        "gain": soup["accuracy"] - _mean(alone),
        "extra": sum(int((kept[name] & ~union[name]).sum()) for name in kept) / kept.total(),
        "barrier": _barrier(path, members),
    }
    if "corrupted" in soup:
        worn = _mean([_corrupted(path, member)["corrupted"] for member in members])
        found |= {"member_corrupted": worn, "corrupted_gain": soup["corrupted"] - worn}
    return found


def _corrupted(path: _Path, model: nn.Module) -> dict[str, float]:
    """Return the accuracy on every kind of corrupted test images and their mean; of the first network only."""
    cfg = path.cfg
    if path.network != cfg.network:
        return {}
    found = {
        f"accuracy_{kind}": evaluate(model, path.source.corrupted(kind, cfg.severity), cfg.device).accuracy for kind in KINDS
    }
    return {**found, "corrupted": _mean(list(found.values()))}


def _barrier(path: _Path, models: Sequence[nn.Module]) -> float:
    """Return the largest fall of validation accuracy below the chord on the lines between models, the mean over pairs.

    The second network, whose looks are dear, is looked at half way only.
    """

    def accuracy(model: nn.Module) -> float:
        return evaluate(path.recalibrated(model), path.source.batches("validation"), path.cfg.device).accuracy

    points = path.cfg.points if path.network == path.cfg.network else 1
    ends = [accuracy(deepcopy(model)) for model in models]
    middle, falls = deepcopy(models[0]), []
    for one, other in combinations(range(len(models)), 2):
        states = [models[one].state_dict(), models[other].state_dict()]
        fall = 0.0
        for point in range(1, points + 1):
            t = point / (points + 1)
            middle.load_state_dict(average_state(states, [1 - t, t]))
            fall = max(fall, (1 - t) * ends[one] + t * ends[other] - accuracy(middle))
        falls.append(fall)
    return _mean(falls)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


STUDY = Study(
    name="sparse-model-soups",
    config=Config,
    presets={
        "smoke": {"train": 600, "epochs": 6, "batch_size": 64, "network": "mlp-64-32", "density": (0.1,), "conv_share": 0.5,
                  "conv_density": 0.2, "recalibrate": 0.5, "points": 1, "seeds": 2},
        "laptop": {"data": "fashion-mnist", "train": 20000, "seeds": 3},
        "paper": {"data": "cifar10", "network": "resnet18", "conv": None, "density": (0.1, 0.02), "epochs": 260,
                  "pretrain": 0.77, "weight_decay": 5e-4, "augment": "flip-shift", "points": 9, "recalibrate": 0.2},
    },
    arms=arms,
    run=run,
    claims=claims,
    columns={
        "accuracy": "accuracy",
        "corrupted": "corrupted",
        "ece": "ECE",
        "member_mean": "mean member",
        "member_best": "best member",
        "ensemble": "ensemble",
        "gain": "over mean member",
        "barrier": "barrier",
        "density_averaged": "kept by the average",
        "conv_accuracy": "accuracy, conv",
        "conv_gain": "over mean member, conv",
        "training_flops": "training FLOPs",
        "steps": "steps",
    },
    about=(
        "Small networks, few epochs, members that differ in batch order only; corrupted is the mean accuracy over noise, "
        "blur, rotation and contrast of severity 3, a stand-in for CIFAR-C. Steps and FLOPs are multiples of those of dense "
        "training as long as IMP; soups spend the retraining once a member, as IMP with long retraining does, and all arms "
        "pretrain alike. Barriers are falls of validation accuracy. The second network is trained for .15 of the steps "
        "and only by IMP and soups."
    ),
)  # fmt: skip
