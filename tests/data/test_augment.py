"""Each augmentation against a loop over images and pixels that makes the same draws."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from openwork.core.rng import generator
from openwork.data import augment
from openwork.data.geometry import rotate
from openwork.errors import DataError


def cropped(image: Tensor, down: int, right: int, rows: int, columns: int) -> Tensor:
    result = torch.zeros_like(image)
    height, width = image.shape[-2:]
    for i in range(height):
        for j in range(width):
            a, b = i + down - rows, j + right - columns
            if 0 <= a < height and 0 <= b < width:
                result[:, i, j] = image[:, a, b]
    return result


def turned(image: Tensor, degrees: float) -> Tensor:
    """Turn counter-clockwise on the screen (rows go down), bilinear, zeros from outside."""
    height, width = image.shape[-2:]
    result = torch.zeros_like(image)
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    for i in range(height):
        for j in range(width):
            x, y = j - (width - 1) / 2, i - (height - 1) / 2
            b, a = cos * x - sin * y + (width - 1) / 2, sin * x + cos * y + (height - 1) / 2
            top, left = math.floor(a), math.floor(b)
            for p, u in ((top, 1 - (a - top)), (top + 1, a - top)):
                for q, v in ((left, 1 - (b - left)), (left + 1, b - left)):
                    if 0 <= p < height and 0 <= q < width:
                        result[:, i, j] += u * v * image[:, p, q]
    return result


@pytest.mark.parametrize("size", [(28, 28), (8, 8), (9, 17), (5, 5)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_shift_is_the_loop(size: tuple[int, int], dtype: torch.dtype) -> None:
    images = torch.randint(1, 255, (6, 2, *size), generator=generator(0)).to(dtype)
    rows, columns = size[0] // 8, size[1] // 8
    draws = generator(4, "shift")
    down = torch.randint(0, 2 * rows + 1, (6,), generator=draws).tolist()
    right = torch.randint(0, 2 * columns + 1, (6,), generator=draws).tolist()
    expected = torch.stack([cropped(images[k], down[k], right[k], rows, columns) for k in range(6)])
    found = augment.shift(images, generator(4, "shift"))
    assert found.dtype == dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("size", [(32, 32), (6, 9)])
def test_flip_shift_is_the_loop(size: tuple[int, int]) -> None:
    images = torch.randint(1, 255, (12, 3, *size), generator=generator(0)).to(torch.uint8)
    draws = generator(4, "flip")
    down, right = (torch.randint(0, 9, (12,), generator=draws).tolist() for _ in range(2))
    mirrored = torch.randint(0, 2, (12, 1, 1, 1), generator=draws, dtype=torch.bool).flatten().tolist()
    assert 0 < sum(mirrored) < 12
    found = augment.flip_shift(images, generator(4, "flip"))
    for k in range(12):
        expected = cropped(images[k], down[k], right[k], 4, 4)
        assert torch.equal(found[k], expected.flip(-1) if mirrored[k] else expected)


@pytest.mark.parametrize("size", [(8, 8), (7, 12)])
def test_rotate_is_the_loop(size: tuple[int, int]) -> None:
    images = torch.randint(0, 256, (5, 2, *size), generator=generator(0)).to(torch.uint8)
    angles = (2 * torch.rand(5, generator=generator(4, "turn")) - 1) * 15
    expected = torch.stack([turned(images[k].float(), float(angles[k])) for k in range(5)])
    found = augment.rotate(images, generator(4, "turn"))
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, atol=1e-3)


def test_quarter_turns_are_exact() -> None:
    images = torch.rand(3, 2, 6, 6, generator=generator(0))
    found = rotate(images, torch.tensor([90.0, 180.0, -90.0]))
    expected = torch.stack([torch.rot90(image, k, (1, 2)) for image, k in zip(images, (1, 2, 3), strict=True)])
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(rotate(images, torch.zeros(3)), images, atol=1e-6)


def test_all_places_are_equally_likely() -> None:
    image = torch.zeros(1, 1, 16, 16)
    image[0, 0, 8, 8] = 1
    found = augment.shift(image.expand(25_000, 1, 16, 16), generator(0, "fair"))
    counts = found.sum((0, 1))
    assert counts.sum() == 25_000
    assert counts.count_nonzero() == 25
    assert (counts[6:11, 6:11] - 1000).abs().max() < 125  # 4 standard deviations


def test_names() -> None:
    assert augment.chosen("none", (5,)) is None
    assert augment.chosen("flip-shift", (3, 32, 32)) is augment.flip_shift
    with pytest.raises(DataError, match="no augmentation 'mixup'; known: none, shift, flip-shift, rotate"):
        augment.chosen("mixup", (3, 32, 32))
    with pytest.raises(DataError, match=r"needs images .* shape \(64,\)"):
        augment.chosen("shift", (64,))
