"""Removing channels: as masks over rows, columns, biases and norms, or for real, as smaller layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from openwork.core.masks import Masks
from openwork.errors import MaskError, ModelError
from openwork.sparsifier.groups import Group, Slice, channel_groups, slices
from openwork.sparsifier.parameters import unwrap
from openwork.sparsifier.tracing import call_arguments, quietly

Kept = Mapping[str, Tensor | Sequence[int]]
"""Group (or one of its producers) -> the channels that stay: int64 indices, or bool (channels,)."""

_COUNTS = {
    "rows": ("out_features", "out_channels"),
    "columns": ("in_features", "in_channels"),
    "channels": ("in_channels", "out_channels", "groups", "num_features", "num_parameters"),
}


def node_masks(model: nn.Module, kept: Kept, *, example: Any = None, groups: Sequence[Group] | None = None) -> Masks:
    """Return the masks that remove every channel that is not kept: its rows, biases, norms' parameters and columns.

    Args:
        model: any module; not changed.
        kept: group -> channels that stay; groups that are not named stay whole.
        example: as for `channel_groups`.
        groups: the model's groups where they are known already.

    Returns:
        masks of the parameters that the named groups touch, 1-D ones included; tied parameters by their first name.

    Raises:
        MaskError: if a group is unknown, or its channels are out of range, repeated or none.
        ModelError: as for `channel_groups`.
    """
    model = unwrap(model)
    chosen = _chosen(model, kept, example, groups)
    names = {id(param): name for name, param in reversed(list(model.named_parameters(remove_duplicate=False)))}
    masks: dict[str, Tensor] = {}
    for cut in slices(model, chosen):
        param = getattr(model.get_submodule(cut.layer), cut.attribute)
        name = names.get(id(param))
        if name is None:
            continue  # running statistics are no parameters
        mask = masks.setdefault(name, torch.ones(param.shape, dtype=torch.bool))
        stays = torch.zeros(param.shape[cut.dim], dtype=torch.bool)
        stays[_entries(cut, chosen)] = True
        mask &= stays.reshape([-1 if dim == cut.dim else 1 for dim in range(param.dim())])
    return Masks(masks)


def compact(model: nn.Module, kept: Kept, *, example: Any = None, groups: Sequence[Group] | None = None) -> nn.Module:
    """Return a copy of `model` without the channels that are not kept: a smaller network with the masked one's output.

    Args:
        model: any module; not changed. It need not be masked.
        kept: group -> channels that stay, in any order; groups that are not named stay whole.
        example: as for `channel_groups`; with it the copy's output is held against the masked network's.
        groups: the model's groups where they are known already.

    Returns:
        a copy with smaller layers under the same names; ties stay ties, channels keep their order. It carries no
        recipe of `openwork.models.build`, which would build the large network.

    Raises:
        MaskError: as for `node_masks`.
        ModelError: as for `channel_groups`, or if the output on the example differs from the masked network's.
    """
    model = unwrap(model)
    chosen = _chosen(model, kept, example, groups)
    small = deepcopy(model)
    vars(small).pop("openwork_recipe", None)
    cuts: dict[int, dict[int, Tensor]] = {}
    for cut in slices(small, chosen):
        tensor = getattr(small.get_submodule(cut.layer), cut.attribute)
        cuts.setdefault(id(tensor), {})[cut.dim] = _entries(cut, chosen)
    _replace(small, cuts)
    _recount(small, chosen)
    if example is not None:
        _compare(model, node_masks(model, kept, groups=list(chosen)), small, example)
    return small


def _chosen(model: nn.Module, kept: Kept, example: Any, groups: Sequence[Group] | None) -> dict[Group, Tensor]:
    """Return the sorted kept channels of every group that is named."""
    known = channel_groups(model, example) if groups is None else list(groups)
    by_name = {part.layer: group for group in known for part in group.producers}
    chosen: dict[Group, Tensor] = {}
    for name, channels in kept.items():
        group = by_name.get(name)
        if group is None:
            raise MaskError(
                f"no channels of {name!r} can be removed; the groups are {', '.join(g.name for g in known) or 'none'} "
                "(openwork.sparsifier.groups.survey tells why others are not)"
            )
        if group in chosen:
            raise MaskError(f"the channels of {name!r} are given twice: it belongs to the group {group.name!r}")
        chosen[group] = _indices(group, torch.as_tensor(channels).detach().cpu())
    return chosen


def _indices(group: Group, channels: Tensor) -> Tensor:
    if channels.dtype is torch.bool and channels.shape == (group.size,):
        channels = channels.nonzero().squeeze(1)
    fits = channels.dim() == 1 and channels.numel() > 0 and channels.dtype in (torch.int64, torch.int32)
    if not fits or not bool((channels >= 0).all() and (channels < group.size).all()):
        raise MaskError(
            f"kept channels of {group.name!r}: {channels.tolist()!r} is neither bool of shape ({group.size},) nor a "
            f"non-empty list of whole numbers from 0 to {group.size - 1}; keep at least one channel"
        )
    ordered = channels.long().sort().values
    if bool((ordered[1:] == ordered[:-1]).any()):
        raise MaskError(f"kept channels of {group.name!r} name a channel twice; give each once")
    return ordered


def _entries(cut: Slice, chosen: Mapping[Group, Tensor]) -> Tensor:
    """Return the indices that a cut keeps along its dimension."""
    channels = next(channels for group, channels in chosen.items() if group.name == cut.group)
    return (channels[:, None] * cut.repeat + torch.arange(cut.repeat)).reshape(-1)


def _replace(model: nn.Module, cuts: Mapping[int, Mapping[int, Tensor]]) -> None:
    """Put the cut tensors in the places of the whole ones; one tensor under two names stays one."""
    done: dict[int, Tensor] = {}
    whole: list[Tensor] = []  # holds what is replaced, so that no id is used again
    for module in model.modules():
        for place in (module._parameters, module._buffers):
            for name, tensor in list(place.items()):
                if tensor is None or id(tensor) not in cuts:
                    continue
                whole.append(tensor)
                if id(tensor) not in done:
                    done[id(tensor)] = _cut(tensor, cuts[id(tensor)])
                place[name] = done[id(tensor)]  # type: ignore[assignment]


def _cut(tensor: Tensor, dims: Mapping[int, Tensor]) -> Tensor:
    values = tensor.detach()
    for dim, indices in dims.items():
        values = values.index_select(dim, indices.to(values.device))
    values = values.contiguous()
    return nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values


def _recount(model: nn.Module, chosen: Mapping[Group, Tensor]) -> None:
    """Write the new numbers of features and channels into the layers."""
    for group, channels in chosen.items():
        for kind, parts in (("rows", group.producers), ("columns", group.consumers), ("channels", group.norms)):
            for part in parts:
                module = model.get_submodule(part.layer)
                for attribute in _COUNTS[kind]:
                    if hasattr(module, attribute):
                        setattr(module, attribute, channels.numel() * part.repeat)


def _compare(model: nn.Module, masks: Masks, small: nn.Module, example: Any) -> None:
    """Hold the small network's output against the masked one's: a forward may use a number of channels unseen."""
    masked = deepcopy(model)
    masks.apply(masked)
    args, kwargs = call_arguments(example)
    with quietly(masked), quietly(small):
        try:
            wanted, found = masked(*args, **kwargs), small(*args, **kwargs)
        except Exception as error:
            raise ModelError(
                f"{type(model).__name__} fails without the removed channels ({type(error).__name__}: "
                f"{' '.join(str(error).split())}); its forward holds a fixed number of channels"
            ) from error
    if not isinstance(wanted, Tensor):
        return
    scale = float(wanted.abs().max()) if wanted.numel() else 0.0
    gap = float((wanted - found).abs().max()) if wanted.numel() else 0.0
    if not gap <= 1e-3 * scale + 1e-6:
        raise ModelError(
            f"{type(model).__name__} without the removed channels differs from the masked network by {gap:.2g}; "
            "its forward computes with the number of channels, so leave this group whole"
        )
