"""The settings of a one-shot pruning, checked before anything is loaded or run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from openwork.core.patterns import NM, Pattern, Unstructured, parse
from openwork.errors import PatternError, RecipeError

METHODS = ("magnitude", "wanda", "sparsegpt")
ALLOCATIONS = ("uniform", "owl", "global")


@dataclass(frozen=True)
class Settings:
    """Checked settings; see `openwork.oneshot.api.sparsify` for what they mean."""

    method: str
    density: float | None
    pattern: Pattern
    allocation: str | Mapping[str, float]
    damping: float
    block_size: int
    outliers: float
    spread: float
    errors: bool
    gram_dtype: torch.dtype

    @property
    def needs_gram(self) -> bool:
        """Whether layers gather Gram matrices and not only sums of squares."""
        return self.errors or self.method == "sparsegpt"

    @property
    def needs_data(self) -> bool:
        """Whether nothing can be done without calibration."""
        return self.method != "magnitude" or self.allocation == "owl"


def settle(
    *,
    method: str,
    density: float | None,
    pattern: Pattern | str | None,
    allocation: str | Mapping[str, float],
    damping: float,
    block_size: int,
    outliers: float,
    spread: float,
    errors: bool,
    gram_dtype: torch.dtype,
) -> Settings:
    """Return the settings with names resolved.

    Raises:
        RecipeError: for an unknown word or a number out of range.
        PatternError: for an unknown pattern, or a density that is not an N:M pattern's.
    """
    if method not in METHODS:
        raise RecipeError(f"method={method!r}: use one of {', '.join(METHODS)}")
    if density is not None:
        _check("density", density, 0.0 <= _number(density) <= 1.0, "a share in [0, 1]")
    shape = Unstructured() if pattern is None else parse(pattern) if isinstance(pattern, str) else pattern
    if not isinstance(shape, Pattern):
        raise PatternError(f"pattern={pattern!r}: give a pattern of openwork.core.patterns, or a name such as '2:4'")
    if isinstance(allocation, str):
        _check(
            "allocation", allocation, allocation in ALLOCATIONS, f"one of {', '.join(ALLOCATIONS)}, or densities by layer"
        )
    elif not isinstance(allocation, Mapping):
        raise RecipeError(f"allocation={allocation!r}: use one of {', '.join(ALLOCATIONS)}, or densities by layer")
    _check("damping", damping, 0.0 <= _number(damping) < math.inf, "a number of at least 0")
    whole = isinstance(block_size, int) and not isinstance(block_size, bool) and block_size >= 1
    _check("block_size", block_size, whole, "a whole number of at least 1")
    _check("outliers", outliers, 0.0 < _number(outliers) < math.inf, "a number above 0")
    _check("spread", spread, 0.0 <= _number(spread) <= 1.0, "a share in [0, 1]")
    _check("gram_dtype", gram_dtype, gram_dtype in (torch.float32, torch.float64), "torch.float32 or torch.float64")
    if isinstance(shape, NM):
        if density is not None:
            shape.check_density(density)
        if isinstance(allocation, str) and allocation != "uniform":
            raise PatternError(
                f"{shape.n}:{shape.m} keeps {shape.n / shape.m:g} of every layer, so allocation={allocation!r} has nothing "
                "to share out; use 'uniform'"
            )
    if density is None and isinstance(allocation, str):
        density = shape.n / shape.m if isinstance(shape, NM) else 0.5
    numbers = {"damping": float(damping), "outliers": float(outliers), "spread": float(spread)}
    return Settings(
        method, density, shape, allocation, block_size=block_size, errors=bool(errors), gram_dtype=gram_dtype, **numbers
    )  # fmt: skip


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _check(name: str, value: object, good: bool, wanted: str) -> None:
    if not good:
        raise RecipeError(f"{name}={value!r}: use {wanted}")
