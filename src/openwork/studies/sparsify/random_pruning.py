"""Random masks at initialisation: do they reach dense as the network widens, and are they to be trusted more?

Compared, at the same steps: dense; random masks with ERK, uniform and SNIP ratios; the largest initial magnitudes; and,
for the position test, SNIP's own mask against a redraw of its positions that keeps every layer's count. Every arm
trains a two-layer perceptron at several widths.
True would be: from the narrowest to the widest the gap to dense shrinks (a linear contrast over the logarithm of the
width), and at the widest and densest it is under a point; at the narrowest ERK is above uniform where few weights are
left, and no different where many are. On trust (calibration, likelihood, strangers, attacks, corruptions, at the
widest) the claims have no direction. Redrawing positions makes no difference.
Departures and limits: width only, no depth, perceptrons instead of residual networks; the trust claims are made at the
largest density, where accuracies are close, since a less accurate network can look better calibrated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from openwork import data
from openwork.core import metrics
from openwork.core.masks import Masks
from openwork.core.rng import generator
from openwork.core.select import count_of, top
from openwork.data import Arrays, corruptions
from openwork.data.source import Source
from openwork.errors import DataError
from openwork.lab.claims import Claim
from openwork.lab.spec import Arm
from openwork.lab.study import Outcome, Study, Work
from openwork.lab.training import layer_table
from openwork.methods.sparsify.random_pruning import dead_lines, shuffle_within_layers, snip_scores
from openwork.sparsifier import Fixed, Sparsifier
from openwork.studies import _common
from openwork.studies._common import DENSE, Training
from openwork.train.evaluate import evaluate, predictions
from openwork.train.robustness import fgsm_accuracy

Batches = Iterator[tuple[Tensor, Tensor]]

EPS = (2, 4, 8)  # of 255
RULES: Mapping[str, str] = {
    "erk": "random mask, ERK ratios",
    "uniform": "random mask, the same density everywhere",
    "snip-ratio": "random mask, SNIP's layer ratios",
    "magnitude": "largest initial weights of all layers",
}
RANDOM = ("erk", "uniform", "snip-ratio")
POSITION: Mapping[str, str] = {
    "snip-mask": "SNIP's own mask",
    "snip-redrawn": "as many weights a layer as SNIP's mask, at random",
}


class Config(Training):
    """What the study trains on, and how."""

    network: str = Field("mlp-{width}-{width}", description="network; without {width} it is given as an option")
    widths: tuple[int, ...] = Field((32, 128, 512), min_length=2, description="widths, each larger than the one before")
    density: tuple[float, ...] = Field((0.3, 0.1, 0.05), description="shares of weights to keep")
    outside: str = Field("shuffled", description="strangers: a data set, or shuffled: test images' pixels")
    probe: int = Field(2048, ge=1, description="test images for attacks, corruptions and strangers")
    severity: int = Field(3, ge=1, le=5, description="of the corruptions")

    def identity(self) -> dict[str, Any]:
        """Return the digests of the data and of the strangers."""
        outside = {} if self.outside == "shuffled" else {"outside": data.digest(self.outside)}
        return super().identity() | outside


def arms(cfg: Config) -> list[Arm]:
    """Return dense, every rule at every density, and the position test at the smallest density."""
    found = [Arm(DENSE, {"rule": DENSE}, DENSE)]
    for density in cfg.density:
        rules = {**RULES, **(POSITION if density == min(cfg.density) else {})}
        for rule, note in rules.items():
            method = "random-pruning" if rule in RANDOM else rule
            found.append(Arm(f"{rule}@{density:g}", {"rule": rule, "density": density}, method, density, note))
    return found


def run(cfg: Config, arm: Arm, seed: int, work: Work) -> Outcome:
    """Train an arm at every width; measure its accuracy at each and its trust at the widest."""
    source = _common.load_source(cfg)
    accuracies: list[float] = []
    dead: dict[str, float] = {}
    for index, width in enumerate(cfg.widths):
        part = _common.share_of(work, str(width), index, len(cfg.widths))
        model = _model(cfg, source, width, seed)
        method = _method(cfg, source, model, arm, seed)
        found = _common.train(cfg, source, model, method, seed, part)
        accuracies.append(found.scores.accuracy)
        dead[f"w{width}_dead_rows"] = _dead_rows(found.masks)
    values = {f"w{width}_accuracy": value for width, value in zip(cfg.widths, accuracies, strict=True)}
    values |= dead | found.metrics() | trust(cfg, source, found.model)
    values["widening_accuracy"] = widening(cfg.widths, accuracies)
    return Outcome(values, curves={"loss": found.trainer.curve}, layers=layer_table(found.masks))


def claims(cfg: Config) -> list[Claim]:
    """Return what would count as true."""
    low, high, narrow, wide = min(cfg.density), max(cfg.density), min(cfg.widths), max(cfg.widths)
    to_dense = {f"erk@{high:g}": 1.0, DENSE: -1.0}
    rules_low = {f"erk@{low:g}": 1.0, f"uniform@{low:g}": -1.0}
    rules_high = {f"erk@{high:g}": 1.0, f"uniform@{high:g}": -1.0}
    position = {f"snip-redrawn@{low:g}": 1.0, f"snip-mask@{low:g}": -1.0}
    at = f"at density {high:g}"
    return [
        Claim(
            f"The gap to dense shrinks from width {narrow} to {wide} with ERK at density {low:g}",
            "widening_accuracy", {f"erk@{low:g}": 1.0, DENSE: -1.0},
        ),
        Claim(f"ERK {at} is within a point of dense at width {wide}", "accuracy", to_dense, "equivalent", 0.01),
        Claim(
            f"ERK is more accurate than uniform at density {low:g} and width {narrow}", f"w{narrow}_accuracy", rules_low
        ),
        Claim(
            f"ERK and uniform differ by less than a point {at} and width {narrow}", f"w{narrow}_accuracy", rules_high,
            "equivalent", 0.01,
        ),
        Claim(
            f"Redrawn positions change SNIP's accuracy by less than a point at density {low:g}", "accuracy", position,
            "equivalent", 0.01,
        ),
        Claim(f"Calibration error {at} differs from dense", "ece", to_dense, "different"),
        Claim(f"Likelihood {at} differs from dense", "nll", to_dense, "different"),
        Claim(f"Detection of strangers {at} differs from dense", "ood_auroc", to_dense, "different"),
        Claim(f"Accuracy under attack {at} differs from dense", "fgsm4_accuracy", to_dense, "different"),
        Claim(f"Accuracy on corrupted images {at} differs from dense", "corrupted_accuracy", to_dense, "different"),
    ]  # fmt: skip


def widening(widths: tuple[int, ...], accuracies: list[float]) -> float:
    """Return how much accuracy the line fitted over log(width) gains from the smallest to the largest width."""
    places = [math.log(width) for width in widths]
    middle = sum(places) / len(places)
    centred = [place - middle for place in places]
    slope = sum(c * a for c, a in zip(centred, accuracies, strict=True)) / sum(c * c for c in centred)
    return slope * (max(places) - min(places))


def trust(cfg: Config, source: Source, model: nn.Module) -> dict[str, float]:
    """Return AUROC against strangers by the largest probability, and accuracies under attack and corruption."""
    images = _pixels(source)
    inside = list(_first(cfg, source.batches("test")))
    found = {"ood_auroc": metrics.auroc(_confidence(model, iter(inside)), _confidence(model, _strangers(cfg, images)))}
    attacked = _OnPixels(model, images.mean.to(cfg.device), images.std.to(cfg.device))
    plain = [((x * images.std + images.mean).clamp(0.0, 1.0), y) for x, y in inside]
    found |= {f"fgsm{eps}_accuracy": fgsm_accuracy(attacked, plain, eps / 255.0) for eps in EPS}
    kinds = corruptions.KINDS
    for kind in kinds:
        batches = _first(cfg, source.corrupted(kind, cfg.severity))
        found[f"{kind}_accuracy"] = evaluate(model, batches, cfg.device).accuracy
    found["corrupted_accuracy"] = sum(found[f"{kind}_accuracy"] for kind in kinds) / len(kinds)
    return found


class _OnPixels(nn.Module):
    """The model on images in [0, 1], so that an attack keeps to what a picture can be."""

    def __init__(self, model: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.model, self.mean, self.std = model, mean, std

    def forward(self, x: Tensor) -> Any:
        """Return the model's output for images in [0, 1]."""
        return self.model((x - self.mean) / self.std)


