"""LiteRT with sparse weights: its sparse fully connected kernel, and XNNPACK's sparse inference for networks.

XNNPACK runs a network sparse (1x1 convolutions with at least two thirds zeros, from an entry convolution to a global
mean) where its kernels are faster than its dense ones: on ARM, and on x86 without AVX. On x86 with AVX it runs the same
file dense, and says so in its source only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from openwork.bench.peers import _convert, _tflite

ABOUT = "LiteRT, sparse weights (XNNPACK runs them dense on x86 with AVX)"
DENSE, APART = False, True
NEEDS = ("ai_edge_litert", "flatbuffers")


def operator(weight: Tensor, bias: Tensor | None, x: Tensor) -> Callable[[], Tensor]:
    """Return the product by the sparse fully connected kernel of the interpreter.

    Raises:
        Unavailable: without ai-edge-litert.
    """
    model = _tflite.product(weight, bias, x.shape[1], sparse=True)
    return _tflite.interpreted(model, x.t().contiguous(), lambda y: y.t())


def network(model: nn.Module, example: Any) -> Callable[[], Tensor]:
    """Return the converted network, sparse weights stored as compressed rows.

    Raises:
        Unavailable: without ai-edge-litert, or if the network cannot be converted.
    """
    made = _convert.convert(model, example, sparse=True)
    return _tflite.interpreted(made, _convert.laid(example), _convert.reader())
