"""The arms of a task do the same work."""

from __future__ import annotations

import torch

from openwork.bench import tasks


def test_both_ways_to_train_take_the_same_steps(monkeypatch):
    monkeypatch.setattr(tasks, "WIDTHS", (20, 30, 30, 30))
    monkeypatch.setattr(tasks, "BATCH", 8)
    dense, sparse = tasks.Masked(*tasks.start(0.2)[:3]), tasks.Truly(*tasks.start(0.2)[:3])
    *_, x, y = tasks.start(0.2)
    first = tasks.step(dense, x, y)
    assert torch.allclose(first, tasks.step(sparse, x, y), rtol=1e-5)
    for _ in range(4):
        one, two = tasks.step(dense, x, y), tasks.step(sparse, x, y)
        assert torch.allclose(one, two, rtol=1e-4)
    assert one < first
    for weight, twin in zip(dense.dense(), sparse.dense(), strict=True):
        assert torch.equal(weight == 0, twin == 0)
        assert float((weight - twin).abs().max()) <= 1e-4 * float(weight.abs().max())
    assert [int((weight != 0).sum()) for weight in dense.dense()] == [120, 180, 180, 300]


def test_training_is_measured_against_masked_dense(monkeypatch):
    monkeypatch.setattr(tasks, "WIDTHS", (20, 30, 30, 30))
    row = tasks.measure("training 95 %", ["openwork"], seconds=0.01)
    assert {name: arm.status for name, arm in row.arms.items()} == {"masked dense": "ok", "openwork": "ok"}
    assert row.arms["masked dense"].ratio == 1.0
    assert set(tasks.measure("training 95 %", [], seconds=0.01).arms) == {"masked dense"}


def test_decoding_is_checked_and_measured(monkeypatch):
    monkeypatch.setattr(tasks, "CODES", (6, 3, 40, 5))
    row = tasks.measure("decode", ["openwork"], seconds=0.01)
    assert {name: arm.status for name, arm in row.arms.items()} == dict.fromkeys(
        ("dense", "embedding_bag", "openwork"), "ok"
    )
    assert all(arm.error <= 1.0 for arm in row.arms.values())
