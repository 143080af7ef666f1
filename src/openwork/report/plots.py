"""The plots of a results file, each as SVG text: accuracy against density and cost, layers, loss.

Every function takes the results and a width in CSS pixels: from 520 on labels stand beside the lines, below that a
legend stands under the plot. A plot with nothing to show is the empty string.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from openwork.report.labels import CHAR, LINE, WIDE, beside, key, label, legend_height
from openwork.report.series import Series, accuracy_series, layer_series, loss_series
from openwork.report.style import INK, Style, styles
from openwork.report.summary import DENSE, Results, densities, lines, main_metric
from openwork.report.svg import render
from openwork.report.text import listing, percent, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def accuracy(results: Results, width: float = 640.0, name: str = "accuracy") -> str:
    """Return the main metric (accuracy) against density with 95 % intervals, a line a method, dense as a band.

    With one density only, it is a row of points, the best at the top.
    """
    series, dense = accuracy_series(results)
    if not series:
        return ""
    if len(densities(results)) < 2:
        return _dots(results, series, dense, width, name)
    look = styles(lines(results))
    names = [*(s.name for s in series), *([DENSE] if dense else [])]
    left, right, bottom, plot = 46.0, beside(names, width), 42.0 + legend_height(names, width), 300.0

    def draw(figure: Figure) -> None:
        axes = _axes(figure, left, 12.0, width - left - right, plot)
        _density_axis(axes, densities(results))
        axes.set_ylabel(_metric(results))
        _band(axes, dense)
        for at, one in enumerate(series):
            shift = 1.0 + 0.018 * (at - (len(series) - 1) / 2.0)
            _line(axes, [x * shift for x in one.x], one, look[one.name])
        ends = [(s.name, s.y[-1], s.x[-1]) for s in series]
        if dense:
            ends.append((DENSE, dense.y[0], min(densities(results))))
        label(figure, axes, ends, look, width)

    return render(draw, width, 12.0 + plot + bottom, name=name, alt=_alt(results, series, dense))


def cost(results: Results, width: float = 640.0, name: str = "cost") -> str:
    """Return accuracy against the training FLOPs, as a share of dense training, one line a method."""
    series, dense = accuracy_series(results, against="training_flops")
    if not series:
        return ""
    look = styles(lines(results))
    names = [*(s.name for s in series), *([DENSE] if dense else [])]
    left, right, bottom, plot = 46.0, beside(names, width), 42.0 + legend_height(names, width), 280.0

    def draw(figure: Figure) -> None:
        axes = _axes(figure, left, 12.0, width - left - right, plot)
        axes.set_xlabel("training FLOPs (dense = 1)")
        axes.set_ylabel(_metric(results))
        every = [x for s in [*series, *([dense] if dense else [])] for x in s.x]
        if min(every) > 0.0 and max(every) > 3.0 * min(every):
            _log_axis(axes, every)
        for one in series:
            _line(axes, one.x, one, look[one.name])
        if dense:
            _line(axes, dense.x, dense, look[DENSE])
        key(figure, names, look, width)

    alt = f"{_metric(results)} against training FLOPs for {listing([visible(n, 40) for n in names])}."
    return render(draw, width, 12.0 + plot + bottom, name=name, alt=alt)


def layers(results: Results, width: float = 640.0, name: str = "layers") -> str:
    """Return the share of weights kept in each layer, a panel a density, a line a method; the mean over seeds."""
    panels = [(density, found) for density in densities(results) if (found := layer_series(results, density))]
    if not panels:
        return ""
    names = list(dict.fromkeys(place for _, found in panels for one in found for place in one.labels))
    shown = [visible(place, 26) for place in names]
    row = LINE + 2.0 if len(names) <= 40 else max(4.0, 600.0 / len(names))
    left = CHAR * max(map(len, shown)) + 14.0 if len(names) <= 40 else 46.0
    plot = row * len(names) + 8.0
    used = list(dict.fromkeys(one.name for _, found in panels for one in found))

    def panel(axes: Axes, at: int, first: bool) -> None:
        density, found = panels[at]
        axes.set_title(f"{percent(density)} kept", loc="left", pad=6.0)
        axes.set_ylim(len(names) - 0.4, -0.6)
        if len(names) <= 40:
            axes.set_yticks(range(len(names)), shown if first else [""] * len(names))
        else:
            axes.set_ylabel("layer, from the input" if first else "")
        axes.tick_params(axis="y", length=0.0)
        axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.5)
        _log_axis(axes, [density, *(x for one in found for x in one.y if x > 0.0)], percent)
        axes.axvline(density, color=INK, linewidth=0.7, alpha=0.5)
        axes.set_xlabel("weights kept")
        looks = styles(lines(results))
        for one in found:
            look = looks[one.name]
            places = [names.index(place) for place in one.labels]
            axes.plot([max(y, 1e-9) for y in one.y], places, color=look.colour, linewidth=0.8, linestyle=look.line,
                      marker=look.marker, markersize=4.0, markeredgewidth=0.0, alpha=0.9)  # fmt: skip

    alt = f"Share of weights kept in each of {len(names)} layers at {listing([percent(d) for d, _ in panels])} density."
    return _panels(results, len(panels), panel, used, width, (left, plot), name, alt)


def loss(results: Results, width: float = 640.0, name: str = "loss") -> str:
    """Return the training loss against the step, a panel a density, a line a method; the mean over seeds."""
    places = densities(results)
    panels = [(density, found) for density in places if (found := loss_series(results, density))]
    if not panels:
        return ""
    every = [y for _, found in panels for one in found for y in one.y]
    used = list(dict.fromkeys(one.name for _, found in panels for one in found))
    log = min(every) > 0.0 and max(every) > 20.0 * min(every)

    def panel(axes: Axes, at: int, first: bool) -> None:
        density, found = panels[at]
        axes.set_title(f"{percent(density)} kept", loc="left", pad=6.0)
        axes.set_xlabel("optimizer step")
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _place: f"{value:g}")
            axes.yaxis.set_minor_formatter(lambda _value, _place: "")
        room = (max(every) / min(every)) ** 0.05 if log else 0.05 * (max(every) - min(every) or 1.0)
        low, high = (min(every) / room, max(every) * room) if log else (min(every) - room, max(every) + room)
        axes.set_ylim(low, high)
        if first:
            axes.set_ylabel("training loss (nats)")
        else:
            axes.tick_params(axis="y", labelleft=False)
        axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.5)
        looks = styles(lines(results))
        for one in found:
            look = looks[one.name]
            axes.plot(one.x, one.y, color=look.colour, linewidth=1.1, linestyle=look.line, alpha=0.9)

    alt = f"Training loss over the steps at {listing([percent(d) for d, _ in panels])} density."
    return _panels(results, len(panels), panel, used, width, (48.0, 190.0), name, alt)


def _dots(results: Results, series: Sequence[Series], dense: Series | None, width: float, name: str) -> str:
    look = styles(lines(results))
    ranked = sorted(series, key=lambda one: -one.y[0])
    labels = [visible(one.name, 26) for one in ranked]
    left = CHAR * max(map(len, labels)) + 14.0
    plot = 20.0 * len(ranked) + 10.0

    def draw(figure: Figure) -> None:
        axes = _axes(figure, left, 24.0, width - left - 14.0, plot)
        axes.set_ylim(len(ranked) - 0.4, -0.6)
        axes.set_yticks(range(len(ranked)), labels)
        axes.tick_params(axis="y", length=0.0)
        axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.5)
        where = f" at {percent(densities(results)[0])} density" if densities(results)[0] < 1.0 else ""
        axes.set_xlabel(_metric(results) + where)
        if dense:
            low, high = dense.bounds(0)
            axes.axvspan(low, high, color=INK, alpha=0.08, linewidth=0.0)
            axes.axvline(dense.y[0], color=INK, linewidth=0.9)
            axes.annotate(DENSE, (dense.y[0], 1.0), (0.0, 4.0), xycoords=("data", "axes fraction"),
                          textcoords="offset pixels", ha="center")  # fmt: skip
        for at, one in enumerate(ranked):
            low, high = one.bounds(0)
            style = look[one.name]
            axes.plot([low, high], [at, at], color=style.colour, linewidth=1.3)
            axes.plot([one.y[0]], [at], color=style.colour, marker=style.marker, markeredgewidth=0.0)

    return render(draw, width, 24.0 + plot + 42.0, name=name, alt=_alt(results, series, dense))


def _panels(
    results: Results,
    count: int,
    panel: Callable[[Axes, int, bool], None],
    used: Sequence[str],
    width: float,
    size: tuple[float, float],
    name: str,
    alt: str,
) -> str:
    """Return panels beside one another (wide) or below one another (narrow), with a legend underneath."""
    left, plot = size
    across = min(count, 3) if width >= WIDE else 1
    down = math.ceil(count / across)
    step = plot + 70.0
    each = (width - left - 16.0 - 18.0 * (across - 1)) / across
    look = styles(lines(results))

    def draw(figure: Figure) -> None:
        for at in range(count):
            x, y = left + (at % across) * (each + 18.0), 24.0 + (at // across) * step
            panel(_axes(figure, x, y, each, plot), at, at % across == 0)
        key(figure, used, look, width, under=True)

    height = step * down + legend_height(used, width, under=True)
    return render(draw, width, height, name=name, alt=alt)


def _axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Return axes at a place in pixels from the upper left corner."""
    across, down = (72.0 * size for size in figure.get_size_inches())
    return figure.add_axes((left / across, 1.0 - (top + height) / down, width / across, height / down))


