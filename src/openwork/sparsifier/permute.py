"""Permutations of channels that leave the network's function as it is: which tensors move together, and moving them.

A hidden channel may stand anywhere, as long as all that stands for it moves along: the rows of the layers that make it
with their biases, its entries in norms (running statistics included), depthwise kernels and scales, the columns of the
layers that read it, and what optimizers remember of each of these weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from openwork.errors import ModelError, OptimizerError
from openwork.sparsifier.blocks import BlockWalk
from openwork.sparsifier.flow import attribute
from openwork.sparsifier.parameters import unwrap

__all__ = ["ChannelClass", "Moves", "Share", "channel_classes", "inverse", "moved", "moves", "permute"]

Moves = dict[str, dict[int, Tensor]]
"""Parameter or buffer -> dimension -> where its entries come from, int64: new[i] = old[index[i]]."""


@dataclass(frozen=True)
class Share:
    """The entries of one layer that stand for the channels of a class.

    Attributes:
        layer: name of the module, or of a parameter or buffer that a forward uses by itself.
        offset: the first entry; above 0 in layers that read a concatenation.
        repeat: neighbouring entries (columns of flattened pixels) for each channel.
        dim: the dimension of such a parameter or buffer; None for a module.
    """

    layer: str
    offset: int = 0
    repeat: int = 1
    dim: int | None = None


@dataclass(frozen=True)
class ChannelClass:
    """Channels that take one permutation.

    Attributes:
        name: the first layer that makes the channels, with the rows if it makes those of several classes.
        size: number of channels.
        producers: layers whose rows (dimension 0) and biases make the channels.
        tied: what holds an entry for each channel and hands it on: norms, PReLU, depthwise convolutions, scales.
        consumers: layers whose columns (dimension 1) read the channels.
        reason: why the channels must stay where they are; empty if they may move.
    """

    name: str
    size: int
    producers: tuple[Share, ...] = ()
    tied: tuple[Share, ...] = ()
    consumers: tuple[Share, ...] = ()
    reason: str = ""

    @property
    def fixed(self) -> bool:
        """Tell whether the channels must stay where they are."""
        return bool(self.reason)


def channel_classes(model: nn.Module, example_input: Any = None) -> list[ChannelClass]:
    """Return the classes of channels of `model`, those that must stay included, with the reason.

    The forward is traced as by `openwork.sparsifier.groups.channel_groups`. Residual additions, products (squeeze and
    excitation), norms and depthwise convolutions tie channels into one class; a concatenation is the ordered union of
    its blocks, and whatever meets it is cut into the same blocks. Classes that must stay: the network's inputs and
    outputs, the channels of grouped convolutions, and all that meets an operation which is not followed.

    Args:
        model: any module; not changed. Compiled and data-parallel wrappers are looked through.
        example_input: what the model is called with (a tuple: positional arguments, a mapping: keyword arguments); tells
            the shapes. Without it inputs are taken to be batches, and concatenations with what is not followed stay.

    Returns:
        the classes in the order of their first layers in the model.

    Raises:
        ModelError: if the example does not fit the forward.
    """
    model = unwrap(model)
    walk = BlockWalk(model, example_input)
    shares = _members(model, walk)
    found = [_class(walk, leaf, members) for leaf, members in shares.items()]
    found += _unfollowed(model, walk)
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    return sorted(found, key=lambda one: min(order.get(share.layer, len(order)) for share in _all(one)))


def permute(
    model: nn.Module,
    cls: ChannelClass,
    perm: Sequence[int] | Tensor,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    *,
    copies: Iterable[nn.Module] = (),
) -> Moves:
    """Move the channels of a class in place: channel `perm[i]` comes to place `i`; the function stays as it is.

    Parameters, their gradients, buffers and the optimizer's state move alike, so that the next step of training is the
    permuted step.

    Args:
        model: the module that `cls` was found in.
        cls: one of its `channel_classes`.
        perm: every number from 0 to `cls.size - 1` once.
        optimizer: one or several that hold the model's parameters.
        copies: further models with the same names, moving averages say, that are moved too.

    Returns:
        where the entries of each tensor came from, for masks and other copies (see `moved`).

    Raises:
        ModelError: if the class is fixed, `perm` is no permutation of its channels, or a copy lacks a tensor.
        OptimizerError: if the optimizer remembers something of a weight that cannot be moved.
    """
    found = moves(model, cls, perm)
    models = [unwrap(one) for one in (model, *copies)]
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer or ())
    tensors = {id(thing): (thing, dims) for one in models for thing, dims in _tensors(one, found)}
    for thing, dims in [*tensors.values()]:
        tensors |= {id(state): (state, part) for one in optimizers for state, part in _states(one, thing, dims)}
    with torch.no_grad():
        for thing, dims in tensors.values():
            thing.copy_(moved(thing, dims))
            if isinstance(thing, nn.Parameter) and thing.grad is not None:
                thing.grad.copy_(moved(thing.grad, dims))
    return found


def moves(model: nn.Module, cls: ChannelClass, perm: Sequence[int] | Tensor) -> Moves:
    """Return what `permute` would move, by name of parameter and buffer; tied tensors go by their first name.

    Raises:
        ModelError: if the class is fixed, or `perm` is no permutation of its channels.
    """
    model, order = unwrap(model), _checked(cls, perm)
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    names = {id(thing): name for name, thing in reversed(named)}
    found: Moves = {}
    for thing, dim, share in _entries(model, cls):
        spread = (order[:, None] * share.repeat + torch.arange(share.repeat)).reshape(-1)
        index = found.setdefault(names[id(thing)], {}).setdefault(dim, torch.arange(thing.shape[dim]))
        index[share.offset : share.offset + len(spread)] = share.offset + spread
    return found


def moved(thing: Tensor, dims: Mapping[int, Tensor]) -> Tensor:
    """Return `thing` with its entries moved along each of `dims`, one entry of `Moves`; a new tensor."""
    for dim, index in dims.items():
        thing = thing.index_select(dim, index.to(thing.device))
    return thing


def inverse(perm: Sequence[int] | Tensor) -> Tensor:
    """Return the permutation that undoes `perm`, int64."""
    return torch.as_tensor(perm).argsort()


# ---- finding classes --------------------------------------------------------------------------------------------------


def _members(model: nn.Module, walk: BlockWalk) -> dict[int, tuple[list[Share], list[Share], list[Share]]]:
    """Return, for every set of channels, the shares of its producers, of what is tied, and of its consumers."""
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    rows = {name: (channels, 1) for name, channels in walk.producers.items()}
    members: dict[int, tuple[list[Share], list[Share], list[Share]]] = {}
    for place, entries in enumerate((rows, walk.norms, walk.consumers)):
        for name in sorted(entries, key=lambda name: order[name]):
            channels, repeat = entries[name]
            for leaf, offset in walk.parts(channels, repeat):
                members.setdefault(leaf, ([], [], []))[place].append(Share(name, offset, repeat))
    for (name, dim), (channels, repeat) in walk.scales.items():
        for leaf, offset in walk.parts(channels, repeat):
            members.setdefault(leaf, ([], [], []))[1].append(Share(name, offset, repeat, dim))
    return members


def _class(walk: BlockWalk, leaf: int, members: tuple[list[Share], list[Share], list[Share]]) -> ChannelClass:
    producers, tied, consumers = map(tuple, members)
    size, why = walk.sets.size(leaf), walk.sets.blocked.get(leaf, "")
    if not why and not producers:
        why = "no layer makes them"
    if not why and not consumers:
        why = "no layer reads them"
    first = (producers or tied or consumers)[0]
    whole = len(walk.sets.leaves(walk.producers[first.layer])) == 1 if producers else True
    name = first.layer if whole else f"{first.layer}[{first.offset}:{first.offset + size}]"
    return ChannelClass(name if producers else f"into {name}", size, producers, tied, consumers, why)


def _unfollowed(model: nn.Module, walk: BlockWalk) -> Iterator[ChannelClass]:
    """Yield a fixed class for the rows, and for the columns, of every layer that the walk does not reach."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            continue
        is_grouped = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups > 1
        if name not in walk.producers and name not in walk.norms:
            why = "its groups tie the channels" if is_grouped else "the part of the forward that calls it cannot be followed"
            yield ChannelClass(name, len(module.weight), producers=(Share(name),), reason=why)
        if name not in walk.consumers and not is_grouped:
            why = "they are an input of the network, or come from what cannot be followed"
            yield ChannelClass(f"into {name}", module.weight.shape[1], consumers=(Share(name),), reason=why)


