"""Verdicts: each rule of the table, planted effects, and false alarms over a thousand null comparisons."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as reference

from openwork.errors import RecipeError
from openwork.lab.claims import Claim, Values, Verdict, collect, judge
from openwork.lab.stats import holm


def pair(differences: list[float | None], base: float = 0.0, metric: str = "accuracy") -> Values:
    """Return values of arms a and b with these differences by seed; None where arm a failed."""
    a = {seed: None if d is None else base + d for seed, d in enumerate(differences)}
    return {metric: {"a": a, "b": dict.fromkeys(range(len(differences)), base)}}


def one(claim: Claim, values: Values) -> Verdict:
    (verdict,) = judge([claim], values)
    return verdict


AB = {"a": 1.0, "b": -1.0}
BETTER = Claim("a beats b", "accuracy", AB)
SAME = Claim("a is b", "accuracy", AB, "equivalent", 0.01)
OTHER = Claim("a is not b", "accuracy", AB, "different")


@pytest.mark.parametrize(
    ("claim", "differences", "verdict", "reason"),
    [
        (BETTER, [0.02, 0.03, 0.025, 0.022], "holds", "the interval is above 0"),
        (BETTER, [0.02, -0.03, 0.05, 0.02], "leans", "part of the interval is not"),
        (BETTER, [-0.02, -0.03, -0.025], "fails", "the interval is clear of it"),
        (BETTER, [-0.02, 0.03, -0.05], "fails", "the interval reaches it"),
        (BETTER, [0.0, 0.0, 0.0], "fails", "not above 0"),
        (BETTER, [0.01, 0.01, 0.01], "holds", "the interval is above 0"),
        (SAME, [0.001, -0.001, 0.0005, 0.0], "holds", "within ±0.01"),
        (SAME, [0.02, -0.02, 0.01, 0.0], "leans", "part of the interval is not"),
        (SAME, [0.05, 0.052, 0.049, 0.05], "fails", "the interval is clear of it"),
        (SAME, [0.05, -0.02, 0.06, 0.0], "fails", "the interval reaches it"),
        (SAME, [0.01, 0.01, 0.01], "fails", "not within ±0.01"),
        (OTHER, [-0.02, -0.03, -0.025], "holds", "away from 0"),
        (OTHER, [0.02, 0.03, 0.025], "holds", "away from 0"),
        (OTHER, [0.02, -0.03, 0.025], "leans", "part of the interval is not"),
        (OTHER, [0.0, 0.0, 0.0], "fails", "the interval is clear of it"),
        (BETTER, [0.1, 0.2], "not testable here", "3 seeds are needed; n = 2 of 2"),
        (BETTER, [0.1, 0.2, None, None], "not testable here", "n = 2 of 4"),
        (BETTER, [0.020, 0.022, None, 0.021, 0.021], "holds", "n = 4 of 5"),
        (BETTER, [0.020, 0.022, math.nan, 0.021, 0.021], "leans", "n = 4 of 5, 1 diverged"),
        (BETTER, [math.inf] * 5, "not testable here", "n = 0 of 5, 5 diverged"),
    ],
)
def test_rules(claim: Claim, differences: list[float | None], verdict: str, reason: str) -> None:
    found = one(claim, pair(differences))
    assert found.verdict == verdict, found
    assert reason in found.reason


def test_margins_move_the_border() -> None:
    differences: list[float | None] = [0.02, 0.022, 0.021]
    not_worse = Claim("a is not much worse", "accuracy", AB, margin=-0.01)
    assert one(not_worse, pair([-0.001, 0.0, -0.002])).verdict == "holds"
    assert one(Claim("much better", "accuracy", AB, margin=0.05), pair(differences)).verdict == "fails"
    assert one(Claim("much else", "accuracy", AB, "different", 0.01), pair(differences)).verdict == "holds"
    assert one(Claim("much else", "accuracy", AB, "different", 0.05), pair(differences)).verdict == "fails"
    # a difference of exactly the margin, up to float rounding, is not above it
    exact = {"accuracy": {"a": {s: 0.1 * s + 0.01 for s in range(4)}, "b": {s: 0.1 * s for s in range(4)}}}
    assert one(Claim("", "accuracy", AB, margin=0.01), exact).verdict == "fails"


def test_numbers_are_scipys() -> None:
    differences = [0.011, 0.018, -0.002, 0.02, 0.013]
    result = reference.ttest_1samp(differences, 0.005, alternative="greater")
    interval = reference.ttest_1samp(differences, 0.0).confidence_interval(0.95)
    found = one(Claim("", "accuracy", AB, margin=0.005), pair(differences))
    assert found.p == pytest.approx(result.pvalue, rel=1e-8)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-8)
    assert found.estimate == pytest.approx(0.012, rel=1e-12)
    either = one(OTHER, pair(differences))
    assert either.p == pytest.approx(reference.ttest_1samp(differences, 0.0).pvalue, rel=1e-8)


def test_what_was_not_run_is_not_testable() -> None:
    values = pair([0.1, 0.2, 0.3])
    arm = one(Claim("", "accuracy", {"a": 1.0, "z": -1.0}), values)
    metric = one(Claim("", "perplexity", AB), values)
    assert arm.verdict == metric.verdict == "not testable here"
    assert "arm 'z' was not run" in arm.reason
    assert "metric 'perplexity' was not measured" in metric.reason
    assert (metric.estimate, metric.low, metric.p, metric.adjusted_p, metric.n) == (None, None, None, None, 0)
    json.dumps([arm.as_dict(), metric.as_dict()], allow_nan=False)


def test_correction_spans_the_study_but_not_the_untestable() -> None:
    rng = np.random.default_rng(3)
    arms = {name: {seed: float(v) for seed, v in enumerate(rng.normal(0.8, 1.0, 6))} for name in "abc"}
    arms["zero"] = dict.fromkeys(range(6), 0.0)
    claims = [Claim(name, "m", {name: 1.0, "zero": -1.0}) for name in "abc"]
    untestable = Claim("none", "m", {"never run": 1.0})
    verdicts = judge([*claims, untestable], {"m": arms})
    assert [v.text for v in verdicts] == ["a", "b", "c", "none"]
    assert [v.adjusted_p for v in verdicts[:3]] == pytest.approx(holm([v.p or 0.0 for v in verdicts[:3]]))
    assert verdicts[3].adjusted_p is None


def test_correction_can_take_a_verdict_away() -> None:
    close = pair([0.02, 0.04, 0.01, 0.035, 0.012])
    alone = one(BETTER, close)
    assert alone.verdict == "holds"
    assert alone.p is not None
    crowd = [BETTER] + [Claim("noise", "accuracy", {"b": 1.0}, "different")] * math.ceil(0.05 / alone.p)
    found = judge(crowd, close)[0]
    assert found.verdict == "leans"
    assert "once corrected for the other claims" in found.reason


@pytest.mark.parametrize("kind", ["greater", "different", "equivalent"])
def test_null_comparisons_rarely_hold(kind: str) -> None:
    rng = np.random.default_rng(20)
    margin = 1.0 if kind == "equivalent" else 0.0
    shift = 1.0 if kind == "equivalent" else 0.0  # the border of "equivalent" is its hardest null
    claim = Claim("", "m", AB, kind, margin)  # type: ignore[arg-type]
    held = 0
    for _ in range(1000):
        a, b = rng.normal(shift, 1.0, 5), rng.normal(0.0, 1.0, 5)
        values = {"m": {"a": dict(enumerate(map(float, a))), "b": dict(enumerate(map(float, b)))}}
        held += one(claim, values).verdict == "holds"
    assert held <= 70
    if kind == "different":
        assert held >= 30  # not by never holding


def test_a_family_of_null_claims_rarely_holds() -> None:
    rng = np.random.default_rng(21)
    claims = [Claim("", "m", {f"arm{i}": 1.0, "base": -1.0}, "different") for i in range(5)]
    alarms = 0
    for _ in range(1000):
        draws = rng.normal(0.0, 1.0, (6, 5)).tolist()
        arms = {
            name: dict(enumerate(draw)) for name, draw in zip([*(f"arm{i}" for i in range(5)), "base"], draws, strict=True)
        }
        alarms += any(verdict.verdict == "holds" for verdict in judge(claims, {"m": arms}))
    assert alarms <= 70


def test_planted_effects_are_found() -> None:
    rng = np.random.default_rng(22)
    found = {"greater": 0, "different": 0, "equivalent": 0}
    for _ in range(200):
        noise = rng.normal(0.0, 0.2, 5).tolist()
        up, level = pair([1.0 + d for d in noise], metric="m"), pair(noise, metric="m")
        found["greater"] += one(Claim("", "m", AB), up).verdict == "holds"
        found["different"] += one(Claim("", "m", AB, "different"), up).verdict == "holds"
        found["equivalent"] += one(Claim("", "m", AB, "equivalent", 1.0), level).verdict == "holds"
    assert min(found.values()) >= 190


@given(st.permutations(range(6)))
@settings(max_examples=20, deadline=None)
def test_order_of_seeds_does_not_matter(order: list[int]) -> None:
    differences = [0.011, 0.018, -0.002, 0.02, 0.013, 0.004]
    values = {"accuracy": {"a": {s: differences[s] for s in order}, "b": dict.fromkeys(range(6), 0.0)}}
    found, straight = one(BETTER, values), one(BETTER, pair(differences))
    assert (found.verdict, found.p) == (straight.verdict, pytest.approx(straight.p or 0.0, rel=1e-9))


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"kind": "better"}, "'better'"),
        ({"contrast": {}}, "contrast"),
        ({"contrast": {"a": 0.0}}, "contrast"),
        ({"contrast": {"a": math.nan}}, "contrast"),
        ({"margin": math.nan}, "margin"),
        ({"kind": "equivalent"}, "positive"),
        ({"kind": "different", "margin": -1.0}, "at least 0"),
        ({"needs": 1}, "fewer than 2"),
    ],
)
def test_senseless_claims_are_refused(fields: dict[str, object], word: str) -> None:
    with pytest.raises(RecipeError, match=word):
        Claim(**{"text": "t", "metric": "m", "contrast": AB, **fields})  # type: ignore[arg-type]


def test_collect_keeps_failures() -> None:
    trials = [
        {"arm": "a", "seed": 0, "status": "ok", "metrics": {"accuracy": 0.9, "nll": 0.3}},
        {"arm": "a", "seed": 1, "status": "failed", "metrics": {}},
        {"arm": "a", "seed": 2, "status": "diverged", "metrics": {"accuracy": 0.1}},
        {"arm": "b", "seed": 0, "status": "ok", "metrics": {"accuracy": 0.8}},
    ]
    found = collect(trials)
    assert list(found) == ["accuracy", "nll"]
    assert found["accuracy"]["a"][0] == 0.9
    assert found["accuracy"]["a"][1] is None
    assert math.isnan(found["accuracy"]["a"][2] or 0.0)
    assert found["accuracy"]["b"] == {0: 0.8}
    assert found["nll"]["b"] == {0: None}
    verdict = one(BETTER, found)
    assert (verdict.verdict, verdict.n) == ("not testable here", 1)
    assert "n = 1 of 3, 1 diverged" in verdict.reason
