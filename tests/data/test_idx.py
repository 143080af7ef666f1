from __future__ import annotations

import contextlib
import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openwork.data import idx
from openwork.errors import DataError

CUBE = b"\0\0\x08\x03" + struct.pack(">3I", 2, 1, 3) + bytes([1, 2, 3, 250, 251, 252])


def test_a_hand_made_cube_is_read_as_written() -> None:
    array = idx.parse(CUBE)
    assert array.dtype == np.uint8
    assert array.tolist() == [[[1, 2, 3]], [[250, 251, 252]]]
    array[0] = 0  # writable


@pytest.mark.parametrize(
    ("code", "form", "values"),
    [(0x09, "b", [-128, 127]), (0x0B, "h", [-300, 300]), (0x0C, "i", [-70000, 7]), (0x0D, "f", [0.5, -2.0]),
     (0x0E, "d", [0.1, 1e300])],
)  # fmt: skip
def test_every_type_is_read_big_endian(code: int, form: str, values: list[float]) -> None:
    array = idx.parse(bytes([0, 0, code, 1]) + struct.pack(">I", 2) + struct.pack(f">2{form}", *values))
    assert array.dtype == np.dtype(form)
    assert array.dtype.isnative
    assert array.tolist() == values


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\x08",
        b"\x01" + CUBE[1:],  # not two zeros
        b"\0\0\x07" + CUBE[3:],  # no such type
        b"\0\0\x08\0",  # no axis
        CUBE[:10],  # the header ends early
        CUBE[:-1],
        CUBE + b"\0",
        b"\0\0\x08\x01" + struct.pack(">I", 2**32 - 1) + b"\0" * 8,
        b"\0\0\x08\x04" + struct.pack(">4I", *[2**32 - 1] * 4),  # a product beyond 64 bits
        b"\0\0\x08\x28" + struct.pack(">40I", *[1] * 40) + b"\0",  # more axes than NumPy has
    ],
)
def test_malformed_files_are_data_errors(data: bytes) -> None:
    with pytest.raises(DataError, match="idx file"):
        idx.parse(data)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_change_gives_an_array_or_a_data_error(data: st.DataObject) -> None:
    changed = bytearray(CUBE)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(changed)))
    with contextlib.suppress(DataError):
        array = idx.parse(bytes(changed[:cut]) + data.draw(st.binary(max_size=4)))
        assert array.size * array.itemsize <= len(CUBE) + 4


def test_a_packed_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "cube.gz"
    path.write_bytes(gzip.compress(CUBE))
    assert idx.read(path).shape == (2, 1, 3)
    with pytest.raises(DataError, match="more than 20 bytes"):
        idx.read(path, limit=20)
    assert idx.read(path, limit=len(CUBE)).shape == (2, 1, 3)


@pytest.mark.parametrize("cut", [0, 3, 12, 30])
def test_a_cut_or_foreign_gzip_is_a_data_error(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "cube.gz"
    path.write_bytes(gzip.compress(CUBE)[:cut])
    with pytest.raises(DataError):
        idx.read(path)
    path.write_bytes(b"no gzip at all")
    with pytest.raises(DataError, match="cannot be unpacked"):
        idx.read(path)
