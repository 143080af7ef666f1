"""DeepSparse (Neural Magic): an engine for sparse ONNX models, closed source, at its end since June 2025.

Release 1.9 refuses to install and 1.8 needs numpy < 2 and Python < 3.12; under numpy 2 it has been seen to load and give
wrong numbers, so its output is checked like every peer's before any time of it is shown.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openwork.bench.peers import Unavailable, package
from openwork.bench.peers._onnx import exported, forms, inputs
from openwork.bench.peers._pick import fastest

ABOUT = "DeepSparse"
DENSE, APART = False, True
NEEDS = ("deepsparse", "onnx")
_REMEDY = (
    "deepsparse is not installed: it was discontinued in June 2025; 1.9 refuses to install and 1.8 needs numpy < 2 and "
    "Python < 3.12, so it cannot share an environment with openwork, which needs numpy 2"
)


def operator(weight: Tensor, bias: Tensor | None, x: Tensor) -> Callable[[], Tensor]:
    """Return the product in the ONNX form that is the fastest here.

    Raises:
        Unavailable: without deepsparse.
    """
    _engine_class()
    return fastest({form.name: _call(form.model, [form.x], form.read) for form in forms(weight, bias, x)})


def network(model: nn.Module, example: Any) -> Callable[[], Tensor]:
    """Return the exported network; its first output.

    Raises:
        Unavailable: without deepsparse, or if the model cannot be exported.
    """
    _engine_class()
    return _call(exported(model, example), inputs(example), lambda found: found)


def _engine_class() -> Any:
    try:
        return package("deepsparse").Engine
    except (Unavailable, AttributeError) as error:
        raise Unavailable(_REMEDY) from error


def _call(model: bytes, given: list[Tensor], read: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(model)
        engine = _engine_class()(model=str(path), batch_size=1, num_cores=torch.get_num_threads())
    arrays = [tensor.numpy() for tensor in given]
    return lambda: read(torch.from_numpy(engine.run(arrays)[0]))
