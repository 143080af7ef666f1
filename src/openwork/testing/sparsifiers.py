"""`check_sparsifier`: the conformance suite of a mask method. Run it in the tests of a method of your own."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

from openwork.errors import MethodError
from openwork.testing import _holding, _loops, _stepping
from openwork.testing._toys import Make

Check = Callable[[], None]


def check_sparsifier(make: Make, *, density: float = 0.1, total_steps: int = 50, skip: Collection[str] = ()) -> None:
    """Check that a sparsifier keeps every promise that openwork makes to a user's loop.

    Covered: the exact final density; exact zeros after every step of every optimizer of torch; a model that is left
    alone; resume equal to the last bit; accumulation, autocast, gradient scaling, clipping, closures, parameter groups,
    tied weights, torch.compile, several optimizers; draws that depend on nothing but the seed; NaN gradients refused.

    Args:
        make: called as `make(density=..., total_steps=...)`, returns a fresh sparsifier that is not attached.
        density: the kept share to ask for.
        total_steps: optimizer steps of every training; leave the method room to revise.
        skip: names of checks that do not apply, as `sparsifier_checks` gives them.

    Raises:
        AssertionError: names the check and what broke.
        MethodError: if `skip` names no check.
    """
    checks = dict(sparsifier_checks(make, density=density, total_steps=total_steps))
    unknown = sorted(set(skip) - set(checks))
    if unknown:
        raise MethodError(f"there is no check {unknown[0]!r} to skip; there are {', '.join(checks)}")
    for name, check in checks.items():
        if name in skip:
            continue
        try:
            check()
        except AssertionError as error:
            raise AssertionError(f"check {name!r}: {error}") from error


def sparsifier_checks(make: Make, *, density: float = 0.1, total_steps: int = 50) -> list[tuple[str, Check]]:
    """Return (name, callable without arguments) of every check, for `pytest.mark.parametrize`."""
    checks = _holding.CHECKS | _loops.CHECKS | _stepping.CHECKS
    return [(name, partial(check, make, density, total_steps)) for name, check in checks.items()]
