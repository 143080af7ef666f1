from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openwork.core.rng import generator
from openwork.runtime.kernels import turn
from openwork.runtime.kernels.target import Target
from tests.runtime.kernels.planes_tools import TARGETS, bits, run
from tests.strategies import quick, seeds

pytestmark = pytest.mark.skipif(not TARGETS, reason="no LLVM on this machine")


@pytest.mark.parametrize("target", TARGETS, ids=lambda one: one.name)
@given(rows=st.integers(0, 70), columns=st.integers(0, 70), seed=seeds)
@quick
def test_it_transposes_bit_for_bit_and_writes_nothing_else(target: Target, rows: int, columns: int, seed: int) -> None:
    words = torch.randint(-(2**31), 2**31 - 1, (rows, columns + seed % 4), generator=generator(seed, "turn")).int()
    x = words.view(torch.float32)[:, :columns]
    y = torch.full((columns, rows + 1 + seed % 3), 7.0)
    run(
        turn.calls(
            target, x.data_ptr(), y.data_ptr(), rows=rows, columns=columns, x_row=4 * x.stride(0), y_row=4 * y.stride(0)
        ),
        target,
        1 + seed % 3,
    )
    assert bits(y[:, :rows]) == bits(x.t())
    assert (y[:, rows:] == 7).all()
