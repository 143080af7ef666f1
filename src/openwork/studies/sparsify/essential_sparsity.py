"""How much of a pre-trained transformer one-shot pruning can take, whether the drop is sharp, and what decides where it is.

Compared on four networks: (a) a pretrained character Llama and (b) a pretrained sentence encoder, pruned and evaluated,
where they can be had; (c) a small vision transformer pre-trained with labels or by filling in masked patches, pruned and
fine-tuned on other classes, or fine-tuned and pruned; (d) a small language model trained on a tenth of a text or on all of
it, with its checkpoints.
True would be: a break that a smooth curve does not explain; magnitude far above random; longer N:M groups above shorter
ones and below no groups; a later drop with fine-tuning than without. Two-sided: layer-wise against global thresholds,
self-supervised against supervised pre-training, ten times the data, abrupt sparsification during training.
Departures and limits: networks of thousands to millions of weights, where the paper has billions; seeds vary the text, the
pairs, the training and the random masks, but (a) and (b) are one network each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import Field, field_validator
from torch import nn

from openwork import data
from openwork.core.masks import Masks
from openwork.data import texts
from openwork.lab.claims import Claim
from openwork.lab.spec import Arm, Config
from openwork.lab.study import Outcome, Study, Work
from openwork.lab.training import layer_table
from openwork.methods.sparsify import essential_sparsity as method
from openwork.methods.sparsify.essential_sparsity import Curve
from openwork.studies.sparsify import _essential_models as made
from openwork.studies.sparsify._essential_models import Reader, Sight, Subject, Viewer

SCOPES: Mapping[str, tuple[str, ...]] = {
    "tiny-lm": ("global", "layer", "random", "2:4", "4:8"),
    "minilm": ("global", "layer"),
}
VIT = {"vit-sl": "fine-tune", "vit-sl-evaluate": "evaluate", "vit-ssl": "fine-tune"}
IMP_SPARSITY, IMP_ROUNDS = 0.5, 3
UNBOUNDED = 99.0
"""Stands for an advantage in AIC that is not finite, either way."""


class Settings(Config):
    """What the study prunes, trains and measures."""

    pretrained: Literal["auto", "none"] = Field("auto", description="pretrained models: those that are here, or none")
    grid: tuple[float, ...] = Field(
        (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9), description="shares of weights to prune, from 0"
    )
    minilm_grid: tuple[float, ...] = Field(
        (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9), description="minilm: shares of weights to prune"
    )
    samples: int = Field(12, ge=1, description="tiny-lm: texts that it writes and is scored on")
    length: int = Field(192, ge=8, le=255, description="tiny-lm: characters of a text")
    pairs: int = Field(32, ge=4, description="minilm: titles and abstracts")
    words: int = Field(40, ge=8, description="minilm: tokens of a text")
    vit_grid: tuple[float, ...] = Field(
        (0.0, 0.3, 0.6, 0.8, 0.9, 0.95, 0.98), description="vit: shares of weights to prune, each with its own fine-tuning"
    )
    images: str = Field("fashion-mnist", description="vit: named set of ten classes")
    train: int = Field(6000, ge=100, description="vit: training images, all classes together")
    test: int = Field(2000, ge=20, description="vit: test images of the second five classes")
    patch: int = Field(7, ge=1, description="vit: side of a patch")
    vit_width: int = Field(32, ge=4, description="vit: width")
    vit_depth: int = Field(3, ge=1, description="vit: blocks")
    vit_batch: int = Field(32, ge=1, description="vit: images a step")
    pretrain_steps: int = Field(250, ge=1, description="vit: steps of pre-training")
    finetune_steps: int = Field(120, ge=1, description="vit: steps of fine-tuning, at every sparsity")
    text: str = Field("tiny-shakespeare", description="lm: named text, or 'markov', which needs no file")
    shares: tuple[float, float] = Field((0.1, 1.0), description="lm: shares of the text to train on, less and more")
    context: int = Field(64, ge=4, description="lm: characters that it sees")
    lm_width: int = Field(64, ge=16, description="lm: width")
    lm_depth: int = Field(4, ge=1, description="lm: blocks")
    lm_batch: int = Field(16, ge=1, description="lm: blocks a step")
    lm_steps: int = Field(600, ge=8, description="lm: steps of training")
    checkpoints: int = Field(8, ge=3, description="lm: checkpoints, evenly spaced")
    vit_lr: float = Field(0.01, gt=0, description="vit: largest learning rate of AdamW")
    lm_lr: float = Field(0.004, gt=0, description="lm: largest learning rate of AdamW")
    blocks: int = Field(32, ge=1, description="lm: held-out blocks")
    draws: int = Field(200, ge=20, description="bootstrap draws of an interval")

    @field_validator("grid", "minilm_grid", "vit_grid")
    @classmethod
    def _ascending(cls, grid: tuple[float, ...]) -> tuple[float, ...]:
        if len(grid) < 4 or grid[0] != 0.0 or sorted(set(grid)) != list(grid) or grid[-1] > 1.0:
            raise ValueError("the grid must ascend from 0 to at most 1, in at least 4 points")
        return grid

    def identity(self) -> dict[str, Any]:
        """Return the digests of images, text and the pretrained models' data."""
        text = "" if self.text == "markov" else texts.digest(self.text)
        return {"images": data.digest(self.images, train=self.train), "text": text, **_parts(self)}


