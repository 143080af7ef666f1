"""Pages of the documentation's results: one Markdown page a study, and the table of all of them."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from openwork import atomic, registry
from openwork.errors import FormatError, OpenworkError
from openwork.report import plots
from openwork.report.html import asked, command, title
from openwork.report.summary import Results, failures, headline, main_metric, sentences
from openwork.report.svg import standalone
from openwork.report.tables import columns, escape_markdown, markdown, markdown_claims, markdown_table
from openwork.report.text import listing, visible

WIDTH = 720.0
LARGEST = 64 * 2**20
"""A results file beyond so many bytes is not read."""
VERDICTS = ("holds", "leans", "fails", "not testable here")


def write_study_page(results: Results, path: Path | str, figures: Path | str) -> Path:
    """Write a study's page, its figures and, beside the page, its results as JSON; return the page's path.

    Args:
        results: What `results.json` of a run holds.
        path: The Markdown file; the JSON file has its name and `.json`.
        figures: The folder for the SVG files, whose names start with the page's.

    Raises:
        StoreError: if a file cannot be written.
    """
    page, folder = Path(path), Path(figures)
    drawn = _draw(results, page.stem, folder)
    atomic.write_json(page.with_suffix(".json"), _kept(results))
    atomic.write_bytes(page, _page(results, page, drawn).encode("utf-8", "backslashreplace"))
    return page


def write_index(folder: Path | str) -> Path:
    """Write `README.md` of a folder of study pages from the JSON files in it: a row a study with its verdicts.

    Other measured pages, whose JSON has no claims, are listed by their headings.

    Raises:
        FormatError: if a JSON file in the folder is damaged, or no results file and without a page.
        StoreError: if the file cannot be written.
    """
    place = Path(folder)
    body, others = [], []
    for path in sorted(place.glob("*.json")):
        heading = _heading(path.with_suffix(".md"))
        if heading and "claims" not in _read(path):
            others.append(f"- [{escape_markdown(heading)}]({quote(path.stem)}.md)")
            continue
        found = read_results(path)
        name = escape_markdown(title(found))
        linked = f"[{name}]({quote(path.stem)}.md)" if path.with_suffix(".md").exists() else name
        machine = found.get("environment") or {}
        facts = (found.get("preset") or NONE, (found.get("recipe") or {}).get("seeds") or NONE)
        made = (machine.get("openwork") or NONE, machine.get("date") or NONE)
        body.append([linked, _verdicts(found), *(escape_markdown(visible(fact, 40)) for fact in (*facts, *made))])
    text = "# Results\n\n"
    if body:
        titles = ["study", "verdicts", "preset", "seeds", "openwork", "date"]
        text += markdown(titles, body, [False, False, False, True, False, False]) + f"\n{RULES}"
    else:
        text += "No study has been run yet.\n"
    if others:
        text += "\nMeasured besides:\n\n" + "\n".join(others) + "\n"
    target = place / "README.md"
    atomic.write_bytes(target, text.encode("utf-8", "backslashreplace"))
    return target


def read_results(path: Path | str) -> dict[str, Any]:
    """Return the content of a results file.

    Raises:
        FormatError: if it cannot be read, is too large, or is no results file of format 1.
    """
    place = Path(path)
    found = _read(place)
    if found.get("format") != 1 or not isinstance(found.get("rows"), list):
        raise FormatError(f"{str(place)!r} is no results file of format 1: expected an object with 'format': 1 and 'rows'")
    return found


def _read(place: Path) -> dict[str, Any]:
    try:
        size = place.stat().st_size
        found = json.loads(place.read_text(encoding="utf-8")) if size <= LARGEST else None
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"cannot read {str(place)!r} as results: {error}; write it again with `openwork`") from error
    if found is None and size > LARGEST:
        raise FormatError(f"{str(place)!r} has {size:,} bytes; a results file has at most {LARGEST:,}")
    return found if isinstance(found, dict) else {}


def _heading(page: Path) -> str:
    """Return the heading of a page, empty where there is none."""
    try:
        with page.open(encoding="utf-8", errors="replace") as lines:
            first = lines.readline(1000).strip()
    except OSError:
        return ""
    return visible(first.removeprefix("# "), 80) if first.startswith("# ") else ""


NONE = "–"
RULES = (
    "*holds*: shown at 5 % after Holm's correction over the study's claims. *leans*: the estimate is on the claimed side,\n"
    "but not shown. *fails*: it is on the other side. *not testable here*: too few seeds, or not measured at this scale.\n"
)


def _page(results: Results, page: Path, drawn: list[tuple[str, str]]) -> str:
    parts = [f"# {escape_markdown(title(results))}", escape_markdown(headline(results))]
    parts += _paper(results) if results.get("kind") == "study" else []
    claims = [claim for claim in results.get("claims") or [] if isinstance(claim, Mapping)]
    if claims:
        parts += ["## Claims", markdown_claims(claims), RULES]
    parts += ["## Results"]
    if results.get("rows"):
        means = "; ".join(f"{c.title}: {c.meaning}" for c in columns(results) if c.meaning)
        parts += [markdown_table(results), f"{escape_markdown(means)}. Intervals are 95 %, Student's t over seeds."]
    told = sentences(results)
    if told and not claims:
        parts.append("\n".join(f"- {escape_markdown(place)}: {escape_markdown(sentence)}" for place, sentence in told))
    parts.append(escape_markdown(failures(results)))
    parts += [f"![{caption}]({_relative(page, name)})" for name, caption in drawn]
    if results.get("about"):
        parts += ["## What this scale can and cannot show", escape_markdown(visible(results["about"], 2000))]
    settings = [[escape_markdown(k), escape_markdown(v)] for k, v in asked(results.get("recipe") or {})]
    if results.get("preset"):
        settings.insert(0, ["preset", escape_markdown(visible(results["preset"], 40))])
    if settings:
        parts += ["## Settings", markdown(["setting", "value"], settings, [False, False])]
    machine = [[escape_markdown(visible(k, 40)), escape_markdown(visible(v, 200))]
               for k, v in (results.get("environment") or {}).items()]  # fmt: skip
    if machine:
        parts += ["## Where it ran", markdown(["", ""], machine, [False, False])]
    parts += ["## Run it again", _code(command(results))]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _code(text: str) -> str:
    """Return a line of code: as a fence, or as HTML where a template engine could find something in it."""
    if re.fullmatch(r"[\w :./=-]*", text):
        return f"```sh\n{text}\n```"
    return f"<pre>{re.sub(r'[^A-Za-z0-9 ]', lambda found: f'&#{ord(found.group())};', text)}</pre>"


def _paper(results: Results) -> list[str]:
    """Return what the paper claims and where to read it, if the study is that of a method with a card."""
    try:
        card = registry.card(str(results.get("name")))
    except OpenworkError:
        return []
    who = card.authors[0] + (
        " and others" if len(card.authors) > 2 else f" and {card.authors[1]}" if card.authors[1:] else ""
    )
    source = escape_markdown(f"{who}, \u201c{card.title}\u201d, {card.venue} {card.year}")
    parts = ["## The paper", f"{escape_markdown(card.claim)}", f"[{source}](<{card.link}>)"]
    if card.departures:
        parts.append("Departures: " + " ".join(escape_markdown(line) for line in card.departures))
    return parts


def _draw(results: Results, stem: str, folder: Path) -> list[tuple[str, str]]:
    """Write the figures that show something; return each one's path and caption."""
    what = escape_markdown(visible(main_metric(results).heading, 40))
    made = (
        (plots.accuracy, f"{what} against density, 95 % intervals"),
        (plots.cost, f"{what} against training FLOPs"),
        (plots.layers, "weights kept in each layer"),
    )
    found = []
    for draw, caption in made:
        svg = draw(results, WIDTH, draw.__name__)
        if svg:
            path = folder / f"{stem}-{draw.__name__}.svg"
            atomic.write_bytes(path, standalone(svg).encode("utf-8", "backslashreplace"))
            found.append((str(path), caption))
    return found


def _relative(page: Path, target: str) -> str:
    """Return the way from a page to a file as a Markdown link's target."""
    return quote(Path(os.path.relpath(target, page.parent)).as_posix())


def _kept(results: Results) -> dict[str, Any]:
    """Return the results without curves, and with null for numbers that JSON does not know."""
    trials = [{k: v for k, v in trial.items() if k != "curves"} for trial in results.get("trials") or []]
    text = json.dumps({**results, "trials": trials}, ensure_ascii=False).encode("utf-8", "replace")
    plain: dict[str, Any] = json.loads(text, parse_constant=lambda _word: None)
    return plain


def _verdicts(results: Results) -> str:
    """Return how many claims came out how; for a comparison, its headline."""
    claims = results.get("claims") or []
    if not claims:
        return escape_markdown(headline(results))
    kinds = Counter(str(claim.get("verdict")) for claim in claims)
    known = [f"{kinds[verdict]} {verdict}" if len(claims) > 1 else verdict for verdict in VERDICTS if kinds[verdict]]
    return listing(known) if known else NONE
