"""Feeding calibration data to a model, and knowing which positions are padding."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from openwork.errors import DataError, OpenworkError

Calibration = Iterable[Any] | Callable[[nn.Module], object] | None
Feed = Callable[[nn.Module], None]


MASKS = ("attention_mask", "decoder_attention_mask")


class Enough(BaseException):
    """Raised inside a batch to leave the rest of the model out; `Batches` goes on with the next batch."""


def feed_of(calibration: Calibration) -> Feed:
    """Return a function that runs a model over the calibration data, the same each time; a bare tensor is one batch.

    Raises:
        DataError: if there is none, or it is neither batches nor a function.
    """
    if isinstance(calibration, nn.Module):
        raise DataError(f"calibration is a {type(calibration).__name__}, a model: give batches, or a function of the model")
    if callable(calibration):
        return _guarded(calibration)
    if isinstance(calibration, Tensor | Mapping):
        calibration = [calibration]
    if calibration is None or isinstance(calibration, str | bytes):
        raise DataError(f"calibration is {_kind(calibration)}: give a list of batches, or a function of the model")
    try:
        batches = list(calibration)
    except TypeError as error:
        raise DataError(
            f"calibration is {_kind(calibration)}: give a list of batches, or a function of the model"
        ) from error
    if not batches:
        raise DataError("calibration holds no batch: give at least one")
    for index, batch in enumerate(batches):
        if not isinstance(batch, Tensor | Mapping | tuple | list) or (not isinstance(batch, Tensor) and not len(batch)):
            raise DataError(f"calibration batch {index} is {_kind(batch)}: use a tensor, a tuple or a mapping of tensors")
    return Batches(batches)


class Batches:
    """Runs a model over a list of batches.

    Attributes:
        batches: tensors, tuples or mappings.
    """

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __call__(self, model: nn.Module) -> None:
        """Run the model over every batch."""
        device = next((tensor.device for tensor in _tensors(model) if not tensor.is_meta), torch.device("cpu"))
        most = _positional(model)
        for index, batch in enumerate(self.batches):
            try:
                if isinstance(batch, Mapping):
                    model(**{key: _moved(value, device) for key, value in batch.items()})
                elif isinstance(batch, Tensor):
                    model(_moved(batch, device))
                else:
                    model(*(_moved(value, device) for value in list(batch)[:most]))
            except Enough:
                continue
            except (OpenworkError, MemoryError):
                raise
            except Exception as error:
                what = f"{type(error).__name__}: {error}".splitlines()[0][:300]
                raise DataError(
                    f"the model refuses calibration batch {index} ({what}): give what its forward takes"
                ) from error


class Padding:
    """Knows, while the model runs, which positions of the batch are padding.

    Attributes:
        masks: the attention masks of the call in progress, by argument name, each (batch, positions) bool.
    """

    def __init__(self) -> None:
        self.masks: dict[str, Tensor] = {}

    def watch(self, model: nn.Module) -> RemovableHandle:
        """Follow the calls of `model`; remove the handle to stop."""
        return model.register_forward_pre_hook(self._enter, with_kwargs=True)

    def keep(self, name: str, x: Tensor) -> Tensor | None:
        """Return which leading positions of the input `x` of layer `name` count, None for all.

        A mask fits an input of (batch, positions, ...) or of (batch * positions, ...).
        """
        names = MASKS[::-1] if "decoder" in name else MASKS
        for mask in (self.masks[key] for key in names if key in self.masks):
            if x.shape[:2] == mask.shape and x.dim() > 2:
                return mask
            if x.dim() == 2 and x.shape[0] == mask.numel():
                return mask.reshape(-1)
        return None

    def _enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
        except (TypeError, ValueError):
            given = kwargs
        given = {**given, **given.get("kwargs", {})} if isinstance(given.get("kwargs", {}), dict) else given
        found = {key: given[key] for key in MASKS if isinstance(given.get(key), Tensor)}
        self.masks = {key: mask != 0 for key, mask in found.items() if mask.dim() == 2}


def _guarded(run: Callable[[nn.Module], object]) -> Feed:
    def feed(model: nn.Module) -> None:
        run(model)

    return feed


def _positional(model: nn.Module) -> int | None:
    """Return how many positional arguments forward takes, None for any number."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(one.kind is one.VAR_POSITIONAL for one in parameters):
        return None
    return sum(one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD) for one in parameters)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _kind(value: object) -> str:
    return "nothing" if value is None else f"{type(value).__name__}"
