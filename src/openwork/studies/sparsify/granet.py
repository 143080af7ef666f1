"""GraNet against RigL, SET and gradual pruning, and what regeneration does to a network's power to recover.

Compared, at the same total steps: dense, a static random mask at ERK densities, SET, RigL with its own settings and
with ITOP's (more exchange, to the end of training), GMP over all layers and with every layer held at its ERK density,
GraNet from density .5 and from dense, GraNet with random growth, and one-shot pruning with fine-tuning. The core of
these also on a small convolutional network.
True would be: SET, RigL, GMP and GraNet above the static mask, GraNet above RigL, above GMP and above GMP at ERK
densities, and gradient growth above random growth. GraNet against GMP is close, so their equivalence is a claim too.
The perceptron's claims are about the mean over both densities.
Plasticity: dense checkpoints are pruned, with and without regeneration, and trained on at the learning rate of their
time; it should fall once the learning rate has dropped, and regeneration should not lower it.
Departures and limits: small networks and few epochs instead of ResNet-50 and VGG-19; all methods update at the same
steps, SET too; the dense run of the plasticity table restarts its momentum at every checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from openwork.core import schedules
from openwork.core.masks import Masks
from openwork.data.source import Source
from openwork.lab.claims import Claim
from openwork.lab.spec import Arm
from openwork.lab.study import Outcome, Study, Work
from openwork.lab.training import Trainer, layer_table
from openwork.methods.sparsify.granet import pruning_plasticity
from openwork.models.outputs import logits
from openwork.sparsifier import Leg, Sparsifier
from openwork.sparsifier.parameters import maskable
from openwork.sparsifier.sparsifier import Grads, Params, State
from openwork.studies import _common
from openwork.studies._common import DENSE, Training
from openwork.train import rates
from openwork.train.evaluate import evaluate

PLASTICITY = "plasticity"


class _Entry(NamedTuple):
    """A method, its options, and whether it runs on the convolutional network too."""

    method: str
    options: Mapping[str, Any] = {}
    core: bool = False
    note: str = ""


METHODS: Mapping[str, _Entry] = {
    "static": _Entry("random-pruning", core=True, note="random mask at ERK densities, never changed"),
    "set": _Entry("set", core=True),
    "rigl": _Entry("rigl", core=True),
    "rigl-itop": _Entry("rigl", {"drop": 0.5, "floor": 0.005, "stop": 1.0}, note="exchanges more, and to the end"),
    "gmp": _Entry("gmp", core=True),
    "gmp-erk": _Entry("gmp", {"scope": "layers"}, note="every layer at its ERK density"),
    "granet": _Entry("granet", {"initial": 0.5}, core=True, note="from density .5"),
    "granet-dense": _Entry("granet", {"initial": 1.0}, note="from dense"),
    "granet-random": _Entry("granet", {"initial": 0.5, "grow": "random"}, note="grows anywhere"),
    "one-shot": _Entry("magnitude", note="pruned once at half time, then fine-tuned"),
}


class Config(Training):
    """What the study trains on, and how."""

    network: str = Field("mlp-300-100", description="network of all arms")
    conv: str | None = Field("cnn", description="second network, of the core arms at the first density; or none")
    density: tuple[float, ...] = Field((0.05, 0.02), description="shares of weights to keep")
    every: int = Field(20, ge=1, description="steps between mask updates")
    checkpoints: tuple[float, ...] = Field((0.125, 0.375, 0.625, 1.0), description="plasticity: after these shares")
    rates: tuple[float, ...] = Field((0.5, 0.9, 0.98), description="plasticity: pruning rates")
    recovery: float = Field(0.25, gt=0, description="plasticity: training after pruning, as a share of the full one")


def arms(cfg: Config) -> list[Arm]:
    """Return dense, every method at every density, and the plasticity table."""
    found = [Arm(DENSE, {"networks": _networks(cfg, True)}, DENSE)]
    for place, density in enumerate(cfg.density):
        for name, entry in METHODS.items():
            options = {**entry.options, **({"every": cfg.every} if _updates(entry) else {})}
            settings = {
                "entry": entry.method,
                "density": density,
                "options": options,
                "networks": _networks(cfg, entry.core and place == 0),
            }
            found.append(Arm(f"{name}@{density:g}", settings, entry.method, density, entry.note))
    return [*found, Arm(PLASTICITY, {"table": True}, PLASTICITY, 1.0, "pruned dense checkpoints; no method of its own")]


def run(cfg: Config, arm: Arm, seed: int, work: Work) -> Outcome:
    """Train an arm on its networks and measure it, or fill the plasticity table."""
    source = _common.load_source(cfg)
    if arm.settings.get("table"):
        return _plasticity(cfg, source, seed, work)
    found = Outcome({})
    networks = arm.settings["networks"]
    for index, network in enumerate(networks):
        part = _common.share_of(work, network, index, len(networks))
        one = _train(cfg, source, network, arm, seed, part)
        prefix = "conv_" if index else ""
        found.metrics |= {f"{prefix}{name}": value for name, value in one.metrics.items()}
        if not index:
            found.curves, found.layers = one.curves, one.layers
    return found


def claims(cfg: Config) -> list[Claim]:
    """Return what would count as true."""
    above = partial(_between, cfg)
    found = [
        above("SET is more accurate than a static random mask", "set", "static"),
        above("RigL is more accurate than a static random mask", "rigl", "static"),
        above("GMP is more accurate than a static random mask", "gmp", "static"),
        above("GraNet is more accurate than a static random mask", "granet", "static"),
        above("GraNet is more accurate than RigL", "granet", "rigl"),
        above("GraNet is more accurate than GMP", "granet", "gmp"),
        above("GraNet and GMP differ by less than half a point", "granet", "gmp", kind="equivalent", margin=0.005),
        above("GraNet is more accurate than GMP with ERK layer densities", "granet", "gmp-erk"),
        above("Growth by gradient is more accurate than random growth", "granet", "granet-random"),
    ]
    if cfg.conv is not None:
        for name, title in (("set", "SET"), ("rigl", "RigL"), ("gmp", "GMP"), ("granet", "GraNet")):
            text = f"{title} is more accurate than a static random mask on the convolutional network"
            first = cfg.density[0]
            found.append(Claim(text, "conv_accuracy", {f"{name}@{first:g}": 1.0, f"static@{first:g}": -1.0}))
    return [
        *found,
        Claim("Plasticity falls once the learning rate has dropped", "plasticity_fall", {PLASTICITY: 1.0}),
        Claim(
            "Regeneration lowers plasticity by less than half a point",
            "regeneration_gain",
            {PLASTICITY: 1.0},
            margin=-0.005,
        ),
    ]


class Explored(Sparsifier):
    """Mixed into a method, remembers which weights were ever on (Liu et al. 2021, ITOP: R_s = their share)."""

    ever: Masks

    def initial(self, params: Params) -> Masks:
        """Start from the method's masks."""
        self.ever = super().initial(params)
        return self.ever

    def revise(self, params: Params, grads: Grads, step: int) -> Masks | None:
        """Revise as the method does and remember what is on."""
        masks = super().revise(params, grads, step)
        if masks is not None:
            self.ever = Masks({name: mask | masks[name] for name, mask in self.ever.items()})
        return masks

    def extra_state(self) -> State:
        """Return the method's own state and what was ever on."""
        return super().extra_state() | {f"ever.{key}": value for key, value in self.ever.state_dict().items()}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Restore both."""
        self.ever = Masks.load({k.removeprefix("ever."): v for k, v in state.items() if k.startswith("ever.")})
        super().load_extra_state({k: v for k, v in state.items() if not k.startswith("ever.")})


def _train(cfg: Config, source: Source, network: str, arm: Arm, seed: int, work: Work) -> Outcome:
    model = _common.build_model(source, network, seed)
    method: Sparsifier | None = None
    if arm.method != DENSE:
        given, steps = arm.settings, _common.total_steps(cfg, source)
        method = _common.make_sparsifier(given["entry"], given["density"], steps, seed, mixin=Explored, **given["options"])
    found = _common.train(cfg, source, model, method, seed, work)
    ever = method.ever.density() if isinstance(method, Explored) else 1.0
    return Outcome({**found.metrics(), "ever_on": ever}, {"loss": found.trainer.curve}, layer_table(found.masks))


def _plasticity(cfg: Config, source: Source, seed: int, work: Work) -> Outcome:
    steps = _common.total_steps(cfg, source)
    recovery = max(1, round(cfg.recovery * steps))
    pruned = len(cfg.checkpoints) * len(cfg.rates) * 2 * recovery
    trainer = _common.new_trainer(cfg, source, seed, work, round(max(cfg.checkpoints) * steps) + pruned)
    rows = []
    for point, model in _checkpoints(cfg, source, seed, steps, trainer.train).items():
        rows += pruning_plasticity(
            {f"{point:g}": model},
            partial(_recover, trainer, rates.step(min(point, 1.0 - 1e-9))),
            lambda model: evaluate(model, source.batches("test"), cfg.device).accuracy,
            rates=cfg.rates,
            steps=recovery,
            regenerate=lambda model: _gradients(cfg, source, model, seed),
        )
    return Outcome({"density": 1.0, **_summary(rows)}, details={"table": rows})


def _recover(trainer: Trainer, rate: float, model: nn.Module, held: Sparsifier | None, leg: Leg) -> nn.Module:
    """Train on at the learning rate of the checkpoint, as a multiple of the base rate."""
    return trainer.train(model, held, replace(leg, schedule=schedules.constant(rate)))


def _checkpoints(cfg: Config, source: Source, seed: int, steps: int, train: Any) -> dict[float, nn.Module]:
    """Return dense models at shares of a training whose rate falls tenfold at one half and at three quarters."""
    model = _common.build_model(source, cfg.network, seed)
    found: dict[float, nn.Module] = {}
    done = 0
    for index, point in enumerate(sorted(cfg.checkpoints)):
        length = round(point * steps) - done
        schedule = partial(_stretch, done / steps, length / steps)
        model = train(model, None, Leg(f"dense-{point:g}", length, schedule=schedule, stream=index))
        found[point], done = deepcopy(model), done + length
    return found


def _stretch(start: float, length: float, progress: float) -> float:
    return rates.step(start + length * progress)


def _gradients(cfg: Config, source: Source, model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Return the dense gradients of one training batch, as an update in training would see."""
    x, y = next(iter(source.train_batches(seed, 0, cfg.batch_size)))
    params = maskable(model.train())
    with torch.enable_grad():
        loss = functional.cross_entropy(logits(model(x.to(cfg.device))), y.to(cfg.device))
        return dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))


