"""`build`: one door to the reference models, the user's own models and transformers' models."""

from __future__ import annotations

import importlib
import inspect
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import torch
from torch import nn

from openwork.core.rng import derive
from openwork.errors import ModelError
from openwork.models import catalog, hf, user
from openwork.references import is_reference


def build(
    ref: str,
    *,
    input_shape: Sequence[int],
    classes: int,
    seed: int,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Return a freshly initialised model on the CPU, a pure function of the arguments.

    Torch's layers draw their first values from the global generator. It is seeded for the time of the call and put
    back afterwards, so that nothing outside notices.

    Args:
        ref: a name of `names()` or of the same form (`mlp-64-32`, `wrn-40-2`); `module:function` or
            `path/to/file.py:function`; or `hf:path/to/config.json` (a folder that holds one will do).
        input_shape: shape of one example: `(channels, height, width)` of images, `(features,)`, or `(tokens,)`.
        classes: number of classes; for a language model the size of its vocabulary.
        seed: of the first values.
        options: keywords of the family, of the user's function, or entries of the config.

    Returns:
        The model in training mode. Reference models carry a plain attribute `openwork_recipe` with `ref`,
        `input_shape`, `classes` and `options`, from which `build` makes them again.

    Raises:
        ModelError: if the name, an option or the input shape is not one the model knows, or the user's function fails.
        LookupFailed: if a `module:function` leads nowhere.
        MissingExtra: if `hf:` is asked for and transformers is not installed.
    """
    shape = _positive_integers(input_shape)
    if isinstance(classes, bool) or not isinstance(classes, int) or classes < 1:
        raise ModelError(f"classes is {classes!r}: it must be a whole number of at least 1")
    given = dict(options or {})
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(derive(seed, "model"))  # torch.manual_seed would reseed GPUs as well
        if ref.startswith("hf:"):
            return hf.build(ref.removeprefix("hf:"), classes=classes, options=given)
        if family := catalog.find(ref):
            return _reference(family, ref, shape, classes, given)
        if is_reference(ref):
            return user.build(ref, input_shape=shape, classes=classes, seed=seed, options=given)
    raise _unknown(ref)


def _reference(family: catalog.Family, ref: str, shape: tuple[int, ...], classes: int, options: dict[str, Any]) -> nn.Module:
    make = importlib.import_module(f"openwork.models.{family.module}").build
    _check_options(ref, make, options)
    model: nn.Module = make(ref, shape, classes, **options)
    recipe = {"ref": ref, "input_shape": list(shape), "classes": classes, "options": options}
    model.openwork_recipe = recipe  # type: ignore[assignment]
    return model


def _check_options(ref: str, make: Callable[..., nn.Module], options: dict[str, Any]) -> None:
    """Hold the options against the keyword-only arguments of the family's `build`, by name and by annotated type."""
    allowed = [p.name for p in inspect.signature(make).parameters.values() if p.kind is p.KEYWORD_ONLY]
    hints = typing.get_type_hints(make)
    for name, value in options.items():
        if name not in allowed:
            raise ModelError(f"{ref} has no option {name!r}; its options: {', '.join(allowed) or 'none'}")
        kinds = set(typing.get_args(hints[name]) or (hints[name],))
        if float in kinds:
            kinds.add(int)
        if type(value) not in kinds:
            words = sorted(k.__name__ for k in kinds if k is not type(None))
            raise ModelError(f"option {name!r} of {ref} is {value!r}: it must be of type {' or '.join(words)}")


def _positive_integers(input_shape: Sequence[int]) -> tuple[int, ...]:
    shape = tuple(input_shape) if isinstance(input_shape, Sequence) and not isinstance(input_shape, str) else ()
    if not shape or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in shape):
        raise ModelError(f"input_shape is {input_shape!r}: it must be a list of whole numbers of at least 1, "
                         "for example (3, 32, 32)")  # fmt: skip
    return shape


def _unknown(ref: str) -> ModelError:
    if ref.endswith(".py"):
        return ModelError(f"{ref!r} is a file: name the function in it too, '{PurePath(ref).as_posix()}:function'")
    near = catalog.nearest(re.split(r"[/:]", ref)[-1])
    guess = f"; did you mean {' or '.join(near)}?" if near else ";"
    return ModelError(
        f"there is no model {ref!r}{guess} The names: {', '.join(catalog.names())}. Your own: 'module:function', "
        "'path/to/file.py:function' or 'hf:path/to/config.json'"
    )
