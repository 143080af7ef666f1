"""A study from plan to results: find what is finished, run the rest, judge, and write results.json."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from openwork import atomic
from openwork.errors import StoreError, TrialError
from openwork.lab import claims, environment
from openwork.lab.engines import catalog
from openwork.lab.engines.catalog import Done, Engine
from openwork.lab.spec import Arm, Config, Trial, write_recipe
from openwork.lab.stats import mean_interval, paired_interval
from openwork.lab.store import Store, free_megabytes
from openwork.lab.study import Study

NEEDED_MEGABYTES = 64.0
_MEANS = ("kept", "inference_flops", "training_flops", "bytes", "steps")


@dataclass
class Plan:
    """What a sweep consists of.

    Attributes:
        study: the study.
        config: its configuration.
        arms: what is compared.
        trials: an arm with a seed each, seeds outermost so that early results cover all arms; two arms of the same
            settings share a key, and what is run once stands under both names.
        store: where results go.
        results: results by trial key, those found finished to begin with.
        stale: why finished trials of the same question are not used, if there are any.
    """

    study: Study
    config: Config
    arms: list[Arm]
    trials: list[Trial]
    store: Store
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    stale: str = ""

    @property
    def missing(self) -> list[Trial]:
        """Return the trials that have no result yet, one of each key."""
        return list({trial.key: trial for trial in self.trials if trial.key not in self.results}.values())


def plan(study: Study, config: Config, folder: Path, *, threads: int = 1, processes: int = 1) -> Plan:
    """Return the sweep of a study, with the trials that are finished already.

    Args:
        study: the study.
        config: its configuration.
        folder: of the run.
        threads: of each trial.
        processes: that share each trial (`lab.ddp_trial`): the last digits of a result depend on their number.
    """
    store = Store(folder)
    arms = list(study.arms(config))
    identity = {**environment.identity(threads, study), **config.identity()}
    if processes > 1:
        identity["processes"] = processes
    full, content = config.model_dump(mode="json"), config.content()
    trials = [
        Trial(study.name, full, content, arm, seed, identity) for seed in range(config.seeds) for arm in arms
    ]  # fmt: skip
    made = Plan(study, config, arms, trials, store)
    for trial in made.trials:
        result = store.finished(trial)
        if result is not None:
            made.results[trial.key] = result
    made.stale = _why(store, made.missing, identity)
    return made


def run(made: Plan, *, workers: int = 0, timeout: float | None = None, done: Done, engine: Engine | None = None) -> None:
    """Run what is missing; `done` is called with every trial as it ends.

    Args:
        made: the plan.
        workers: trials at a time; 0 is one a core, or as many as a cluster holds.
        timeout: seconds that a trial may take.
        done: called with trial and result.
        engine: where trials run, from `engines.catalog.find`; this machine if it is not given.

    Raises:
        StoreError: if the disk is full or the folder cannot be written to; finished trials are kept.
    """
    missing = made.missing
    if not missing:
        return
    free = free_megabytes(made.store.folder)
    if free < NEEDED_MEGABYTES:
        raise StoreError(
            f"only {free:.0f} MB are free under {str(made.store.folder)!r} and a run needs {NEEDED_MEGABYTES:.0f}; free "
            f"some and run the same command again ({len(made.results)} finished trials are kept)"
        )

    def keep(trial: Trial, result: dict[str, Any]) -> None:
        made.results[trial.key] = result
        done(trial, result)

    try:
        (engine or catalog.find())(missing, made.store, workers=workers, timeout=timeout, done=keep)
    except StoreError as error:
        raise StoreError(f"{error} ({len(made.results)} of {len(made.trials)} trials are finished and kept)") from error


def results(made: Plan, *, preset: str | None = None, threads: int = 1, workers: int = 1) -> dict[str, Any]:
    """Return everything that a report needs, in plain JSON values."""
    known = [(trial, made.results[trial.key]) for trial in made.trials if trial.key in made.results]
    trials = [{**result, "arm": trial.arm.name} for trial, result in known]  # a result may be found under another name
    good: dict[str, dict[int, dict[str, float]]] = {}
    for trial in trials:
        if trial["status"] == "ok":
            good.setdefault(trial["arm"], {})[trial["seed"]] = trial["metrics"]
    return {
        "format": 1,
        "kind": "compare" if made.study.name == "compare" else "study",
        "name": made.study.name,
        "preset": preset,
        "recipe": made.config.model_dump(mode="json"),
        "recipe_text": write_recipe(made.config),
        "environment": environment.describe(threads, workers or os.cpu_count() or 1),
        "columns": dict(made.study.columns),
        "about": made.study.about,
        "arms": [asdict(arm) for arm in made.arms],
        "trials": trials,
        "latency": {},
        "rows": [_row(arm, good, made.config.seeds, made.study) for arm in made.arms],
        "claims": [asdict(v) for v in claims.judge(made.study.claims(made.config), claims.collect(trials))],
    }


def write(made: Plan, found: Mapping[str, Any]) -> Path:
    """Write results.json and recipe.yaml into the run folder, atomically, and return the first's path."""
    path = made.store.folder / "results.json"
    atomic.write_bytes(path, _text(found).encode("utf-8", "backslashreplace"))  # a lone surrogate is escaped, as JSON has it
    atomic.write_bytes(made.store.folder / "recipe.yaml", str(found["recipe_text"]).encode())
    return path


