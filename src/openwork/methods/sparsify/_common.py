"""What methods of this shelf share."""

from __future__ import annotations

from openwork.errors import MethodError


def period(total_steps: int, every: int | None) -> int:
    """Return the steps between two mask updates: as given, else a fortieth of the run and at most 100.

    Raises:
        MethodError: if the run or the period has no step.
    """
    if total_steps < 1:
        raise MethodError(f"total_steps={total_steps!r}: training must take at least one step")
    if every is not None and every < 1:
        raise MethodError(f"every={every!r}: masks change every so many steps, at least 1")
    return every or max(1, min(100, total_steps // 40))


def updates(total_steps: int, every: int, begin: int, end: float) -> int:
    """Return how many updates, `every` steps apart, lie after step `begin`, up to step `end` and inside the run.

    Raises:
        MethodError: if there is none, so that a gradual method could never reach its density.
    """
    found = min(round(end) - begin, total_steps - 1 - begin) // every
    if found < 1 and begin + every < total_steps:
        return 1
    if found < 1:
        raise MethodError(
            f"no mask update fits into total_steps={total_steps} with every={every} after step {begin}; "
            "train for more steps or update more often"
        )
    return found


def unit(name: str, value: float) -> float:
    """Return `value` if it lies in [0, 1], else raise a MethodError naming the argument."""
    if not 0.0 <= value <= 1.0:
        raise MethodError(f"{name}={value!r} is not in [0, 1]")
    return value
