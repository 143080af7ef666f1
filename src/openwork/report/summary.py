"""What a results file says, in a few sentences that are computed from it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openwork.lab.claims import collect
from openwork.lab.stats import Interval, paired_interval
from openwork.report.text import count, finite, listing, percent, points, scaled, visible

Results = Mapping[str, Any]
Row = Mapping[str, Any]
DENSE = "dense"


@dataclass(frozen=True)
class Rival:
    """Another method at the same density, and the paired difference in accuracy of the best one over it."""

    row: Row
    lead: Interval

    @property
    def clear(self) -> bool:
        """Whether the interval of the lead excludes 0."""
        return self.lead.low > 0.0


@dataclass(frozen=True)
class Standing:
    """The best method at one density, its rivals from second to last, and its difference from dense."""

    density: float
    best: Row
    rivals: tuple[Rival, ...]
    dense: Interval | None

    @property
    def clear(self) -> bool:
        """Whether the best method leads every rival by an interval that excludes 0."""
        return all(rival.clear for rival in self.rivals)


@dataclass(frozen=True)
class Main:
    """The metric that a table is about: its name, its heading, and whether it is a share shown in percent."""

    name: str
    heading: str
    share: bool


def main_metric(results: Results) -> Main:
    """Return the first of the results' columns; accuracy if they name none."""
    name, heading = next(iter((results.get("columns") or {"accuracy": "accuracy"}).items()))
    return Main(str(name), str(heading), str(name).endswith("accuracy"))


def line_of(entry: Row) -> str:
    """Return the line that a row or an arm belongs to: its arm's name without the density; "dense" for dense."""
    name = str(entry.get("arm") or entry.get("name") or entry.get("method"))
    return DENSE if entry.get("method") == DENSE else re.sub(r"(?<=.)@[\d.e-]+$", "", name)


def rows(results: Results) -> list[Row]:
    """Return the rows: dense first, then by falling density; within one density shares fall, others keep their order."""
    found = [row for row in results.get("rows") or [] if isinstance(row, Mapping)]
    share = main_metric(results).share
    return sorted(found, key=lambda row: (row.get("method") != DENSE, -_density(row), -_mean(row) if share else 0.0))


def densities(results: Results) -> list[float]:
    """Return the densities of the sparse rows, the largest first."""
    return sorted({_density(row) for row in rows(results) if row.get("method") != DENSE}, reverse=True)


def lines(results: Results) -> list[str]:
    """Return the lines in the order of the recipe's arms, dense first where it is there."""
    listed = [*(results.get("arms") or []), *(results.get("rows") or [])]
    names = dict.fromkeys(line_of(entry) for entry in listed if isinstance(entry, Mapping))
    return sorted(names, key=lambda name: name != DENSE)


def standings(results: Results) -> list[Standing]:
    """Return who leads at each density, the largest density first; rows without an accuracy do not compete.

    Where the main metric is no accuracy, nothing says which side is better, and nobody leads.
    """
    main = main_metric(results)
    if not main.share:
        return []
    values = collect(results.get("trials") or []).get(main.name, {})
    known = {arm: {s: v for s, v in seeds.items() if v is not None and math.isfinite(v)} for arm, seeds in values.items()}
    reference = next((row["arm"] for row in rows(results) if row.get("method") == DENSE), None)
    found = []
    for density in densities(results):
        ranked = [
            row
            for row in rows(results)
            if row.get("method") != DENSE and _density(row) == density and math.isfinite(_mean(row))
        ]
        if not ranked:
            continue
        best, *others = ranked
        own = known.get(best["arm"], {})
        rivals = tuple(Rival(row, paired_interval(own, known.get(row["arm"], {}))) for row in others)
        dense = paired_interval(own, known.get(reference, {})) if reference is not None else None
        found.append(Standing(density, best, rivals, dense if dense and dense.n else None))
    return found


def headline(results: Results) -> str:
    """Return the one sentence that a reader should take along."""
    if results.get("claims"):
        return _claims_headline(results["claims"])
    found = standings(results)
    if not found:
        return failures(results)
    return _leaders(found) if any(standing.rivals for standing in found) else _lone(found)


def sentences(results: Results) -> list[tuple[str, str]]:
    """Return for each density its label and the sentence on who leads, by how much, and how far dense is."""
    return [(percent(standing.density), _sentence(standing)) for standing in standings(results)]


def seeds_of(results: Results, row: Row) -> tuple[int, int]:
    """Return how many seeds of a row's arm have the main metric, and how many were asked for."""
    ended, asked = (int(finite(row.get(name)) or 0) for name in ("n", "seeds"))
    return ended, max(asked, ended)


def losses(results: Results) -> list[Mapping[str, Any]]:
    """Return the trials that did not end well, in order."""
    return [trial for trial in results.get("trials") or [] if trial.get("status") != "ok"]


