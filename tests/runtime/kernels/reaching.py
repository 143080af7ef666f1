"""Run every product on memory that ends where a page ends that must not be touched; a kernel that reads on is killed.

A script of its own, since what it looks for ends the process.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np

from openwork.runtime.kernels import few, matvec, nm
from openwork.runtime.kernels.arrange import sections
from openwork.runtime.kernels.launch import Program
from tests.runtime.kernels.sparse_tools import TARGETS, assert_close, balanced, normal, sparse

KEPT: list[Any] = []


def at_the_edge(array: Any) -> Any:
    """A copy whose last byte is the last before a page without access."""
    size = -(-array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    room = mmap.mmap(-1, size + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(room))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + size), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    copy = np.frombuffer(room, array.dtype, array.size, size - array.nbytes).reshape(array.shape)
    copy[...] = array
    KEPT.append(room)
    return copy


def guard(part: Any) -> Any:
    for name, array in vars(part).items():
        if isinstance(array, np.ndarray) and array.size:
            object.__setattr__(part, name, at_the_edge(array))
    return part


def main() -> None:
    for target in TARGETS:
        for number, (out, width) in enumerate([(1, 1), (3, 5), (17, 33), (33, 50), (40, 16), (5, 131)]):
            bias, scale, x = normal(1, out), np.ones(out, np.float32), at_the_edge(normal(2, 1, width))
            for kind, density in (("float32", 0.4), ("bfloat16", 0.1), ("float32", 1.0)):
                weight = sparse(number, out, width, density)
                for lanes in {1, target.lanes if target.name in matvec.GATHERING else 1}:
                    part = guard(matvec.pack(sections(weight, 1)[0], width, bias, scale, lanes=lanes, kind=kind))  # type: ignore[arg-type]
                    check(target, part, matvec.calls, weight, kind, bias, x)
                part = guard(
                    matvec.pack(sections(weight, 1)[0], width, bias, scale, lanes=few.rows_at_once(target), kind=kind)  # type: ignore[arg-type]
                )
                for columns in few.widths(target):
                    wide = at_the_edge(np.repeat(x.T, columns, axis=1))
                    y = at_the_edge(np.zeros((out, columns), np.float32))
                    Program([few.calls(target, part, wide.ctypes.data, y.ctypes.data, columns)], target).run(1)
                    if kind == "float32":
                        assert_close(y.T, weight, bias, wide.T)
            if target.name in nm.PERMUTING:
                for n, m in ((2, 4), (7, 13), (1, 16), (3, 6)):
                    weight = balanced(number, out, width, n, m)
                    check(target, guard(nm.pack(weight, bias, scale, n, m, target)), nm.calls, weight, "float32", bias, x)


def check(target: Any, part: Any, calls: Any, weight: Any, kind: str, bias: Any, x: Any) -> None:
    y = at_the_edge(np.zeros((1, len(weight)), np.float32))
    Program([calls(target, part, x.ctypes.data, y.ctypes.data)], target).run(1)
    if kind == "float32":
        assert_close(y, weight, bias, x)


if __name__ == "__main__":
    main()
    print("nothing beyond")
