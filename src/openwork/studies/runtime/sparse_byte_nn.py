"""Groups of kernels in a MobileNet: what a rearrangement of all channels keeps, what groups cost, what they bring in time.

Compared on one trained network: its 1x1 convolutions pruned weight by weight, in groups of output channels, in groups
after the rearrangement, and whole filters removed so that the network has the products of the grouped one. Each is scored
right after the pruning and after a short fine-tuning at every density; dense trains on for as long.
True would be: sorting by norm keeps more saliency than no rearrangement, the search more than sorting, and it recovers a
fifth to a half of what groups of 4 lose to single weights; outputs do not change; single weights are at least as accurate
as rearranged groups, these as plain groups, these as filters; at 30 % sparsity rearranged groups lose less than a point
to dense and are over 1.27 times as fast as the fastest dense mode of torch, and faster than single weights.
Times are taken as in the study of fast-sparse-convnets. The runtime gains by fusing layers even where nothing is pruned,
so the unpruned network runs in it too: the difference is what the sparsity brings. At a width that the study does not
train, the network of the seed's first weights is pruned: the pattern counts, not the values.
Departures and limits: small images, few epochs; times are of this processor, not of a telephone's.
"""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import Any

import torch
from pydantic import Field
from torch import nn

from openwork.core.cost import Cost, count
from openwork.core.masks import Masks
from openwork.data.source import Source
from openwork.lab.claims import Claim
from openwork.lab.spec import Arm
from openwork.lab.study import Outcome, Study, Work
from openwork.lab.training import Trainer, layer_table
from openwork.methods.runtime.fast_sparse_convnets import pointwise
from openwork.models.common import SMALLEST
from openwork.sparsifier import Leg
from openwork.sparsifier.groups import channel_groups
from openwork.sparsifier.parameters import maskable
from openwork.sparsifier.physical import node_masks
from openwork.sparsifier.sparsifier import Fixed
from openwork.studies import _common
from openwork.studies._common import DENSE, Training
from openwork.studies.runtime import fast_sparse_convnets as timing
from openwork.studies.runtime._saliency import kept_shares, summary
from openwork.train import rates
from openwork.train.evaluate import evaluate

METHOD = "sparse-byte-nn"
SINGLE = "unstructured"
FILTER = "filter"


class Config(Training):
    """What the study trains, prunes and times, and how."""

    network: str = Field("mobilenet-v1", description="network of all arms, one that takes the option multiplier")
    multiplier: float = Field(0.25, gt=0, description="width of the trained network")
    built_for: int | None = Field(None, ge=SMALLEST, description="image side whose strides it has; none: the data's")
    density: tuple[float, ...] = Field((0.7, 0.5, 0.3), min_length=1, description="shares of 1x1 weights to keep")
    groups: tuple[int, ...] = Field((4, 8, 16), min_length=1, description="group sizes, of saliencies and of times")
    group: int = Field(8, ge=2, description="group size of the networks that are fine-tuned")
    tuning: float = Field(1.0, gt=0, description="fine-tuning after the pruning, in epochs")
    tuning_rate: float = Field(0.2, gt=0, description="its first learning rate, as a share of the base rate")
    timed: tuple[tuple[float, int], ...] = Field(
        ((0.25, 32),), min_length=1, description="widths and image sides to time, at the first density; claims: the last"
    )
    threads: int = Field(1, ge=1, description="threads while times are taken")
    repeats: int = Field(15, ge=1, description="rounds of a measurement")
    compiled: bool = Field(False, description="time the dense network compiled too, where there is a C++ compiler")

    def identity(self) -> dict[str, Any]:
        """Return the digests of the data and of the runtime, and the processor, on which times depend."""
        return _timing(self, *self.timed[0]).identity()


def arms(cfg: Config) -> list[Arm]:
    """Return dense, single weights, groups without and with rearrangement, filters, and the other groups' times."""
    plain, rearranged = _names(cfg)
    single = {"group": 1, "unit": "point", "search": "identity"}
    found = [
        Arm(DENSE, {"kind": DENSE}, DENSE, note="its time is that of the unpruned network in the runtime"),
        Arm(SINGLE, {"kind": METHOD, "options": single}, METHOD, cfg.density[0], "1x1 convolutions, weight by weight"),
        Arm(plain, {"kind": METHOD, "options": _options(cfg.group, "identity")}, METHOD, cfg.density[0]),
        Arm(rearranged, {"kind": METHOD, "options": _options(cfg.group)}, METHOD, cfg.density[0], "channels rearranged"),
        Arm(FILTER, {"kind": FILTER}, FILTER, cfg.density[0], f"whole filters, with the products of {plain}"),
    ]
    for group in cfg.groups:
        if group != cfg.group:
            settings = {"kind": "timed", "options": _options(group, "identity")}
            found.append(Arm(f"group{group}-timed", settings, METHOD, cfg.density[0], "times only, untrained weights"))
    return found


