"""What a sweep costs beside its trials: the overhead a trial under each engine, and how planning and reporting grow.

    python benchmarks/scale.py [--trials 10 100 1000] [--stored 100 1000 5000] [--engines local ray] [--out docs/results]

Trials are empty, so all their time is overhead: planning, a child process, its result on disk. Stored results are as
large as those of a comparison. Writes scale.json and scale.md.

Every child imports this file, so what only the measurement needs is imported where it is used.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from openwork import atomic
from openwork.core.rng import generator
from openwork.lab import environment, sweep
from openwork.lab.engines import catalog, cluster
from openwork.lab.spec import Arm, Config
from openwork.lab.store import read_json, write_result
from openwork.lab.study import Outcome, Study, Work

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "results"
ARMS = 20  # of a sweep whose trials grow with its seeds
WIDE = 200  # of one that compares many arms instead
ALLOWED_GROWTH = 1.5

T = TypeVar("T")


class EmptyConfig(Config):
    plan: ClassVar[frozenset[str]] = frozenset({"seeds", "count"})
    count: int = 1


def run(config: EmptyConfig, arm: Arm, seed: int, work: Work) -> Outcome:
    return Outcome({"accuracy": 1.0})


STUDY = Study(
    name="scale:STUDY",
    config=EmptyConfig,
    presets={"smoke": {}},
    arms=lambda config: (
        [Arm("dense", {"number": 0}, "dense")]
        + [Arm(f"arm {number}", {"number": number}, "toy", 0.1) for number in range(1, config.count)]
    ),
    run=run,
    claims=lambda _config: [],
)


def planned(folder: Path, trials: int, arms: int = ARMS) -> sweep.Plan:
    arms = min(arms, trials)
    return sweep.plan(STUDY, EmptyConfig(seeds=trials // arms, count=arms), folder)


def timed(call: Callable[[], T]) -> tuple[T, float]:
    """Return what `call` returns and the seconds it took."""
    started = time.perf_counter()
    value = call()
    return value, time.perf_counter() - started


@contextmanager
def standing(engine: str) -> Iterator[catalog.Engine]:
    """Yield an engine; a Ray that is started once, with a place a core, so that its start is not taken for overhead."""
    if engine != "ray":
        yield catalog.find(engine)
        return
    with cluster.joined("local", os.cpu_count() or 1):
        yield catalog.find("ray")


def overhead(engine: str, sizes: list[int]) -> list[dict[str, Any]]:
    """Return a row a number of trials: seconds in all, and for one trial the slope from the size before."""
    rows: list[dict[str, Any]] = []
    with standing(engine) as ready:
        for size in [min(sizes), *sizes]:  # the first time warms caches and starts workers, and does not count
            with tempfile.TemporaryDirectory() as folder:
                made = planned(Path(folder), size)
                _, taken = timed(partial(sweep.run, made, engine=ready, done=lambda *_: None))
                assert {result["status"] for result in made.results.values()} == {"ok"}
            before = rows[-1] if rows else None
            grown = before is not None and size > before["trials"]
            slope = 1e3 * (taken - before["seconds"]) / (size - before["trials"]) if before and grown else None
            rows.append({"engine": engine, "trials": size, "seconds": taken, "ms_a_further_trial": slope})
            print(f"{engine:6} {size:5} empty trials {taken:8.2f} s", flush=True)
    return rows[1:]


def fill(made: sweep.Plan) -> None:
    """Store a result for every trial, as large as that of a comparison; not synced to the disk, which is not measured."""
    from unittest import mock

    with mock.patch("os.fsync"):
        for trial in made.missing:
            noise = generator(trial.seed, "scale", trial.arm.name).initial_seed() % 1000 / 1e5
            write_result(
                made.store.begin(trial),
                {
                    "key": trial.key, "arm": trial.arm.name, "seed": trial.seed, "error": None, "status": "ok",
                    "metrics": {"accuracy": 0.9 + noise, "nll": 0.3, "ece": 0.02, "density": 0.1, "kept": 0.1, "steps": 1.0},
                    "curves": {"loss": [[4.0 * step, 2.0 / (step + 1) + noise] for step in range(100)]},
                    "layers": {f"layer{i}.weight": {"kept": 100, "total": 1000, "shape": [10, 100]} for i in range(10)},
                    "details": {"parameters": 10000}, "timings": {"seconds": 1.0},
                },
            )  # fmt: skip


def growth(sizes: list[tuple[int, int]], repeats: int = 3) -> list[dict[str, Any]]:
    """Return a row a number of stored results and of arms: seconds of each part of a second call, the least of a few."""
    return [_second_call(stored, min(arms, stored), repeats) for stored, arms in sizes]


def _second_call(stored: int, arms: int, repeats: int) -> dict[str, Any]:
    from openwork.report import html

    parts: dict[str, list[float]] = {"plan": [], "one missing": [], "results": [], "write": [], "report": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fill(planned(folder, stored, arms))
        for _ in range(repeats):
            made, taken = timed(lambda: planned(folder, stored, arms))
            assert not made.missing
            parts["plan"].append(taken)
            last = made.store.place(made.trials[-1]) / "result.json"
            last.rename(folder / "aside")
            parts["one missing"].append(timed(lambda: planned(folder, stored, arms))[1])
            (folder / "aside").rename(last)
            found, taken = timed(partial(sweep.results, made))
            parts["results"].append(taken)
            parts["write"].append(timed(partial(sweep.write, made, found))[1])
            parts["report"].append(timed(partial(html.write_report, found, folder / "report.html", None))[1])
    least = {part: min(taken) for part, taken in parts.items()}
    whole = sum(taken for part, taken in least.items() if part != "one missing")
    print(f"{stored:5} results of {arms} arms, a second call {whole:8.2f} s: {least}", flush=True)
    return {"stored": stored, "arms": arms, **least, "second call": whole}


def claims(overheads: list[dict[str, Any]], grown: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what ought to hold, with the estimate beside the bound."""
    found = []
    alike = [row for row in grown if row["arms"] == ARMS]
    if len(alike) > 2:  # a report takes a while even for one result, so what counts is what further results cost
        first, middle, last = alike[0], alike[-2], alike[-1]
        text = f"a further result costs a second call no more than {ALLOWED_GROWTH} times as much among {last['stored']:,}"
        ratio = _further(middle, last) / _further(first, middle)
        found.append({"text": f"{text} as among {middle['stored']:,}", "estimate": ratio, "wanted": ALLOWED_GROWTH})
    for engine in dict.fromkeys(row["engine"] for row in overheads):
        slopes = [row["ms_a_further_trial"] for row in overheads if row["engine"] == engine and row["ms_a_further_trial"]]
        if len(slopes) > 1:
            text = f"{engine}: a trial among many costs no more than {ALLOWED_GROWTH} times as much as one among few"
            found.append({"text": text, "estimate": slopes[-1] / slopes[0], "wanted": ALLOWED_GROWTH})
    return [{**one, "metric": "ratio", "reason": "", "verdict": _verdict(one)} for one in found]


