"""A plan as a table in the terminal."""

from __future__ import annotations

from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from openwork.runtime.choose import Choice
from openwork.runtime.plan import Plan

MOST_ROWS = 60
TITLES = ("layer", "weight", "density", "dense ms", "sparse ms", "chosen", "gain")
_GAP = "  "


def show(plan: Plan, console: Console | None = None) -> None:
    """Print one row a layer and one line for the whole; of many layers the 60 that take the most time.

    Names that are too long for the terminal lose their beginning.
    """
    console = console or Console()
    kept = {id(choice) for choice in sorted(plan.choices, key=_total, reverse=True)[:MOST_ROWS]}
    shown = [choice for choice in plan.choices if id(choice) in kept]
    rows = [_cells(choice) for choice in shown]
    taken = sum(max(map(len, column)) + len(_GAP) for column in zip(TITLES[1:], *(row[1:] for row in rows), strict=True))
    room = max(len(_GAP) + 8, console.width - taken)
    table = Table(box=None, header_style="bold", padding=(0, 0, 0, len(_GAP)), pad_edge=False)
    for title in TITLES:
        justify: Literal["left", "right"] = "left" if title in ("layer", "weight", "chosen") else "right"
        table.add_column(title, justify=justify, no_wrap=True)
    for choice, (name, *cells) in zip(shown, rows, strict=True):
        short = name if len(name) <= room else "…" + name[-(room - 1) :]
        table.add_row(*map(escape, (short, *cells)), style="green" if choice.chosen != "dense" else "dim")
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
        _shape(choice.shape),
        f"{choice.density:.3f}",
        f"{choice.ms['dense']:.3f}" if "dense" in choice.ms else "-",
        f"{min(sparse):.3f}" if sparse else "-",
        choice.chosen,
        f"{choice.gain:.2f}x" if choice.chosen != "dense" else "",
    )


def _total(choice: Choice) -> float:
    return choice.calls * choice.ms.get("dense", 0.0)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
