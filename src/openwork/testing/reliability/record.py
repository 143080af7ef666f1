"""What was measured: parts stored as they come, judged, and written as a page."""

from __future__ import annotations

import hashlib
import platform
import traceback
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import openwork
from openwork import atomic
from openwork.errors import OpenworkError
from openwork.lab import environment
from openwork.lab.store import read_json
from openwork.testing.reliability._rows import Measured, Part, Row, Scale

Tell = Callable[[str, str, int, int], None]
"""Called before each part with the row's key, the part's name, its number from 0, and how many there are."""


def identity() -> dict[str, Any]:
    """Return what a measured figure holds for: versions, processor, threads."""
    import torch

    return {
        "openwork": openwork.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "processor": environment.processor(),
        "threads": torch.get_num_threads(),
    }


def measure(row: Row, scale: Scale, place: Path, tell: Tell, *, again: bool = False) -> dict[str, Any]:
    """Measure what is missing of a row, store each part as it comes, and return the row's entry.

    Args:
        row: what to measure.
        scale: the short or the long form.
        place: the JSON file of all rows; parts of the same scale, code and identity are found there again.
        tell: see `Tell`.
        again: forget the parts that are there.
    """
    known = read_json(place) or {"rows": {}}
    here = {**identity(), "code": _code()}
    entry = known["rows"].get(row.key, {})
    if again or entry.get("scale") != scale or entry.get("identity") != here:
        entry = {"scale": scale, "identity": here, "parts": {}}
    parts = row.parts(scale)
    for number, (name, work) in enumerate(parts.items()):
        if name in entry["parts"]:
            continue
        tell(row.key, name, number, len(parts))
        entry["parts"][name] = _done(work)
        _store(place, row, entry, len(parts))
    _store(place, row, entry, len(parts))
    return dict(entry)


def _code() -> str:
    """Return a digest of the whole source: what is measured, and what measures."""
    found = hashlib.sha256()
    for path in sorted(Path(openwork.__file__).parent.rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()[:12]


def _done(work: Callable[[], Part]) -> Part:
    """Do a part; one that cannot be done says why, and is a part that failed."""
    try:
        return work()
    except (OpenworkError, AssertionError) as error:
        return {"cases": 0, "wrong": [str(error)[:600]], "failed": True}
    except Exception as error:
        return {
            "cases": 0,
            "wrong": [f"{type(error).__name__}: {error}"[:600]],
            "failed": True,
            "trace": traceback.format_exc()[-3000:],
        }


def _store(place: Path, row: Row, entry: dict[str, Any], count: int) -> None:
    """Judge what there is of a row and write it into the file, which others may have changed meanwhile."""
    found = judged(row, entry["parts"])
    entry |= {"value": found.value, "passed": found.passed, "detail": found.detail, "done": len(entry["parts"]), "of": count}
    entry["date"] = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    known = read_json(place) or {"rows": {}}
    known["rows"][row.key] = entry
    atomic.write_json(place, {"format": 1, "rows": known["rows"]})


def judged(row: Row, parts: Mapping[str, Part]) -> Measured:
    """Return the figure of the parts that could be done; a part that could not be done is a target not reached."""
    failed = {name: part["wrong"][0] for name, part in parts.items() if part.get("failed")}
    sound = {name: part for name, part in parts.items() if name not in failed}
    said = "; ".join(f"{name}: {why}" for name, why in list(failed.items())[:3])
    try:
        found = row.judge(sound) if sound else Measured("not measured", False)
    except (KeyError, ValueError, StopIteration):
        found = Measured("not measured in full", False)
    if not failed:
        return found
    return Measured(found.value, False, "; ".join(filter(None, (found.detail, said))))


def page(known: Mapping[str, Any], rows: Mapping[str, Row]) -> str:
    """Return the table as Markdown: figure, target, measured, and what remains where the target is not reached."""
    entries = {key: known["rows"][key] for key in rows if key in known["rows"]}
    reached = [key for key, entry in entries.items() if _reached(entry)]
    lines = [
        "# Reliability, measured", "",
        f"{len(reached)} of {len(rows)} targets reached, {len(entries)} measured. Each figure is measured by "
        "`openwork doctor --long`, which also writes this page; how is told in [reliability](../reliability.md).", "",
        "| | figure | target | measured | reached |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for key, row in rows.items():
        entry = entries.get(key)
        value = "not measured yet" if entry is None else _cell(entry["value"]) + _extent(entry)
        mark = "yes" if key in reached else "no"
        lines.append(f"| {key} | {_cell(row.figure)} | {_cell(row.target)} | {value} | {mark} |")
    lines += ["", "## What remains", ""]
    open_rows = [(key, entries.get(key)) for key in rows if key not in reached]
    for key, entry in open_rows:
        why = "not measured yet" if entry is None else _cell(entry["detail"] or entry["value"], 600) + _extent(entry)
        lines.append(f"* **{key}, {rows[key].figure}**: {why}.")
    lines += [] if open_rows else ["Nothing: every target is reached."]
    notes = [(key, entries[key]["detail"]) for key in reached if entries[key]["detail"]]
    if notes:
        lines += ["", "## Notes to what is reached", "", *(f"* **{key}**: {_cell(text, 400)}." for key, text in notes)]
    lines += ["", "## How and where", "", "| | how | form | date | versions and machine |", "|---|---|---|---|---|"]
    for key, entry in entries.items():
        here = entry["identity"]
        where = (
            f"openwork {here['openwork']} ({here['code']}), torch {here['torch']}, Python {here['python']}, {here['system']}"
        )
        where += f", {here['processor']}, {here['threads']} threads"
        lines.append(f"| {key} | {_cell(rows[key].how, 300)} | {entry['scale']} | {entry['date']} | {_cell(where, 300)} |")
    return "\n".join(lines) + "\n"


def _reached(entry: Mapping[str, Any]) -> bool:
    return bool(entry["passed"]) and entry["done"] == entry["of"]


def _extent(entry: Mapping[str, Any]) -> str:
    part = "" if entry["done"] == entry["of"] else f"{entry['done']} of {entry['of']} parts done"
    form = "short form" if entry["scale"] == "short" else ""
    note = ", ".join(filter(None, (form, part)))
    return f" ({note})" if note else ""


def _cell(text: str, most: int = 260) -> str:
    """Return text that breaks neither table nor markup."""
    plain = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    plain = plain if len(plain) <= most else plain[: most - 1] + "…"
    return plain.replace("|", "\\|").replace("<", "&lt;").rstrip(".")
