"""Digits of 8x8 pixels that come with scikit-learn: small enough for tests, always there."""

from __future__ import annotations

import hashlib

from openwork.data.entry import Entry, Raw
from openwork.errors import DataError

SHA256 = "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"
"""Checksum of the 1,797 images (n, 8, 8) followed by the labels, as uint8."""


def read(entry: Entry) -> Raw:
    """Return the digits, a fifth of them held out as the test part, stratified and always the same.

    scikit-learn has the test part of the UCI set, whose writers are not named, so the split is by image.
    """
    import numpy as np
    from sklearn.datasets import load_digits

    found = load_digits()
    x, y = found.images.astype(np.uint8), found.target.astype(np.uint8)
    if hashlib.sha256(x.tobytes() + y.tobytes()).hexdigest() != SHA256:
        raise DataError("the digits of the installed scikit-learn are not the known ones: install another release")
    from openwork.core.rng import generator
    from openwork.data.splits import complement, stratified, tensor

    test = stratified(tensor(y), entry.sizes[1], generator(0, "test", entry.name))
    train = complement(test, len(y))
    return Raw(
        name=entry.name,
        train=(x[train.numpy(), None], y[train.numpy()]),
        test=(x[test.numpy(), None], y[test.numpy()]),
        unit=16.0,
    )


ENTRIES = (
    Entry(
        name="digits",
        what="handwritten digits, grey",
        shape=(1, 8, 8),
        classes=10,
        sizes=(1437, 360),
        home="https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
        licence="CC BY 4.0",
        citation="Alpaydin, Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998, doi:10.24432/C50P49",
        read=read,
        identity=lambda _: SHA256,
    ),
)