def page(found: dict[str, Any]) -> str:
    from openwork.report.tables import markdown

    machine = found["environment"]
    over = [
        [row["engine"], f"{row['trials']:,}", f"{row['seconds']:.2f}", f"{1e3 * row['seconds'] / row['trials']:.0f}",
         "–" if row["ms_a_further_trial"] is None else f"{row['ms_a_further_trial']:.0f}"]
        for row in found["overhead"]
    ]  # fmt: skip
    parts = ["plan", "one missing", "results", "write", "report", "second call"]
    grown = [
        [f"{row['stored']:,}", str(row["arms"]), *(f"{row[part]:.2f}" for part in parts), f"{_each(row):.2f}"]
        for row in found["growth"]
    ]
    told = [f"- {one['text']}: {one['estimate']:.2f}, {one['verdict']}" for one in found["claims"]]
    return "\n\n".join(
        [
            "# What a sweep costs beside its trials",
            f"{machine['processor']}, {machine['cores']} cores, openwork {machine['openwork']}, torch {machine['torch']}, "
            f"{found['ray']}, {machine['date']}. Written by `python benchmarks/scale.py`; how to read it is in "
            "[several processes and machines](../scale.md).",
            "## Overhead a trial",
            f"Empty trials, {machine['cores']} at a time: all that is measured is overhead. The first includes what happens "
            "once: a process that imports torch, for Ray one a worker (a Ray that has run trials before has them already).",
            markdown(
                ["engine", "trials", "seconds", "ms a trial", "ms a further trial"], over, [False, True, True, True, True]
            ),
            _compared(found["overhead"]),
            "## How a second call grows",
            "Seconds for results as large as a comparison's (100 points of a curve, 10 layers). *plan*: find every finished "
            "trial; *one missing*: the same when one is not there, and older versions are looked for; *results*, *write*, "
            "*report*: intervals, results.json, report.html. A second call is all but *one missing*. More arms cost figures "
            "and tables, too.",
            markdown(["stored", "arms", *parts, "ms a trial"], grown, [True] * (len(parts) + 3)),
            "## Bounds",
            "\n".join(told),
        ]
    )


