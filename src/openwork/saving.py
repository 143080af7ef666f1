"""Saving a model so that its zeros take no room, and loading it back: no pickle, nothing half loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openwork.errors import FormatError, ModelError, OpenworkError
from openwork.runtime import files, record
from openwork.runtime.plan import Plan, restore
from openwork.sparsifier.parameters import unwrap

RECIPE = "model"
PLAN = "plan"
_COMPILED = "_orig_mod."
_SMALL = 256
_REMEDY = "pass the module, load(path, model)"


@dataclass(frozen=True)
class Saved:
    """What a save produced: the file, its size, and the size of the plain safetensors file of the same tensors."""

    path: Path
    bytes: int
    dense_bytes: int

    @property
    def ratio(self) -> float:
        """Size of the file against the plain one; below 1 is smaller."""
        return self.bytes / self.dense_bytes


def save(model: nn.Module, path: str | Path, *, metadata: Mapping[str, Any] | None = None) -> Saved:
    """Write parameters and buffers of `model` to one compressed `.safetensors` file, atomically and bit for bit.

    A model wrapped by `torch.compile` is saved under its own names; tied tensors are stored once. A model made by
    `openwork.models.build` carries its recipe, which is stored, so that `load` can build it again. One that
    `openwork.accelerate` returned is stored as the dense model that it stands for, with its plan beside it.

    Args:
        model: any module; what its `state_dict` holds is saved.
        path: the file; folders above it are made.
        metadata: anything JSON can express, returned by `openwork.runtime.files.read_state`.

    Raises:
        ModelError: if the model is none, or its state holds something other than tensors.
        FormatError: for a dtype that safetensors has not, or metadata that JSON cannot express.
        StoreError: if the file cannot be written.
    """
    state = _state(model)
    recipe = getattr(unwrap(model), "openwork_recipe", None)
    extra = dict(metadata or {})
    if RECIPE not in extra and _is_clean(recipe):
        extra[RECIPE] = recipe
    plan = next(
        (one for one in (getattr(model, name, None) for name in ("openwork_plan", "plan")) if isinstance(one, Plan)), None
    )
    if PLAN not in extra and plan is not None and plan.accelerated:
        extra[PLAN] = record.write(plan.record)
    size = files.write_state(path, state, extra)
    return Saved(Path(path), size, files.plain_bytes(state))


def load_state(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a file written by `save`, or of any plain safetensors file, by name.

    Raises:
        FormatError: if the file is damaged, hostile or of another format.
        StoreError: if it cannot be read.
    """
    return files.read_state(path)[0]


def load(path: str | Path, model: nn.Module | None = None, *, plan: bool = True) -> nn.Module:
    """Load a file into `model` in place, or into the reference model that its recipe names, and return the model.

    A file of an accelerated model gives an accelerated copy back: as it was saved on the same machine (the outputs are the
    same bit for bit), measured anew where processor, vector instructions, versions or threads are others.

    Args:
        path: a file written by `save`, or any plain safetensors file.
        model: the module to fill; its names, shapes and dtypes must be the file's. Without it the file must hold the
            recipe of one of openwork's own reference models: a file never chooses which code of the user's is run.
        plan: whether a plan in the file is followed; False gives the dense model.

    Raises:
        FormatError: if the file is damaged, does not fit the model (which then stays as it was), or has no recipe.
        ModelError: if `model` is no module, or cannot be filled.
        StoreError: if the file cannot be read.
    """
    state, metadata = files.read_state(path)
    if model is None:
        model = _built(path, metadata, sum(tensor.numel() for tensor in state.values()))
    sources = _match(path, state, _state(model))
    try:
        own = unwrap(model)
        filled = {key: state[sources[key.replace(_COMPILED, "")]] for key in own.state_dict()}
        own.load_state_dict(filled, strict=True)
    except RuntimeError as error:
        raise ModelError(f"the model refuses the tensors of {str(path)!r}: {error}") from error
    return restore(model, metadata[PLAN]) if plan and PLAN in metadata else model


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state of a model under its own names, without the prefixes of compiled and data-parallel wrappers."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"a {type(model).__name__} is no model: give a torch.nn.Module")
    state = {key.replace(_COMPILED, ""): value for key, value in unwrap(model).state_dict().items()}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ModelError(
                f"{name!r} in the state of {type(model).__name__} is a {type(value).__name__}, which only a pickle "
                "can hold: turn it into a tensor, or save it yourself"
            )
        if value.is_meta:
            raise ModelError(f"{name!r} is a meta tensor without values: materialise the model first (model.to_empty)")
    return state