def _all(cls: ChannelClass) -> tuple[Share, ...]:
    return (*cls.producers, *cls.tied, *cls.consumers)


# ---- moving -----------------------------------------------------------------------------------------------------------


def _checked(cls: ChannelClass, perm: Sequence[int] | Tensor) -> Tensor:
    order = torch.as_tensor(perm).detach().cpu()
    if order.shape != (cls.size,) or order.is_floating_point() or order.long().sort().values.tolist() != [*range(cls.size)]:
        raise ModelError(
            f"{order.tolist()!r} is no permutation of the {cls.size} channels of {cls.name!r}; name each number from 0 to "
            f"{cls.size - 1} once"
        )
    if cls.fixed and order.tolist() != [*range(cls.size)]:
        raise ModelError(f"the channels of {cls.name!r} must stay where they are: {cls.reason}; permute another class")
    return order.long()


def _entries(model: nn.Module, cls: ChannelClass) -> Iterator[tuple[Tensor, int, Share]]:
    """Yield every tensor that the class runs through, with the dimension."""
    for share in cls.producers:
        for thing in model.get_submodule(share.layer).parameters(recurse=False):
            yield thing, 0, share
    for share in cls.tied:
        if share.dim is not None:
            yield attribute(model, share.layer), share.dim, share
            continue
        module = model.get_submodule(share.layer)
        held: tuple[Tensor, ...] = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        for one in held:
            if one.dim() > 0:  # not the number of batches that a norm has seen
                yield one, 0, share
    for share in cls.consumers:
        weight: Any = model.get_submodule(share.layer).weight
        yield weight, 1, share