def _model(cfg: Config, source: Source, width: int, seed: int) -> nn.Module:
    named = cfg.network.format(width=width)
    return _common.build_model(source, named, seed, None if named != cfg.network else {"width": width}).to(cfg.device)


def _method(cfg: Config, source: Source, model: nn.Module, arm: Arm, seed: int) -> Sparsifier | None:
    rule = arm.settings["rule"]
    if rule == DENSE:
        return None
    density = arm.settings["density"]
    steps = _common.total_steps(cfg, source)
    if rule in POSITION:
        mask = _top_over_all(_snip(cfg, source, model, seed, redraw=False), density)
        return Fixed(mask if rule == "snip-mask" else shuffle_within_layers(mask, seed))
    if rule == "magnitude":
        return _common.make_sparsifier("magnitude", density, steps, seed, at=0.0)
    ratios = _snip(cfg, source, model, seed, redraw=True) if rule == "snip-ratio" else rule
    return _common.make_sparsifier("random-pruning", density, steps, seed, ratios=ratios)


def _snip(cfg: Config, source: Source, model: nn.Module, seed: int, *, redraw: bool) -> dict[str, Tensor]:
    x, y = next(iter(source.train_batches(seed, 0, cfg.batch_size)))
    return snip_scores(model, (x.to(cfg.device), y.to(cfg.device)), redraw=redraw, seed=seed)


