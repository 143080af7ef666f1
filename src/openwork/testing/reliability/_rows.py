"""What a row of the matrix is: a figure, its target, and how it is measured, in parts that can be done one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Scale = Literal["short", "long"]
Part = dict[str, Any]
"""What one part found, in plain JSON values."""
Parts = Mapping[str, Callable[[], Part]]
"""Name of a part -> the measurement, to be called."""


@dataclass(frozen=True)
class Measured:
    """What a row came to.

    Attributes:
        value: the measured figure, as a reader should see it.
        passed: whether it reaches the target.
        detail: what remains where it does not, and what the figure leaves out.
    """

    value: str
    passed: bool
    detail: str = ""


@dataclass(frozen=True)
class Row:
    """One reliability figure.

    Attributes:
        key: "R1" to "R36".
        figure: what is measured.
        target: what it is held to.
        how: the measurement, in a sentence.
        parts: scale -> the parts of the measurement.
        judge: what the parts found -> the figure.
        timed: whether the figure is a time, which a test on a busy machine must not depend on.
    """

    key: str
    figure: str
    target: str
    how: str
    parts: Callable[[Scale], Parts]
    judge: Callable[[Mapping[str, Part]], Measured]
    timed: bool = False

    def measure(self, scale: Scale) -> Measured:
        """Do all parts at this scale and judge them."""
        return self.judge({name: part() for name, part in self.parts(scale).items()})


def total(found: Mapping[str, Part], name: str) -> int:
    """Return the sum of a count over the parts."""
    return sum(int(part.get(name, 0)) for part in found.values())


def complaints(found: Mapping[str, Part], name: str = "wrong", most: int = 3) -> str:
    """Return the first few texts that the parts hold under `name`, one after the other."""
    said = [f"{part}: {text}" for part, values in found.items() for text in values.get(name, [])]
    return "; ".join(said[:most]) + (f"; and {len(said) - most} more" if len(said) > most else "")


def none_wrong(found: Mapping[str, Part], cases: str, wrong: str = "wrong") -> Measured:
    """Judge parts that count `cases` and list what was `wrong`: passed if nothing is."""
    bad = sum(len(part.get(wrong, [])) for part in found.values())
    return Measured(f"{bad} of {total(found, 'cases'):,} {cases}", bad == 0 and total(found, "cases") > 0, complaints(found))
