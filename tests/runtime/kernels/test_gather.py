from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openwork.core.rng import generator
from openwork.runtime.kernels import gather
from openwork.runtime.kernels.target import Target
from tests.runtime.kernels.planes_tools import TARGETS, bits, run
from tests.strategies import quick, seeds

pytestmark = pytest.mark.skipif(not TARGETS, reason="no LLVM on this machine")


@pytest.mark.parametrize("target", TARGETS, ids=lambda one: one.name)
@given(
    count=st.sampled_from([0, 1, 7, 8, 9, 100, gather.RUN - 1, gather.RUN, gather.RUN + 1, 2 * gather.RUN + 13]), seed=seeds
)
@quick
def test_it_copies_bit_for_bit(target: Target, count: int, seed: int) -> None:
    source = generator(seed, "gather")
    values = torch.randint(-(2**31), 2**31 - 1, (50,), generator=source).int().view(torch.float32)  # NaNs of all kinds too
    order = torch.randint(50, (count,), generator=source).int()
    out = torch.full((count + 2,), 7.0)
    run(gather.calls(target, values.data_ptr(), order.data_ptr(), out.data_ptr() + 4, count), target, 1 + seed % 3)
    assert bits(out[1:-1]) == bits(values.view(torch.int32)[order.long()].view(torch.float32))
    assert out[0] == out[-1] == 7.0
