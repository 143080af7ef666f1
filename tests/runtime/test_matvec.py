from __future__ import annotations

import copy
import dataclasses
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from openwork.core.patterns import parse
from openwork.core.rng import generator
from openwork.errors import ModelError
from openwork.runtime import few, formats, matvec
from openwork.runtime.bounds import bound
from openwork.runtime.kernels import precision
from openwork.runtime.kernels.nm import PERMUTING, Packed
from openwork.runtime.kernels.precision import PRECISIONS
from openwork.runtime.kernels.target import VARIABLE, host, targets
from openwork.testing import formats as suite
from openwork.testing.formats import check_format

PLACES = [*targets(), "none"]
PACKS = {"sell": matvec.pack_rows, "few": few.pack, "nm": matvec.pack_nm, "block": matvec.pack_blocks}
SUITS = {"sell": "unstructured", "few": "unstructured", "nm": "2:4", "block": "block4x1"}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(VARIABLE, request.param)
    monkeypatch.setattr(suite, "DTYPES", (torch.float32,))
    return str(request.param)


def weights(name: str, out: int, width: int, density: float = 0.25, seed: int = 0) -> Tensor:
    """A weight that the format takes."""
    draw = generator(seed, "matvec", name, out, width)
    weight = torch.randn(out, width, generator=draw)
    pattern = parse(SUITS[name])
    score = torch.rand(out, width, generator=draw)
    return weight * pattern.select(score, 0.5 if name == "nm" else density)


def within(y: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor, more: Tensor | float = 0.0) -> bool:
    exact = x.double() @ weight.double().t() + (0.0 if bias is None else bias.double())
    return bool(((y.double() - exact).abs() <= bound(weight, bias, x) + more).all())


# -- conformance --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sell", "few"])
def test_formats_for_any_weight_conform_on_every_processor(name: str, place: str) -> None:
    check_format(name)


