"""A transformers model without weights, filled and emptied part by part."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from openwork.errors import FormatError, MissingExtra, ModelError
from openwork.oneshot.folder import CONFIG, Source, check_depth, floating


def build(source: Source, architecture: str | None) -> nn.Module:
    """Build the model that a folder's config names, its parameters on the meta device and its buffers filled.

    Only classes of transformers itself are built; code in the folder is never run.

    Raises:
        MissingExtra: if transformers is not installed.
        FormatError: if the config makes no sense.
        ModelError: if transformers has no such class.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra("transformers is not installed: pip install 'openwork[transformers]'") from error
    try:
        config = transformers.AutoConfig.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a hostile config may fail in any way
        what = f"{error}".splitlines()[0][:200] if str(error) else type(error).__name__
        raise FormatError(f"{CONFIG} in {str(source.folder)!r} is no config that transformers knows: {what}") from error
    check_depth(config, len(source.files), source.folder)
    name = architecture or next(iter(getattr(config, "architectures", None) or []), None)
    kind = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ModelError(
            f"transformers has no model {name!r}, which {CONFIG} in {str(source.folder)!r} names: give one with architecture"
        )
    try:
        with _empty_parameters(floating(source)), torch.random.fork_rng(devices=[]):
            model = kind(config)
    except Exception as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise ModelError(f"{name} cannot be built from {CONFIG} in {str(source.folder)!r}: {what}") from error
    model.requires_grad_(False)
    return model


class Filler:
    """Moves tensors between a folder and a skeleton.

    Args:
        model: what `build` returned.
        source: the folder.

    Attributes:
        keys: tensor in the file -> name in the model, for those that the model takes.

    Raises:
        FormatError: if a tensor is missing, left over or of another shape.
    """

    def __init__(self, model: nn.Module, source: Source) -> None:
        self.model, self.source = model, source
        self.meta = dict(model.named_parameters(remove_duplicate=False))
        self.keys = _match(model, source)
        self.overrides: dict[str, Tensor] = {}
        self._names: dict[str, list[str]] = {}
        own = {id(param): key for key, name in self.keys.items() if (param := self.meta.get(name)) is not None}
        for name, param in self.meta.items():
            self._names.setdefault(own[id(param)], []).append(name)
        for key, name in self.keys.items():
            if name not in self.meta:
                self._names[key] = [name]
        self._key_of = {name: key for key, names in self._names.items() for name in names}

    def key(self, name: str) -> str:
        """Return the tensor of the file that fills the parameter `name`."""
        return self._key_of[name]

    def fill(self, keys: Iterable[str], values: dict[str, Tensor] | None = None) -> None:
        """Put tensors into the model, from `values` or else from the folder; tied names get one parameter."""
        keys = [key for key in keys if key in self._names]
        found = self.source.read(key for key in keys if key not in (values or {}) and key not in self.overrides)
        for key in keys:
            value = (values or {}).get(key, self.overrides.get(key, found.get(key)))
            assert value is not None
            first = self._names[key][0]
            filled = nn.Parameter(value, requires_grad=False) if first in self.meta else value
            for name in self._names[key]:
                _put(self.model, name, filled)

    def empty(self, keys: Iterable[str]) -> None:
        """Put the meta parameters back."""
        for key in keys:
            for name in self._names.get(key, []):
                if name in self.meta:
                    _put(self.model, name, self.meta[name])

    def values(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Return what the model holds under the file's names, or the folder where the model takes it from elsewhere."""
        keys = list(keys)
        state = self.model.state_dict(keep_vars=True)
        inside = {key: state[self.keys[key]].detach() for key in keys if key in self.keys}
        return {**inside, **self.source.read(key for key in keys if key not in inside)}


@contextlib.contextmanager
def _empty_parameters(dtype: torch.dtype) -> Iterator[None]:
    """Send every parameter to the meta device as soon as a module gets it; buffers are made as usual."""
    register, default = nn.Module.register_parameter, torch.get_default_dtype()

    def onto_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=False)
        register(module, name, param)

    try:
        torch.set_default_dtype(dtype)
        nn.Module.register_parameter = onto_meta  # type: ignore[method-assign,assignment]
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
        torch.set_default_dtype(default)


def _match(model: nn.Module, source: Source) -> dict[str, str]:
    """Return file key -> name in the model; of tied names one key is enough."""
    state: dict[str, Any] = dict(model.state_dict(keep_vars=True))
    prefix = str(getattr(model, "base_model_prefix", "") or "")
    keys: dict[str, str] = {}
    filled: set[int] = set()
    renamed = _renamed(model, source.files)
    for name, tensor in state.items():
        for spelling in _spellings(name, prefix):
            key = spelling if spelling in source.files else renamed.get(spelling, spelling)
            if key in source.files and key not in keys:
                if source.shapes[key] != tuple(tensor.shape):
                    raise FormatError(
                        f"{key!r} in {str(source.folder)!r} has shape {source.shapes[key]}, but its config makes it "
                        f"{tuple(tensor.shape)}: fetch config and weights of one model"
                    )
                keys[key] = name
                filled.add(id(tensor))
                break
    missing = [name for name, tensor in state.items() if id(tensor) not in filled and isinstance(tensor, nn.Parameter)]
    if missing:
        raise FormatError(
            f"{str(source.folder)!r} lacks {_some(missing)} of {type(model).__name__}: fetch the whole model, or name "
            "another class with architecture"
        )
    ignored = [re.compile(text) for text in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []]
    buffers = {spelling for name, _ in model.named_buffers() for spelling in _spellings(name, prefix)}
    extra = [
        key for key in source.files
        if key not in keys and key not in buffers and not any(one.search(key) for one in ignored)
    ]  # fmt: skip
    if extra:
        raise FormatError(
            f"{str(source.folder)!r} holds {_some(extra)}, which {type(model).__name__} does not have: name the class that "
            "the file was saved from with architecture"
        )
    return keys


def _renamed(model: nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """Return today's name -> name in the file, for files under names that transformers used to give or still writes."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:  # versions before 5 have no such names
        return {}
    rules = [rule for rule in get_model_conversion_mapping(cast(Any, model)) if isinstance(rule, WeightRenaming)]
    found: dict[str, str] = {}
    for key in keys:
        name = key
        for rule in rules:
            name, _ = rule.rename_source_key(name)
        if name != key:
            found.setdefault(name, key)
    return found


def _spellings(name: str, prefix: str) -> list[str]:
    """Return the names that a file may have for `name`: with or without the body's prefix, old names of norms."""
    names = [name]
    if prefix:
        names.append(name.removeprefix(f"{prefix}.") if name.startswith(f"{prefix}.") else f"{prefix}.{name}")
    for one in list(names):
        if one.endswith("LayerNorm.weight"):
            names.append(one.removesuffix("weight") + "gamma")
        if one.endswith("LayerNorm.bias"):
            names.append(one.removesuffix("bias") + "beta")
    return names


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, local = name.rpartition(".")
    module = model.get_submodule(owner)
    if isinstance(value, nn.Parameter):
        module._parameters[local] = value
    else:
        module._buffers[local] = value


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more tensors" if len(names) > 3 else "")