def _top_over_all(scores: Mapping[str, Tensor], density: float) -> Masks:
    """Return the masks of the highest scores over all layers together."""
    flat = torch.cat([score.reshape(-1) for score in scores.values()])
    chosen = top(flat, count_of(density, flat.numel()))
    parts = torch.split(chosen, [score.numel() for score in scores.values()])
    return Masks({name: part.reshape(scores[name].shape) for name, part in zip(scores, parts, strict=True)})


def _dead_rows(masks: Masks) -> float:
    rows = sum(dead for dead, _ in dead_lines(masks).values())
    return rows / sum(mask.shape[0] for mask in masks.values())


def _pixels(source: Source) -> Arrays:
    if not isinstance(source, Arrays) or source.unit is None:
        raise DataError(f"{source.name!r} holds no images of known scale, which attacks and corruptions need")
    return source


def _strangers(cfg: Config, inside: Arrays) -> Batches:
    """Yield images that are of none of the classes, standardised like those that are."""
    if cfg.outside == "shuffled":
        order = torch.randperm(math.prod(inside.input_shape), generator=generator(0, "strangers"))
        for x, y in _first(cfg, inside.batches("test")):
            yield x.flatten(1)[:, order].reshape(x.shape), y
        return
    outside = _pixels(data.load(cfg.outside))
    if outside.input_shape != inside.input_shape:
        raise DataError(f"{cfg.outside!r} has images of shape {outside.input_shape}, the data {inside.input_shape}")
    for x, y in _first(cfg, outside.batches("test")):
        yield (x * outside.std + outside.mean - inside.mean) / inside.std, y


def _first(cfg: Config, batches: Batches) -> Batches:
    """Yield whole batches until there are `probe` examples."""
    return islice(batches, max(1, cfg.probe // 512))


def _confidence(model: nn.Module, batches: Batches) -> Tensor:
    return predictions(model, batches)[0].double().softmax(-1).amax(-1)


STUDY = Study(
    name="random-pruning",
    config=Config,
    presets={
        "smoke": {"epochs": 2, "batch_size": 64, "widths": (32, 128), "density": (0.1,), "seeds": 1, "probe": 512},
        "laptop": {"data": "fashion-mnist", "train": 10000, "epochs": 5, "outside": "mnist", "seeds": 5},
        "paper": {"data": "cifar10", "network": "resnet20", "widths": (8, 16, 24), "epochs": 160, "schedule": "step",
                  "warmup": 0.0, "augment": "flip-shift"},
    },
    arms=arms,
    run=run,
    claims=claims,
    columns={
        "accuracy": "accuracy, widest",
        "w32_accuracy": "accuracy, width 32",
        "w128_accuracy": "accuracy, width 128",
        "ece": "ECE",
        "nll": "NLL",
        "ood_auroc": "AUROC, strangers",
        "fgsm4_accuracy": "accuracy, attacked",
        "corrupted_accuracy": "accuracy, corrupted",
    },
    about=(
        "Perceptrons of three widths and few epochs: depth, convolutions and the paper's networks are for the paper "
        "preset. Attack: one gradient-sign step of 4/255. Corruptions: noise, blur, contrast, pixels and rotation."
    ),
)  # fmt: skip
