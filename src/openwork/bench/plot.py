"""The plot of the bench: speed-up against sparsity, a panel a shape, a line a way to multiply, crossovers marked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from openwork.bench.curves import Curve, curves, shapes
from openwork.bench.results import Row
from openwork.report.labels import WIDE, key, legend_height
from openwork.report.style import INK, styles
from openwork.report.svg import render
from openwork.report.text import listing, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LEFT, _PLOT, _STEP, _GAP = 44.0, 190.0, 250.0, 18.0


def speedups(rows: Sequence[Row], threads: int, width: float = 720.0, name: str = "speedups") -> str:
    """Return the SVG text of the plot for one number of threads; empty where there is nothing to show.

    A ring on the line of 1 marks the sparsity from which on a line stays above dense. Panels of one row share nothing:
    each has the range that its lines need, on a log scale.
    """
    panels = [(shape, found) for shape in shapes(rows, threads) if (found := curves(rows, shape, threads))]
    if not panels:
        return ""
    names = list(dict.fromkeys(curve.name for _, found in panels for curve in found))
    look = styles(names)
    across = min(len(panels), 3) if width >= WIDE else 1
    each = (width - _LEFT - 16.0 - (_GAP + _LEFT - 14.0) * (across - 1)) / across

    def draw(figure: Figure) -> None:
        for at, (shape, found) in enumerate(panels):
            x, y = _LEFT + (at % across) * (each + _GAP + _LEFT - 14.0), 24.0 + (at // across) * _STEP
            wide, high = (72.0 * size for size in figure.get_size_inches())
            axes = figure.add_axes((x / wide, 1.0 - (y + _PLOT) / high, each / wide, _PLOT / high))
            axes.set_title(shape, loc="left", pad=6.0)
            _scales(axes, found, first=at % across == 0)
            for curve in found:
                style = look[curve.name]
                axes.plot(*zip(*curve.points, strict=True), color=style.colour, linestyle=style.line, marker=style.marker,
                          markeredgewidth=0.0, markersize=4.0, linewidth=1.2)  # fmt: skip
                if curve.crossover is not None and curve.points[0][1] < 1.0:
                    axes.plot([curve.crossover], [1.0], color=style.colour, marker="o", markersize=8.0, fillstyle="none",
                              linestyle="none", zorder=5)  # fmt: skip
        key(figure, names, look, width, under=True)

    height = _STEP * math.ceil(len(panels) / across) + legend_height(names, width, under=True)
    return render(draw, width, height, name=name, alt=_alt(panels, threads))


def _scales(axes: Axes, found: Sequence[Curve], *, first: bool) -> None:
    xs = sorted({x for curve in found for x, _ in curve.points})
    ys = [y for curve in found for _, y in curve.points]
    low, high = min(0.9, *ys) / 1.15, max(1.1, *ys) * 1.15
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    ticks = [
        tick for power in range(-3, 4) for tick in (10.0**power, 2 * 10.0**power, 5 * 10.0**power) if low <= tick <= high
    ]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    room = 0.05 * (xs[-1] - xs[0] or 0.1)
    axes.set_xlim(xs[0] - room, xs[-1] + room)
    shown = [x for at, x in enumerate(xs) if at + 1 == len(xs) or xs[-1] - x > 0.08]
    axes.set_xticks(shown, [f"{100.0 * x:g}" for x in shown])
    axes.set_xlabel("sparsity (%)")
    axes.set_ylabel("times as fast as dense" if first else "")
    axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.5)
    axes.axhline(1.0, color=INK, linewidth=0.9)


def _alt(panels: Sequence[tuple[str, list[Curve]]], threads: int) -> str:
    """Return in words what the plot shows: where each of our lines crosses dense, and where it ends."""
    told = []
    for shape, found in panels:
        told.append(f"{shape}: {listing([_told(curve) for curve in found[:3]])}")
    threaded = f"{threads} thread" + ("s" if threads != 1 else "")
    return f"Speed-up over the best dense torch mode against sparsity, {threaded}. " + "; ".join(told) + "."


def _told(curve: Curve) -> str:
    sparsity, ratio = curve.points[-1]
    crossing = "never faster" if curve.crossover is None else f"faster from {percent(round(curve.crossover, 2))} on"
    return f"{curve.name} {crossing}, {ratio:.2g} times at {percent(sparsity)}"
