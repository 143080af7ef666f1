"""SparseGPT: pruning with the optimal-brain-surgeon update, a column at a time.

Frantar, Alistarh. "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot". ICML 2023.
Claim: large language models lose half their weights in one shot when the others make up for each removal.
Equations: H = 2 X X^T + lambda I, lambda a share of mean diag(H); the rows of the upper Cholesky factor U of H^-1 are the
inverses that a sweep from left to right needs (section 3.3); removing w_j costs w_j^2 / U_jj^2 and moves the columns behind
it by -(w_j / U_jj) U_j (Eq. 3); the mask of `block_size` columns is chosen when the sweep reaches them, and what they push
behind the block is applied at once (Algorithm 1).
Departures: counts are exact over the layer; an input that was never active costs nothing to lose, keeps its weight where
it is kept, and does not count in mean diag(H); groups of a convolution are swept side by side. Patterns other than
unstructured and N:M along the inputs choose their units once, by w^2 / [H^-1]_jj of the whole matrix, and only the update
is swept.
Cost: one Cholesky inverse of inputs^3 a group, then outputs * inputs^2.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from openwork.core.patterns import NM, Pattern, Unstructured
from openwork.core.select import count_of, top, top_rows
from openwork.errors import DataError

Choose = Callable[[Tensor, int, int], Tensor]


def sparsegpt(
    weight: Tensor,
    gram: Tensor,
    density: float,
    pattern: Pattern,
    *,
    damping: float = 0.01,
    block_size: int = 128,
) -> tuple[Tensor, Tensor]:
    """Return the pruned and updated weight, and its mask.

    Args:
        weight: (out, in, *kernel), finite.
        gram: (groups, inputs, inputs), sum of x x^T; an output's inputs are in * kernel. Its dtype is that of the work.
        density: kept share of the layer, in [0, 1]; 1 returns the weight as it is.
        pattern: which masks are legal.
        damping: lambda as a share of mean diag(H).
        block_size: columns whose mask is chosen together; rounded up to whole groups for N:M.

    Returns:
        the weight in the Gram matrix's dtype, exactly zero off the mask, and the bool mask, both of the weight's shape.

    Raises:
        PatternError: if the pattern does not divide the weight.
        DataError: if H is not positive definite.
    """
    groups, width = gram.shape[0], gram.shape[1]
    if isinstance(pattern, NM):
        pattern.tiles(weight)  # refuse a width that is no multiple of M
    if density >= 1.0 or (isinstance(pattern, NM) and pattern.n == pattern.m):
        return weight.detach().to(gram.dtype), torch.ones_like(weight, dtype=torch.bool)
    W = weight.detach().to(gram.dtype).reshape(groups, -1, width)
    inverse, dead = inverse_hessian(gram, damping)
    along = isinstance(pattern, NM) and pattern.dim == 1
    order = _inputs_last(weight.shape, width).to(W.device) if along and weight.dim() > 2 else None
    if order is not None:
        W, inverse, dead = W[:, :, order], inverse[:, order][:, :, order], dead[:, order]
    U = torch.linalg.cholesky(inverse, upper=True)
    cost = U.diagonal(dim1=1, dim2=2).square().masked_fill(dead, math.inf)  # w^2 / inf: dead inputs go first
    if along:
        assert isinstance(pattern, NM)
        block_size = -(-block_size // pattern.m) * pattern.m
        choose = _groups_of(pattern, density)
    elif isinstance(pattern, Unstructured):
        choose = _share_of(W.numel() // width, density)
    else:
        whole = W.square() / inverse.diagonal(dim1=1, dim2=2).masked_fill(dead, math.inf).unsqueeze(1)
        chosen = pattern.select(whole.reshape(weight.shape), density).reshape(W.shape)
        choose = _given(chosen)
    del inverse
    W, mask = sweep(W, U, cost, choose, block_size)
    if order is not None:
        back = order.argsort()
        W, mask = W[:, :, back], mask[:, :, back]
    return W.reshape(weight.shape), mask.reshape(weight.shape)


def inverse_hessian(gram: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Return (2 G + lambda I)^-1 for each group, and which inputs were never active.

    A dead input gets the diagonal entry 1, so that it is alone in the inverse.

    Args:
        gram: G = sum of x x^T, (groups, inputs, inputs).
        damping: lambda = damping * mean of the diagonal of 2 G over the live inputs.

    Raises:
        DataError: if the sum is not positive definite.
    """
    H = 2.0 * gram
    diagonal = H.diagonal(dim1=1, dim2=2)
    dead = diagonal <= 0
    live = (~dead).sum(dim=1).clamp(min=1)
    diagonal += damping * (diagonal.sum(dim=1) / live).unsqueeze(1)
    diagonal.masked_fill_(dead, 1.0)
    L, info = torch.linalg.cholesky_ex(H)
    del H, diagonal  # matrices of inputs^2 are what a wide layer's memory goes to
    if bool(info.any()):
        raise DataError(
            f"the Gram matrix of {gram.shape[1]} inputs is singular at damping={damping:g}: calibrate with more data, or "
            "raise the damping (0.01 is usual)"
        )
    return torch.cholesky_inverse(L), dead


