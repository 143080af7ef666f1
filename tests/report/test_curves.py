"""The page of one-shot curves: figure, tables, and names that mean harm."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Any

import pytest

from openwork.report import curves


def summary(scope: str = "global", **changes: Any) -> dict[str, Any]:
    found = {
        "scope": scope, "protocol": "prune, evaluate", "floor": 0.1,
        "sparsity": [0.0, 0.2, 0.4, 0.6], "quality": [0.9, 0.88, 0.8, 0.2],
        "tolerance": 0.15, "knee": 0.4, "hinge": {"at": 0.4, "before": -0.1, "after": -3.0}, "reason": "knee at 0.400",
        "hinge_interval": [0.35, 0.42], "tolerance_interval": [0.1, None],
    }  # fmt: skip
    return {**found, **changes}


@pytest.mark.parametrize("width", [688.0, 350.0])
@pytest.mark.parametrize("count", [1, 3])
def test_the_figure_is_svg_with_every_curve_told(width: float, count: int) -> None:
    every = [summary(f"scope{i}") for i in range(count)]
    text = curves.figure(every, "accuracy", width)
    assert text == curves.figure(every, "accuracy", width)
    root = ET.fromstring(text)
    told = root.attrib["aria-label"]
    assert all(f"scope{i} 0.9 at 0" in told for i in range(count))


def test_the_tables() -> None:
    cells = curves.rows([summary(), summary("2:4", knee=None, tolerance=None, hinge=None, hinge_interval=None)])
    assert cells[0][0] == "global"
    assert cells[0][2].startswith("15")
    assert cells[0][3].endswith("beyond")
    assert cells[0][4].startswith("40")
    assert cells[1][2] == cells[1][4] == cells[1][6] == curves.NOTHING
    heads, body = curves.points([summary(), summary("2:4", sparsity=[0.0, 0.5], quality=[0.9, 0.3])])
    assert heads == ("pruned", "global", "2:4")
    assert [row[0].split("\N{NO-BREAK SPACE}")[0] for row in body] == ["0", "20", "40", "50", "60"]
    assert body[3][1:] == (curves.NOTHING, "0.3000")


def test_curves_of_one_scope_are_told_apart_by_their_protocol() -> None:
    rows = curves.rows([summary(), summary(protocol="prune, fine-tune, evaluate")])
    assert [row[0] for row in rows] == ["global, prune, evaluate", "global, prune, fine-tune, evaluate"]


def test_the_page_fetches_nothing_and_escapes_names() -> None:
    text = curves.page(
        [summary("<b>&\u202e")], title="<script>alert(1)</script>", quality="<i>", facts=[("a", "{{ x }}")], command="x"
    )
    assert "<script" not in text
    assert "<b>" not in text
    assert "\u202e" not in text
    assert "default-src &#39;none&#39;" in text
    assert "{{ x }}" in text
