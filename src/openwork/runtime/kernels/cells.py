"""What a recurrent layer does at a step after its products: the gates of LSTM and GRU, element by element.

LSTM (Hochreiter and Schmidhuber, Neural Computation 9(8), 1997, with the forget gate of Gers et al., 2000), gates i f g o:
    c' = sigmoid(f) c + sigmoid(i) tanh(g),    h' = sigmoid(o) tanh(c')
GRU (Cho et al., EMNLP 2014, as cuDNN and torch have it), gates r z n, with x and h the two products:
    n = tanh(x_n + sigmoid(x_r + h_r) h_n),    h' = n + sigmoid(x_z + h_z) (h - n)
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import numpy as np

from openwork.runtime.kernels import jit
from openwork.runtime.kernels.activations import apply
from openwork.runtime.kernels.emit import Emitter
from openwork.runtime.kernels.launch import Call
from openwork.runtime.kernels.target import Target

Cell = Literal["lstm", "gru"]
GATES: dict[Cell, int] = {"lstm": 4, "gru": 3}
WORDS = (
    "hidden", "hidden_tile", "input", "input_tile", "cell", "cell_tile", "before", "before_tile", "after", "after_tile",
    "gate", "count", "tiles", "blocks",
)  # fmt: skip
"""The slots: addresses of the product with h, the product with x, c, h and h'; bytes from a tile of each to the next; bytes
from a gate to the next within both products; elements of a tile; tiles; units of a tile."""
BLOCK = 1024
"""Elements that a unit has about."""


def calls(
    target: Target, cell: Cell, hidden: tuple[int, int], input: tuple[int, int], state: tuple[int, int],
    before: tuple[int, int], after: tuple[int, int], *, gate: int, count: int, tiles: int,
) -> list[Call]:  # fmt: skip
    """Return the stage that makes h' (and c' in the place of c) from the products.

    Args:
        target: what to compile for.
        cell: lstm or gru.
        hidden: the product with h: address, and bytes from a tile to the next.
        input: the product with x.
        state: c, of which a GRU has none.
        before: h, which an LSTM does not read.
        after: where h' goes; not where h is.
        gate: bytes from a gate to the next in both products.
        count: elements of a tile, side by side in all of them.
        tiles: how many.
    """
    blocks = max(1, count // BLOCK)
    words = [*hidden, *input, *state, *before, *after, gate, count, tiles, blocks]
    name = f"openwork_cell_{cell}_{target.name}"
    where = jit.address(name, target, functools.partial(_build, name, target, cell))
    return [Call(where, np.array(words, np.int64), tiles * blocks if count else 0)]


def _build(name: str, target: Target, cell: Cell) -> str:
    e = Emitter(name, target)
    b = e.b
    places = {word: place for place, word in enumerate(WORDS)}
    blocks, count = e.slot(places["blocks"]), e.slot(places["count"])
    block, tile = b.srem(e.unit, blocks), b.sdiv(e.unit, blocks)
    first, last = (b.sdiv(b.mul(b.add(block, e.int(i)), count), blocks) for i in (0, 1))
    base = {
        word: e.at(e.pointer(places[word]), b.mul(tile, e.slot(places[f"{word}_tile"])))
        for word in ("hidden", "input", "cell", "before", "after")
    }
    gates = [b.mul(e.slot(places["gate"]), e.int(k)) for k in range(GATES[cell])]
    whole = b.add(first, b.mul(b.sdiv(b.sub(last, first), e.int(e.lanes)), e.int(e.lanes)))
    with e.loop(first, whole, e.lanes) as index:
        _step(e, cell, base, gates, index, None)
    with e.loop(whole, last, e.lanes) as index:
        _step(e, cell, base, gates, index, e.mask(b.sub(last, index)))
    return e.text()


def _step(e: Emitter, cell: Cell, base: dict[str, Any], gates: list[Any], index: Any, mask: Any) -> None:
    """Write the cell for one vector of elements."""
    b = e.b

    def read(word: str, offset: Any = None) -> Any:
        place = e.item(base[word] if offset is None else e.at(base[word], offset), index, e.f32)
        return e.load(place, e.vector()) if mask is None else e.masked_load(place, mask)

    def write(value: Any, word: str) -> None:
        place = e.item(base[word], index, e.f32)
        if mask is None:
            e.store(value, place)
        else:
            e.masked_store(value, place, mask)

    def sigmoid(value: Any) -> Any:
        return apply(e, "sigmoid", value, None)

    def tanh(value: Any) -> Any:
        return apply(e, "tanh", value, None)

    h, x = ([read(word, offset) for offset in gates] for word in ("hidden", "input"))
    if cell == "lstm":
        i, f, g, o = (b.fadd(one, two) for one, two in zip(x, h, strict=True))
        c = e.fma(sigmoid(f), read("cell"), b.fmul(sigmoid(i), tanh(g)))
        write(c, "cell")
        write(b.fmul(sigmoid(o), tanh(c)), "after")
    else:
        r, z = (sigmoid(b.fadd(one, two)) for one, two in zip(x[:2], h[:2], strict=True))
        n = tanh(e.fma(r, h[2], x[2]))
        write(e.fma(z, b.fsub(read("before"), n), n), "after")