def arms(cfg: Settings) -> list[Arm]:
    """Return an arm a network and scope; pretrained networks only where they are."""
    found = [
        Arm(f"{part}/{scope}", {"part": part, "scope": scope}, part, note="pretrained; pruned and evaluated")
        for part in _parts(cfg)
        for scope in SCOPES[part]
    ]
    notes = {
        "vit-sl": "pre-trained with labels, pruned, fine-tuned on other classes",
        "vit-sl-evaluate": "pre-trained with labels, fine-tuned on other classes, pruned",
        "vit-ssl": "pre-trained by filling in patches, pruned, fine-tuned on other classes",
    }
    found += [Arm(name, {"part": "vit", "how": name}, "vit", note=notes[name]) for name in VIT]
    for name, share in zip(("lm-less", "lm-more"), cfg.shares, strict=True):
        note = f"trained on {share:.0%} of the text; pruned and evaluated"
        found.append(Arm(name, {"part": "lm", "share": share}, "lm", note=note))
    return found


def run(cfg: Settings, arm: Arm, seed: int, work: Work) -> Outcome:
    """Measure the curve of an arm for one seed."""
    part = arm.settings["part"]
    if part == "vit":
        return _vit(cfg, arm.settings["how"], seed, work)
    if part == "lm":
        return _lm(cfg, arm.settings["share"], seed, work)
    build = made.tiny_lm if part == "tiny-lm" else made.minilm
    sizes = (cfg.samples, cfg.length) if part == "tiny-lm" else (cfg.pairs, cfg.words)
    scope = arm.settings["scope"]
    grid = None if ":" in scope else cfg.grid if part == "tiny-lm" else cfg.minilm_grid
    curve = _curve(build(*sizes, seed), grid, scope, seed, work.progress)
    return _outcome(cfg, curve, seed)


