"""Plots show every method, its numbers in their places, and nothing where there is nothing."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from openwork.report import plots
from openwork.report.text import visible
from tests.report.conftest import HOSTILE, Make, hostile

ALL = (plots.accuracy, plots.cost, plots.layers, plots.loss)
Plot = Callable[..., str]


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ET.fromstring(svg).iter() if element.tag.endswith("text")]


@pytest.mark.parametrize("plot", ALL)
@pytest.mark.parametrize("width", [688.0, 350.0])
def test_every_plot_is_valid_named_and_repeatable(results: dict[str, Any], plot: Plot, width: float) -> None:
    svg = plot(results, width)
    root = ET.fromstring(svg)
    assert root.get("viewBox", "").startswith(f"0 0 {width:g} ")
    assert root.get("aria-label")
    assert svg == plot(results, width)
    for name in ("random", "magnitude", "set", "rigl", "granet"):
        assert name in texts(svg)


@pytest.mark.parametrize("plot", ALL)
def test_nothing_to_show_is_the_empty_string(plot: Plot) -> None:
    assert plot({}) == ""
    assert plot({"rows": [], "trials": [], "arms": []}) == ""


def test_density_axis_has_the_densities_as_ticks(results: dict[str, Any]) -> None:
    svg = plots.accuracy(results)
    found = texts(svg)
    assert [text for text in found if text.endswith("%")] == [f"{d}\N{NO-BREAK SPACE}%" for d in (20, 10, 5)]
    assert "weights kept (log scale)" in found
    assert "accuracy (%)" in found
    assert "dense" in found


def markers(svg: str, style: str) -> list[tuple[float, float]]:
    """Return the places of the marks of one colour, in pixels."""
    uses = [e for e in ET.fromstring(svg).iter() if e.tag.endswith("use") and e.get("class") == style]
    return [(float(e.attrib["x"]), float(e.attrib["y"])) for e in uses]


def test_marks_are_where_the_numbers_are(results: dict[str, Any]) -> None:
    """Pixels are an affine function of accuracy, and of the logarithm of the training FLOPs."""
    import numpy as np

    svg = plots.cost(results)
    rows = {row["arm"]: row for row in results["rows"]}
    pixels, numbers = [], []
    for at, method in enumerate(("random", "magnitude", "set", "rigl", "granet")):
        for place, density in zip(markers(svg, f"s{at}")[:3], (0.2, 0.1, 0.05), strict=True):
            row = rows[f"{method}@{density:g}"]
            pixels.append(place)
            numbers.append((np.log(row["training_flops"]), row["accuracy"]["mean"]))
    for axis in (0, 1):
        x, y = np.array(numbers)[:, axis], np.array(pixels)[:, axis]
        slope, start = np.polyfit(x, y, 1)
        assert np.abs(slope * x + start - y).max() < 0.02
        assert (slope > 0) == (axis == 0)


def test_one_density_is_a_ranking(make_results: Make) -> None:
    svg = plots.accuracy(make_results(densities=(0.1,)))
    assert "accuracy (%) at 10\N{NO-BREAK SPACE}% density" in texts(svg)
    heights = {at: markers(svg, f"s{at}")[0][1] for at in range(5)}
    assert sorted(heights, key=lambda at: heights[at]) == [4, 3, 2, 1, 0]  # granet is best and at the top


def test_panels_one_a_density(results: dict[str, Any]) -> None:
    wide, narrow = plots.loss(results, 688.0), plots.loss(results, 350.0)
    for svg in (wide, narrow):
        assert [t for t in texts(svg) if t.endswith("kept")] == [f"{d}\N{NO-BREAK SPACE}% kept" for d in (20, 10, 5)]
    tall = [float(ET.fromstring(svg).attrib["viewBox"].split()[3]) for svg in (wide, narrow)]
    assert tall[1] > 2 * tall[0]


def test_layers_from_the_input_down(results: dict[str, Any]) -> None:
    found = texts(plots.layers(results))
    names = [text for text in found if text.endswith(".weight")]
    assert names == ["stem.weight", *(f"block{n}.conv1.weight" for n in (1, 2, 3)), "head.weight"]


def test_many_layers_and_emptied_ones(results: dict[str, Any]) -> None:
    for trial in results["trials"]:
        if trial["layers"]:
            trial["layers"] = {f"l{at}": {"kept": at % 7, "total": 100} for at in range(120)}
    svg = plots.layers(results)
    assert "layer, from the input" in texts(svg)
    for trial in results["trials"]:
        trial["layers"] = {name: {"kept": 0, "total": 100} for name in trial["layers"]}
    assert ET.fromstring(plots.layers(results)) is not None


def test_hostile_names() -> None:
    results = hostile()
    for plot in ALL:
        svg = plot(results, 350.0)
        assert {visible(name, 26) for name in HOSTILE.values()} <= set(texts(svg))
        assert {e.tag.rpartition("}")[2] for e in ET.fromstring(svg).iter()}.isdisjoint({"script", "a", "style"})
        assert len(svg) < 200_000


def test_a_metric_that_is_no_share(results: dict[str, Any]) -> None:
    results["columns"] = {"nll": "loss (nats)"}
    assert "loss (nats)" in texts(plots.accuracy(results))


def test_one_seed_and_no_dense(make_results: Make) -> None:
    results = make_results(seeds=1, dense=False)
    assert "dense" not in texts(plots.accuracy(results))
    assert len(re.findall("<svg", plots.accuracy(results))) == 1


def test_many_methods_keep_their_labels_apart(make_results: Make) -> None:
    names = [f"method-{at}" for at in range(18)]
    svg = plots.accuracy(make_results(methods=names, noise=0.0001))
    placed = [
        (e.text, float(e.attrib["y"])) for e in ET.fromstring(svg).iter() if e.tag.endswith("text") and e.text in names
    ]
    heights = sorted(y for _, y in placed)
    assert len(heights) == 18
    assert min(b - a for a, b in pairwise(heights)) >= 14.9