def run(cfg: Config, arm: Arm, seed: int, work: Work) -> Outcome:
    """Train dense, then measure saliencies, or prune, fine-tune and time."""
    source = _common.load_source(cfg)
    if arm.settings["kind"] == "timed":
        values, table = speed(cfg, source, arm, seed, None)
        return Outcome(values, details={"latency": table})
    steps, tuning = _common.total_steps(cfg, source), _tuning_steps(cfg, source)
    rounds = 1 if arm.settings["kind"] == DENSE else len(cfg.density)
    trainer = _common.new_trainer(cfg, source, seed, work, steps + rounds * tuning)
    start = _build(cfg, source, seed)
    model = trainer.train(deepcopy(start), None, Leg("dense", steps))
    if arm.settings["kind"] != DENSE:
        return _pruned(cfg, source, arm, seed, trainer, model)
    example = next(iter(source.batches("test", 64)))[0].to(cfg.device)
    rows = {
        name: kept_shares(one, example, cfg.groups, cfg.density, seed)
        for name, one in (("trained", model), ("random", start))
    }
    values = {"one_shot": _accuracy(cfg, source, model)} | summary(rows["trained"], rows["random"])
    model = _tune(cfg, source, trainer, model, None, "tune")
    times, table = speed(cfg, source, arm, seed, model.cpu())
    values |= {"accuracy": _accuracy(cfg, source, model), "density": 1.0, "inference_flops": 1.0, **times}
    return Outcome(
        values, {"loss": trainer.curve}, layer_table(Masks.ones(dict(maskable(model)))), {"saliency": rows, "latency": table}
    )


def claims(cfg: Config) -> list[Claim]:
    """Return what would count as true."""
    plain, rearranged = _names(cfg)
    least, most = min(cfg.groups), max(cfg.groups)
    width, side = cfg.timed[-1]
    main, where = f"{1 - cfg.density[0]:.0%} sparsity", f"at width {width:g} on {side} pixels a side"
    part = f"of what groups of {least} lose"
    found = [
        Claim("Sorting channels keeps more than leaving them, at every size and density", "least_sort_gain", {DENSE: 1.0}),
        Claim("The search keeps more than sorting, at every size and density", "least_swap_gain", {DENSE: 1.0}),
        Claim(
            "In no layer do rearranged groups keep less than plain ones or more than single weights", "misordered",
            {DENSE: -1.0}, margin=-0.5,
        ),
        Claim(f"The search recovers more than a fifth {part}", f"recovered_g{least}", {DENSE: 1.0}, margin=0.2),
        Claim(f"The search recovers less than a half {part}", f"recovered_g{least}", {DENSE: -1.0}, margin=-0.5),
        Claim(
            f"It recovers more {part} in the trained network than in the untrained", f"trained_over_random_g{least}",
            {DENSE: 1.0},
        ),
        Claim("Rearrangement alone changes outputs by less than 1e-5 of the largest", "drift", {DENSE: -1.0}, margin=-1e-5),
    ]  # fmt: skip
    if least < most:
        found.append(Claim(f"It recovers more with groups of {least} than of {most}", "recovered_fall", {DENSE: 1.0}))
    for better, worse, text in (
        (SINGLE, rearranged, "single weights {} rearranged groups"),
        (rearranged, plain, "rearranged groups {} plain groups"),
        (plain, FILTER, "plain groups {} filters of equal products"),
    ):
        weights, before = {better: 1.0, worse: -1.0}, text.format("are more accurate than")
        after = text.format("lose less than half a point to")
        found.append(Claim(f"Before fine-tuning {before}", "one_shot_mean", weights))
        found.append(Claim(f"After fine-tuning {after}", "accuracy_mean", weights, margin=-0.005))
    return [
        *found,
        Claim(
            "After fine-tuning plain groups are more accurate than filters of equal products", "accuracy_mean",
            {plain: 1.0, FILTER: -1.0},
        ),
        Claim(
            f"At {main} rearranged groups lose less than a point to dense", "accuracy", {rearranged: 1.0, DENSE: -1.0},
            margin=-0.01,
        ),
        Claim(
            f"At {main} rearranged groups are more than 1.27 times as fast as dense {where}", "latency_ratio",
            {rearranged: 1.0}, margin=1.27,
        ),
        Claim(
            f"At {main} rearranged groups are faster than single weights {where}", "latency_ratio",
            {rearranged: 1.0, SINGLE: -1.0},
        ),
        Claim(
            f"At {main} rearranged groups are faster than the unpruned network in the same runtime {where}",
            "latency_ratio", {rearranged: 1.0, DENSE: -1.0},
        ),
    ]  # fmt: skip