def claims(cfg: Settings) -> list[Claim]:
    """Return what would count as true."""
    have = _parts(cfg)
    return [
        *(_tiny_lm_claims(cfg) if "tiny-lm" in have else []),
        *(_minilm_claims() if "minilm" in have else []),
        Claim("vit: with fine-tuning more can go at a loss of 5 % than without", "tolerance_5",
              {"vit-sl": 1.0, "vit-sl-evaluate": -1.0}),
        *(Claim(f"vit: with fine-tuning more is kept at {s:.0%} than without", f"at_{s:g}",
                {"vit-sl": 1.0, "vit-sl-evaluate": -1.0}) for s in cfg.vit_grid if s == 0.9),
        Claim("vit: with fine-tuning the break comes later than without", "hinge", {"vit-sl": 1.0, "vit-sl-evaluate": -1.0}),
        Claim("vit: self-supervised pre-training moves the loss of 5 %, either way", "tolerance_5",
              {"vit-ssl": 1.0, "vit-sl": -1.0}, kind="different"),
        Claim("vit: self-supervised pre-training changes how sparse weights are (Hoyer), either way", "hoyer",
              {"vit-ssl": 1.0, "vit-sl": -1.0}, kind="different"),
        Claim("vit: one-shot and iterative masks agree more than independent masks would", "imp_overlap", {"vit-sl": 1.0}),
        Claim("lm: pruning by magnitude keeps more than pruning at random", "magnitude_gain", {"lm-more": 1.0}),
        Claim("lm: the break is one that no smooth curve explains", "advantage", {"lm-more": 1.0}, margin=method.MARGIN),
        Claim("lm: more data move the break, either way", "hinge", {"lm-more": 1.0, "lm-less": -1.0}, kind="different"),
        Claim("lm: more data change how sparse weights are (Hoyer), either way", "hoyer",
              {"lm-more": 1.0, "lm-less": -1.0}, kind="different"),
        Claim("lm: the break moves between early training and its end, either way", "hinge_shift", {"lm-more": 1.0},
              kind="different"),
        Claim("lm: weights become sparse more abruptly than in random order (share below .1 sd)", "abrupt_small",
              {"lm-more": 1.0}),
        Claim("lm: weights become sparse more abruptly than in random order (Hoyer)", "abrupt_hoyer", {"lm-more": 1.0}),
    ]  # fmt: skip


def _tiny_lm_claims(cfg: Settings) -> list[Claim]:
    def between(text: str, metric: str, one: str, two: str, **kind: Any) -> Claim:
        return Claim(f"tiny-lm: {text}", metric, {f"tiny-lm/{one}": 1.0, f"tiny-lm/{two}": -1.0}, **kind)

    return [
        Claim("tiny-lm: the break is one that no smooth curve explains", "advantage", {"tiny-lm/global": 1.0},
              margin=method.MARGIN),
        Claim("tiny-lm: more than a tenth of the weights can go before the break", "hinge", {"tiny-lm/global": 1.0},
              margin=0.1),
        Claim("tiny-lm: less than four tenths of the weights can go before the break", "hinge", {"tiny-lm/global": -1.0},
              margin=-0.4),
        *(between(f"magnitude keeps more than chance at {s:.0%}", f"at_{s:g}", "global", "random")
          for s in (0.1, 0.2) if s in cfg.grid),
        *(between("layer-wise and global thresholds differ at 40%", "at_0.4", "layer", "global", kind="different")
          for s in (0.4,) if s in cfg.grid),
        between("the break of layer-wise thresholds differs from that of a global one", "hinge", "layer", "global",
                kind="different"),
        between("2:4 is below no pattern at 50%", "at_0.5", "layer", "2:4"),
        between("4:8 is above 2:4, both at 50%", "at_0.5", "4:8", "2:4"),
        between("6:8 is above 3:4, both at 25%", "at_0.25", "4:8", "2:4"),
    ]  # fmt: skip


def _minilm_claims() -> list[Claim]:
    return [
        Claim("minilm: the break is one that no smooth curve explains", "advantage", {"minilm/global": 1.0},
              margin=method.MARGIN),
        Claim("minilm: a fifth of the weights can go at a loss of 1 %", "tolerance", {"minilm/global": 1.0}, margin=0.2),
        Claim("minilm: layer-wise and global thresholds differ in the break", "hinge",
              {"minilm/layer": 1.0, "minilm/global": -1.0}, kind="different"),
    ]  # fmt: skip


def _vit(cfg: Settings, how: str, seed: int, work: Work) -> Outcome:
    sight = Sight(_viewer(cfg), seed)
    objective = "ssl" if how == "vit-ssl" else "sl"
    model = sight.pretrained(objective, lambda share: work.progress(0.3 * share))
    hoyer = method.sparsity_track({0: model})[0]["hoyer"]
    if VIT[how] == "evaluate":
        model = sight.finetune(model)
    subject = Subject(model, sight.score, 0.2)

    def told(share: float) -> None:
        work.progress(0.3 + 0.6 * share)

    curve = _curve(subject, cfg.vit_grid, "global", seed, told, sight.finetune if VIT[how] == "fine-tune" else None)
    found = _outcome(cfg, curve, seed, hoyer=hoyer)
    masks = method.one_shot(model, IMP_SPARSITY)
    found.layers = layer_table(masks)
    if how == "vit-sl":
        iterative = made.rewound(subject.fresh, method.one_shot, sight.finetune, IMP_SPARSITY, IMP_ROUNDS)
        alike = method.mask_similarity(masks, iterative)
        found.metrics["imp_overlap"] = alike.jaccard - alike.chance_jaccard
        found.details["imp"] = {"jaccard": alike.jaccard, "cosine": alike.cosine, "chance_jaccard": alike.chance_jaccard,
                                "chance_cosine": alike.chance_cosine, "sparsity": IMP_SPARSITY}  # fmt: skip
    work.progress(1.0)
    return found


