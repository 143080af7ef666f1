"""Random search in node space against random nodes: the search finds a lower initial loss, and what does that buy?

Compared for each share of nodes, all cut from one parent with its first weights and trained as small dense networks for
as many steps as the parent: the draw of lowest untrained loss L_0, trained in as many batch orders as there are random
draws; random draws that the search has not looked at; the dense parent. Beside the best draw, draws evenly spread over
the ranking by L_0, the median and the worst among them, are trained for the rank correlation of L_0 with accuracy.
True would be: found and random equal in accuracy and in the area under the training loss curve, each within a margin
that is shown by an equivalence test; L_0 of the found one lower, so that the search did search; and random at a fifth of
the nodes within two points of the parent. Ours: accuracy after one epoch ranks draws better than L_0 does.
Convergence: steps to reach a share of the parent's final validation accuracy, measured in the parent's trial, and the
area. The forward passes of the search are in the found arm's FLOPs.
Departures and limits: networks, data, budget and score are not in the paper's public text and are ours; perceptrons only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from openwork import atomic
from openwork.core.cost import count
from openwork.core.rng import generator
from openwork.data.source import Source
from openwork.lab.claims import Claim
from openwork.lab.spec import Arm
from openwork.lab.study import Outcome, Study, Work
from openwork.methods.sparsify.random_search import NodeSpace, Search, search
from openwork.sparsifier import Leg
from openwork.sparsifier.physical import compact
from openwork.studies import _common
from openwork.studies._common import DENSE, Training
from openwork.train.evaluate import evaluate

FOUND, RANDOM = "found", "random"


class Config(Training):
    """What the study trains on, and how."""

    plan: ClassVar[frozenset[str]] = Training.plan | {"margin", "loss_margin"}

    network: str = Field("mlp-512-512", description="the over-parameterised parent")
    lr: float = Field(0.05, gt=0, description="base learning rate of SGD with Nesterov's momentum .9")
    warmup: float = Field(0.0, ge=0, lt=1, description="share of training over which the rate first rises")
    nodes: tuple[float, ...] = Field((0.5, 0.2, 0.05), description="shares of hidden nodes to keep")
    draws: int = Field(40, ge=1, description="draws of a search")
    scoring: int = Field(2000, ge=1, description="training images on which a draw is scored")
    repeats: int = Field(3, ge=1, description="random draws, and batch orders of the found one; averaged")
    ranked: tuple[int, ...] = Field((10, 20, 20), description="draws trained for the rank correlation, by share of nodes")
    reach: float = Field(0.95, gt=0, le=1, description="convergence: share of the parent's final accuracy to reach")
    every: int = Field(10, ge=1, description="convergence: steps between two looks at the validation accuracy")
    margin: float = Field(0.005, gt=0, description="accuracies closer than this count as equal")
    loss_margin: float = Field(0.02, gt=0, description="areas under the loss curve (mean loss, nats) this close are equal")


def arms(cfg: Config) -> list[Arm]:
    """Return the parent, and the found and the random networks at each share of nodes."""
    found = [Arm(DENSE, {"role": DENSE, "nodes": list(cfg.nodes)}, DENSE)]
    for place, share in enumerate(cfg.nodes):
        ranked = cfg.ranked[min(place, len(cfg.ranked) - 1)]
        note = f"lowest L_0 of {cfg.draws} draws; {share:g} of the nodes"
        found.append(Arm(f"{FOUND}@{share:g}", {"role": FOUND, "nodes": share, "ranked": ranked}, FOUND, share, note))
        note = f"{cfg.repeats} fresh draws, averaged; {share:g} of the nodes"
        found.append(Arm(f"{RANDOM}@{share:g}", {"role": RANDOM, "nodes": share}, RANDOM, share, note))
    return found


def run(cfg: Config, arm: Arm, seed: int, work: Work) -> Outcome:
    """Train an arm's networks and measure them."""
    source = _common.load_source(cfg)
    parent = _common.build_model(source, cfg.network, seed)
    if arm.settings["role"] == DENSE:
        return _dense(cfg, source, parent, seed, work)
    setting = _Setting(cfg, source, parent, NodeSpace(parent, node_density=arm.settings["nodes"]), seed)
    if arm.settings["role"] == FOUND:
        return _found(setting, arm.settings["ranked"], work)
    runs = []
    for index in range(cfg.repeats):
        part = _common.share_of(work, f"random{index}", index, cfg.repeats)
        runs.append(_train(setting, setting.fresh(index), index, part))
    score = setting.scorer()
    losses = [score(setting.fresh(index)) for index in range(cfg.repeats)]
    return Outcome({**_metrics(setting, runs, 0.0), "initial_loss": _mean(losses)}, {"loss": runs[0].curve})


