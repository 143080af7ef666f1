from __future__ import annotations

import copy
import itertools
import pickle
import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from openwork.core.rng import generator
from openwork.errors import ModelError
from openwork.runtime import product, spmm, tuning
from openwork.runtime.bounds import bound
from openwork.runtime.kernels.target import VARIABLE, targets
from openwork.runtime.spmm import PackedSpMM, pack_spmm, spmm_chw, spmm_tokens, tune, unpack_spmm
from openwork.runtime.tuning import Tiling

TARGETS = [*targets(), "none"]


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(VARIABLE, request.param)
    return str(request.param)


@pytest.fixture(params=list(targets()))
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(VARIABLE, request.param)
    return str(request.param)


def sparse(out: int, width: int, density: float, rows: int = 1, *, seed: int = 0) -> Tensor:
    """Normal weights of which blocks of `rows` rows are kept with a chance of `density`."""
    draw = generator(seed, "spmm", out, width, rows, str(density))
    kept = (torch.rand(-(-out // rows), width, generator=draw) < density).repeat_interleave(rows, dim=0)[:out]
    return torch.randn(out, width, generator=draw) * kept


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed, "x", *shape))


def right(y: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor) -> bool:
    """Tell whether y (..., out, columns) is W x + b to within the bound; x has shape (..., in, columns)."""
    exact = weight.double() @ x.double() + (0 if bias is None else bias.double()[:, None])
    allowed = bound(weight, bias, x.transpose(-1, -2)).transpose(-1, -2)
    return y.shape == exact.shape and bool(((y.double() - exact).abs() <= allowed).all())


# ---- packing ------------------------------------------------------------------------------------------------------

WORKED = torch.tensor([[0, 1, 0, 2, 0, 0], [0, 3, 0, 4, 0, 0], [0, 5, 0, 0, 0, 6], [0, 7, 0, 8, 0, 9]], dtype=torch.float32)
BIAS = torch.tensor([0.1, 0.2, 0.3, 0.4])


def test_the_worked_example() -> None:
    single = pack_spmm(WORKED, BIAS, 1)
    assert single.counts.tolist() == [2, 2, 2, 3]
    assert single.deltas.tolist() == [2, -2, 2, -2, 4, -4, 2, 2, -4]
    pair = pack_spmm(WORKED, BIAS, 2)
    assert (pair.counts.tolist(), pair.first_channel) == ([2, 3], 1)
    assert pair.deltas.tolist() == [2, -2, 2, 2, -4]
    expected = [0.1, 0.2, 1, 3, 2, 4, 0.3, 0.4, 5, 7, 0, 8, 6, 9]
    assert pair.values.tolist() == torch.tensor(expected).tolist()
    assert pack_spmm(WORKED, BIAS).block == 2  # 9 of 12 are too few for blocks of 4, 9 of 10 enough for 2


@given(
    out=st.integers(0, 21),
    width=st.integers(0, 19),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    block=st.sampled_from([1, 2, 4, 8, 16, "auto"]),
    rows=st.sampled_from([1, 2, 4]),
    biased=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_packing_round_trips_and_counts(out: int, width: int, density: float, block: Any, rows: int, biased: bool) -> None:
    weight = sparse(out, width, density, rows)
    bias = normal(out) if biased else None
    packed = pack_spmm(weight, bias, block)
    back, back_bias = unpack_spmm(packed)
    assert torch.equal(back, weight)
    assert (back_bias is None) == (bias is None)
    assert bias is None or torch.equal(back_bias, bias)  # type: ignore[arg-type]
    size = packed.block
    whole = out // size * size
    blocks = int((weight[:whole].reshape(whole // size, size, width) != 0).any(dim=1).sum()) if whole else 0
    left = int((weight[whole:] != 0).sum())
    assert len(packed.values) == out + size * blocks + left
    assert packed.multiplies == size * blocks + left
    assert packed.deltas.sum() == 0
    assert len(packed.deltas) == packed.counts.sum() == blocks + left
    assert len(packed.counts) == whole // size + out - whole
    channels = packed.first_channel + np.concatenate(([0], np.cumsum(packed.deltas)[:-1]))[: blocks + left]
    ends = np.cumsum(packed.counts)
    for group, (begin, end) in enumerate(zip(ends - packed.counts, ends, strict=True)):
        first = group * size if group < whole // size else whole + group - whole // size
        rows_of = weight[first : first + (size if group < whole // size else 1)]
        assert channels[begin:end].tolist() == (rows_of != 0).any(dim=0).nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    ("weight", "bias", "block", "words"),
    [
        (torch.ones(3), None, 1, "give a float32 or float64 matrix"),
        (torch.ones(3, 2).double(), None, 1, "give float32, or use a csr format"),
        (torch.ones(3, 2), torch.ones(2), 1, "does not fit"),
        (torch.ones(3, 2), None, 3, "no block of 3 rows: choose auto, 1, 2, 4, 8, 16"),
        (torch.ones(3, 2), None, True, "no block of True"),
    ],
)
def test_misfits_are_refused(weight: Tensor, bias: Tensor | None, block: Any, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        pack_spmm(weight, bias, block)


def test_a_packed_weight_is_a_copy_that_copies_share_and_pickles_keep() -> None:
    weight, bias = sparse(9, 12, 0.3), normal(9)
    packed = pack_spmm(weight, bias)
    x = normal(12, 5)
    y = spmm_chw(packed, x)
    again: PackedSpMM = pickle.loads(pickle.dumps(packed))
    assert copy.deepcopy(packed) is packed
    weight.zero_()
    bias.zero_()
    assert torch.equal(spmm_chw(packed, x), y)
    assert torch.equal(spmm_chw(again, x), y)
    assert packed.nbytes == again.nbytes > 4 * packed.multiplies


# ---- products -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 2, 4, 16])
def test_every_number_of_columns(target: str, block: int) -> None:
    weight, bias = sparse(37, 23, 0.3, 2), normal(37)
    weight[5] = 0
    weight[16:20] = 0
    packed = pack_spmm(weight, bias, block)
    for columns in range(1, 71) if block == 1 else (1, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 49, 63, 64, 65, 70):
        x = normal(23, columns)
        assert right(spmm_chw(packed, x), weight, bias, x)
        y = spmm_tokens(packed, x.t().contiguous())
        assert y.is_contiguous()
        assert right(y.t(), weight, bias, x)


@given(
    out=st.integers(0, 40),
    width=st.integers(0, 60),
    columns=st.integers(0, 150),
    images=st.integers(0, 3),
    density=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    block=st.sampled_from([1, 2, 4, 8, 16]),
    name=st.sampled_from(TARGETS),
    strided=st.sampled_from(["whole", "rows", "columns", "aligned"]),
    biased=st.booleans(),
)
@settings(max_examples=50, deadline=None)
def test_products_of_any_shape(
    out: int, width: int, columns: int, images: int, density: float, block: Any, name: str, strided: str, biased: bool
) -> None:
    weight = sparse(out, width, density)
    bias = normal(out) if biased else None
    x = {
        "whole": lambda: normal(images, width, columns),
        "rows": lambda: normal(images, width, columns + 3)[..., 1 : columns + 1],
        "columns": lambda: normal(images, width, 2 * columns)[..., ::2],
        "aligned": lambda: normal(images, width, -(-columns // 16) * 16)[..., :columns],
    }[strided]()
    before = x.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, name)
        packed = pack_spmm(weight, bias, block)
        whole = spmm_chw(packed, x)
        assert right(whole, weight, bias, x)
        for image, y in zip(x, whole, strict=True):
            alone = spmm_chw(packed, image)
            assert right(alone, weight, bias, image)
            assert name == "none" or torch.equal(alone, y)
        tokens = spmm_tokens(packed, x.transpose(1, 2))
        assert tokens.shape == (images, columns, out)
        assert right(tokens.transpose(1, 2), weight, bias, x)
    assert torch.equal(x, before)


def test_results_are_the_same_bit_for_bit_for_all_tilings_and_threads(kernels: str) -> None:
    for block, columns, images in ((1, 5, None), (2, 49, 3), (4, 64, None), (1, 64, 2), (1, 196, None), (2, 196, 1)):
        weight, bias = sparse(43, 130, 0.2, block), normal(43)
        packed = pack_spmm(weight, bias, block)
        x = normal(*([] if images is None else [images]), 130, columns)
        first = spmm_chw(packed, x, threads=1, tiling=Tiling(1, 130, 1))
        assert right(first, weight, bias, x)
        tokens = spmm_tokens(packed, x.transpose(-1, -2).contiguous(), threads=1)
        assert torch.equal(tokens.transpose(-1, -2), first)
        for vectors, part, chunks in itertools.product((1, 3, 5), (7, 60, 500), (1, 3, 64)):
            tiling = Tiling(vectors, part, chunks)
            assert torch.equal(spmm_chw(packed, x, threads=1 + chunks % 3, tiling=tiling), first)
        other = spmm_tokens(packed, x.transpose(-1, -2).contiguous(), threads=2, tiling=Tiling(3, 40, 2))
        assert torch.equal(other, tokens)


def test_aligned_rows_are_read_in_place_and_the_others_through_rooms(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = sparse(24, 40, 0.3)
    packed = pack_spmm(weight)
    ways: list[bool] = []
    right_way = product._spread
    monkeypatch.setattr(product, "_spread", lambda *asked: ways.append(right_way(*asked)) or ways[-1])
    room = torch.zeros(40 * 256 + 16)
    start = -room.data_ptr() // 4 % 16
    for columns, pitch, direct in ((48, 48, True), (48, 49, False), (48, 256, False), (16, 16, True), (10, 10, False)):
        x = room[start : start + 40 * pitch].view(40, pitch)[:, :columns].copy_(normal(40, columns))
        ways.clear()
        assert right(spmm_chw(packed, x), weight, None, x)
        assert set(ways) == {direct}
    assert right(
        spmm_chw(packed, room[start + 1 :][: 40 * 48].view(40, 48)), weight, None, room[start + 1 :][:1920].view(40, 48)
    )
    assert not ways[-1]


def test_rows_out_of_reach_of_an_offset_go_through_rooms(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = sparse(24, 40, 0.3), normal(40, 16)
    asked = [pack_spmm(weight) for _ in range(2)]
    expected = spmm_chw(asked[0], x)
    monkeypatch.setattr(product, "FARTHEST", 40 * 64)
    assert torch.equal(spmm_chw(asked[1], x), expected)
    assert [next(iter(one._product._plans.values())).way.staged for one in asked] == [False, True]


def test_output_where_it_is_wanted(target: str) -> None:
    weight, bias, x = sparse(13, 20, 0.4), normal(13), normal(2, 20, 37)
    packed = pack_spmm(weight, bias, 4)
    expected = spmm_chw(packed, x)
    room = torch.full((3, 15, 50), torch.nan)
    out = room[1:, 1:14, 4:41]
    assert spmm_chw(packed, x, out) is out
    assert torch.equal(out, expected)
    room[1:, 1:14, 4:41] = torch.nan
    assert bool(room.isnan().all())
    for wrong in (torch.empty(2, 13, 36), torch.empty(2, 13, 37).double(), torch.empty(2, 37, 13).transpose(1, 2)):
        with pytest.raises(ModelError, match="cannot write a tensor"):
            spmm_chw(packed, x, wrong)
    with pytest.raises(ModelError, match="cannot write a tensor"):
        spmm_chw(packed, x, torch.empty(1, 1, 37).expand(2, 13, 37))
    with pytest.raises(ModelError, match="out overlaps x"):
        spmm_chw(packed, x, x[:, 7:])
    for wrong in (x[0, 0], x.double(), x[:, :19], torch.empty(20, 3, dtype=torch.long)):
        with pytest.raises(ModelError, match="cannot multiply an input"):
            spmm_chw(packed, wrong)
    with pytest.raises(ModelError, match="cannot multiply an input"):
        spmm_tokens(packed, x)


def test_clamp_and_a_second_summand(target: str) -> None:
    weight, bias, x = sparse(12, 30, 0.5), normal(12), 3 * normal(2, 30, 45)
    packed = pack_spmm(weight, bias, 2)
    plain = spmm_chw(packed, x)
    added = normal(2, 12, 60, seed=1)[..., 3:48]
    assert torch.equal(spmm_chw(packed, x, clamp=(0.0, 6.0)), plain.clamp(0, 6))
    assert torch.equal(spmm_chw(packed, x, added=added), plain + added)
    assert torch.equal(spmm_chw(packed, x, added=added, clamp=(-1.0, 1.0)), (plain + added).clamp(-1, 1))
    assert torch.equal(spmm_chw(packed, x[0], added=added[0]), (plain + added)[0])
    assert torch.equal(spmm_tokens(packed, x.transpose(1, 2), clamp=(0.0, float("inf"))), plain.relu().transpose(1, 2))
    onto = added.contiguous()
    with pytest.raises(ModelError, match="out overlaps x or added"):
        spmm_chw(packed, x, onto, added=onto)
    with pytest.raises(ModelError, match="cannot add a tensor"):
        spmm_chw(packed, x, added=added[..., :-1])
    for act, clamp in (("clamp", None), ("nope", None), ("silu", (0.0, 1.0))):
        with pytest.raises(ModelError, match="give clamp="):
            spmm_chw(packed, x, act=act, clamp=clamp)  # type: ignore[arg-type]


def test_an_empty_interval_gives_its_lower_end(target: str) -> None:
    packed, x = pack_spmm(sparse(5, 6, 0.5)), normal(6, 20)
    assert torch.equal(spmm_chw(packed, x, clamp=(2.0, 1.0)), torch.full((5, 20), 2.0))


def test_zero_weights_skip_their_input_and_explicit_zeros_do_not(kernels: str) -> None:
    weight = torch.zeros(4, 6)
    weight[0, 1], weight[1, 2] = 2.0, 3.0
    x = torch.ones(6, 33)
    x[0], x[4] = torch.nan, torch.inf
    x[1, 7], x[2, 9] = torch.nan, torch.inf
    single = spmm_chw(pack_spmm(weight, block=1), x)
    assert bool(single[0, 7].isnan())
    assert float(single[1, 9]) == torch.inf
    assert int(single.isfinite().logical_not().sum()) == 2
    pair = spmm_chw(pack_spmm(weight, block=2), x)
    assert bool(pair[:2, 7].isnan().all())  # row 1 has an explicit zero at column 1
    assert bool(pair[0, 9].isnan())
    assert bool(pair[2:].eq(0).all())
    assert bool(spmm_chw(pack_spmm(weight, block=1), x, clamp=(0.0, 6.0))[0, 7].isnan())


def test_tokens_of_any_strides(target: str) -> None:
    weight, bias = sparse(21, 18, 0.4), normal(21)
    packed = pack_spmm(weight, bias, 2)
    base = normal(4, 11, 18)
    for x in (
        base[0, 0],
        base[:, 0],
        base,
        base.transpose(0, 1),
        normal(18, 35).t(),
        normal(18, 64)[:, 3:40].t(),
        normal(7, 36)[:, ::2],
        normal(1, 18).expand(9, 18),
        base[:0],
        base.clone().requires_grad_(),
    ):
        before = x.detach().clone()
        y = spmm_tokens(packed, x)
        assert y.shape == (*x.shape[:-1], 21)
        assert y.is_contiguous()
        assert not y.requires_grad
        flat = before.reshape(-1, 18)
        assert right(y.reshape(-1, 21).t(), weight, bias, flat.t())
        assert torch.equal(x, before)


def test_many_tokens_go_run_by_run(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = sparse(40, 30, 0.3)
    packed = pack_spmm(weight)
    expected = spmm_tokens(packed, normal(1000, 30))
    monkeypatch.setattr(product, "HELD", 1)
    packed._product.forget()
    keys: list[int] = []
    run = packed._product.run
    monkeypatch.setattr(packed._product, "run", lambda plan, *places: keys.append(plan.key.columns) or run(plan, *places))
    assert torch.equal(spmm_tokens(packed, normal(1000, 30)), expected)
    assert keys == [64] * 15 + [40]
    keys.clear()
    turned = normal(1000, 30).t().contiguous().t()
    assert torch.equal(spmm_tokens(packed, turned), expected)
    assert keys == [64] * 15 + [40]


def test_eight_threads_at_once(target: str) -> None:
    weight, bias = sparse(64, 80, 0.2), normal(64)
    packed = pack_spmm(weight, bias, 2)
    inputs = [normal(80, 10 + number % 3, seed=number) for number in range(8)]
    expected = [spmm_chw(packed, x, threads=1) for x in inputs]
    wrong: list[int] = []
    together = threading.Barrier(8)

    def work(number: int) -> None:
        together.wait()
        for turn in range(40):
            x, y = inputs[number], expected[number]
            same = torch.equal(spmm_chw(packed, x, threads=1 + turn % 2), y) and torch.equal(
                spmm_tokens(packed, x.t()), y.t()
            )
            if not same:
                wrong.append(number)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for one in workers:
        one.start()
    for one in workers:
        one.join()
    assert not wrong


def test_the_fallback_has_all_that_may_follow_a_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "none")
    weight, x = sparse(8, 9, 0.5), normal(9, 5)
    packed = pack_spmm(weight)
    plain = spmm_chw(packed, x)
    for act, function in {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "sigmoid": torch.sigmoid,
        "hardswish": functional.hardswish,
        "tanh": torch.tanh,
    }.items():
        assert torch.equal(spmm_chw(packed, x, act=act), function(plain))  # type: ignore[arg-type, operator]


def test_a_new_processor_finds_the_same_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = sparse(30, 20, 0.3), normal(20, 40)
    packed = pack_spmm(weight)
    for name in TARGETS:
        monkeypatch.setenv(VARIABLE, name)
        assert right(spmm_chw(packed, x), weight, None, x)
    monkeypatch.setenv(VARIABLE, "z80")
    with pytest.raises(ModelError, match="OPENWORK_KERNELS is 'z80'"):
        spmm_chw(packed, x)


def test_without_llvm_torch_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    from openwork.runtime.kernels import target as module

    monkeypatch.setattr(module, "_targets", tuple)
    monkeypatch.setattr(module, "_chosen", module._chosen.__wrapped__)
    monkeypatch.delenv(VARIABLE, raising=False)
    weight, bias, x = sparse(30, 20, 0.3), normal(30), normal(2, 20, 40)
    packed = pack_spmm(weight, bias)
    assert right(spmm_chw(packed, x), weight, bias, x)
    assert right(spmm_tokens(packed, x.transpose(1, 2)).transpose(1, 2), weight, bias, x)
    assert tune(packed, x) is None


# ---- tuning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [False, True])
def test_what_was_measured_is_used_from_then_on(
    tokens: bool, kernels: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("OPENWORK_CACHE", str(tmp_path))
    rounds: list[int] = []
    monkeypatch.setattr(
        spmm, "interleave", lambda calls, seconds: rounds.append(len(calls)) or {name: -int(name) for name in calls}
    )
    weight, x = sparse(48, 64, 0.2), normal(64, 200)
    packed = pack_spmm(weight)
    expected = spmm_chw(packed, x, threads=1)
    x = x.t().contiguous() if tokens else x
    found = tune(packed, x, tokens=tokens, threads=1, seconds=0.02)
    assert found is not None
    assert 1 <= rounds[0] <= spmm.FEW
    used: list[Tiling] = []
    way = packed._product._way
    monkeypatch.setattr(packed._product, "_way", lambda key: used.append(way(key).tiling) or way(key))
    y = spmm_tokens(packed, x, threads=1).t() if tokens else spmm_chw(packed, x, threads=1)
    assert torch.equal(y, expected)
    assert set(used) == {found}
    assert list(tuning._read(tuning._place()).values()) == [found]
    assert tune(pack_spmm(weight), x, tokens=tokens, threads=1) == found
    assert len(rounds) == 1  # it is known
    assert tune(pack_spmm(weight), x, tokens=tokens, threads=1, seconds=0.02, again=True) is not None
    assert len(rounds) == 2


def test_there_may_be_nothing_to_measure() -> None:
    assert tune(pack_spmm(torch.zeros(3, 4)), torch.ones(4, 5)) is None
    assert tune(pack_spmm(torch.ones(3, 4)), torch.ones(4, 0)) is None
