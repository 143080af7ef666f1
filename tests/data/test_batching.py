from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openwork.core.rng import generator
from openwork.data import batching
from openwork.errors import DataError


@given(st.integers(1, 300), st.integers(1, 64), st.integers(0, 5))
def test_an_epoch_is_a_part_of_a_permutation(size: int, batch_size: int, epoch: int) -> None:
    batches = list(batching.shuffled(size, 3, epoch, batch_size))
    assert len(batches) == batching.steps(size, batch_size) == max(1, size // batch_size)
    assert {len(batch) for batch in batches} == {min(size, batch_size)}
    order = torch.randperm(size, generator=generator(3, "order", epoch))
    assert torch.equal(torch.cat(batches), order[: len(batches) * batch_size])


@given(st.integers(0, 300), st.integers(1, 64))
def test_the_plain_order_has_everything(size: int, batch_size: int) -> None:
    assert [i for s in batching.plain(size, batch_size) for i in range(s.start, s.stop)] == list(range(size))


@pytest.mark.parametrize("batch_size", [0, -1, 2.0, True, None])
def test_a_senseless_batch_size_is_told(batch_size: int) -> None:
    with pytest.raises(DataError, match="batch_size is"):
        batching.steps(10, batch_size)
