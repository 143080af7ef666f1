"""Corruptions of test images at five severities, for studies of robustness.

The strengths of noise, blur, contrast and pixels are those of CIFAR-10-C: Hendrycks, Dietterich, "Benchmarking Neural
Network Robustness to Common Corruptions and Perturbations", ICLR 2019. Rotation is not one of theirs; its angles are
our own. Departures: blur mirrors the image at its rim and pixels weigh by area, so that both keep the mean exactly.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from openwork.core.rng import generator
from openwork.data.geometry import rotate
from openwork.errors import DataError

NOISE = (0.04, 0.06, 0.08, 0.09, 0.10)
"""Standard deviation."""
BLUR = (0.4, 0.6, 0.7, 0.8, 1.0)
"""Standard deviation of the Gaussian, in pixels."""
CONTRAST = (0.75, 0.5, 0.4, 0.3, 0.15)
"""Factor of the differences from the mean of a channel."""
PIXELATE = (0.95, 0.9, 0.85, 0.75, 0.65)
"""Share of the side that is left in pixels."""
ROTATION = (10.0, 20.0, 30.0, 40.0, 50.0)
"""Degrees, to either side."""


def corrupt(images: Tensor, kind: str, severity: int, seed: int = 0) -> Tensor:
    """Return corrupted images, a pure function of the arguments.

    Args:
        images: (n, c, h, w) floating, in [0, 1].
        kind: "gaussian-noise", "blur", "contrast", "pixelate" or "rotation".
        severity: 1 (weak) to 5.
        seed: of the noise and of the sides that images turn to.

    Returns:
        (n, c, h, w) in [0, 1].

    Raises:
        DataError: if the images, kind or severity are none of these.
    """
    check(kind, severity)
    if images.dim() != 4 or not images.is_floating_point():
        raise DataError(f"corruptions take floating images (n, c, h, w), got {images.dtype} {tuple(images.shape)}")
    if not ((images >= 0) & (images <= 1)).all():
        raise DataError(f"corruptions take images in [0, 1], got {float(images.min())} to {float(images.max())}")
    changed = _KINDS[kind](images, severity - 1, generator(seed, "corruption", kind, severity))
    return changed.clamp_(0, 1)


def check(kind: str, severity: int) -> None:
    """Raise a DataError unless there is such a corruption."""
    if kind not in KINDS:
        raise DataError(f"there is no corruption {kind!r}; known: {', '.join(KINDS)}")
    if severity not in (1, 2, 3, 4, 5):
        raise DataError(f"severity is {severity!r}; it must be 1 to 5")


def _noise(images: Tensor, level: int, generator: torch.Generator) -> Tensor:
    return images + NOISE[level] * torch.randn(images.shape, generator=generator, dtype=images.dtype)


def _blur(images: Tensor, level: int, _: torch.Generator) -> Tensor:
    down, across = (blur_matrix(side, BLUR[level]).to(images.dtype) for side in images.shape[-2:])
    return down @ images @ across.T


def _contrast(images: Tensor, level: int, _: torch.Generator) -> Tensor:
    mean = images.mean((-2, -1), keepdim=True)
    return (images - mean) * CONTRAST[level] + mean


def _pixelate(images: Tensor, level: int, _: torch.Generator) -> Tensor:
    cells = [max(1, int(side * PIXELATE[level])) for side in images.shape[-2:]]
    down, across = (pixel_matrix(side, cell).to(images.dtype) for side, cell in zip(images.shape[-2:], cells, strict=True))
    return down @ images @ across.T


def _rotation(images: Tensor, level: int, generator: torch.Generator) -> Tensor:
    side = 2 * torch.randint(0, 2, (images.shape[0],), generator=generator) - 1
    return rotate(images, side * ROTATION[level])


def blur_matrix(side: int, sigma: float) -> Tensor:
    """Return the (side, side) float64 matrix of a Gaussian blur, cut at 4 sigma, mirrored at the rim.

    Symmetric, its rows sum to 1: so do its columns, and the mean is kept.
    """
    reach = int(4 * sigma + 0.5)
    offsets = torch.arange(-reach, reach + 1)
    weights = torch.exp(-0.5 * (offsets.double() / sigma) ** 2)
    places = (torch.arange(side)[:, None] + offsets) % (2 * side)
    places = torch.where(places < side, places, 2 * side - 1 - places)
    matrix = torch.zeros(side, side, dtype=torch.float64)
    return matrix.scatter_add_(1, places, (weights / weights.sum()).expand(side, -1).contiguous())


def pixel_matrix(side: int, cells: int) -> Tensor:
    """Return the (side, side) float64 matrix that averages over `cells` equal stretches and spreads them again.

    A pixel that lies in two stretches counts by its part in each. Symmetric, its rows sum to 1.
    """
    edges = torch.linspace(0, side, cells + 1, dtype=torch.float64)
    pixels = torch.arange(side, dtype=torch.float64)
    right = torch.minimum(edges[1:, None], pixels + 1)
    overlap = (right - torch.maximum(edges[:-1, None], pixels)).clamp_min(0)
    return overlap.T @ overlap * (cells / side)


_KINDS: dict[str, Callable[[Tensor, int, torch.Generator], Tensor]] = {
    "gaussian-noise": _noise,
    "blur": _blur,
    "contrast": _contrast,
    "pixelate": _pixelate,
    "rotation": _rotation,
}
KINDS = tuple(_KINDS)
"""The names of the corruptions."""
