"""Pages of the documentation that are made when it is built: a page a method, and the reference.

A method's page comes from its card, its module's docstring and the results in `docs/results`; nothing is imported or
run for it. `docs/_hooks/site.py` gives the pages to MkDocs.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from openwork import registry
from openwork.cards import Card
from openwork.errors import FormatError
from openwork.report.pages import read_results
from openwork.report.summary import Results, headline
from openwork.report.tables import columns, escape_markdown, markdown, markdown_claims
from openwork.report.text import NOTHING, listing, visible

ROOMS = {
    "openwork": "What `import openwork` gives; the methods' classes, each on its own page, are names of it too.",
    "openwork.core": "Masks, patterns, criteria, allocation, schedules: functions of tensors.",
    "openwork.sparsifier": "What holds masks over a model while it trains.",
    "openwork.oneshot": "One-shot pruning of pretrained networks.",
    "openwork.nn": "Layers that are sparse all the time.",
    "openwork.runtime": "Measuring what pays, and running it.",
    "openwork.data": "Data sets, named or your own.",
    "openwork.models": "Networks, named or your own.",
    "openwork.train": "The training loop.",
    "openwork.lab": "Recipes, trials, statistics, claims.",
    "openwork.report": "Tables, plots, pages and exports.",
    "openwork.integrations": "Bridges to other tools.",
    "openwork.testing": "Checks for methods and studies of your own.",
}
"""The rooms of the reference, in order, and what each holds."""
ALONE = {"openwork": ("openwork.saving", "openwork.errors", "openwork.cards", "openwork.registry")}
"""Modules that stand in no room, by the page that shows them."""
WINGS = {"sparsify": "Making networks sparse", "runtime": "Running them fast"}
SECTIONS = ("Claim", "Equations", "Departures", "Cost")
OPTIONS = "    options:\n      heading_level: 2\n      show_root_heading: true\n      show_root_full_path: {full}\n"


@dataclass(frozen=True)
class Page:
    """A page that is made: its path below `docs`, its title in the navigation, its Markdown."""

    path: str
    title: str
    text: str


def method_pages(results: Path) -> list[Page]:
    """Return the page of all methods and a page a method.

    Args:
        results: The folder with the studies' results, `docs/results`.
    """
    found = dict(_results(results))
    cards = [registry.card(name) for name in registry.names()]
    pages = [Page(f"methods/{card.name}.md", card.name, _method(card, found)) for card in cards]
    return [Page("methods/index.md", "All methods", _overview(cards, found)), *pages]


def reference_pages(source: Path) -> list[Page]:
    """Return a page a room of the reference.

    Args:
        source: The folder that holds the package, `src`.
    """
    pages = []
    body = []
    for room, about in ROOMS.items():
        modules = _modules(source, room)
        if not modules:
            continue
        pages.append(Page(f"api/{room}.md", room, _room(room, about, modules)))
        body.append([f"[{room}]({room}.md)", about])
    index = "# Reference\n\n" + markdown(["room", "what it holds"], body, [False, False])
    return [Page("api/index.md", "Rooms", index), *pages]


def sections(docstring: str) -> tuple[str, str, dict[str, str]]:
    """Return a method's summary, its citation and its sections by name from the docstring of its module.

    A section starts at a line with one of the words of `SECTIONS` and a colon, and ends where the next does.
    """
    summary, _, rest = docstring.strip().partition("\n\n")
    parts = re.split(rf"^({'|'.join(SECTIONS)}): ", rest, flags=re.M)
    named = {name: text.strip() for name, text in zip(parts[1::2], parts[2::2], strict=True)}
    return " ".join(summary.split()), " ".join(parts[0].split()), named


def prose(text: str) -> str:
    """Return a docstring's text as Markdown: code stays code, everything else is shown as it stands."""
    parts = re.split(r"(`[^`\n]+`)", text)
    return "".join(part if at % 2 else escape_markdown(part) for at, part in enumerate(parts))


def _method(card: Card, results: Mapping[str, Results]) -> str:
    path = _source(card)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    summary, citation, named = sections(ast.get_docstring(tree) or card.claim)
    entry = next((node for node in tree.body if getattr(node, "name", None) == card.entry), None)
    parts = [f"# {card.name}", prose(summary), f"[{escape_markdown(card.title)}](<{card.link}>)", prose(citation)]
    parts += ["## Claim", escape_markdown(card.claim)]
    if card.aliases:
        parts.append("Also called " + listing([f"`{alias}`" for alias in card.aliases]) + ".")
    for name in SECTIONS[1:]:
        if name in named:
            parts += [f"## {name}", prose(_capital(named[name]))]
    if "Departures" not in named and card.departures:
        parts += ["## Departures", "\n".join(f"- {escape_markdown(line)}" for line in card.departures)]
    parts += ["## Use", _use(card, isinstance(entry, ast.ClassDef))]
    parts += ["## Results", *_found(card, results)]
    parts.append(f"::: {registry.home_of(card.entry)}.{card.entry}\n{OPTIONS.format(full='false')}")
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def _capital(text: str) -> str:
    """Return the text with a capital at its start, unless that is a symbol."""
    return text[:1].upper() + text[1:] if re.match(r"([a-z]{2,}|a)[ ,;:]", text) else text


