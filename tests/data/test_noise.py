from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from openwork.data.noise import Noise


def draw() -> list[float]:
    return [float(torch.rand(())), float(np.random.rand()), random.random()]


def states() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()


def test_what_is_drawn_inside_goes_on_and_the_outside_does_not_see_it() -> None:
    before = states()
    noise = Noise(5)
    with noise.lent():
        first = draw()
    with noise.lent():
        second = draw()
    assert states() == before
    again = Noise(5)
    with again.lent():
        assert draw() + draw() == first + second
    with Noise(6).lent():
        assert draw() != first
    assert states() == before


def test_what_is_drawn_outside_does_not_matter_inside() -> None:
    one, two = Noise(5), Noise(5)
    with one.lent():
        first = draw()
    with one.lent():
        second = draw()
    with two.lent():
        assert draw() == first
    kept = states()
    draw()
    with two.lent():
        assert draw() == second
    torch.set_rng_state(torch.tensor(kept[0], dtype=torch.uint8))


def test_an_error_inside_gives_the_generators_back() -> None:
    before = states()
    with pytest.raises(ZeroDivisionError), Noise(1).lent():
        _ = draw()[0] / 0
    assert states() == before


def test_a_generator_of_ones_own_is_lent_too() -> None:
    own = torch.Generator().manual_seed(3)
    before = own.get_state()
    with Noise(9, [own]).lent():
        inside = float(torch.rand((), generator=own))
    assert torch.equal(own.get_state(), before)
    assert inside == float(torch.rand((), generator=torch.Generator().manual_seed(9)))
