"""Turning images about their centre."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Turn each image counter-clockwise by its own angle, bilinear, with zeros from outside.

    Args:
        images: (n, c, h, w) floating.
        degrees: (n,) angles.

    Returns:
        (n, c, h, w), the dtype of `images`.
    """
    height, width = images.shape[-2:]
    angle = torch.deg2rad(degrees.double())
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    # The grid maps places of the result to places of the image, in units of half a side.
    theta = torch.stack([cos, -sin * height / width, zero, sin * width / height, cos, zero], -1).view(-1, 2, 3)
    grid = functional.affine_grid(theta.to(images.dtype), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
