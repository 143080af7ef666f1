"""SVG text without style, script, date or foreign names."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import matplotlib
import pytest
from matplotlib.figure import Figure

from openwork.report.style import INK, LIGHT
from openwork.report.svg import render, standalone, tidy
from openwork.report.text import visible
from tests.report.conftest import HOSTILE


def draw(title: str = "plot", colour: str = LIGHT[2]) -> str:
    def fill(figure: Figure) -> None:
        axes = figure.add_axes((0.1, 0.1, 0.8, 0.8))
        axes.plot([0, 1, 2], [0, 1, 0], color=colour, marker="o")
        axes.set_title(title)

    return render(fill, 200, 120, name="fig", alt="a plot")


def test_same_drawing_same_bytes() -> None:
    assert draw() == draw()
    assert draw() != draw("other")


def test_nothing_but_drawing() -> None:
    root = ET.fromstring(draw())
    tags = {element.tag.rpartition("}")[2] for element in root.iter()}
    assert tags <= {"svg", "g", "path", "defs", "use", "text", "clipPath", "rect"}
    keys = {key for element in root.iter() for key in element.attrib}
    assert "style" not in keys
    assert not any(key.startswith("on") for key in keys)
    assert root.get("viewBox") == "0 0 200 120"
    assert (root.get("role"), root.get("aria-label")) == ("img", "a plot")
    assert "atplotlib" not in draw()


def test_ids_belong_to_the_figure_and_are_used() -> None:
    root = ET.fromstring(draw())
    ids = [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
    assert ids
    assert len(set(ids)) == len(ids)
    for found in ids:
        assert found.startswith("fig-")
        assert f"#{found}" in draw()
    for element in root.iter():
        if "href" in element.attrib:
            assert element.attrib["href"][1:] in ids


def test_colours_are_the_pages() -> None:
    assert INK not in draw()
    line = [e for e in ET.fromstring(draw()).iter() if e.get("class") == "s2"]
    assert line
    assert all(e.get("color") == LIGHT[2] and "currentColor" in (e.get("stroke"), e.get("fill")) for e in line)


@pytest.mark.parametrize("kind", HOSTILE)
def test_names_are_text(kind: str) -> None:
    name = visible(HOSTILE[kind], 60)
    root = ET.fromstring(draw(name))
    assert name in [element.text for element in root.iter() if element.text]
    assert "<script" not in draw(name)


def test_alt_is_escaped() -> None:
    text = tidy('<svg xmlns="http://www.w3.org/2000/svg" width="1"/>', name="x", alt='"><script>')
    assert ET.fromstring(text).get("aria-label") == '"><script>'
    assert "<script" not in text


def test_settings_of_the_process_stay() -> None:
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 31.0, "axes.grid": True}):
        inside = draw()
    assert dict(matplotlib.rcParams) == before
    assert inside == draw()


def test_standalone_is_a_file_of_its_own() -> None:
    root = ET.fromstring(standalone(draw()))
    assert (root.get("width"), root.get("height")) == ("200", "120")
    assert root[0].tag.endswith("rect")
    assert "style" not in root.attrib
