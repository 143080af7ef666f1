"""Each fault does what it says, and everything is as before when it is over."""

from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from openwork import atomic
from openwork.core import criteria
from openwork.core.rng import generator
from openwork.errors import DivergedError, FormatError, MaskError, RecipeError, StoreError
from openwork.methods.sparsify.rigl import RigL
from openwork.report.text import visible
from openwork.testing import faults
from openwork.train import checkpoints
from openwork.train.loop import fit
from openwork.train.settings import Settings
from tests.train.toys import Toy
from tests.train.toys import net as toy

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def test_a_child_is_killed_within_the_time() -> None:
    began = time.monotonic()
    assert faults.kill_at_random(subprocess.Popen(SLEEP), within=(0.0, 0.1)) == -signal.SIGKILL
    assert time.monotonic() - began < 30
    done = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    done.wait()
    assert faults.kill_at_random(done, within=(0.0, 0.0)) == 3
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    assert faults.kill_at_random(child, within=(0.0, 0.05), seed=1) == -signal.SIGKILL


def test_the_moment_is_a_function_of_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    for seed in (0, 0, 1):
        done = subprocess.Popen([sys.executable, "-c", ""])
        done.wait()
        faults.kill_at_random(done, within=(1.0, 2.0), seed=seed)
    pauses = [pause for pause in slept if 1.0 <= pause <= 2.0]
    assert pauses[0] == pauses[1] != pauses[2]


def test_a_full_disk_refuses_what_does_not_fit_and_goes_away(tmp_path: Path) -> None:
    with faults.full_disk(tmp_path / "disk", room=64 * 1024) as disk:
        atomic.write_bytes(disk / "small", b"x" * 1000)
        with pytest.raises(StoreError) as caught:
            atomic.write_bytes(disk / "large", b"x" * 200_000)
        assert ("the disk is full" in str(caught.value)) == faults.is_disk(disk)
        assert (disk / "small").read_bytes() == b"x" * 1000
        assert not (disk / "large").exists()
        assert [path.name for path in disk.iterdir()] == ["small"]
    atomic.write_bytes(tmp_path / "disk" / "large", b"x" * 200_000)


def test_without_the_right_to_mount_the_limit_is_on_the_size_of_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "_run", lambda *_command: False)
    handler = signal.getsignal(signal.SIGXFSZ)
    with faults.full_disk(tmp_path / "disk", room=5000) as disk:
        assert not faults.is_disk(disk)
        atomic.write_bytes(disk / "small", b"x" * 4000)
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            (disk / "large").write_bytes(b"x" * 10_000)
        child = f"open({str(disk / 'own')!r}, 'wb').write(b'x' * 10_000)"
        done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=False)
        assert "File too large" in done.stderr
    assert signal.getsignal(signal.SIGXFSZ) == handler
    (disk / "large").write_bytes(b"x" * 10_000)