# ---- accuracy ---------------------------------------------------------------------------------------------------------


def prune(cfg: Config, source: Source, model: nn.Module, arm: Arm, density: float, seed: int) -> Masks:
    """Prune a network once, in place, as an arm does, and return its masks."""
    if arm.settings["kind"] != FILTER:
        options = {"schedule": "one-shot", "parameters": tuple(pointwise(model)), **arm.settings["options"]}
        return _common.make_sparsifier(METHOD, density, 1, seed, **options).attach(model).finalize()
    plain = next(one for one in arms(cfg) if one.name == _names(cfg)[0])
    cost = count(model, next(iter(source.batches("test", 1)))[0][:1].to(cfg.device))
    wanted = cost.flops(prune(cfg, source, deepcopy(model), plain, density, seed))
    masks = filter_masks(model, filter_share(model, cost, wanted))
    masks.apply(model)
    return masks


def filter_masks(model: nn.Module, share: float) -> Masks:
    """Return the masks that keep a share of the filters of every class of channels, those of the largest L1 norms."""
    kept = {}
    groups = channel_groups(model)
    for group in groups:
        weights: list[Any] = [model.get_submodule(part.layer).weight for part in group.producers]
        norms = torch.stack([weight.detach().abs().flatten(1).sum(1) for weight in weights]).sum(0).cpu()
        kept[group.name] = norms.topk(max(1, round(share * group.size))).indices
    return node_masks(model, kept, groups=groups)


def filter_share(model: nn.Module, cost: Cost, flops: float) -> float:
    """Return the smallest share, in hundredths, of filters with which the network has `flops` or more."""
    low, high = 1, 100
    while low < high:
        middle = (low + high) // 2
        enough = cost.flops(filter_masks(model, middle / 100)) >= flops
        low, high = (low, middle) if enough else (middle + 1, high)
    return low / 100


def _pruned(cfg: Config, source: Source, arm: Arm, seed: int, trainer: Trainer, model: nn.Module) -> Outcome:
    """Prune, score, fine-tune and score a trained network at every density; time it at the first."""
    found = Outcome({})
    cost = trainer.cost(model)
    for place, density in enumerate(cfg.density):
        twin = deepcopy(model)
        masks = prune(cfg, source, twin, arm, density, seed)
        now = {"one_shot": _accuracy(cfg, source, twin)}
        twin = _tune(cfg, source, trainer, twin, masks, f"tune-{density:g}")
        now["accuracy"] = _accuracy(cfg, source, twin)
        found.metrics |= {f"{name}_{density:g}": value for name, value in now.items()}
        if place:
            continue
        found.metrics |= {**now, "density": masks.density(), "inference_flops": cost.flops(masks) / cost.flops()}
        found.layers = layer_table(masks)
        if arm.settings["kind"] == METHOD and arm.name != _names(cfg)[0]:
            times, found.details["latency"] = speed(cfg, source, arm, seed, twin.cpu())
            found.metrics |= times
    for name in ("one_shot", "accuracy"):
        found.metrics[f"{name}_mean"] = sum(found.metrics[f"{name}_{d:g}"] for d in cfg.density) / len(cfg.density)
    found.curves = {"loss": trainer.curve}
    return found


def _tune(cfg: Config, source: Source, trainer: Trainer, model: nn.Module, masks: Masks | None, name: str) -> nn.Module:
    """Train on for the fine-tuning's length, at a rate that falls from its share of the base rate to 0."""
    leg = Leg(name, _tuning_steps(cfg, source), schedule=partial(_falling, cfg.tuning_rate), stream=1)
    return trainer.train(model, None if masks is None else Fixed(masks), leg)


def _falling(first: float, progress: float) -> float:
    return first * rates.cosine(progress)


# ---- time -------------------------------------------------------------------------------------------------------------