def _lm(cfg: Settings, share: float, seed: int, work: Work) -> Outcome:
    subject, kept = made.reader(_reader(cfg), share, seed, cfg.checkpoints, lambda done: work.progress(0.6 * done))
    curve = _curve(subject, cfg.grid, "global", seed)
    chance = _curve(subject, cfg.grid, "random", seed)
    table = method.sparsity_track(kept)
    for done, row in enumerate(table, start=1):
        part = _curve(Subject(kept[row["checkpoint"]], subject.score, 0.0), _coarse(cfg.grid), "global", seed)
        row |= {"quality": part.quality[0], "hinge": _place(part), "tolerance": _tolerance(part)}
        work.progress(0.6 + 0.4 * done / len(table))
    found = _outcome(
        cfg, curve, seed,
        hoyer=table[-1]["hoyer"],
        small=table[-1]["small"],
        magnitude_gain=(sum(curve.quality) - sum(chance.quality)) / len(cfg.grid),
        hinge_shift=table[-1]["hinge"] - table[0]["hinge"],
    )  # fmt: skip
    for name in ("near_zero", "small", "hoyer", "gini"):
        sudden = method.abruptness([row[name] for row in table], seed=seed)
        found.metrics[f"abrupt_{name}"] = sudden.share - sudden.permuted
        found.details[f"abrupt_{name}"] = {"share": sudden.share, "permuted": sudden.permuted, "even": sudden.even,
                                           "p": sudden.p}  # fmt: skip
    found.details |= {"track": table, "random": list(chance.quality)}
    found.layers = layer_table(method.one_shot(subject.model, 0.5))
    return found


def _curve(
    subject: Subject, grid: tuple[float, ...] | None, scope: str, seed: int,
    tell: Callable[[float], None] = lambda _share: None, finetune: Callable[[nn.Module, Masks], nn.Module] | None = None,
) -> Curve:  # fmt: skip
    points = method.grid_of(scope) if grid is None else grid
    return method.essential_sparsity(
        subject.fresh, subject.score, points, scope, finetune=finetune, floor=subject.floor, seed=seed,
        done=lambda s, _value: tell((points.index(s) + 1) / len(points)),
    )  # fmt: skip


def _outcome(cfg: Settings, curve: Curve, seed: int, **more: float) -> Outcome:
    advantage = curve.advantage()
    metrics = {
        "quality": curve.quality[0],
        "tolerance": _tolerance(curve),
        "tolerance_5": _tolerance(curve, 0.05),
        **{f"at_{s:g}": y for s, y in zip(curve.sparsity, curve.quality, strict=True) if s},
        **more,
    }
    if ":" not in curve.scope:
        metrics |= {
            "hinge": _place(curve),
            "advantage": max(-UNBOUNDED, min(UNBOUNDED, advantage)) if not math.isnan(advantage) else -UNBOUNDED,
            "sharp": float(curve.knee() is not None),
        }
    points = [[s, y] for s, y in zip(curve.sparsity, curve.quality, strict=True)]
    return Outcome(metrics, {"quality": points}, details={"curve": curve.summary(draws=cfg.draws, seed=seed)})


def _tolerance(curve: Curve, share: float = 0.01) -> float:
    """Return where a share of the dense quality is lost; the end of the grid where quality never falls so far."""
    found = curve.tolerance(share * abs(curve.quality[0]))
    return curve.sparsity[-1] if found is None else found