def claims(cfg: Config) -> list[Claim]:
    """Return what would count as true."""
    equal = []
    for share in cfg.nodes:
        pair = {f"{FOUND}@{share:g}": 1.0, f"{RANDOM}@{share:g}": -1.0}
        points = f"found and random networks differ by less than {100 * cfg.margin:g} points of accuracy"
        area = f"found and random networks differ by less than {cfg.loss_margin:g} in the area under the loss curve"
        equal.append(Claim(f"At {share:g} of the nodes {points}", "accuracy", pair, "equivalent", cfg.margin))
        equal.append(Claim(f"At {share:g} of the nodes {area}", "area", pair, "equivalent", cfg.loss_margin))
    each = 1.0 / len(cfg.nodes)
    lower = {f"{RANDOM}@{s:g}": each for s in cfg.nodes} | {f"{FOUND}@{s:g}": -each for s in cfg.nodes}
    ranks = {f"{FOUND}@{s:g}": each for s in cfg.nodes}
    found = [*equal, Claim("The found networks start at a lower loss than random ones", "initial_loss", lower)]
    if 0.2 in cfg.nodes:
        kept = {f"{RANDOM}@0.2": 1.0, DENSE: -1.0}
        found.append(Claim("Random networks of a fifth of the nodes are within 2 points of the parent", "accuracy", kept,
                           margin=-0.02))  # fmt: skip
    return [*found, Claim("Accuracy after one epoch ranks draws better than their initial loss (ours)", "rho_gain", ranks)]


@dataclass(frozen=True)
class _Setting:
    """What networks of one share of nodes have in common."""

    cfg: Config
    source: Source
    parent: nn.Module
    space: NodeSpace
    seed: int

    def drawn(self, index: int) -> nn.Module:
        """Return the network of the search's draw number `index`, with the parent's first weights."""
        return self.cut(self.space.kept(generator(self.seed, "draw", index)))

    def fresh(self, index: int) -> nn.Module:
        """Return a random network that the search has not looked at."""
        return self.cut(self.space.kept(generator(self.seed, "fresh", index)))

    def cut(self, kept: Mapping[str, Tensor]) -> nn.Module:
        """Return the small network of the kept nodes."""
        return compact(self.parent, kept, groups=self.space.groups)

    def scorer(self) -> Callable[[nn.Module], float]:
        """Return the cross-entropy of a network on the first training images, the same for all."""
        batches = list(_first(self.source, self.cfg.scoring))
        return lambda net: evaluate(net, batches, self.cfg.device).nll

    def searched(self) -> Search:
        """Score the draws; a masked network and the small one cut out of it have the same loss."""
        score = self.scorer()
        names = [group.name for group in self.space.groups]
        return search(
            self.space,
            lambda masks: score(self.cut({name: masks[f"{name}.weight"].flatten(1).any(1) for name in names})),
            budget=self.cfg.draws,
            seed=self.seed,
        )


@dataclass(frozen=True)
class _Run:
    """One trained network: its test accuracy, mean training loss, loss curve, validation accuracies by step, FLOPs."""

    net: nn.Module
    accuracy: float
    area: float
    curve: list[list[float]]
    seen: Mapping[int, float]
    flops: float


class _Watch:
    """Notes the validation accuracy at chosen steps, on disk, so that a resumed run has those before the kill too."""

    def __init__(self, path: Path, wanted: Callable[[int], bool], measure: Callable[[], float]) -> None:
        self.path, self.wanted, self.measure = path, wanted, measure
        read = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.seen = {int(step): float(value) for step, value in read.items()}

    def __call__(self, done: int) -> None:
        if self.wanted(done) and done not in self.seen:
            self.seen[done] = self.measure()
            atomic.write_json(self.path, self.seen)