def speed(
    cfg: Config, source: Source, arm: Arm, seed: int, model: nn.Module | None
) -> tuple[dict[str, float], dict[str, Any]]:
    """Return how fast an arm's network runs in the runtime on one image, against the fastest dense mode of torch.

    Args:
        cfg: the study's configuration; its widths and sides are timed.
        source: the data.
        arm: dense, or one that prunes by the method.
        seed: of the weights that are pruned where `model` does not have the width.
        model: the trained network; None where there is none.

    Returns:
        Metrics: `latency_ratio_WIDTH_SIDE`, the dense time over the arm's, and `latency_ratio`, `ms` and `dense_ms` of the
        last width and side. A table by width and side: milliseconds by mode, the runtime's choices by layer, and whether
        the weights were trained.
    """
    found: dict[str, float] = {}
    tables: dict[str, Any] = {}
    for width, side in cfg.timed:
        view = _timing(cfg, width, side)
        is_trained = model is not None and width == cfg.multiplier
        one = model if model is not None and is_trained else timing.build(view, source, width, seed, side)
        if not is_trained and arm.settings["kind"] != DENSE:
            options = {"kind": METHOD, "options": {**arm.settings["options"], "search": "identity"}}
            prune(cfg, source, one, Arm(arm.name, options), cfg.density[0], seed)
        values, table = timing.speed(view, source, one, width, sparse=True)
        found |= {f"latency_ratio_{width:g}_{side}": values["latency_ratio"]}
        found |= {name: values[name] for name in ("latency_ratio", "ms", "dense_ms")}
        tables[f"{width:g} at {side}"] = {**table[str(side)], "trained": is_trained}
    return found, tables


def _timing(cfg: Config, width: float, side: int) -> timing.Config:
    """Return the configuration with which the study of fast-sparse-convnets takes the times of one width and side."""
    same = ("data", "train", "network", "built_for", "threads", "repeats", "compiled")
    return timing.Config.read({**{name: getattr(cfg, name) for name in same}, "multiplier": width, "sides": (side,)})


# ---- small things -----------------------------------------------------------------------------------------------------


def _names(cfg: Config) -> tuple[str, str]:
    """Return the names of the arms of plain and of rearranged groups."""
    return f"group{cfg.group}", f"group{cfg.group}-rearranged"


def _options(group: int, search: str = "greedy+swap") -> dict[str, Any]:
    return {"group": group, "unit": "kernel", "search": search}


def _build(cfg: Config, source: Source, seed: int) -> nn.Module:
    """Return the network of a seed, its weights channels last: half again as fast to train."""
    layers: Any = timing.build(_timing(cfg, cfg.multiplier, cfg.timed[0][1]), source, cfg.multiplier, seed)
    model: nn.Module = layers.to(cfg.device, memory_format=torch.channels_last)
    return model


def _tuning_steps(cfg: Config, source: Source) -> int:
    return max(1, round(cfg.tuning * source.steps_per_epoch(cfg.batch_size)))


def _accuracy(cfg: Config, source: Source, model: nn.Module) -> float:
    return evaluate(model, source.batches("test"), cfg.device).accuracy


STUDY = Study(
    name=METHOD,
    config=Config,
    presets={
        "smoke": {"train": 400, "epochs": 2, "batch_size": 32, "lr": 0.02, "multiplier": 0.0625, "built_for": 64,
                  "density": (0.7,), "groups": (4, 8), "timed": ((0.0625, 32),), "repeats": 3, "seeds": 1},
        "laptop": {"data": "fashion-mnist", "train": 10000, "epochs": 3, "batch_size": 64, "multiplier": 0.5,
                   "built_for": 128, "timed": ((0.5, 128), (1.0, 224)), "repeats": 25},
        "paper": {"data": "imagenet.npz", "multiplier": 1.0, "epochs": 100, "batch_size": 256, "weight_decay": 4e-5,
                  "augment": "flip-shift", "tuning": 20, "timed": ((0.5, 128), (1.0, 224)), "repeats": 50,
                  "compiled": True},
    },
    arms=arms,
    run=run,
    claims=claims,
    columns={
        "accuracy": "accuracy",
        "one_shot": "accuracy, not tuned",
        "accuracy_mean": "accuracy, all densities",
        "one_shot_mean": "the same, not tuned",
        "inference_flops": "FLOPs",
        "recovered": "gap recovered",
        "latency_ratio": "times as fast",
        "ms": "ms",
        "dense_ms": "ms, dense",
    },
    about=(
        "A narrow network, small images and few epochs: the order of patterns and the shape of the trade, not the paper's "
        "numbers. Only 1x1 convolutions are pruned; first layer, depthwise convolutions and classifier stay dense, but "
        "filters go with all that reads them. Filters are removed at the products of the whole grouped network, or a "
        "little more. Sorting falls back to the given order of a layer where that keeps more. Saliencies are shares of "
        "the 1x1 weights' |W|, on the trained network and, for control, on its first weights. Times are of one image on "
        "this processor, at the first density, against the fastest dense mode of torch; dense, in its row, is the unpruned "
        "network in the runtime, and filters are not timed. Trials that run at the same time disturb times, though within "
        "a trial all modes alike. The paper preset reads imagenet.npz from the working folder: x_train, y_train, x_test, "
        "y_test, images of 224 pixels a side."
    ),
)  # fmt: skip
