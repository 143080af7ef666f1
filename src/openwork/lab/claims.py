"""Claims of a study and their verdicts, computed from paired seeds.

A claim is a linear contrast over arms of one metric: `{"rigl@0.1": 1, "set@0.1": -1}` is "RigL's accuracy minus
SET's". With m the margin, e the mean of the contrast over seeds and Holm's correction over the study's claims:

| kind         | tested by                   | holds                                | leans       | fails        |
| ------------ | --------------------------- | ------------------------------------ | ----------- | ------------ |
| `greater`    | t, one-sided; 95 % interval | adjusted p < .05, interval above m   | e > m       | e <= m       |
| `equivalent` | two t (TOST); 90 % interval | adjusted p < .05, interval within ±m | e within ±m | e outside ±m |
| `different`  | t, two-sided; 95 % interval | adjusted p < .05, interval beyond ±m | e beyond ±m | e within ±m  |

*leans*: the estimate is on the claimed side and is not shown. *fails*: it is on the other side; the reason says
whether the interval is clear of the margin there. *not testable here*: an arm or the metric is missing, or fewer
than `needs` seeds ended well in every arm. Seeds that did not end well are counted ("n = 4 of 5"), and a claim whose
arms diverged (a value that is not finite) on any seed can lean but not hold: divergence is a failure, not missing data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from openwork.errors import RecipeError
from openwork.lab.stats import ROUNDING, Interval, contrast, equivalence_test, holm, mean_interval, t_test

Kind = Literal["greater", "equivalent", "different"]
Outcome = Literal["holds", "leans", "fails", "not testable here"]
Values = Mapping[str, Mapping[str, Mapping[int, float | None]]]
"""metric -> arm -> seed -> value; None where the trial failed, not finite where it diverged."""

ALPHA = 0.05


@dataclass(frozen=True)
class Claim:
    """One sentence that a study can find true or false.

    Args:
        text: The sentence, as a reader should see it.
        metric: The trial metric that it is about.
        contrast: The weight of each arm; the claim is about the weighted sum.
        kind: "greater" (than the margin), "equivalent" (closer to zero than the margin), "different" (no direction).
        margin: In units of the metric; any finite number for "greater" (a negative one claims "not much worse"),
            positive for "equivalent", not negative for "different".
        needs: The least number of seeds that make it testable.

    Raises:
        RecipeError: if the kind, margin, contrast or `needs` makes no sense.
    """

    text: str
    metric: str
    contrast: Mapping[str, float]
    kind: Kind = "greater"
    margin: float = 0.0
    needs: int = 3

    def __post_init__(self) -> None:
        if self.kind not in ("greater", "equivalent", "different"):
            raise RecipeError(f"claim {self.text!r}: kind {self.kind!r} is none of 'greater', 'equivalent', 'different'")
        if not any(self.contrast.values()) or not all(map(math.isfinite, self.contrast.values())):
            raise RecipeError(f"contrast {dict(self.contrast)} of claim {self.text!r} needs finite weights, not all 0")
        least = {"greater": -math.inf, "equivalent": math.ulp(0.0), "different": 0.0}[self.kind]
        if not (math.isfinite(self.margin) and self.margin >= least):
            wanted = {"greater": "finite", "equivalent": "positive", "different": "at least 0"}[self.kind]
            raise RecipeError(f"margin {self.margin!r} of claim {self.text!r} must be {wanted} for kind {self.kind!r}")
        if self.needs < 2:
            raise RecipeError(f"claim {self.text!r} needs {self.needs} seeds, but no interval exists for fewer than 2")


@dataclass(frozen=True)
class Verdict:
    """What became of a claim; numbers are None where there is none, in units of the metric."""

    text: str
    metric: str
    estimate: float | None
    low: float | None
    high: float | None
    p: float | None
    adjusted_p: float | None
    n: int
    verdict: Outcome
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Evidence:
    """The paired data of one claim and its test, before correction."""

    interval: Interval
    p: float
    asked: int
    diverged: int
    obstacle: str = ""


def collect(trials: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, dict[int, float | None]]]:
    """Return metric -> arm -> seed -> value from the trials of a results file, failures included.

    A trial that did not end well has None for every metric that any trial reports; a diverged one has nan.
    """
    trials = list(trials)
    metrics = dict.fromkeys(name for trial in trials for name in trial.get("metrics") or {})
    table: dict[str, dict[str, dict[int, float | None]]] = {name: {} for name in metrics}
    for trial in trials:
        lost = {"ok": None, "diverged": math.nan}.get(trial["status"])
        found = (trial.get("metrics") or {}) if trial["status"] == "ok" else {}
        for name in metrics:
            table[name].setdefault(trial["arm"], {})[trial["seed"]] = found.get(name, lost)
    return table


def judge(claims: Sequence[Claim], values: Values) -> list[Verdict]:
    """Return the verdict on each claim by the rules of this module, corrected over all claims that can be tested."""
    evidence = [_gather(claim, values) for claim in claims]
    adjusted = holm([found.p for found in evidence])
    return [_verdict(claim, found, p) for claim, found, p in zip(claims, evidence, adjusted, strict=True)]


def _gather(claim: Claim, values: Values) -> _Evidence:
    arms = values.get(claim.metric, {})
    nothing = mean_interval([])
    missing = [arm for arm in claim.contrast if arm not in arms]
    if missing:
        what = f"metric {claim.metric!r} was not measured" if not arms else f"arm {missing[0]!r} was not run"
        return _Evidence(nothing, math.nan, 0, 0, what)
    seeds = dict.fromkeys(seed for arm in claim.contrast for seed in arms[arm])
    numbers = {
        arm: {seed: value for seed, value in arms[arm].items() if value is not None and math.isfinite(value)}
        for arm in claim.contrast
    }
    diverged = {s for arm in claim.contrast for s, v in arms[arm].items() if v is not None and not math.isfinite(v)}
    paired = contrast(numbers, claim.contrast)
    differences = [paired[seed] for seed in seeds if seed in paired]
    if len(differences) < claim.needs:
        obstacle = f"{claim.needs} seeds are needed"
        return _Evidence(mean_interval(differences), math.nan, len(seeds), len(diverged), obstacle)
    return _test(claim, differences, len(seeds), len(diverged))


def _test(claim: Claim, differences: Sequence[float], asked: int, diverged: int) -> _Evidence:
    if claim.kind == "equivalent":
        shown = equivalence_test(differences, claim.margin)
        return _Evidence(shown.interval, shown.p, asked, diverged)
    above = t_test(differences, claim.margin, "greater")
    if claim.kind == "greater":
        return _Evidence(mean_interval(differences), above, asked, diverged)
    below = t_test(differences, -claim.margin, "less")
    return _Evidence(mean_interval(differences), min(1.0, 2.0 * min(above, below)), asked, diverged)


def _verdict(claim: Claim, found: _Evidence, adjusted: float) -> Verdict:
    interval = found.interval
    seeds = f"n = {interval.n} of {found.asked}"
    if found.diverged:
        seeds += f", {found.diverged} diverged"
    outcome, reason = _decide(claim, found, adjusted)
    return Verdict(
        text=claim.text,
        metric=claim.metric,
        estimate=_plain(interval.mean),
        low=_plain(interval.low),
        high=_plain(interval.high),
        p=_plain(found.p),
        adjusted_p=_plain(adjusted),
        n=interval.n,
        verdict=outcome,
        reason=f"{reason}; {seeds}",
    )


def _decide(claim: Claim, found: _Evidence, adjusted: float) -> tuple[Outcome, str]:
    if found.obstacle:
        return "not testable here", found.obstacle
    claimed, clear, refuted = _sides(claim, found.interval)
    border = _border(claim)
    if not claimed:
        certainty = "and the interval is clear of it" if refuted else "though the interval reaches it"
        return "fails", f"the estimate is not {border}, {certainty}"
    if not clear:
        return "leans", f"the estimate is {border}, but part of the interval is not"
    if adjusted >= ALPHA:
        return "leans", f"the interval is {border}, but p is {adjusted:.2g} once corrected for the other claims"
    if found.diverged:
        return "leans", f"the interval is {border}, but not every run of these arms reached a finite value"
    return "holds", f"the interval is {border}"


def _sides(claim: Claim, interval: Interval) -> tuple[bool, bool, bool]:
    """Return whether the estimate is on the claimed side, the interval wholly is, the interval wholly is not."""
    mean, low, high, m = interval.mean, interval.low, interval.high, claim.margin
    if claim.kind == "greater":
        return _above(mean, m), _above(low, m), not _above(high, m)
    if claim.kind == "equivalent":
        within = _above(m, mean) and _above(mean, -m)
        return within, _above(m, high) and _above(low, -m), not (_above(m, low) and _above(high, -m))
    beyond = _above(mean, m) or _above(-m, mean)
    return beyond, _above(low, m) or _above(-m, high), not (_above(high, m) or _above(-m, low))


def _above(a: float, b: float) -> bool:
    """Tell whether `a` exceeds `b` by more than float rounding."""
    return a - b > ROUNDING * max(abs(a), abs(b))


def _border(claim: Claim) -> str:
    if claim.kind == "greater":
        return f"above {claim.margin:g}"
    if claim.kind == "equivalent":
        return f"within ±{claim.margin:g}"
    return f"beyond ±{claim.margin:g}" if claim.margin else "away from 0"


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
