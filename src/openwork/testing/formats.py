"""`check_format`: the conformance suite of a runtime format. Run it in the tests of a format of your own."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from openwork.core.rng import generator
from openwork.runtime import formats
from openwork.runtime.bounds import bound
from openwork.runtime.formats import Format

SHAPES = ((1, 1), (1, 7), (5, 1), (8, 16), (33, 65), (64, 31), (4, 300))
DENSITIES = (0.0, 0.05, 0.5, 1.0)
DTYPES = (torch.float32, torch.float64)


def check_format(format: str | Format, *, seed: int = 0) -> None:
    """Check that a format holds weights exactly and multiplies within the stated bound (`runtime.bounds.bound`).

    Covered: float32 and float64; densities 0 to 1; zero rows and columns; with and without bias; inputs of one, two and
    three dimensions, empty batches, and strides of every kind; weights that are a transposed view; inputs left as they
    were; a deepcopy that computes the same.

    Args:
        format: the name of one of openwork's formats, or an object (a module will do) with the functions of
            `openwork.runtime.formats.Format`.
        seed: of the weights and inputs.

    Raises:
        AssertionError: names the case and what was wrong.
    """
    tested = formats.load(format) if isinstance(format, str) else format
    for case, weight, bias in _weights(seed):
        packed = tested.pack(weight, bias)
        _check_round_trip(tested, packed, case, weight, bias)
        for kind, x in _inputs(seed, weight.shape[1], weight.dtype):
            _check_product(tested, packed, f"{case}, x {kind}", weight, bias, x)


def _weights(seed: int) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    for shape in SHAPES:
        for density in DENSITIES:
            for dtype in DTYPES:
                draw = generator(seed, "check_format", *shape, str(density), str(dtype))
                weight = torch.randn(shape, generator=draw, dtype=dtype)
                weight[torch.rand(shape, generator=draw) >= density] = 0
                bias = torch.randn(shape[0], generator=draw, dtype=dtype)
                case = f"weight {shape[0]}x{shape[1]} {str(dtype).removeprefix('torch.')} at density {density}"
                yield case, weight, bias
                yield f"{case} without bias", weight, None
                yield f"{case}, transposed view", weight.t().contiguous().t(), bias
                if density == 0.5:
                    hollow = weight.clone()
                    hollow[::2] = 0
                    hollow[:, 1::3] = 0
                    yield f"{case}, zero rows and columns", hollow, bias


def _inputs(seed: int, columns: int, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    draw = generator(seed, "check_format", "x", columns)
    yield "of one dimension", torch.randn(columns, generator=draw, dtype=dtype)
    yield "of one row", torch.randn(1, columns, generator=draw, dtype=dtype)
    yield "of 17 rows", torch.randn(17, columns, generator=draw, dtype=dtype)
    yield "of three dimensions", torch.randn(2, 3, columns, generator=draw, dtype=dtype)
    yield "of batch 0", torch.empty(0, columns, dtype=dtype)
    yield "of shape (2, 0, in)", torch.empty(2, 0, columns, dtype=dtype)
    yield "transposed", torch.randn(columns, 9, generator=draw, dtype=dtype).t()
    yield "every second entry", torch.randn(5, 2 * columns, generator=draw, dtype=dtype)[:, ::2]
    yield "expanded", torch.randn(1, columns, generator=draw, dtype=dtype).expand(4, columns)


def _check_round_trip(tested: Format, packed: object, case: str, weight: Tensor, bias: Tensor | None) -> None:
    back, back_bias = tested.unpack(packed)
    _require(back.shape == weight.shape and back.dtype == weight.dtype, case, "unpack changes shape or dtype")
    _require(torch.equal(back, weight), case, "unpack does not return the weight exactly")
    _require((bias is None) == (back_bias is None), case, "unpack adds or loses the bias")
    if bias is not None and back_bias is not None:
        _require(torch.equal(back_bias, bias), case, "unpack does not return the bias exactly")
    least = int((weight != 0).sum()) * weight.element_size()
    _require(tested.nbytes(packed) >= least, case, f"nbytes is below the {least} bytes of the non-zero values")


def _check_product(tested: Format, packed: object, case: str, weight: Tensor, bias: Tensor | None, x: Tensor) -> None:
    before = x.clone()
    expected = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    allowed = bound(weight, bias, x)
    for copied in (packed, packed, copy.deepcopy(packed)):
        y = tested.matmul(copied, x)
        _require(y.shape == expected.shape, case, f"the product has shape {tuple(y.shape)}, not {tuple(expected.shape)}")
        _require(y.dtype == x.dtype, case, f"the product has dtype {y.dtype}, not {x.dtype}")
        _require(bool(((y.double() - expected).abs() <= allowed).all()), case, "the product is outside the bound")
        _require(torch.equal(x, before), case, "the product changes its input")
        y.fill_(torch.nan)  # a product that shares memory with the packed weight spoils the next one


def _require(holds: bool, case: str, problem: str) -> None:
    if not holds:
        raise AssertionError(f"{case}: {problem}")
