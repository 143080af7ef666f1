"""Products of a sparse weight with dense activations: the cells of the table, and one cell measured.

Every arm of a cell gets the same weight and activations, is checked against float64, and is timed in interleaved rounds
with the others in one process.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from openwork.bench import checking, peers, roofline
from openwork.bench.results import Arm, Row, plain
from openwork.core.patterns import Block, Pattern, Unstructured
from openwork.core.rng import generator
from openwork.errors import OpenworkError
from openwork.runtime.timing import interleave

_STEADY: Any = {"settled": True}
"""Each arm finds its own operands in the caches, as in a network that runs again and again, not those of the others."""
SHAPES = (
    (512, 512, 196), (256, 256, 784), (1024, 1024, 49), (3072, 768, 128), (1024, 1024, 64), (3072, 768, 16),
    (3072, 768, 1), (1000, 1024, 1),
)  # fmt: skip
"""(out, in, columns): MobileNet-v1's 1x1 layers at 224 pixels, a transformer's feedforward at 128, 64 and 16 tokens, and
two layers at a single column."""
QUICK_SHAPES = ((512, 512, 196), (3072, 768, 128), (3072, 768, 16), (3072, 768, 1))
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
QUICK_SPARSITIES = (0.5, 0.8, 0.9, 0.95)
PATTERNS: Mapping[str, Pattern] = {"unstructured": Unstructured(), "blocks of 2": Block(2), "blocks of 4": Block(4)}


@dataclass(frozen=True)
class Cell:
    """One product: weight (out, size) at a sparsity and pattern, times (size, columns)."""

    out: int
    size: int
    columns: int
    sparsity: float
    pattern: str

    @property
    def key(self) -> str:
        """A name for the cell, the same in every run."""
        return f"{self.shape} {self.pattern} {self.sparsity:g}"

    @property
    def shape(self) -> str:
        """out x in @ columns."""
        return f"{self.out}x{self.size}@{self.columns}"


@dataclass
class Held:
    """Dense arms of the shape at hand: their time does not depend on the zeros, so they are prepared once a shape."""

    shape: str = ""
    calls: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    arms: dict[str, Arm] = field(default_factory=dict)


def cells(
    shapes: Iterable[tuple[int, int, int]] = SHAPES,
    sparsities: Iterable[float] = SPARSITIES,
    patterns: Iterable[str] = tuple(PATTERNS),
) -> list[Cell]:
    """Return the cells, shape by shape."""
    sparsities, patterns = tuple(sparsities), tuple(patterns)
    return [Cell(*shape, sparsity, pattern) for shape in shapes for pattern in patterns for sparsity in sparsities]


def make(cell: Cell) -> tuple[Tensor, Tensor, Tensor]:
    """Return weight (out, in) with exactly the cell's share of units kept at random, bias (out), x (in, columns)."""
    normal = [
        torch.randn(shape, generator=generator(0, word, cell.key))
        for word, shape in (("weight", (cell.out, cell.size)), ("bias", (cell.out,)), ("x", (cell.size, cell.columns)))
    ]
    score = torch.rand(cell.out, cell.size, generator=generator(0, "mask", cell.key))
    kept = PATTERNS[cell.pattern].select(score, 1.0 - cell.sparsity)
    return normal[0] * kept, normal[1], normal[2]


