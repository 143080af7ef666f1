"""The Triton kernel of `blocks`; imported only where Triton is.

It calls builtins of the language only: what the language defines by `jit` itself (`zeros`, say) is interpreted or compiled
as was wanted when Triton was first imported, which need not be what is wanted here.
"""
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def multiply(
    x, x_row, x_column, values, columns, starts, bias, y, rows, width, out,
    HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Write y (rows, out) = x (rows, width) times the transposed blocks, plus bias: one program is a tile of one block row.

    Args:
        x, x_row, x_column: input and its strides in elements.
        values, columns, starts: see `blocks.Packed`.
        bias: (out); not read unless HAS_BIAS.
        y: contiguous output.
        rows, width, out: sizes.
        HAS_BIAS: whether to add the bias.
        BLOCK: side of a block.
        TILE: rows of x of a program.
        WIDEN: multiply float32 copies of the operands, which gives the same products.
    """
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    group = tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None]
    from_row = x + row.to(tl.int64)[:, None] * x_row
    sums = tl.full((TILE, BLOCK), 0.0, tl.float32)
    first, last = tl.load(starts + group), tl.load(starts + group + 1)
    for entry in range(first, last):
        column = tl.load(columns + entry) * BLOCK + lane
        from_cell = from_row + column.to(tl.int64)[None, :] * x_column
        piece = tl.load(from_cell, mask=inside & (column < width)[None, :], other=0.0)
        place = values + tl.cast(entry, tl.int64) * (BLOCK * BLOCK)
        block = tl.load(place + lane[:, None] * BLOCK + lane[None, :])
        if WIDEN:
            piece, block = piece.to(tl.float32), block.to(tl.float32)
        sums = tl.dot(piece, block, sums, input_precision="ieee")
    column = group * BLOCK + lane
    if HAS_BIAS:
        sums += tl.load(bias + column, mask=column < out, other=0.0).to(tl.float32)[None, :]
    place = y + row.to(tl.int64)[:, None] * out + column[None, :]
    tl.store(place, sums.to(y.dtype.element_ty), mask=inside & (column < out)[None, :])
