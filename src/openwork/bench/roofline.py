"""What this machine could do at best: its multiply-adds, its loads from the first cache, its reads from memory.

Measured in the process that measures the products, by small kernels that do one thing only. The least time of a product
is the longest of three (Williams, Waterman, Patterson, "Roofline: An Insightful Visual Performance Model", CACM 2009):

    multiply-adds   2 nnz columns / peak
    loads           4 nnz columns / rows of a block / first cache's bandwidth (each multiply-add needs its activation)
    memory          (weights + 16-bit indices + activations + result) / bandwidth of the level that holds so much

A share is least over measured: 1 is the machine's limit.

Where the activations that a tile of columns needs are larger than the first cache, some loads miss it at random. What must
then come from the second cache is told beside the three (a cache-aware roofline: Ilic, Pratas, Sousa, IEEE CAL 2014), and
is no part of the share: another program might block over the inputs as well.
"""

from __future__ import annotations

import ctypes
import functools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from openwork.runtime.kernels import jit
from openwork.runtime.kernels.emit import Emitter
from openwork.runtime.kernels.target import Target, first_cache, host

SUMS = 8
"""Registers that the load kernel adds into."""
FIRST_CACHE = 16 * 2**10
SIZES = (FIRST_CACHE, 2**18, 2**20, 2**22, 2**24, 2**26)
"""Bytes a thread of the arrays that are read."""
TRIAD = 2**26
"""Bytes of each of the three arrays of the triad a = b + s c."""
MOST_VECTORS = 24
"""Vectors of sums of one row that the registers hold."""
_SECONDS = 1.5e-3
_TRIES = 16


