"""What is known of a named data set before it is read: plain data, without torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from numpy import uint8
    from numpy.typing import NDArray

    Bytes = NDArray[uint8]


Kind = Literal["classification", "images", "text", "model"]
"""Examples with classes; images alone; text or records of text (`openwork.data.texts`); a pretrained model's files."""


@dataclass(frozen=True)
class File:
    """A file that a set is read from.

    Attributes:
        name: its name in the folder of the set.
        homes: https addresses, tried in this order.
        sha256: checksum of the file as its home serves it; the one that is checked.
        md5: the checksum that the home or its readers publish, for reference.
        size: bytes.
        content: sha256 of the decompressed bytes where known, so that a copy that was packed again counts as intact.
    """

    name: str
    homes: tuple[str, ...]
    sha256: str
    md5: str
    size: int
    content: str | None = None


@dataclass(frozen=True)
class Raw:
    """A set as read: images (n, channels, height, width) uint8 and class numbers (n,) uint8.

    Attributes:
        name: what to report it as, the entry's name unless it is a substitute.
        train: images and classes to train on.
        test: images and classes to test on.
        unit: the pixel value that stands for 1.
    """

    name: str
    train: tuple[Bytes, Bytes]
    test: tuple[Bytes, Bytes]
    unit: float = 255.0


@dataclass(frozen=True)
class Entry:
    """A named set.

    Attributes:
        name: what `load` or `load_images` takes.
        what: a few words on the content.
        shape: shape of one example, (channels, height, width); zeros where there are no images.
        classes: how many; 0 for images without classes.
        sizes: examples to train on and to test on.
        home: web page.
        licence: its terms, as the home states them.
        citation: whom to cite.
        read: gives the content; may download.
        files: what it is read from; none if it comes with an installed library.
        kind: what it is for.
        substitute: tells in a few words which other copy stands in when the files are not there, None if none does.
        identity: text that changes with the content; by default made from the checksums.
    """

    name: str
    what: str
    shape: tuple[int, int, int]
    classes: int
    sizes: tuple[int, int]
    home: str
    licence: str
    citation: str
    read: Callable[[Entry], Raw]
    files: tuple[File, ...] = ()
    kind: Kind = "classification"
    substitute: Callable[[], str | None] | None = None
    identity: Callable[[Entry], str] | None = None

    def size(self) -> int:
        """Return the bytes of all files together."""
        return sum(file.size for file in self.files)
