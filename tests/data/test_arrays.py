from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from openwork.core.rng import generator
from openwork.data import augment, corruptions
from openwork.data.arrays import Arrays, moments
from openwork.data.prepare import Options, arrays, divide
from openwork.data.source import Source
from openwork.errors import DataError


def numbered(n: int, test: int = 20, channels: int = 3) -> tuple[Tensor, Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Images whose first pixel tells their number, and labels in 4 classes."""
    x = torch.randint(0, 256, (n, channels, 9, 8), generator=generator(0, "x")).to(torch.uint8)
    x[:, 0, 0, 0], x[:, 0, 0, 1] = torch.arange(n) % 256, torch.arange(n) // 256
    y = torch.arange(n) % 4
    return x, y, {"train": (x, y), "test": (x[:test], y[:test])}


def numbers(source: Arrays, x: Tensor) -> list[int]:
    raw = ((x * source.std + source.mean) * 255).round().long()
    return (raw[:, 0, 0, 0] + 256 * raw[:, 0, 0, 1]).tolist()


def made(n: int = 300, **more: object) -> Arrays:
    _, _, parts = numbered(n)
    return arrays("made", parts, classes=4, unit=255.0, options=Options(**more))  # type: ignore[arg-type]


def test_it_is_a_source() -> None:
    source = made()
    assert isinstance(source, Source)
    assert (source.name, source.input_shape, source.classes, source.train_size) == ("made", (3, 9, 8), 4, 270)
    assert source.steps_per_epoch(64) == 4
    assert source.steps_per_epoch(1000) == 1


def test_train_and_validation_are_disjoint_whole_and_in_proportion() -> None:
    source = made(300, validation=0.25)
    train = [i for x, _ in source.batches("train") for i in numbers(source, x)]
    held = [i for x, _ in source.batches("validation") for i in numbers(source, x)]
    assert sorted(train + held) == list(range(300))
    assert len(held) == 75
    counts = torch.bincount(torch.cat([y for _, y in source.batches("validation")]))
    assert counts.tolist() in ([19, 19, 19, 18],)
    assert held == [i for x, _ in made(300, validation=0.25).batches("validation") for i in numbers(source, x)]
    assert held != [i for x, _ in made(300, validation=0.25, seed=1).batches("validation") for i in numbers(source, x)]


def test_a_limit_on_training_examples_leaves_the_validation_set() -> None:
    full, small = made(), made(train=40)
    for a, b in zip(full.batches("validation"), small.batches("validation"), strict=True):
        assert torch.equal(a[1], b[1])
        assert numbers(full, a[0]) == numbers(small, b[0])
    train = [i for x, _ in small.batches("train") for i in numbers(small, x)]
    assert len(train) == small.train_size == 40
    assert set(train) <= {i for x, _ in full.batches("train") for i in numbers(full, x)}
    assert torch.bincount(torch.cat([y for _, y in small.batches("train")])).tolist() == [10] * 4


@pytest.mark.parametrize("train", [0, 271, -1, 2.0, True])
def test_a_senseless_limit_is_told(train: int) -> None:
    with pytest.raises(DataError, match=r"train is .*270 training examples"):
        made(train=train)


def test_given_validation_data_are_used_and_nothing_is_held_out() -> None:
    x, y, parts = numbered(100)
    source = arrays("m", {**parts, "validation": (x[:7], y[:7])}, classes=4, unit=255.0, options=Options())
    assert source.train_size == 100
    assert [len(y) for _, y in source.batches("validation")] == [7]


def test_a_class_of_one_stays_in_the_training_set() -> None:
    y = torch.tensor([0] * 9 + [1])
    for seed in range(20):
        kept, held = divide(y, "x", Options(validation=5, seed=seed), hold_out=True)
        assert 9 in kept
        assert held.numel() == 5


def test_an_epoch_is_the_permutation_of_its_seed() -> None:
    source = made()
    seen = [i for x, _ in source.train_batches(3, 2, 64) for i in numbers(source, x)]
    order = torch.randperm(270, generator=generator(3, "order", 2))[:256]
    plain = torch.tensor([i for x, _ in source.batches("train") for i in numbers(source, x)])
    assert seen == plain[order].tolist()


def test_labels_go_with_their_images() -> None:
    source = made()
    for x, y in [*source.train_batches(0, 0, 50), *source.batches("validation"), *source.batches("test", 7)]:
        assert [i % 4 for i in numbers(source, x)] == y.tolist()


@pytest.mark.parametrize("kind", augment.KINDS)
def test_batches_are_a_pure_function_and_the_global_generators_rest(kind: str) -> None:
    source = made(augment=kind)
    random.seed(1)
    states = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    first = list(source.train_batches(1, 2, 64))
    torch.manual_seed(999)
    torch.set_rng_state(states[0])
    again = list(source.train_batches(1, 2, 64))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, again, strict=True))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (str(np.random.get_state()), random.getstate()) == states[1:]
    for other in ((2, 2), (1, 3)):
        assert not torch.equal(first[0][0], next(iter(source.train_batches(*other, 64)))[0])


@pytest.mark.parametrize("kind", ["shift", "flip-shift", "rotate"])
def test_augmentation_is_drawn_for_the_batch_and_comes_before_standardising(kind: str) -> None:
    source = made(augment=kind)
    function = augment.KINDS[kind]
    assert function is not None
    order = torch.randperm(270, generator=generator(1, "order", 2))
    for index, (x, _) in enumerate(source.train_batches(1, 2, 64)):
        raw = source.parts["train"][0][order[index * 64 : (index + 1) * 64]]
        changed = function(raw, generator(1, "augment", 2, index)).double() / 255
        assert torch.allclose(x.double(), (changed - source.mean) / source.std, atol=1e-5)
    assert torch.equal(next(source.batches("train"))[0], next(made().batches("train"))[0])


def test_training_examples_have_mean_0_and_deviation_1_in_each_channel() -> None:
    source = made()
    x = next(source.batches("train"))[0].double()
    assert x.dtype == torch.float64
    assert torch.allclose(x.mean((0, 2, 3)), torch.zeros(3, dtype=torch.float64), atol=1e-5)
    assert torch.allclose(x.std((0, 2, 3), correction=0), torch.ones(3, dtype=torch.float64), atol=1e-5)


def test_moments_are_numpys() -> None:
    x, _, _ = numbered(50)
    mean, std = moments(x, 16.0)
    assert np.allclose(mean.flatten(), (x.numpy() / 16).mean((0, 2, 3)), rtol=1e-6)
    assert np.allclose(std.flatten(), (x.numpy() / 16).std((0, 2, 3)), rtol=1e-6)
    flat = x.float().flatten(1)
    assert np.allclose([float(m) for m in moments(flat, 2.0)], [(flat / 2).mean(), (flat / 2).std(correction=0)])
    assert [float(m) for m in moments(torch.full((3, 1, 2, 2), 51, dtype=torch.uint8), 255.0)] == [pytest.approx(0.2), 1]


def test_without_a_unit_the_inputs_stay() -> None:
    x, y = torch.randn(30, 5, generator=generator(0)), torch.arange(30) % 3
    source = Arrays("f", {"train": (x, y), "validation": (x[:0], y[:0]), "test": (x, y)}, classes=3)
    assert torch.equal(next(source.batches("train"))[0], x)
    tokens = Arrays("t", {"train": (y[:, None], y), "validation": (y[:0], y[:0]), "test": (y, y)}, classes=3)
    assert next(tokens.train_batches(0, 0, 8))[0].dtype == torch.int64


def test_empty_and_unknown_splits_are_told() -> None:
    source = made(validation=0)
    assert source.train_size == 300
    with pytest.raises(DataError, match="no validation examples"):
        next(source.batches("validation"))
    with pytest.raises(DataError, match="no split 'dev'; known: train, validation, test"):
        next(source.batches("dev"))  # type: ignore[arg-type]
    x, y, _ = numbered(4)
    with pytest.raises(DataError, match="no training examples"):
        Arrays("e", {"train": (x[:0], y[:0]), "validation": (x, y), "test": (x, y)}, classes=4)


@pytest.mark.parametrize("kind", corruptions.KINDS)
def test_corrupted_batches_are_corrupted_before_standardising(kind: str) -> None:
    source = made()
    clean = source.parts["test"][0].float() / 255
    found = list(source.corrupted(kind, 3, seed=1, batch_size=8))
    again = list(source.corrupted(kind, 3, seed=1, batch_size=8))
    assert [len(y) for _, y in found] == [8, 8, 4]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(found, again, strict=True))
    assert torch.equal(torch.cat([y for _, y in found]), source.parts["test"][1])
    back = torch.cat([x for x, _ in found]) * source.std + source.mean
    assert float((back - clean).abs().max()) > 0.01
    assert float(back.min()) > -1e-5
    assert float(back.max()) < 1 + 1e-5
    if kind in ("blur", "contrast", "pixelate"):  # no draw
        assert torch.allclose(back, corruptions.corrupt(clean, kind, 3), atol=1e-5)


def test_noise_differs_from_batch_to_batch() -> None:
    x = torch.full((16, 1, 8, 8), 0.5)
    y = torch.zeros(16, dtype=torch.int64)
    source = Arrays("plain", {"train": (x, y), "validation": (x, y), "test": (x, y)}, classes=1)
    first, second = (x for x, _ in source.corrupted("gaussian-noise", 1, batch_size=8))
    assert not torch.equal(first, second)


def test_what_cannot_be_corrupted_is_told() -> None:
    y = torch.zeros(4, dtype=torch.int64)
    for x, words in ((torch.rand(4, 7), "no images"), (torch.rand(4, 1, 3, 3) * 9, r"in \[0, 1\]")):
        source = Arrays("x", {"train": (x, y), "validation": (x, y), "test": (x, y)}, classes=1)
        with pytest.raises(DataError, match=words):
            next(source.corrupted("blur", 1))
    with pytest.raises(DataError, match="no corruption"):
        next(source.corrupted("fog", 1))