@dataclass(frozen=True)
class Limits:
    """Rates that this machine reached with so many threads.

    Attributes:
        target: the vector features of the kernels.
        lanes: float32 numbers of a register.
        threads: how many ran at once.
        flops: multiply-adds in registers, two operations each, per second.
        reads: bytes a thread of the array, and bytes per second of all threads; the first is the first cache.
        triad: bytes per second of a = b + s c on arrays far larger than the inner caches, three transfers an entry.
        cache: bytes of the first data cache of a core, 0 where it is not known.
    """

    target: str
    lanes: int
    threads: int
    flops: float
    reads: tuple[tuple[int, float], ...]
    triad: float
    cache: int = 0

    @property
    def first_cache(self) -> float:
        """Bytes per second loaded from the first cache."""
        return self.reads[0][1]

    def rate(self, size: float) -> float:
        """Return the bytes per second at which `size` bytes can be read again and again: an upper estimate."""
        fitting = [at for at, (held, _) in enumerate(self.reads) if held * self.threads <= size]
        return max(rate for _, rate in self.reads[fitting[-1] if fitting else 0 :])

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Work:
    """A product: weight (out, size) with `kept` non-zeros in blocks of `block` rows, times (size, columns)."""

    out: int
    size: int
    columns: int
    kept: int
    block: int = 1

    @property
    def flops(self) -> int:
        """Operations on the non-zeros, two a multiply-add."""
        return 2 * self.kept * self.columns

    def loads(self, lanes: int) -> int:
        """Bytes of activations that the multiply-adds load: one vector for each, shared by the rows of a block."""
        columns = -(-self.columns // lanes) * lanes if self.columns >= lanes else self.columns
        return 4 * columns * -(-self.kept // self.block)

    @property
    def weights(self) -> int:
        """Bytes of values and 16-bit indices, one index a block."""
        return 4 * self.kept + 2 * -(-self.kept // self.block)

    @property
    def bytes(self) -> int:
        """Bytes that must move at least once: values, 16-bit indices (one a block), activations, result."""
        return self.weights + 4 * self.columns * (self.size + self.out)


def parts(limits: Limits, work: Work) -> dict[str, float]:
    """Return the seconds that each of the three needs by itself."""
    return {
        "multiply-adds": work.flops / limits.flops,
        "loads from the first cache": work.loads(limits.lanes) / limits.first_cache,
        "memory": work.bytes / limits.rate(work.bytes),
    }


def least_seconds(limits: Limits, work: Work) -> float:
    """Return the time below which no program on this machine computes the product."""
    return max(parts(limits, work).values())


def refill_seconds(limits: Limits, work: Work) -> float | None:
    """Return what the second cache needs at least for a kernel that keeps its sums in registers, None if it is not known.

    Such a kernel goes over the weights once a tile of columns, and loads from the activations of that tile at random: the
    share of them that the first cache cannot hold comes from the second. The tile is the best for it.
    """
    if not limits.cache or len(limits.reads) < 2:
        return None
    loads, widest = work.loads(limits.lanes), -(-work.columns // limits.lanes)
    amounts = []
    for width in (limits.lanes * vectors for vectors in range(1, min(widest, MOST_VECTORS) + 1)):
        missed = max(0.0, 1.0 - limits.cache / max(1, 4 * work.size * width))
        amounts.append(missed * loads + -(-work.columns // width) * work.weights + 4 * work.size * work.columns)
    return min(amounts, default=0.0) / limits.rate(limits.reads[1][0] * limits.threads)


def block_of(weight: torch.Tensor, sizes: Sequence[int] = (16, 8, 4, 2)) -> int:
    """Return how many neighbouring rows of a matrix (out, in) share their pattern: the largest of `sizes`, else 1."""
    kept = weight != 0
    for size in sizes:
        if weight.shape[0] % size == 0 and weight.shape[0]:
            grouped = kept.reshape(-1, size, weight.shape[1])
            if bool((grouped == grouped[:, :1]).all()):
                return size
    return 1


def measure(threads: int) -> Limits | None:
    """Return what the machine reaches with `threads` threads, None where there are no kernels to measure with."""
    target = host()
    if target is None:
        return None
    flops = _best(multiply_adds(target), threads)
    reads = tuple((size, _best(loads(target, size), threads)) for size in SIZES)
    return Limits(target.name, target.lanes, threads, flops, reads, _triad(threads), first_cache())


@dataclass(frozen=True)
class Probe:
    """A kernel that does one thing.

    Attributes:
        run: runs it so many turns on a thread's own data and returns what it computed.
        amount: what one turn is: operations, or bytes.
    """

    run: Callable[[int, npt.NDArray[np.float32]], npt.NDArray[np.float32]]
    amount: int
    data: Callable[[], npt.NDArray[np.float32]]


def multiply_adds(target: Target) -> Probe:
    """Return the probe of the peak: independent chains y <- y a + b in registers, nothing loaded.

    Data are a, b and the first y (one register each); after n turns each chain holds a^n y + b (1 + a + ... + a^(n-1)).
    """
    chains = chains_of(target)
    address = jit.address(f"openwork_peak_{target.name}", target, functools.partial(_multiply_add_text, target, chains))
    lanes = target.lanes
    return Probe(
        functools.partial(_run, address, chains * lanes),
        2 * chains * lanes,
        lambda: np.repeat(np.array([0.5, 1.0, 0.0], np.float32), lanes),
    )


def loads(target: Target, size: int) -> Probe:
    """Return the probe of loading: an array of `size` bytes is summed once a turn."""
    address = jit.address(f"openwork_loads_{target.name}", target, functools.partial(_load_text, target))
    step = SUMS * target.lanes
    count = max(1, size // (4 * step)) * step
    return Probe(functools.partial(_run, address, step), 4 * count, lambda: np.ones(count, np.float32))


def chains_of(target: Target) -> int:
    """Return how many chains keep two multiply-add units busy and fit the registers beside a and b."""
    return 24 if target.registers >= 32 else 12


def _multiply_add_text(target: Target, chains: int) -> str:
    e = Emitter(f"openwork_peak_{target.name}", target)
    data, out, kind, wide = e.pointer(0), e.pointer(2), e.vector(), 4 * target.lanes
    a, b, start = (e.load(e.at(data, e.int(place * wide)), kind) for place in range(3))
    with e.loop_carrying(e.int(0), e.slot(3), [start] * chains) as (_turn, held, give):
        give([e.fma(y, a, b) for y in held])
    for place, y in enumerate(e.carried):
        e.store(y, e.at(out, e.int(place * wide)))
    return e.text()


def _load_text(target: Target) -> str:
    e = Emitter(f"openwork_loads_{target.name}", target)
    data, count, out, turns, kind = e.pointer(0), e.slot(1), e.pointer(2), e.slot(3), e.vector()
    zeros, wide = [e.constant(0.0)] * SUMS, 4 * target.lanes
    with e.loop_carrying(e.int(0), turns, zeros) as (_turn, before, give_outer):
        with e.loop_carrying(e.int(0), count, before, SUMS * target.lanes) as (at, held, give):
            place = e.item(data, at, e.f32)
            give([e.b.fadd(y, e.load(e.at(place, e.int(k * wide)), kind)) for k, y in enumerate(held)])
        give_outer(e.carried)
    for place, y in enumerate(e.carried):
        e.store(y, e.at(out, e.int(place * wide)))
    return e.text()


def _run(address: int, size: int, turns: int, data: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    out = np.zeros(size, np.float32)
    slots = np.array([data.ctypes.data, data.size, out.ctypes.data, turns], np.int64)
    ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)(address)(slots.ctypes.data, 0)
    return out


def _best(probe: Probe, threads: int) -> float:
    """Return the best rate of several tries, each long enough for the clock; all threads start together."""
    data, turns = [probe.data() for _ in range(threads)], 1
    while (taken := _wall(probe, turns, data[:1])) < _SECONDS:
        turns = max(2 * turns, int(turns * 0.8 * _SECONDS / max(taken, 1e-7)))
    return max(threads * turns * probe.amount / _wall(probe, turns, data) for _ in range(_TRIES))


def _wall(probe: Probe, turns: int, data: Sequence[npt.NDArray[np.float32]]) -> float:
    """Return the seconds from the first start to the last end of one run a thread."""
    spans: list[tuple[float, float]] = []
    ready = threading.Barrier(len(data))

    def work(own: npt.NDArray[np.float32]) -> None:
        ready.wait()
        start = time.perf_counter()
        probe.run(turns, own)
        spans.append((start, time.perf_counter()))

    others = [threading.Thread(target=work, args=(own,)) for own in data[1:]]
    for other in others:
        other.start()
    work(data[0])
    for other in others:
        other.join()
    return max(end for _, end in spans) - min(start for start, _ in spans)


def _triad(threads: int) -> float:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a, b, c = (torch.ones(TRIAD // 4) for _ in range(3))
        best = min(_timed(lambda: torch.add(b, c, alpha=2.0, out=a)) for _ in range(_TRIES))
    finally:
        torch.set_num_threads(before)
    return 3 * TRIAD / best


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
