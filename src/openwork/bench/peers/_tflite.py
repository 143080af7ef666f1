"""Flat buffers for LiteRT, written with the schema that its package brings: operators one by one, weights dense or sparse.

A sparse weight is stored as compressed rows (the schema's traversal order with the last dimension SPARSE_CSR). The
interpreter's own FULLY_CONNECTED multiplies with it as it is; before a convolution a DENSIFY stands, by which the
XNNPACK delegate knows that it should look for sparse inference.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openwork.bench.peers import package

INSTALL = "ai-edge-litert backports.strenum flatbuffers"


class Writer:
    """One model under construction; tensors are numbers, images are (batch, height, width, channels)."""

    def __init__(self) -> None:
        self.schema: Any = package("ai_edge_litert.schema_py_generated", INSTALL)
        self.model, self.graph = self.schema.ModelT(), self.schema.SubGraphT()
        self.model.version, self.model.buffers, self.model.operatorCodes = 3, [self.schema.BufferT()], []
        self.graph.tensors, self.graph.operators, self.graph.name = [], [], b"main"
        self._codes: dict[tuple[int, int], int] = {}
        self.shapes: list[tuple[int, ...]] = []

    def tensor(self, shape: Sequence[int], data: Any = None, sparsity: Any = None) -> int:
        """Add a tensor, a constant where `data` (float32 or int32) is given."""
        one = self.schema.TensorT()
        one.shape, one.name, one.buffer, one.sparsity = list(shape), f"t{len(self.shapes)}".encode(), 0, sparsity
        is_whole = data is not None and data.dtype == np.int32
        one.type = self.schema.TensorType.INT32 if is_whole else self.schema.TensorType.FLOAT32
        if data is not None:
            buffer = self.schema.BufferT()
            buffer.data = np.frombuffer(np.ascontiguousarray(data).tobytes(), np.uint8)
            self.model.buffers.append(buffer)
            one.buffer = len(self.model.buffers) - 1
        self.graph.tensors.append(one)
        self.shapes.append(tuple(shape))
        return len(self.shapes) - 1

    def sparse(self, weight: Tensor) -> int:
        """Add a constant of any dimensions whose last one is stored as compressed rows."""
        rows = weight.detach().reshape(-1, weight.shape[-1]).contiguous().numpy()
        kept, schema = rows != 0, self.schema
        dims = []
        for size in weight.shape[:-1]:
            dim = schema.DimensionMetadataT()
            dim.format, dim.denseSize = schema.DimensionType.DENSE, size
            dims.append(dim)
        dim = schema.DimensionMetadataT()
        dim.format = schema.DimensionType.SPARSE_CSR
        dim.arraySegmentsType = dim.arrayIndicesType = schema.SparseIndexVector.Int32Vector
        dim.arraySegments, dim.arrayIndices = schema.Int32VectorT(), schema.Int32VectorT()
        dim.arraySegments.values = np.concatenate([[0], np.cumsum(kept.sum(1))]).astype(np.int32)
        dim.arrayIndices.values = np.nonzero(kept)[1].astype(np.int32)
        found = schema.SparsityParametersT()
        found.traversalOrder = np.arange(weight.dim(), dtype=np.int32)
        found.blockMap, found.dimMetadata = np.zeros(0, np.int32), [*dims, dim]
        return self.tensor(weight.shape, rows[kept], found)

    def densified(self, weight: Tensor) -> int:
        """Add a sparse constant and the DENSIFY after it."""
        stored, wide = self.sparse(weight), self.tensor(weight.shape)
        self.operator("DENSIFY", [stored], wide, "Densify")
        return wide

    def operator(
        self, name: str, inputs: Sequence[int], output: int, kind: str = "", version: int = 1, **options: Any
    ) -> int:
        """Add an operator with the fields of its options and return `output`."""
        code = getattr(self.schema.BuiltinOperator, name)
        if (code, version) not in self._codes:
            entry = self.schema.OperatorCodeT()
            entry.builtinCode, entry.deprecatedBuiltinCode, entry.version = code, min(code, 127), version
            self._codes[code, version] = len(self.model.operatorCodes)
            self.model.operatorCodes.append(entry)
        one = self.schema.OperatorT()
        one.opcodeIndex, one.inputs, one.outputs = self._codes[code, version], list(inputs), [output]
        if kind:
            one.builtinOptionsType = getattr(self.schema.BuiltinOptions, f"{kind}Options")
            one.builtinOptions = getattr(self.schema, f"{kind}OptionsT")()
            for field, value in options.items():
                setattr(one.builtinOptions, field, value)
        self.graph.operators.append(one)
        return output

    def finish(self, inputs: Sequence[int], outputs: Sequence[int]) -> bytes:
        """Return the file's bytes."""
        self.graph.inputs, self.graph.outputs, self.model.subgraphs = list(inputs), list(outputs), [self.graph]
        builder = package("flatbuffers").Builder(1024)
        builder.Finish(self.model.Pack(builder), file_identifier=b"TFL3")
        return bytes(builder.Output())


def product(weight: Tensor, bias: Tensor | None, columns: int, *, sparse: bool) -> bytes:
    """Return a model of one FULLY_CONNECTED: x (columns, in) -> (columns, out)."""
    made, (out, size) = Writer(), weight.shape
    x, y = made.tensor((columns, size)), made.tensor((columns, out))
    kernel = made.sparse(weight) if sparse else made.tensor(weight.shape, weight.numpy())
    added = made.tensor((out,), np.zeros(out, np.float32) if bias is None else bias.numpy())
    made.operator("FULLY_CONNECTED", [x, kernel, added], y, "FullyConnected", version=8 if sparse else 1)
    return made.finish([x], [y])


def interpreted(model: bytes, x: Tensor, read: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    """Return the model's run on x; its result is the interpreter's own memory, which the next run overwrites."""
    interpreter = package("ai_edge_litert.interpreter", INSTALL).Interpreter(
        model_content=model, num_threads=torch.get_num_threads()
    )
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x.numpy())
    interpreter.invoke()
    y = read(_memory(interpreter.tensor(interpreter.get_output_details()[0]["index"])()))

    def call() -> Tensor:
        interpreter.invoke()
        return y

    call.__dict__["held"] = model
    return call


def _memory(array: Any) -> Tensor:
    """Return the memory of a float32 array without a reference to the array, which the interpreter would refuse."""
    numbers = (ctypes.c_float * array.size).from_address(array.ctypes.data)
    return torch.from_numpy(np.ctypeslib.as_array(numbers).reshape(array.shape))