def test_nm_conforms_on_every_processor(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight of the suite, thinned to 2:4 or to 1:8; the zeros it has already stay."""
    every = suite._weights

    def thinned(seed: int) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        for number, (case, weight, bias) in enumerate(every(seed)):
            n, m = ((2, 4), (1, 8))[number % 2]
            groups = torch.nn.functional.pad(weight, (0, -weight.shape[1] % m)).reshape(len(weight), -1, m)
            late = (groups != 0).cumsum(dim=2) > n
            yield case, groups.masked_fill(late, 0).reshape(len(weight), -1)[:, : weight.shape[1]], bias

    monkeypatch.setattr(suite, "_weights", thinned)
    check_format("nm")


def test_blocks_conform_on_every_processor(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight of the suite, each of its rows 2, 4, 8 or 16 times, and up to 3 rows more; none without non-zeros."""
    every = suite._weights

    def repeated(seed: int) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        for number, (case, weight, bias) in enumerate(every(seed)):
            times = (2, 4, 8, 16)[number % 4]
            tall = torch.cat((weight.repeat_interleave(times, dim=0), weight[:1].expand(number % min(times, 3), -1)))
            if weight.any() and times * len(weight) >= 2:
                yield case, tall, None if bias is None else torch.arange(len(tall)).to(weight.dtype)

    monkeypatch.setattr(suite, "_weights", repeated)
    check_format("block")


# -- what is packed how -------------------------------------------------------------------------------------------


@pytest.mark.skipif(host() is None or host().name not in PERMUTING, reason="no N:M kernels here")  # type: ignore[union-attr]
@pytest.mark.parametrize(
    ("n", "m", "found"),
    [(2, 4, (2, 4)), (1, 4, (1, 4)), (2, 8, (2, 8)), (4, 8, (4, 8)), (1, 8, (1, 8)), (3, 16, (3, 16)), (8, 16, (8, 16))],
)
def test_the_tightest_pattern_is_found(n: int, m: int, found: tuple[int, int]) -> None:
    score = torch.rand(40, 10 * m, generator=generator(0, "tightest", n, m))
    packed = matvec.pack_nm(score * parse(f"{n}:{m}").select(score, n / m))
    (part,) = packed.parts
    assert isinstance(part, Packed)
    assert (part.cut.n, part.cut.m) == found


def test_weights_that_are_not_nm_are_refused_by_their_first_group() -> None:
    weight = weights("nm", 16, 64)
    weight[5, 40:48] = 1
    weight[9, 0:16] = 1
    with pytest.raises(ModelError, match=r"columns 40 to 43 of row 5 keep 4 of 4: N:M needs N at most half of M"):
        matvec.pack_nm(weight)
    with pytest.raises(ModelError, match="format sell"):
        matvec.pack_nm(torch.ones(3, 20))
    three = torch.zeros(2, 8)
    three[0, 4:7] = 1  # 3 of 4, and 3 of 8
    assert torch.equal(matvec.unpack(matvec.pack_nm(three))[0], three)


@pytest.mark.parametrize("rows", [2, 4, 8, 16])
def test_blocks_are_found(rows: int) -> None:
    kept = torch.rand(48 // rows, 50, generator=generator(0, "blocks", rows)) < 0.2
    weight = kept.repeat_interleave(rows, dim=0).float() * torch.randn(48, 50, generator=generator(1, "blocks"))
    (part,) = matvec.pack_blocks(weight).parts
    assert part.rows == rows  # type: ignore[union-attr]
    assert part.multiplies == int((weight != 0).sum())


def test_weights_without_blocks_are_refused() -> None:
    for weight in (weights("sell", 64, 64, 0.1), torch.zeros(8, 8), torch.ones(1, 5)):
        with pytest.raises(ModelError, match=r"do not come in blocks of 2 or more rows of a column: use the format sell"):
            matvec.pack_blocks(weight)


@pytest.mark.parametrize("name", PACKS)
def test_misfits_are_refused(name: str) -> None:
    weight = weights(name, 16, 16)
    with pytest.raises(ModelError, match=r"cannot pack a weight of torch\.float64"):
        PACKS[name](weight.double())
    with pytest.raises(ModelError, match=r"there is no precision 'int4': choose from float32, bfloat16, int8"):
        PACKS[name](weight, None, "int4")
    with pytest.raises(ModelError, match="does not fit a weight"):
        PACKS[name](weight, torch.ones(3))
    spoilt = weight.clone()
    spoilt[4, int(weight[4].abs().argmax())] = torch.inf
    with pytest.raises(ModelError, match=r"row 4 has a weight of inf: int8 needs finite weights"):
        PACKS[name](spoilt, None, "int8")
    for x in (torch.ones(4, 3), torch.ones(16).double(), torch.tensor(1.0)):
        with pytest.raises(ModelError, match=r"give \(\.\.\., 16\) of torch\.float32"):
            formats.load(name).matmul(PACKS[name](weight), x)


# -- products -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PACKS)
def test_threads_rows_and_strides_change_no_bit(name: str, place: str) -> None:
    weight, x = weights(name, 512, 384), torch.randn(70, 384, generator=generator(0, "x"))
    packed = PACKS[name](weight, torch.randn(512, generator=generator(0, "b")))
    multiply = formats.load(name).matmul
    if place == "none":
        assert within(multiply(packed, x), weight, packed.bias, x)
        return
    y = multiply(packed, x)
    assert within(y, weight, packed.bias, x)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(multiply(packed, x), y)
        assert torch.equal(multiply(packed, x[:1]), y[:1])
    for count in (2, 5, 15, 16):
        assert torch.equal(multiply(packed, x[:count]), y[:count])
    assert torch.equal(multiply(packed, x.t().contiguous().t()), y)
    assert torch.equal(multiply(packed, x[3]), y[3])
    assert torch.equal(multiply(packed, x.reshape(7, 2, 5, 384)), y.reshape(7, 2, 5, 512))


@pytest.mark.parametrize("name", PACKS)
def test_a_zero_weight_skips_its_x(name: str, place: str) -> None:
    weight, bias = weights(name, 64, 128), torch.ones(64)
    weight[:, [0, 17, 127]] = 0
    packed, multiply = PACKS[name](weight, bias), formats.load(name).matmul
    x = torch.randn(3, 128, generator=generator(0, "x"))
    plain = multiply(packed, x)
    x[:, 0], x[1, 17], x[2, 127] = torch.inf, torch.nan, -torch.inf
    assert within(plain, weight, bias, torch.where(x.isfinite(), x, 0))
    assert torch.equal(multiply(packed, x), plain)


def test_a_zero_inside_a_block_does_not_skip_its_x() -> None:
    weight = torch.ones(32, 30)
    weight[3, 7] = 0
    x = torch.ones(1, 30)
    x[0, 7] = torch.inf
    y = matvec.multiply(matvec.pack_blocks(weight), x)
    assert y[0, 3].isnan() == (host() is not None)
    assert torch.isinf(torch.cat((y[0, :3], y[0, 4:]))).all()


@pytest.mark.parametrize("name", PACKS)
@pytest.mark.parametrize("kind", PRECISIONS)
def test_the_error_of_narrow_weights_is_that_of_rounding_and_of_summation(name: str, kind: Any, place: str) -> None:
    weight, bias = weights(name, 96, 160), torch.randn(96, generator=generator(0, "b"))
    x = torch.randn(5, 160, generator=generator(0, "x"))
    tested = formats.load(name)
    packed = PACKS[name](weight, bias, kind)
    y, stands = tested.matmul(packed, x), tested.unpack(packed)[0]
    assert within(y, stands, bias, x)
    dense = weight.numpy()
    scale = precision.scales(np.abs(dense).max(axis=1), kind)[:, None]
    off = torch.from_numpy(precision.error(dense, scale, kind)) * (weight != 0)
    assert bool(((stands - weight).abs() <= off).all())
    assert within(y, weight, bias, x, x.abs().double() @ off.double().t())
    assert bool(((weight == 0) <= (stands == 0)).all())
    assert torch.equal(stands, weight) == (kind == "float32")


@pytest.mark.parametrize("name", PACKS)
def test_fewer_bits_are_fewer_bytes(name: str) -> None:
    weight, tested = weights(name, 256, 256), formats.load(name)
    sizes = [tested.nbytes(PACKS[name](weight, None, kind)) for kind in PRECISIONS]
    assert sizes[0] > sizes[1] > sizes[2]
    kept = int((weight != 0).sum())
    assert sizes[0] - sizes[1] >= 2 * kept
    assert sizes[1] - sizes[2] >= kept


@pytest.mark.parametrize("name", PACKS)
def test_what_torch_may_hand_over(name: str) -> None:
    weight, multiply = weights(name, 32, 48), formats.load(name).matmul
    packed, x = PACKS[name](weight), torch.randn(2, 48, generator=generator(0, "x"))
    y = multiply(packed, x)
    for negated in (torch.complex(torch.zeros(2, 48), -x).conj().imag, torch._neg_view(-x)):
        assert negated.is_neg()
        assert torch.equal(multiply(packed, negated), y)
    assert not multiply(packed, x.clone().requires_grad_()).requires_grad
    with torch.inference_mode():
        assert torch.equal(multiply(packed, x.clone()), y)
    torch.set_default_dtype(torch.float64)
    try:
        assert multiply(packed, x).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    room = torch.zeros(97)
    room[1:] = x.reshape(-1)
    assert torch.equal(multiply(packed, room[1:].reshape(2, 48)), y)  # not on a cache line


@pytest.mark.parametrize("name", PACKS)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty_weights(name: str, shape: tuple[int, int], place: str) -> None:
    if name == "block":
        with pytest.raises(ModelError, match="do not come in blocks"):
            matvec.pack_blocks(torch.zeros(shape))
        return
    packed, tested = PACKS[name](torch.zeros(shape), torch.arange(shape[0]).float()), formats.load(name)
    for leading in ((), (0,), (3,), (2, 20)):
        y = tested.matmul(packed, torch.ones(*leading, shape[1]))
        assert torch.equal(y, torch.arange(shape[0]).float().expand(*leading, shape[0]))
    assert tested.unpack(packed)[0].shape == shape


# -- sharing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PACKS)
def test_copies_share_and_pickles_compute_the_same(name: str, place: str) -> None:
    packed, tested = PACKS[name](weights(name, 48, 64), torch.ones(48)), formats.load(name)
    x = torch.randn(3, 64, generator=generator(0, "x"))
    y = tested.matmul(packed, x)
    assert copy.deepcopy(packed) is packed
    back = pickle.loads(pickle.dumps(packed))
    assert torch.equal(tested.matmul(back, x), y)
    assert torch.equal(tested.unpack(back)[0], tested.unpack(packed)[0])


@pytest.mark.parametrize("name", PACKS)
@pytest.mark.parametrize("kind", PRECISIONS)
def test_weights_from_another_kind_of_machine_are_multiplied_by_torch(name: str, kind: Any) -> None:
    tested = formats.load(name)
    packed = PACKS[name](weights(name, 48, 64), torch.ones(48), kind)
    foreign = pickle.loads(pickle.dumps(dataclasses.replace(packed, target="of another make")))
    x = torch.randn(3, 64, generator=generator(0, "x"))
    assert within(tested.matmul(foreign, x), tested.unpack(packed)[0], packed.bias, x)


@pytest.mark.skipif(not targets(), reason="no kernels here")
@pytest.mark.parametrize("name", PACKS)
def test_eight_threads_share_one_weight(name: str) -> None:
    weight, multiply = weights(name, 200, 120), formats.load(name).matmul
    packed = PACKS[name](weight)
    inputs = [torch.randn(1 + number % 3, 120, generator=generator(number, "x")) for number in range(8)]
    expected = [multiply(packed, x) for x in inputs]
    wrong: list[int] = []
    together = threading.Barrier(8)

    def work(number: int) -> None:
        together.wait()
        wrong.extend(number for _ in range(100) if not torch.equal(multiply(packed, inputs[number]), expected[number]))

    workers = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
    assert packed._pool is not None
    assert len(packed._pool) <= 8


def test_gathering_is_for_processors_that_can() -> None:
    for name, target in targets().items():
        assert isinstance(matvec.gathers(target), bool)
        assert name in ("avx512", "avx2") or not matvec.gathers(target)


@pytest.mark.parametrize("gathering", [True, False])
def test_either_way_of_reading_x_gives_the_same_bits(gathering: bool, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = weights("sell", 150, 90, 0.02), torch.randn(2, 90, generator=generator(0, "x"))
    y = matvec.multiply(matvec.pack_rows(weight), x)
    monkeypatch.setattr(matvec, "_gathers", lambda target: gathering)
    assert torch.equal(matvec.multiply(matvec.pack_rows(weight), x), y)
