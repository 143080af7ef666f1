"""A plan as a table in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from openwork.runtime.choose import Choice
from openwork.runtime.plan import Plan

MOST_ROWS = 60


def show(plan: Plan, console: Console | None = None) -> None:
    """Print one row a layer and one line for the whole; of many layers the 60 that take the most time."""
    console = console or Console()
    shown = {id(choice) for choice in sorted(plan.choices, key=_total, reverse=True)[:MOST_ROWS]}
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("layer", no_wrap=True, overflow="ellipsis")
    table.add_column("weight", no_wrap=True)
    for title in ("density", "dense ms", "sparse ms"):
        table.add_column(title, justify="right", no_wrap=True, min_width=len(title))
    table.add_column("chosen", no_wrap=True, min_width=max(map(len, ("chosen", *(c.chosen for c in plan.choices)))))
    table.add_column("gain", justify="right", no_wrap=True, min_width=6)
    for choice in plan.choices:
        if id(choice) in shown:
            style = "green" if choice.chosen != "dense" else "dim"
            table.add_row(*map(escape, _cells(choice)), style=style)
    console.print(table)
    if len(plan.choices) > len(shown):
        console.print(f"and {len(plan.choices) - len(shown)} more layers")
    console.print(escape(summary(plan)))


def summary(plan: Plan) -> str:
    """Return the plan in one sentence."""
    where = f"{plan.threads} thread{'s' if plan.threads != 1 else ''}, {plan.processor}"
    if not plan.accelerated:
        return f"dense {plan.dense_ms:.3f} ms ({where}); {plan.note}"
    count = sum(choice.chosen != "dense" for choice in plan.choices)
    return (
        f"{plan.gain:.2f}x as fast: {plan.ms:.3f} ms against {plan.dense_ms:.3f} ms dense ({where}); "
        f"{count} of {len(plan.choices)} layers replaced"
    )


def _cells(choice: Choice) -> tuple[str, ...]:
    sparse = [ms for name, ms in choice.ms.items() if name != "dense"]
    return (
        choice.layer,
        "x".join(map(str, choice.shape)),
        f"{choice.density:.3f}",
        f"{choice.ms['dense']:.3f}" if "dense" in choice.ms else "-",
        f"{min(sparse):.3f}" if sparse else "-",
        choice.chosen,
        f"{choice.gain:.2f}x" if choice.chosen != "dense" else "",
    )


def _total(choice: Choice) -> float:
    return choice.calls * choice.ms.get("dense", 0.0)