def _use(card: Card, compared: bool) -> str:
    lines = [f"openwork show {card.name}"]
    lines += [f"openwork compare --methods dense,{card.name}"] if compared else []
    lines += [f"openwork study {card.name} --preset laptop"] if card.name in registry.study_names() else []
    return f"In Python, `openwork.{card.entry}`. From the command line:\n\n```sh\n" + "\n".join(lines) + "\n```"


def _found(card: Card, results: Mapping[str, Results]) -> Iterator[str]:
    """Yield what the results say about a method: its own study's claims, and its rows in all studies."""
    own = results.get(card.name)
    if own is not None:
        yield f"{escape_markdown(headline(own))} The whole page: [{card.name}](../results/{quote(card.name)}.md)."
        claims = [claim for claim in own.get("claims") or [] if isinstance(claim, Mapping)]
        if claims:
            yield markdown_claims(claims)
    others = False
    for name, found in results.items():
        table = _rows(card, found)
        if table and name != card.name:
            yield f"In the study [{escape_markdown(name)}](../results/{quote(name)}.md):"
        elif table:
            yield "Its rows there:"
        yield table
        others = others or bool(table)
    if own is None and not others:
        yield "No study of it has been run yet."


def _rows(card: Card, found: Results) -> str:
    """Return the method's rows of a study as a table, dense first; empty if it has none."""
    rows = [row for row in found.get("rows") or [] if row.get("method") in (card.name, *card.aliases)]
    if not rows:
        return ""
    dense = [row for row in found["rows"] if row.get("method") == "dense"][:1]
    part = {**found, "rows": [*dense, *rows]}
    shown = columns(part)
    body = [[escape_markdown(column.cell(row)) for column in shown] for row in part["rows"]]
    body = [
        [escape_markdown(visible(row.get("arm"), 40)), *cells[1:]] for row, cells in zip(part["rows"], body, strict=True)
    ]
    return markdown([escape_markdown(column.title) for column in shown], body, [column.number for column in shown])


def _overview(cards: Sequence[Card], results: Mapping[str, Results]) -> str:
    parts = ["# Methods", "Each page is made from the method's card, its source and the results of its study."]
    for wing in dict.fromkeys(card.wing for card in cards):
        body = [
            [
                f"[{escape_markdown(card.name)}]({quote(card.name)}.md)",
                escape_markdown(f"{card.authors[0].split()[-1]} {card.year}"),
                _verdicts(results.get(card.name)),
                escape_markdown(card.claim),
            ]
            for card in cards
            if card.wing == wing
        ]
        title = escape_markdown(WINGS.get(wing, wing))
        parts += [f"## {title}", markdown(["method", "paper", "its study", "claim"], body, [False] * 4)]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _verdicts(found: Results | None) -> str:
    kinds = Counter(str(claim.get("verdict")) for claim in (found or {}).get("claims") or [])
    return escape_markdown(", ".join(f"{number} {visible(kind, 20)}" for kind, number in sorted(kinds.items()))) or NOTHING


def _room(room: str, about: str, modules: Iterable[str]) -> str:
    parts = [f"# {room}", about]
    parts += [f"::: {module}\n{OPTIONS.format(full='true')}" for module in modules]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _modules(source: Path, room: str) -> list[str]:
    """Return the public modules of a room that say something, the room's own first where it holds more than a docstring."""
    folder = source.joinpath(*room.split("."))
    paths = sorted(path for path in folder.glob("*.py") if not path.name.startswith("_")) if room != "openwork" else []
    found = [".".join((room, path.stem)) for path in paths if _defines(path)]
    if room == "openwork":
        return [name for name in ALONE[room] if source.joinpath(*name.split(".")).with_suffix(".py").is_file()]
    return found


def _defines(path: Path) -> bool:
    """Tell whether a module has a public function or class."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return any(isinstance(node, kinds) and not node.name.startswith("_") for node in tree.body)


def _source(card: Card) -> Path:
    """Return the file of a method's module."""
    home = registry.home_of(card.entry) or ""
    return Path(registry.__file__).parent.joinpath(*home.split(".")[1:]).with_suffix(".py")


def _results(folder: Path) -> Iterator[tuple[str, Results]]:
    """Yield page name and results of every study in the folder that has a page."""
    for path in sorted(folder.glob("*.json")):
        if path.with_suffix(".md").is_file():
            try:
                yield path.stem, read_results(path)
            except FormatError:  # other measurements lie there too
                continue
