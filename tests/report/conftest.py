"""A results file made of known numbers, and names that nobody should have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from openwork.lab.claims import Claim, collect, judge
from openwork.lab.stats import mean_interval, paired_interval

HOSTILE = {
    "script": "<script>alert(1)</script>",
    "quotes": "a\"b'c`d",
    "template": "{{7*7}}{% raw %}",
    "ansi": "\x1b[31mred\x1b[0m\x1b]0;title\x07",
    "right-to-left": "abc\u202edcba\u200f",
    "long": "x" * 10_000,
    "nul": "a\x00b",
    "formula": "=cmd|'/c calc'!A1",
    "path": "../../etc/passwd",
    "lines": "one\ntwo\r\nthree",
    "markdown": "[x](javascript:alert(1)) | **b** `c` $d$",
    "math": "$\\frac{1}{2}$ _under_",
    "surrogate": "a\ud800b",
    "wide": "网络 ñ 🜁",
}

SHAPES = {
    "stem.weight": (16, 3, 3, 3),
    "block1.conv1.weight": (16, 16, 3, 3),
    "block2.conv1.weight": (32, 16, 3, 3),
    "block3.conv1.weight": (64, 32, 3, 3),
    "head.weight": (10, 64),
}

Make = Callable[..., dict[str, Any]]


def make(
    methods: Sequence[str] = ("random", "magnitude", "set", "rigl", "granet"),
    densities: Sequence[float] = (0.2, 0.1, 0.05),
    seeds: int = 5,
    dense: bool = True,
    kind: str = "compare",
    name: str = "resnet20 on cifar10",
    noise: float = 0.004,
    lost: Sequence[tuple[str, int, str]] = (),
) -> dict[str, Any]:
    """Return results as a run folder keeps them; each method is 0.6 points better than the one before it."""
    rng = np.random.default_rng(7)
    level = rng.normal(0.0, 0.006, seeds)
    arms = [{"name": "dense", "method": "dense", "density": 1.0, "note": ""}] if dense else []
    arms += [{"name": f"{m}@{d:g}", "method": m, "density": d, "note": ""} for d in densities for m in methods]
    trials, rows = [], []
    for arm in arms:
        rank = -1 if arm["method"] == "dense" else list(methods).index(str(arm["method"]))
        density = float(arm["density"])  # type: ignore[arg-type]
        base = 0.92 if rank < 0 else 0.92 + 0.012 * np.log(density) - 0.006 * (len(methods) - rank)
        for seed in range(seeds):
            status = next((s for a, n, s in lost if (a, n) == (arm["name"], seed)), "ok")
            accuracy = float(np.round(base + level[seed] + rng.normal(0.0, noise), 4))
            trials.append(_trial(str(arm["name"]), seed, status, accuracy, density))
    values = collect(trials).get("accuracy", {})
    known = {a: {s: v for s, v in found.items() if v is not None and np.isfinite(v)} for a, found in values.items()}
    for arm in arms:
        own = known.get(str(arm["name"]), {})
        interval = mean_interval(list(own.values()))
        difference = paired_interval(own, known["dense"]).as_dict() if dense and arm["method"] != "dense" else None
        density = float(arm["density"])  # type: ignore[arg-type]
        cost = {"kept": density, "inference_flops": density**0.8, "training_flops": density**0.8, "bytes": density * 1.1}
        if arm["method"] == "dense":
            cost = dict.fromkeys(cost, 1.0)
        row = {"arm": arm["name"], "method": arm["method"], "density": density, "n": len(own), "seeds": seeds}
        extra = {"latency": None if density > 0.1 else 1.0 + 0.05 / density, "steps": 1.0, "note": ""}
        rows.append({**row, "accuracy": interval.as_dict(), "difference": difference, **cost, **extra})
    claims = []
    if kind == "study":
        a, b = f"{methods[-1]}@{densities[-1]:g}", f"{methods[0]}@{densities[-1]:g}"
        stated = [
            Claim(f"{methods[-1]} beats {methods[0]} at the lowest density", "accuracy", {a: 1.0, b: -1.0}),
            Claim(f"{methods[-1]} equals dense at the highest density", "accuracy",
                  {f"{methods[-1]}@{densities[0]:g}": 1.0, "dense": -1.0}, "equivalent", 0.005),
            Claim("training is shorter", "train_time", {a: -1.0, b: 1.0}),
        ]  # fmt: skip
        claims = [verdict.as_dict() for verdict in judge(stated, collect(trials))]
    environment = {"openwork": "0.1.0", "torch": "2.13.0", "python": "3.11.2", "processor": "an x86-64 processor",
                   "threads": 2, "date": "2026-03-01 12:00 UTC"}  # fmt: skip
    recipe = {"data": {"name": "cifar10", "train": 20000, "augment": "crop, flip"}, "model": "resnet20",
              "methods": list(methods), "densities": list(densities), "seeds": seeds,
              "train": {"epochs": 12, "batch_size": 128, "lr": 0.1, "schedule": "cosine"}}  # fmt: skip
    return {"format": 1, "kind": kind, "name": name, "preset": "laptop" if kind == "study" else None,
            "recipe": recipe, "environment": environment, "arms": arms, "trials": trials, "latency": {}, "rows": rows,
            "claims": claims}  # fmt: skip


def hostile(kind: str = "study") -> dict[str, Any]:
    """Return results in which every name is one of the hostile ones."""
    names = list(HOSTILE.values())
    results = make(methods=names, densities=(0.1, 0.05), seeds=2, kind=kind, lost=[(f"{names[0]}@0.1", 1, "failed")])
    bad = iter(names * 50)
    results["name"] = results["preset"] = HOSTILE["script"] + HOSTILE["template"]
    results["about"] = "".join(name for name in names if len(name) < 100)
    results["columns"] = {"accuracy": HOSTILE["script"], "nll": HOSTILE["template"]}
    results["environment"] = {next(bad): next(bad) for _ in names}
    results["recipe"] = {"data": HOSTILE["script"], "model": HOSTILE["ansi"], **{next(bad): next(bad) for _ in names}}
    for row in results["rows"]:
        row["note"] = next(bad)
        row["metrics"] = {"nll": {"mean": 0.5, "low": 0.4, "high": 0.6}}
    for trial in results["trials"]:
        trial["layers"] = {next(bad): layer for layer in trial["layers"].values()}
        trial["error"] = next(bad) if trial["status"] != "ok" else None
    for claim in results["claims"]:
        claim.update(text=next(bad), reason=next(bad), metric=next(bad))
    return results


def _trial(arm: str, seed: int, status: str, accuracy: float, density: float) -> dict[str, Any]:
    good = status == "ok"
    steps = np.linspace(0, 1800, 40)
    loss = (
        2.05 * np.exp(-steps / 420.0)
        + 12.0 * (0.95 - accuracy) * (1.0 - np.exp(-steps / 300.0))
        + 0.02 * np.sin(steps / 37.0 + seed)
    )
    layers = {}
    for at, (layer, shape) in enumerate(SHAPES.items()):
        total = int(np.prod(shape))
        tilt = sum(map(ord, arm.partition("@")[0])) % 7 / 4.0
        share = min(1.0, density * (1.0 + tilt * (2 - at) ** 2 / 4.0))
        layers[layer] = {"kept": round(share * total), "total": total, "shape": list(shape)}
    return {
        "key": f"{arm}-{seed}",
        "arm": arm,
        "seed": seed,
        "status": status,
        "metrics": {"accuracy": accuracy, "kept": density, "steps": 1.0} if good else {},
        "curves": {"loss": [[int(s), float(v)] for s, v in zip(steps, loss, strict=True)]} if good else {},
        "layers": layers if good and density < 1.0 else {},
        "timings": {"seconds": 41.5},
        "error": None if good else "RuntimeError: loss is nan at step 312\nfirst in block1.conv1.weight",
    }


@pytest.fixture
def make_results() -> Make:
    """The maker of results files."""
    return make


@pytest.fixture
def results() -> dict[str, Any]:
    """A comparison of five methods at three densities, one seed of one arm lost."""
    return make(lost=[("set@0.05", 2, "diverged")])
