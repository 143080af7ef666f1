"""The idx format of MNIST: two zero bytes, a type, the number of axes, the lengths, the values, all big-endian.

LeCun, Cortes, Burges, "The MNIST database of handwritten digits", http://yann.lecun.com/exdb/mnist/.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openwork.errors import DataError

LIMIT = 1 << 29
"""Largest content in bytes; MNIST's largest file has 47 MB."""

_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def parse(data: bytes, name: str = "data") -> NDArray[Any]:
    """Return the array in `data`, in the machine's byte order and writable.

    Raises:
        DataError: if the header is malformed, or the length is not exactly what the header says.
    """
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in _TYPES:
        raise DataError(f"{name!r} is no idx file: it starts with {data[:4].hex() or 'nothing'}, expected 0000, a type")
    dtype, axes = np.dtype(_TYPES[data[2]]), data[3]
    start = 4 + 4 * axes
    if not axes or len(data) < start:
        raise DataError(f"{name!r} is no idx file: its header names {axes} axes in {len(data)} bytes")
    shape = struct.unpack(f">{axes}I", data[4:start])
    expected = start + math.prod(shape) * dtype.itemsize
    if len(data) != expected or axes > 32:
        raise DataError(f"{name!r} has {len(data):,} bytes; an idx file of shape {shape[:32]} has {expected:,}")
    return np.frombuffer(data, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))


def read(path: Path, limit: int = LIMIT) -> NDArray[Any]:
    """Return the array in a gzip-compressed idx file.

    Raises:
        DataError: if the file is no gzip, holds more than `limit` bytes, or its content is no idx.
    """
    try:
        with gzip.open(path) as stream:
            data = stream.read(limit + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{str(path)!r} cannot be unpacked: {error}") from error
    if len(data) > limit:
        raise DataError(f"{str(path)!r} unpacks to more than {limit:,} bytes, which is more than any known set has")
    return parse(data, str(path))
