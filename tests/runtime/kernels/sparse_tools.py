from __future__ import annotations

from typing import Any

import numpy as np
import torch

from openwork.runtime.bounds import bound
from openwork.runtime.kernels.launch import Call, Program
from openwork.runtime.kernels.target import Target, targets

TARGETS = list(targets().values())
NAMES = [target.name for target in TARGETS]
GUARD = -777.25


def draws(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def normal(seed: int, *shape: int) -> Any:
    return draws(seed).standard_normal(shape).astype(np.float32)


def sparse(seed: int, out: int, width: int, density: float, rows: int = 1) -> Any:
    """A weight in blocks of `rows` rows."""
    draw = draws(seed)
    kept = np.repeat(draw.random((-(-out // rows), width)) < density, rows, axis=0)[:out]
    return np.where(kept, draw.standard_normal((out, width)), 0).astype(np.float32)


def balanced(seed: int, out: int, width: int, n: int, m: int, hollow: float = 0.0) -> Any:
    """An n:m weight, of whose entries a share `hollow` is zero as well."""
    draw = draws(seed)
    groups = draw.standard_normal((out, -(-width // m), m)).astype(np.float32)
    groups[draw.random(groups.shape).argsort(axis=2) >= n] = 0
    groups[draw.random(groups.shape) < hollow] = 0
    return np.ascontiguousarray(groups.reshape(out, -1)[:, :width])


def run(calls: list[Call] | list[list[Call]], target: Target, threads: int = 1) -> None:
    stages = calls if calls and isinstance(calls[0], list) else [calls]
    Program(stages, target).run(threads)  # type: ignore[arg-type]


def guarded(rows: int, columns: int) -> tuple[Any, Any]:
    """A matrix and the memory around it, which must stay as it is."""
    room = np.full(rows * columns + 64, GUARD, np.float32)
    return room[32 : 32 + rows * columns].reshape(rows, columns), room


def untouched(room: Any) -> bool:
    return bool((room[:32] == GUARD).all() and (room[-32:] == GUARD).all())


def assert_close(y: Any, weight: Any, bias: Any, x: Any) -> None:
    """y (n, out) is x (n, in) times the weight (out, in) within the bound."""
    one, two, three = (torch.from_numpy(np.ascontiguousarray(part)) for part in (weight, bias, x))
    exact = three.double() @ one.double().t() + two.double()
    error = (torch.from_numpy(np.ascontiguousarray(y)).double() - exact).abs()
    assert bool((error <= bound(one, two, three)).all())