def test_a_full_disk_takes_no_folder_that_is_in_use(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(RecipeError, match="is not empty"), faults.full_disk(tmp_path):
        pass
    assert (tmp_path / "mine").read_text() == "kept"


def test_one_bit_is_flipped_and_back(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(100))
    for seed in range(20):
        bit = faults.flip_bit(path, seed=seed)
        assert bin(int.from_bytes(path.read_bytes(), "little")).count("1") == 1
        assert path.read_bytes()[bit // 8] == 1 << bit % 8
        assert faults.flip_bit(path, bit=bit) == bit
    assert path.read_bytes() == bytes(100)
    assert len({faults.flip_bit(path, seed=seed) for seed in range(20)}) > 10


def test_a_file_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(range(200)))
    assert faults.truncate(path, keep=150) == 150
    assert path.read_bytes() == bytes(range(150))
    left = faults.truncate(path, seed=3)
    assert path.read_bytes() == bytes(range(left))
    assert left < 150


def test_nothing_but_regular_files_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/dev/null")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "short").write_bytes(b"ab")
    for path in (Path("/dev/null"), tmp_path / "link", tmp_path / "pipe", tmp_path):
        for damage in (faults.flip_bit, faults.truncate):
            with pytest.raises(FormatError, match="is no regular file and is left alone"):
                damage(path)
    with pytest.raises(FormatError, match="cannot damage"):
        faults.flip_bit(tmp_path / "missing")
    with pytest.raises(FormatError, match="has 0 bits and no bit 0"):
        faults.flip_bit(tmp_path / "empty")
    with pytest.raises(FormatError, match="has 16 bits and no bit 16"):
        faults.flip_bit(tmp_path / "short", bit=16)
    with pytest.raises(FormatError, match="has 2 bytes and cannot be cut to 5"):
        faults.truncate(tmp_path / "short", keep=5)
    assert Path("/dev/null").is_char_device()


def net() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(torch.randn(param.shape, generator=generator(0, "faults", name)))
    return model


def taken(model: nn.Module, where: str, step: int, **more: object) -> list[list[str]]:
    """Take four backward passes; return what is not finite in each."""
    found = []
    seen: dict[str, torch.Tensor] = {}
    handle = model[0].register_forward_pre_hook(lambda _module, inputs: seen.update(x=inputs[0]))  # type: ignore[index]
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    with faults.nan_at(step, where, model, **more):  # type: ignore[arg-type]
        for _ in range(4):
            model.zero_grad()
            loss = model(torch.ones(5, 4)).square().sum()
            loss.backward()
            values = {"input": seen["x"], "loss": loss, **{f"grad {n}": p.grad for n, p in model.named_parameters()}}
            values |= {f"weight {name}": param for name, param in model.named_parameters()}
            found.append([name for name, value in values.items() if value is not None and not value.isfinite().all()])
            with torch.no_grad():
                for name, param in model.named_parameters():
                    param.copy_(before[name])
    handle.remove()
    return found


@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_bad_number_comes_at_its_step_and_place(step: int, value: float) -> None:
    for where, first in {"input": "input", "weight": "weight 2.weight", "loss": "loss", "gradient": "grad 2.weight"}.items():
        model = net()
        found = taken(model, where, step, name="2.weight", value=value)
        assert [k for k, names in enumerate(found) if names] == [step], where
        assert first in found[step]
        if where == "gradient":
            assert found[step] == ["grad 2.weight"]
        assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == [0] * 4
        assert all(not param._backward_hooks for param in model.parameters())


def test_a_bad_score_is_refused_by_the_check_behind_the_criterion() -> None:
    model = net()
    held = RigL(0.5, total_steps=100, every=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    held.attach(model, optimizer)
    with faults.nan_at(2, "score", model, name="2.weight", sparsifier=held):
        for _ in range(2):
            model(torch.ones(5, 4)).square().sum().backward()
            optimizer.step()
        masks = held.masks
        with pytest.raises(MaskError, match=r"the scores of '2.weight' at step 2 are not finite"):
            optimizer.step()
    assert held.masks is masks
    assert "score" not in vars(held)
    optimizer.step()
    assert held.score(dict(model.named_parameters()), criteria.magnitude)


def test_other_places_are_refused() -> None:
    words = "knows the places input, weight, gradient, loss, score"
    with pytest.raises(RecipeError, match=words), faults.nan_at(0, "activation", net()):
        pass
    with pytest.raises(RecipeError, match="the last with a sparsifier"), faults.nan_at(0, "score", net()):
        pass


def test_a_slow_disk_is_slow_and_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.open, os.fsync, os.replace
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    with faults.slow_io(0.25) as calls:
        atomic.write_bytes(tmp_path / "a", b"x")
    assert calls == ["open", "fsync", "replace", "open", "fsync"]
    assert slept == [0.25] * 5
    assert (os.open, os.fsync, os.replace) == before
    assert (tmp_path / "a").read_bytes() == b"x"


def test_the_clock_jumps_and_comes_back() -> None:
    before = time.time, time.time_ns, time.monotonic
    now = time.time()
    with faults.clock_jump(-3600.0, after=1):
        assert abs(time.time() - now) < 60
        assert abs(time.time() - now + 3600) < 60
        assert abs(time.time_ns() / 1e9 - now + 3600) < 60
        assert time.monotonic is before[2]
    assert (time.time, time.time_ns, time.monotonic) == before
    began = time.monotonic()
    with faults.clock_jump(500.0, monotonic=True):
        assert 500 <= time.monotonic() - began < 560
    with pytest.raises(RecipeError, match="cannot go back by"), faults.clock_jump(-1.0, monotonic=True):
        pass


def test_a_clock_that_goes_back_does_not_stop_checkpoints(tmp_path: Path) -> None:
    with faults.clock_jump(-1e6, after=2):
        fit(toy(), Toy(), Settings(steps=4, batch_size=8), seed=0, checkpoint=tmp_path, every_seconds=0)
    snapshot, notes = checkpoints.newest(tmp_path)
    assert snapshot is not None
    assert (snapshot.step, notes) == (4, [])


def test_a_rank_disagrees_in_one_bit() -> None:
    model = net()
    held = RigL(0.5, total_steps=10).attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    before = held.masks
    assert not faults.rank_disagrees(held, rank=1)
    assert held.masks is before
    assert faults.rank_disagrees(held, rank=0, name="2.weight", index=3)
    apart = {name: int((mask != before[name]).sum()) for name, mask in held.masks.items()}
    assert apart == {"0.weight": 0, "2.weight": 1}
    with pytest.raises(MaskError, match=r"has no mask '2.bias' with an entry 0; it masks 0.weight, 2.weight"):
        faults.rank_disagrees(held, rank=0, name="2.bias")
    with pytest.raises(MaskError, match="with an entry 99"):
        faults.rank_disagrees(held, rank=0, index=99)


OOM = """
import json, resource
from openwork.testing import faults
before = resource.getrlimit(resource.RLIMIT_AS)
said = []
with faults.worker_oom(32 * 2**20):
    try:
        held = bytearray(2**30)
    except MemoryError:
        said.append("python")
    import torch
    try:
        torch.ones(2**28)
    except RuntimeError:
        said.append("torch")
    small = bytearray(2**20)
print(json.dumps([said, resource.getrlimit(resource.RLIMIT_AS) == before, len(bytearray(2**28))]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the size of a process is read from /proc")
def test_memory_runs_out_and_is_there_again() -> None:
    done = subprocess.run([sys.executable, "-c", OOM], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [["python", "torch"], True, 2**28]


def test_nothing_is_reached_offline_but_local_sockets() -> None:
    before = socket.socket.connect, socket.getaddrinfo
    with faults.offline() as asked:
        with pytest.raises(OSError, match="name resolution"):
            socket.create_connection(("127.0.0.1", 9))
        with socket.socket() as one, pytest.raises(OSError, match=os.strerror(errno.ENETUNREACH)):
            one.connect(("93.184.215.14", 80))
        one, two = socket.socketpair()
        one.sendall(b"x")
        assert two.recv(1) == b"x"
        one.close()
        two.close()
    assert asked[-1] == ("93.184.215.14", 80)
    assert (socket.socket.connect, socket.getaddrinfo) == before


def test_children_are_offline_too(tmp_path: Path) -> None:
    child = "import socket\nsocket.create_connection(('example.org', 80))"
    parent = f"import subprocess, sys; print(subprocess.run([sys.executable, '-c', {child!r}], capture_output=True).stderr)"
    environment = faults.offline_environment(tmp_path)
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True, env=environment)
    assert "Temporary failure in name resolution" in done.stdout


def test_a_dozen_names_and_none_of_them_harmless() -> None:
    names = faults.hostile_names()
    assert len(names) == 12
    for kind, name in names.items():
        shown = visible(name)
        assert kind == "long" or shown != name or set(name) & set('<>{}./="'), kind
    names.clear()
    assert len(faults.hostile_names()) == 12


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.binary(max_size=300), st.integers(0, 1000))
def test_mutants_differ_from_the_data_and_are_repeatable(data: bytes, seed: int) -> None:
    found = list(faults.mutate(data, 12, seed=seed))
    assert len(found) == 12
    assert data not in found
    assert list(faults.mutate(data, 5, seed=seed)) == found[:5]


def test_mutants_are_many_kinds_and_fall_into_the_header() -> None:
    data = b'{"shape": [12, 34], "offsets": [0, 408]}' + bytes(4000)
    found = list(faults.mutate(data, 400, header=40))
    assert len(set(found)) > 350
    assert sum(len(one) != len(data) for one in found) > 80
    assert sum(one[:40] != data[:40] for one in found) > 150
    assert any(b"9" * 20 in one for one in found)
    assert any(one[:40] == data[:40] for one in found)


def test_a_diverged_run_names_what_was_spoilt() -> None:
    model = toy()
    with faults.nan_at(3, "weight", model, name="4.weight"), pytest.raises(DivergedError, match=r"step 3.*'4.weight'"):
        fit(model, Toy(), Settings(steps=9, batch_size=8), seed=0)
