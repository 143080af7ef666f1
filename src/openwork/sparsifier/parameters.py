"""Which parameters of a model get a mask."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

from torch import nn

from openwork.errors import MaskError
from openwork.sparsifier.peers import wraps

Choice = Iterable[str] | Callable[[str, nn.Parameter], bool] | None

# Parameters that are tables, tokens or biases (bias_k of attention) rather than connections, wherever they come from.
_TABLES = ("emb", "token", "pos", "bias")


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside torch.compile's and DistributedDataParallel's wrappers, whose names are the user's own."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and wraps(model, "DistributedDataParallel", "DataParallel"):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def maskable(model: nn.Module, choose: Choice = None, exclude: Iterable[str] = ()) -> dict[str, nn.Parameter]:
    """Return the parameters that get a mask, by name in model order; tied parameters go by their first name.

    Args:
        model: any module.
        choose: names or glob patterns (`"layers.*.weight"`), or a function (name, parameter) -> bool. By default:
            trainable floating-point parameters of two or more dimensions, but not those of embeddings and
            normalisation layers, nor positional tables, class tokens and biases of any shape.
        exclude: names or glob patterns to leave dense.

    Raises:
        MaskError: if nothing is left, a name or pattern matches nothing, or the parameters are sharded over processes.
    """
    _check_whole(model)
    names = dict(model.named_parameters())
    exclude = _known(names, [exclude] if isinstance(exclude, str) else list(exclude))
    if choose is None:
        chosen = {name: param for name, param in names.items() if _is_connection(model, name, param)}
    elif callable(choose):
        chosen = {name: param for name, param in names.items() if choose(name, param)}
    else:
        globs = _known(names, [choose] if isinstance(choose, str) else list(choose))
        chosen = {name: param for name, param in names.items() if _matches(name, globs)}
    chosen = {name: param for name, param in chosen.items() if not _matches(name, exclude)}
    if not chosen:
        raise MaskError(
            f"no parameter to mask in {type(model).__name__}: name some with parameters=[...]; "
            f"it has {', '.join(names) or 'no parameters'}"
        )
    return chosen


def _check_whole(model: nn.Module) -> None:
    """Refuse parameters of which this process holds only a part: their scores could not be ranked here."""
    shards = any(wraps(module, "FullyShardedDataParallel") for module in model.modules())
    if shards or any(wraps(param, "DTensor") for param in model.parameters()):
        raise MaskError(
            f"the parameters of {type(model).__name__} are sharded over processes (FSDP or DTensor), so no process sees a "
            "whole layer; train it with DistributedDataParallel, which keeps whole parameters in every process"
        )


def _is_connection(model: nn.Module, name: str, param: nn.Parameter) -> bool:
    owner_name, _, local = name.rpartition(".")
    owner = type(model.get_submodule(owner_name))
    return (
        param.requires_grad
        and param.is_floating_point()
        and param.dim() >= 2
        and not issubclass(owner, nn.Embedding | nn.EmbeddingBag)
        and "norm" not in owner.__name__.lower()
        and not any(word in local.lower() for word in _TABLES)
    )


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) or name.startswith(glob + ".") for glob in globs)


def _known(names: Iterable[str], globs: list[str]) -> list[str]:
    for glob in globs:
        if not any(_matches(name, [glob]) for name in names):
            raise MaskError(f"no parameter is called or matches {glob!r}; the model has {', '.join(names)}")
    return globs