def _summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    metrics = {}
    for row in rows:
        how = "grown" if row["regenerated"] else "pruned"
        metrics[f"plasticity_{row['checkpoint']}_{row['rate']:g}_{how}"] = row["plasticity"]
    grown = [row["plasticity"] for row in rows if row["regenerated"]]
    plain = [row["plasticity"] for row in rows if not row["regenerated"]]
    early = [row["plasticity"] for row in rows if not row["regenerated"] and float(row["checkpoint"]) < 0.5]
    late = [row["plasticity"] for row in rows if not row["regenerated"] and float(row["checkpoint"]) >= 0.5]
    metrics["regeneration_gain"] = _mean(grown) - _mean(plain)
    if early and late:
        metrics["plasticity_fall"] = _mean(early) - _mean(late)
    return metrics


def _between(cfg: Config, text: str, better: str, worse: str, **kind: Any) -> Claim:
    """Return a claim on the difference of two methods, averaged over the densities."""
    share = 1.0 / len(cfg.density)
    weights = {f"{better}@{density:g}": share for density in cfg.density}
    return Claim(text, "accuracy", weights | {f"{worse}@{density:g}": -share for density in cfg.density}, **kind)


def _networks(cfg: Config, both: bool) -> list[str]:
    return [cfg.network, *([cfg.conv] if both and cfg.conv is not None else [])]


