"""Interrupted runs: what is continued ends bit for bit where the uninterrupted run ends."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from openwork.errors import StoreError
from openwork.methods.sparsify.rigl import RigL
from openwork.train import checkpoints, optimizers, rates
from openwork.train.loop import fit
from openwork.train.settings import Settings
from tests.train.toys import Toy, assert_same, net, stop_at, weights

STEPS = 24
SETTINGS = Settings(steps=STEPS, batch_size=8, lr=0.05, warmup=0.1, label_smoothing=0.1)


def make(name: str, sparse: bool) -> tuple[nn.Module, RigL | None]:
    return net(norm=name != "muon"), RigL(0.4, total_steps=STEPS, every=2, stop=0.9) if sparse else None


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", optimizers.names())
def test_every_optimizer_continues_bit_for_bit(tmp_path: Path, name: str, sparse: bool) -> None:
    settings = Settings(steps=STEPS, batch_size=8, lr=0.01, optimizer=name, clip=1.0)
    whole, sparsifier = make(name, sparse)
    history = fit(whole, Toy(), settings, seed=0, sparsifier=sparsifier)
    for cut in (7, 18):  # in the middle of an epoch of 5 steps
        model, held = make(name, sparse)
        with pytest.raises(KeyboardInterrupt):
            fit(model, Toy(), settings, seed=0, sparsifier=held, checkpoint=tmp_path, on_step=stop_at(cut))
        assert (tmp_path / f"step-{cut:06d}").is_dir()
    model, held = make(name, sparse)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(1)  # whatever a fresh model holds, the checkpoint is what counts
    continued = fit(model, Toy(), settings, seed=0, sparsifier=held, checkpoint=tmp_path)
    assert continued.resumed == 18
    assert continued.losses == history.losses
    assert continued.notes == ()
    assert_same(weights(whole), weights(model))
    if sparsifier is not None and held is not None:
        assert_same(dict(sparsifier.masks), dict(held.masks))


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    model, twin = net(), net()
    history = fit(model, Toy(), SETTINGS, seed=0, checkpoint=tmp_path, sparsifier=RigL(0.3, total_steps=STEPS))
    again = fit(
        twin,
        Toy(),
        SETTINGS,
        seed=0,
        checkpoint=tmp_path,
        sparsifier=RigL(0.3, total_steps=STEPS),
        on_step=stop_at(1),
    )
    assert_same(weights(model), weights(twin))
    assert again.resumed == again.steps == STEPS
    assert again.losses == history.losses
    assert again.seconds >= history.seconds * 0.5


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_in_the_middle_of_a_step(tmp_path: Path, times: int) -> None:
    class Interrupting(Toy):
        def train_batches(self, seed: int, epoch: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
            for index, batch in enumerate(super().train_batches(seed, epoch, batch_size)):
                if (epoch, index) == (1, 2):
                    for _ in range(times):
                        signal.raise_signal(signal.SIGINT)
                yield batch

    whole = net()
    fit(whole, Toy(), SETTINGS, seed=0)
    with pytest.raises(KeyboardInterrupt):
        fit(net(), Interrupting(), SETTINGS, seed=0, checkpoint=tmp_path)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    # The first waits for the end of step 7; the second is obeyed at once, in a state that must not be kept.
    assert (tmp_path / "step-000008").is_dir() == (times == 1)
    model = net()
    history = fit(model, Toy(), SETTINGS, seed=0, checkpoint=tmp_path)
    assert history.resumed == (8 if times == 1 else 0)
    assert_same(weights(whole), weights(model))


def test_a_damaged_checkpoint_costs_only_time(tmp_path: Path) -> None:
    whole = net()
    fit(whole, Toy(), SETTINGS, seed=0)
    with pytest.raises(KeyboardInterrupt):
        fit(net(), Toy(), SETTINGS, seed=0, checkpoint=tmp_path, every_seconds=0, on_step=stop_at(11))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json", "step-000010", "step-000011"]
    (tmp_path / "step-000011" / checkpoints.TENSORS).write_bytes(b"junk")
    model = net()
    history = fit(model, Toy(), SETTINGS, seed=0, checkpoint=tmp_path)
    assert history.resumed == 10
    assert len(history.notes) == 1
    assert "step-000011" in history.notes[0]
    assert_same(weights(whole), weights(model))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 1}, "'seed' was 0, now it is 1"),
        ({"stream": 2}, "'stream' was 0, now it is 2"),
        ({"steps": 30}, "'steps' was 24, now it is 30"),
        ({"weight_decay": 0.0}, "'weight_decay' was 0.0005, now it is 0.0"),
        ({"schedule": rates.constant}, "'rate' was"),
        ({"settings": Settings(steps=STEPS, batch_size=8, lr=0.06, warmup=0.1, label_smoothing=0.1)}, "'lr' was 0.05"),
        ({"sparsifier": RigL(0.5, total_steps=STEPS)}, "'density' was None, now it is 0.5"),
    ],
)
def test_another_runs_checkpoints_are_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"settings": SETTINGS, "seed": 0, "checkpoint": tmp_path}
    fit(net(), Toy(), **given, steps=None)
    with pytest.raises(StoreError, match=message):
        fit(net(), Toy(), **{**given, **changed})


def test_other_threads_are_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        fit(net(), Toy(), SETTINGS, seed=0, checkpoint=tmp_path, on_step=stop_at(4))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    history = fit(net(), Toy(), SETTINGS, seed=0, checkpoint=tmp_path)
    assert len(history.notes) == 1
    assert "with 77 threads" in history.notes[0]


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="cannot write"):
        fit(net(), Toy(), SETTINGS, seed=0, checkpoint=tmp_path / "file" / "run", on_step=stop_at(1))


def test_a_disk_that_fills_up_costs_checkpoints_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: Path, snapshot: Any) -> Path:
        raise StoreError("the disk is full")

    whole, model = net(), net()
    fit(whole, Toy(), SETTINGS, seed=0)
    monkeypatch.setattr(checkpoints, "write", full)
    history = fit(model, Toy(), SETTINGS, seed=0, checkpoint=tmp_path)
    assert history.notes == (f"no checkpoint of step {STEPS}: the disk is full",)
    assert_same(whole.state_dict(), weights(model))
