"""The whole state of a training run as one set of tensors and one JSON document, and back, bit for bit."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from openwork.errors import FormatError, StoreError
from openwork.train.divergence import check_parameters

if TYPE_CHECKING:
    from openwork.sparsifier.sparsifier import Sparsifier


@dataclass(frozen=True)
class Snapshot:
    """A training run after `step` optimizer steps.

    Attributes:
        step: optimizer steps taken.
        tensors: parameters, buffers, optimizer and sparsifier tensors, contiguous copies on the CPU.
        manifest: everything that is not a tensor, as JSON values.
    """

    step: int
    tensors: dict[str, Tensor]
    manifest: dict[str, Any]


def capture(
    model: nn.Module,
    optimizer: Optimizer,
    sparsifier: Sparsifier | None,
    step: int,
    extra: Mapping[str, Any] | None = None,
) -> Snapshot:
    """Return a copy of the state of training after `step` steps; `extra` is JSON kept along with it.

    Random generators are not part of it: every draw is a function of seed and step.

    Raises:
        DivergedError: if a parameter is not finite: such a state is never kept.
        StoreError: if the optimizer or sparsifier holds something that is neither tensor nor plain value.
    """
    check_parameters(model, step)
    tensors: dict[str, Tensor] = {}
    for key, tensor in _model_tensors(model).items():
        tensors[key] = _copy(tensor)
    manifest = {
        "step": step,
        "optimizer": _optimizer_state(optimizer, tensors),
        "sparsifier": None
        if sparsifier is None
        else {
            "kind": type(sparsifier).__name__,
            "state": pack(dict(sparsifier.state_dict()), "sparsifier", tensors),
        },
        "extra": dict(extra or {}),
    }
    return Snapshot(step, tensors, manifest)


def restore(snapshot: Snapshot, model: nn.Module, optimizer: Optimizer, sparsifier: Sparsifier | None) -> None:
    """Put `snapshot` into a model, an optimizer over it and a sparsifier attached to both, all freshly made.

    Raises:
        StoreError: if the snapshot is of another model, optimizer or sparsifier.
        FormatError: if the snapshot contradicts itself.
    """
    held = _model_tensors(model)
    kept = {key for key in snapshot.tensors if key.startswith(("parameter.", "buffer."))}
    for key in sorted(kept ^ held.keys()):
        owner = "checkpoint" if key in kept else "model"
        raise StoreError(f"the checkpoint is of another model: only the {owner} has {_said(key)}")
    for key, tensor in held.items():
        saved = snapshot.tensors[key]
        if saved.shape != tensor.shape or saved.dtype != tensor.dtype:
            raise StoreError(
                f"the checkpoint is of another model: its {_said(key)} is {saved.dtype} {tuple(saved.shape)}, "
                f"the model's {tensor.dtype} {tuple(tensor.shape)}"
            )
    _same("optimizer", snapshot.manifest.get("optimizer"), type(optimizer).__name__)
    _same("sparsifier", snapshot.manifest.get("sparsifier"), None if sparsifier is None else type(sparsifier).__name__)
    if sparsifier is not None:
        # First: it may touch weights and optimizer state, which are then overwritten with what was saved.
        sparsifier.load_state_dict(unpack(snapshot.manifest["sparsifier"]["state"], snapshot.tensors))
    with torch.no_grad():
        for key, tensor in held.items():
            _write(tensor, snapshot.tensors[key])
    _restore_optimizer(snapshot, optimizer)


def pack(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """Return `value` as JSON; tensors in it go to `tensors` under names that start with `key`.

    Raises:
        StoreError: if it holds something that is not a tensor, number, text, bool, None, list, tuple or dict.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, Tensor):
        tensors[key] = _copy(value)
        return {"tensor": key, "device": value.device.type}
    if isinstance(value, (tuple, list)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [pack(item, f"{key}.{index}", tensors) for index, item in enumerate(value)]}
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return {"dict": {name: pack(item, f"{key}.{name}", tensors) for name, item in value.items()}}
    raise StoreError(f"{key!r} holds a {type(value).__name__}, which a checkpoint cannot keep")


