"""Reading what a run folder holds without trusting it: regular files inside it, of a size that fits, as plain values.

Whatever is wrong is one of openwork's own errors with one sentence; a value of the wrong kind is left out, so that a page
shows the rest.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from openwork.errors import FormatError, StoreError
from openwork.report.pages import LARGEST
from openwork.report.text import lines, visible
from openwork.web.places import TRIAL

LARGEST_TRIAL = 32 * 2**20
LARGEST_LOG = 64 * 2**10
"""Of a log, so many bytes of its end are shown."""
FARTHEST = 1e100
"""Points of a curve farther from zero are left out."""
DEEPEST = 40
LONGEST = 100_000
_TEXTS = ("kind", "name", "preset", "about", "recipe_text")
_TABLES = ("recipe", "environment", "columns", "latency")
_LISTS = ("arms", "trials", "rows", "claims")
_NUMBERS = ("density", "n", "seeds", "kept", "inference_flops", "training_flops", "bytes", "steps", "latency")


def read(folder: Path, *names: str, limit: int, tail: bool = False) -> bytes:
    """Return the bytes of a file of a run folder.

    Args:
        folder: the run folder, resolved.
        names: the way from the folder to the file, a name each.
        limit: the most bytes that are read.
        tail: whether a longer file gives its end; else it is refused.

    Raises:
        FormatError: if the file is longer than `limit`.
        StoreError: if it is not there, is a link or no regular file, lies outside the folder, or cannot be read.
    """
    path, shown = folder.joinpath(*names), visible("/".join(names), 120)
    if Path(os.path.realpath(path.parent)) != path.parent or not path.parent.is_relative_to(folder):
        raise StoreError(f"{shown} lies behind a link that leads out of the run folder and is not read")
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        with os.fdopen(os.open(path, flags), "rb") as stream:
            facts = os.fstat(stream.fileno())
            if not stat.S_ISREG(facts.st_mode):
                raise StoreError(f"{shown} is no regular file and is not read")
            if facts.st_size > limit and not tail:
                raise FormatError(f"{shown} has {facts.st_size:,} bytes; the page reads at most {limit:,}")
            stream.seek(max(0, facts.st_size - limit))
            return stream.read(limit)
    except FileNotFoundError as error:
        raise StoreError(f"there is no {shown}") from error
    except OSError as error:
        reason = "it is a link, which is not followed" if error.errno == errno.ELOOP else error.strerror or str(error)
        raise StoreError(f"cannot read {shown}: {reason}") from error


def read_object(folder: Path, *names: str, limit: int) -> dict[str, Any]:
    """Return the JSON object in a file of a run folder; integers beyond 64 bits, NaN and infinity are None.

    Raises:
        FormatError: if it is no JSON object, or too large.
        StoreError: as `read`.
    """
    raw, shown = read(folder, *names, limit=limit), visible("/".join(names), 120)
    try:
        value = json.loads(raw.decode("utf-8"), parse_int=_integer, parse_constant=lambda _word: None)
    except (ValueError, RecursionError) as error:
        said = "it is nested too deeply" if isinstance(error, RecursionError) else visible(error, 120)
        raise FormatError(f"{shown} is damaged: {said}; the same command writes it anew") from error
    if not isinstance(value, dict):
        raise FormatError(f"{shown} is damaged: it holds no JSON object; the same command writes it anew")
    return value


def results(folder: Path, *, curves: bool = True) -> dict[str, Any]:
    """Return the results of a run, every field of the kind that a report expects.

    Args:
        folder: the run folder, resolved.
        curves: whether the trials' curves are kept, which take most of the time.

    Raises:
        FormatError: if results.json is damaged, too large, or no results file of format 1.
        StoreError: as `read`.
    """
    found = read_object(folder, "results.json", limit=LARGEST)
    if found.get("format") != 1 or not isinstance(found.get("rows"), list):
        raise FormatError("results.json is no results file of format 1; the same command writes it anew")
    return shaped(found, curves=curves)


def shaped(found: Mapping[str, Any], *, curves: bool = True) -> dict[str, Any]:
    """Return results with every field of the kind that a report expects; what is of another kind is left out."""
    made: dict[str, Any] = {name: value if name == "trials" else plain(value) for name, value in found.items()}
    made |= {name: made[name] if isinstance(made.get(name), str) else None for name in _TEXTS}
    made |= {name: _table(made.get(name)) for name in _TABLES}
    made |= {name: [one for one in _list(made.get(name)) if isinstance(one, dict)] for name in _LISTS}
    made["name"] = made["name"] or ""
    made["columns"] = {name: str(heading) for name, heading in made["columns"].items()} or {"accuracy": "accuracy"}
    made["rows"] = [_row(row) for row in made["rows"]]
    made["trials"] = [trial(one if curves else {**one, "curves": None}) for one in made["trials"]]
    made["arms"] = [{**arm, "name": str(arm.get("name", ""))} for arm in made["arms"]]
    return made


def trial(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return a trial's result with every field of the kind that a page expects."""
    seed, error = found.get("seed"), found.get("error")
    return {
        **found,
        "key": str(found.get("key", "")),
        "arm": str(found.get("arm", "")),
        "seed": seed if isinstance(seed, int) and not isinstance(seed, bool) else 0,
        "status": str(found.get("status", "unknown")),
        "metrics": {name: value for name, value in _table(found.get("metrics")).items() if number(value) is not None},
        "curves": {name: _points(points) for name, points in _table(found.get("curves")).items()},
        "layers": {name: layer for name, layer in _table(found.get("layers")).items() if isinstance(layer, dict)},
        "details": plain(_table(found.get("details"))),
        "timings": _table(found.get("timings")),
        "error": error if isinstance(error, str) else None,
    }


