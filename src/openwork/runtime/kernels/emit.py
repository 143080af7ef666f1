"""Writing a kernel: a thin layer over llvmlite's builder with the loops, vectors and slots that all kernels share.

Every kernel is a function `void name(slots, unit)`: `slots` is an array of 8-byte words (addresses, sizes, numbers) and
`unit` says which part of the work to do. Units of one kernel are independent, so threads may take them in any order.
"""

from __future__ import annotations

import builtins
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from openwork.runtime.kernels.target import Target


class Emitter:
    """One function under construction.

    Attributes:
        ir: the module `llvmlite.ir`.
        b: its builder, at the place where code goes.
        unit: the kernel's second argument (i64).
        lanes: float32 numbers of a vector register of the target.
    """

    def __init__(self, name: str, target: Target) -> None:
        from llvmlite import ir

        self.ir, self.target, self.lanes = ir, target, target.lanes
        self.i1, self.i8, self.i16, self.i32, self.i64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
        self.f32, self.f64, self.ptr = ir.FloatType(), ir.DoubleType(), ir.PointerType()
        self.module = ir.Module(name=name)
        kind = ir.FunctionType(ir.VoidType(), [self.ptr, self.i64])
        self.function = ir.Function(self.module, kind, name=name)
        self.slots, self.unit = self.function.args
        self.b: Any = ir.IRBuilder(self.function.append_basic_block("entry"))

    def text(self) -> str:
        """End the function and return the module as text."""
        if not self.b.block.is_terminated:
            self.b.ret_void()
        return str(self.module)

    # -- numbers and addresses ------------------------------------------------------------------------------------

    def int(self, value: builtins.int) -> Any:
        """Return an i64 constant."""
        return self.ir.Constant(self.i64, value)

    def float(self, value: builtins.float) -> Any:
        """Return a float32 constant."""
        return self.ir.Constant(self.f32, value)

    def slot(self, index: builtins.int, kind: Any = None) -> Any:
        """Return the word `index` of the slots, an i64 unless `kind` says pointer or float."""
        place = self.b.gep(self.slots, [self.int(index)], source_etype=self.i64)
        return self.b.load(place, typ=kind or self.i64)

    def pointer(self, index: builtins.int) -> Any:
        """Return the word `index` of the slots as an address."""
        return self.slot(index, self.ptr)

    def at(self, base: Any, offset: Any) -> Any:
        """Return the address `offset` bytes (i64) after `base`."""
        return self.b.gep(base, [offset], source_etype=self.i8)

    def item(self, base: Any, index: Any, kind: Any) -> Any:
        """Return the address of entry `index` of an array of `kind`."""
        return self.b.gep(base, [index], source_etype=kind)

    def load(self, place: Any, kind: Any, align: builtins.int | None = None) -> Any:
        """Load a value; vectors need be aligned as floats only."""
        return self.b.load(place, typ=kind, align=align or 4)

    def store(self, value: Any, place: Any, align: builtins.int = 4) -> None:
        """Store a value; vectors need be aligned as floats only."""
        self.b.store(value, place, align=align)

    def index(self, base: Any, at: Any, kind: Any = None) -> Any:
        """Load entry `at` of an array of signed integers (i32 unless told) as i64."""
        kind = kind or self.i32
        value = self.b.load(self.item(base, at, kind), typ=kind, align=kind.width // 8)
        return value if kind is self.i64 else self.b.sext(value, self.i64)

    # -- vectors --------------------------------------------------------------------------------------------------

    def vector(self, kind: Any = None, lanes: builtins.int | None = None) -> Any:
        """Return the vector type, float32 in the target's width unless told."""
        return self.ir.VectorType(kind or self.f32, lanes or self.lanes)

    def constant(self, value: builtins.float, lanes: builtins.int | None = None) -> Any:
        """Return a float32 constant in all lanes."""
        kind = self.vector(lanes=lanes)
        return self.ir.Constant(kind, [self.float(value)] * kind.count)

    def splat(self, scalar: Any, lanes: builtins.int | None = None) -> Any:
        """Return a vector with `scalar` in all lanes."""
        lanes = lanes or self.lanes
        kind = self.ir.VectorType(scalar.type, lanes)
        one = self.b.insert_element(self.ir.Constant(kind, self.ir.Undefined), scalar, self.ir.Constant(self.i32, 0))
        zeros = self.ir.Constant(self.ir.VectorType(self.i32, lanes), None)
        return self.b.shuffle_vector(one, self.ir.Constant(kind, self.ir.Undefined), zeros)

    def shuffle(self, one: Any, two: Any, lanes: Sequence[builtins.int]) -> Any:
        """Return the lanes chosen from `one` followed by `two`."""
        mask = self.ir.Constant(self.ir.VectorType(self.i32, len(lanes)), [self.ir.Constant(self.i32, i) for i in lanes])
        return self.b.shuffle_vector(one, two, mask)

    def call(self, name: str, result: Any, arguments: Sequence[Any]) -> Any:
        """Call an LLVM intrinsic (or C function) by name, declared at its first use."""
        found = self.module.globals.get(name)
        if found is None:
            kind = self.ir.FunctionType(result, [one.type for one in arguments])
            found = self.ir.Function(self.module, kind, name=name)
        return self.b.call(found, arguments)

    def prefetch(self, place: Any) -> None:
        """Ask for the cache line at an address that will be read; any address will do."""
        numbers = [self.ir.Constant(self.i32, value) for value in (0, 3, 1)]
        self.call("llvm.prefetch.p0", self.ir.VoidType(), [place, *numbers])

    def fma(self, a: Any, x: Any, b: Any) -> Any:
        """Return a * x + b, fused where the target has it."""
        return self.call(f"llvm.fmuladd.{self._suffix(a.type)}", a.type, [a, x, b])

    def minimum(self, a: Any, b: Any) -> Any:
        """Return a where it is less than b or a is NaN, else b (a NaN in `a` survives)."""
        return self.b.select(self.b.fcmp_ordered("<", b, a), b, a)

    def maximum(self, a: Any, b: Any) -> Any:
        """Return a where it is greater than b or a is NaN, else b (a NaN in `a` survives)."""
        return self.b.select(self.b.fcmp_ordered(">", b, a), b, a)

    def mask(self, count: Any, lanes: builtins.int | None = None) -> Any:
        """Return the lane mask of the first `count` (i64) lanes."""
        lanes = lanes or self.lanes
        kind = self.ir.VectorType(self.i32, lanes)
        numbers = self.ir.Constant(kind, [self.ir.Constant(self.i32, i) for i in range(lanes)])
        return self.b.icmp_signed("<", numbers, self.splat(self.b.trunc(count, self.i32), lanes))

    def masked_load(self, place: Any, mask: Any) -> Any:
        """Load the lanes of `mask`, zero in the others; what is masked out is not touched."""
        kind = self.vector(lanes=mask.type.count)
        zero = self.ir.Constant(kind, None)
        name = f"llvm.masked.load.{self._suffix(kind)}.p0"
        return self.call(name, kind, [place, self.ir.Constant(self.i32, 4), mask, zero])

    def masked_store(self, value: Any, place: Any, mask: Any) -> None:
        """Store the lanes of `mask`; what is masked out is not touched."""
        name = f"llvm.masked.store.{self._suffix(value.type)}.p0"
        self.call(name, self.ir.VoidType(), [value, place, self.ir.Constant(self.i32, 4), mask])

    # -- loops ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def loop(self, start: Any, stop: Any, step: builtins.int = 1) -> Iterator[Any]:
        """Run the block for an index (i64) from `start` to before `stop`."""
        with self.loop_carrying(start, stop, (), step) as (index, _, _finish):
            yield index

    @contextlib.contextmanager
    def loop_carrying(
        self, start: Any, stop: Any, values: Sequence[Any], step: builtins.int = 1
    ) -> Iterator[tuple[Any, list[Any], Callable[[Sequence[Any]], None]]]:
        """Run the block for an index from `start` to before `stop` with values kept in registers from turn to turn.

        Yields the index, the values of this turn and a function to be called with those of the next. After the block
        `carried` holds the last ones.
        """
        b, before = self.b, self.b.block
        head, body, end = (self.function.append_basic_block(word) for word in ("head", "body", "end"))
        b.branch(head)
        b.position_at_end(head)
        index = b.phi(self.i64)
        index.add_incoming(start, before)
        held = [b.phi(value.type) for value in values]
        for one, value in zip(held, values, strict=True):
            one.add_incoming(value, before)
        b.cbranch(b.icmp_signed("<", index, stop), body, end)
        b.position_at_end(body)
        next_values: list[Any] = list(held)

        def give(following: Sequence[Any]) -> None:
            next_values[:] = following

        yield index, list(held), give
        last = b.block
        following = b.add(index, self.int(step))
        b.branch(head)
        index.add_incoming(following, last)
        for one, value in zip(held, next_values, strict=True):
            one.add_incoming(value, last)
        b.position_at_end(end)
        self.carried = held

    def _suffix(self, kind: Any) -> str:
        if isinstance(kind, self.ir.VectorType):
            return f"v{kind.count}{self._suffix(kind.element)}"
        names = {self.f32: "f32", self.f64: "f64", self.i32: "i32", self.i64: "i64", self.i16: "i16", self.i8: "i8"}
        return names[kind]

    # -- rearranging ----------------------------------------------------------------------------------------------

    def transpose(self, vectors: Sequence[Any]) -> list[Any]:
        """Return the transpose of n vectors of n lanes (n a power of two): lane i of result j is lane j of vector i.

        First blocks of 4 x 4 by shuffles that stay within 128 bits, then the blocks themselves.
        """
        count = len(vectors)
        if count < 4:
            return self._exchange(list(vectors), 1)
        starts = range(0, count, 4)
        low = [lane for s in starts for lane in (s, count + s, s + 1, count + s + 1)]
        high = [lane + 2 for lane in low]
        left = [lane for s in starts for lane in (s, s + 1, count + s, count + s + 1)]
        right = [lane + 2 for lane in left]
        columns: list[list[Any]] = [[], [], [], []]
        for s in starts:
            a, b, c, d = vectors[s : s + 4]
            pairs = [(self.shuffle(a, b, half), self.shuffle(c, d, half)) for half in (low, high)]
            for k, (one, two) in enumerate(pairs):
                columns[2 * k].append(self.shuffle(one, two, left))
                columns[2 * k + 1].append(self.shuffle(one, two, right))
        columns = [self._exchange(column, 4) for column in columns]
        return [columns[j % 4][j // 4] for j in range(count)]

    def _exchange(self, vectors: list[Any], block: builtins.int) -> list[Any]:
        """Return the transpose of n vectors of n blocks of lanes."""
        lanes, distance = len(vectors) * block, 1
        while distance < len(vectors):
            low = [i if not i // block & distance else lanes + i - distance * block for i in range(lanes)]
            high = [i + distance * block if not i // block & distance else lanes + i for i in range(lanes)]
            for i in range(len(vectors)):
                if not i & distance:
                    one, two = vectors[i], vectors[i + distance]
                    vectors[i], vectors[i + distance] = self.shuffle(one, two, low), self.shuffle(one, two, high)
            distance *= 2
        return vectors

    def deinterleave(self, vectors: Sequence[Any]) -> list[Any]:
        """Return n vectors, of which j holds every n-th number from number j on of the n vectors put end to end."""
        count, lanes = len(vectors), vectors[0].type.count
        if count == 1:
            return list(vectors)
        if count % 2 == 0:
            halves = [
                [self.shuffle(vectors[i], vectors[i + 1], range(odd, 2 * lanes, 2)) for i in range(0, count, 2)]
                for odd in (0, 1)
            ]
            parts = [self.deinterleave(half) for half in halves]
            return [parts[j % 2][j // 2] for j in range(count)]
        found = []
        for j in range(count):
            sources = [divmod(i * count + j, lanes) for i in range(lanes)]
            value = self.shuffle(vectors[0], vectors[1], [k * lanes + at if k < 2 else 0 for k, at in sources])
            for number in range(2, count):
                taken = [lanes + at if k == number else i for i, (k, at) in enumerate(sources)]
                value = self.shuffle(value, vectors[number], taken)
            found.append(value)
        return found

    # -- lanes one by one -----------------------------------------------------------------------------------------

    def cell(self, value: Any) -> Any:
        """Return a place on the stack that holds `value`; it becomes a register where its address is not passed on."""
        with self.b.goto_entry_block():
            place = self.b.alloca(value.type)
        self.b.store(value, place)
        return place

    @contextlib.contextmanager
    def turning(self, condition: Callable[[], Any]) -> Iterator[None]:
        """Run the block as long as `condition`, which writes its code before each turn, gives true (i1)."""
        b = self.b
        head, body, end = (self.function.append_basic_block(word) for word in ("while", "turn", "done"))
        b.branch(head)
        b.position_at_end(head)
        b.cbranch(condition(), body, end)
        b.position_at_end(body)
        yield
        b.branch(head)
        b.position_at_end(end)

    def bits(self, mask: Any) -> Any:
        """Return an i64 with bit i set where lane i of a mask (vector of i1) is."""
        kind = self.ir.IntType(mask.type.count)
        return self.b.zext(self.b.bitcast(mask, kind), self.i64)

    @contextlib.contextmanager
    def each_bit(self, bits: Any) -> Iterator[Any]:
        """Run the block for the number (i64) of each set bit of an i64, from the lowest on."""
        b, left = self.b, self.cell(bits)
        zero = self.int(0)
        with self.turning(lambda: b.icmp_unsigned("!=", b.load(left, typ=self.i64), zero)):
            now = b.load(left, typ=self.i64)
            yield self.call("llvm.cttz.i64", self.i64, [now, self.ir.Constant(self.i1, 1)])
            b.store(b.and_(now, b.sub(now, self.int(1))), left)