def _each(row: dict[str, Any]) -> float:
    """Return the milliseconds of a second call that fall on one result."""
    return float(1e3 * row["second call"] / row["stored"])


def _further(few: dict[str, Any], many: dict[str, Any]) -> float:
    """Return the milliseconds that a second call takes longer for each result that `many` has more than `few`."""
    return float(1e3 * (many["second call"] - few["second call"]) / (many["stored"] - few["stored"]))


def _compared(rows: list[dict[str, Any]]) -> str:
    """Return one sentence: a further trial of each engine against the local one, over the sizes both have."""
    slopes = {(row["engine"], row["trials"]): row["ms_a_further_trial"] for row in rows}
    engines = [engine for engine in dict.fromkeys(row["engine"] for row in rows) if engine != "local"]
    said = []
    for engine in engines:
        pairs = [(slopes[engine, n], slopes["local", n]) for e, n in slopes if e == engine and slopes.get(("local", n))]
        ratios = [there / here for there, here in pairs if there]
        if ratios:
            said.append(f"A further trial under {engine} takes {statistics.median(ratios):.2f} times the local one's time.")
    return " ".join(said)


def _verdict(one: dict[str, Any]) -> str:
    return "holds" if one["estimate"] <= one["wanted"] else "fails"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, nargs="*", default=[10, 100, 1000])
    parser.add_argument("--stored", type=int, nargs="*", default=[100, 1000, 5000])
    parser.add_argument("--engines", nargs="*", default=catalog.names())
    parser.add_argument("--out", type=Path, default=FOLDER)
    given = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # children import this file as `scale`
    known = read_json(given.out / "scale.json") or {}
    shapes = [(stored, ARMS) for stored in sorted(given.stored)]
    shapes += [(1000, WIDE)] if 1000 in given.stored else []
    grown = growth(shapes) if given.stored else known.get("growth", [])
    overheads = [row for row in known.get("overhead", []) if row["engine"] not in given.engines or not given.trials]
    for engine in given.engines if given.trials else ():
        overheads += overhead(engine, sorted(given.trials))
    version = f"Ray {cluster.library().__version__}" if any(row["engine"] == "ray" for row in overheads) else "no Ray"
    found = {
        "format": 1, "kind": "scale", "name": "scale", "rows": [], "ray": version,
        "environment": environment.describe(1, os.cpu_count() or 1),
        "overhead": sorted(overheads, key=lambda row: (row["engine"], row["trials"])), "growth": grown,
        "claims": claims(overheads, grown),
    }  # fmt: skip
    atomic.write_json(given.out / "scale.json", found)
    atomic.write_bytes(given.out / "scale.md", (page(found) + "\n").encode())
    print(given.out / "scale.md")


if __name__ == "__main__":
    main()
