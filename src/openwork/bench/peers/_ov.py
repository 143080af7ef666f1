"""OpenVINO's CPU plugin, for the two peers that differ in one property."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from openwork.bench.peers import package
from openwork.bench.peers._onnx import exported, forms, inputs
from openwork.bench.peers._pick import fastest


def operator(weight: Tensor, bias: Tensor | None, x: Tensor, properties: Mapping[str, Any]) -> Callable[[], Tensor]:
    """Return the product in the form that is the fastest here."""
    calls = {
        form.name: _call(_compiled(form.model, properties), [form.x], torch.empty(form.shape), form.read)
        for form in forms(weight, bias, x)
    }
    return fastest(calls)


def network(model: nn.Module, example: Any, properties: Mapping[str, Any]) -> Callable[[], Tensor]:
    """Return the exported network; its first output."""
    compiled, given = _compiled(exported(model, example), properties), inputs(example)
    request = compiled.create_infer_request()
    request.infer([tensor.numpy() for tensor in given])
    y = torch.from_numpy(request.get_output_tensor(0).data.copy())
    return _call(compiled, given, y, lambda found: found)


def _compiled(model: bytes, properties: Mapping[str, Any]) -> Any:
    core = package("openvino").Core()
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "ENABLE_CPU_PINNING": False,  # pinned, it waits where another process has its core
        **properties,
    }
    return core.compile_model(core.read_model(model), "CPU", settings)


def _call(compiled: Any, given: list[Tensor], y: Tensor, read: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    openvino, request, out = package("openvino"), compiled.create_infer_request(), y.clone()
    for place, tensor in enumerate(given):
        request.set_input_tensor(place, openvino.Tensor(tensor.numpy(), shared_memory=True))
    request.set_output_tensor(0, openvino.Tensor(out.numpy(), shared_memory=True))

    def call() -> Tensor:
        request.infer()
        return read(out)

    call.__dict__["held"] = given
    return call
