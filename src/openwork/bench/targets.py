"""What was promised, and what was measured: every target with the cell that came out worst, and why if it was missed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from openwork.bench import roofline
from openwork.bench.networks import ENCODER
from openwork.bench.peers import OURS
from openwork.bench.results import Arm, Row
from openwork.bench.roofline import Limits

FEW = (16, 63)
"""Columns at which the targets are `FEW_RATE` of those for 64 and more."""
FEW_RATE = 0.85
ROOFLINE = 0.8
BLOCKS = {"unstructured": 1, "blocks of 2": 2, "blocks of 4": 4}


@dataclass(frozen=True)
class Found:
    """One measured number that a target is held against.

    Attributes:
        value: the ratio, share or seconds.
        where: the cell in words.
        most: the value at the roofline, None where that is not known.
        share: the share of the roofline that was reached.
        row: what was measured there; None for what is no product.
    """

    value: float
    where: str
    most: float | None = None
    share: float | None = None
    row: Row | None = None


@dataclass(frozen=True)
class Target:
    """A promise.

    Attributes:
        name: a short name, by which a hand-written reason is found.
        text: what is promised.
        wanted: the number.
        find: returns the numbers that it is held against, one a cell.
        unit: `x` for ratios, `%` for shares, `s` for seconds.
        below: whether the number must be at most, not at least, what is wanted.
    """

    name: str
    text: str
    wanted: float
    find: Callable[[Sequence[Row]], list[Found]]
    unit: str = "x"
    below: bool = False


@dataclass(frozen=True)
class Judged:
    """A target and what came of it: `reached` is None where nothing was measured; `worst` is the worst cell."""

    target: Target
    reached: bool | None
    worst: Found | None
    cells: int
    met: int
    reason: str = ""


def targets() -> list[Target]:
    """Return the targets in the order of the table."""
    made = [
        Target("faster than dense", "64 columns and more, from 50 % on: faster than the best dense mode", 1.0,
               _ratios(lambda cell: cell["columns"] >= 64)),
    ]  # fmt: skip
    for sparsity, single, blocks in ((0.8, 3.0, 4.5), (0.9, 6.0, 8.5), (0.95, 11.0, 14.0)):
        for pattern, wanted in (("unstructured", single), ("blocks of 4", blocks)):
            name = f"{100 * sparsity:g} % {pattern}"
            made.append(Target(name, f"64 columns and more, {name}", wanted, _at(sparsity, pattern, (64, 10**9))))
            made.append(
                Target(f"{name}, few columns", f"16 to 63 columns, {name}: no more than 15 % below", FEW_RATE * wanted,
                       _at(sparsity, pattern, FEW))
            )  # fmt: skip
    made += [
        Target("roofline", "64 columns and more, from 80 % on: share of the roofline", ROOFLINE, _shares, "%"),
        Target("every peer", "16 columns and more, from 50 % on: faster than the fastest peer", 1.0, _against_peers),
        Target("one column", "one column: never slower than the best of dense and CSR", 1.0, _one_column),
        Target("one column, 90 %", "one column, 90 %", 3.0, _ratios(lambda c: c["columns"] == 1 and c["sparsity"] == 0.9)),
    ]
    for name, text, wanted, chosen in _NETWORKS:
        made.append(Target(name, f"end to end, {text}", wanted, _network(chosen)))
    made += [
        Target("training, 95 %", "a training step of 784-1000-1000-1000-10, batch 128, 95 %: over masked dense", 1.5,
               _task("training 95 %")),
        Target("training, 99 %", "the same at 99 %", 4.0, _task("training 99 %")),
        Target("decode", "decoding TopK codes, 768 from 32768, k 32, batch 2048: over dense", 10.0, _task("decode")),
        Target("accelerate, first", "accelerate ResNet-50 for the first time", 20.0, _seconds("first"), "s", below=True),
        Target("accelerate, warm", "accelerate ResNet-50 again, in a new process", 2.0, _seconds("warm"), "s", below=True),
    ]  # fmt: skip
    return made


_NETWORKS: tuple[tuple[str, str, float, Mapping[str, Any]], ...] = (
    ("MobileNet-v1 @224", "MobileNet-v1 1.0 at 224 pixels, 90 % of 1x1", 3.0,
     {"model": "mobilenet-v1", "input": [1, 3, 224, 224], "density": 0.1}),
    ("MobileNet-v1 @128", "MobileNet-v1 1.0 at 128 pixels, 90 % of 1x1", 2.4,
     {"model": "mobilenet-v1", "input": [1, 3, 128, 128], "density": 0.1}),
    ("MobileNet-v1 0.25 @64", "MobileNet-v1 0.25 at 64 pixels, 90 % of 1x1", 2.0,
     {"model": "mobilenet-v1", "input": [1, 3, 64, 64], "density": 0.1}),
    ("ResNet-18", "ResNet-18 at 224 pixels, 90 % of the convolutions", 2.5, {"model": "resnet18", "density": 0.1}),
    ("encoder", "an encoder of BERT-base's size at 128 tokens, 90 % of the linear layers", 3.0,
     {"model": ENCODER, "density": 0.1}),
    ("kernel groups", "MobileNet-v1 1.0 at 224 pixels, kernel groups, 30 % of 1x1", 1.27,
     {"model": "mobilenet-v1", "density": 0.7}),
)  # fmt: skip


def judge(
    rows: Sequence[Row], reasons: Mapping[str, str] | None = None, limits: Mapping[int, Limits | None] | None = None
) -> list[Judged]:
    """Return every target with its worst cell and, where it is missed, the reason: that of `reasons`, else the roofline's.

    Args:
        rows: merged rows.
        reasons: hand-written reasons by the target's name.
        limits: of the machine, by the number of threads.
    """
    found = []
    for target in targets():
        cells = target.find(rows)
        good = [_is_met(target, one.value) for one in cells]
        if not cells:
            found.append(Judged(target, None, None, 0, 0, (reasons or {}).get(target.name, "not measured")))
            continue
        worst = (max if target.below else min)(cells, key=lambda one: one.value)
        reason = "" if all(good) else (reasons or {}).get(target.name) or _why(target, worst, limits or {})
        found.append(Judged(target, all(good), worst, len(cells), sum(good), reason))
    return found


def claims(judged: Iterable[Judged]) -> list[dict[str, Any]]:
    """Return the targets as claims of a results file, so that they are counted beside the studies'."""
    words = {True: "holds", False: "fails", None: "not testable here"}
    return [
        {
            "text": one.target.text, "verdict": words[one.reached], "metric": "ratio", "reason": one.reason,
            "estimate": None if one.worst is None else one.worst.value, "wanted": one.target.wanted,
        }
        for one in judged
    ]  # fmt: skip