def _tensors(model: nn.Module, found: Moves) -> Iterator[tuple[Tensor, dict[int, Tensor]]]:
    """Yield the tensors of one model that are moved."""
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    named |= dict(model.named_buffers(remove_duplicate=False))
    for name, dims in found.items():
        thing = named.get(name)
        if thing is None or any(thing.dim() <= dim or thing.shape[dim] != len(index) for dim, index in dims.items()):
            shape = None if thing is None else tuple(thing.shape)
            raise ModelError(f"a copy has no {name!r} of the same shape (found {shape}); pass models of one architecture")
        yield thing, dims


def _states(optimizer: Optimizer, param: Tensor, dims: Mapping[int, Tensor]) -> Iterator[tuple[Tensor, dict[int, Tensor]]]:
    """Yield what an optimizer remembers of each entry of a parameter: of its shape, or one number for a row or column."""
    state: Mapping[str, Any] = optimizer.state.get(param, {})
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.numel() <= 1:
            continue
        fits = value.dim() == param.dim() and all(n in (1, m) for n, m in zip(value.shape, param.shape, strict=True))
        if not fits:
            raise OptimizerError(
                f"{type(optimizer).__name__} remembers {key!r} of shape {tuple(value.shape)} for a weight of shape "
                f"{tuple(param.shape)}, which cannot be permuted; permute before training or with a fresh optimizer"
            )
        yield value, {dim: index for dim, index in dims.items() if value.shape[dim] == len(index)}
