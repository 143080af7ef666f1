"""Running kernels: a program is a list of stages, its worker is native code that any number of threads may join.

A thread takes the next unit of its own share of the stage (an atomic counter) until none is left, then the others' units,
then waits until the units are done, not until the other threads are: between stages, a thread that the system has put
aside and that holds no unit delays nobody. A share is a run of neighbouring units, the same in every run, so that what a
thread has read and written is still in its core's cache when the program runs again, and when the next stage reads it.
The threads are torch's own OpenMP pool where its runtime is found (GNU or LLVM), so nothing is oversubscribed; that pool
waits for all its threads once, at the end of a run. Elsewhere they are plain Python threads.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from openwork.runtime.kernels import jit
from openwork.runtime.kernels.emit import Emitter
from openwork.runtime.kernels.target import Target

WORDS = 6
"""Words of a call: function, slots, units, number of its first counter, number of its stage's counter, units to wait for."""
LINE = 8
"""Words between counters, so that no two share a cache line."""
SHARES = min(8, os.cpu_count() or 1)
"""Most shares of a stage; threads beyond them start with the share of another."""
_SPINS = 2000


@dataclass(frozen=True)
class Call:
    """One kernel with its slots.

    Attributes:
        address: of the kernel.
        slots: int64 words; addresses in them must stay alive as long as the program.
        units: how many parts the work has.
    """

    address: int
    slots: npt.NDArray[np.int64]
    units: int


class Program:
    """Stages of calls in native form; calls of one stage are independent of each other.

    One program is run by one caller at a time (its counters are its own); `run` must not be entered twice at once.
    """

    def __init__(self, stages: Sequence[Sequence[Call]], target: Target) -> None:
        stages = [[call for call in stage if call.units > 0] for stage in stages]
        flat = [(number, call) for number, stage in enumerate(stages) for call in stage]
        self._slots = [call.slots for _, call in flat]
        self._table = np.zeros((max(1, len(flat)), WORDS), np.int64)
        self._counters = np.zeros((SHARES * len(flat) + len(stages)) * LINE, np.int64)
        for row, (number, call) in enumerate(flat):
            last = row + 1 == len(flat) or flat[row + 1][0] != number
            total = sum(other.units for other in stages[number]) if last else 0
            self._table[row] = (
                call.address, call.slots.ctypes.data, call.units, SHARES * row * LINE,
                (SHARES * len(flat) + number) * LINE, total,
            )  # fmt: skip
        self._context = np.array([self._table.ctypes.data, len(flat), self._counters.ctypes.data, 1, 0], np.int64)
        self._count = 1
        self._worker = worker(target)
        self._data = int(self._context.ctypes.data)
        self.widest = max((sum(call.units for call in stage) for stage in stages), default=0)
        """The most units that a stage has: more threads than that have nothing to do."""

    def run(self, threads: int) -> None:
        """Run all stages with at most `threads` threads, the caller's included."""
        self._counters.fill(0)
        count = min(threads, self.widest)
        if count != self._count:  # a small product feels the words being written at every call
            self._count = count
            self._context[3:] = (min(count, SHARES), _number()) if count > 1 else (1, 0)
        if count <= 1:
            _call(self._worker)(self._data)
        else:
            _team(self._worker, self._data, count)


def worker(target: Target) -> int:
    """Return the address of the worker: `void worker(context)`, which may be entered by many threads at once."""
    return jit.address(f"openwork_worker_{target.name}", target, functools.partial(_worker, target))


