"""docs/results/performance.md: targets, products, networks, tasks and peers, from a results file and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from openwork import atomic
from openwork.bench import curves, peers, plot, runner
from openwork.bench.peers import OURS
from openwork.bench.results import Arm, Row
from openwork.bench.roofline import Limits
from openwork.bench.targets import Judged, claims, judge
from openwork.report.svg import standalone
from openwork.report.tables import escape_markdown, markdown
from openwork.report.text import NOTHING, count, listing, percent, visible

COMMAND = "python benchmarks/performance.py"
WIDTHS = (
    ("64 columns and more", {"low": 64, "high": 10**9}),
    ("16 to 63 columns", {"low": 16, "high": 63}),
    ("one column", {"low": 1, "high": 1}),
)


def write(bench: runner.Bench, folder: Path) -> Path:
    """Write performance.md, its figures and performance.json into a folder of results; return the page's path.

    Raises:
        StoreError: if a file cannot be written.
    """
    rows = bench.merged()
    judged = judge(rows, bench.reasons, bench.limits)
    page = folder / "performance.md"
    drawn = []
    for threads in thread_counts(rows):
        svg = plot.speedups(rows, threads, name=f"speedups{threads}")
        if svg:
            path = folder / "figures" / f"performance-{threads}.svg"
            atomic.write_bytes(path, standalone(svg).encode("utf-8", "backslashreplace"))
            drawn.append((threads, f"figures/{path.name}"))
    runner.write(folder / "performance.json", bench, claims(judged))
    atomic.write_bytes(page, text(bench, rows, judged, drawn).encode("utf-8", "backslashreplace"))
    return page


def text(bench: runner.Bench, rows: Sequence[Row], judged: Sequence[Judged], drawn: Iterable[tuple[int, str]] = ()) -> str:
    """Return the page as Markdown.

    Args:
        bench: for the machine and its limits.
        rows: merged rows.
        judged: the targets.
        drawn: number of threads and path of each figure.
    """
    machine = bench.environment
    where = visible(bench.identity.get("processor") or machine.get("processor") or NOTHING, 120)
    parts = [
        "# Performance",
        escape_markdown(f"Measured on {where}, {machine.get('date', 'at an unknown date')}. ") + _headline(judged),
    ]
    parts += [RULES, "## Targets", targets_table(judged)]
    for threads, path in drawn:
        parts.append(f"![speed-up against sparsity, {_threads(threads)}]({path})")
    operators = [row for row in rows if row.kind == "operator"]
    if operators:
        parts += ["## Products", "Ranges over the shapes; peers on unstructured zeros."]
    for threads in thread_counts(operators):
        parts += [f"### {_threads(threads)}", *_spans(operators, threads)]
        parts += ["Sparsity from which on each is faster than dense:", crossover_table(operators, threads)]
    parts += _section("## Networks", [row for row in rows if row.kind == "network"])
    parts += _section("## Training, decoding, accelerating", [row for row in rows if row.kind == "task"])
    parts += (
        ["## Every product", *(_details(operators, threads) for threads in thread_counts(operators))] if operators else []
    )
    parts += ["## Peers", peers_table(rows, bench.identity.get("packages") or {})]
    parts += ["## The machine", limits_table(bench.limits), _facts(machine)]
    parts += ["## Run it again", f"```sh\n{COMMAND}\n```"]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


RULES = """A ratio is the best dense torch time (eager NCHW and NHWC, matrix product, linear, compiled with frozen weights)
over the arm's: above 1 is faster than dense. Times are medians of interleaved rounds in one process; where there is more
than one thread, peers with a thread pool of their own get a process of their own, with the dense modes. Every output is
checked against float64 first. The share is that of the roofline: the least time that multiply-adds, loads from the first
cache, and memory allow on this machine. Where a target is missed, the last column says what each of them, and the refills
of the first cache from the second, would take at the least of the time in the worst cell; they overlap in part only."""


def thread_counts(rows: Iterable[Row]) -> list[int]:
    """Return the numbers of threads that occur, the smallest first."""
    return sorted({row.threads for row in rows})


def targets_table(judged: Iterable[Judged]) -> str:
    """Return every target with its worst cell, whether it is reached, and why if it is not."""
    body = []
    for one in judged:
        sign = "≤" if one.target.below else "≥"
        wanted = f"{sign} {_amount(one.target.wanted, one.target.unit)}"
        measured = NOTHING if one.worst is None else _amount(one.worst.value, one.target.unit)
        reached = {True: "**yes**", False: "no", None: NOTHING}[one.reached]
        if one.reached is False and one.cells > 1:
            reached += f", {one.met} of {one.cells}"
        worst = "" if one.worst is None else one.worst.where
        body.append([escape_markdown(one.target.text), wanted, measured, escape_markdown(worst), reached,
                     escape_markdown(one.reason)])  # fmt: skip
    titles = ["target", "wanted", "worst", "where", "reached", "why"]
    return markdown(titles, body, [False, True, True, False, False, False])


def crossover_table(rows: Sequence[Row], threads: int) -> str:
    """Return for each shape and line the sparsity from which on it is faster than dense."""
    names = curves.shapes(rows, threads)
    found = {shape: {one.name: one for one in curves.curves(rows, shape, threads)} for shape in names}
    lines = list(dict.fromkeys(line for shape in names for line in found[shape]))
    body = [[shape, *(_crossing(found[shape].get(line)) for line in lines)] for shape in names]
    return markdown(["shape", *map(escape_markdown, lines)], body, [False, *[True] * len(lines)])


def peers_table(rows: Sequence[Row], packages: Mapping[str, str]) -> str:
    """Return every peer, what it is, and how it went: the worst that happened, with the reason."""
    body = []
    for name in peers.names():
        arms = [row.arms[name] for row in rows if name in row.arms]
        kinds = {kind: [arm for arm in arms if arm.status == kind] for kind in ("ok", "wrong", "crashed", "unavailable")}
        went = listing([f"{len(found)} {kind}" for kind, found in kinds.items() if found] or ["not asked"])
        reasons = dict.fromkeys(arm.reason for kind in ("wrong", "crashed", "unavailable") for arm in kinds[kind])
        body.append([name, escape_markdown(peers.load(name).ABOUT), went, escape_markdown(visible("; ".join(reasons), 400))])
    installed = ", ".join(f"{escape_markdown(name)} {escape_markdown(version)}" for name, version in packages.items())
    return markdown(["peer", "what", "cells", "why not"], body, [False] * 4) + f"\nPackages: {installed}."


def limits_table(limits: Mapping[int, Limits | None]) -> str:
    """Return what the machine reached, a row a number of threads."""
    known = {threads: one for threads, one in sorted(limits.items()) if one is not None}
    if not known:
        return ""
    sizes = [size for size, _ in next(iter(known.values())).reads]
    titles = [
        "threads",
        "kernels",
        "multiply-adds, GFLOP/s",
        "first cache",
        *(f"reads of {_bytes(size)}, GB/s" for size in sizes),
        "triad, GB/s",
    ]
    body = [
        [str(threads), one.target, f"{one.flops / 1e9:.0f}", _bytes(one.cache) if one.cache else NOTHING,
         *(f"{rate / 1e9:.0f}" for _, rate in one.reads), f"{one.triad / 1e9:.0f}"]
        for threads, one in known.items()
    ]  # fmt: skip
    return markdown(titles, body, [True, False, *[True] * (len(sizes) + 3)])


def arms_table(row: Row) -> str:
    """Return the arms of a network or task: time, ratio, error and share; those without a time say why."""
    body = []
    for name, arm in sorted(row.arms.items(), key=lambda item: item[1].ms if item[1].ms is not None else float("inf")):
        why = "" if arm.status == "ok" else f"{arm.status}: {visible(arm.reason, 160)}"
        body.append([escape_markdown(name), _ms(arm.ms), _ratio(arm), _share(arm), escape_markdown(why)])
    return markdown(["arm", "ms", "ratio", "roofline", ""], body, [False, True, True, True, False])


def _headline(judged: Sequence[Judged]) -> str:
    met, tried = sum(one.reached is True for one in judged), sum(one.reached is not None for one in judged)
    left = len(judged) - tried
    return f"{met} of {count(tried, 'target')} reached" + (f", {left} not measured." if left else ".")


def _spans(rows: Sequence[Row], threads: int) -> list[str]:
    parts = []
    for words, few in WIDTHS:
        found = curves.spans(rows, threads, few)
        if not found:
            continue
        lines = list(dict.fromkeys(line for _, line in sorted(found, key=lambda key: curves.rank(key[1]))))
        body = [
            [percent(sparsity), *(_span(found.get((sparsity, line))) for line in lines)]
            for sparsity in sorted({sparsity for sparsity, _ in found})
        ]
        parts.append(markdown([words, *map(escape_markdown, lines)], body, [True] * (len(lines) + 1)))
    return parts


def _section(title: str, rows: Sequence[Row]) -> list[str]:
    parts = [title] if rows else []
    for row in rows:
        parts += [f"### {escape_markdown(_name(row))}, {_threads(row.threads)}", arms_table(row)]
    return parts


def _details(rows: Sequence[Row], threads: int) -> str:
    """Return the full table of products, folded away."""
    chosen = [row for row in rows if row.threads == threads]
    names = sorted({name for row in chosen for name, arm in row.arms.items() if not arm.dense and arm.ms is not None},
                   key=lambda name: (name != OURS, name))  # fmt: skip
    titles = ["shape", "pattern", "sparsity", "dense, ms", "by", *names, "roofline"]
    body = []
    for row in chosen:
        dense = {name: arm.ms for name, arm in row.arms.items() if arm.dense and arm.ms is not None}
        best = min(dense, key=lambda name: dense[name], default=NOTHING)
        body.append([
            str(row.cell["shape"]), str(row.cell["pattern"]), percent(row.cell["sparsity"]), _ms(row.dense_ms),
            escape_markdown(best), *(_ratio(row.arms.get(name)) for name in names), _share(row.arms.get(OURS)),
        ])  # fmt: skip
    table = markdown(list(map(escape_markdown, titles)), body, [False, False, True, True, False, *[True] * (len(names) + 1)])
    return f"<details><summary>{_threads(threads)}: {count(len(chosen), 'cell')}</summary>\n\n{table}\n</details>"


def _facts(machine: Mapping[str, Any]) -> str:
    body = [[escape_markdown(visible(k, 40)), escape_markdown(visible(v, 200))] for k, v in machine.items()
            if k not in ("threads", "workers", "code")]  # fmt: skip
    return markdown(["", ""], body, [False, False]) if body else ""


def _name(row: Row) -> str:
    return row.key.removesuffix(f" {row.threads}")


def _threads(number: int) -> str:
    return count(number, "thread")


def _amount(value: float, unit: str) -> str:
    if unit == "%":
        return percent(value)
    return f"{value:.3g}\N{NO-BREAK SPACE}s" if unit == "s" else f"{value:.2f}x"


def _span(found: tuple[float, float, int] | None) -> str:
    if found is None:
        return NOTHING
    low, high, cells = found
    return f"{low:.2f}" if cells == 1 else f"{low:.2f}–{high:.2f}"


def _crossing(found: curves.Curve | None) -> str:
    if found is None:
        return NOTHING
    lowest = found.points[0][0]
    place = found.crossover
    return "never" if place is None else f"≤ {percent(lowest)}" if place == lowest else percent(round(place, 2))


def _ratio(arm: Arm | None) -> str:
    return NOTHING if arm is None or arm.ratio is None else f"{arm.ratio:.2f}"


def _share(arm: Arm | None) -> str:
    return NOTHING if arm is None or arm.share is None else percent(round(arm.share, 2))


def _ms(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}" if value < 10.0 else f"{value:.1f}"


def _bytes(size: int) -> str:
    return f"{size // 2**20} MB" if size >= 2**20 else f"{size // 2**10} KB"