def _match(path: str | Path, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, str]:
    """Return for each tensor of a model the name under which the file holds it: its own, or one tied to it."""
    _, tied = files.ties(own)
    groups: dict[str, list[str]] = {}
    for name in own:
        groups.setdefault(tied.get(name, name), []).append(name)
    held = {first: [name for name in names if name in state] for first, names in groups.items()}
    sources = {name: name if name in state else next(iter(held[tied.get(name, name)]), "") for name in own}
    wrong = [
        f"{name} (file: {_brief(state[name])}, model: {_brief(own[name])})"
        for name in own
        if name in state and (state[name].shape, state[name].dtype) != (own[name].shape, own[name].dtype)
    ]
    findings = {
        "missing in the file": [name for name, source in sources.items() if not source],
        "not in the model": [name for name in state if name not in own],
        "of another shape or dtype": wrong,
        "tied in the model but different in the file": [] if wrong else _torn(state, held),
    }
    problems = [f"{words}: {_some(names)}" for words, names in findings.items() if names]
    if problems:
        raise FormatError(f"{str(path)!r} does not fit the model, which stays as it was; {'; '.join(problems)}")
    return sources


def _torn(state: Mapping[str, Tensor], held: Mapping[str, list[str]]) -> list[str]:
    """Return the tied names whose values in the file differ, bit for bit."""
    return [name for names in held.values() for name in names[1:] if not _same(state[names[0]], state[name])]


def _same(one: Tensor, two: Tensor) -> bool:
    return one is two or torch.equal(one.reshape(-1).view(torch.uint8), two.reshape(-1).view(torch.uint8))


def _built(path: str | Path, metadata: Mapping[str, Any], entries: int) -> nn.Module:
    """Build the reference model that the metadata name; no size in it may exceed what the file's entries explain."""
    from openwork import models
    from openwork.models import catalog

    recipe = metadata.get(RECIPE)
    if recipe is None:
        raise FormatError(f"{str(path)!r} does not say which model it holds: {_REMEDY}")
    try:
        ref, shape, classes = str(recipe["ref"]), tuple(recipe["input_shape"]), recipe["classes"]
        options = dict(recipe.get("options") or {})
        sizes = [classes, *shape, *(value for value in options.values() if isinstance(value, (int, float)))]
        sizes += map(int, re.findall(r"\d+", ref))
        if any(not 0 <= size <= max(entries, _SMALL) for size in sizes):
            raise ValueError(f"{max(sizes)} is out of proportion to the {entries} entries of the file")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"the recipe in {str(path)!r} makes no sense ({error}): {_REMEDY}") from error
    if catalog.find(ref) is None:
        raise FormatError(
            f"{str(path)!r} names the model {ref[:80]!r}, which is none of openwork's own, and a file may not choose "
            f"what code runs: {_REMEDY}"
        )
    try:
        return models.build(ref, input_shape=shape, classes=classes, seed=0, options=options)
    except (OpenworkError, TypeError, ValueError, RuntimeError, MemoryError) as error:
        raise FormatError(f"the recipe in {str(path)!r} cannot be built ({error}): {_REMEDY}") from error


def _is_clean(recipe: Any) -> bool:
    """Tell whether a recipe survives JSON unchanged but for tuples, which become lists."""
    try:
        return isinstance(recipe, dict) and isinstance(json.loads(json.dumps(recipe, allow_nan=False)), dict)
    except (TypeError, ValueError, RecursionError):
        return False


def _brief(tensor: Tensor) -> str:
    return f"{'x'.join(map(str, tensor.shape)) or 'scalar'} {str(tensor.dtype).removeprefix('torch.')}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
