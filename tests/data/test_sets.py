"""The readers of the named sets: on made files everywhere, on the real ones where OPENWORK_DATA has them."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import struct
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from openwork import data
from openwork.data import catalog, files, jpeg_copy
from openwork.data.entry import Entry, File
from openwork.data.sets import cifar, mnist
from openwork.errors import DataError


def real(name: str) -> None:
    entry = catalog.entry(name)
    if files.root() is None or not all((Path(os.environ["OPENWORK_DATA"]) / name / f.name).is_file() for f in entry.files):
        pytest.skip(f"OPENWORK_DATA holds no {name}")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPENWORK_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("OPENWORK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENWORK_OFFLINE", "1")
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def made(entry: Entry, place: Path, contents: list[bytes]) -> Entry:
    """Write these contents as the files of an entry and return it with their checksums."""
    (place / entry.name).mkdir(exist_ok=True)
    known = []
    for file, content in zip(entry.files, contents, strict=True):
        (place / entry.name / file.name).write_bytes(content)
        known.append(File(file.name, file.homes, hashlib.sha256(content).hexdigest(), file.md5, len(content)))
    return replace(entry, files=tuple(known), sizes=(3, 2))


def packed(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return gzip.compress(header + array.tobytes())


def tarred(contents: dict[str, bytes], mode: str = "w:gz") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as tar:  # type: ignore[call-overload]
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def test_the_idx_family(place: Path) -> None:
    x = np.arange(5 * 28 * 28, dtype=np.uint32).astype(np.uint8).reshape(5, 28, 28)
    y = np.array([3, 1, 4, 1, 5], np.uint8)
    entry = made(catalog.entry("mnist"), place, [packed(x[:3]), packed(y[:3]), packed(x[3:]), packed(y[3:])])
    raw = catalog.read(entry)
    assert (raw.train[0][:, 0] == x[:3]).all()
    assert raw.train[1].tolist() == [3, 1, 4]
    assert (raw.test[0][:, 0] == x[3:]).all()
    assert raw.test[1].tolist() == [1, 5]
    with pytest.raises(DataError, match=r"training part of 'mnist' has images \(3, 1, 28, 28\) and labels \(2,\)"):
        catalog.read(made(catalog.entry("mnist"), place, [packed(x[:3]), packed(y[:2]), packed(x[3:]), packed(y[3:])]))


def test_cifar_10_records(place: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)
    y = np.array([9, 0, 3, 2, 7], np.uint8)
    record = [bytes([y[i]]) + x[i].tobytes() for i in range(5)]
    batches = {f"cifar-10-batches-bin/data_batch_{i}.bin": b"" for i in range(1, 6)}
    batches["cifar-10-batches-bin/data_batch_1.bin"] = record[0] + record[1]
    batches["cifar-10-batches-bin/data_batch_5.bin"] = record[2]
    batches |= {"cifar-10-batches-bin/test_batch.bin": record[3] + record[4], "cifar-10-batches-bin/readme.html": b"?"}
    entry = made(catalog.entry("cifar10"), place, [tarred(batches)])
    raw = catalog.read(entry)
    assert raw.name == "cifar10"
    assert (raw.train[0] == x[:3]).all()
    assert raw.train[1].tolist() == [9, 0, 3]
    assert (raw.test[0] == x[3:]).all()
    assert raw.test[1].tolist() == [2, 7]
    del batches["cifar-10-batches-bin/data_batch_3.bin"]
    with pytest.raises(DataError, match="no file 'cifar-10-batches-bin/data_batch_3\\.bin'"):
        catalog.read(made(catalog.entry("cifar10"), place, [tarred(batches)]))


def test_cifar_100_takes_the_fine_label(place: Path) -> None:
    x = np.random.default_rng(1).integers(0, 256, (5, 3072), dtype=np.uint8)
    rows = [bytes([i, 90 + i]) + x[i].tobytes() for i in range(5)]
    contents = {"cifar-100-binary/train.bin": b"".join(rows[:3]), "cifar-100-binary/test.bin": b"".join(rows[3:])}
    raw = catalog.read(made(catalog.entry("cifar100"), place, [tarred(contents)]))
    assert raw.train[1].tolist() == [90, 91, 92]
    assert (raw.test[0].reshape(2, -1) == x[3:]).all()


@pytest.mark.parametrize("size", [0, 1, 3072, 3074])
def test_a_broken_record_is_a_data_error(size: int) -> None:
    with pytest.raises(DataError, match="not a number of records of 3073 bytes"):
        cifar.records(bytes(size), 1, "train")


def picture(level: int, size: tuple[int, int] = (32, 32), mode: str = "RGB") -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.new(mode, size, (level, 0, 255 - level)[: len(mode)] if len(mode) > 1 else level).save(stream, "JPEG")
    return stream.getvalue()


def jpegs(place: Path, size: tuple[int, int] = (32, 32), classes: int = 10) -> Entry:
    (place / "cifar10").mkdir(exist_ok=True)
    for part, count in (("train", 3), ("test", 2)):
        contents = {
            f"{part}/{chr(ord('z') - kind)}/{i:04}.jpg": picture(10 * (classes - 1 - kind) + 3 * i, size)
            for kind in range(classes)
            for i in range(count)
        }
        (place / f"cifar10/cifar10-jpeg-{part}.tar.xz").write_bytes(tarred(contents, "w:xz"))
    return replace(catalog.entry("cifar10"), sizes=(30, 20))


def test_the_jpeg_copy_has_its_own_name_and_its_classes_in_order(place: Path) -> None:
    entry = jpegs(place)
    assert files.whereabouts(entry) == "OPENWORK_DATA (JPEG copy)"
    raw = catalog.read(entry)
    assert raw.name == "cifar10 (JPEG copy)"
    assert raw.train[1].tolist() == sorted(list(range(10)) * 3)
    red = raw.train[0][:, 0].reshape(30, -1).mean(1)
    expected = [10 * kind + 3 * i for kind in range(10) for i in range(3)]
    assert np.abs(red - expected).max() <= 2
    assert np.abs(raw.train[0][:, 2].reshape(30, -1).mean(1) - (255 - np.array(expected))).max() <= 2
    assert raw.test[0].shape == (20, 3, 32, 32)


def test_the_decoded_jpeg_copy_is_kept_and_a_damaged_one_made_anew(place: Path, tmp_path: Path) -> None:
    entry = jpegs(place)
    first = catalog.read(entry)
    (kept,) = (tmp_path / "cache/cifar10").iterdir()
    with np.load(kept) as stored:
        assert (stored["x_train"] == first.train[0]).all()
    np.savez(kept, x_train=first.train[0] + 1, y_train=first.train[1], x_test=first.test[0], y_test=first.test[1])
    assert (catalog.read(entry).train[0] == first.train[0] + 1).all()  # it is read from there
    kept.write_bytes(kept.read_bytes()[:2000])
    assert (catalog.read(entry).train[0] == first.train[0]).all()


def test_a_cache_that_cannot_be_written_does_not_matter(place: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    assert catalog.read(jpegs(place)).name == jpeg_copy.NAME


def test_the_archive_comes_before_the_jpeg_copy(place: Path, tmp_path: Path) -> None:
    entry = jpegs(place)
    identity = entry.identity
    assert identity is not None
    copy = identity(entry)
    (tmp_path / "cache/cifar10").mkdir(parents=True, exist_ok=True)
    content = b"stands for the archive"
    (tmp_path / "cache/cifar10" / entry.files[0].name).write_bytes(content)
    known = replace(entry.files[0], sha256=hashlib.sha256(content).hexdigest())
    assert not jpeg_copy.stands_in(replace(entry, files=(known,)))
    assert jpeg_copy.stands_in(entry)  # another archive than the registered one is none
    assert identity(replace(entry, files=(known,))) == known.sha256 != copy


def test_pictures_of_another_form_are_refused(place: Path) -> None:
    with pytest.raises(DataError, match=r"RGB of \(16, 32\); expected RGB of 32x32"):
        catalog.read(jpegs(place, size=(16, 32)))
    with pytest.raises(DataError, match="has 9 classes; expected 10"):
        catalog.read(jpegs(place, classes=9))
    broken = {f"train/{kind}/0000.jpg": b"no picture" for kind in "abcdefghij"}
    (place / "cifar10/cifar10-jpeg-train.tar.xz").write_bytes(tarred(broken, "w:xz"))
    with pytest.raises(DataError, match="is no JPEG"):
        catalog.read(catalog.entry("cifar10"))


def test_digits_are_scikit_learns_and_split_in_proportion() -> None:
    from sklearn.datasets import load_digits

    raw = catalog.read(catalog.entry("digits"))
    found = load_digits()
    every = np.concatenate([raw.train[0], raw.test[0]]).reshape(1797, 64)
    labels = np.concatenate([raw.train[1], raw.test[1]])
    pairs = sorted((tuple(x), int(y)) for x, y in zip(every.tolist(), labels, strict=True))
    assert pairs == sorted((tuple(x), int(y)) for x, y in zip(found.data.astype(int).tolist(), found.target, strict=True))
    share = np.bincount(raw.test[1]) - np.bincount(found.target) * 360 / 1797
    assert np.abs(share).max() < 1
    assert raw.unit == found.data.max() == 16


@pytest.mark.parametrize("name", ["fashion-mnist", "mnist"])
def test_the_checksums_of_the_real_files(name: str) -> None:
    real(name)
    for file in catalog.entry(name).files:
        path = files.find(catalog.entry(name), file)
        assert path is not None
        content = gzip.decompress(path.read_bytes())
        assert hashlib.sha256(content).hexdigest() == file.content
        if name == "mnist":
            assert hashlib.md5(path.read_bytes()).hexdigest() == file.md5
            assert path.stat().st_size == file.size


def test_fashion_mnist_recompressed_with_its_first_header_is_the_published_file() -> None:
    """A copy without name and time in its gzip header becomes the home's file when these two are put back."""
    real("fashion-mnist")
    written = {"train-images": 1504176606, "train-labels": 1504176606, "t10k-images": 1504176627, "t10k-labels": 1504176627}
    for file in mnist.FASHION:
        path = files.find(catalog.entry("fashion-mnist"), file)
        assert path is not None
        data_ = path.read_bytes()
        if files.sha256(path) != file.sha256:
            time = written["-".join(file.name.split("-")[:2])]
            name = file.name.removesuffix(".gz").encode() + b"\0"
            data_ = b"\x1f\x8b\x08\x08" + struct.pack("<I", time) + b"\0\x03" + name + data_[10:]
        assert hashlib.sha256(data_).hexdigest() == file.sha256
        assert hashlib.md5(data_).hexdigest() == file.md5
        assert len(data_) == file.size


