from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openwork import data
from openwork.data.arrays import Arrays
from openwork.errors import DataError

X = np.arange(40 * 6, dtype=np.uint8).reshape(40, 1, 2, 3)
Y = np.arange(40) % 4
SIZES = {"train": 40, "test": 5, "validation": 7}


def test_an_archive_becomes_a_source(tmp_path: Path) -> None:
    path = tmp_path / "mine.npz"
    np.savez_compressed(path, x_train=X, y_train=Y, x_test=X[:5], y_test=Y[:5], more=np.zeros(1))
    source = data.load(str(path))
    assert isinstance(source, Arrays)
    assert (source.name, source.input_shape, source.classes, source.train_size) == ("mine.npz", (1, 2, 3), 4, 36)
    x = torch.cat([x for x, _ in source.batches("test")])
    assert torch.allclose(x * source.std + source.mean, torch.from_numpy(X[:5]) / 255, atol=1e-6)


def test_validation_data_may_be_in_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.npz"
    parts = {f"{axis}_{part}": array[:n] for axis, array in (("x", X), ("y", Y)) for part, n in SIZES.items()}
    np.savez(path, **parts)
    source = data.load(str(path))
    assert source.train_size == 40
    assert [len(y) for _, y in source.batches("validation")] == [7]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"y_test": None}, "has no array 'y_test'; it has: x_test, x_train, y_train"),
        ({"x_validation": X}, "has no array 'y_validation'"),
        ({"y_train": Y[:3]}, "40 inputs and 3 labels"),
        ({"y_train": Y.astype(float)}, "labels of type float64"),
        ({"x_train": X[:0], "y_train": Y[:0]}, "have no labels"),
        ({"x_test": X[:0], "y_test": Y[:0]}, "have no examples"),
        ({"x_test": X[:, :, :1]}, r"shape \(1, 1, 3\) and type uint8; the training data have \(1, 2, 3\)"),
        ({"x_test": X.astype(np.float32)}, "type float32; the training data have"),
        ({"y_test": Y + 1}, "a label 4; expected 0..3"),
        ({"x_train": np.array([{}] * 40, dtype=object)}, "archive of plain arrays"),
    ],
)
def test_what_is_wrong_is_told(tmp_path: Path, change: dict[str, np.ndarray | None], words: str) -> None:
    arrays = {"x_train": X, "y_train": Y, "x_test": X, "y_test": Y} | change
    path = tmp_path / "mine.npz"
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(DataError, match=words):
        data.load(str(path))


def test_no_file_and_no_archive(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no file"):
        data.load(str(tmp_path / "nowhere.npz"))
    with pytest.raises(DataError, match="there is no file"):
        data.digest(str(tmp_path / "nowhere.npz"))
    for content in (b"", b"text", np.arange(3).tobytes(), b"\x93NUMPY\x01\0"):
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(DataError, match=r"bad\.npz"):
            data.load(str(tmp_path / "bad.npz"))
    np.save(tmp_path / "single.npy", X)
    (tmp_path / "single.npy").rename(tmp_path / "single.npz")
    with pytest.raises(DataError, match=r"single\.npz.*single array"):
        data.load(str(tmp_path / "single.npz"))


def test_a_header_that_promises_too_much_is_a_data_error(tmp_path: Path) -> None:
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000000,), }"
    content = b"\x93NUMPY\x01\0" + len(header).to_bytes(2, "little") + header
    with zipfile.ZipFile(tmp_path / "big.npz", "w") as archive:
        archive.writestr("x_train.npy", content)
    with pytest.raises(DataError, match="archive of plain arrays"):
        data.load(str(tmp_path / "big.npz"))


@settings(max_examples=60, deadline=None)
@given(places=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), min_size=1, max_size=4), cut=st.booleans())
def test_any_change_gives_a_source_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, places: list[tuple[int, int]], cut: bool
) -> None:
    path = tmp_path_factory.mktemp("npz") / "mine.npz"
    np.savez_compressed(path, x_train=X, y_train=Y, x_test=X[:5], y_test=Y[:5])
    content = bytearray(path.read_bytes())
    for place, value in places:
        content[place % len(content)] = value
    path.write_bytes(content[: places[0][0] % len(content)] if cut else content)
    try:
        source = data.load(str(path))
    except DataError:
        return
    assert source.train_size == 36
