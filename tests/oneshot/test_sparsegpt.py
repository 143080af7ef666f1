from __future__ import annotations

import pytest
import torch
from torch import Tensor

from openwork.core.patterns import NM, Block, Channel, Unstructured
from openwork.core.select import count_of
from openwork.errors import DataError, PatternError
from openwork.oneshot.magnitude import magnitude
from openwork.oneshot.sparsegpt import inverse_hessian, sparsegpt
from openwork.oneshot.statistics import relative_error
from openwork.oneshot.wanda import wanda
from tests.oneshot.networks import correlated, normal


def hessian(X: Tensor, damping: float) -> Tensor:
    H = 2 * X.T @ X
    return H + damping * H.diagonal().mean() * torch.eye(H.shape[0], dtype=H.dtype)


def reference(
    W: Tensor, X: Tensor, density: float, *, block: int, damping: float = 0.01, groups: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """OBS column by column with the inverse of what is left of H, and Gaussian elimination to go on: no Cholesky."""
    W, inverse = W.clone(), torch.linalg.inv(hessian(X, damping))
    rows, width = W.shape
    # costs of all columns: the diagonal of the inverse of H without the columns before
    costs = [torch.linalg.inv(hessian(X, damping)[j:, j:])[0, 0] for j in range(width)]
    mask = torch.ones_like(W, dtype=torch.bool)
    for j in range(width):
        step = groups[1] if groups else block
        if j % step == 0:
            end = min(j + step, width)
            cost = torch.stack([W[:, k] ** 2 / costs[k] for k in range(j, end)], dim=1)
            if groups:
                chosen = torch.zeros_like(cost, dtype=torch.bool)
                for o in range(rows):
                    chosen[o, sorted(range(groups[1]), key=lambda k: (-cost[o, k], k))[: groups[0]]] = True
            else:
                count = count_of(density, rows * end) - count_of(density, rows * j)
                order = sorted(range(cost.numel()), key=lambda k: (-cost.reshape(-1)[k], k))
                chosen = torch.zeros(cost.numel(), dtype=torch.bool)
                chosen[order[:count]] = True
                chosen = chosen.reshape(cost.shape)
            mask[:, j:end] = chosen
        for o in range(rows):
            if not mask[o, j]:
                W[o, j:] -= W[o, j] / inverse[0, 0] * inverse[0]
                W[o, j] = 0
        inverse = inverse[1:, 1:] - torch.outer(inverse[1:, 0], inverse[0, 1:]) / inverse[0, 0]
    return W, mask


@pytest.mark.parametrize("block", [1, 3, 5, 16, 128])
@pytest.mark.parametrize("density", [0.3, 0.5, 0.77])
def test_the_sweep_is_the_optimal_brain_surgeon_column_by_column(block, density):
    W, X = normal(6, 16, dtype=torch.float64), correlated(60, 16)
    found, mask = sparsegpt(W, (X.T @ X)[None], density, Unstructured(), block_size=block)
    expected, kept = reference(W, X, density, block=block)
    assert torch.equal(mask, kept)
    assert torch.allclose(found, expected, atol=1e-8)
    assert int(mask.sum()) == count_of(density, W.numel())
    assert not bool(found[~mask].any())


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4)])
@pytest.mark.parametrize("block", [2, 8, 128])
def test_groups_of_m_are_chosen_when_the_sweep_reaches_them(n, m, block):
    W, X = normal(5, 16, dtype=torch.float64), correlated(60, 16)
    found, mask = sparsegpt(W, (X.T @ X)[None], n / m, NM(n, m), block_size=block)
    expected, kept = reference(W, X, n / m, block=block, groups=(n, m))
    assert torch.equal(mask, kept)
    assert torch.allclose(found, expected, atol=1e-8)
    NM(n, m).check(mask)


