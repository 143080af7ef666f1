"""Several runs beside one another: what was asked of each, what each found, and a plot a method."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from openwork.report import plots
from openwork.report.html import NARROW, asked
from openwork.report.series import accuracy_series
from openwork.report.summary import DENSE, Row, line_of, main_metric, rows
from openwork.report.tables import columns
from openwork.report.text import NOTHING, percent, visible
from openwork.web.entry import Entry
from openwork.web.figures import DRAWING, alone

LETTERS = "ABCDEF"
MOST_FIGURES = 12
_Results = Mapping[str, Any]


def side_by_side(runs: Sequence[tuple[Entry, _Results]]) -> dict[str, Any]:
    """Return what the page of several runs shows; they are called A, B, ... in the order given.

    Args:
        runs: entry and results of each, at most six.
    """
    named = list(zip(LETTERS, runs, strict=False))
    differing, same = _settings([found for _, (_, found) in named])
    main = main_metric(named[0][1][1]).name if named else ""
    alike = [(letter, found) for letter, (_, found) in named if main_metric(found).name == main]
    others = [letter for letter, (_, found) in named if main_metric(found).name != main]
    return {
        "runs": [{"letter": letter, "colour": f"s{at}", "entry": entry} for at, (letter, (entry, _)) in enumerate(named)],
        "differing": differing,
        "same": same,
        "metric": visible(main_metric(named[0][1][1]).heading, 40) if named else "",
        "results": _rows([found for _, (_, found) in named]),
        "lines": [visible(name, 40) for name in _lines(alike)],
        "note": f"{', '.join(others)}: another main metric, so not in the plots." if others else "",
    }


def _settings(found: Sequence[_Results]) -> tuple[list[tuple[str, list[str]]], list[tuple[str, str]]]:
    """Return the settings in which the runs differ, a value each, and those in which they are the same."""
    tables = [dict(asked(one.get("recipe") or {})) | _made(one) for one in found]
    names = list(dict.fromkeys(name for table in tables for name in table))
    values = {name: [table.get(name, NOTHING) for table in tables] for name in names}
    differing = [(name, own) for name, own in values.items() if len(set(own)) > 1]
    return differing, [(name, own[0]) for name, own in values.items() if len(set(own)) == 1]


def _made(found: _Results) -> dict[str, str]:
    machine = found.get("environment") or {}
    return {name: visible(machine[name], 60) for name in ("openwork", "torch", "code", "processor") if machine.get(name)}


def _rows(found: Sequence[_Results]) -> list[tuple[str, str, list[str]]]:
    """Return line, density and each run's main metric for every arm that any of the runs has.

    Arms of one name stand in one row: they were asked for the same density, reached to within a weight.
    """
    cells: dict[str, list[str]] = {}
    firsts: dict[str, Row] = {}
    for at, one in enumerate(found):
        shown = next((column for column in columns(one) if column.title == visible(main_metric(one).heading, 30)), None)
        for row in rows(one):
            firsts.setdefault(row["arm"], row)
            cells.setdefault(row["arm"], [NOTHING] * len(found))[at] = shown.cell(row) if shown else NOTHING
    order = sorted(firsts.values(), key=lambda row: (line_of(row) != DENSE, -float(f"{_density(row):.2g}")))
    return [(visible(line_of(row), 40), percent(row.get("density")), cells[row["arm"]]) for row in order]


def draw(runs: Sequence[_Results], number: int) -> str:
    """Return the plot of one method, numbered as in `lines` of `side_by_side`, as an SVG file; empty if there is none."""
    main = main_metric(runs[0]).name
    named = [(letter, found) for letter, found in zip(LETTERS, runs, strict=False) if main_metric(found).name == main]
    names = _lines(named)
    if number >= len(names):
        return ""
    own = [
        {**row, "arm": letter, "method": letter}
        for letter, found in named
        for row in rows(found)
        if line_of(row) == names[number]
    ]
    arms = [{"name": letter, "method": letter} for letter in LETTERS[: len(runs)]]
    with DRAWING:
        svg = plots.accuracy({"columns": runs[0].get("columns"), "arms": arms, "rows": own}, NARROW, "side")
    return alone(svg) if svg else ""


def _lines(runs: Sequence[tuple[str, _Results]]) -> list[str]:
    """Return the methods that have something to plot, those of the most runs first, dense left out."""
    found = Counter(series.name for _, results in runs for series in accuracy_series(results)[0])
    return [name for name, _ in found.most_common(MOST_FIGURES)]


def _density(row: Row) -> float:
    density = row.get("density")
    return float(density) if isinstance(density, int | float) else 0.0
