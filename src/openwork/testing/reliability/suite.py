"""R28, R29: the test suite itself: is it flaky, and does it notice when the code changes."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from openwork.core.rng import derive
from openwork.errors import MissingExtra
from openwork.testing.reliability import _children, mutation
from openwork.testing.reliability._rows import Measured, Part, Parts, Scale, complaints, total

ROOMS = ("core", "sparsifier", "runtime", "bench")
MUTANTS = 12
"""Mutants a module in the long form."""
COVERED, KILLED = 0.95, 0.85
REPEATS = 50


def shuffled(seed: int, paths: tuple[str, ...], processes: int) -> Part:
    """Run tests in an order and with hash and hypothesis seeds of their own, and count what fails."""
    root = _checkout()
    if processes == 1:
        found = _children.call(_children.tests, str(root), list(paths), seed).value or {"passed": 0, "failed": ["pytest"]}
        return {"cases": found["passed"] + len(found["failed"]), "wrong": found["failed"]}
    environment = {
        **_children.environment(), "OPENWORK_ORDER": str(seed), "PYTHONHASHSEED": str(derive(seed, "hash") % 2**32)
    }  # fmt: skip
    command = [
        sys.executable, "-m", "pytest", "-p", "openwork.testing.reliability._shuffle", "-p", "no:cacheprovider",
        "--no-header", "-n", str(processes), *paths,
    ]  # fmt: skip
    began = time.monotonic()
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    passed = sum(int(count) for count in re.findall(r"(\d+) passed", done.stdout[-2000:]))
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    odd = [f"pytest ended with status {done.returncode}: {done.stdout[-200:]}"] if done.returncode and not failed else []
    return {"cases": passed + len(failed), "wrong": [*failed, *odd], "seconds": time.monotonic() - began}


def _shuffles(scale: Scale) -> Parts:
    if scale == "short":
        return {"order 0": partial(shuffled, 0, ("tests/core/test_schedules.py", "tests/core/test_rng.py"), 1)}
    return {f"order {seed}": partial(shuffled, seed, ("tests",), os.cpu_count() or 1) for seed in range(REPEATS)}


def _judge_shuffles(found: Mapping[str, Part]) -> Measured:
    bad = sum(len(part["wrong"]) for part in found.values())
    value = f"{bad} failures in {len(found)} shuffled runs of {max(p['cases'] for p in found.values()):,} tests"
    return Measured(value, bad == 0 and all(part["cases"] for part in found.values()), complaints(found, most=6))


def covered(sources: str, tests: str) -> Part:
    """Measure the lines and branches of `sources` that `tests` go through, in a process of its own."""
    try:
        import coverage
    except ImportError:
        raise MissingExtra("coverage is not installed; pip install coverage (it comes with openwork[dev])") from None
    root = _checkout()
    with _children.folder() as folder:
        environment = {**_children.environment(), "COVERAGE_FILE": str(folder / "data"), "COVERAGE_CORE": "ctrace"}
        command = [
            sys.executable, "-m", "coverage", "run", "--branch", f"--include={root / 'src/openwork' / sources}", "-m",
            "pytest", "-q", "-p", "no:cacheprovider", "--no-header", tests,
        ]  # fmt: skip
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
        data = coverage.Coverage(data_file=str(folder / "data"))
        data.load()
        with contextlib.redirect_stdout(io.StringIO()):
            share = data.report(show_missing=False, file=io.StringIO(), ignore_errors=True) / 100
    failed = [f"its tests fail: {done.stdout[-200:]}"] if done.returncode else []
    return {"cases": 1, "wrong": failed, "share": share}


def mutated(module: str, count: int) -> Part:
    """Change one thing at a time in a module of core and count the changes that its tests notice."""
    root = _checkout()
    tests = mutation.files_of(root, module)
    ended = _children.call(mutation.survey, str(root), module, tests, count, timeout=3600.0)
    found: Part = ended.value or {"cases": 0, "killed": 0, "wrong": [f"the survey ended with status {ended.code}"]}
    return found


def _coverages(scale: Scale) -> Parts:
    if scale == "short":
        return {
            "coverage of core/schedules.py": partial(covered, "core/schedules.py", "tests/core/test_schedules.py"),
            "mutants of schedules": partial(mutated, "schedules", 4),
        }
    rooms: Parts = {f"coverage of {room}": partial(covered, f"{room}/*", f"tests/{room}") for room in ROOMS}
    modules = sorted(path.stem for path in (_checkout() / "src/openwork/core").glob("[!_]*.py"))
    return {**rooms, **{f"mutants of {name}": partial(mutated, name, MUTANTS) for name in modules}}


def _judge_coverages(found: Mapping[str, Part]) -> Measured:
    shares = {name.removeprefix("coverage of "): part["share"] for name, part in found.items() if "share" in part}
    mutants = {name: part for name, part in found.items() if name.startswith("mutants")}
    score = total(mutants, "killed") / max(1, total(mutants, "cases"))
    told = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    value = f"lines and branches: {told or 'not measured'}; {score:.0%} of {total(mutants, 'cases')} mutants of core noticed"
    good = bool(shares) and min(shares.values()) >= COVERED and score >= KILLED and not complaints(found)
    low = [f"{name} is below {COVERED:.0%}" for name, share in shares.items() if share < COVERED]
    left = complaints(mutants, "survivors", most=4) if score < 1 else ""
    remains = [*low, complaints(found), f"not noticed, or the same program: {left}" if left else ""]
    return Measured(value, good, "; ".join(filter(None, remains)))


def _checkout() -> Path:
    root = _children.checkout()
    if root is None:
        raise MissingExtra("the tests are not here: run this in a checkout of the source")
    return root


FLAKY = _shuffles, _judge_shuffles
COVERAGE = _coverages, _judge_coverages