def _density_axis(axes: Axes, places: Sequence[float]) -> None:
    """Let density fall to the right on a log scale, a tick at each density of the comparison."""
    axes.set_xscale("log")
    axes.set_xlim(max(places) * 1.25, min(places) / 1.25)
    axes.set_xticks(list(places), [percent(place) for place in places])
    axes.minorticks_off()
    axes.set_xlabel("weights kept (log scale)")
    axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.5)


def _log_axis(axes: Axes, values: Sequence[float], show: Callable[[float], str] = lambda x: f"{x:g}") -> None:
    """Give the x axis a log scale with ticks at 1, 2 and 5 times powers of ten, as many as fit."""
    low, high = min(values), max(values)
    axes.set_xscale("log")
    axes.set_xlim(low / 1.25, high * 1.25)
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**power for power in decades for digit in (1, 2, 5)]
    ticks = [tick for tick in ticks if low / 1.2 <= tick <= high * 1.2]
    if len(ticks) > 5:
        ticks = [tick for tick in ticks if f"{tick:e}".startswith("1.")]
    axes.set_xticks(ticks, [show(round(tick, 12)) for tick in ticks])
    axes.minorticks_off()
    axes.grid(axis="x", color=INK, alpha=0.12, linewidth=0.5)


def _band(axes: Axes, dense: Series | None) -> None:
    if dense:
        low, high = dense.bounds(0)
        axes.axhspan(low, high, color=INK, alpha=0.08, linewidth=0.0)
        axes.axhline(dense.y[0], color=INK, linewidth=0.9)


def _line(axes: Axes, x: Sequence[float], one: Series, style: Style) -> None:
    axes.plot(x, list(one.y), color=style.colour, linestyle=style.line, marker=style.marker,
              markeredgewidth=0.0, linewidth=1.2)  # fmt: skip
    for at, place in enumerate(x):
        low, high = one.bounds(at)
        axes.plot([place, place], [low, high], color=style.colour, linewidth=0.9, alpha=0.65)


def _metric(results: Results) -> str:
    main = main_metric(results)
    return f"{visible(main.heading, 40)} (%)" if main.share else visible(main.heading, 40)


def _alt(results: Results, series: Sequence[Series], dense: Series | None) -> str:
    unit = "\N{NO-BREAK SPACE}%" if main_metric(results).share else ""
    parts = [f"dense {dense.y[0]:.4g}{unit}"] if dense else []
    for one in series:
        told = listing([f"{y:.4g}{unit} at {percent(x)} density" for x, y in zip(one.x, one.y, strict=True)])
        parts.append(f"{visible(one.name, 40)} {told}")
    return f"{_metric(results)}: {'; '.join(parts)}."
