"""Models that the user's own function makes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from openwork.errors import ModelError, OpenworkError
from openwork.references import resolve


def build(ref: str, *, input_shape: tuple[int, ...], classes: int, seed: int, options: Mapping[str, Any]) -> nn.Module:
    """Call the function that `ref` names with those of the arguments that its signature takes by name.

    `input_shape`, `classes` and `seed` are offered: a function without arguments is fine, one with `**kwargs` gets
    all. Options were asked for, so one that the function does not take is an error. A class counts as a function.

    Raises:
        ModelError: if the function needs another argument, refuses an option, fails, or returns no `nn.Module`.
        LookupFailed: if `ref` leads nowhere.
    """
    function = resolve(ref)
    offered = {"input_shape": input_shape, "classes": classes, "seed": seed}
    if clash := sorted(offered.keys() & options.keys()):
        raise ModelError(f"option {clash[0]!r} of {ref!r} comes from the data and the run; leave it out of the options")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{ref!r} does not tell its arguments: name a function written in Python") from error
    arguments = _accepted(ref, signature, offered, options)
    try:
        model = function(**arguments)
    except OpenworkError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise ModelError(f"{ref!r} fails with {type(error).__name__}: {text or 'no message'}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{ref!r} returns a {type(model).__name__}: it must return a torch.nn.Module")
    return model


def _accepted(
    ref: str, signature: inspect.Signature, offered: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    parameters = signature.parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        arguments = {**offered, **options}
    else:
        by_name = [p.name for p in parameters if p.kind in {p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY}]
        if refused := [name for name in options if name not in by_name]:
            takes = ", ".join(name for name in by_name if name not in offered) or "none"
            raise ModelError(f"{ref!r} takes no option {refused[0]!r}; its options: {takes}")
        arguments = {name: value for name, value in {**offered, **options}.items() if name in by_name}
    for p in parameters:
        needed = p.default is p.empty and p.kind not in {p.VAR_POSITIONAL, p.VAR_KEYWORD}
        if needed and (p.name not in arguments or p.kind is p.POSITIONAL_ONLY):
            raise ModelError(
                f"{ref!r} needs an argument {p.name!r} that nobody gives: give it as an option, or give it a default "
                f"(offered by name: {', '.join(offered)})"
            )
    return arguments
