"""Curves keep what a reader looks for in them: their ends and their extremes."""

from __future__ import annotations

import math

from openwork.web.figures import curves, draw_curve, thinned


def test_thinning_keeps_ends_and_extremes() -> None:
    points = [[float(at), math.sin(at / 50.0)] for at in range(100_000)]
    points[77_777] = [77_777.0, 9.0]
    points[33_333] = [33_333.0, -9.0]
    kept = thinned(points, 500)
    assert len(kept) <= 502
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    assert [77_777.0, 9.0] in kept
    assert [33_333.0, -9.0] in kept
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)
    assert thinned(points[:10], 500) == points[:10]


def test_a_figure_a_curve() -> None:
    kept = {"loss": [[0, 3.0], [5, 0.01]], "one": [[0, 1.0]], "none": [], "accuracy": [[0, 0.1], [5, -0.9]]}
    made = curves(kept, "/here")
    assert [figure.number for figure in made] == [1, 2]
    assert made[0].caption == "Loss against the optimizer step: from 3 to 0.01, lowest 0.01, highest 3; 2 points."
    assert 'src="/here/1-narrow.svg"' in made[1].narrow
    assert "accuracy" in draw_curve(kept, 1, "narrow")
    assert draw_curve(kept, 2, "wide") == ""
    assert len(curves({f"c{at}": [[0, 1.0], [1, 2.0]] for at in range(20)}, "/here")) == 8


def test_curves_of_odd_numbers() -> None:
    for ends in ((9e99, -9e99), (0.0, 0.0), (5e-324, 9e99), (1e-300, 1e-300), (1e-99, 1e99)):
        assert draw_curve({"x": [[0.0, ends[0]], [1.0, ends[1]]]}, 0, "wide").startswith("<svg")
