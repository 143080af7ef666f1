from __future__ import annotations

import hashlib

import torch
from hypothesis import given
from hypothesis import strategies as st

from openwork.core.rng import derive, generator
from tests.strategies import quick, seeds

words = st.lists(st.one_of(st.text(max_size=5), st.integers(-5, 5)), max_size=3)


@given(seeds, words)
@quick
def test_seeds_are_a_function_of_seed_and_purpose(seed, purpose):
    assert derive(seed, *purpose) == derive(seed, *purpose)
    assert 0 <= derive(seed, *purpose) < 2**63
    one, two = (torch.rand(4, generator=generator(seed, *purpose)) for _ in range(2))
    assert torch.equal(one, two)


def test_the_derivation_is_fixed_for_ever():
    digest = hashlib.sha256(b"0\x1forder\x1f3").hexdigest()
    assert derive(0, "order", 3) == int(digest[:16], 16) // 2


def test_purposes_and_seeds_are_told_apart():
    found = [
        derive(0, "ab", "c"), derive(0, "a", "bc"), derive(0, "abc"), derive(1, "abc"), derive(0), derive(0, "abc", 0),
        derive(0, "abc", 1), derive(10, "x"), derive(1, "0", "x"),
    ]  # fmt: skip
    assert len(set(found)) == len(found)


def test_the_global_generator_is_neither_read_nor_written():
    before = torch.get_rng_state()
    torch.rand(3, generator=generator(0, "x"))
    assert torch.equal(before, torch.get_rng_state())