def sweep(W: Tensor, U: Tensor, cost: Tensor, choose: Choose, block_size: int) -> tuple[Tensor, Tensor]:
    """Remove weights from left to right, moving what is behind them (Algorithm 1).

    Args:
        W: (groups, outputs, inputs).
        U: upper Cholesky factor of the inverse Hessian, (groups, inputs, inputs).
        cost: (groups, inputs); removing w_j costs w_j^2 / cost_j.
        choose: (scores of a block of columns, first column, last + 1) -> bool, True = kept.
        block_size: columns of a block.

    Returns:
        the updated weights and the mask.
    """
    W, mask = W.clone(), torch.ones_like(W, dtype=torch.bool)
    for start in range(0, W.shape[2], block_size):
        end = min(start + block_size, W.shape[2])
        block, inside = W[:, :, start:end].clone(), U[:, start:end, start:end]
        errors = torch.zeros_like(block)
        pick = _Lazy(choose, start, end)
        for j in range(end - start):
            keep = pick.column(block, cost[:, start:end], j)
            mask[:, :, start + j] = keep
            error = (block[:, :, j] / inside[:, j, j].unsqueeze(1)).masked_fill(keep, 0)
            block[:, :, j:] -= error.unsqueeze(2) * inside[:, j, j:].unsqueeze(1)
            errors[:, :, j] = error
        W[:, :, start:end] = block
        W[:, :, end:] -= errors @ U[:, start:end, end:]
    return W.masked_fill_(~mask, 0), mask


class _Lazy:
    """Asks for the mask of the columns ahead when the sweep reaches them: a block at a time, or a group of N:M."""

    def __init__(self, choose: Choose, start: int, end: int) -> None:
        self.choose, self.start, self.end = choose, start, end
        self.step = getattr(choose, "step", end - start)
        self.mask: Tensor | None = None

    def column(self, block: Tensor, cost: Tensor, j: int) -> Tensor:
        """Return which rows keep column j of the block."""
        if j % self.step == 0:
            ahead = slice(j, j + self.step)
            score = block[:, :, ahead].square() / cost[:, ahead].unsqueeze(1)
            self.mask = self.choose(score, self.start + j, min(self.start + j + self.step, self.end))
        assert self.mask is not None
        return self.mask[:, :, j % self.step]


class _Groups:
    """N of every M along the inputs."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.step = count, size

    def __call__(self, score: Tensor, start: int, end: int) -> Tensor:
        """Return the best `count` of each row of a group."""
        return top_rows(score.reshape(-1, score.shape[2]), self.count).reshape(score.shape)


def _groups_of(pattern: NM, density: float) -> Choose:
    return _Groups(pattern.quota(density, pattern.m), pattern.m)


def _share_of(rows: int, density: float) -> Choose:
    """Return the choice that keeps an even share of every block of columns, exact when summed over the blocks."""

    def choose(score: Tensor, start: int, end: int) -> Tensor:
        return top(score, count_of(density, rows * end) - count_of(density, rows * start))

    return choose


def _given(mask: Tensor) -> Choose:
    return lambda score, start, end: mask[:, :, start:end]


def _inputs_last(shape: torch.Size, width: int) -> Tensor:
    """Return the order of columns that puts the inputs of one kernel position side by side."""
    return torch.arange(width).reshape(shape[1], -1).t().reshape(-1)
