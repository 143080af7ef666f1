"""Sparse 1x1 convolutions in a MobileNet: what blocks cost in accuracy, and what they bring in time.

Compared, at the same total steps: dense; a narrower dense network with the products of the sparse one; gradual pruning
of the 1x1 convolutions alone in blocks of 1, 2 and 4 output channels; and of all layers without blocks (GMP).
True would be: each doubling of the block costs accuracy, but less than a point; the sparse networks are more accurate
than the narrow dense one and within two points of dense; end to end, one image at a time, they are over 1.3 times as
fast as the fastest dense mode of torch, blocks of 4 more so than single weights.
Times are taken of the trained network, in the trial and in one process: dense as it is, with folded norms, in channels-last
layout and, if asked for, compiled with frozen weights, against `openwork.accelerate`, in interleaved rounds. A network has
the strides of the image size that it is built for; it is trained on small images all the same, and its time is measured
at each side with that side's own strides, on an enlarged test image.
Departures and limits: small images, few epochs, narrow networks; times are of this processor, not of a telephone's.
"""

from __future__ import annotations

import hashlib
import itertools
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from openwork import models, runtime
from openwork.core.cost import Cost, count
from openwork.core.masks import Masks
from openwork.data.source import Source
from openwork.lab import environment
from openwork.lab.claims import Claim
from openwork.lab.spec import Arm
from openwork.lab.study import Outcome, Study, Work
from openwork.lab.training import layer_table
from openwork.methods.runtime.fast_sparse_convnets import ROWS, pointwise
from openwork.models.common import SMALLEST
from openwork.runtime.plan import accelerate, plan_of
from openwork.runtime.timing import limited_threads, measure
from openwork.sparsifier import Sparsifier
from openwork.studies import _common
from openwork.studies._common import DENSE, Training

NARROW = "dense-narrow"
METHOD = "fast-sparse-convnets"
STEP = 0.01
"""Widths of the narrow network are whole multiples of this."""


class Config(Training):
    """What the study trains and times, and how."""

    network: str = Field("mobilenet-v1", description="network of all arms, one that takes the option multiplier")
    multiplier: float = Field(0.25, gt=0, description="width of the network")
    built_for: int | None = Field(None, ge=SMALLEST, description="image side whose strides it has; none: the data's")
    density: float = Field(0.1, gt=0, lt=1, description="share of weights to keep")
    every: int | None = Field(None, ge=1, description="steps between mask updates; none: a fortieth of the run")
    end: float = Field(0.5, gt=0, le=1, description="share of training at which the density is reached")
    classifier: bool = Field(False, description="prune the classifier too, as the paper does in EfficientNet")
    sides: tuple[int, ...] = Field((32,), min_length=1, description="image sides to time; claims are about the last")
    threads: int = Field(1, ge=1, description="threads while times are taken")
    repeats: int = Field(15, ge=1, description="rounds of a measurement")
    compiled: bool = Field(False, description="time the dense network compiled too, where there is a C++ compiler")

    def identity(self) -> dict[str, Any]:
        """Return the digests of the data and of the runtime, and the processor, on which times depend."""
        folder = Path(str(runtime.__file__)).parent
        code = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.rglob("*.py")))).hexdigest()
        return super().identity() | {"runtime": code, "processor": environment.processor()}


def arms(cfg: Config) -> list[Arm]:
    """Return dense, the narrow dense network, a block size each, and GMP over all layers."""
    at = f"@{cfg.density:g}"
    common = {"every": cfg.every, "end": cfg.end}
    found = [
        Arm(DENSE, {"method": DENSE}, DENSE),
        Arm(NARROW, {"method": DENSE, "narrow": True}, NARROW, note="dense, with the products of the sparse network"),
    ]
    for rows in ROWS:
        options = {**common, "block": rows, "classifier": cfg.classifier}
        note = f"1x1 convolutions in blocks of {rows} output channels" if rows > 1 else "1x1 convolutions, weight by weight"
        found.append(Arm(f"block{rows}{at}", {"method": METHOD, "options": options}, METHOD, cfg.density, note))
    return [*found, Arm(f"gmp{at}", {"method": "gmp", "options": common}, "gmp", cfg.density, "all layers, no blocks")]


