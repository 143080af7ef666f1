"""Speed-up against sparsity: the lines of the plot and of the table of crossovers, drawn from merged rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from openwork.bench.operators import PATTERNS, crossover
from openwork.bench.peers import OURS
from openwork.bench.results import Row

UNSTRUCTURED = next(iter(PATTERNS))


@dataclass(frozen=True)
class Curve:
    """One line: who, and (sparsity, ratio to the best dense mode) with sparsity rising."""

    name: str
    points: tuple[tuple[float, float], ...]

    @property
    def crossover(self) -> float | None:
        """The sparsity from which on it is at least as fast as dense, None if it never is."""
        return crossover(self.points)


def shapes(rows: Iterable[Row], threads: int) -> list[str]:
    """Return the shapes that were measured with so many threads, in their order."""
    return list(dict.fromkeys(str(row.cell["shape"]) for row in rows if row.kind == "operator" and row.threads == threads))


def curves(rows: Sequence[Row], shape: str, threads: int) -> list[Curve]:
    """Return our line for each pattern, and one for each peer that is not dense torch, on unstructured zeros."""
    points: dict[str, dict[float, float]] = {}
    for row in rows:
        if row.kind != "operator" or row.threads != threads or row.cell["shape"] != shape:
            continue
        sparsity, pattern = float(row.cell["sparsity"]), str(row.cell["pattern"])
        for name, arm in row.arms.items():
            if arm.ratio is not None and not arm.dense and (name == OURS or pattern == UNSTRUCTURED):
                points.setdefault(label(name, pattern), {})[sparsity] = arm.ratio
    ordered = sorted(points, key=rank)
    return [Curve(name, tuple(sorted(points[name].items()))) for name in ordered]


def label(name: str, pattern: str) -> str:
    """Return a line's name: our own says its pattern."""
    return f"{OURS}, {pattern}" if name == OURS else name


def spans(rows: Iterable[Row], threads: int, few: Mapping[str, int]) -> dict[tuple[float, str], tuple[float, float, int]]:
    """Return lowest and highest ratio and how many cells, by sparsity and line, over shapes with `few` columns.

    Args:
        rows: merged rows.
        threads: of the rows.
        few: `low` and `high`, the columns of the shapes.
    """
    found: dict[tuple[float, str], list[float]] = {}
    for row in rows:
        if row.kind != "operator" or row.threads != threads or not few["low"] <= int(row.cell["columns"]) <= few["high"]:
            continue
        pattern = str(row.cell["pattern"])
        for name, arm in row.arms.items():
            if arm.ratio is not None and not arm.dense and (name == OURS or pattern == UNSTRUCTURED):
                found.setdefault((float(row.cell["sparsity"]), label(name, pattern)), []).append(arm.ratio)
    return {key: (min(ratios), max(ratios), len(ratios)) for key, ratios in found.items()}


def rank(name: str) -> tuple[bool, int, str]:
    """Return the place of a line: ours by pattern, then the others by name."""
    patterns = [label(OURS, pattern) for pattern in PATTERNS]
    return name not in patterns, patterns.index(name) if name in patterns else 0, name
