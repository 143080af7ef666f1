from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openwork.core.rng import generator
from openwork.core.sampling import absent, complement, subset, subset_without
from openwork.errors import MaskError
from tests.strategies import quick, seeds


@given(total=st.integers(0, 60), data=st.data(), seed=seeds)
@quick
def test_a_subset_is_ascending_distinct_and_of_the_right_size(total: int, data: st.DataObject, seed: int) -> None:
    count = data.draw(st.integers(0, total))
    found = subset(total, count, generator(seed, "subset")).tolist()
    assert len(found) == count
    assert found == sorted(set(found))
    assert not found or 0 <= found[0] <= found[-1] < total


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5])
def test_every_subset_is_equally_likely(count: int) -> None:
    draws, source = 4000, generator(0, "uniform", count)
    seen = Counter(tuple(subset(5, count, source).tolist()) for _ in range(draws))
    ways = list(itertools.combinations(range(5), count))
    assert set(seen) == set(ways)
    expected = draws / len(ways)
    chi = sum((seen[way] - expected) ** 2 / expected for way in ways)
    assert chi < 27.9  # the 99.9 % quantile of chi squared with 9 degrees of freedom, the most there are


@given(total=st.integers(0, 40), data=st.data(), seed=seeds)
@quick
def test_what_is_absent_is_what_python_finds(total: int, data: st.DataObject, seed: int) -> None:
    present = sorted(data.draw(st.sets(st.integers(0, max(0, total - 1)), max_size=total))) if total else []
    rest = [number for number in range(total) if number not in present]
    held = torch.tensor(present, dtype=torch.int64)
    assert complement(held, total).tolist() == rest
    assert [absent(held, torch.tensor(rank)).item() for rank in range(len(rest))] == rest
    count = data.draw(st.integers(0, len(rest)))
    drawn = subset_without(held, total, count, generator(seed, "without")).tolist()
    assert len(drawn) == count
    assert drawn == sorted(set(drawn))
    assert set(drawn) <= set(rest)


def test_a_draw_from_a_huge_range_takes_no_memory_of_its_size() -> None:
    found = subset(2**50, 1000, generator(0, "huge"))
    assert found.numel() == 1000
    assert int(found[-1]) > 2**49


@pytest.mark.parametrize("count", [-1, 6])
def test_too_many_are_refused(count: int) -> None:
    with pytest.raises(MaskError, match="of 5 positions"):
        subset(5, count, generator(0, "refused"))
