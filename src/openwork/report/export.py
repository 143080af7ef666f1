"""Results as tidy CSV, as LaTeX and as Markdown: plain text for other programs, made from a results file."""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from openwork import atomic
from openwork.errors import StoreError
from openwork.report.summary import Results, failures, headline, rows, seeds_of
from openwork.report.tables import escape_markdown, markdown_claims, markdown_table
from openwork.report.text import finite, visible

TRIAL_FIELDS = ("key", "arm", "method", "density", "seed", "status", "error", "seconds")
TABLE_FIELDS = (
    *("arm", "method", "density", "n", "asked", "kept", "training_flops", "inference_flops", "bytes", "latency", "steps"),
    "note",
)
CLAIM_FIELDS = ("claim", "verdict", "metric", "estimate", "low", "high", "adjusted_p", "reason")
_FORMULA = "=+-@\uff1d\uff0b\uff0d\uff20"
_LONGEST = 32_000
"""Spreadsheets cut a cell at 32,767 characters."""


def csv_files(results: Results) -> dict[str, str]:
    """Return file name -> CSV text (RFC 4180, UTF-8): `trials.csv`, `table.csv` and, where there are claims, `claims.csv`.

    `trials.csv` has a row a trial: its key, arm and seed, `settings.NAME` of the arm and `metrics.NAME` of the trial.
    `table.csv` has a row an arm: `accuracy` (the main metric), its paired `difference` from dense and `metrics.NAME`,
    each as mean, low and high of the 95 % interval, and ratios against dense. Numbers have every digit; text that a
    spreadsheet would run starts with an apostrophe.
    """
    files = {"trials.csv": _csv(_trials(results)), "table.csv": _csv(_table(results))}
    if results.get("claims"):
        files["claims.csv"] = _csv(_claims(results))
    return files


def markdown_text(results: Results) -> str:
    """Return headline, table and claims as Markdown."""
    parts = [escape_markdown(headline(results)), escape_markdown(failures(results))]
    parts += [markdown_table(results)] if results.get("rows") else []
    parts += [markdown_claims(results["claims"])] if results.get("claims") else []
    return "\n\n".join(dict.fromkeys(part.strip("\n") for part in parts)) + "\n"


def write_texts(folder: Path, files: Mapping[str, str], *, force: bool = False) -> list[Path]:
    """Write texts into a folder, each atomically, and return their paths.

    Raises:
        StoreError: if one is there and `force` is not given (then nothing is written), or the folder cannot be written.
    """
    paths = [folder / name for name in files]
    refuse_existing(paths, force=force)
    for path, text in zip(paths, files.values(), strict=True):
        atomic.write_bytes(path, text.encode("utf-8", "backslashreplace"))
    return paths


def refuse_existing(paths: Iterable[Path], *, force: bool) -> None:
    """Raise a StoreError that names the first path that is there, unless `force` is given."""
    found = next((path for path in paths if path.is_symlink() or path.exists()), None)
    if found is not None and not force:
        raise StoreError(f"{visible(found, 300)!r} is there; --force writes over it, -o names another place")


def settings_of(results: Results) -> dict[str, dict[str, object]]:
    """Return arm -> what makes it this arm: method, density and `settings.NAME`, nested names with dots."""
    found: dict[str, dict[str, object]] = {}
    for row in results.get("rows") or []:
        found[row["arm"]] = {"method": row.get("method"), "density": row.get("density")}
    for arm in results.get("arms") or []:
        own = {"method": arm.get("method"), "density": arm.get("density")}
        found[arm["name"]] = own | dict(flat(arm.get("settings") or {}, "settings."))
    return found


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield dotted name and value of nested mappings; lists become text with commas."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            listed = isinstance(value, list | tuple)
            yield f"{prefix}{name}", ", ".join(map(str, value)) if listed else value


def made_at(results: Results) -> float | None:
    """Return when the results were made, in seconds since 1970, or None if they do not say."""
    date = str((results.get("environment") or {}).get("date"))
    try:
        return datetime.strptime(date, "%Y-%m-%d %H:%M UTC").replace(tzinfo=UTC).timestamp()
    except ValueError:
        return None


def points_of(trial: Mapping[str, Any]) -> Iterator[tuple[str, int, float]]:
    """Yield curve, step and value of every finite point of a trial's curves."""
    for name, curve in (trial.get("curves") or {}).items():
        for point in curve:
            if len(point) == 2:
                step, value = finite(point[0]), finite(point[1])
                if step is not None and value is not None and abs(step) < 2**62:
                    yield name, int(step), value


def slug(text: str, limit: int = 80) -> str:
    """Return a name as a file name: letters, digits and `.=@-` stay; what was changed ends with a digest of the name."""
    plain = re.sub(r"[^A-Za-z0-9.=@_-]+", "-", text).strip("-.")
    if plain and plain == text and len(text) <= limit:
        return text
    return f"{plain[: limit - 9].rstrip('-.') or 'name'}-{hashlib.sha256(text.encode('utf-8', 'replace')).hexdigest()[:8]}"


def _trials(results: Results) -> Iterator[Sequence[object]]:
    """Yield the title row and a row a trial."""
    trials, known = results.get("trials") or [], settings_of(results)
    settings = _names(known.get(trial["arm"], {}) for trial in trials)
    settings = [name for name in settings if name not in TRIAL_FIELDS]
    metrics = _names(trial.get("metrics") or {} for trial in trials)
    yield [*TRIAL_FIELDS, *settings, *(f"metrics.{name}" for name in metrics)]
    for trial in trials:
        own, found = known.get(trial["arm"], {}), trial.get("metrics") or {}
        seconds = (trial.get("timings") or {}).get("seconds")
        fixed = {**trial, "method": own.get("method"), "density": own.get("density"), "seconds": seconds}
        row = [fixed.get(name) for name in TRIAL_FIELDS]
        yield [*row, *(own.get(name) for name in settings), *(found.get(name) for name in metrics)]


def _table(results: Results) -> Iterator[Sequence[object]]:
    """Yield the title row and a row an arm."""
    found = rows(results)
    intervals = [
        "accuracy",
        "difference",
        *(f"metrics.{name}" for name in _names(row.get("metrics") or {} for row in found)),
    ]
    yield [*TABLE_FIELDS, *(f"{name}.{part}" for name in intervals for part in ("mean", "low", "high"))]
    for row in found:
        known = {**row, **{f"metrics.{name}": value for name, value in (row.get("metrics") or {}).items()}}
        fixed = {**row, "asked": seeds_of(results, row)[1]}
        parts = [(known.get(name) or {}).get(part) for name in intervals for part in ("mean", "low", "high")]
        yield [*(fixed.get(name) for name in TABLE_FIELDS), *parts]


def _claims(results: Results) -> Iterator[Sequence[object]]:
    yield CLAIM_FIELDS
    for claim in results["claims"]:
        yield [claim.get("text"), *(claim.get(name) for name in CLAIM_FIELDS[1:])]


def _names(found: Iterable[Mapping[str, object]]) -> list[str]:
    return list(dict.fromkeys(name for one in found for name in one))


def _csv(rows: Iterable[Sequence[object]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerows([cell(value) for value in row] for row in rows)
    return out.getvalue()


def cell(value: object) -> object:
    """Return a value for a CSV cell: numbers as they are, the rest as text that no spreadsheet runs."""
    if value is None or isinstance(value, float):
        return finite(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    text = visible(value, _LONGEST)
    return "'" + text if text.lstrip().startswith(tuple(_FORMULA)) else text