def test_real_fashion_mnist_has_the_published_counts() -> None:
    real("fashion-mnist")
    raw = catalog.read(catalog.entry("fashion-mnist"))
    assert np.bincount(raw.train[1]).tolist() == [6000] * 10
    assert np.bincount(raw.test[1]).tolist() == [1000] * 10
    assert round(raw.train[0].mean() / 255, 4) == 0.2860
    assert round(raw.train[0].std() / 255, 4) == 0.3530


def test_real_fashion_mnist_as_a_source() -> None:
    real("fashion-mnist")
    source = data.load("fashion-mnist", augment="shift")
    assert (source.train_size, source.steps_per_epoch(128)) == (54_000, 421)
    validation = torch.cat([y for _, y in source.batches("validation")])
    assert torch.bincount(validation).tolist() == [600] * 10
    x, y = next(source.train_batches(0, 0, 128))
    assert (x.shape, x.dtype, y.dtype) == ((128, 1, 28, 28), torch.float32, torch.int64)
    every = torch.cat([x for x, _ in source.batches("train", 4096)]).double()
    assert abs(float(every.mean())) < 1e-5
    assert abs(float(every.std(correction=0)) - 1) < 1e-5


def test_real_mnist_has_the_published_counts() -> None:
    real("mnist")
    raw = catalog.read(catalog.entry("mnist"))
    assert np.bincount(raw.train[1]).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert round(raw.train[0].mean() / 255, 4) == 0.1307


def test_the_real_jpeg_copy_has_the_published_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if jpeg_copy.paths() is None:
        pytest.skip("OPENWORK_DATA holds no JPEG copy of cifar10")
    monkeypatch.setenv("OPENWORK_CACHE", str(tmp_path))
    raw = catalog.read(catalog.entry("cifar10"))
    assert np.bincount(raw.train[1]).tolist() == [5000] * 10
    assert np.bincount(raw.test[1]).tolist() == [1000] * 10
    assert (raw.train[0].mean((0, 2, 3)) / 255).round(2).tolist() == [0.49, 0.48, 0.45]
