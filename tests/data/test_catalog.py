from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from openwork import data
from openwork.data import catalog, download
from openwork.data.entry import Raw
from openwork.errors import DataError

CLASSIFICATION = ["cifar10", "cifar100", "digits", "fashion-mnist", "kmnist", "mnist"]


def test_the_names() -> None:
    assert data.names() == CLASSIFICATION
    assert catalog.names("images") == ["photographs"]
    assert catalog.names("text") == ["sci-abstracts", "tiny-shakespeare"]
    assert catalog.names("model") == ["tiny-lm"]
    kinds = ("classification", "images", "text", "model")
    assert sorted(catalog.entries()) == sorted(name for kind in kinds for name in catalog.names(kind))


def test_naming_the_sets_imports_neither_torch_nor_sklearn() -> None:
    code = (
        "import sys, openwork.data as d; from openwork.data import catalog, files; d.names(); "
        "[files.whereabouts(e) for e in catalog.entries().values()]; "
        "print([m for m in ('torch', 'sklearn', 'scipy', 'PIL', 'requests') if m in sys.modules])"
    )
    environment = {**os.environ, "OPENWORK_CACHE": "nowhere"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("entry", catalog.entries().values(), ids=lambda entry: entry.name)
def test_every_entry_is_complete(entry: catalog.Entry) -> None:
    assert entry.home.startswith("http")
    assert all([entry.what, entry.licence, entry.citation])
    for file in entry.files:
        assert re.fullmatch("[0-9a-f]{64}", file.sha256)
        assert re.fullmatch("[0-9a-f]{32}", file.md5)
        assert file.content is None or re.fullmatch("[0-9a-f]{64}", file.content)
        assert file.size > 500
        assert file.homes
        assert all(download.secure(home) and file.name.endswith(home.rpartition("/")[2]) for home in file.homes)


def test_no_checksum_stands_twice() -> None:
    sums = [file.sha256 for entry in catalog.entries().values() for file in entry.files]
    assert len(sums) == len(set(sums)) == 20


def test_an_unknown_name_names_the_nearest() -> None:
    with pytest.raises(DataError, match=r"no data set 'fashon-mnist'; known: fashion-mnist"):
        catalog.entry("fashon-mnist")
    with pytest.raises(DataError, match="digits"):
        catalog.entry("?")


def test_a_set_that_is_not_what_its_entry_says_is_refused() -> None:
    x, y = np.zeros((4, 1, 2, 2), np.uint8), np.arange(4, dtype=np.uint8)
    made = replace(catalog.entry("digits"), name="made", shape=(1, 2, 2), sizes=(4, 2), classes=4, read=lambda e: raw)
    raw = Raw("made", (x, y), (x[:2], y[:2]))
    assert catalog.read(made) is raw
    with pytest.raises(DataError, match=r"label 3; expected 0..2"):
        catalog.read(replace(made, classes=3))
    with pytest.raises(DataError, match=r"test part of 'made' has images \(2, 1, 2, 2\).*expected \(3, 1, 2, 2\)"):
        catalog.read(replace(made, sizes=(4, 3)))


def test_images_are_no_classification_set() -> None:
    with pytest.raises(DataError, match=r"without classes: read them with load_images\('photographs'\)"):
        data.load("photographs")
    with pytest.raises(DataError, match="a set to classify"):
        data.load_images("mnist")
    with pytest.raises(DataError, match=r"holds text: read it with openwork\.data\.texts"):
        data.load("tiny-shakespeare")
    with pytest.raises(DataError, match="is a set of text"):
        data.load_images("tiny-shakespeare")


def test_the_photographs() -> None:
    images = data.load_images("photographs")
    assert [tuple(image.shape) for image in images] == [(3, 427, 640)] * 2
    assert images[0].dtype.itemsize == 1
    assert images[0].float().std() > 30