def _worker(target: Target) -> str:
    e = Emitter(f"openwork_worker_{target.name}", target)
    b, ir = e.b, e.ir
    table, count, counters, shares, number = e.pointer(0), e.slot(1), e.pointer(2), e.slot(3), e.slot(4)
    kernel = ir.FunctionType(ir.VoidType(), [e.ptr, e.i64])
    first = b.srem(_asked(e, number), shares)
    with e.loop(e.int(0), count) as row:
        entry = e.item(table, b.mul(row, e.int(WORDS)), e.i64)
        word = [e.item(entry, e.int(i), e.i64) for i in range(WORDS)]
        function, slots = e.load(word[0], e.i64, 8), e.load(word[1], e.ptr, 8)
        units, own, stage, wanted = (e.load(word[i], e.i64, 8) for i in range(2, 6))
        done = e.item(counters, stage, e.i64)
        with e.loop(e.int(0), shares) as further:
            share = b.srem(b.add(first, further), shares)
            low = b.sdiv(b.mul(share, units), shares)
            size = b.sub(b.sdiv(b.mul(b.add(share, e.int(1)), units), shares), low)
            taken = e.item(counters, b.add(own, b.mul(share, e.int(LINE))), e.i64)
            take, work, over = (e.function.append_basic_block(name) for name in ("take", "work", "over"))
            b.branch(take)
            b.position_at_end(take)
            unit = b.atomic_rmw("add", taken, e.int(1), "monotonic")
            b.cbranch(b.icmp_signed("<", unit, size), work, over)
            b.position_at_end(work)
            b.call(b.inttoptr(function, kernel.as_pointer()), [slots, b.add(low, unit)])
            b.atomic_rmw("add", done, e.int(1), "release")
            b.branch(take)
            b.position_at_end(over)
        wait, spin, idle, rest, leave = (
            e.function.append_basic_block(name) for name in ("wait", "spin", "idle", "rest", "leave")
        )
        b.branch(wait)
        b.position_at_end(wait)
        b.branch(spin)
        b.position_at_end(spin)
        turns = b.phi(e.i64)
        turns.add_incoming(e.int(0), wait)
        now = b.load_atomic(done, "acquire", 8, typ=e.i64)
        b.cbranch(b.icmp_signed(">=", now, wanted), leave, idle)
        b.position_at_end(idle)
        _pause(e)
        following = b.add(turns, e.int(1))
        b.cbranch(b.icmp_signed("<", following, e.int(_SPINS)), spin, rest)
        turns.add_incoming(following, idle)
        b.position_at_end(rest)
        e.call("sched_yield", e.i32, [])
        b.branch(spin)
        turns.add_incoming(e.int(0), rest)
        b.position_at_end(leave)
    return e.text()


def _asked(e: Emitter, address: Any) -> Any:
    """Return what the function of no arguments at an address says, 0 where there is none."""
    b, ir = e.b, e.ir
    before, ask, known = b.block, e.function.append_basic_block("ask"), e.function.append_basic_block("known")
    b.cbranch(b.icmp_signed("!=", address, e.int(0)), ask, known)
    b.position_at_end(ask)
    found = b.sext(b.call(b.inttoptr(address, ir.FunctionType(e.i32, []).as_pointer()), []), e.i64)
    b.branch(known)
    b.position_at_end(known)
    said = b.phi(e.i64)
    said.add_incoming(e.int(0), before)
    said.add_incoming(found, ask)
    return said


def _pause(e: Emitter) -> None:
    """Tell the processor that this is a waiting loop."""
    if e.target.cpu.startswith("x86"):
        e.call("llvm.x86.sse2.pause", e.ir.VoidType(), [])
    elif e.target.name == "neon":
        e.call("llvm.aarch64.hint", e.ir.VoidType(), [e.ir.Constant(e.i32, 1)])


@functools.cache
def _call(address: int) -> Any:
    """Return a function of one word that runs native code without the interpreter's lock."""
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)


def _team(work: int, data: int, count: int) -> None:
    """Let `count` threads enter `work`, the caller among them; return when all have left."""
    openmp = _openmp()
    if openmp is not None:
        openmp(work, data, count, 0)
        return
    pool, enter = _pool(), _call(work)
    others = [pool.submit(enter, data) for _ in range(count - 1)]
    enter(data)
    for other in others:
        if not other.cancel():
            other.result()


@functools.cache
def _openmp() -> Any:
    """Return the parallel entry of the OpenMP runtime that torch has loaded, None if there is none to be found."""
    library = _runtime()
    if library is None:
        return None
    entry = library.GOMP_parallel
    entry.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    entry.restype = None
    return entry


@functools.cache
def _number() -> int:
    """Return the address of the function that tells a thread its number in the team, 0 where there is none."""
    try:
        return ctypes.cast(_runtime().omp_get_thread_num, ctypes.c_void_p).value or 0
    except AttributeError:
        return 0


@functools.cache
def _runtime() -> Any:
    """Return the OpenMP runtime that torch has loaded, None if there is none with the entry that is needed."""
    import torch

    folder = Path(torch.__file__).parent
    names = [*folder.glob("lib/libgomp*"), *folder.parent.glob("torch.libs/libgomp*"), *folder.glob("lib/libiomp5*")]
    for name in (*map(str, names), "libgomp.so.1"):
        try:
            library = ctypes.CDLL(name, mode=getattr(ctypes, "RTLD_NOLOAD", 4))
            library.GOMP_parallel  # noqa: B018 (it raises where it is not)
        except (OSError, AttributeError):
            continue
        return library
    return None


@functools.cache
def _pool() -> ThreadPoolExecutor:
    with _LOCK:
        return ThreadPoolExecutor(64, "openwork-kernels")


_LOCK = threading.Lock()