def _updates(entry: _Entry) -> bool:
    return entry.method in ("set", "rigl", "gmp", "granet")


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


STUDY = Study(
    name="granet",
    config=Config,
    presets={
        "smoke": {"train": 600, "epochs": 4, "batch_size": 64, "network": "mlp-64-32", "density": (0.05,), "every": 2,
                  "rates": (0.9,), "checkpoints": (0.25, 1.0), "seeds": 1},
        "laptop": {"data": "fashion-mnist", "train": 20000, "epochs": 3},
        "paper": {"data": "cifar10", "network": "resnet50", "conv": None, "density": (0.1, 0.05, 0.02), "epochs": 160,
                  "schedule": "step", "warmup": 0.0, "augment": "flip-shift", "every": 1000},
    },
    arms=arms,
    run=run,
    claims=claims,
    columns={
        "accuracy": "accuracy",
        "conv_accuracy": "accuracy, conv",
        "training_flops": "training FLOPs",
        "smallest_layer": "smallest layer",
        "ever_on": "ever on",
        "regeneration_gain": "regeneration",
    },
    about=(
        "Small networks and few epochs: the order of methods far from convergence, not the paper's numbers. A dense "
        "start costs more training FLOPs than a sparse one, so GMP and GraNet are not at equal FLOPs with RigL; the "
        "column says by how much. The second network is trained by the core methods at the first density only."
    ),
)  # fmt: skip
