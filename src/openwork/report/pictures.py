"""Pictures of masks: which weights were kept, drawn in the ink of the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any
from xml.sax.saxutils import quoteattr

import numpy as np
from numpy.typing import NDArray

from openwork.report.text import percent, visible

LIMIT = 96
"""A picture has at most this many cells a side; a larger mask is averaged over blocks."""
FILTERS = 64
GAP = 1


def mask_picture(mask: NDArray[np.bool_], *, name: str, ident: str) -> str:
    """Return a mask as SVG text: a kept weight is ink, a dropped one is paper.

    A convolution with a window is a sheet of its first 64 filters, each the mean over its input channels; every other
    weight is a picture of its rows and columns, at most 96 a side, each cell the mean of a block. Where cells are means,
    the darkest is full ink.

    Args:
        mask: Of any shape, True = kept.
        name: The parameter's name, for those who do not see the picture.
        ident: An id, unique on the page.
    """
    cells = _cells(mask)
    cells = cells / max(float(cells.max()), 1e-9)
    height, width = cells.shape
    scale = max(1, min(8, 192 // max(height, width)))
    what = f"Mask of {visible(name)}: shape {' x '.join(map(str, mask.shape))}, {percent(float(mask.mean()))} kept"
    frame = f'width="{width}" height="{height}"'
    ident = "".join(char for char in ident if char.isalnum() or char in "-_")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="mask" viewBox="0 0 {width} {height}" width="{width * scale}" '
        f'height="{height * scale}" role="img" aria-label={quoteattr(what)}>'
        f'<mask id="{ident}"><image {frame} preserveAspectRatio="none" image-rendering="pixelated" '
        f'href="data:image/png;base64,{_png(cells)}"/></mask>'
        f'<rect {frame} fill="currentColor" fill-opacity="0.06"/>'
        f'<rect {frame} fill="currentColor" mask="url(#{ident})"/></svg>'
    )


def first_pictures(masks: Mapping[str, Any], ident: str, most: int = 3) -> list[tuple[str, str]]:
    """Return name and picture of the first `most` weights of an arm that have at least two dimensions."""
    chosen = [(name, np.asarray(mask, dtype=bool)) for name, mask in masks.items()]
    chosen = [(name, mask) for name, mask in chosen if mask.ndim >= 2 and mask.size][:most]
    return [(visible(name), mask_picture(mask, name=name, ident=f"{ident}-{at}")) for at, (name, mask) in enumerate(chosen)]


def _cells(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the shares kept, 0 to 1, of shape (rows, columns)."""
    if mask.ndim == 4 and mask.shape[2] * mask.shape[3] > 1:
        return _sheet(mask)
    flat = mask.reshape(mask.shape[0], -1) if mask.ndim > 1 else mask.reshape(1, -1)
    return _shrunk(_shrunk(flat.astype(np.float64)).T).T


def _sheet(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the filters (out, in, h, w) beside one another, a cell of paper between two."""
    filters = mask[:FILTERS].mean(axis=1)
    count, height, width = filters.shape
    across = int(np.ceil(np.sqrt(count)))
    down = -(-count // across)
    sheet = np.zeros((down * (height + GAP) - GAP, across * (width + GAP) - GAP))
    for at, one in enumerate(filters):
        top, left = (at // across) * (height + GAP), (at % across) * (width + GAP)
        sheet[top : top + height, left : left + width] = one
    return sheet


def _shrunk(cells: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the rows averaged over at most 96 blocks of nearly equal size."""
    if len(cells) <= LIMIT:
        return cells
    edges = np.linspace(0, len(cells), LIMIT + 1).round().astype(int)
    sums = np.add.reduceat(cells, edges[:-1], axis=0)
    return np.asarray(sums / np.diff(edges)[:, None])


def _png(cells: NDArray[np.float64]) -> str:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray((255.0 * cells).round().astype(np.uint8)).save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode()