def log(folder: Path, key: str) -> str:
    """Return the end of a trial's log as lines that a reader sees; empty if there is none.

    Raises:
        StoreError: as `read`, except where there is no log.
    """
    try:
        raw = read(folder, "trials", key, "log.txt", limit=LARGEST_LOG, tail=True)
    except StoreError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return ""
        raise
    return lines(raw.decode("utf-8", "replace"), LARGEST_LOG).strip("\n")


def progress(folder: Path, key: str) -> float | None:
    """Return the share of a trial that is done, 0 to 1, or None where the trial does not say."""
    with contextlib.suppress(StoreError, FormatError, ValueError):
        share = float(read(folder, "trials", key, "progress.json", limit=100))
        return min(1.0, max(0.0, share)) if math.isfinite(share) else None
    return None


def number(value: object) -> float | None:
    """Return a finite number as a float, None for everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def plain(value: Any, depth: int = 0) -> Any:
    """Return a JSON value without what a page cannot hold: huge numbers become None, long text and deep nesting are cut."""
    if isinstance(value, str):
        return value if len(value) <= LONGEST else value[:LONGEST] + "…"
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return value if abs(value) < 2**63 else None
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if depth >= DEEPEST:
        return "…"
    if isinstance(value, dict):
        return {plain(key): plain(one, depth + 1) for key, one in value.items()}
    return [plain(one, depth + 1) for one in value]


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    made = {**row, "arm": str(row.get("arm", "")), "note": row["note"] if isinstance(row.get("note"), str) else ""}
    made |= {name: row[name] if isinstance(row.get(name), dict) else None for name in ("accuracy", "difference")}
    made["metrics"] = {name: value for name, value in _table(row.get("metrics")).items() if isinstance(value, dict)}
    return made | {name: row[name] if number(row.get(name)) is not None else None for name in _NUMBERS}


def _table(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _integer(digits: str) -> int | None:
    """Return the integer of a JSON number that fits 64 bits."""
    return int(digits) if len(digits) < 19 else None


def _points(points: object) -> list[list[float]]:
    """Return the pairs of numbers in a curve that a plot can hold."""
    pairs = [point for point in _list(points) if isinstance(point, list) and len(point) == 2]
    numbers = ((number(x), number(y)) for x, y in pairs)
    return [[x, y] for x, y in numbers if x is not None and y is not None and max(abs(x), abs(y)) < FARTHEST]


def is_key(text: str) -> bool:
    """Tell whether a text can be the key of a trial in an address."""
    return TRIAL.fullmatch(text) is not None
