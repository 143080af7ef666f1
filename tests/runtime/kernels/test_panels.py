from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openwork.runtime.kernels import panels
from tests.runtime.kernels.sparse_tools import GUARD, TARGETS, normal, run


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
@given(
    vectors=st.integers(1, 5),
    rows=st.integers(1, 150),
    columns=st.integers(1, 130),
    images=st.integers(0, 3),
    gap=st.integers(0, 5),
    threads=st.integers(1, 3),
)
@settings(max_examples=40, deadline=None)
def test_panels_hold_the_columns_and_zeros_after_the_last(
    target: panels.Target, vectors: int, rows: int, columns: int, images: int, gap: int, threads: int
) -> None:
    wide = vectors * target.lanes
    tiles = -(-columns // wide)
    x = normal(0, images, rows, columns + gap)
    x[:, :, columns:] = np.nan
    room = np.full(images * tiles * rows * wide + 64, GUARD, np.float32)
    start = -room.ctypes.data % 64 // 4
    made = panels.calls(
        target, vectors, x.ctypes.data, room.ctypes.data + 4 * start, rows=rows, columns=columns,
        row_bytes=4 * (columns + gap), images=images, image_bytes=4 * rows * (columns + gap),
    )  # fmt: skip
    run(made, target, threads)
    found = room[start : start + images * tiles * rows * wide].reshape(images, tiles, rows, wide)
    padded = np.zeros((images, rows, tiles * wide), np.float32)
    padded[:, :, :columns] = x[:, :, :columns]
    assert np.array_equal(found, padded.reshape(images, rows, tiles, wide).transpose(0, 2, 1, 3))
    assert (room[:start] == GUARD).all()
    assert (room[start + found.size :] == GUARD).all()
