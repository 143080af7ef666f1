"""CIFAR-10 and CIFAR-100, from the binary archives of their home: records of labels and 3x32x32 bytes, no pickle.

Checksums as on the home page (md5) and in TensorFlow Datasets (sha256, size).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from openwork.data import archives, files, jpeg_copy
from openwork.data.entry import Entry, File, Raw
from openwork.errors import DataError

if TYPE_CHECKING:
    from openwork.data.entry import Bytes

PIXELS = 3 * 32 * 32
_TEN = ([f"cifar-10-batches-bin/data_batch_{i}.bin" for i in range(1, 6)], ["cifar-10-batches-bin/test_batch.bin"])
_HUNDRED = (["cifar-100-binary/train.bin"], ["cifar-100-binary/test.bin"])


def read_ten(entry: Entry) -> Raw:
    """Return CIFAR-10: the archive where it is at hand, else the JPEG copy in `$OPENWORK_DATA`, else a download."""
    if jpeg_copy.stands_in(entry):
        return jpeg_copy.read(entry)
    return _read(entry, _TEN, labels=1)


def read_hundred(entry: Entry) -> Raw:
    """Return CIFAR-100 with its 100 fine classes."""
    return _read(entry, _HUNDRED, labels=2)


def records(data: bytes, labels: int, name: str) -> tuple[Bytes, Bytes]:
    """Return images (n, 3, 32, 32) and classes (n,) of records that start with `labels` bytes, the last the class.

    Raises:
        DataError: if `data` is empty or does not end with a whole record.
    """
    import numpy as np

    width = labels + PIXELS
    if not data or len(data) % width:
        raise DataError(f"{name!r} has {len(data):,} bytes, which is not a number of records of {width} bytes")
    table = np.frombuffer(data, np.uint8).reshape(-1, width)
    return table[:, labels:].reshape(-1, 3, 32, 32).copy(), table[:, labels - 1].copy()


def _read(entry: Entry, parts: tuple[list[str], list[str]], labels: int) -> Raw:
    path = files.locate(entry, entry.files[0])
    wanted = {name for part in parts for name in part}
    found = dict(archives.members(path, wanted.__contains__))
    if missing := sorted(wanted - found.keys()):
        raise DataError(f"{str(path)!r} has no file {missing[0]!r}")
    train, test = (records(b"".join(found[name] for name in part), labels, part[0]) for part in parts)
    return Raw(entry.name, train, test)


def _archive(name: str, sha256: str, md5: str, size: int) -> tuple[File, ...]:
    homes = (f"https://www.cs.toronto.edu/~kriz/{name}", f"https://cave.cs.toronto.edu/kriz/{name}")
    return (File(name, homes, sha256, md5, size),)


_HOME = "https://www.cs.toronto.edu/~kriz/cifar.html"
_LICENCE = "none stated; cite the report"
_CITATION = "Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009"

ENTRIES = (
    Entry(
        name="cifar10",
        what="photographs of 10 things, colour",
        shape=(3, 32, 32),
        classes=10,
        sizes=(50_000, 10_000),
        home=_HOME,
        licence=_LICENCE,
        citation=_CITATION,
        read=read_ten,
        files=_archive(
            "cifar-10-binary.tar.gz",
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            "c32a1d4ab5d03f1284b67883e8d87530",
            170_052_171,
        ),
        substitute=jpeg_copy.note,
        identity=jpeg_copy.identity,
    ),
    Entry(
        name="cifar100",
        what="photographs of 100 things, colour",
        shape=(3, 32, 32),
        classes=100,
        sizes=(50_000, 10_000),
        home=_HOME,
        licence=_LICENCE,
        citation=_CITATION,
        read=read_hundred,
        files=_archive(
            "cifar-100-binary.tar.gz",
            "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
            "03b5dce01913d631647c71ecec9e9cb8",
            168_513_733,
        ),
    ),
)