def run(cfg: Config, arm: Arm, seed: int, work: Work) -> Outcome:
    """Train an arm, measure what it learned, then how fast it is."""
    source = _common.load_source(cfg)
    width = narrowed(cfg, source) if arm.settings.get("narrow") else cfg.multiplier
    model = _channels_last(build(cfg, source, width, seed))  # half again as fast to train
    method: Sparsifier | None = None
    if arm.settings["method"] != DENSE:
        steps = _common.total_steps(cfg, source)
        method = _common.make_sparsifier(arm.settings["method"], cfg.density, steps, seed, **arm.settings["options"])
    found = _common.train(cfg, source, model, method, seed, work)
    times, table = speed(cfg, source, found.model.cpu(), width, sparse=method is not None)
    values = {**found.metrics(), **_against_dense(cfg, source, found), **times}
    values["pointwise_density"] = _pointwise_density(found.model)
    return Outcome(values, {"loss": found.trainer.curve}, layer_table(found.masks), {"width": width, "latency": table})


def claims(cfg: Config) -> list[Claim]:
    """Return what would count as true."""
    one, two, four = (f"block{rows}@{cfg.density:g}" for rows in ROWS)
    gmp, side, point = f"gmp@{cfg.density:g}", f"on images of {cfg.sides[-1]} pixels a side", 0.01
    fast = f"more than 1.3 times as fast as dense {side}"
    return [
        Claim("Blocks of 2 cost less than a point", "accuracy", {one: 1.0, two: -1.0}, "equivalent", point),
        Claim("Blocks of 4 cost less than a point against 2", "accuracy", {two: 1.0, four: -1.0}, "equivalent", point),
        Claim("Single weights are more accurate than blocks of 4", "accuracy", {one: 1.0, four: -1.0}),
        Claim("Single weights beat the dense network of as many products", "accuracy", {one: 1.0, NARROW: -1.0}),
        Claim("Blocks of 4 beat the dense network of as many products", "accuracy", {four: 1.0, NARROW: -1.0}),
        Claim("Single weights lose less than two points to dense", "accuracy", {one: 1.0, DENSE: -1.0}, margin=-0.02),
        Claim(
            "The 1x1 convolutions alone lose less than a point to all layers", "accuracy", {one: 1.0, gmp: -1.0},
            margin=-point,
        ),
        Claim(f"Single weights are {fast}", "latency_ratio", {one: 1.0}, margin=1.3),
        Claim(f"Blocks of 4 are {fast}", "latency_ratio", {four: 1.0}, margin=1.3),
        Claim(f"Blocks of 4 are faster than single weights {side}", "latency_ratio", {four: 1.0, one: -1.0}),
    ]  # fmt: skip


def build(cfg: Config, source: Source, width: float, seed: int, side: int | None = None) -> nn.Module:
    """Return the network of a width, with the strides of images of `side` pixels (None: as the study trains it)."""
    square = side or cfg.built_for
    shape = source.input_shape if square is None else (source.input_shape[0], square, square)
    options = {"multiplier": width}
    return models.build(cfg.network, input_shape=shape, classes=source.classes, seed=seed, options=options)


def narrowed(cfg: Config, source: Source) -> float:
    """Return the smallest width, in hundredths, at which a dense network has the products of the sparse one or more."""
    cost = _cost(cfg, source, cfg.multiplier)
    by_name = cost.by_parameter()
    names = pointwise(build(cfg, source, cfg.multiplier, 0), classifier=cfg.classifier)
    wanted = cost.flops() - (1.0 - cfg.density) * sum(by_name[name] for name in names)
    low, high = 1, max(1, round(cfg.multiplier / STEP))
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _cost(cfg, source, STEP * middle).flops() >= wanted else (middle + 1, high)
    return round(STEP * low, 2)


def speed(
    cfg: Config, source: Source, model: nn.Module, width: float, *, sparse: bool
) -> tuple[dict[str, float], dict[str, Any]]:
    """Return how fast a trained network runs on one image, against the dense network of the full width.

    Returns:
        Metrics: by side `latency_ratio_SIDE`, the fastest dense mode's time over the network's own, and the same with
        `ms` and `dense_ms` for the last side. A table by side: milliseconds by mode, and the runtime's choices by layer.
    """
    found: dict[str, float] = {}
    table: dict[str, Any] = {}
    plain = not sparse and width == cfg.multiplier
    for side in cfg.sides:
        example = _enlarged(source, side)
        twin = build(cfg, source, width, 0, side)
        twin.load_state_dict(model.state_dict())
        candidates = _modes(cfg, build(cfg, source, cfg.multiplier, 0, side), "dense")
        with limited_threads(cfg.threads):
            if sparse:
                candidates["own"] = accelerate(twin, example, verbose=False, repeats=cfg.repeats)
            elif not plain:
                candidates |= _modes(cfg, twin, "own")
            ms = {name: 1e3 * time for name, time in measure(candidates, example, repeats=cfg.repeats).items()}
        dense = min(time for name, time in ms.items() if name.startswith("dense"))
        own = dense if plain else min(time for name, time in ms.items() if name.startswith("own"))
        found |= {f"latency_ratio_{side}": dense / own, "latency_ratio": dense / own, "ms": own, "dense_ms": dense}
        layers = [
            {"layer": one.layer, "density": one.density, "chosen": one.chosen, "gain": one.gain, "ms": one.ms}
            for one in (plan_of(candidates["own"]) if sparse else ())
        ]
        table[str(side)] = {"ms": ms, "layers": layers}
    return found, table


