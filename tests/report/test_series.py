"""The numbers behind the plots are the file's numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest

from openwork.report.series import POINTS, accuracy_series, layer_series, loss_series


def test_accuracy_in_percent(results: dict[str, Any]) -> None:
    series, dense = accuracy_series(results)
    assert [one.name for one in series] == ["random", "magnitude", "set", "rigl", "granet"]
    assert dense is not None
    assert dense.x == (1.0,)
    rows = {row["arm"]: row for row in results["rows"]}
    for one in series:
        assert one.x == (0.2, 0.1, 0.05)
        for at, density in enumerate(one.x):
            interval = rows[f"{one.name}@{density:g}"]["accuracy"]
            assert one.y[at] == 100.0 * interval["mean"]
            assert one.bounds(at) == (100.0 * interval["low"], 100.0 * interval["high"])


def test_other_metrics_keep_their_unit_and_other_places_are_read(results: dict[str, Any]) -> None:
    results["columns"] = {"nll": "loss"}
    series, _ = accuracy_series(results, against="training_flops")
    row = next(row for row in results["rows"] if row["arm"] == "set@0.1")
    assert series[2].y[1] == row["accuracy"]["mean"]
    assert series[2].x[1] == row["training_flops"]


def test_rows_without_numbers_are_left_out(results: dict[str, Any]) -> None:
    for row in results["rows"]:
        if row["method"] == "set":
            row["accuracy"] = None
        if row["arm"] == "rigl@0.1":
            row["accuracy"] = {"mean": 0.9, "low": None, "high": None}
        if row["arm"] == "granet@0.1":
            row["accuracy"] = {"mean": math.nan, "low": 0.0, "high": 1.0}
    series = {one.name: one for one in accuracy_series(results)[0]}
    assert "set" not in series
    assert series["granet"].x == (0.2, 0.05)
    assert series["rigl"].bounds(1) == (90.0, 90.0)
    assert accuracy_series({}) == ([], None)


def test_layers_are_means_over_the_seeds_that_ended_well(results: dict[str, Any]) -> None:
    for trial in results["trials"]:
        if trial["arm"] == "rigl@0.05":
            trial["layers"]["stem.weight"]["kept"] = 10 * trial["seed"]
    found = {one.name: one for one in layer_series(results, 0.05)}
    assert list(found) == ["random", "magnitude", "set", "rigl", "granet"]
    assert found["rigl"].labels[0] == "stem.weight"
    assert found["rigl"].y[0] == pytest.approx(20.0 / 432.0)
    assert layer_series(results, 0.3) == []


def test_loss_is_the_mean_at_common_steps(results: dict[str, Any]) -> None:
    for trial in results["trials"]:
        trial["curves"] = {"loss": [[0, 2.0 + trial["seed"]], [10, 1.0], [20, math.nan]]}
        if trial["seed"] == 0:
            trial["curves"]["loss"].append([30, 0.5])
    found = {one.name: one for one in loss_series(results, 0.05)}
    assert next(iter(found)) == "dense"
    assert (found["rigl"].x, found["rigl"].y) == ((0.0, 10.0), (4.0, 1.0))
    assert found["set"].y[0] == pytest.approx((2 + 3 + 5 + 6) / 4)  # seed 2 diverged
    assert loss_series(results, 0.3) == []


def test_long_curves_are_thinned(results: dict[str, Any]) -> None:
    for trial in results["trials"]:
        trial["curves"] = {"loss": [[step, 1.0 / (1 + step)] for step in range(1000)]}
    one = loss_series(results, 0.1)[1]
    assert len(one.x) == POINTS
    assert (one.x[0], one.x[-1]) == (0.0, 999.0)
    assert all(y == pytest.approx(1.0 / (1.0 + x)) for x, y in zip(one.x, one.y, strict=True))
