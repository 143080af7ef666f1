"""Numbers for the plots, drawn from a results file: one series a line, means over the seeds that ended well."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from openwork.report.summary import DENSE, Results, Row, line_of, lines, main_metric, rows
from openwork.report.text import finite

POINTS = 200
"""A curve is thinned to at most this many points."""


@dataclass(frozen=True)
class Series:
    """One line: places `x`, values `y`, and where there are intervals their bounds; `labels` name places."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    labels: tuple[str, ...] = field(default=())

    def bounds(self, at: int) -> tuple[float, float]:
        """Return the interval at one place, or the value twice where there is none."""
        low, high = (bound[at] if at < len(bound) else math.nan for bound in (self.low, self.high))
        return (self.y[at] if math.isnan(low) else low), (self.y[at] if math.isnan(high) else high)


def accuracy_series(results: Results, against: str = "density") -> tuple[list[Series], Series | None]:
    """Return the main metric against a field of the rows, one series a line and one for dense if it was run.

    Shares are in percent. Rows without a finite metric or a positive place are left out. Places fall with density.
    """
    found = {name: _accuracies(results, name, against) for name in lines(results)}
    dense = found.pop(DENSE, None)
    return [series for series in found.values() if series.x], dense if dense and dense.x else None


def layer_series(results: Results, density: float) -> list[Series]:
    """Return the kept share of each layer for each line at this density; `labels` are the layers."""
    found = []
    for name, trials in _trials_at(results, density):
        shares: dict[str, list[float]] = {}
        for trial in trials:
            for layer_name, layer in (trial.get("layers") or {}).items():
                kept, total = finite(layer.get("kept")), finite(layer.get("total"))
                if kept is not None and total:
                    shares.setdefault(str(layer_name), []).append(kept / total)
        if shares:
            values = tuple(math.fsum(share) / len(share) for share in shares.values())
            found.append(Series(name, tuple(map(float, range(len(values)))), values, labels=tuple(shares)))
    return found


def loss_series(results: Results, density: float) -> list[Series]:
    """Return the training loss against the step for dense and for each line at this density, meaned over seeds.

    A step counts if every seed reports a finite loss there.
    """
    groups = _trials_at(results, density)
    if groups:
        groups = [*_trials_of(results, [row for row in rows(results) if row.get("method") == DENSE]), *groups]
    found = []
    for name, trials in groups:
        curves = [_curve(trial) for trial in trials]
        curves = [curve for curve in curves if curve]
        steps = sorted(set.intersection(*map(set, curves))) if curves else []
        if len(steps) > POINTS:
            steps = [steps[round(at * (len(steps) - 1) / (POINTS - 1))] for at in range(POINTS)]
        if len(steps) > 1:
            means = tuple(math.fsum(curve[step] for curve in curves) / len(curves) for step in steps)
            found.append(Series(name, tuple(steps), means))
    return found


def _accuracies(results: Results, name: str, against: str) -> Series:
    places: list[tuple[float, float, float, float]] = []
    unit = 100.0 if main_metric(results).share else 1.0
    for row in rows(results):
        accuracy = row.get("accuracy")
        if line_of(row) != name or not isinstance(accuracy, Mapping):
            continue
        x, mean = finite(row.get(against)), finite(accuracy.get("mean"))
        if x is None or mean is None or x <= 0.0:
            continue
        low, high = (math.nan if (b := finite(accuracy.get(side))) is None else unit * b for side in ("low", "high"))
        places.append((x, unit * mean, low, high))
    x_y_low_high = list(zip(*places, strict=True)) or [(), (), (), ()]
    return Series(name, *x_y_low_high)


def _trials_at(results: Results, density: float) -> list[tuple[str, list[Mapping[str, Any]]]]:
    return _trials_of(
        results, [row for row in rows(results) if row.get("density") == density and row.get("method") != DENSE]
    )


def _trials_of(results: Results, wanted: Sequence[Row]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    order = lines(results)
    arm_of = {line_of(row): row.get("arm") for row in wanted}
    return [(name, list(_well(results, arm_of[name]))) for name in sorted(arm_of, key=order.index)]


def _well(results: Results, arm: object) -> Iterable[Mapping[str, Any]]:
    return (t for t in results.get("trials") or [] if t.get("arm") == arm and t.get("status") == "ok")


def _curve(trial: Mapping[str, Any]) -> dict[float, float]:
    pairs = (trial.get("curves") or {}).get("loss") or []
    numbers = ((finite(step), finite(value)) for step, value in pairs)
    return {step: value for step, value in numbers if step is not None and value is not None}
