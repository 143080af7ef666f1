"""Names on a plot: beside the ends of its lines where there is room, in a legend where there is not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from openwork.report.style import INK, Style
from openwork.report.text import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE = 520.0  # pixels from which labels stand beside the lines
LINE = 15.0  # pixels between two lines of text
CHAR = 6.4  # pixels that a character takes, generously


def label(
    figure: Figure, axes: Axes, ends: Sequence[tuple[str, float, float]], look: dict[str, Style], width: float
) -> None:
    """Write each line's name beside its end, moved apart where they would touch; or a legend on a narrow plot."""
    if width < WIDE:
        key(figure, [name for name, _, _ in ends], look, width)
        return
    height = 72.0 * figure.get_size_inches()[1]
    box = axes.get_position()
    low, high = axes.get_ylim()
    scale = box.height * height / (high - low)
    axes.set_ylim(low, high)
    ordered = sorted(ends, key=lambda end: end[1])
    wanted = [(y - low) * scale for _, y, _ in ordered]
    for (method, y, x), place in zip(ordered, apart(wanted, LINE, -6.0, box.height * height + 6.0), strict=True):
        at = place / (box.height * height)
        leader = {"arrowstyle": "-", "color": INK, "alpha": 0.3, "linewidth": 0.5, "shrinkA": 5, "shrinkB": 1}
        axes.annotate("", (1.02, at), (x, y), "axes fraction", "data", arrowprops=leader, annotation_clip=False)
        style = look[method]
        axes.plot([1.032], [at], transform=axes.transAxes, clip_on=False, color=style.colour, marker=style.marker,
                  markeredgewidth=0.0, markersize=4.5)  # fmt: skip
        axes.text(1.048, at, visible(method, 26), transform=axes.transAxes, va="center_baseline")


def apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return positions at least `gap` apart, as near as possible (least squares) to `wanted`, which must rise.

    They are then pushed into [low, high]; if they do not fit, they run out of it below.
    """
    blocks: list[tuple[float, int]] = []  # (wanted place of the lowest, size); neighbours that touch become one
    for place in wanted:
        start, size = place, 1
        while blocks and blocks[-1][0] + gap * blocks[-1][1] > start:
            lower, more = blocks.pop()
            start, size = (lower * more + (start - gap * more) * size) / (more + size), more + size
        blocks.append((start, size))
    found = [start + gap * at for start, size in blocks for at in range(size)]
    for at in range(len(found)):
        found[at] = max(found[at], low + gap * at)
    for at in range(len(found)):
        found[-1 - at] = min(found[-1 - at], high - gap * at)
    return found


def beside(names: Sequence[str], width: float) -> float:
    """Return the room on the right for the names: none on a narrow plot."""
    return 40.0 + CHAR * max(len(visible(name, 26)) for name in names) if width >= WIDE else 14.0


def legend_columns(names: Sequence[str], width: float) -> int:
    """Return how many names fit beside one another in a legend."""
    longest = max(len(visible(name, 26)) for name in names)
    return max(1, int((width - 20.0) / (CHAR * longest + 44.0)))


def legend_height(names: Sequence[str], width: float, under: bool = False) -> float:
    """Return the height in pixels of the legend under a plot; 0 where the names stand beside it."""
    if width >= WIDE and not under:
        return 0.0
    return LINE * math.ceil(len(names) / legend_columns(names, width)) + 14.0


def key(figure: Figure, names: Sequence[str], look: dict[str, Style], width: float, under: bool = False) -> None:
    """Draw the legend: to the right of a wide plot, below a narrow one or below panels."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=look[n].colour, linestyle=look[n].line, marker=look[n].marker, markeredgewidth=0.0,
               linewidth=1.2)
        for n in names
    ]  # fmt: skip
    labels = [visible(name, 26) for name in names]
    if width >= WIDE and not under:
        figure.legend(handles, labels, loc="upper right", bbox_to_anchor=(1.0, 1.0), handlelength=1.8)
    else:
        columns = legend_columns(names, width)
        figure.legend(handles, labels, loc="lower left", bbox_to_anchor=(0.0, 0.0), ncols=columns, handlelength=1.8,
                      columnspacing=1.2, labelspacing=0.25)  # fmt: skip
