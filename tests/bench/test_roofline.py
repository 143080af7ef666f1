"""The probes compute what they should on every target, and the bound is the longest of its three parts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openwork.bench import roofline
from openwork.bench.roofline import Limits, Work, block_of, least_seconds, parts, refill_seconds
from openwork.runtime.kernels.target import targets

TARGETS = list(targets().values())


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
@pytest.mark.parametrize("turns", [0, 1, 7, 20])
def test_multiply_adds_are_the_closed_form(target, turns):
    probe = roofline.multiply_adds(target)
    found = probe.run(turns, probe.data())
    chains = roofline.chains_of(target)
    assert found.shape == (chains * target.lanes,)
    np.testing.assert_array_equal(found, np.float32(2.0 - 2.0 * 0.5**turns))  # the sum of turns powers of one half
    assert probe.amount == 2 * chains * target.lanes
    assert chains + 2 <= target.registers


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
@pytest.mark.parametrize("turns", [0, 1, 3])
def test_loads_sum_the_whole_array(target, turns):
    probe = roofline.loads(target, roofline.FIRST_CACHE)
    data = probe.data()
    data[:] = np.arange(data.size) % 7
    assert probe.amount == data.nbytes == roofline.FIRST_CACHE
    assert float(probe.run(turns, data).sum()) == turns * float(data.sum(dtype=np.float64))


@pytest.fixture
def limits() -> Limits:
    reads = ((2**14, 300.0), (2**18, 100.0), (2**22, 30.0), (2**26, 40.0))
    return Limits("avx2", 8, 2, 1000.0, reads, 25.0)


def test_the_bound_is_the_longest_of_three(limits):
    many = Work(out=64, size=64, columns=64, kept=1000)
    assert many.flops == 2 * 1000 * 64
    assert many.loads(8) == 4 * 64 * 1000
    assert least_seconds(limits, many) == 4 * 64 * 1000 / 300.0  # loads: 853 against 128 s of multiply-adds
    blocks = Work(64, 64, 64, 1000, block=8)
    assert blocks.loads(8) == 4 * 64 * 125
    assert least_seconds(limits, blocks) == 2 * 1000 * 64 / 1000.0
    few = Work(out=1000, size=1000, columns=1, kept=20000)
    assert few.bytes == 4 * 20000 + 2 * 20000 + 4 * 2000
    assert few.loads(8) == 4 * 20000
    assert least_seconds(limits, few) == few.bytes / 300.0  # 128,000 bytes fit the two first-level probes below 2 x 256 KB


def test_the_parts_are_those_of_the_bound(limits):
    work = Work(out=64, size=64, columns=64, kept=1000, block=2)
    assert parts(limits, work) == {
        "multiply-adds": 2 * 1000 * 64 / 1000.0, "loads from the first cache": 4 * 64 * 500 / 300.0,
        "memory": (4 * 1000 + 2 * 500 + 4 * 64 * 128) / 300.0,
    }  # fmt: skip
    assert least_seconds(limits, work) == max(parts(limits, work).values())


def test_what_the_first_cache_cannot_hold_comes_from_the_second(limits):
    work = Work(out=64, size=64, columns=16, kept=1000)
    assert refill_seconds(limits, work) is None  # how large the first cache is, is not known
    small, large = replace(limits, cache=1024), replace(limits, cache=2**20)
    once = 4 * 64 * 16
    assert refill_seconds(large, work) == (6 * 1000 + once) / 100.0  # all fits: everything is fetched once
    narrow = 0.5 * 4 * 16 * 1000 + 2 * 6 * 1000 + once  # 8 columns: half of 2 KB fits, the weights are read twice
    wide = 0.75 * 4 * 16 * 1000 + 6 * 1000 + once
    assert refill_seconds(small, work) == min(narrow, wide) / 100.0
    assert refill_seconds(small, Work(0, 0, 0, 0)) == 0.0


def test_a_vector_that_is_not_full_costs_a_whole_load():
    assert Work(1, 1, 49, 10).loads(8) == 4 * 56 * 10
    assert Work(1, 1, 5, 10).loads(8) == 4 * 5 * 10
    assert Work(1, 1, 8, 10, block=4).loads(8) == 4 * 8 * 3


def test_the_rate_is_that_of_the_level_that_holds_so_much(limits):
    assert limits.rate(1.0) == 300.0
    assert limits.rate(2 * 2**18) == 100.0
    assert limits.rate(2 * 2**22) == 40.0  # a larger array was read faster: the estimate stays an upper one
    assert limits.rate(1e12) == 40.0


@given(st.sampled_from([1, 2, 4, 8, 16]), st.integers(1, 5), st.integers(0, 50))
def test_blocks_are_found(block, groups, seed):
    generator = torch.Generator().manual_seed(seed)
    kept = (torch.rand(groups, 1, 40, generator=generator) < 0.5).expand(groups, block, 40).reshape(-1, 40)
    found = block_of(kept.float())
    assert found % block == 0  # a larger block only where neighbours agree by chance
    assert bool((kept.reshape(-1, found, 40) == kept.reshape(-1, found, 40)[:, :1]).all())


@pytest.mark.skipif(not TARGETS, reason="no kernels on this machine")
def test_what_is_measured_is_positive(monkeypatch):
    monkeypatch.setattr(roofline, "SIZES", (roofline.FIRST_CACHE, 2**16))
    monkeypatch.setattr(roofline, "TRIAD", 2**16)
    monkeypatch.setattr(roofline, "_TRIES", 2)
    monkeypatch.setattr(roofline, "_SECONDS", 1e-4)
    before = torch.get_num_threads()
    found = roofline.measure(2)
    assert torch.get_num_threads() == before
    assert found is not None
    assert found.threads == 2
    assert found.flops > 0.0
    assert all(rate > 0.0 for _, rate in found.reads)
    assert found.triad > 0.0


def test_without_kernels_there_is_no_roofline(monkeypatch):
    monkeypatch.setattr(roofline, "host", lambda: None)
    assert roofline.measure(1) is None