def unpack(value: Any, tensors: Mapping[str, Tensor], device: torch.device | str = "cpu") -> Any:
    """Return what `pack` packed; tensors that were not on the CPU go to `device`.

    Raises:
        FormatError: if `value` is not of the form that `pack` gives.
    """
    if not isinstance(value, dict):
        return value
    match value:
        case {"tensor": str(key), "device": str(place)} if key in tensors:
            return tensors[key].clone() if place == "cpu" else tensors[key].to(device, copy=True)
        case {"float": ("nan" | "inf" | "-inf") as text}:
            return float(text)
        case {"tuple": list(items)}:
            return tuple(unpack(item, tensors, device) for item in items)
        case {"list": list(items)}:
            return [unpack(item, tensors, device) for item in items]
        case {"dict": dict(items)}:
            return {name: unpack(item, tensors, device) for name, item in items.items()}
    raise FormatError(f"the checkpoint holds {json.dumps(value)[:80]}, which is no packed value")


def _optimizer_state(optimizer: Optimizer, tensors: dict[str, Tensor]) -> dict[str, Any]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    places = {param: index for index, param in enumerate(params)}
    state = {}
    for param, values in optimizer.state.items():
        if param not in places:
            raise StoreError("the optimizer holds state of something that is not one of its parameters")
        state[str(places[param])] = pack(dict(values), f"optimizer.{places[param]}", tensors)
    groups = [
        pack({name: value for name, value in group.items() if name != "params"}, f"optimizer.group.{index}", tensors)
        for index, group in enumerate(optimizer.param_groups)
    ]
    return {"kind": type(optimizer).__name__, "groups": groups, "state": state}


def _restore_optimizer(snapshot: Snapshot, optimizer: Optimizer) -> None:
    # Not by load_state_dict: it casts state to the dtype of the parameter, which changes counters and half precision.
    saved = snapshot.manifest["optimizer"]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    groups, state = saved.get("groups"), saved.get("state")
    if not isinstance(groups, list) or not isinstance(state, dict) or len(groups) != len(optimizer.param_groups):
        raise FormatError("the checkpoint's optimizer does not have the parameter groups of this one")
    if not all(key.isdecimal() and int(key) < len(params) for key in state):
        raise FormatError("the checkpoint's optimizer has more parameters than this one")
    for group, values in zip(optimizer.param_groups, groups, strict=True):
        for name, value in unpack(values, snapshot.tensors).items():
            # A learning rate that is a tensor is shared by the groups and maybe by the caller.
            if isinstance(value, Tensor) and isinstance(group.get(name), Tensor):
                group[name].copy_(value)
            else:
                group[name] = value
    optimizer.state.clear()
    for key, values in state.items():
        param = params[int(key)]
        optimizer.state[param] = unpack(values, snapshot.tensors, param.device)


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    # Parameters and buffers by their first name, so that tied ones are kept once, and non-persistent buffers too.
    found = {f"parameter.{name}": param.detach() for name, param in model.named_parameters()}
    return found | {f"buffer.{name}": buffer for name, buffer in model.named_buffers()}


def _write(tensor: Tensor, saved: Tensor) -> None:
    # An expanded buffer stores one value many times; writing to it is only allowed once.
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor, saved = tensor.narrow(dim, 0, 1), saved.narrow(dim, 0, 1)
    tensor.copy_(saved)


def _same(what: str, saved: Any, kind: str | None) -> None:
    found = saved.get("kind") if isinstance(saved, dict) else None
    if found != kind:
        raise StoreError(f"the checkpoint was written with {what} {found}, this run has {kind}")


def _said(key: str) -> str:
    kind, _, name = key.partition(".")
    return f"{kind} {name!r}"


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
