"""Two colour photographs that come with scikit-learn, for work on images rather than on classes."""

from __future__ import annotations

from openwork.data.entry import Entry, Raw
from openwork.errors import DataError


def read(entry: Entry) -> Raw:
    """Return the two photographs as if they were a training part; their labels mean nothing."""
    import numpy as np
    from sklearn.datasets import load_sample_images

    images = np.stack(load_sample_images().images).transpose(0, 3, 1, 2)
    if images.shape != (entry.sizes[0], *entry.shape):
        raise DataError(f"the photographs of the installed scikit-learn have shape {images.shape}: install another one")
    none = np.zeros(0, np.uint8)
    labels = np.arange(len(images), dtype=np.uint8)
    return Raw(entry.name, (np.ascontiguousarray(images), labels), (images[:0], none))


ENTRIES = (
    Entry(
        name="photographs",
        what="a Chinese temple and a flower, colour",
        shape=(3, 427, 640),
        classes=0,
        sizes=(2, 0),
        home="https://scikit-learn.org/stable/datasets/loading_other_datasets.html#sample-images",
        licence="CC BY 2.0",
        citation="Photographs by danielbuechele and vultilion, flickr.com, 2011, as collected by scikit-learn",
        read=read,
        kind="images",
    ),
)
