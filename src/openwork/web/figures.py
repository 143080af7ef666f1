"""Plots as the page shows them: pictures of their own that are drawn when they are looked at.

Matplotlib's settings belong to the whole process, so one plot is drawn at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from openwork.report import plots
from openwork.report.html import NARROW, WIDE, Figure, captions
from openwork.report.series import accuracy_series, layer_series, loss_series
from openwork.report.style import INK, LIGHT, picture_css
from openwork.report.summary import densities
from openwork.report.svg import render
from openwork.report.text import visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

POINTS = 1200
MOST = 8
HEIGHT = 240.0
WIDTHS = {"wide": WIDE, "narrow": NARROW}
DRAWING = threading.RLock()
_Results = Mapping[str, Any]


def pictures(results: _Results, address: str) -> list[Figure]:
    """Return the figures of a run that have something to show, each a picture to be fetched from below `address`."""
    there = {
        "accuracy": bool(accuracy_series(results)[0]),
        "cost": bool(accuracy_series(results, against="training_flops")[0]),
        "layers": any(layer_series(results, density) for density in densities(results)),
        "loss": any(loss_series(results, density) for density in densities(results)),
    }
    shown = [(name, caption) for name, caption in captions(results).items() if there[name]]
    return [
        Figure(at + 1, caption, *(picture(f"{address}/{name}-{size}.svg", caption, width) for size, width in WIDTHS.items()))
        for at, (name, caption) in enumerate(shown)
    ]


def picture(address: str, caption: str, width: float) -> Markup:
    """Return the element that shows the plot at an address, with room kept for it until it is there."""
    size = 'width="{:.0f}" height="{:.0f}"'
    return Markup(f'<img class="plot" src="{{}}" alt="{{}}" {size} loading="lazy">').format(address, caption, width, 340)


def draw(results: _Results, name: str, size: str) -> str:
    """Return one figure of a run as an SVG file; empty if it has nothing to show.

    Args:
        results: of the run.
        name: "accuracy", "cost", "layers" or "loss".
        size: "wide" or "narrow".
    """
    with DRAWING:
        svg = str(getattr(plots, name)(results, WIDTHS[size], name))
    return alone(svg) if svg else ""


def alone(svg: str) -> str:
    """Return a plot as a file that follows the reader's light or dark page."""
    head, body = svg.split(">", 1)
    return f"{head}><style>{picture_css()}</style>{body}"


def curves(kept: Mapping[str, Sequence[Sequence[float]]], address: str) -> list[Figure]:
    """Return a figure for each curve of at least two points, at most eight, to be fetched from below `address`.

    Args:
        kept: name -> [step, value] pairs of finite numbers.
        address: of the trial's curves.
    """
    made: list[Figure] = []
    for at, (name, points) in enumerate(_drawn(kept)):
        shown, values = visible(name, 40), [y for _, y in points]
        told = f"from {values[0]:.4g} to {values[-1]:.4g}, lowest {min(values):.4g}, highest {max(values):.4g}"
        caption = f"{shown[:1].upper()}{shown[1:]} against the optimizer step: {told}; {len(points):,} points."
        wide, narrow = (picture(f"{address}/{at}-{size}.svg", caption, width) for size, width in WIDTHS.items())
        made.append(Figure(at + 1, caption, wide, narrow))
    return made


def draw_curve(kept: Mapping[str, Sequence[Sequence[float]]], number: int, size: str) -> str:
    """Return one curve of a trial, numbered as by `curves`, as an SVG file; empty if there is none."""
    drawn = _drawn(kept)
    if number >= len(drawn):
        return ""
    name, points = drawn[number]
    with DRAWING:
        return alone(_draw(visible(name, 40), points, WIDTHS[size]))


def thinned(points: Sequence[Sequence[float]], most: int = POINTS) -> list[Sequence[float]]:
    """Return at most about `most` points that keep every stretch's lowest and highest value, the ends included."""
    if len(points) <= most:
        return list(points)
    chosen = {0, len(points) - 1}
    parts = most // 2
    for part in range(parts):
        stretch = range(part * len(points) // parts, (part + 1) * len(points) // parts)
        chosen |= {min(stretch, key=lambda at: points[at][1]), max(stretch, key=lambda at: points[at][1])}
    return [points[at] for at in sorted(chosen)]


def _drawn(kept: Mapping[str, Sequence[Sequence[float]]]) -> list[tuple[str, Sequence[Sequence[float]]]]:
    return [(name, points) for name, points in kept.items() if len(points) > 1][:MOST]


def _draw(name: str, points: Sequence[Sequence[float]], width: float) -> str:
    x, y = zip(*thinned(points), strict=True)
    log = min(y) > 1e-100 and max(y) > 20.0 * min(y)

    def fill(figure: Drawing) -> None:
        left, top, bottom = 56.0, 10.0, 42.0
        box = (left / width, bottom / HEIGHT, (width - left - 14.0) / width, (HEIGHT - top - bottom) / HEIGHT)
        axes = figure.add_axes(box)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(name if len(name) <= 24 else name[:23] + "…")
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _place: f"{value:g}")
            axes.yaxis.set_minor_formatter(lambda _value, _place: "")
        axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.5)
        axes.plot(x, y, color=LIGHT[0], linewidth=1.1)

    return render(fill, width, HEIGHT, name="curve", alt=f"{name} against the optimizer step")