def test_in_float32_it_agrees_to_five_digits():
    W, X = normal(8, 32), correlated(200, 32)
    gram = (X.T @ X)[None]
    found, mask = sparsegpt(W, gram.float(), 0.5, NM(2, 4))
    exact, kept = sparsegpt(W.double(), gram, 0.5, NM(2, 4))
    assert torch.equal(mask, kept)
    assert torch.allclose(found.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("q", [0, 3, 7])
def test_one_removal_is_the_closed_form(q):
    """w_q^2 / [H^-1]_qq and -w_q / [H^-1]_qq H^-1_q, over the columns that the sweep has not passed."""
    W, X = normal(1, 8, dtype=torch.float64), correlated(40, 8)
    W[0] += 10 * W[0].sign()  # all but one are dear to lose
    W[0, q] = 1e-3
    H = hessian(X, 0.01)[q:, q:]
    inverse = torch.linalg.inv(H)
    found, mask = sparsegpt(W, (X.T @ X)[None], 7 / 8, Unstructured())
    assert (~mask).nonzero().tolist() == [[0, q]]
    delta = -W[0, q] / inverse[0, 0] * inverse[0]
    assert torch.allclose(found[0, q:] - W[0, q:], delta, atol=1e-10)
    assert torch.equal(found[0, :q], W[0, :q])
    increase = delta @ H @ delta / 2  # the quadratic model's loss
    assert torch.allclose(increase, W[0, q] ** 2 / inverse[0, 0] / 2, rtol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_at_density_one_nothing_changes(dtype):
    W = normal(4, 8, dtype=dtype)
    found, mask = sparsegpt(W, torch.zeros(1, 8, 8, dtype=torch.float64), 1.0, Unstructured())
    assert torch.equal(found.to(dtype), W)
    assert bool(mask.all())


def test_without_correlation_the_others_do_not_move():
    W = normal(4, 8, dtype=torch.float64)
    found, mask = sparsegpt(W, torch.eye(8, dtype=torch.float64)[None], 0.5, Unstructured())
    assert torch.equal(found, W.masked_fill(~mask, 0))
    assert torch.equal(mask, magnitude(W, 0.5, Unstructured()))


def test_much_damping_turns_the_update_off():
    W, X = normal(6, 12, dtype=torch.float64), correlated(50, 12)
    gram = (X.T @ X)[None]
    moved = []
    for damping in (0.01, 1.0, 100.0, 1e6):
        found, mask = sparsegpt(W, gram, 0.5, Unstructured(), damping=damping)
        moved.append(float((found - W)[mask].norm()))
    assert moved == sorted(moved, reverse=True)
    assert moved[-1] < 1e-3 * moved[0]


def test_dead_inputs_go_first_and_disturb_nobody():
    W, X = normal(4, 8, dtype=torch.float64), correlated(50, 8)
    X[:, 2] = 0
    found, mask = sparsegpt(W, (X.T @ X)[None], 0.5, Unstructured())
    assert not bool(mask[:, 2].any())
    live = [0, 1, 3, 4, 5, 6, 7]
    lone, lone_mask = sparsegpt(W[:, live], (X[:, live].T @ X[:, live])[None], 16 / 28, Unstructured())
    assert torch.equal(mask[:, live], lone_mask)
    assert torch.allclose(found[:, live], lone, atol=1e-12)


def test_a_weight_of_a_dead_input_that_is_kept_stays_as_it_is():
    W = normal(3, 4, dtype=torch.float64)
    gram = torch.diag(torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64))
    found, mask = sparsegpt(W, gram[None], 0.75, Unstructured())
    assert torch.equal(found, W.masked_fill(~mask, 0))


def test_a_singular_gram_matrix_without_damping_is_refused():
    X = normal(3, 8, dtype=torch.float64)
    with pytest.raises(DataError, match=r"singular at damping=0"):
        inverse_hessian((X.T @ X)[None], 0.0)


def test_the_gram_matrix_is_left_alone():
    X = correlated(40, 8)
    gram = (X.T @ X)[None]
    before = gram.clone()
    sparsegpt(normal(4, 8, dtype=torch.float64), gram, 0.5, Unstructured())
    assert torch.equal(gram, before)


def test_groups_are_pruned_as_layers_of_their_own():
    X = torch.stack([correlated(50, 6, seed=s) for s in (0, 5)])
    grams = X.transpose(1, 2) @ X
    W = normal(8, 6, 1, 1, dtype=torch.float64)
    found, mask = sparsegpt(W, grams, 0.5, NM(1, 2))
    for g in range(2):
        alone, kept = sparsegpt(W[4 * g : 4 * g + 4].flatten(1), grams[g : g + 1], 0.5, NM(1, 2))
        assert torch.equal(mask[4 * g : 4 * g + 4].flatten(1), kept)
        assert torch.allclose(found[4 * g : 4 * g + 4].flatten(1), alone, atol=1e-12)


def test_groups_of_m_inputs_of_a_convolution_lie_at_one_kernel_position():
    W = normal(4, 4, 3, 3, dtype=torch.float64)
    X = correlated(200, 36)
    found, mask = sparsegpt(W, (X.T @ X)[None], 0.5, NM(2, 4))
    NM(2, 4).check(mask)
    assert not bool(found[~mask].any())
    order = torch.arange(36).reshape(4, 9).t().reshape(-1)
    flat, kept = sparsegpt(W.flatten(1)[:, order], (X.T @ X)[order][:, order][None], 0.5, NM(2, 4))
    assert torch.equal(mask.flatten(1)[:, order], kept)
    assert torch.allclose(found.flatten(1)[:, order], flat, atol=1e-12)


@pytest.mark.parametrize("pattern", [Block(2, 4), NM(2, 4, dim=0), Channel(1)])
def test_other_patterns_choose_whole_units_and_update_the_rest(pattern):
    W, X = normal(8, 12, dtype=torch.float64), correlated(80, 12)
    gram = (X.T @ X)[None]
    found, mask = sparsegpt(W, gram, 0.5, pattern)
    pattern.check(mask)
    assert not bool(found[~mask].any())
    assert relative_error(W[None], found[None], gram) < relative_error(W[None], W.masked_fill(~mask, 0)[None], gram)


def test_on_correlated_inputs_sparsegpt_beats_wanda_beats_magnitude():
    errors = []
    for seed in range(6):
        W, X = normal(24, 32, seed=seed, dtype=torch.float64), correlated(300, 32, seed=seed)
        gram, squares = (X.T @ X)[None], X.square().sum(0, keepdim=True)
        masks = [magnitude(W, 0.5, Unstructured()), wanda(W, squares, 0.5, Unstructured())]
        found = [W.masked_fill(~mask, 0) for mask in masks] + [sparsegpt(W, gram, 0.5, Unstructured())[0]]
        errors.append([relative_error(W[None], one[None], gram) for one in found])
    plain, weighed, updated = torch.tensor(errors).mean(dim=0).tolist()
    assert updated < weighed < plain


def test_a_width_that_is_no_multiple_of_m_is_refused():
    with pytest.raises(PatternError, match="multiple of 4"):
        sparsegpt(normal(2, 6), torch.eye(6)[None], 0.5, NM(2, 4))
