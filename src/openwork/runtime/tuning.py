"""How a product is cut into tiles, parts and chunks: a default from the sizes, and what was measured to be better.

What was measured is kept in a small file in the cache folder, so that the next process finds it. A file that is damaged,
or was written by something else, costs its measurements and nothing more.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from openwork import atomic
from openwork.errors import StoreError
from openwork.runtime.kernels import jit
from openwork.runtime.kernels.target import Target, first_cache, processor

VERSION = 2
SECONDS = 0.2
"""What the measurement of one product may take."""
SMALL = 40e-6
"""Seconds of work below which a second thread costs more than it brings."""
UNITS = 4
"""Units a thread that a product is cut into, so that a slow thread leaves its work to the others."""
SUMS = 512 * 1024
"""Most bytes of sums that a chunk leaves waiting from part to part; and of a part's slice, whatever the cache."""
_MOST = 4 * 2**20
_LOCK = threading.Lock()
_KNOWN: dict[Path, dict[str, Tiling]] = {}


@dataclass(frozen=True)
class Tiling:
    """How the kernel of a sparse product goes over its matrices; the result is the same bit for bit, whatever it is.

    Attributes:
        vectors: vectors of columns in a tile.
        part: input rows of a part, whose slice of a tile should fit the first cache.
        chunks: runs of output groups, which threads may take apart.
    """

    vectors: int
    part: int
    chunks: int = 1


def default_tiling(
    rows: int, entries: int, shape: tuple[int, int], columns: int, target: Target, threads: int, images: int = 1
) -> Tiling:
    """Return the tiling of a product that has not been measured.

    One row a group waits for its loads: narrow tiles, so that a long part fits the first cache with room for the sums that
    come and go, unless a group has too few entries in it. More rows use each load several times: one long part, whose
    slice comes from the second cache.

    Args:
        rows: output rows of a group.
        entries: entries of all groups, `rows` multiply-adds a column each.
        shape: (out, in) of the weight.
        columns: columns of the dense matrices of an image.
        target: what the kernel is compiled for.
        threads: how many take units.
        images: products with the same weight.
    """
    return _tiling(rows, entries, shape, columns, target, threads, images, _widest(rows, entries, shape, target), 1.0)


def tiling_of(
    vectors: int, rows: int, entries: int, shape: tuple[int, int], columns: int, target: Target, threads: int,
    images: int = 1,
) -> Tiling:  # fmt: skip
    """Return the default tiling for tiles of at most `vectors` vectors; the other arguments as in `default_tiling`."""
    return _tiling(rows, entries, shape, columns, target, threads, images, vectors, 1.0)


def candidates(
    rows: int, entries: int, shape: tuple[int, int], columns: int, target: Target, threads: int, images: int = 1
) -> list[Tiling]:
    """Return the default tiling and others around it: narrower and wider tiles, shorter and longer parts."""
    most = _widest(rows, entries, shape, target)
    room = max(1, (3 * target.registers // 4) // rows)
    found = [default_tiling(rows, entries, shape, columns, target, threads, images)]
    for vectors in (most, most - 1, most + 1, most + 2, most - 2, most + 3):
        if 1 <= vectors <= room:
            sizes = (rows, entries, shape, columns, target, threads, images, vectors)
            found += [_tiling(*sizes, reach) for reach in (1.0, 0.6, 1.7)]
    return list(dict.fromkeys(found))


def useful_threads(work: int, target: Target, threads: int) -> int:
    """Return how many of `threads` pay for `work` multiply-adds: one where the work is a matter of microseconds."""
    return threads if work > SMALL * 2e9 * target.lanes else 1


def recall(key: str) -> Tiling | None:
    """Return the tiling that was kept under a key, None if there is none."""
    place = _place()
    with _LOCK:
        if place not in _KNOWN:
            _KNOWN[place] = _read(place)
        return _KNOWN[place].get(key)


def keep(key: str, tiling: Tiling) -> None:
    """Keep a tiling for this process and the next; a folder that cannot be written costs the latter only."""
    place = _place()
    with _LOCK:
        known = _KNOWN[place] = {**_KNOWN.get(place, {}), **_read(place), key: tiling}
    try:
        atomic.write_json(place, {"format": VERSION, "tilings": {name: astuple(one) for name, one in known.items()}})
    except (StoreError, OSError):
        return


def key_of(
    kernel: str, rows: int, entries: int, shape: tuple[int, int], columns: int, target: Target, threads: int, images: int = 1
) -> str:
    """Return what a measurement holds for: the machine, the sizes, and the density to within a fifth."""
    share = entries * rows / max(1, math.prod(shape))
    density = round(4 * math.log2(share)) if share else "-"
    sizes = f"{shape[0]}x{shape[1]}@{images}x{columns}"
    return f"{processor()} {target.name} {threads} {kernel} {sizes} r{rows} d{density}"


def _tiling(
    rows: int, entries: int, shape: tuple[int, int], columns: int, target: Target, threads: int, images: int, most: int,
    reach: float,
) -> Tiling:  # fmt: skip
    """Return the tiling of at most `most` vectors and parts of `reach` times the usual length."""
    out, width = shape
    groups = max(1, out // rows)
    total = max(1, -(-columns // target.lanes))
    vectors = -(-total // -(-total // most))
    slice_bytes = 4 * vectors * target.lanes
    room, apart = first_cache() / slice_bytes, width * groups / max(1, entries)  # rows of x from an entry to the next
    single = max(0.6 * room, min(18 * apart, room), 9 * apart)
    part = single if rows == 1 else max(room, (24 if rows == 2 else 100) * apart)
    part = min(part * reach, max(first_cache(), SUMS) / slice_bytes)
    parts = max(1, round(width / max(1.0, part)))
    units = images * -(-total // vectors)
    chunks = -(-groups * rows * slice_bytes // SUMS) if parts > 1 else 1
    if threads > 1:
        spare = entries * rows // (32 * max(1, width))  # a chunk more is a copy of the slice more
        chunks = max(chunks, min(-(-UNITS * threads // units), max(spare, threads)))
    chunks = 1 << (min(chunks, groups) - 1).bit_length()
    return Tiling(vectors, max(1, -(-width // parts)), max(1, min(chunks, groups)))


def _widest(rows: int, entries: int, shape: tuple[int, int], target: Target) -> int:
    """Return the vectors of a tile that are best where there are many columns."""
    if target.registers < 32:
        return {1: 6, 2: 5, 4: 3}.get(rows, 1)
    if rows == 1 and entries > 0.3 * math.prod(shape):
        return 8
    return {8: 3, 16: 1}.get(rows, 5)


def _place() -> Path:
    return jit.folder().parent / "tilings.json"


def _read(place: Path) -> dict[str, Tiling]:
    """Return what a file holds, as far as it makes sense."""
    try:
        if place.stat().st_size > _MOST:
            return {}
        found = json.loads(place.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, Mapping) or found.get("format") != VERSION or not isinstance(found.get("tilings"), Mapping):
        return {}
    return {key: Tiling(*words) for key, words in found["tilings"].items() if _makes_sense(words)}


def _makes_sense(words: Any) -> bool:
    whole = isinstance(words, list) and len(words) == 3 and all(type(word) is int and word >= 1 for word in words)
    return whole and words[0] <= 16 and words[1] <= 2**31 and words[2] <= 2**16