def _place(curve: Curve) -> float:
    """Return where the broken line breaks, whether or not it beats a smooth curve.

    The end of the grid where nothing is lost; without a broken line, for too few points, where half is lost.
    """
    found = curve.hinge()
    if curve.tolerance() is None:
        return curve.sparsity[-1]
    if found is not None:
        return found.at
    half = curve.tolerance(max(0.0, (curve.quality[0] - curve.floor) / 2.0))
    return curve.sparsity[-1] if half is None else half


def _coarse(grid: tuple[float, ...]) -> tuple[float, ...]:
    """Return every second point of a long grid, for checkpoints: their marks are compared with one another only."""
    return grid[::2] if len(grid) > 9 else grid


def _parts(cfg: Settings) -> dict[str, str]:
    return made.available() if cfg.pretrained == "auto" else {}


def _viewer(cfg: Settings) -> Viewer:
    return Viewer(cfg.images, cfg.train, cfg.test, cfg.patch, cfg.vit_width, cfg.vit_depth, cfg.pretrain_steps,
                  cfg.finetune_steps, cfg.vit_batch, cfg.vit_lr)  # fmt: skip


def _reader(cfg: Settings) -> Reader:
    return Reader(cfg.text, cfg.context, cfg.lm_width, cfg.lm_depth, cfg.lm_steps, cfg.lm_batch, cfg.lm_lr, cfg.blocks)


STUDY = Study(
    name="essential-sparsity",
    config=Settings,
    presets={
        "smoke": {"pretrained": "none", "images": "digits", "train": 600, "test": 100, "patch": 2, "vit_width": 16,
                  "vit_depth": 2, "vit_batch": 16, "pretrain_steps": 20, "finetune_steps": 8, "text": "markov",
                  "context": 16, "lm_width": 32, "lm_depth": 2, "lm_steps": 60, "lm_lr": 0.01, "checkpoints": 3,
                  "blocks": 12,
                  "grid": (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9), "vit_grid": (0.0, 0.5, 0.7, 0.9), "draws": 20,
                  "seeds": 1},
        "laptop": {},
        "paper": {"samples": 64, "pairs": 600, "words": 256, "train": 60000, "test": 5000, "patch": 4, "vit_width": 192,
                  "vit_depth": 12, "vit_batch": 64, "pretrain_steps": 20000, "finetune_steps": 5000, "context": 256,
                  "lm_width": 384, "lm_depth": 6, "lm_batch": 64, "lm_steps": 20000, "checkpoints": 40,
                  "vit_lr": 0.001, "lm_lr": 0.001,
                  "blocks": 400, "grid": tuple(k / 20 for k in range(20)), "minilm_grid": method.GRID,
                  "vit_grid": (*method.GRID, 0.95, 0.98), "draws": 2000,
                  "seeds": 5},
    },
    arms=arms,
    run=run,
    claims=claims,
    columns={
        "tolerance": "pruned at 1 % loss",
        "tolerance_5": "at 5 % loss",
        "hinge": "break",
        "advantage": "break over smooth (AIC)",
        "quality": "dense quality",
        "at_0.3": "at 30 %",
        "at_0.5": "at 50 %",
        "hoyer": "Hoyer",
        "imp_overlap": "IMP overlap above chance",
        "magnitude_gain": "magnitude over random",
    },
    about=(
        "Networks of 50 thousand to 10 million masked weights, where the paper has 100 million and more: the order of "
        "scopes, protocols and patterns, not the 30 to 50 % of large models. Quality is next-character accuracy (tiny-lm, "
        "lm), mean reciprocal rank of the right abstract (minilm) and accuracy on classes that pre-training did not see "
        "(vit). The two pretrained networks are one each: their intervals are over texts, not over networks. A break is "
        "reported for every arm; it is a knee only where its AIC is at least 4 lower than that of a smooth curve. Lengths, "
        "rates and grids of the networks trained here, the loss of 5 % instead of 1 % for vision transformers (1 % is below "
        "the noise of their fine-tuning) and the claim at 90 % were set after a first run on the same three seeds; more "
        "seeds test them anew. These networks are trained for a minute at most: far from the end of what they could learn."
    ),
)  # fmt: skip
