from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openwork.core.rng import generator
from openwork.errors import FormatError
from openwork.runtime import packing
from openwork.runtime.packing import DTYPES, ENCODINGS, ESCAPE, Packed, entries, pack, unpack

SHAPES = st.lists(st.integers(0, 9), max_size=4).map(tuple) | st.sampled_from([(), (1,), (2000,), (31, 67)])
DENSITIES = st.sampled_from([0.0, 0.003, 0.05, 0.1, 0.5, 0.9, 1.0])


def bits_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def random_bits(dtype: torch.dtype, shape: tuple[int, ...], density: float, seed: int) -> torch.Tensor:
    """Any bit pattern there is: NaN payloads, infinities, denormals; -0.0 is frequent."""
    draw = generator(seed, "packing")
    total = math.prod(shape)
    high = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, high, (total, dtype.itemsize), generator=draw, dtype=torch.uint8)
    raw[torch.rand(total, generator=draw) >= density] = 0
    if dtype != torch.bool:
        raw[torch.rand(total, generator=draw) < 0.1 * density] = torch.tensor([0] * (dtype.itemsize - 1) + [128]).byte()
    return raw.reshape(-1).view(dtype).reshape(shape)


@settings(deadline=None, max_examples=300, derandomize=True)
@given(st.sampled_from(sorted(DTYPES)), SHAPES, DENSITIES, st.integers(0, 2**32))
def test_every_bit_survives_in_every_encoding(name: str, shape: tuple[int, ...], density: float, seed: int) -> None:
    tensor = random_bits(DTYPES[name], shape, density, seed)
    sizes = {}
    for encoding in ENCODINGS:
        packed = pack(tensor, encoding)
        back = unpack(packed)
        assert (back.dtype, back.shape, bits_of(back)) == (tensor.dtype, tensor.shape, bits_of(tensor))
        assert packed.encoding in (encoding, encoding.removesuffix("+signs"))
        sizes[encoding] = packed.nbytes
    best = pack(tensor)
    assert bits_of(unpack(best)) == bits_of(tensor)
    assert best.nbytes == min(sizes.values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_special_numbers_survive(dtype: torch.dtype) -> None:
    tensor = torch.tensor([0.0, -0.0, math.nan, math.inf, -math.inf, torch.finfo(dtype).tiny, 1.5] + [0.0] * 500)
    back = unpack(pack(tensor.to(dtype)))
    assert bits_of(back) == bits_of(tensor.to(dtype))
    assert math.copysign(1, back[1].item()) == -1


def test_gap_bytes_by_hand() -> None:
    tensor = torch.zeros(1000, dtype=torch.uint8)
    tensor[[0, 2, 257, 258 + 255]] = torch.tensor([7, 8, 9, 10], dtype=torch.uint8)
    packed = pack(tensor, "gaps")
    # 0 zeros, 1 zero, 254 zeros, 255 zeros (an escape and 0), and 486 zeros to the end (one escape; 231 are implied)
    assert packed.index.tolist() == [0, 1, 254, 255, 0, 255]
    assert packed.values.tolist() == [7, 8, 9, 10]
    assert torch.equal(unpack(packed), tensor)


def test_sizes_follow_from_the_density() -> None:
    total, kept = 80_000, 4_000
    tensor = torch.zeros(total)
    tensor[torch.randperm(total, generator=generator(0, "x"))[:kept]] = 1.0
    assert pack(tensor, "dense").nbytes == 4 * total
    assert pack(tensor, "bits").nbytes == 4 * kept + total // 8
    assert pack(tensor, "gaps").nbytes <= 5 * kept + total // ESCAPE
    assert pack(tensor).nbytes <= 0.066 * 4 * total
    assert pack(-tensor).nbytes <= 0.066 * 4 * total + total // 8  # 76,000 negative zeros cost a bit each


def test_a_byte_never_stands_for_more_than_255_entries() -> None:
    packed = pack(torch.zeros(1_000_000))
    assert 1_000_000 - ESCAPE < packed.nbytes * ESCAPE <= 1_000_000


def test_views_and_gradients_are_packed_as_they_read() -> None:
    base = torch.randn(6, 8, generator=generator(0, "v"), requires_grad=True)
    for view in (base.t(), base[::2, 1::3], base[0, 0], base.expand(2, 6, 8)):
        assert torch.equal(unpack(pack(view)), view.detach())
    z = torch.randn(3, dtype=torch.complex64, generator=generator(0, "c"))
    assert torch.equal(unpack(pack(z.conj())), z.conj().resolve_conj())


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(2, dtype=torch.complex128), torch.eye(2).to_sparse(), torch.empty(2, device="meta")],
    ids=["complex128", "sparse", "meta"],
)
def test_what_cannot_be_stored_is_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(FormatError, match="ordinary dense tensor"):
        pack(tensor)


def test_an_unknown_encoding_is_refused() -> None:
    with pytest.raises(FormatError, match="there is no encoding 'zip'"):
        pack(torch.zeros(2), "zip")


@pytest.mark.parametrize("shape", [(10**12,), (2**40, 2**40), (2**63,), (-1,), (1,) * 65, (0, 10**30)])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_shapes_that_the_bytes_cannot_hold_are_refused_before_allocation(shape: tuple[int, ...], encoding: str) -> None:
    claimed = Packed(encoding, torch.float32, shape, np.zeros(8, np.uint8), np.full(100, 255, np.uint8))
    with pytest.raises(FormatError):
        unpack(claimed)


def test_entries_multiplies_without_overflow() -> None:
    assert entries(()) == 1
    assert entries((3, 0, 5)) == 0
    assert entries((2**30, 2**29)) == 2**59
    with pytest.raises(FormatError, match="cannot exist"):
        entries((2**31, 2**31))


@settings(deadline=None, max_examples=300, derandomize=True)
@given(st.integers(0, 2**32), st.sampled_from(ENCODINGS), st.integers(0, 60), st.binary(max_size=60))
def test_foreign_bytes_give_an_error_or_a_tensor_of_the_declared_shape(
    seed: int, encoding: str, total: int, index: bytes
) -> None:
    values = np.frombuffer(index[: seed % 40], np.uint8)
    claimed = Packed(encoding, torch.int16, (total,), values, np.frombuffer(index, np.uint8))
    with contextlib.suppress(FormatError):
        assert unpack(claimed).shape == (total,)


def test_names_are_those_of_safetensors() -> None:
    from safetensors.torch import _TYPES

    assert {name: _TYPES[name] for name in DTYPES} == DTYPES
    assert packing.NAMES[torch.bfloat16] == "BF16"
