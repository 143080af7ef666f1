"""Data of the user's own, in every form a function may return, and everything that may be wrong with it."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from openwork import data
from openwork.data.arrays import Arrays
from openwork.data.datasets import Datasets
from openwork.data.loaders import Loaders
from openwork.errors import DataError, OpenworkError

Make = Callable[[str], str]

HEAD = """
import random
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, random_split
N = 60
X = np.arange(N * 4, dtype=np.float32).reshape(N, 4)
Y = np.arange(N) % 3
TX, TY = torch.from_numpy(X), torch.from_numpy(Y)

class Rows(Dataset):
    "Examples one by one, with noise of the global generators where asked for."
    def __init__(self, n=N, noise=False, image=False):
        self.n, self.noise, self.image = n, noise, image
    def __len__(self):
        return self.n
    def __getitem__(self, i):
        if i >= self.n:
            raise IndexError(i)
        x = TX[i].clone()
        if self.noise:
            x += torch.rand(()) + float(np.random.rand()) + random.random()
        if self.image:
            x = torch.full((1, 8, 8), i, dtype=torch.uint8)
        return x, int(Y[i])

class Again:
    "Batches without a length, made anew at every pass."
    def __init__(self, shuffle=True):
        self.shuffle = shuffle
    def __iter__(self):
        order = torch.randperm(N) if self.shuffle else torch.arange(N)
        for places in order.split(16):
            yield TX[places], TY[places]
