"""OpenVINO's CPU plugin in float32, one stream. It does not use zeros."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from openwork.bench.peers import _ov

ABOUT = "OpenVINO"
DENSE, APART = False, True
NEEDS = ("onnx", "openvino")


def operator(weight: Tensor, bias: Tensor | None, x: Tensor) -> Callable[[], Tensor]:
    """Return the product in the ONNX form that is the fastest here.

    Raises:
        Unavailable: without onnx and openvino.
    """
    return _ov.operator(weight, bias, x, {})


def network(model: nn.Module, example: Any) -> Callable[[], Tensor]:
    """Return the exported network; its first output.

    Raises:
        Unavailable: without onnx, onnxscript and openvino, or if the model cannot be exported.
    """
    return _ov.network(model, example, {})
