from __future__ import annotations

import copy
import functools
import pickle
import threading

import numpy as np
import pytest

from openwork.runtime.kernels import jit
from openwork.runtime.kernels.emit import Emitter
from openwork.runtime.kernels.launch import Call, Program
from openwork.runtime.kernels.target import host, targets
from openwork.runtime.launching import KEYS, Pool, Ready

pytestmark = pytest.mark.skipif(not targets(), reason="no LLVM on this machine")
THREADS = 8


def _text(name: str) -> str:
    """y[unit] = x[unit] * x[unit] + the word `added`."""
    target = host()
    assert target is not None
    e = Emitter(name, target)
    x = e.load(e.item(e.pointer(0), e.unit, e.i64), e.i64, 8)
    e.store(e.b.add(e.b.mul(x, x), e.slot(2)), e.item(e.pointer(1), e.unit, e.i64), 8)
    return e.text()


def ready(made: list[int], size: int) -> Ready:
    target = host()
    assert target is not None
    made.append(size)
    slots = np.array([0, 0, size], np.int64)
    name = "test_launching_square"
    call = Call(jit.address(name, target, functools.partial(_text, name)), slots, size)
    return Ready(Program([[call]], target), ((slots, 0, 0), (slots, 1, 1)))


def run(pool: Pool[int], x: np.ndarray, threads: int = 1) -> np.ndarray:
    y = np.empty_like(x)
    pool.run(len(x), (x.ctypes.data, y.ctypes.data), threads)
    return y


def test_operands_are_those_of_the_call() -> None:
    made: list[int] = []
    pool: Pool[int] = Pool(functools.partial(ready, made))
    for size in (5, 3, 5, 3, 5):
        for start in (0, 100):
            x = np.arange(start, start + size)
            assert np.array_equal(run(pool, x), x * x + size)
            assert np.array_equal(run(pool, x, 2), x * x + size)
    assert made == [5, 3]
    assert len(pool) == 2


def test_many_threads_get_their_own_answers_and_the_pool_does_not_grow() -> None:
    made: list[int] = []
    pool: Pool[int] = Pool(functools.partial(ready, made))
    wrong: list[int] = []
    together = threading.Barrier(THREADS)

    def work(number: int) -> None:
        together.wait()
        for turn in range(400):
            size = 1 + (number + turn) % 3
            x = np.arange(size) + 1000 * number + turn
            if not np.array_equal(run(pool, x), x * x + size):
                wrong.append(number)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
    assert set(made) == {1, 2, 3}
    assert all(made.count(size) <= THREADS for size in (1, 2, 3))
    assert len(pool) == len(made)


def test_a_program_in_use_is_given_to_nobody_else() -> None:
    pool: Pool[int]
    inner = np.arange(4)
    found = []

    class Nested:
        def __init__(self, own: Ready) -> None:
            self.own, self.entered = own, False

        def run(self, threads: int) -> None:
            if not self.entered:  # while the first program runs, somebody else comes with the same key
                self.entered = True
                found.append(run(pool, inner))
            self.own.program.run(threads)

    made: list[int] = []

    def nested(size: int) -> Ready:
        own = ready(made, size)
        return Ready(Nested(own), own.patches) if len(made) == 1 else own  # type: ignore[arg-type]

    pool = Pool(nested)
    outer = np.arange(10, 14)
    assert np.array_equal(run(pool, outer), outer * outer + 4)
    assert np.array_equal(found[0], inner * inner + 4)
    assert made == [4, 4]


def test_shapes_that_came_first_make_room() -> None:
    made: list[int] = []
    pool: Pool[int] = Pool(functools.partial(ready, made))
    for size in [*range(1, KEYS + 11), KEYS + 10, 1]:
        x = np.arange(size)
        assert np.array_equal(run(pool, x), x * x + size)
    assert made == [*range(1, KEYS + 11), 1]
    assert len(pool) == KEYS


def test_copies_start_empty() -> None:
    pool: Pool[int] = Pool(functools.partial(ready, []))
    x = np.arange(7)
    run(pool, x)
    for other in (copy.deepcopy(pool), pickle.loads(pickle.dumps(pool))):
        assert len(other) == 0
        assert np.array_equal(run(other, x), x * x + 7)


def test_a_failing_factory_leaves_the_pool_as_it_was() -> None:
    def refuse(size: int) -> Ready:
        raise MemoryError(size)

    pool: Pool[int] = Pool(refuse)
    for _ in range(2):
        with pytest.raises(MemoryError):
            run(pool, np.arange(3))
    assert len(pool) == 0
