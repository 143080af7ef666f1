from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from openwork import data
from openwork.data import catalog
from openwork.errors import DataError, LookupFailed

CODE = "def load():\n    raise RuntimeError\n"


def test_digits_are_standardised_in_the_unit_of_one() -> None:
    source = data.load("digits")
    assert (source.name, source.input_shape, source.classes, source.train_size) == ("digits", (1, 8, 8), 10, 1293)
    assert sum(len(y) for _, y in source.batches("test")) == 360
    raw = catalog.read(catalog.entry("digits"))
    assert isinstance(source, data.Arrays)
    x = torch.cat([x for x, _ in source.batches("test")])
    assert torch.allclose(x * source.std + source.mean, torch.from_numpy(raw.test[0]) / 16, atol=1e-6)
    every = torch.cat([x for x, _ in source.batches("train")])
    assert abs(float(every.mean())) < 1e-5


def test_two_loads_are_the_same() -> None:
    one, two = (data.load("digits", train=200, validation=50, augment="rotate") for _ in range(2))
    for a, b in zip(one.train_batches(1, 1, 32), two.train_batches(1, 1, 32), strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


@pytest.mark.parametrize("ref", ["digit", "", "no such", "file.py", "x/y.npy"])
def test_what_is_no_reference_is_told(ref: str) -> None:
    for function in (data.load, data.digest):
        with pytest.raises(DataError, match="there is no data set"):
            function(ref)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    for function in (data.load, data.digest):
        with pytest.raises(LookupFailed):
            function(f"{tmp_path}/nowhere.py:load")


def test_digests_tell_contents_and_options_apart(tmp_path: Path) -> None:
    mine, archive = tmp_path / "mine.py", tmp_path / "mine.npz"
    mine.write_text(CODE)
    np.savez(archive, x=np.zeros(3))
    refs = ["digits", "mnist", "kmnist", "cifar100", f"{mine}:load", str(archive)]
    options = [{}, {"train": 5}, {"validation": 0.2}, {"augment": "shift"}, {"seed": 1}]
    found = [data.digest(ref, **more) for ref in refs for more in options]  # type: ignore[arg-type]
    assert len(set(found)) == len(found)
    assert all(len(one) == 64 for one in found)
    assert found == [data.digest(ref, **more) for ref in refs for more in options]  # type: ignore[arg-type]
    before = data.digest(f"{mine}:load"), data.digest(str(archive))
    mine.write_text(CODE + "\n")
    np.savez(archive, x=np.ones(3))
    assert data.digest(f"{mine}:load") != before[0]
    assert data.digest(str(archive)) != before[1]


def test_a_digest_does_not_depend_on_the_folder(tmp_path: Path) -> None:
    found = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(CODE)
        found.append(data.digest(f"{tmp_path / folder / 'mine.py'}:load"))
    assert found[0] == found[1]


def test_public_names_come_when_asked_for() -> None:
    assert all(getattr(data, name) is not None for name in data.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = data.nothing
