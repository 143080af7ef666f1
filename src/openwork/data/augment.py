"""Random changes of training images, a whole batch at a time; each draw is the batch's own.

"shift" moves by up to an eighth of the side. "flip-shift" is the usual one for CIFAR: a crop after padding by 4 and a
mirror image every other time (He, Zhang, Ren, Sun, "Deep Residual Learning", CVPR 2016, Sec. 4.2). "rotate" turns by
up to 15 degrees. What comes in from outside is 0, the pixel value.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from openwork.data.geometry import rotate as turn
from openwork.errors import DataError

ANGLE = 15.0


def shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move each of (n, c, h, w) images by up to h // 8 rows and w // 8 columns, uniformly."""
    return _crop(images, images.shape[-2] // 8, images.shape[-1] // 8, generator)


def flip_shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """Crop each of (n, c, h, w) images after padding by 4, and mirror it left to right with probability 1/2."""
    images = _crop(images, 4, 4, generator)
    mirrored = torch.randint(0, 2, (images.shape[0], 1, 1, 1), generator=generator, dtype=torch.bool)
    return torch.where(mirrored, images.flip(-1), images)


def rotate(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn each of (n, c, h, w) images by up to 15 degrees either way, uniformly; gives float32 in the same unit."""
    angles = (2 * torch.rand(images.shape[0], generator=generator) - 1) * ANGLE
    return turn(images.float(), angles)


KINDS: dict[str, Callable[[Tensor, torch.Generator], Tensor] | None] = {
    "none": None,
    "shift": shift,
    "flip-shift": flip_shift,
    "rotate": rotate,
}


def chosen(name: str, input_shape: tuple[int, ...]) -> Callable[[Tensor, torch.Generator], Tensor] | None:
    """Return the augmentation called `name` for examples of this shape, None for "none".

    Raises:
        DataError: if there is none, or the examples are no images.
    """
    if name not in KINDS:
        raise DataError(f"there is no augmentation {name!r}; known: {', '.join(KINDS)}")
    if KINDS[name] is not None and len(input_shape) != 3:
        raise DataError(
            f"augmentation {name!r} needs images (channels, height, width), the examples have shape {input_shape}"
        )
    return KINDS[name]


def _crop(images: Tensor, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Pad by zeros and cut the old size out again, at a place of its own for every image (first rows, then columns)."""
    n, _, height, width = images.shape
    down = torch.randint(0, 2 * rows + 1, (n,), generator=generator)
    right = torch.randint(0, 2 * columns + 1, (n,), generator=generator)
    padded = functional.pad(images, (columns, columns, rows, rows))
    return padded.unfold(2, height, 1).unfold(3, width, 1)[torch.arange(n), :, down, right]
