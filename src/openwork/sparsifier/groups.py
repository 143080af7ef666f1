"""Coupled channel groups: what must go together when a channel (a hidden unit, a feature map) is removed.

A channel is a row of the layers that make it with its bias, its entry in the norms that it passes, and the columns of
the layers that read it. Residual additions tie several such layers into one group.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from openwork.errors import ModelError
from openwork.sparsifier.flow import Walk
from openwork.sparsifier.parameters import unwrap

__all__ = ["Group", "Part", "Slice", "Survey", "channel_groups", "slices", "survey"]


@dataclass(frozen=True)
class Part:
    """A layer's share in a group.

    Attributes:
        layer: name of the module.
        repeat: how many neighbouring entries (columns of flattened pixels) belong to each channel.
    """

    layer: str
    repeat: int = 1


@dataclass(frozen=True)
class Group:
    """Channels that can be removed one by one; each takes its entry of every part along.

    Attributes:
        name: the first layer that makes the channels.
        size: number of channels.
        producers: layers whose rows (dimension 0) and biases make the channels.
        norms: layers with parameters or buffers per channel that hand the channel on: norms, PReLU, depthwise
            convolutions.
        consumers: layers whose columns (dimension 1) read the channels.
    """

    name: str
    size: int
    producers: tuple[Part, ...]
    norms: tuple[Part, ...]
    consumers: tuple[Part, ...]


@dataclass(frozen=True)
class Survey:
    """What was found in a model.

    Attributes:
        groups: in the order of their first layers in the model.
        left: linear and convolutional layers whose output channels are in no group -> why.
    """

    groups: tuple[Group, ...]
    left: dict[str, str]


class Slice(NamedTuple):
    """One dimension of a layer's tensor that is cut along the channels of a group."""

    layer: str
    attribute: str
    dim: int
    group: str
    repeat: int


def channel_groups(model: nn.Module, example: Any = None) -> list[Group]:
    """Return the groups of channels of `model` that can be removed.

    The forward is traced symbolically (torch.fx). Channels are followed from linear layers and convolutions through
    activations, batch and instance norms, dropout, pooling, flatten and means over pixels, joined at additions and
    products, up to the layers that read them. Where that fails (other reshapes, attention, concatenation, the output)
    the channels are in no group. Modules whose forward cannot be traced are left whole, but their parts are looked
    into, taken to be used through their own forward. Numbers of channels that a forward takes from layers' attributes
    are not seen.

    Args:
        model: any module; not changed. Compiled and data-parallel wrappers are looked through.
        example: what the model is called with (a tuple: positional arguments, a mapping: keyword arguments); tells the
            shapes. Without it inputs are taken to be batches, and vectors that a batch norm meets to be (batch, features).

    Returns:
        the groups in the order of their first layers; `survey` also tells what is in none.

    Raises:
        ModelError: if the forward cannot be traced and nothing is found in its parts, or the example does not fit.
    """
    return list(survey(model, example).groups)


def survey(model: nn.Module, example: Any = None) -> Survey:
    """Return the channel groups of `model`, and why the other layers are in none; see `channel_groups`."""
    model = unwrap(model)
    walk = Walk(model, example)
    groups = tuple(_groups(model, walk))
    cause = walk.causes.get("")
    if cause is not None and not groups:
        raise ModelError(
            f"the forward of {type(model).__name__} cannot be traced by torch.fx ({cause}), and its parts hold no chain "
            "of layers; build such chains from modules (nn.Sequential, nn.Linear, nn.ReLU, ...) in a submodule without "
            "branches on values, or mask single weights instead"
        )
    made = {part.layer for group in groups for part in (*group.producers, *group.norms)}
    layers = {name: module for name, module in model.named_modules() if _has_rows(module)}
    return Survey(groups, {name: _why(name, walk) for name in layers if name not in made})


def slices(model: nn.Module, groups: Iterable[Group]) -> Iterator[Slice]:
    """Yield every tensor dimension that the groups cut: of weights, biases, norms and running statistics."""
    for group in groups:
        for part in group.producers:
            module = model.get_submodule(part.layer)
            for attribute, _ in module.named_parameters(recurse=False):
                yield Slice(part.layer, attribute, 0, group.name, part.repeat)
        for part in group.norms:
            module = model.get_submodule(part.layer)
            for tensors in (module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
                for attribute, tensor in tensors:
                    if tensor.dim() > 0:  # not the number of batches that a norm has seen
                        yield Slice(part.layer, attribute, 0, group.name, part.repeat)
        for part in group.consumers:
            yield Slice(part.layer, "weight", 1, group.name, part.repeat)


def _groups(model: nn.Module, walk: Walk) -> Iterator[Group]:
    """Yield the sets that are not blocked, made by some layer and read by another."""
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    members: dict[int, tuple[list[Part], list[Part], list[Part]]] = {}
    rows = {name: (channels, 1) for name, channels in walk.producers.items()}
    for place, entries in enumerate((rows, walk.norms, walk.consumers)):
        for name in sorted(entries, key=lambda name: order[name]):
            channels, repeat = entries[name]
            lists = members.setdefault(walk.sets.find(channels), ([], [], []))
            lists[place].append(Part(name, repeat))
    for channels, (producers, norms, consumers) in members.items():
        if producers and consumers and channels not in walk.sets.blocked:
            yield Group(producers[0].layer, walk.sets.size(channels), tuple(producers), tuple(norms), tuple(consumers))


def _why(name: str, walk: Walk) -> str:
    if name not in walk.producers:
        return "the part of the forward that calls it cannot be followed, or there is none"
    return walk.sets.blocked.get(walk.sets.find(walk.producers[name]), "no layer reads its output")


def _has_rows(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