def _train(
    setting: _Setting, net: nn.Module, stream: int, work: Work, wanted: Callable[[int], bool] = lambda _done: False
) -> _Run:
    cfg, source = setting.cfg, setting.source
    steps = _common.total_steps(cfg, source)
    trainer = _common.new_trainer(cfg, source, setting.seed, work, steps)
    work.scratch.mkdir(parents=True, exist_ok=True)
    watch = _Watch(
        work.scratch / "watched.json", wanted, lambda: evaluate(net, source.batches("validation"), cfg.device).accuracy
    )
    trainer.train(net, None, Leg("train", steps, stream=stream), watch)
    accuracy = evaluate(net, source.batches("test"), cfg.device).accuracy
    return _Run(net, accuracy, _mean([loss for _, loss in trainer.curve]), trainer.curve, watch.seen, trainer.flops)


def _found(setting: _Setting, ranked: int, work: Work) -> Outcome:
    """Search, train the best draw in several batch orders, and draws over the whole ranking in the first."""
    found = setting.searched()
    order = sorted(range(len(found.scores)), key=found.scores.__getitem__)
    places = spread(len(order), ranked)
    epoch = setting.source.steps_per_epoch(setting.cfg.batch_size)
    total = len(places) + setting.cfg.repeats - 1
    runs = {}
    for index, place in enumerate(places):
        part = _common.share_of(work, f"rank{place}", index, total)
        runs[place] = _train(setting, setting.drawn(order[place]), 0, part, lambda done: done == epoch)
    best = [runs[0]]
    for stream in range(1, setting.cfg.repeats):
        part = _common.share_of(work, f"stream{stream}", len(places) + stream - 1, total)
        best.append(_train(setting, setting.drawn(found.best_index), stream, part))
    spent = setting.cfg.draws * min(setting.cfg.scoring, setting.source.train_size) * _forward(setting, best[0].net)
    metrics = _metrics(setting, best, spent) | {
        "initial_loss": found.score,
        "median_accuracy": runs[_median(len(order))].accuracy,
        "worst_accuracy": runs[places[-1]].accuracy,
        "ranked": len(places),
    }
    finals = [runs[place].accuracy for place in places]
    rho = correlation([-found.scores[order[place]] for place in places], finals)
    early = correlation([runs[place].seen.get(epoch, 0.0) for place in places], finals)
    metrics |= {} if rho is None else {"rho": rho}
    metrics |= {} if early is None else {"rho_epoch": early}
    metrics |= {} if rho is None or early is None else {"rho_gain": early - rho}
    rows = [[found.scores[order[place]], runs[place].accuracy] for place in places]
    return Outcome(metrics, {"loss": best[0].curve}, details={"scores": list(found.scores), "loss_and_accuracy": rows})


def _dense(cfg: Config, source: Source, parent: nn.Module, seed: int, work: Work) -> Outcome:
    """Train the parent, then found and random networks until it is known when they reach a share of its accuracy."""
    spaces = {share: NodeSpace(parent, node_density=share) for share in cfg.nodes}
    settings = {share: _Setting(cfg, source, parent, space, seed) for share, space in spaces.items()}
    nets = {}
    for share, setting in settings.items():
        nets[share, FOUND], nets[share, RANDOM] = setting.drawn(setting.searched().best_index), setting.fresh(0)
    whole = _Setting(cfg, source, parent, NodeSpace(parent, node_density=1.0), seed)
    initial = whole.scorer()(parent)
    total, steps = len(nets) + 1, _common.total_steps(cfg, source)

    def looks(done: int) -> bool:
        return done % cfg.every == 0 or done == steps

    dense = _train(whole, parent, 0, _common.share_of(work, "parent", 0, total), looks)
    goal = cfg.reach * dense.seen[steps]
    metrics = {**_metrics(whole, [dense], 0.0), "initial_loss": initial, "reach": _reached(dense, goal, steps)}
    curves = {"loss": dense.curve, "accuracy": _curve(dense)}
    for index, ((share, role), net) in enumerate(nets.items(), start=1):
        one = _train(settings[share], net, 0, _common.share_of(work, f"{role}{share:g}", index, total), looks)
        metrics[f"reach_{role}_{share:g}"] = _reached(one, goal, steps)
        curves[f"accuracy_{role}_{share:g}"] = _curve(one)
    for share in cfg.nodes:
        metrics[f"lead_{share:g}"] = metrics[f"reach_{RANDOM}_{share:g}"] - metrics[f"reach_{FOUND}_{share:g}"]
    return Outcome(metrics, curves)


