"""How the runtime lays out images: channel by channel, rows with a gap of zeros between them, planes apart.

A row of `width` pixels is followed by `pad` zeros, which are the right border of this row and the left border of the
next; before the first row and after the last there are zeros as well. So a k x k convolution of stride 1 is one product
over flattened columns: each tap is a constant offset, and no border is a special case. Kernels that write planes write
zero into the gaps. Planes start on a cache line, an odd number of lines apart, so that the columns of many channels
spread over the whole first cache.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

LINE = 16
"""Floats of a cache line; also the most lanes of a vector."""


@dataclass(frozen=True)
class Planes:
    """The shape and the place of images (batch, channels, height, width) in memory.

    Attributes:
        batch, channels, height, width: sizes.
        pad: zeros between rows; the widest border that a reader needs.
        address: of pixel (0, 0) of the first plane of the first image, in bytes; 0 while there is no memory yet.
    """

    batch: int
    channels: int
    height: int
    width: int
    pad: int = 0
    address: int = 0

    @property
    def pitch(self) -> int:
        """Floats from a row to the next."""
        return self.width + self.pad

    @property
    def columns(self) -> int:
        """Flattened columns of a plane, gaps included."""
        return self.height * self.pitch

    @property
    def border(self) -> int:
        """Zeros that come before the first pixel of a plane, and after its columns: `pad` rows and `pad` pixels."""
        return -(-self.pad * (self.pitch + 1) // LINE) * LINE

    @property
    def plane(self) -> int:
        """Floats from a channel to the next: an odd number of cache lines, room for whole vectors and the border."""
        lines = -(-self.columns // LINE) + self.border // LINE
        return (lines | 1) * LINE

    @property
    def image(self) -> int:
        """Floats from an image to the next."""
        return self.channels * self.plane

    @property
    def floats(self) -> int:
        """Floats that the memory of all images takes, the border before the first included."""
        return self.border + self.batch * self.image + self.border + LINE

    @property
    def origin(self) -> int:
        """Floats from the start of the memory (on a cache line) to pixel (0, 0)."""
        return self.border

    def kept(self) -> npt.NDArray[np.int32]:
        """Return int32 words for the columns, rounded up to a cache line: 1 for a pixel, 0 in the gaps and after the end."""
        return _kept(self.height, self.width, self.pad)


@functools.lru_cache(256)
def _kept(height: int, width: int, pad: int) -> npt.NDArray[np.int32]:
    columns = height * (width + pad)
    words = np.zeros(-(-columns // LINE) * LINE, np.int32)
    words[:columns].reshape(height, width + pad)[:, :width] = 1
    return words