def _is_met(target: Target, value: float) -> bool:
    return value <= target.wanted if target.below else value >= target.wanted


def _why(target: Target, worst: Found, limits: Mapping[int, Limits | None]) -> str:
    """Return what the roofline says about a missed target, and what the time of the worst cell goes into."""
    if target.unit == "x" and worst.most is not None and worst.most < target.wanted:
        return f"beyond this machine: its roofline allows {worst.most:.2g}x there"
    if worst.share is None:
        return "measured below"
    found = {} if worst.row is None else profile(worst.row, limits)
    spent = ", ".join(f"{words} {100 * share:.0f} %" for words, share in found.items())
    words = f"the kernel runs at {100 * worst.share:.0f} % of the roofline there"
    return f"{words}; by themselves, of its time: {spent}" if spent else words


def profile(row: Row, limits: Mapping[int, Limits | None]) -> dict[str, float]:
    """Return how much of a product's time each resource of the machine would take by itself, at the least.

    Empty if the machine's limits or the time are not known.
    """
    machine, arm, cell = limits.get(row.threads), row.arms.get(OURS), row.cell
    if machine is None or arm is None or not arm.ms:
        return {}
    kept, block = round((1 - cell["sparsity"]) * cell["out"] * cell["size"]), BLOCKS.get(cell["pattern"], 1)
    work = roofline.Work(cell["out"], cell["size"], cell["columns"], kept, block)
    needs = roofline.parts(machine, work)
    refills = roofline.refill_seconds(machine, work)
    needs |= {} if refills is None else {"refills of it from the second": refills}
    order = ("multiply-adds", "loads from the first cache", "refills of it from the second", "memory")
    return {words: 1e3 * needs[words] / arm.ms for words in order if words in needs}


