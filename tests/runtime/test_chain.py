from __future__ import annotations

import copy
import itertools
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from openwork.core.rng import generator
from openwork.errors import ModelError
from openwork.runtime import tuning
from openwork.runtime.chain import Chain, Link, apart
from openwork.runtime.kernels.target import host
from openwork.runtime.spmm import pack_spmm

pytestmark = pytest.mark.skipif(host() is None, reason="no LLVM on this machine")


def link(out: int, width: int, density: float, block: int = 1, seed: int = 0, **after: object) -> Link:
    draw = generator(seed, "chain", str((out, width)))
    kept = torch.rand(-(-out // block), width, generator=draw).repeat_interleave(block, 0)[:out] < density
    weight = torch.randn(out, width, generator=draw) * kept
    return Link(pack_spmm(weight, torch.randn(out, generator=draw), block=block), **after)  # type: ignore[arg-type]


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(1, "chain input"))


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 70), min_size=2, max_size=5),
    tokens=st.integers(1, 150),
    density=st.sampled_from([0.05, 0.3, 1.0]),
    block=st.sampled_from([1, 2, 4]),
    vectors=st.sampled_from([None, 1, 2, 4]),
    threads=st.sampled_from([None, 1, 3]),
)
def test_a_chain_gives_what_its_layers_give_bit_for_bit(
    sizes: list[int], tokens: int, density: float, block: int, vectors: int | None, threads: int | None
) -> None:
    links = [link(out, width, density, block, seed) for seed, (width, out) in enumerate(itertools.pairwise(sizes))]
    links[0] = Link(links[0].packed, clamp=(0.0, 6.0))
    x = noise(tokens, sizes[0])
    assert torch.equal(Chain(links).run(x, threads=threads, vectors=vectors), apart(links, x))


@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "hardswish"])
def test_what_follows_a_sum_is_done_on_the_way(act: str) -> None:
    links = [link(40, 24, 0.4, act=act), link(12, 40, 0.5)]
    x = noise(3, 7, 24)
    found = Chain(links).run(x)
    assert found.shape == (3, 7, 12)
    torch.testing.assert_close(found, apart(links, x), rtol=1e-5, atol=1e-5)


def test_tokens_that_fill_more_than_the_cache_go_in_pieces() -> None:
    links = [link(512, 256, 0.05), link(256, 512, 0.05)]
    x = noise(2500, 256)
    assert torch.equal(Chain(links).run(x, threads=1), apart(links, x))


@pytest.mark.parametrize("shape", [(0, 24), (2, 0, 24), (24,)])
def test_empty_inputs_and_single_tokens(shape: tuple[int, ...]) -> None:
    links = [link(40, 24, 0.4), link(12, 40, 0.5)]
    found = Chain(links).run(torch.ones(shape))
    assert found.shape == (*shape[:-1], 12)
    assert torch.equal(found, apart(links, torch.ones(shape)))


def test_a_weight_without_entries_gives_its_bias() -> None:
    links = [link(40, 24, 0.0), link(12, 40, 0.5)]
    assert torch.equal(Chain(links).run(noise(9, 24)), apart(links, noise(9, 24)))


def test_strides_of_any_kind() -> None:
    links = [link(40, 24, 0.4), link(12, 40, 0.5)]
    chain, expected = Chain(links), apart(links, noise(9, 24))
    assert torch.equal(chain.run(noise(9, 24).t().contiguous().t()), expected)
    wide = torch.zeros(9, 100)
    wide[:, 7:31] = noise(9, 24)
    assert torch.equal(chain.run(wide[:, 7:31]), expected)
    assert torch.equal(chain.run(noise(1, 24).expand(9, 24)), apart(links, noise(1, 24).expand(9, 24)))


def test_an_input_that_does_not_fit_is_an_error() -> None:
    chain = Chain([link(40, 24, 0.4)])
    for wrong in (noise(3, 25), noise(3, 24).double(), noise(3, 24).to("meta")):
        with pytest.raises(ModelError):
            chain.run(wrong)


def test_copies_and_threads() -> None:
    links = [link(64, 48, 0.3), link(48, 64, 0.3)]
    chain = copy.deepcopy(Chain(links))
    inputs = [noise(5 + number, 48) for number in range(8)]
    wrong: list[int] = []

    def work(number: int) -> None:
        expected = apart(links, inputs[number])
        wrong.extend(number for _ in range(30) if not torch.equal(chain.run(inputs[number], threads=1), expected))

    workers = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_what_is_measured_is_kept_and_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    links = [link(64, 48, 0.3), link(48, 64, 0.3)]
    chain, x = Chain(links), noise(40, 48)
    before = chain.run(x)
    kept: dict[str, object] = {}
    monkeypatch.setattr(tuning, "keep", lambda key, tiling: kept.setdefault(key, tiling))
    monkeypatch.setattr(tuning, "recall", kept.get)
    chain.tune(x, seconds=0.01)
    assert len(kept) == 1
    assert torch.equal(chain.run(x), before)
