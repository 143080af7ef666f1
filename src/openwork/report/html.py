"""The report: one HTML file without script or anything to fetch, set like a paper, made from a results file."""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray

from openwork import atomic
from openwork.report import plots
from openwork.report.pictures import first_pictures
from openwork.report.style import LIGHT, PAGE_DARK, PAGE_LIGHT, SANS, TEXT_DARK, TEXT_LIGHT, series
from openwork.report.summary import (
    DENSE,
    Results,
    Row,
    densities,
    failures,
    headline,
    line_of,
    lines,
    losses,
    main_metric,
    rows,
    sentences,
    standings,
)
from openwork.report.tables import Column, claim_cells, columns
from openwork.report.text import NOTHING, count, finite, listing, percent, visible
from openwork.report.text import lines as text_lines

Masks = Mapping[str, Mapping[str, NDArray[np.bool_]]]
WIDE, NARROW = 688.0, 350.0
SHOWN_LOSSES = 50


@dataclass(frozen=True)
class Figure:
    """A plot for a wide and for a narrow page, with its number and caption."""

    number: int
    caption: str
    wide: Markup
    narrow: Markup


def write_report(results: Results, path: Path | str, masks: Masks | None = None) -> Path:
    """Write the report on `results` to `path` and return the path.

    Args:
        results: What `results.json` of a run holds.
        path: The HTML file; replaced atomically.
        masks: Arm -> parameter -> bool array, True = kept: pictures of the first weights.

    Raises:
        StoreError: if the file cannot be written.
    """
    target = Path(path)
    atomic.write_bytes(target, report(results, masks).encode("utf-8", "backslashreplace"))
    return target


def report(results: Results, masks: Masks | None = None) -> str:
    """Return the report on `results` as HTML text; the same input gives the same bytes."""
    css = stylesheet()
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    template = environment().get_template("report.html.j2")
    return template.render(css=Markup(css), policy=policy, **parts(results, masks))


def parts(results: Results, masks: Masks | None = None, figures: Sequence[Figure] | None = None) -> dict[str, Any]:
    """Return what the template `report_body.html.j2` shows of `results`, by the template's names.

    Args:
        results: What `results.json` of a run holds.
        masks: As `write_report` takes them.
        figures: Shown in place of the plots, which take most of the time.
    """
    found = columns(results)
    return {
        "title": title(results),
        "kind": "Study" if results.get("kind") == "study" else "Comparison",
        "byline": _byline(results),
        "headline": headline(results),
        "sentences": sentences(results),
        "asked": list(asked(results.get("recipe") or {})),
        "about": visible(results.get("about") or "", 2000),
        "columns": found,
        "blocks": _blocks(results, found),
        "notes": _notes(results),
        "figures": _figures(results) if figures is None else figures,
        "pictures": _pictures(masks or {}),
        "claims": [_claim(claim) for claim in results.get("claims") or [] if isinstance(claim, Mapping)],
        "failures": failures(results),
        "losses": [_loss(trial) for trial in losses(results)[:SHOWN_LOSSES]],
        "unshown": max(0, len(losses(results)) - SHOWN_LOSSES),
        "machine": [(visible(k, 40), visible(v, 200)) for k, v in (results.get("environment") or {}).items()],
        "command": command(results),
        "recipe": recipe_text(results),
        "version": visible((results.get("environment") or {}).get("openwork", ""), 20),
    }


