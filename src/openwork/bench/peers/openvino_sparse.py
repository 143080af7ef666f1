"""OpenVINO asked to decompress sparse weights, for layers of at least half zeros.

The plugin does so for 8-bit weights on processors with AMX; float32 weights run as without it. It stands here so that
the table shows it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from openwork.bench.peers import _ov

ABOUT = "OpenVINO, sparse weights decompression"
DENSE, APART = False, True
NEEDS = ("onnx", "openvino")
_PROPERTIES = {"CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": 0.5}


def operator(weight: Tensor, bias: Tensor | None, x: Tensor) -> Callable[[], Tensor]:
    """Return the product in the ONNX form that is the fastest here.

    Raises:
        Unavailable: without onnx and openvino.
    """
    return _ov.operator(weight, bias, x, _PROPERTIES)


def network(model: nn.Module, example: Any) -> Callable[[], Tensor]:
    """Return the exported network; its first output.

    Raises:
        Unavailable: without onnx, onnxscript and openvino, or if the model cannot be exported.
    """
    return _ov.network(model, example, _PROPERTIES)
