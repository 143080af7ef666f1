"""LiteRT (formerly TensorFlow Lite) with the XNNPACK delegate, weights dense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from openwork.bench.peers import _convert, _tflite

ABOUT = "LiteRT with XNNPACK"
DENSE, APART = False, True
NEEDS = ("ai_edge_litert", "flatbuffers")


def operator(weight: Tensor, bias: Tensor | None, x: Tensor) -> Callable[[], Tensor]:
    """Return the product as a fully connected layer on (columns, in).

    Raises:
        Unavailable: without ai-edge-litert.
    """
    model = _tflite.product(weight, bias, x.shape[1], sparse=False)
    return _tflite.interpreted(model, x.t().contiguous(), lambda y: y.t())


def network(model: nn.Module, example: Any) -> Callable[[], Tensor]:
    """Return the converted network.

    Raises:
        Unavailable: without ai-edge-litert, or if the network cannot be converted.
    """
    made = _convert.convert(model, example, sparse=False)
    return _tflite.interpreted(made, _convert.laid(example), _convert.reader())
