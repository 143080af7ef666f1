"""Averages of trained states that keep their masks: the weighted average, and the greedy choice of what goes into it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from openwork.core.masks import Masks
from openwork.errors import MaskError, MethodError, ModelError

State = dict[str, Any]
Given = Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]] | None


def average_state(states: Sequence[Mapping[str, Any]], weights: Sequence[float] | None = None, masks: Given = None) -> State:
    """Return the weighted average of state dicts: sum_i weights_i states_i.

    Args:
        states: state dicts of the same keys, shapes and dtypes. Floating-point tensors are averaged in float64 and come
            back in their own dtype; integer tensors (step counters) and plain values are copied from the first.
        weights: one per state, at least 0, summing to 1; None is the uniform average. States of weight 0 are left
            out, so that a single remaining one comes back bit for bit.
        masks: what all states keep, or each state's own masks, which must then be equal; masked weights of the average
            are exactly zero. None puts no mask back: the average then keeps what any state keeps.

    Returns:
        a new state dict; no tensor is shared with `states`.

    Raises:
        MaskError: if the states' masks differ, or name what the states lack.
        MethodError: if there is no state, or the weights do not fit.
        ModelError: naming the first tensor that is not the same kind in all states.
    """
    shares = _shares(len(states), weights)
    common = None if masks is None else masks if isinstance(masks, Mapping) else same_masks(masks)
    for state in states[1:]:
        _check_alike(states[0], state)
    parts = [(state, share) for state, share in zip(states, shares, strict=True) if share]
    mean = {key: _mean([(state[key], share) for state, share in parts], states[0][key]) for key in states[0]}
    for name, mask in (common or {}).items():
        if name not in mean or mean[name].shape != mask.shape:
            raise MaskError(f"the states have no tensor {name!r} of shape {tuple(mask.shape)} that the masks name")
        mean[name].masked_fill_(~mask.to(mean[name].device), 0)
    return mean


def greedy_soup(
    states: Sequence[Mapping[str, Any]],
    evaluate: Callable[[State], float],
    *,
    scores: Sequence[float] | None = None,
    masks: Given = None,
) -> tuple[State, list[int]]:
    """Add states, best first, to a uniform average for as long as its score does not fall.

    Args:
        states: state dicts of the same kind.
        evaluate: score of a state, higher is better, on data that is not the test data.
        scores: the states' own scores by the same measure; None evaluates them.
        masks: as for `average_state`.

    Returns:
        the average, whose score is at least that of the best state, and the places of the states in it, best first.

    Source:
        Wortsman et al., "Model soups", ICML 2022, Recipe 1.
    """
    if not states:
        raise MethodError("a soup needs at least one state, got none")
    own = [evaluate(average_state([state], masks=masks)) for state in states] if scores is None else list(scores)
    if len(own) != len(states):
        raise MethodError(f"got {len(own)} scores for {len(states)} states; give one a state")
    first, *others = sorted(range(len(states)), key=lambda place: -own[place])
    chosen, best = [first], own[first]
    soup = average_state([states[first]], masks=masks)
    for place in others:
        trial = average_state([states[one] for one in [*chosen, place]], masks=masks)
        score = evaluate(trial)
        if score >= best:
            chosen, best, soup = [*chosen, place], score, trial
    return soup, chosen


def same_masks(masks: Sequence[Mapping[str, Tensor]]) -> Masks:
    """Return the masks that all of `masks` are.

    Raises:
        MaskError: if there are none, or naming the first parameter whose masks differ.
    """
    if not masks:
        raise MaskError("got no masks to compare; give those of at least one model")
    first = masks[0]
    for other in masks[1:]:
        if first.keys() != other.keys():
            odd = sorted(first.keys() ^ other.keys())
            raise MaskError(f"only some of the models mask {odd[0]!r}; models of different masks cannot be averaged")
        for name, mask in first.items():
            if mask.shape != other[name].shape or not torch.equal(mask, other[name].to(mask.device)):
                raise MaskError(
                    f"the masks of {name!r} differ: an average would keep more than either; average models retrained "
                    "from the same pruned one, or prune the average again"
                )
    return Masks(first)


def _shares(count: int, weights: Sequence[float] | None) -> list[float]:
    if not count:
        raise MethodError("an average needs at least one state, got none")
    shares = [1.0 / count] * count if weights is None else [float(weight) for weight in weights]
    if len(shares) != count:
        raise MethodError(f"got {len(shares)} weights for {count} states; give one a state")
    if not all(0.0 <= share <= 1.0 for share in shares) or abs(math.fsum(shares) - 1.0) > 1e-6:
        raise MethodError(f"weights {shares} must be at least 0 and sum to 1")
    return shares


def _check_alike(first: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    if first.keys() != other.keys():
        odd = sorted(first.keys() ^ other.keys())
        raise ModelError(f"only some of the states hold {odd[0]!r}; average states of one architecture")
    for key, value in first.items():
        if _kind(value) != _kind(other[key]):
            raise ModelError(f"{key!r} is {_kind(value)} in one state and {_kind(other[key])} in another")


def _kind(value: Any) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _mean(parts: Sequence[tuple[Any, float]], first: Any) -> Any:
    if not isinstance(first, Tensor):
        return first
    if not (first.is_floating_point() or first.is_complex()):
        return first.detach().clone()
    if len(parts) == 1:
        return parts[0][0].detach().clone()
    wide = torch.complex128 if first.is_complex() else torch.float64
    total = torch.zeros(first.shape, dtype=wide, device=first.device)
    for value, share in parts:
        total.add_(value.detach().to(device=first.device, dtype=wide), alpha=share)
    return total.to(first.dtype)