def failures(results: Results) -> str:
    """Return how many trials ended well and what became of the others."""
    total, lost = len(results.get("trials") or []), losses(results)
    if not total:
        return "No trial was run."
    if not lost:
        return f"All {count(total, 'trial')} ended well." if total > 1 else f"{count(total, 'trial')}, none failed."
    kinds = Counter(visible(trial.get("status"), 20) for trial in lost)
    return (
        f"{len(lost)} of {count(total, 'trial')} did not end well: " + listing([f"{n} {k}" for k, n in kinds.items()]) + "."
    )


def _density(row: Row) -> float:
    return finite(row.get("density")) or 0.0


def _mean(row: Row) -> float:
    accuracy = row.get("accuracy")
    mean = finite(accuracy.get("mean")) if isinstance(accuracy, Mapping) else None
    return -math.inf if mean is None else mean


def _claims_headline(claims: Sequence[Mapping[str, Any]]) -> str:
    kinds = Counter(str(claim.get("verdict")) for claim in claims)
    words = {"holds": ("holds", "hold"), "leans": ("leans its way", "lean their way"), "fails": ("fails", "fail")}
    words["not testable here"] = ("is not testable here", "are not testable here")
    if len(claims) == 1:
        (kind,) = kinds
        return f"The claim {words.get(kind, (visible(kind),))[0]}."
    if len(kinds) == 1 and (kind := next(iter(kinds))) in words:
        return f"All {len(claims)} claims {words[kind][1]}."
    parts = [f"{n} {words[kind][n != 1]}" for kind in words if (n := kinds[kind])]
    return f"Of {len(claims)} claims, {listing(parts)}." if parts else f"{len(claims)} claims, none judged."


def _leaders(found: Sequence[Standing]) -> str:
    leads: dict[str, list[Standing]] = {}
    for standing in found:
        leads.setdefault(_name(standing.best), []).append(standing)
    clear = [percent(standing.density) for standing in found if standing.rivals and standing.clear]
    if len(found) == 1:
        known = "and its lead is clear" if clear else "but its lead is not clear"
        return f"{_name(found[0].best)} is the most accurate at {percent(found[0].density)} density, {known}."
    if len(leads) == 1:
        (name,) = leads
        first = f"{name} is the most accurate at all {len(found)} densities"
    else:
        first = "No method leads everywhere: " + "; ".join(
            f"{name} at {listing([percent(standing.density) for standing in places])}" for name, places in leads.items()
        )
    if not clear:
        return f"{first}. Nowhere is the lead clear."
    if len(clear) == len(found):
        return f"{first}. Everywhere the lead is clear."
    return f"{first}. The lead is clear at {listing(clear)} only."


def _lone(found: Sequence[Standing]) -> str:
    parts = [f"{scaled(standing.best['accuracy']['mean'])} % at {percent(standing.density)}" for standing in found]
    names = listing(list(dict.fromkeys(_name(standing.best) for standing in found)))
    return f"{names}: accuracy {listing(parts)} density."


def _sentence(standing: Standing) -> str:
    best = standing.best
    accuracy = best["accuracy"]
    text = f"{_name(best)} reaches {scaled(accuracy['mean'])} %"
    if standing.dense is not None:
        text += f", {_against_dense(standing.dense)}"
    if not standing.rivals:
        return text + "."
    second = standing.rivals[0]
    text += f". {_lead(second)}"
    close = [_name(rival.row) for rival in standing.rivals[1:] if not rival.clear]
    if close and standing.rivals[0].lead.n > 1:
        text += f"; {listing(close)} {'is' if len(close) == 1 else 'are'} not clearly behind either"
    return text + "."


def _against_dense(difference: Interval) -> str:
    size = points(abs(difference.mean)).lstrip("+")
    side = "above" if difference.mean > 0.0 else "below"
    if not difference.low <= 0.0 <= difference.high and difference.mean != 0.0:
        return f"{size} points {side} dense" + _range(difference)
    if difference.n > 1:
        return f"not clearly different from dense: {points(difference.mean)} points" + _range(difference)
    return "the same as dense" + _range(difference)


def _lead(rival: Rival) -> str:
    lead = rival.lead
    if lead.n == 0:
        return f"It shares no seed with {_name(rival.row)}, the next"
    size = f"{points(lead.mean).lstrip('+')} points" + _range(lead)
    if rival.clear:
        return f"It leads {_name(rival.row)}, the next, by {size}"
    if math.isfinite(lead.low):
        return f"Its lead over {_name(rival.row)}, the next, is not clear: {size}"
    return f"Its lead over {_name(rival.row)}, the next, is {size}"


def _range(interval: Interval) -> str:
    if not math.isfinite(interval.low):
        return " (one seed, no interval)"
    return f" (95 % interval {points(interval.low)} to {points(interval.high)})"


def _name(row: Row) -> str:
    return visible(line_of(row), 40)
