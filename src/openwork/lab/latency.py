"""How fast each arm's network is against dense, measured side by side in one process once all training is done."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from openwork import atomic
from openwork.errors import OpenworkError
from openwork.lab import compare, environment
from openwork.lab.recipe import Recipe
from openwork.lab.store import read_json
from openwork.lab.sweep import Plan


def measure(made: Plan, recipe: Recipe) -> dict[str, dict[str, float]]:
    """Return for every arm `ratio` (dense time over its time, above 1 is faster), `ms` and `dense_ms`, for one example.

    The first seed's model of each arm is accelerated and timed in turn with the dense one; medians. Measured once for
    the same models on the same machine, then found again.
    """
    chosen = first_models(made)
    place = made.store.folder / "latency.json"
    asked = {"models": {arm: path.parent.name for arm, path in chosen.items()}, "machine": environment.processor()}
    known = read_json(place) or {}
    if known.get("asked") == asked:
        return dict(known["found"])
    found = _measure(chosen, recipe)
    atomic.write_json(place, {"asked": asked, "found": found})
    return found


def first_models(made: Plan) -> dict[str, Path]:
    """Return for every arm the model file of its first seed that ended well."""
    chosen: dict[str, Path] = {}
    for trial in made.trials:
        path = made.store.place(trial) / compare.MODEL_FILE
        if made.results.get(trial.key, {}).get("status") == "ok" and path.is_file():
            chosen.setdefault(trial.arm.name, path)
    return chosen


def _measure(chosen: Mapping[str, Path], recipe: Recipe) -> dict[str, dict[str, float]]:
    import torch

    from openwork import saving
    from openwork.runtime.plan import accelerate, plan_of
    from openwork.runtime.timing import measure as time_models

    torch.set_num_threads(recipe.threads)
    source = compare.load_source(recipe)
    example, _ = next(iter(source.batches("test", 1)))
    found: dict[str, dict[str, float]] = {}
    dense = compare.build_model(recipe, source, 0).eval()
    for arm, path in chosen.items():
        try:
            model = saving.load(path, compare.build_model(recipe, source, 0))
            fast = accelerate(model, example, verbose=False)
            times = time_models({"dense": dense, "fast": fast}, example)
        except OpenworkError:
            continue  # a model that cannot be timed has no ratio; its accuracy stands
        paid = plan_of(fast).accelerated
        ratio = times["dense"] / times["fast"] if paid else 1.0  # what stayed dense runs the dense network's own code
        found[arm] = {"ratio": ratio, "ms": 1e3 * times["fast"], "dense_ms": 1e3 * times["dense"]}
    return found
