"""ONNX models for the peers that read them: one operator in several equal forms, or a network exported by torch."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from openwork.bench.peers import Unavailable, package
from openwork.bench.peers._planes import sides

OPSET = 17
IR_VERSION = 9


@dataclass(frozen=True)
class Form:
    """One way to write the product.

    Attributes:
        name: `matmul`, `gemm` or `conv`.
        model: the ONNX model as bytes, with one input `x` and one output `y`.
        x: the activations as the model takes them.
        shape: of the model's output.
        read: turns that output into (out, columns), without a copy.
    """

    name: str
    model: bytes
    x: Tensor
    shape: tuple[int, ...]
    read: Callable[[Tensor], Tensor]


def forms(weight: Tensor, bias: Tensor | None, x: Tensor) -> list[Form]:
    """Return the product as a matrix product, as a Gemm on tokens and as a 1x1 convolution.

    Raises:
        Unavailable: without the package onnx.
    """
    helper = package("onnx").helper
    (out, size), columns = weight.shape, x.shape[1]
    high, wide = sides(columns)
    named = {} if bias is None else {"b": bias}
    matmul = [helper.make_node("MatMul", ["w", "x"], ["y" if bias is None else "p"])]
    if bias is not None:
        matmul.append(helper.make_node("Add", ["p", "c"], ["y"]))
    gemm = helper.make_node("Gemm", ["x", "w", *named], ["y"], transB=1)
    conv = helper.make_node("Conv", ["x", "w", *named], ["y"], kernel_shape=[1, 1])
    added = {} if bias is None else {"c": bias[:, None]}
    image = x.reshape(1, size, high, wide)
    return [
        Form("matmul", _model(matmul, {"w": weight, **added}, x.shape, (out, columns)), x, (out, columns), lambda y: y),
        Form("gemm", _model([gemm], {"w": weight, **named}, (columns, size), (columns, out)), x.t().contiguous(),
             (columns, out), lambda y: y.t()),
        Form("conv", _model([conv], {"w": weight[:, :, None, None], **named}, image.shape, (1, out, high, wide)), image,
             (1, out, high, wide), lambda y: y.reshape(out, columns)),
    ]  # fmt: skip


def exported(model: nn.Module, example: Any) -> bytes:
    """Return the network as an ONNX model, exported by torch for the shape of the example.

    Raises:
        Unavailable: without onnx and onnxscript, or if torch cannot export the model.
    """
    package("onnx")
    package("onnxscript")
    given = (example,) if isinstance(example, Tensor) else tuple(example) if isinstance(example, (tuple, list)) else ()
    keywords = dict(example) if isinstance(example, Mapping) else None
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(model, given, kwargs=keywords, dynamo=True, verbose=False)
    except Exception as error:  # the exporter's own, of many kinds
        reason = " ".join(str(error).split())[:200]
        raise Unavailable(f"torch cannot export this model to ONNX ({type(error).__name__}: {reason})") from error
    assert program is not None
    return bytes(program.model_proto.SerializeToString())


def inputs(example: Any) -> list[Tensor]:
    """Return the tensors of an example in the order in which the exported model takes them."""
    values = (
        [example] if isinstance(example, Tensor) else list(example.values() if isinstance(example, Mapping) else example)
    )
    return [value.detach().contiguous() for value in values]


def _model(nodes: Any, weights: Mapping[str, Tensor], x: Any, y: Any) -> bytes:
    onnx = package("onnx")
    helper, number = onnx.helper, onnx.TensorProto.FLOAT
    made = helper.make_graph(
        list(nodes), "product",
        [helper.make_tensor_value_info("x", number, list(x))],
        [helper.make_tensor_value_info("y", number, list(y))],
        [onnx.numpy_helper.from_array(value.contiguous().numpy(), name) for name, value in weights.items()],
    )  # fmt: skip
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)])
    model.ir_version = IR_VERSION
    return bytes(model.SerializeToString())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's chatter and warnings off the terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