@cache
def environment(*packages: str) -> Environment:
    """Return the template environment: everything is escaped, an unknown name is an error.

    Args:
        packages: Packages whose `templates` stand before those of the report.
    """
    return Environment(
        loader=ChoiceLoader([PackageLoader(package) for package in (*packages, "openwork.report")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def stylesheet() -> str:
    """Return the page's style with the colours of the plots."""
    text = resources.files("openwork.report").joinpath("templates", "report.css").read_text(encoding="utf-8")
    values = {"page-light": PAGE_LIGHT, "page-dark": PAGE_DARK, "text-light": TEXT_LIGHT, "text-dark": TEXT_DARK}
    values |= {"series-light": series(), "series-dark": series(dark=True), "sans": SANS}
    for name, value in values.items():
        text = text.replace(f"/*{name}*/", value)
    return text


def title(results: Results) -> str:
    """Return the report's title: the study's name, or model and data of a comparison."""
    recipe = results.get("recipe") or {}
    if results.get("kind") != "study" and isinstance(recipe.get("model"), str) and isinstance(recipe.get("data"), str):
        return f"{visible(recipe['model'], 60)} on {visible(recipe['data'], 60)}"
    return visible(results.get("name"), 120)


def command(results: Results) -> str:
    """Return the command that makes these results again."""
    if results.get("kind") == "study":
        preset = results.get("preset")
        words = ["openwork", "study", visible(results.get("name"), 120)]
        return shlex.join([*words, "--preset", visible(preset, 40)] if preset else words)
    return "openwork compare recipe.yaml"


def recipe_text(results: Results) -> str:
    """Return the recipe as YAML, exactly; written in ASCII where a reader could not see what it holds."""
    recipe = json.loads(json.dumps(results.get("recipe") or {}))
    text = results.get("recipe_text")
    if not isinstance(text, str):
        text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100)
    hidden = any(visible(line, 10**6) != line for line in text.split("\n"))
    return yaml.safe_dump(recipe, sort_keys=False, width=100) if hidden else text


def asked(recipe: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield key and value of a recipe for reading; keys without a value are left out, nested ones get a dot."""
    for key, value in recipe.items():
        name = visible(f"{prefix}{key}", 60).replace("_", " ")
        if isinstance(value, Mapping):
            yield from asked(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            if value:
                yield name, ", ".join(_value(item) for item in value)
        elif value is not None:
            yield name, _value(value)


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else visible(value, 120)


def _byline(results: Results) -> list[str]:
    recipe, machine = results.get("recipe") or {}, results.get("environment") or {}
    sparse = [line for line in lines(results) if line != DENSE]
    shown = [count(len(sparse), "method") + (" and dense" if len(sparse) < len(lines(results)) else "")]
    shown.append(count(len(results.get("trials") or []), "trial"))
    seeds = finite(recipe.get("seeds"))
    if seeds:
        shown.insert(1, count(int(seeds), "seed"))
    if densities(results) and min(densities(results)) < 1.0:
        shown.insert(1, f"{listing([percent(density) for density in densities(results)])} of the weights kept")
    if results.get("preset"):
        shown.append(f"preset {visible(results['preset'], 40)}")
    return [*shown, visible(machine["date"], 40)] if machine.get("date") else shown


def _blocks(results: Results, shown: Sequence[Column]) -> list[dict[str, Any]]:
    """Return the rows in blocks of one density, each cell as text, with the bar of its interval."""
    order = lines(results)
    span = _span(results)
    best = {id(standing.best) for standing in standings(results) if standing.rivals}
    blocks: list[dict[str, Any]] = []
    for row in rows(results):
        place = DENSE if row.get("method") == DENSE else percent(row.get("density"))
        if not blocks or blocks[-1]["place"] != place:
            blocks.append({"place": place, "rows": []})
        colour = _colour(line_of(row), order)
        cells = [column.cell(row) for column in shown]
        bar = _bar(row, span, _reference(results), colour) if span else None
        blocks[-1]["rows"].append({"cells": cells, "colour": colour, "bar": bar, "best": id(row) in best})
    return blocks


def _colour(line: str, order: Sequence[str]) -> str:
    """Return the class of a line's colour, the same as in the plots."""
    sparse = [name for name in order if name != DENSE]
    return "dense" if line == DENSE else f"s{sparse.index(line) % len(LIGHT)}"


def _span(results: Results) -> tuple[float, float] | None:
    """Return the smallest and largest bound of all intervals of the main metric."""
    bounds = [finite((row.get("accuracy") or {}).get(name)) for row in rows(results) for name in ("mean", "low", "high")]
    known = [bound for bound in bounds if bound is not None]
    return (min(known), max(known)) if known and max(known) > min(known) else None


def _reference(results: Results) -> float | None:
    return next((finite((r.get("accuracy") or {}).get("mean")) for r in rows(results) if r.get("method") == DENSE), None)


def _bar(row: Row, span: tuple[float, float], reference: float | None, colour: str) -> dict[str, Any] | None:
    """Return the places, 0 to 100, of a row's interval and mean and of dense on the common axis."""
    accuracy = row.get("accuracy") or {}
    mean = finite(accuracy.get("mean"))
    if mean is None:
        return None

    def at(value: float) -> float:
        return round(4.0 + 92.0 * (value - span[0]) / (span[1] - span[0]), 2)

    low, high = (mean if (bound := finite(accuracy.get(side))) is None else bound for side in ("low", "high"))
    dense = None if reference is None else at(reference)
    return {"low": at(low), "mean": at(mean), "high": at(high), "dense": dense, "colour": colour}


def _notes(results: Results) -> list[str]:
    """Return what the table's rows have to say for themselves, each note once."""
    told: dict[str, list[str]] = {}
    for row in rows(results):
        if row.get("note"):
            told.setdefault(visible(row["note"], 200), []).append(visible(row.get("arm"), 60))
    return [f"{listing(arms)}: {note}." for note, arms in told.items()]


def captions(results: Results) -> dict[str, str]:
    """Return the caption of each figure of a report by the name of the function of `plots` that draws it."""
    what = visible(main_metric(results).heading, 40)
    what = what[:1].upper() + what[1:]
    return {
        "accuracy": f"{what} with 95 % intervals over seeds; the grey band is dense.",
        "cost": f"{what} against what training cost, in floating-point operations relative to dense.",
        "layers": "Share of weights kept in each layer, the mean over seeds; the thin line is the whole model.",
        "loss": "Training loss, the mean over seeds.",
    }


def _figures(results: Results) -> list[Figure]:
    found: list[Figure] = []
    for name, caption in captions(results).items():
        draw = getattr(plots, name)
        wide = draw(results, WIDE, f"{name}-wide")
        if wide:
            narrow = draw(results, NARROW, f"{name}-narrow")
            found.append(Figure(len(found) + 1, caption, Markup(wide), Markup(narrow)))
    return found


def _pictures(masks: Masks) -> list[tuple[str, list[tuple[str, Markup]]]]:
    found = []
    for at, (arm, own) in enumerate(masks.items()):
        drawn = [(name, Markup(svg)) for name, svg in first_pictures(own, f"mask-{at}")]
        if drawn:
            found.append((visible(arm, 60), drawn))
    return found


def _claim(claim: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Return a claim's verdict, its class for the style, its sentence, and what the verdict rests on."""
    verdict = visible(claim.get("verdict"), 20)
    text, estimate, interval, p = claim_cells(claim)
    reason = visible(claim.get("reason") or "", 300)
    parts = [f"Estimate {estimate}, interval {interval}"] if interval != NOTHING else []
    if parts and p != NOTHING:
        parts[0] += f", corrected p {p}"
    parts += [reason[:1].upper() + reason[1:]] if reason else []
    kind = verdict if verdict in ("holds", "leans", "fails") else "untested"
    return verdict, kind, text, " ".join(f"{part}." for part in parts)


def _loss(trial: Mapping[str, Any]) -> tuple[str, str, str, str]:
    error = trial.get("error")
    arm, seed, status = (visible(trial.get(name), 60) for name in ("arm", "seed", "status"))
    return arm, seed, status, text_lines(error, 1000) if error else NOTHING
