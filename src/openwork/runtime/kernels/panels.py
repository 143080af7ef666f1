"""Copying rows of a matrix into panels: the columns of one tile of all rows side by side, aligned, the last tile filled up.

A product that reads rows which do not start on a cache line pays for two lines a vector, and rows a power of two apart
fall on the same lines of the cache; a panel costs one copy and has neither fault.
"""

from __future__ import annotations

import functools

import numpy as np

from openwork.runtime.kernels import jit
from openwork.runtime.kernels.emit import Emitter
from openwork.runtime.kernels.launch import Call
from openwork.runtime.kernels.target import Target

WORDS = ("x", "x_image", "x_row", "panels", "image", "rows", "tiles", "columns", "runs")
"""The slots: addresses; strides in bytes; numbers of rows, tiles, columns, and runs of rows (units of a tile)."""
_RUN = 64


def calls(
    target: Target, vectors: int, x: int, panels: int, *, rows: int, columns: int, row_bytes: int, images: int = 1,
    image_bytes: int = 0,
) -> list[Call]:  # fmt: skip
    """Return the stage that copies x (images, rows, columns) to panels (images, tiles, rows, vectors * lanes).

    Args:
        target: what to compile for.
        vectors: vectors of a tile.
        x: address of the first element; `row_bytes` and `image_bytes` are its strides.
        panels: address of the panels, on a cache line.
        rows, columns, images: sizes.
        row_bytes, image_bytes: strides of x.
    """
    tiles = -(-columns // (vectors * target.lanes))
    runs = -(-rows // _RUN)
    image = rows * tiles * vectors * target.lanes * 4
    slots = np.array([x, image_bytes, row_bytes, panels, image, rows, tiles, columns, runs], np.int64)
    return [Call(_address(target, vectors), slots, images * tiles * runs)]


def _address(target: Target, vectors: int) -> int:
    name = f"openwork_panels_t{vectors}_{target.name}"
    return jit.address(name, target, functools.partial(_build, name, target, vectors))


def _build(name: str, target: Target, vectors: int) -> str:
    e = Emitter(name, target)
    b, wide = e.b, e.lanes * 4
    x, x_image, x_row, panels, image_bytes, rows, tiles, columns, runs = (
        e.pointer(i) if word in ("x", "panels") else e.slot(i) for i, word in enumerate(WORDS)
    )
    run, rest = b.srem(e.unit, runs), b.sdiv(e.unit, runs)
    tile, image = b.srem(rest, tiles), b.sdiv(rest, tiles)
    first, last = (b.sdiv(b.mul(b.add(run, e.int(i)), rows), runs) for i in (0, 1))
    column = b.mul(tile, e.int(vectors * e.lanes))
    source = e.at(x, b.add(b.mul(image, x_image), b.mul(column, e.int(4))))
    out = e.at(panels, b.add(b.mul(image, image_bytes), b.mul(b.mul(tile, rows), e.int(vectors * wide))))
    left = b.sub(columns, column)
    whole, part, end = (e.function.append_basic_block(word) for word in ("whole", "part", "end"))
    b.cbranch(b.icmp_signed(">=", left, e.int(vectors * e.lanes)), whole, part)
    for block, is_whole in ((whole, True), (part, False)):
        b.position_at_end(block)
        masks = [] if is_whole else [e.mask(b.sub(left, e.int(t * e.lanes))) for t in range(vectors)]
        with e.loop(first, last) as row:
            read, write = e.at(source, b.mul(row, x_row)), e.at(out, b.mul(row, e.int(vectors * wide)))
            for t in range(vectors):
                place = e.at(read, e.int(t * wide))
                value = e.load(place, e.vector()) if is_whole else e.masked_load(place, masks[t])
                e.store(value, e.at(write, e.int(t * wide)))
        b.branch(end)
    b.position_at_end(end)
    return e.text()