"""


@pytest.fixture
def make(tmp_path: Path) -> Make:
    numbers = itertools.count()

    def write(body: str) -> str:
        path = tmp_path / f"mine{next(numbers)}.py"
        path.write_text(HEAD + "\ndef load():\n" + textwrap.indent(textwrap.dedent(body), "    "))
        return f"{path}:load"

    return write


def rows(batches: object) -> list[int]:
    """Return which examples a source gave: the first number of example i is 4 i."""
    return [round(float(x[0]) / 4) for xs, _ in batches for x in xs]  # type: ignore[attr-defined]


ARRAYS = ["(X, Y), (X[:7], Y[:7])", "[TX, TY], (TX[:7], TY[:7])", "TensorDataset(TX, TY), (X[:7], Y[:7])"]
DATASETS = ["Rows(), Rows(7)", "Rows(), (X[:7], Y[:7])", "(X, Y), Rows(7)"]
LOADERS = [
    "DataLoader(Rows(), 16, shuffle=True), DataLoader(Rows(7), 4)",
    "DataLoader(TensorDataset(TX, TY), 16, shuffle=True), Rows(7)",
    "[(X[i:i+10], Y[i:i+10]) for i in range(0, N, 10)], (TX[:7], TY[:7])",
]


@pytest.mark.parametrize(
    ("forms", "kind"), [(ARRAYS, Arrays), (DATASETS, Datasets), (LOADERS, Loaders)], ids=["arrays", "datasets", "loaders"]
)
def test_every_form_splits_trains_and_repeats(make: Make, forms: list[str], kind: type) -> None:
    for form in forms:
        ref = make(f"return {form}")
        source = data.load(ref, validation=0.2)
        assert type(source) is kind
        assert source.name == ref.rpartition("/")[2]
        assert (source.input_shape, source.classes) == ((4,), 3)
        held, train = rows(source.batches("validation")), rows(source.batches("train"))
        assert sorted(held + train) == list(range(60))
        assert len(held) in (12, 10)  # of the six batches of the list, one
        assert source.train_size == len(train)
        assert rows(source.batches("test")) == list(range(7))
        first, again, other = (rows(source.train_batches(1, e, 8)) for e in (2, 2, 3))
        assert first == again
        assert set(first) <= set(train)
        assert len(set(first)) == len(first)
        if "[(" not in form:
            assert first != other
        assert len(list(source.train_batches(1, 0, 8))) == source.steps_per_epoch(8)
        assert rows(data.load(ref, validation=0.2).batches("validation")) == held
        for x, y in source.train_batches(0, 0, 8):
            assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
            assert [round(float(one[0]) / 4) % 3 for one in x] == y.tolist()


def test_held_out_examples_are_in_proportion(make: Make) -> None:
    for form in (ARRAYS[0], DATASETS[0], LOADERS[0]):
        source = data.load(make(f"return {form}"), validation=0.25)
        labels = torch.cat([y for _, y in source.batches("validation")])
        assert torch.bincount(labels).tolist() == [5, 5, 5]


@pytest.mark.parametrize("form", ["(X, Y)", "Rows()", "DataLoader(Rows(), 16, shuffle=True)", "Again()"])
def test_three_parts_are_taken_as_they_are(make: Make, form: str) -> None:
    for body in (
        f"return {form}, (X[:9], Y[:9]), (X[:7], Y[:7])",
        f"return dict(test=(X[:7], Y[:7]), train={form}, validation=(X[:9], Y[:9]))",
    ):
        source = data.load(make(body))
        assert source.train_size == 60
        assert rows(source.batches("validation")) == list(range(9))
        assert rows(source.batches("test")) == list(range(7))


def test_the_noise_of_a_dataset_is_a_function_of_seed_and_epoch(make: Make) -> None:
    for body in ("return Rows(noise=True), Rows(noise=True)",
                 "return DataLoader(Rows(noise=True), 8, shuffle=True), Rows(noise=True)"):  # fmt: skip
        source = data.load(make(body))
        state, numpys = torch.get_rng_state(), str(np.random.get_state())
        one = torch.cat([x for x, _ in source.train_batches(1, 1, 8)])
        evaluated = torch.cat([x for x, _ in source.batches("validation")])
        assert torch.equal(torch.get_rng_state(), state)
        assert str(np.random.get_state()) == numpys
        drawn = []
        for x, _ in source.train_batches(1, 1, 8):
            torch.rand(3)  # as dropout would, in between
            drawn.append(x)
        assert torch.equal(torch.cat(drawn), one)
        assert torch.equal(torch.cat([x for x, _ in source.batches("validation")]), evaluated)
        torch.set_rng_state(state)


def test_a_loader_sees_its_own_stream_between_batches_of_another(make: Make) -> None:
    source = data.load(make("return DataLoader(Rows(noise=True), 8, shuffle=True), Rows()"))
    plain = [x for x, _ in source.train_batches(0, 0, 8)]
    mixed = zip(source.train_batches(0, 0, 8), source.train_batches(5, 1, 8), strict=True)
    assert all(torch.equal(a, b[0]) for a, (b, _) in zip(plain, mixed, strict=True))


def test_a_loader_with_a_generator_of_its_own_repeats(make: Make) -> None:
    body = "g = torch.Generator().manual_seed(3)\nreturn DataLoader(Rows(), 8, shuffle=True, generator=g), Rows(7)"
    source = data.load(make(body), validation=0)
    first = rows(source.train_batches(1, 1, 8))
    rows(source.train_batches(1, 2, 8))
    assert rows(source.train_batches(1, 1, 8)) == first
    assert rows(source.train_batches(2, 1, 8)) != first


def test_a_loader_keeps_its_batch_size_and_last_batch(make: Make) -> None:
    source = data.load(make("return DataLoader(Rows(), 16, shuffle=True), Rows(7)"), validation=0)
    assert source.steps_per_epoch(1000) == 4
    assert [len(y) for _, y in source.train_batches(0, 0, 1000)] == [16, 16, 16, 12]
    source = data.load(make("return DataLoader(Rows(), 16, shuffle=True, drop_last=True), Rows(7)"), validation=0.1)
    assert (source.train_size, source.steps_per_epoch(1)) == (54, 3)
    assert [len(y) for _, y in source.train_batches(0, 0, 1)] == [16, 16, 16]
    assert len(rows(source.batches("validation"))) == 6  # here nothing is dropped


def test_the_collate_function_of_a_loader_is_kept_when_it_is_divided(make: Make) -> None:
    body = """
    def collate(rows):
        return torch.stack([x for x, _ in rows]) + 0.5, torch.tensor([y for _, y in rows])
    return DataLoader(Rows(), 16, shuffle=True, collate_fn=collate), Rows(7)
    """
    source = data.load(make(body))
    for split in ("train", "validation"):
        assert all((x[:, 0] % 1 == 0.5).all() for x, _ in source.batches(split))  # type: ignore[arg-type]


def test_a_limit_on_training_examples(make: Make) -> None:
    for form in (ARRAYS[0], DATASETS[0], LOADERS[0]):
        ref = make(f"return {form}")
        full, small = data.load(ref), data.load(ref, train=12)
        assert small.train_size == len(rows(small.batches("train"))) == 12
        assert set(rows(small.batches("train"))) <= set(rows(full.batches("train")))
        assert rows(small.batches("validation")) == rows(full.batches("validation"))
    ref = make(f"return {LOADERS[2]}")
    with pytest.raises(DataError, match="makes its batches anew in every epoch"):
        data.load(ref, train=12)


def test_bytes_are_scaled(make: Make) -> None:
    arrays = data.load(
        make("x = np.arange(64*48, dtype=np.uint8).reshape(64, 3, 4, 4)\ny = x[:, 0, 0, 0] // 16 % 2\nreturn (x, y), (x, y)")
    )
    x = torch.cat([x for x, _ in arrays.batches("train")])
    assert abs(float(x.mean())) < 1e-5
    assert next(arrays.corrupted("blur", 1))[0].shape == (64, 3, 4, 4)
    for form in ("Rows(image=True), Rows(image=True)", "DataLoader(Rows(image=True), 60), Rows(image=True)"):
        source = data.load(make(f"return {form}"), validation=0)
        x, _ = next(source.batches("test"))
        assert torch.allclose(x[:, 0, 0, 0], torch.arange(60) / 255)
        with pytest.raises(DataError, match="cannot be corrupted"):
            source.corrupted("blur", 1)


def test_a_dataset_of_images_is_augmented_by_us_a_loader_is_not(make: Make) -> None:
    ref = make("return Rows(image=True), Rows(image=True)")
    plain, moved = (data.load(ref, augment=kind) for kind in ("none", "shift"))
    a, b = (next(source.train_batches(0, 0, 50)) for source in (plain, moved))
    assert torch.equal(a[1], b[1])
    assert (b[0] == 0).sum() > (a[0] == 0).sum()
    with pytest.raises(DataError, match="augments by itself"):
        data.load(make(f"return {LOADERS[0]}"), augment="shift")
    with pytest.raises(DataError, match=r"needs images .* shape \(4,\)"):
        data.load(make(f"return {ARRAYS[0]}"), augment="shift")


def test_classes_may_be_given(make: Make) -> None:
    for form in ("(X, Y)", "Rows()", "DataLoader(Rows(), 16)"):
        assert data.load(make(f"return dict(train={form}, test=(X, Y + 2), classes=5)")).classes == 5
        with pytest.raises(DataError, match=r"test data of .* a label 3; expected 0..2"):
            list(data.load(make(f"return dict(train={form}, test=(X, Y + 2))")).batches("test"))
        with pytest.raises(DataError, match=r"training data of .* a label 2; expected 0..1"):
            data.load(make(f"return dict(train={form}, test=(X, Y), classes=2)"))


def test_sequences_of_tokens(make: Make) -> None:
    body = "t = np.arange(80).reshape(10, 8) % 11\nreturn {0}, (t, t)"
    for form in (
        "(t, t)",
        "TensorDataset(torch.tensor(t), torch.tensor(t), )",
        "DataLoader(TensorDataset(torch.tensor(t), torch.tensor(t)), 4)",
    ):
        source = data.load(make(body.replace("{0}", form)), validation=2)
        assert (source.input_shape, source.classes, source.train_size) == ((8,), 11, 8)
        x, y = next(source.train_batches(0, 0, 4))
        assert (x.dtype, x.shape, y.shape) == (torch.int64, (4, 8), (4, 8))


def test_draws_of_the_function_itself_are_fixed(make: Make) -> None:
    ref = make("a, b = random_split(TensorDataset(TX, TY), [40, 20])\nreturn a, b")
    state = torch.get_rng_state()
    first = rows(data.load(ref).batches("test"))
    assert torch.equal(torch.get_rng_state(), state)
    assert rows(data.load(ref).batches("test")) == first
    assert first != sorted(first)


def test_a_list_of_batches_gives_whole_batches(make: Make) -> None:
    source = data.load(make(f"return {LOADERS[2]}"), validation=0.4)
    held = rows(source.batches("validation"))
    assert len(held) == 20
    assert all(held[i] + 1 == held[i + 1] for i in range(19) if (i + 1) % 10)
    with pytest.raises(DataError, match="have 1 batches; expected at least 2"):
        data.load(make("return [(X, Y)], (X, Y)"))


TEST = "(X[:7], Y[:7])"
ITEM = "class R(Rows):\n    def __getitem__(self, i):\n        "


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise ValueError('no\\nroom')", "fails with ValueError: no room"),
        ("return 3", "returns a int; expected"),
        ("return (X, Y),", "returns a tuple of 1; expected"),
        ("return 1, 2, 3, 4", "returns a tuple of 4"),
        ("return {'train': (X, Y)}", "returns a dict of train; expected 'train' and 'test'"),
        ("return {'train': (X, Y), 'test': (X, Y), 'val': (X, Y)}", "dict of train, test, val"),
        ("return {'train': (X, Y), 'test': (X, Y), 'classes': 2.5}", "2.5 classes; expected a whole number"),
        ("return X, Y", "training data of 'mine0.py:load' come as a ndarray; expected a pair"),
        (f"return None, {TEST}", "come as a NoneType"),
        (f"return 'digits', {TEST}", "come as a str"),
        (f"return ((TX[i:i+9], TY[i:i+9]) for i in range(0, N, 9)), {TEST}", "generator, which can be gone through once"),
        (f"return iter(DataLoader(Rows(), 8)), {TEST}", "can be gone through once"),
        (f"return map(tuple, []), {TEST}", "come as a map, which"),
        (
            "class Once:\n    rows = iter([(TX, TY)])\n    def __iter__(self):\n        return self.rows\n"
            f"return Once(), {TEST}", "the same iterator twice"),
        (
            "class Flow(IterableDataset):\n    def __iter__(self):\n        yield TX[0], 0\n"
            f"return Flow(), {TEST}", "IterableDataset, which gives single examples: put it into a DataLoader"),
        (f"return {TEST}, DataLoader(Rows(), 8)", "no loader to train on"),
        ("return (X, Y), (X[:0], Y[:0])", "test data of .* have no examples"),
        ("return (X[:0], Y[:0]), (X, Y)", "training data of .* have no labels"),
        ("return (X, Y[:5]), (X, Y)", "60 inputs and 5 labels"),
        ("return (X, Y * 1.0), (X, Y)", "labels of type float64"),
        ("return (X, Y - 1), (X, Y)", "a label -1"),
        ("return (X, Y), (X, Y + 1)", "a label 3; expected 0..2"),
        ("return (X / 0 * 0, Y), (X, Y)", "NaN or infinity in the inputs, first in example 0"),
        ("return (X, Y), (X[:, :2], Y)", r"shape \(2,\) and type float32"),
        # Datasets
        ("return Rows(0), Rows()", "training data of .* have no examples"),
        ("return Rows(), Rows(0)", "test data of .* have no examples"),
        (ITEM + "return TX[i]\nreturn R(), Rows()", "give a Tensor as an example"),
        (ITEM + "return TX[i], 0.5\nreturn R(), Rows()", "labels of type float64"),
        (ITEM + "return TX[i] / 0, 1\nreturn R(), Rows()", "NaN or infinity"),
        (ITEM + "return TX[i], -1\nreturn R(), Rows()", "a label -1"),
        (ITEM + "return TX[i, :1 + i % 2], 1\nreturn R(), Rows()", "fail with RuntimeError"),
        (ITEM + "raise OSError('gone')\nreturn R(), Rows()", "fail with OSError: gone"),
        (ITEM + "return object(), 1\nreturn R(), Rows()", "fail with TypeError"),
        # loaders
        (f"return [], {TEST}", "have 0 batches; expected at least 2"),
        (f"return [], {TEST}, {TEST}", "training data of .* give no batch"),
        (f"return DataLoader(Rows(), 8, shuffle=True), [], {TEST}", "validation data of .* give no batch"),
        (f"return [(X, Y), X], {TEST}, {TEST}", "give a ndarray; expected a pair"),
        (f"return [(X, Y), (X, Y, Y)], {TEST}, {TEST}", "give a tuple of 3; expected a pair"),
        (f"return [(X, Y), (X, Y[:3])], {TEST}, {TEST}", "60 inputs and 3 labels"),
        (f"return [(X, Y), (X, Y * 0.5)], {TEST}, {TEST}", "labels of type float64"),
        (f"return [(X, Y), (X * np.inf, Y)], {TEST}, {TEST}", "NaN or infinity"),
        (f"return [(X, Y), (X, Y - 5)], {TEST}, {TEST}", "a label -5"),
        (f"return Again(), {TEST}", "has no validation data, and its training loader makes its batches anew"),
        (f"return DataLoader(Rows(), 8, sampler=list(range(9))), {TEST}", "has no validation data, and"),
        (f"return DataLoader(Rows(), 8, num_workers=1, persistent_workers=True), {TEST}", "set persistent_workers=False"),
        (f"return DataLoader(Rows(), 58, drop_last=True), {TEST}", "give no batch of 58 once"),
        (
            "class Fails(Again):\n    def __iter__(self):\n        yield TX, TY\n        raise OSError('gone')\n"
            f"return Fails(), {TEST}, {TEST}", "fail at batch 1 with OSError: gone"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_in_one_sentence(make: Make, body: str, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught, np.errstate(all="ignore"):
        data.load(make(body))
    assert "\n" not in str(caught.value)
    assert ":load'" in str(caught.value)


def test_an_error_of_our_own_passes_through(make: Make) -> None:
    with pytest.raises(OpenworkError, match=r"^mine$"):
        data.load(make("from openwork.errors import ModelError\nraise ModelError('mine')"))


def test_loaders_of_one_epoch_run_dry_in_a_sentence(make: Make) -> None:
    body = """
    class Dry(Again):
        passes = 0
        def __iter__(self):
            self.passes += 1
            return iter([(TX, TY)] if self.passes <= 3 else [])
    return Dry(), (X, Y), (X, Y)
    """
    source = data.load(make(body))
    with pytest.raises(DataError, match="gives its batches only once"):
        list(source.train_batches(0, 0, 8))


def test_a_loader_without_validation_data_trains_if_none_are_wanted(make: Make) -> None:
    source = data.load(make("return Again(), (X, Y)"), validation=0)
    assert source.train_size == 60
    assert sorted(rows(source.train_batches(0, 0, 8))) == list(range(60))
    with pytest.raises(DataError, match="no validation data: return"):
        next(source.batches("validation"))
    with pytest.raises(DataError, match="no split 'dev'"):
        next(source.batches("dev"))  # type: ignore[arg-type]


def test_a_sampler_is_told_the_epoch(make: Make) -> None:
    body = """
    class Turns:
        epoch = 0
        def set_epoch(self, epoch):
            self.epoch = epoch
        def __iter__(self):
            return iter([(i + self.epoch) % N for i in range(N)])
        def __len__(self):
            return N
    return DataLoader(Rows(), 8, sampler=Turns()), (X, Y), (X, Y)
    """
    source = data.load(make(body))
    assert rows(source.train_batches(0, 7, 8))[:3] == [7, 8, 9]
    assert rows(source.train_batches(0, 0, 8))[:3] == [0, 1, 2]


def test_worker_processes_give_the_same_noise_each_time(make: Make) -> None:
    source = data.load(make("return DataLoader(Rows(noise=True), 30, shuffle=True, num_workers=1), Rows(7)"), validation=0)
    one, two = (torch.cat([x for x, _ in source.train_batches(1, 1, 8)]) for _ in range(2))
    assert torch.equal(one, two)