def complaints(made: Plan) -> TrialError | None:
    """Return one error that says what went wrong in the trials that did not end well, or None."""
    lost = [result for result in made.results.values() if result["status"] != "ok"]
    if not lost:
        return None
    reasons: dict[str, list[str]] = {}
    for result in lost:
        reasons.setdefault(str(result["error"]), []).append(f"{result['arm']} seed {result['seed']}")
    said = "; ".join(f"{_some(who)}: {why}" for why, who in reasons.items())
    good = len(made.results) - len(lost)
    return TrialError(f"{len(lost)} of {len(made.results)} trials did not end well ({said}); the other {good} are kept")


_Metrics = Mapping[int, Mapping[str, float]]


def _row(arm: Arm, good: Mapping[str, _Metrics], seeds: int, study: Study) -> dict[str, Any]:
    """Return an arm's row; `good` holds the metrics of all arms by seed."""
    own, dense = good.get(arm.name, {}), good.get("dense", {})
    main = next(iter(study.columns))
    values = {seed: metrics[main] for seed, metrics in own.items() if main in metrics}
    against = {seed: metrics[main] for seed, metrics in dense.items() if main in metrics}
    row: dict[str, Any] = {"arm": arm.name, "method": arm.method, "density": arm.density, "n": len(own), "seeds": seeds}
    row["accuracy"] = mean_interval(list(values.values())).as_dict() if values else None
    paired = paired_interval(values, against) if values and against and arm.name != "dense" else None
    row["difference"] = paired.as_dict() if paired is not None and paired.n else None
    for name in _MEANS:
        found = [metrics[name] for metrics in own.values() if name in metrics]
        row[name] = sum(found) / len(found) if found else None
    row["metrics"] = {
        name: mean_interval([m[name] for m in own.values() if name in m]).as_dict()
        for name in study.columns
        if any(name in m for m in own.values())
    }
    return {**row, "latency": None, "note": arm.note}


def _why(store: Store, missing: Sequence[Trial], identity: Mapping[str, Any]) -> str:
    """Say why finished trials of the same question are not used: which part of their identity differs."""
    found = store.others(missing)
    others = [other for identities in found.values() for other in identities]
    differing = {key for other in others for key in identity if other.get(key) != identity[key]}
    if not found:
        return ""
    return f"{len(found)} trials were run before under other conditions ({', '.join(sorted(differing))}) and are run again"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _text(found: Mapping[str, Any]) -> str:
    """Return results as JSON with a line a key and a line an entry of a list: readable, and quick for many trials."""
    parts = [f"{json.dumps(key)}: {_lines(value)}" for key, value in found.items()]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _lines(value: Any) -> str:
    if not isinstance(value, list) or not value:
        return _line(value)
    return "[\n " + ",\n ".join(map(_line, value)) + "\n]"


def _line(value: Any) -> str:
    """Return the value as JSON, with numbers that JSON cannot hold as null."""
    try:
        return json.dumps(value, default=str, ensure_ascii=False, allow_nan=False)
    except ValueError:
        finite = json.loads(json.dumps(value, default=str), parse_constant=lambda _word: None)
        return json.dumps(finite, ensure_ascii=False)
