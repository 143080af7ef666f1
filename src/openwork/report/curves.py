"""The page of one-shot curves: quality against the share of weights pruned, with knees and their intervals."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from openwork.report.html import NARROW, WIDE, environment, stylesheet
from openwork.report.labels import beside, key, label, legend_height
from openwork.report.plots import _axes
from openwork.report.style import INK, styles
from openwork.report.svg import render
from openwork.report.text import NOTHING, finite, listing, percent, significant, visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Summary = Mapping[str, Any]
"""A curve's numbers: scope, protocol, floor, sparsity, quality, tolerance, knee, hinge, reason and their intervals."""

HEADS = ("scope", "dense", "1 % loss at", "95 %", "knee at", "95 %", "break", "slopes")


def figure(curves: Sequence[Summary], quality: str, width: float = WIDE, name: str = "curves") -> str:
    """Return the plot as SVG text: a line a curve, a bar where the tolerance point and the knee may lie.

    Args:
        curves: at least one.
        quality: what the vertical axis shows.
        width: in CSS pixels.
        name: goes before every id.
    """
    names = [_name(curve, curves) for curve in curves]
    look = styles(names)
    left, right, bottom, plot = 52.0, beside(names, width), 42.0 + legend_height(names, width), 300.0

    def draw(page: Figure) -> None:
        axes = _axes(page, left, 12.0, width - left - right, plot)
        axes.set_xlabel("weights pruned")
        axes.set_ylabel(visible(quality, 40))
        axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.5)
        every = sorted({s for curve in curves for s in curve["sparsity"]})
        ticks = [s for s in every if abs(10 * s - round(10 * s)) < 1e-9] if len(every) > 6 else every
        axes.set_xticks(ticks, [percent(s) for s in ticks])
        floors = {float(curve["floor"]) for curve in curves}
        for floor in floors if max(floors) > 0.0 else ():
            axes.axhline(floor, color=INK, linewidth=0.7, alpha=0.5, dashes=(2.0, 2.0))
        for one, curve in zip(names, curves, strict=True):
            style = look[one]
            axes.plot(curve["sparsity"], curve["quality"], color=style.colour, linestyle=style.line, marker=style.marker,
                      markeredgewidth=0.0, linewidth=1.2)  # fmt: skip
            if curve.get("knee") is not None:
                axes.axvline(curve["knee"], color=style.colour, linewidth=0.9, alpha=0.6)
                low, high = _ends(curve, "hinge_interval")
                if low is not None and high is not None:
                    axes.axvspan(low, high, color=style.colour, alpha=0.12, linewidth=0.0)
        ends = [(one, curve["quality"][-1], curve["sparsity"][-1]) for one, curve in zip(names, curves, strict=True)]
        if len(names) > 1 and width >= 520.0:
            label(page, axes, ends, look, width)
        else:
            key(page, names, look, width)

    return render(draw, width, 12.0 + plot + bottom, name=name, alt=_alt(curves, names, quality))


def rows(curves: Sequence[Summary]) -> list[tuple[str, ...]]:
    """Return the cells of the table under `HEADS`, a row a curve."""
    found: list[tuple[str, ...]] = []
    for curve in curves:
        broken = curve.get("hinge") or {}
        slopes = f"{significant(broken['before'])} to {significant(broken['after'])}" if broken else NOTHING
        found.append((
            _name(curve, curves), significant(curve["quality"][0]), percent(curve.get("tolerance")),
            _interval(curve, "tolerance_interval"), percent(curve.get("knee")),
            _interval(curve, "hinge_interval") if curve.get("knee") is not None else NOTHING,
            percent(broken.get("at")), slopes,
        ))  # fmt: skip
    return found


def points(curves: Sequence[Summary]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return heads and cells of the qualities, a row a sparsity, a column a curve."""
    every = sorted({s for curve in curves for s in curve["sparsity"]})
    known = [dict(zip(curve["sparsity"], curve["quality"], strict=True)) for curve in curves]
    body = [(percent(s), *(f"{one[s]:.4f}" if s in one else NOTHING for one in known)) for s in every]
    return ("pruned", *(_name(curve, curves) for curve in curves)), body


def page(curves: Sequence[Summary], *, title: str, quality: str, facts: Sequence[tuple[str, str]], command: str) -> str:
    """Return the report as one HTML file without script or anything to fetch; the same input gives the same bytes.

    Args:
        curves: at least one.
        title: what was pruned.
        quality: what was measured.
        facts: name and value of what else a reader needs to know.
        command: what makes this page again.
    """
    css = stylesheet()
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    heads, body = points(curves)
    return environment().get_template("curves.html.j2").render(
        css=Markup(css),
        policy=f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'",
        title=visible(title, 120),
        sentences=[(_name(curve, curves), visible(curve["reason"], 300)) for curve in curves],
        wide=Markup(figure(curves, quality, WIDE, "wide")),
        narrow=Markup(figure(curves, quality, NARROW, "narrow")),
        caption=f"{quality[:1].upper()}{quality[1:]} against the weights pruned; a band is the 95 % interval of a knee.",
        tables=[("Marks", HEADS, rows(curves)), ("Points", heads, body)],
        facts=[(visible(name, 40), visible(value, 200)) for name, value in facts],
        command=visible(command, 400),
    )  # fmt: skip


def _name(curve: Summary, curves: Sequence[Summary]) -> str:
    """Return what sets a curve apart: its scope, and its protocol where curves of a scope differ in it."""
    scope = visible(curve["scope"], 40)
    same = [one for one in curves if one["scope"] == curve["scope"]]
    return scope if len(same) == 1 else f"{scope}, {visible(curve['protocol'], 40)}"


def _ends(curve: Summary, name: str) -> tuple[float | None, float | None]:
    low, high = curve.get(name) or (None, None)
    return finite(low), finite(high)


def _interval(curve: Summary, name: str) -> str:
    low, high = _ends(curve, name)
    if curve.get(name) is None or (low is None and high is None):
        return NOTHING
    return f"{percent(low) if low is not None else 'beyond'} to {percent(high) if high is not None else 'beyond'}"


def _alt(curves: Sequence[Summary], names: Sequence[str], quality: str) -> str:
    told = []
    for name, curve in zip(names, curves, strict=True):
        values = [f"{y:.4g} at {percent(s)}" for s, y in zip(curve["sparsity"], curve["quality"], strict=True)]
        told.append(f"{visible(name, 40)} {listing(values)}")
    return f"{visible(quality, 60)} against the share of weights pruned: {'; '.join(told)}."
