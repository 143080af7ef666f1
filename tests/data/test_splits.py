from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openwork.core.rng import generator
from openwork.data import splits
from openwork.errors import DataError


@settings(max_examples=150, deadline=None)
@given(labels=st.lists(st.integers(0, 5), min_size=1, max_size=80), data=st.data())
def test_a_choice_is_exact_ascending_and_within_one_of_its_share(labels: list[int], data: st.DataObject) -> None:
    y = torch.tensor(labels)
    count = data.draw(st.integers(0, len(labels)))
    chosen = splits.stratified(y, count, generator(0, "x"))
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert chosen.numel() == count
    for kind in set(labels):
        share = count * labels.count(kind) / len(labels)
        assert abs(int((y[chosen] == kind).sum()) - share) < 1
    rest = splits.complement(chosen, len(labels))
    assert sorted(chosen.tolist() + rest.tolist()) == list(range(len(labels)))


def test_a_choice_is_a_function_of_the_generator() -> None:
    y = torch.arange(1000) % 7
    first = splits.stratified(y, 100, generator(0, "a"))
    assert torch.equal(first, splits.stratified(y, 100, generator(0, "a")))
    assert not torch.equal(first, splits.stratified(y, 100, generator(1, "a")))


def test_every_member_of_a_class_can_be_chosen() -> None:
    y = torch.tensor([0, 0, 0, 1, 1, 1])
    seen = torch.zeros(6)
    for seed in range(600):
        seen[splits.stratified(y, 2, generator(seed, "fair"))] += 1
    assert ((seen / 600 - 1 / 3).abs() < 0.08).all()  # 4 standard deviations


def test_reserved_examples_are_left_over() -> None:
    y = torch.tensor([0] * 10 + [1])
    assert splits.stratified(y, 10, generator(0), reserve=0).numel() == 10
    assert splits.stratified(y, 9, generator(0), reserve=1).tolist() == splits.stratified(y, 9, generator(0), 1).tolist()
    assert 10 not in splits.stratified(y, 9, generator(0), reserve=1)
    with pytest.raises(DataError, match="at most 9"):
        splits.stratified(y, 10, generator(0), reserve=1)


def test_sequences_have_no_classes() -> None:
    assert splits.stratified(torch.arange(30).view(10, 3), 9, generator(0), reserve=1).numel() == 9


def test_shares_by_hand() -> None:
    """Quotas of 5 among 6, 3, 1: 3, 1.5, 0.5; the two equal remainders go to the first."""
    sizes = torch.tensor([6, 3, 1])
    assert splits.shares(sizes, 5, sizes).tolist() == [3, 2, 0]
    assert splits.shares(sizes, 5, torch.tensor([1, 3, 1])).tolist() == [1, 3, 1]
    assert splits.shares(sizes, 10, sizes).tolist() == [6, 3, 1]


@pytest.mark.parametrize(("validation", "count"), [(0, 0), (0.0, 0), (7, 7), (0.1, 10), (0.125, 12), (0.999, 100)])
def test_the_size_of_a_validation_set(validation: float, count: int) -> None:
    assert splits.count_of(validation, 100) == count


@pytest.mark.parametrize("validation", [-1, 100, 1.0, -0.1, float("nan"), True, "a", None])
def test_a_senseless_size_is_told(validation: float) -> None:
    with pytest.raises(DataError, match="validation is"):
        splits.count_of(validation, 100)


def test_arrays_become_tensors_without_warnings() -> None:
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    shared = splits.tensor(array)
    array[0, 0] = 9
    assert shared[0, 0] == 9
    fixed = np.frombuffer(bytes(range(6)), np.uint8)
    assert splits.tensor(fixed).tolist() == list(range(6))
    assert splits.tensor(array[:, ::-1]).tolist() == array[:, ::-1].tolist()
