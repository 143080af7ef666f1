"""What a sweep leaves behind: latency, results.json, the table, the report, the models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rich.console import Console

from openwork import atomic
from openwork.lab import sweep
from openwork.lab.recipe import Recipe
from openwork.lab.sweep import Plan


def comparison(made: Plan, recipe: Recipe, console: Console) -> None:
    """Measure latency, write results, models and report, and print the table."""
    from openwork.lab import latency

    found = sweep.results(made, threads=recipe.threads, workers=recipe.workers)
    if recipe.latency:
        with console.status("measuring speed side by side ..."):
            found["latency"] = latency.measure(made, recipe)
        for row in found["rows"]:
            row["latency"] = found["latency"].get(row["arm"], {}).get("ratio")
    models = latency.first_models(made)
    for arm, path in models.items():
        atomic.write_bytes(made.store.folder / "models" / f"{file_name(arm)}.safetensors", path.read_bytes())
    report(made, found, console, masks={arm: _kept(path) for arm, path in models.items()})


def study(made: Plan, console: Console, *, preset: str, threads: int, workers: int, docs: Path | None) -> None:
    """Write results, report and, if asked, the page of the results folder; print table and verdicts."""
    found = sweep.results(made, preset=preset, threads=threads, workers=workers)
    report(made, found, console)
    if docs is not None:
        from openwork.report import pages

        pages.write_study_page(found, docs / f"{made.study.name}.md", docs / "figures")
        pages.write_index(docs)


def report(made: Plan, found: dict[str, Any], console: Console, masks: Any = None) -> None:
    """Write results.json, recipe.yaml and report.html, and print the tables."""
    from openwork.report import html, tables

    path = sweep.write(made, found)
    console.print(tables.results_table(found))
    if found["claims"]:
        console.print(tables.claims_table(found["claims"]))
    html.write_report(found, made.store.folder / "report.html", masks)
    console.print(f"{path}\n{made.store.folder / 'report.html'}", highlight=False, markup=False)


def file_name(arm: str) -> str:
    """Return an arm's name as a file name: letters, digits and `.=@-` stay."""
    return re.sub(r"[^A-Za-z0-9.=@-]+", "-", arm).strip("-.") or "arm"


def _kept(path: Path) -> dict[str, Any]:
    from openwork import saving

    state = saving.load_state(path)
    return {name: (value != 0).numpy() for name, value in state.items() if value.dim() >= 2}
