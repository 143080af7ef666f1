"""What was measured, as plain data: an arm, a row of arms on one cell, and the words for what went wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["ok", "wrong", "unavailable", "crashed"]


@dataclass(frozen=True)
class Arm:
    """What became of one peer on one cell.

    Attributes:
        status: ok, wrong (its output is outside the bound, so it was not timed), unavailable, or crashed.
        ms: median milliseconds of a call.
        ratio: best dense time over this one, both of one process: above 1 is faster than dense.
        error: largest error over what is allowed; up to 1 is right.
        share: least time by the roofline over the time taken.
        dense: whether this is a mode of dense torch.
        reason: why there is no time, empty if there is.
    """

    status: Status
    ms: float | None = None
    ratio: float | None = None
    error: float | None = None
    share: float | None = None
    dense: bool = False
    reason: str = ""


@dataclass(frozen=True)
class Row:
    """One cell measured: what it is, its least time, and its arms by name."""

    key: str
    kind: Literal["operator", "network", "task"]
    cell: Mapping[str, Any]
    threads: int
    least_ms: float | None
    arms: Mapping[str, Arm] = field(default_factory=dict)

    @property
    def dense_ms(self) -> float | None:
        """The best dense time."""
        times = [arm.ms for arm in self.arms.values() if arm.dense and arm.ms is not None]
        return min(times, default=None)

    def to_json(self) -> dict[str, Any]:
        """Return plain data; infinities become null."""
        return dict(plain(asdict(self)))

    @staticmethod
    def from_json(found: Mapping[str, Any]) -> Row:
        """Return the row of `to_json`."""
        arms = {str(name): Arm(**arm) for name, arm in found["arms"].items()}
        return Row(found["key"], found["kind"], found["cell"], found["threads"], found["least_ms"], arms)


def plain(value: Any) -> Any:
    """Return JSON-clean data: what is not finite becomes None."""
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
