from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from openwork.core.rng import generator
from openwork.nn import exchange
from openwork.sparsifier.optimizers import clear_state
from openwork.sparsifier.prune_grow import prune_and_grow
from tests.strategies import densities, quick, seeds, tensor

SHAPE = torch.Size((5, 7))


def mask_of(flat: Tensor) -> Tensor:
    mask = torch.zeros(SHAPE.numel(), dtype=torch.bool)
    mask[flat] = True
    return mask.reshape(SHAPE)


def case(density: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return a mask and its flat positions."""
    mask = torch.rand(SHAPE, generator=generator(seed, "exchange")) < density
    return mask, mask.reshape(-1).nonzero().squeeze(1)


@given(density=densities, seed=seeds, share=st.floats(0, 1), levels=st.sampled_from([None, 1, 2, 5]))
@quick
def test_growth_by_score_is_prune_and_grow_when_everything_is_watched(
    density: float, seed: int, share: float, levels: int | None
) -> None:
    mask, flat = case(density, seed)
    drop, grow = (tensor(SHAPE, seed + k, torch.float32, levels).abs() for k in range(2))
    expected = prune_and_grow(mask, drop, grow, share)
    others = (~mask).reshape(-1).nonzero().squeeze(1)
    stay = exchange.survivors(drop[mask], int(share * flat.numel() + 1e-9))
    grown = exchange.grown_by_score(flat, stay, grow[mask], others, grow.reshape(-1)[others])
    after, source = exchange.merged(flat, stay, grown)
    assert torch.equal(mask_of(after), expected)
    assert torch.equal(source >= 0, mask.reshape(-1)[after])


@given(density=densities, seed=seeds, share=st.floats(0, 1))
@quick
def test_random_growth_keeps_the_survivors_and_the_number(density: float, seed: int, share: float) -> None:
    mask, flat = case(density, seed)
    count = int(share * flat.numel() + 1e-9)
    drop = tensor(SHAPE, seed, torch.float32).abs()
    stay = exchange.survivors(drop[mask], count)
    after, source = exchange.merged(flat, stay, exchange.grown_at_random(flat, stay, SHAPE.numel(), generator(seed, "grow")))
    assert after.numel() == flat.numel()
    assert bool((after.diff() > 0).all())
    assert set(flat[stay].tolist()) <= set(after.tolist())
    for place, where in zip(after.tolist(), source.tolist(), strict=True):
        assert flat[where] == place if where >= 0 else not mask.reshape(-1)[place]


def test_random_growth_reaches_every_position_that_is_off_those_just_dropped_included() -> None:
    flat, stay = torch.tensor([1, 3, 4]), torch.tensor([False, True, True])
    source = generator(0, "reach")
    seen = {int(exchange.grown_at_random(flat, stay, 6, source)) for _ in range(200)}
    assert seen == {0, 1, 2, 5}


@given(density=densities, seed=seeds, block=st.sampled_from([1, 2, 4]))
@quick
def test_values_move_as_they_would_in_a_dense_tensor(density: float, seed: int, block: int) -> None:
    _, flat = case(density, seed)
    stay = torch.rand(flat.shape, generator=generator(seed, "stay")) < 0.5
    grown = exchange.grown_at_random(flat, stay, SHAPE.numel(), generator(seed, "grow"))
    after, source = exchange.merged(flat, stay, grown)
    old = tensor(torch.Size((flat.numel() * block,)), seed, torch.float32)
    dense = torch.full((SHAPE.numel(), block), 0.25)
    dense[flat] = old.reshape(-1, block)
    assert torch.equal(exchange.moved(old, source, 0.25), dense[after].reshape(-1))


def test_optimizer_state_moves_and_is_fresh_where_an_entry_is_new() -> None:
    mask, flat = case(0.4, 3)
    stay = torch.arange(flat.numel()) % 3 > 0
    grown = exchange.grown_at_random(flat, stay, SHAPE.numel(), generator(0, "grow"))
    after, source = exchange.merged(flat, stay, grown)
    changed = mask ^ mask_of(after)
    for build in (
        lambda p: torch.optim.Adam(p, amsgrad=True),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
        lambda p: torch.optim.Adagrad(p, initial_accumulator_value=0.5),
        lambda p: torch.optim.Rprop(p, lr=0.3),
    ):
        start = tensor(SHAPE, 1, torch.float32) * mask
        dense, sparse = nn.Parameter(start.clone()), nn.Parameter(start[mask])
        twins = [build([dense]), build([sparse])]
        for turn in range(2):
            dense.grad = tensor(SHAPE, 5 + turn, torch.float32) * mask
            sparse.grad = dense.grad[mask]
            for optimizer in twins:
                optimizer.step()
        exchange.move(sparse, source, [twins[1]])
        with torch.no_grad():
            dense[changed] = 0.0
        fresh = exchange.fresh_values(twins[0])
        clear_state(twins[0], dense, changed, fresh)
        now = mask_of(after)
        assert torch.equal(dense.detach()[now], sparse.detach())
        state = twins[0].state[dense]
        assert any(value.shape == SHAPE for value in state.values() if isinstance(value, Tensor))
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == SHAPE:
                assert torch.equal(value[now], twins[1].state[sparse][key])
            else:
                assert twins[1].state[sparse][key] == value
