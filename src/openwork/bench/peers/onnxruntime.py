"""onnxruntime's CPU provider, inputs and outputs bound beforehand. It does not use zeros."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from openwork.bench.peers import package
from openwork.bench.peers._onnx import exported, forms, inputs
from openwork.bench.peers._pick import fastest

ABOUT = "onnxruntime"
DENSE, APART = False, True
NEEDS = ("onnx", "onnxruntime")


def operator(weight: Tensor, bias: Tensor | None, x: Tensor) -> Callable[[], Tensor]:
    """Return the product in the ONNX form that is the fastest here.

    Raises:
        Unavailable: without onnx and onnxruntime.
    """
    calls: dict[str, Callable[[], Tensor]] = {}
    for form in forms(weight, bias, x):
        y = torch.empty(form.shape)
        calls[form.name] = _bound(_session(form.model), [form.x], y, form.read)
    return fastest(calls)


def network(model: nn.Module, example: Any) -> Callable[[], Tensor]:
    """Return the exported network; its first output.

    Raises:
        Unavailable: without onnx, onnxscript and onnxruntime, or if the model cannot be exported.
    """
    session, given = _session(exported(model, example)), inputs(example)
    feed = {one.name: tensor.numpy() for one, tensor in zip(session.get_inputs(), given, strict=True)}
    y = torch.from_numpy(session.run(None, feed)[0])
    return _bound(session, given, y, lambda found: found)


def _session(model: bytes) -> Any:
    runtime = package("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _bound(session: Any, given: list[Tensor], y: Tensor, read: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    binding, out = session.io_binding(), y.clone()
    for one, tensor in zip(session.get_inputs(), given, strict=True):
        kind = tensor.numpy().dtype.type
        binding.bind_input(one.name, "cpu", 0, kind, list(tensor.shape), tensor.data_ptr())
    binding.bind_output(session.get_outputs()[0].name, "cpu", 0, out.numpy().dtype.type, list(out.shape), out.data_ptr())

    def call() -> Tensor:
        session.run_with_iobinding(binding)
        return read(out)

    call.__dict__["held"] = given  # the binding knows addresses only
    return call
