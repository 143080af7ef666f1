"""The sentences say what the numbers say."""

from __future__ import annotations

from typing import Any

import pytest

from openwork.lab.stats import paired_interval
from openwork.report.summary import (
    densities,
    failures,
    headline,
    line_of,
    lines,
    losses,
    main_metric,
    rows,
    seeds_of,
    sentences,
    standings,
)
from tests.report.conftest import Make

NBSP = "\N{NO-BREAK SPACE}"


def table(accuracies: dict[str, list[float]], density: float = 0.1) -> dict[str, Any]:
    """Return results of the given accuracies by method and seed."""
    trials = [
        {"arm": name, "seed": seed, "status": "ok", "metrics": {"accuracy": value}}
        for name, values in accuracies.items()
        for seed, value in enumerate(values)
    ]
    rows = [
        {
            "arm": name,
            "method": name,
            "density": 1.0 if name == "dense" else density,
            "n": len(values),
            "seeds": len(values),
            "accuracy": {"mean": sum(values) / len(values), "low": None, "high": None},
            "difference": None,
        }
        for name, values in accuracies.items()
    ]
    return {"rows": rows, "trials": trials, "arms": []}


CLEAR = {"dense": [0.95, 0.96, 0.94], "b": [0.80, 0.81, 0.79], "a": [0.90, 0.91, 0.89]}
CLOSE = {"a": [0.90, 0.88, 0.89], "b": [0.88, 0.89, 0.885], "c": [0.87, 0.90, 0.86]}


def test_lead_is_the_paired_interval() -> None:
    (standing,) = standings(table(CLEAR))
    expected = paired_interval(dict(enumerate(CLEAR["a"])), dict(enumerate(CLEAR["b"])))
    assert (standing.best["arm"], standing.rivals[0].row["arm"]) == ("a", "b")
    assert standing.rivals[0].lead == expected
    assert standing.dense == paired_interval(dict(enumerate(CLEAR["a"])), dict(enumerate(CLEAR["dense"])))
    assert standing.clear


def test_sentences_by_hand() -> None:
    ((place, sentence),) = sentences(table(CLEAR))
    assert place == f"10{NBSP}%"
    assert sentence == (
        "a reaches 90.0 %, 5.0 points below dense (95 % interval −5.0 to −5.0). "
        "It leads b, the next, by 10.0 points (95 % interval +10.0 to +10.0)."
    )
    assert headline(table(CLEAR)) == f"a is the most accurate at 10{NBSP}% density, and its lead is clear."


def test_unclear_differences_are_called_so() -> None:
    ((_, sentence),) = sentences(table(CLOSE))
    assert "Its lead over b, the next, is not clear: 0.5 points" in sentence
    assert "c is not clearly behind either" in sentence
    assert "dense" not in sentence
    assert headline(table(CLOSE)) == f"a is the most accurate at 10{NBSP}% density, but its lead is not clear."
    near = table({**CLOSE, "dense": [0.88, 0.90, 0.89]})
    assert "not clearly different from dense: 0.0 points (95 % interval −5.0 to +5.0)" in sentences(near)[0][1]
    above = table({"dense": [0.80, 0.81, 0.79], "a": [0.90, 0.915, 0.89]})
    assert "10.2 points above dense" in sentences(above)[0][1]


def test_one_seed_has_no_interval() -> None:
    ((_, sentence),) = sentences(table({"dense": [0.95], "a": [0.9], "b": [0.8]}))
    assert sentence == (
        "a reaches 90.0 %, 5.0 points below dense (one seed, no interval). "
        "Its lead over b, the next, is 10.0 points (one seed, no interval)."
    )


def test_the_same_as_dense_on_one_seed() -> None:
    ((_, sentence),) = sentences(table({"dense": [0.9], "a": [0.9]}))
    assert sentence == "a reaches 90.0 %, the same as dense (one seed, no interval)."


def test_seeds_that_nobody_shares() -> None:
    results = table({"a": [0.9], "b": [0.8]})
    results["trials"][1]["seed"] = 5
    assert "It shares no seed with b, the next" in sentences(results)[0][1]


def test_several_densities(make_results: Make) -> None:
    assert (
        headline(make_results(noise=0.0001))
        == "granet is the most accurate at all 3 densities. Everywhere the lead is clear."
    )
    results = make_results()
    results["rows"][-1]["accuracy"]["mean"] = 0.99  # the last row is granet at 5 %
    for row in results["rows"]:
        if row["arm"] == "rigl@0.1":
            row["accuracy"]["mean"] = 0.999
    told = headline(results)
    assert told.startswith(f"No method leads everywhere: granet at 20{NBSP}% and 5{NBSP}%; rigl at 10{NBSP}%.")


def test_lone_method(make_results: Make) -> None:
    told = headline(make_results(methods=("rigl",), densities=(0.1, 0.05)))
    assert told.startswith("rigl: accuracy 8")
    assert f"at 10{NBSP}%" in told


@pytest.mark.parametrize(
    ("verdicts", "told"),
    [
        (["holds"], "The claim holds."),
        (["not testable here"], "The claim is not testable here."),
        (["holds", "holds", "leans"], "Of 3 claims, 2 hold and 1 leans its way."),
        (["fails", "leans", "leans", "holds"], "Of 4 claims, 1 holds, 2 lean their way and 1 fails."),
        (["holds", "holds"], "All 2 claims hold."),
        (["?", "?"], "2 claims, none judged."),
    ],
)
def test_claims_come_first(verdicts: list[str], told: str) -> None:
    assert headline({**table(CLEAR), "claims": [{"verdict": v} for v in verdicts]}) == told


def test_order_and_names(results: dict[str, Any]) -> None:
    assert densities(results) == [0.2, 0.1, 0.05]
    assert lines(results) == ["dense", "random", "magnitude", "set", "rigl", "granet"]
    assert [row["arm"] for row in rows(results)][:3] == ["dense", "granet@0.2", "rigl@0.2"]
    assert line_of({"arm": "rigl(drop=0.5)@0.05", "method": "rigl"}) == "rigl(drop=0.5)"
    assert line_of({"arm": "dmp iso@1e-05", "method": "dmp iso"}) == "dmp iso"
    assert line_of({"name": "@0.1", "method": "x"}) == "@0.1"
    assert line_of({"arm": "dense", "method": "dense"}) == "dense"


def test_other_metrics_have_no_best(results: dict[str, Any]) -> None:
    results["columns"] = {"nll": "loss (nats)", "accuracy": "accuracy"}
    assert main_metric(results).heading == "loss (nats)"
    assert standings(results) == []
    assert headline(results) == failures(results)


def test_failures(results: dict[str, Any]) -> None:
    assert failures(results) == "1 of 80 trials did not end well: 1 diverged."
    assert [trial["arm"] for trial in losses(results)] == ["set@0.05"]
    row = next(row for row in results["rows"] if row["arm"] == "set@0.05")
    assert seeds_of(results, row) == (4, 5)
    assert failures(table(CLEAR)) == "All 9 trials ended well."
    assert failures({"trials": [{"status": "ok"}]}) == "1 trial, none failed."


def test_empty_results() -> None:
    assert headline({"rows": [], "trials": []}) == headline({}) == "No trial was run."
    assert sentences({}) == []
    assert lines({}) == []
