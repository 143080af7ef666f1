"""Drop and grow on lists of positions: memory and time in proportion to the entries, no score of the dense shape.

The rules are those of `openwork.sparsifier.prune_grow`: an entry dropped may be grown again and is then simply kept.
Positions are numbered flat, int64 and ascending; `source` says for each entry of the new list which of the old one it is,
-1 where it is new.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from openwork.core.sampling import subset_without
from openwork.core.select import top
from openwork.sparsifier.optimizers import fresh_values


def survivors(score: Tensor, count: int) -> Tensor:
    """Return which entries stay, bool (entries), when the `count` of the lowest score leave; ties keep the first."""
    return top(score, score.numel() - count)


def grown_at_random(flat: Tensor, stay: Tensor, total: int, generator: torch.Generator) -> Tensor:
    """Return as many positions as leave, drawn from all that then are off, those just dropped included (SET).

    Args:
        flat: int64 (entries), the entries before.
        stay: bool (entries).
        total: number of positions.
        generator: on the CPU.
    """
    return subset_without(flat[stay], total, int((~stay).sum()), generator)


def grown_by_score(flat: Tensor, stay: Tensor, score: Tensor, others: Tensor, other_score: Tensor) -> Tensor:
    """Return as many positions as leave: the highest scores of those just dropped and of `others` (RigL on a sample).

    Args:
        flat: int64 (entries), the entries before.
        stay: bool (entries).
        score: (entries), what growing an entry that has been dropped is worth.
        others: int64 (n), positions that are off.
        other_score: (n), their worth.

    Returns:
        int64, ascending; of equal scores the lowest positions.
    """
    pool, worth = torch.cat((flat[~stay], others)), torch.cat((score[~stay], other_score))
    order = pool.argsort()
    return pool[order][top(worth[order], int((~stay).sum()))]


def merged(flat: Tensor, stay: Tensor, grown: Tensor) -> tuple[Tensor, Tensor]:
    """Return the new positions and their `source`, int64 both.

    Args:
        flat: int64 (entries), the entries before.
        stay: bool (entries), which of them stay.
        grown: int64, distinct positions, none of which stays; they may be among those that leave.
    """
    after = torch.cat((flat[stay], grown)).sort().values
    if flat.numel() == 0:
        return after, torch.full_like(after, -1)
    place = torch.searchsorted(flat, after).clamp(max=flat.numel() - 1)
    return after, torch.where(flat[place] == after, place, -1)


def moved(old: Tensor, source: Tensor, fill: float = 0.0) -> Tensor:
    """Return the values of the new entries: those of their source, `fill` where they are new.

    Args:
        old: (entries * block).
        source: int64 (entries).
        fill: value of new entries.
    """
    lines = old.reshape(source.numel(), -1) if source.numel() else old.reshape(0, 1)
    taken = lines[source.clamp(min=0)]
    return torch.where((source >= 0)[:, None], taken, fill).reshape(old.shape)


@torch.no_grad()
def move(param: nn.Parameter, source: Tensor, optimizers: Sequence[Optimizer]) -> None:
    """Move a parameter's values, gradient and optimizer state to the new entries.

    New entries start at zero, with no gradient and with the state of a weight that has never been stepped.

    Args:
        param: (entries * block).
        source: int64 (entries).
        optimizers: those that may hold state of it.
    """
    param.copy_(moved(param, source))
    if param.grad is not None:
        param.grad.copy_(moved(param.grad, source))
    for optimizer in optimizers:
        fresh = fresh_values(optimizer)
        for key, value in optimizer.state.get(param, {}).items():
            if isinstance(value, Tensor) and value.shape == param.shape:
                value.copy_(moved(value, source, fresh.get(key, 0.0)))