def measure(
    cell: Cell,
    names: Iterable[str],
    limits: roofline.Limits | None,
    *,
    seconds: float,
    held: Held | None = None,
    say: Callable[[str], None] = lambda _name: None,
) -> Row:
    """Prepare, check and time the peers of `names` on one cell, with torch's number of threads.

    Peers that are `APART` are timed one by one after the others where there is more than one thread, since their
    waiting pools take the processor from torch's.

    Args:
        cell: the product.
        names: of the peers.
        limits: what the machine can do; None leaves the shares out.
        seconds: what the interleaved rounds may take, unless five take longer.
        held: dense arms to use again for cells of one shape.
        say: is told the name of each peer before it runs, so that a crash can be laid at its door.
    """
    weight, bias, x = make(cell)
    held = held if held is not None else Held()
    if held.shape != cell.shape:
        held.shape, held.calls, held.arms = cell.shape, {}, {}
    calls: dict[str, Callable[[], Tensor]] = {}
    arms: dict[str, Arm] = {}
    known = {name: peer for name in names if hasattr(peer := peers.load(name), "operator")}
    threads = torch.get_num_threads()
    apart = [name for name in known if known[name].APART and threads > 1]
    with torch.no_grad():
        for name in (one for one in known if one not in apart):
            say(name)
            if name not in held.arms:
                arms[name], call = prepared(known[name], weight, bias, x)
                if known[name].DENSE:
                    held.arms[name] = arms[name]
                    held.calls |= {name: call} if call is not None else {}
            else:
                arms[name], call = held.arms[name], held.calls.get(name)
            if call is not None:
                calls[name] = call
        say("")
        times = interleave(calls, seconds=seconds, **_STEADY) if calls else {}
        for name in apart:
            say(name)
            arms[name], call = prepared(known[name], weight, bias, x)
            if call is not None:
                times |= interleave({name: call}, seconds=seconds / 4, **_STEADY)
    work = roofline.Work(cell.out, cell.size, cell.columns, int(torch.count_nonzero(weight)), roofline.block_of(weight))
    least = roofline.least_seconds(limits, work) if limits is not None else None
    return row(cell.key, "operator", asdict(cell) | {"shape": cell.shape}, threads, least, arms, times)


def prepared(
    peer: peers.Operator, weight: Tensor, bias: Tensor | None, x: Tensor
) -> tuple[Arm, Callable[[], Tensor] | None]:
    """Return what became of a peer's preparation and its check, and what to time if it is right."""
    try:
        call = peer.operator(weight, bias, x)
        error = checking.product_error(weight, bias, x, call())
    except peers.Unavailable as problem:
        return Arm("unavailable", dense=peer.DENSE, reason=str(problem)), None
    except (OpenworkError, RuntimeError, ValueError, TypeError, MemoryError) as problem:
        reason = " ".join(f"{type(problem).__name__}: {problem}".split())[:300]
        return Arm("crashed", dense=peer.DENSE, reason=reason), None
    if not error <= 1.0:
        reason = f"the largest error is {error:.3g} times what rounding explains: not timed"
        return Arm("wrong", error=error, dense=peer.DENSE, reason=reason), None
    return Arm("ok", error=error, dense=peer.DENSE), call


def row(
    key: str,
    kind: str,
    cell: Mapping[str, object],
    threads: int,
    least: float | None,
    arms: Mapping[str, Arm],
    times: Mapping[str, float],
) -> Row:
    """Return the row of arms with their times, ratios and shares filled in; `least` and `times` are in seconds."""
    dense = min((times[name] for name, arm in arms.items() if arm.dense and name in times), default=None)
    filled = {
        name: replace(
            arm,
            ms=1e3 * times[name],
            ratio=None if dense is None else dense / times[name],
            share=None if least is None else least / times[name],
        )
        if name in times
        else arm
        for name, arm in arms.items()
    }
    scaled = None if least is None else 1e3 * least
    return Row(f"{key} {threads}", kind, plain(cell), threads, scaled, filled)  # type: ignore[arg-type]


def crossover(points: Iterable[tuple[float, float]]) -> float | None:
    """Return the sparsity from which on the ratio stays at least 1, between measured points by a straight line.

    Args:
        points: (sparsity, ratio).

    Returns:
        The lowest measured sparsity if the ratio is at least 1 everywhere, None if it is below 1 at the highest.
    """
    ordered = sorted(points)
    if not ordered or ordered[-1][1] < 1.0:
        return None
    for (left, below), (right, above) in reversed(list(itertools.pairwise(ordered))):
        if below < 1.0:
            return left + (right - left) * (1.0 - below) / (above - below)
    return ordered[0][0]
