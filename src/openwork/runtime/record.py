"""A plan as plain data: found again for the same model on the same machine, written beside a saved model, never trusted.

What is read back only chooses between ways that all give the right result; a record that does not fit the model, was made
for other vector instructions, or is damaged is left aside and measured anew.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from openwork import atomic
from openwork.errors import ModelError, StoreError
from openwork.runtime.kernels import jit
from openwork.runtime.kernels.target import host, processor

VERSION = 3
_MOST = 16 * 2**20


@dataclass(frozen=True)
class Record:
    """What `accelerate` decided.

    Attributes:
        mode: "dense", "layers" (single layers replaced) or "graph" (whole stretches of the forward).
        formats: layer -> format, for the layers that are replaced one by one.
        ways: spot of a product in a graph -> (rows of a group, vectors of a tile, columns of a part).
        chains: modules whose linear layers run as one program.
        choices: rows of the table.
        dense_ms, ms: milliseconds of the dense model and of the one returned.
        threads: torch's threads when it was measured.
        note: why the model stays dense.
        example: shape, strides and dtype of the tensors of the example, in order.
        tree: how they are put together, in torch's words.
    """

    mode: str
    formats: dict[str, str] = field(default_factory=dict)
    ways: list[list[Any]] = field(default_factory=list)
    chains: list[str] = field(default_factory=list)
    choices: list[dict[str, Any]] = field(default_factory=list)
    dense_ms: float = 0.0
    ms: float = 0.0
    threads: int = 1
    note: str = ""
    example: list[list[Any]] = field(default_factory=list)
    tree: str = ""


def machine() -> dict[str, Any]:
    """Return what a record holds for: the processor, the vector instructions, and the versions of the code."""
    try:
        version = importlib.metadata.version("openwork")
    except importlib.metadata.PackageNotFoundError:  # run from its source, not installed
        version = ""
    target = host()
    return {
        "processor": processor(), "target": target.name if target else "none", "torch": torch.__version__,
        "openwork": version, "format": VERSION,
    }  # fmt: skip


def digest(model: nn.Module, example: Any, settings: Any) -> str:
    """Return what identifies a model's structure and tensors, the shapes of its example, the machine and the settings."""
    found = hashlib.blake2b(digest_size=24)
    found.update(json.dumps([machine(), settings, describe(example), tree(example), repr(model)], default=str).encode())
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor) or tensor.device.type != "cpu" or tensor.layout != torch.strided:
            found.update(f"{name}:{type(tensor).__name__}".encode())
            continue
        found.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}".encode())
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def describe(example: Any) -> list[list[Any]]:
    """Return shape, strides and dtype of every tensor of an example."""
    leaves, _ = pytree.tree_flatten(example)
    return [
        [list(leaf.shape), list(leaf.stride()), str(leaf.dtype)] if isinstance(leaf, Tensor) else [type(leaf).__name__]
        for leaf in leaves
    ]


def tree(example: Any) -> str:
    """Return how the tensors of an example are put together; empty if that cannot be written."""
    try:
        return pytree.treespec_dumps(pytree.tree_structure(example))
    except (NotImplementedError, ValueError, TypeError):
        return ""


def example_of(saved: Any) -> Any:
    """Return an example of zeros of the kind that a saved record describes.

    Raises:
        ModelError: if it describes none, or one that is too large to be true.
    """
    try:
        words = saved["record"]
        leaves = []
        for shape, strides, name in words["example"]:
            dtype = getattr(torch, str(name).removeprefix("torch."))
            if (
                not isinstance(dtype, torch.dtype)
                or math.prod(shape) > _MOST
                or any(size < 0 for size in (*shape, *strides))
            ):
                raise ValueError(f"a tensor {name} of shape {shape}")
            length = 1 + sum((size - 1) * step for size, step in zip(shape, strides, strict=True) if size)
            if length > _MOST:
                raise ValueError(f"strides {strides}")
            leaves.append(torch.zeros(length, dtype=dtype).as_strided(shape, strides))
        return pytree.tree_unflatten(leaves, pytree.treespec_loads(words["tree"]))
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, RecursionError, NotImplementedError) as error:
        raise ModelError(
            f"the plan in this file says no example to run the model on ({error}): load it with plan=False and accelerate it"
        ) from error


def find(key: str) -> Record | None:
    """Return the record that was kept under `key`, None if there is none or its file is not what was written."""
    try:
        place = _place(key)
        if place.stat().st_size > _MOST:
            return None
        found = json.loads(place.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return read(found, key) if isinstance(found, dict) else None


def keep(key: str, record: Record) -> None:
    """Keep a record for the next time; a folder that cannot be written costs time only."""
    try:
        atomic.write_json(_place(key), write(record, key))
    except (StoreError, OSError):
        return


def write(record: Record, key: str = "") -> dict[str, Any]:
    """Return a record as JSON-clean data with the machine it holds for and a digest."""
    body = {"record": dict(record.__dict__), "machine": machine(), "key": key}
    return body | {"digest": _digest(body)}


def read(found: Mapping[str, Any], key: str = "") -> Record | None:
    """Return the record in JSON data; None if it is damaged, for another key, or of another machine."""
    try:
        body = {word: found[word] for word in ("record", "machine", "key")}
        if found["digest"] != _digest(body) or body["machine"] != machine() or body["key"] != key:
            return None
        return Record(**body["record"])
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return None


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _place(key: str) -> Path:
    return jit.folder().parent / "plans" / f"{key}.json"