def _modes(cfg: Config, model: nn.Module, whose: str) -> dict[str, nn.Module]:
    """Return a dense network in every way in which torch runs it, under `whose` and the mode's name."""
    eager = model.eval().requires_grad_(False)
    folded = _folded(eager)
    modes = {"eager": eager, "folded": folded, "channels last": _channels_last(deepcopy(folded))}
    if cfg.compiled and any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        compiled: Any = torch.compile(deepcopy(folded), options={"freezing": True})
        modes["compiled"] = compiled
    return {f"{whose} {name}": mode for name, mode in modes.items()}


def _channels_last(model: nn.Module) -> nn.Module:
    """Lay out the weights of convolutions channels last, in place, so that the maps are computed so as well."""
    layers: Any = model  # torch's stubs do not know this argument of a module's `to`
    moved: nn.Module = layers.to(memory_format=torch.channels_last)
    return moved


def _folded(model: nn.Module) -> nn.Module:
    """Return a copy in eval mode whose batch norms are part of the convolutions before them."""
    twin = deepcopy(model).eval()
    for part in [module for module in twin.modules() if isinstance(module, nn.Sequential)]:
        for place, (layer, norm) in enumerate(itertools.pairwise(part)):
            if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                part[place], part[place + 1] = fuse_conv_bn_eval(layer, norm), nn.Identity()
    return twin


def _enlarged(source: Source, side: int) -> Tensor:
    """Return the first test image, (1, channels, side, side)."""
    image, _ = next(iter(source.batches("test", 1)))
    return F.interpolate(image[:1], size=(side, side), mode="bilinear", align_corners=False)


def _against_dense(cfg: Config, source: Source, found: _common.Trained) -> dict[str, float]:
    """Return FLOPs as shares of the dense network's of the full width, whatever the arm's own width is."""
    dense, own = _cost(cfg, source, cfg.multiplier).flops(), found.trainer.cost(found.model)
    steps = found.trainer.steps
    return {
        "inference_flops": own.flops({name: mask for name, mask in found.masks.items() if name in own.parameters}) / dense,
        "training_flops": found.trainer.flops / (3.0 * steps * found.trainer.batch * dense),
    }


def _cost(cfg: Config, source: Source, width: float) -> Cost:
    """Return the cost of one image, counted without memory or computation."""
    example = torch.empty(1, *source.input_shape, device="meta")
    return count(build(cfg, source, width, 0).to("meta"), example)


def _pointwise_density(model: nn.Module) -> float:
    params = dict(model.named_parameters())
    return Masks.of({name: params[name] for name in pointwise(model)}).density()


STUDY = Study(
    name=METHOD,
    config=Config,
    presets={
        "smoke": {"train": 400, "epochs": 2, "batch_size": 32, "lr": 0.02, "multiplier": 0.125, "built_for": 64,
                  "repeats": 3, "seeds": 1},
        "laptop": {"data": "fashion-mnist", "train": 10000, "epochs": 4, "batch_size": 32, "multiplier": 0.5,
                   "built_for": 128, "sides": (64, 128, 224), "repeats": 25},
        "paper": {"data": "imagenet.npz", "multiplier": 1.0, "epochs": 100, "batch_size": 256, "weight_decay": 4e-5,
                  "augment": "flip-shift", "every": 2000, "end": 0.75, "sides": (224,), "repeats": 50, "compiled": True},
    },
    arms=arms,
    run=run,
    claims=claims,
    columns={
        "accuracy": "accuracy",
        "pointwise_density": "1x1 density",
        "latency_ratio": "times as fast",
        "ms": "ms",
        "dense_ms": "ms, dense",
    },
    about=(
        "Narrow networks, small images and few epochs: the order of block sizes and the shape of the trade, not the "
        "paper's numbers. FLOPs are shares of the full-width dense network's; the narrow network has at least the "
        "products of the sparse one. Times are of one image on this processor, against the fastest dense mode of torch; "
        "trials that run at the same time disturb them, though within a trial all modes alike. The paper preset reads "
        "imagenet.npz from the working folder: x_train, y_train, x_test, y_test, images of 224 pixels a side."
    ),
)  # fmt: skip
