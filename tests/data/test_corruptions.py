from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from openwork.core.rng import generator
from openwork.data import corruptions
from openwork.data.corruptions import KINDS, corrupt
from openwork.errors import DataError


def images(size: tuple[int, int] = (28, 28), n: int = 20) -> Tensor:
    return torch.rand(n, 3, *size, generator=generator(0, "images"), dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_images_and_nothing_leaves_the_range(kind: str) -> None:
    x = images()
    before = x.clone()
    state = torch.get_rng_state()
    for severity in range(1, 6):
        found = corrupt(x, kind, severity, seed=5)
        assert torch.equal(found, corrupt(x, kind, severity, seed=5))
        assert found.shape == x.shape
        assert found.dtype == x.dtype
        assert found.min() >= 0
        assert found.max() <= 1
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", KINDS)
def test_more_severe_is_further_off(kind: str) -> None:
    # Smooth images, as noise is already what a turn would make of it.
    x = corrupt(corrupt(images(), "blur", 5), "blur", 5)
    away = [float((corrupt(x, kind, severity) - x).square().mean()) for severity in range(1, 6)]
    assert away == sorted(away)
    assert 0 < away[0] < away[-1]


@pytest.mark.parametrize("kind", ["gaussian-noise", "rotation"])
def test_another_seed_gives_another_draw(kind: str) -> None:
    x = images()
    assert not torch.equal(corrupt(x, kind, 3, seed=0), corrupt(x, kind, 3, seed=1))


@pytest.mark.parametrize("kind", ["blur", "contrast", "pixelate"])
@pytest.mark.parametrize("size", [(28, 28), (32, 17), (8, 8), (3, 5)])
def test_the_mean_of_every_channel_is_kept(kind: str, size: tuple[int, int]) -> None:
    x = images(size)
    for severity in range(1, 6):
        assert torch.allclose(corrupt(x, kind, severity).mean((2, 3)), x.mean((2, 3)), atol=1e-12)


@pytest.mark.parametrize("kind", ["blur", "pixelate", "contrast"])
def test_a_plain_image_stays(kind: str) -> None:
    x = torch.full((2, 1, 9, 7), 0.3, dtype=torch.float64)
    assert torch.allclose(corrupt(x, kind, 5), x, atol=1e-12)


@pytest.mark.parametrize(("severity", "sigma"), list(enumerate((0.4, 0.6, 0.7, 0.8, 1.0), 1)))
def test_blur_is_scipys(severity: int, sigma: float) -> None:
    from scipy.ndimage import gaussian_filter

    x = images((11, 16), n=3)
    expected = gaussian_filter(x.numpy(), sigma, axes=(2, 3), mode="reflect", truncate=4.0)
    assert np.allclose(corrupt(x, "blur", severity).numpy(), expected, atol=1e-12)


def test_blur_wider_than_the_image_is_scipys() -> None:
    from scipy.ndimage import gaussian_filter1d

    x = images((3, 3), n=1)[0, 0, 0]
    expected = gaussian_filter1d(x.numpy(), 2.0, mode="reflect", truncate=4.0)
    assert np.allclose((corruptions.blur_matrix(3, 2.0) @ x).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize(("severity", "factor"), list(enumerate((0.75, 0.5, 0.4, 0.3, 0.15), 1)))
def test_contrast_is_the_formula(severity: int, factor: float) -> None:
    x = images()
    mean = x.mean((2, 3), keepdim=True)
    assert torch.allclose(corrupt(x, "contrast", severity), mean + factor * (x - mean), atol=1e-12)


def test_pixels_that_fit_are_block_means() -> None:
    """At severity 4 a side of 4 has int(4 * 0.75) = 3 cells; at a side of 20, 15; a side cut in halves is block means."""
    x = images((6, 6), n=2)
    half = corruptions.pixel_matrix(6, 3)
    blocks = x.view(2, 3, 3, 2, 3, 2).mean((3, 5)).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.allclose(half @ x @ half.T, blocks, atol=1e-12)


def test_pixels_that_do_not_fit_weigh_by_area() -> None:
    """Three pixels in two cells of 1.5: the middle one counts half in each."""
    third = 1 / 3
    expected = torch.tensor([[2 * third, third, 0], [third, third, third], [0, third, 2 * third]], dtype=torch.float64)
    assert torch.allclose(corruptions.pixel_matrix(3, 2), expected)


def test_noise_has_its_deviation() -> None:
    x = torch.full((40, 1, 50, 50), 0.5, dtype=torch.float64)
    for severity, deviation in enumerate((0.04, 0.06, 0.08, 0.09, 0.10), 1):
        noise = corrupt(x, "gaussian-noise", severity) - x
        assert abs(float(noise.mean())) < 4 * deviation / 100_000**0.5
        assert abs(float(noise.std()) / deviation - 1) < 0.01


def test_rotation_turns_to_either_side() -> None:
    from openwork.data.geometry import rotate

    x = images(n=40)
    found = corrupt(x, "rotation", 2)
    left, right = (rotate(x, torch.full((40,), angle)) for angle in (20.0, -20.0))
    sides = [torch.allclose(a, b) for a, b in zip(found, left, strict=True)]
    assert all(side or torch.allclose(a, b) for side, a, b in zip(sides, found, right, strict=True))
    assert 5 < sum(sides) < 35


@pytest.mark.parametrize("severity", [0, 6, 2.5, None])
def test_a_senseless_severity_is_told(severity: int) -> None:
    with pytest.raises(DataError, match="severity is"):
        corrupt(images(), "blur", severity)


def test_what_is_no_image_is_told() -> None:
    with pytest.raises(DataError, match="no corruption 'fog'; known: gaussian-noise, blur"):
        corrupt(images(), "fog", 1)
    with pytest.raises(DataError, match=r"in \[0, 1\]"):
        corrupt(images() * 255, "blur", 1)
    with pytest.raises(DataError, match=r"in \[0, 1\]"):
        corrupt(images() / 0, "blur", 1)
    with pytest.raises(DataError, match="floating images"):
        corrupt(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), "blur", 1)
    with pytest.raises(DataError, match="floating images"):
        corrupt(torch.zeros(4, 4), "blur", 1)
