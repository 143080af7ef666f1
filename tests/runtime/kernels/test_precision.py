from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openwork.errors import ModelError
from openwork.runtime.kernels.precision import error, narrow, scales, widen
from tests.runtime.kernels.sparse_tools import draws, normal


def test_bfloat16_is_torchs_bit_for_bit() -> None:
    words = draws(0).integers(0, 2**32, 20000, dtype=np.uint32)
    edges = np.array(
        [0, 0x80000000, 0x7F800000, 0xFF800000, 0x3F808000, 0x3F818000, 0x3F808001, 1, 0x8000, 0x8001], np.uint32
    )
    nans = np.array([0x7F800001, 0xFF80FFFF], np.uint32)  # payloads that a cut would lose
    values = np.concatenate((words, edges, nans)).view(np.float32)
    stored = narrow(values, np.ones_like(values), "bfloat16")
    expected = torch.from_numpy(values).bfloat16()
    number = ~np.isnan(values)
    assert np.array_equal(stored.view(np.int16)[number], expected.view(torch.int16).numpy()[number])
    assert np.isnan(widen(stored, np.ones_like(values))[~number]).all()
    assert np.array_equal(widen(stored, np.ones_like(values))[number], expected.float().numpy()[number])


@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=30),
    st.sampled_from(["float32", "bfloat16", "int8"]),
)
@settings(max_examples=150, deadline=None)
def test_rounding_stays_within_its_bound(numbers: list[float], kind: str) -> None:
    values = np.array(numbers, np.float32)
    (scale,) = scales(np.abs(values).max(keepdims=True), kind)  # type: ignore[arg-type]
    back = widen(narrow(values, scale, kind), scale)  # type: ignore[arg-type]
    off = np.abs(back.astype(np.float64) - values.astype(np.float64))
    assert (off <= error(values, scale, kind)).all()  # type: ignore[arg-type]


def test_the_bounds_are_nearly_reached() -> None:
    values = np.array([127.0, 0.5, 1.5, -2.5, 100.49], np.float32)
    scale = scales(np.array([127.0], np.float32), "int8")
    assert scale.tolist() == [1.0]
    assert narrow(values, scale, "int8").tolist() == [127, 0, 2, -2, 100]
    assert np.abs(widen(narrow(values, scale, "int8"), scale) - values).max() > 0.99 * error(values, scale, "int8").min()
    one = np.array([1 + 2.0**-8], np.float32)
    assert np.abs(widen(narrow(one, one, "bfloat16"), one) - one) > 0.99 * error(one, one, "bfloat16")


def test_rounding_again_changes_nothing() -> None:
    values = normal(1, 500)
    ones = np.ones_like(values)
    once = widen(narrow(values, ones, "bfloat16"), ones)
    assert np.array_equal(widen(narrow(once, ones, "bfloat16"), ones), once)
    assert narrow(values, ones, "float32").tobytes() == values.tobytes()
    assert not error(values, ones, "float32").any()


def test_empty_and_tiny_rows_have_a_scale() -> None:
    largest = np.array([0.0, 1e-45, 3e38], np.float32)
    found = scales(largest, "int8")
    assert (found > 0).all()
    assert found[0] == 1
    stored = narrow(largest, found, "int8")
    assert stored.tolist() == [0, 0, 127]


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_int8_needs_finite_weights(bad: float) -> None:
    with pytest.raises(ModelError, match=r"row 1 has a weight of (inf|nan): int8 needs finite weights"):
        scales(np.array([1, bad, bad], np.float32), "int8")
    assert scales(np.array([bad], np.float32), "bfloat16").tolist() == [1]