def _ours(rows: Iterable[Row], kind: str) -> Iterator[tuple[Row, Arm, Found]]:
    """Yield the rows in which openwork has a ratio, with the arm and what a target needs of it."""
    for row in rows:
        arm = row.arms.get(OURS)
        if row.kind == kind and arm is not None and arm.ratio is not None:
            dense = row.dense_ms
            most = dense / row.least_ms if dense and row.least_ms else None
            threads = f"{row.threads} thread" + ("s" if row.threads != 1 else "")
            product = row if kind == "operator" else None
            yield row, arm, Found(arm.ratio, f"{_words(row)}, {threads}", most, arm.share, product)


def _words(row: Row) -> str:
    if row.kind != "operator":
        return row.key.removesuffix(f" {row.threads}")
    return f"{row.cell['shape']}, {100.0 * row.cell['sparsity']:g} % {row.cell['pattern']}"


def _ratios(chosen: Callable[[Mapping[str, Any]], bool]) -> Callable[[Sequence[Row]], list[Found]]:
    return lambda rows: [found for row, _, found in _ours(rows, "operator") if chosen(row.cell)]


def _at(sparsity: float, pattern: str, columns: tuple[int, int]) -> Callable[[Sequence[Row]], list[Found]]:
    low, high = columns
    return _ratios(
        lambda cell: cell["sparsity"] == sparsity and cell["pattern"] == pattern and low <= cell["columns"] <= high
    )


def _shares(rows: Sequence[Row]) -> list[Found]:
    return [
        replace(found, value=found.share)
        for row, _, found in _ours(rows, "operator")
        if found.share is not None and row.cell["columns"] >= 64 and row.cell["sparsity"] >= 0.8
    ]


def _against_peers(rows: Sequence[Row]) -> list[Found]:
    """Return our speed over that of the fastest other arm, cell by cell."""
    made = []
    for row, arm, found in _ours(rows, "operator"):
        rivals = {name: other.ratio for name, other in row.arms.items() if name != OURS and other.ratio}
        if row.cell["columns"] >= FEW[0] and rivals and arm.ratio:
            best = max(rivals, key=lambda name: rivals[name])
            most = None if found.most is None else found.most / rivals[best]
            value = arm.ratio / rivals[best]
            made.append(replace(found, value=value, where=f"{found.where}, against {best}", most=most))
    return made


def _one_column(rows: Sequence[Row]) -> list[Found]:
    made = []
    for row, arm, found in _ours(rows, "operator"):
        rivals = [other.ratio for name, other in row.arms.items() if other.ratio and (other.dense or name.endswith("_csr"))]
        if row.cell["columns"] == 1 and rivals and arm.ratio:
            made.append(replace(found, value=arm.ratio / max(rivals), most=None))
    return made


def _network(chosen: Mapping[str, Any]) -> Callable[[Sequence[Row]], list[Found]]:
    def find(rows: Sequence[Row]) -> list[Found]:
        return [
            found
            for row, _, found in _ours(rows, "network")
            if all(_same(row.cell.get(name), value) for name, value in chosen.items())
        ]

    return find


def _same(one: Any, two: Any) -> bool:
    return list(one) == two if isinstance(two, list) and one is not None else bool(one == two)


def _task(name: str) -> Callable[[Sequence[Row]], list[Found]]:
    return lambda rows: [found for row, _, found in _ours(rows, "task") if row.cell["name"] == name]


def _seconds(arm: str) -> Callable[[Sequence[Row]], list[Found]]:
    def find(rows: Sequence[Row]) -> list[Found]:
        times = [
            (row, row.arms[arm].ms)
            for row in rows
            if row.kind == "task" and row.cell["name"] == "accelerate" and arm in row.arms
        ]
        return [Found(ms / 1e3, f"ResNet-50 at 224 pixels, {row.threads} threads") for row, ms in times if ms is not None]

    return find
