from __future__ import annotations

import ctypes
import functools
import threading
import weakref
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openwork.runtime.kernels import jit, launch
from openwork.runtime.kernels.emit import Emitter
from openwork.runtime.kernels.launch import Call, Program
from openwork.runtime.kernels.target import targets

pytestmark = pytest.mark.skipif(not targets(), reason="no LLVM on this machine")


def text(name: str, target: str) -> str:
    """y[unit] += the sum of x[0 : n] + 1: what a unit writes depends on everything that the stage before wrote."""
    e = Emitter(name, targets()[target])
    x, y, count = e.pointer(0), e.pointer(1), e.slot(2)
    with e.loop_carrying(e.int(0), count, [e.int(1)]) as (index, (total,), give):
        give([e.b.add(total, e.index(x, index, e.i64))])
    place = e.item(y, e.unit, e.i64)
    e.store(e.b.add(e.load(place, e.i64, 8), e.carried[0]), place, 8)
    return e.text()


def call(target: str, x: np.ndarray, y: np.ndarray, units: int) -> Call:
    name = f"test_launch_{target}"
    where = jit.address(name, targets()[target], functools.partial(text, name, target))
    return Call(where, np.array([x.ctypes.data, y.ctypes.data, len(x)], np.int64), units)


def chain(target: str, sizes: list[list[int]]) -> tuple[Program, list[list[np.ndarray]], list[list[np.ndarray]]]:
    """Stages of which each call reads what the first call of the stage before wrote; the arrays and what they will hold."""
    before = expected = np.array([1], np.int64)
    arrays, wanted, stages, kept = [], [], [], [before]
    for stage in sizes:
        made = [np.zeros(size, np.int64) for size in stage]
        stages.append([call(target, before, one, len(one)) for one in made])
        right = [np.full(size, expected.sum() + 1) for size in stage]
        arrays.append(made)
        wanted.append(right)
        kept += made
        if made:
            before, expected = made[0], right[0]
    program = Program(stages, targets()[target])
    weakref.finalize(program, kept.clear)  # what the first stage reads lives as long as its program
    return program, arrays, wanted


@pytest.mark.parametrize("target", targets())
@given(sizes=st.lists(st.lists(st.integers(0, 40), max_size=3), max_size=6), threads=st.integers(1, 5), alone=st.booleans())
@settings(max_examples=40, deadline=None)
def test_every_unit_once_and_stages_in_order(target: str, sizes: list[list[int]], threads: int, alone: bool) -> None:
    program, arrays, wanted = chain(target, sizes)
    assert program.widest == max((sum(stage) for stage in sizes), default=0)
    with pytest.MonkeyPatch.context() as patch:
        if alone:
            patch.setattr(launch, "_openmp", lambda: None)
        for turn in (1, 2):
            for stage in arrays:
                for one in stage:
                    one.fill(0)
            program.run(threads)
            for stage, right in zip(arrays, wanted, strict=True):
                assert all(np.array_equal(one, two) for one, two in zip(stage, right, strict=True)), turn


def ticket_text(name: str, target: str) -> str:
    """y[unit] = x[0] and x[0] += 1: the turn at which a unit came, where one thread runs them all."""
    e = Emitter(name, targets()[target])
    x, y = e.pointer(0), e.pointer(1)
    turn = e.load(x, e.i64, 8)
    e.store(turn, e.item(y, e.unit, e.i64), 8)
    e.store(e.b.add(turn, e.int(1)), x, 8)
    return e.text()


@pytest.mark.parametrize("target", targets())
@pytest.mark.parametrize("units", [0, 1, 2, 7, 12])
@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_a_thread_begins_with_its_own_share_and_goes_on_with_the_next(
    target: str, units: int, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, shares = f"test_ticket_{target}", min(3, launch.SHARES)
    where = jit.address(name, targets()[target], functools.partial(ticket_text, name, target))
    turn, turns = np.zeros(1, np.int64), np.full(units, -1, np.int64)
    program = Program([[Call(where, np.array([turn.ctypes.data, turns.ctypes.data], np.int64), units)]], targets()[target])
    told = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: number)
    monkeypatch.setattr(launch, "_number", lambda: ctypes.cast(told, ctypes.c_void_p).value)
    monkeypatch.setattr(launch, "_team", lambda work, data, count: launch._call(work)(data))
    program.run(min(shares, max(1, units)))
    count = max(1, min(shares, units))
    begin = [units * share // count for share in range(count + 1)]
    order = [(number if count > 1 else 0) + step for step in range(count)]
    expected = [unit for share in order for unit in range(begin[share % count], begin[share % count + 1])]
    assert turns[expected].tolist() == list(range(units))


def test_more_threads_than_units(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(launch, "_team", lambda work, data, count: asked.append(count) or launch._call(work)(data))
    for sizes, threads, expected in (([[1], [1]], 8, []), ([[3]], 8, [3]), ([[2, 2], [1]], 3, [3]), ([[5]], 1, [])):
        program, arrays, wanted = chain(next(iter(targets())), sizes)
        asked.clear()
        program.run(threads)
        assert asked == expected
        assert np.array_equal(arrays[-1][0], wanted[-1][0])


def test_own_threads_without_openmp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_openmp", lambda: None)
    pool = launch._pool()
    with_busy = threading.Event()
    held = [pool.submit(with_busy.wait, 10) for _ in range(64)]  # nobody is free: the caller does it all
    program, arrays, wanted = chain(next(iter(targets())), [[7], [9]])
    program.run(4)
    assert np.array_equal(arrays[1][0], wanted[1][0])
    with_busy.set()
    assert all(one.result() for one in held)


def test_programs_of_several_threads_at_once() -> None:
    made = [chain(next(iter(targets())), [[17], [5, 3], [1]]) for _ in range(6)]
    wrong: list[int] = []
    together = threading.Barrier(6)

    def work(number: int) -> None:
        program, arrays, wanted = made[number]
        together.wait()
        for _ in range(50):
            for stage in arrays:
                for one in stage:
                    one.fill(0)
            program.run(1 + number % 3)
            if not all(
                np.array_equal(one, two) for a, b in zip(arrays, wanted, strict=True) for one, two in zip(a, b, strict=True)
            ):
                wrong.append(number)

    workers: list[Any] = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for one in workers:
        one.start()
    for one in workers:
        one.join()
    assert not wrong