def spread(count: int, wanted: int) -> list[int]:
    """Return `wanted` ranks spread evenly from the first to the last of `count`, and the median's where it is not one."""
    wanted = max(2, min(wanted, count))
    even = {round(index * (count - 1) / (wanted - 1)) for index in range(wanted)}
    return sorted(even | {_median(count)})


def correlation(a: list[float], b: list[float]) -> float | None:
    """Return Spearman's rank correlation, or None where a side has no order."""
    from scipy.stats import spearmanr

    if len(set(a)) < 2 or len(set(b)) < 2:
        return None
    return float(spearmanr(a, b).statistic)


def _metrics(setting: _Setting, runs: list[_Run], spent: float) -> dict[str, float]:
    """Return what every arm reports, averaged over its runs; `spent` are the FLOPs of the search."""
    cfg, source = setting.cfg, setting.source
    dense = count(_common.build_model(source, cfg.network, setting.seed), _example(source)).flops()
    steps = _common.total_steps(cfg, source)
    return {
        "accuracy": _mean([one.accuracy for one in runs]),
        "area": _mean([one.area for one in runs]),
        "density": setting.space.density,
        "nodes": setting.space.node_density,
        "inference_flops": _forward(setting, runs[0].net) / dense,
        "training_flops": (spent + _mean([one.flops for one in runs])) / (3.0 * steps * cfg.batch_size * dense),
    }


def _forward(setting: _Setting, net: nn.Module) -> float:
    return float(count(net, _example(setting.source).to(setting.cfg.device)).flops())


def _example(source: Source) -> Tensor:
    return next(iter(source.batches("test", 1)))[0][:1]


def _first(source: Source, images: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the first training images."""
    left = images
    for x, y in source.batches("train"):
        yield x[:left], y[:left]
        left -= len(x)
        if left <= 0:
            return


def _reached(one: _Run, goal: float, steps: int) -> float:
    """Return after which share of the training the goal was first seen; 1 where it never was."""
    return min((done for done, value in one.seen.items() if value >= goal), default=steps) / steps


def _curve(one: _Run) -> list[list[float]]:
    return [[done, value] for done, value in sorted(one.seen.items())]


def _median(count: int) -> int:
    return (count - 1) // 2


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


_SMOKE: dict[str, Any] = {
    "train": 600, "epochs": 6, "batch_size": 64, "network": "mlp-64-64", "nodes": (0.5, 0.2), "draws": 8, "scoring": 200,
    "repeats": 2, "ranked": (4,), "every": 5, "seeds": 2,
}  # fmt: skip

STUDY = Study(
    name="random-search",
    config=Config,
    presets={
        "smoke": _SMOKE,
        "laptop": {"data": "fashion-mnist", "train": 20000, "seeds": 5},
        "paper": {"data": "fashion-mnist", "epochs": 30, "draws": 1000, "ranked": (40,), "seeds": 5},
    },
    arms=arms,
    run=run,
    claims=claims,
    columns={
        "accuracy": "accuracy",
        "area": "area under loss",
        "initial_loss": "initial loss",
        "density": "weights kept",
        "nodes": "nodes kept",
        "median_accuracy": "median draw",
        "worst_accuracy": "worst draw",
        "rho": "rho of L_0",
        "rho_epoch": "rho of one epoch",
        "ranked": "ranked draws",
        "training_flops": "training FLOPs",
    },
    about=(
        "The paper's public text gives neither networks nor budget nor score; these are ours. One perceptron, one data set. "
        "Median and worst draws are trained once, found and random several times. Steps to reach 95 % of the parent's "
        "accuracy are measured in the parent's trial (reach_*, as shares of the training, 1 where it was never reached; "
        "lead_* is random minus found). The densities of the arms are shares of nodes; weights kept is its own column. The "
        "ranking by accuracy after one epoch is not in the paper."
    ),
)
