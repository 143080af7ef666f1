"""Learning-rate schedules: what the base rate is multiplied by, as pure functions of progress in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

Rate = Callable[[float], float]


def constant(_progress: float) -> float:
    """Return 1."""
    return 1.0


def cosine(progress: float) -> float:
    """Return (1 + cos(pi t)) / 2 (Loshchilov & Hutter, SGDR, ICLR 2017, Eq. 5, a single period down to 0)."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def linear(progress: float) -> float:
    """Return 1 - t."""
    return 1.0 - progress


def step(progress: float) -> float:
    """Return 1, a tenth from one half on, a hundredth from three quarters on (He et al. 2016, Sec. 4.2, rounded)."""
    return 1.0 if progress < 0.5 else 0.1 if progress < 0.75 else 0.01


RATES: Mapping[str, Rate] = {"constant": constant, "cosine": cosine, "linear": linear, "step": step}


def warmed(rate: Rate, warmup: float) -> Rate:
    """Return `rate` after a straight rise from 0 over the first `warmup` share; `rate` then covers what is left."""
    if warmup == 0:
        return rate
    return lambda t: t / warmup if t < warmup else rate((t - warmup) / (1.0 - warmup))
