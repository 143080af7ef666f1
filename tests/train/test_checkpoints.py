from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from openwork.core.rng import generator
from openwork.errors import FormatError, StoreError
from openwork.train import checkpoints, state
from openwork.train.checkpoints import MANIFEST, TENSORS


def snapshot(step: int) -> state.Snapshot:
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, step)
    return state.capture(model, torch.optim.SGD(model.parameters(), lr=0.1), None, step, {"note": [1, "é", None]})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_there_and_back(tmp_path: Path) -> None:
    written = snapshot(7)
    place = checkpoints.write(tmp_path / "new" / "run", written)
    assert place.name == "step-000007"
    assert names(place) == [MANIFEST, TENSORS]
    found, notes = checkpoints.newest(tmp_path / "new" / "run")
    assert found is not None
    assert notes == []
    assert found.step == 7
    assert found.manifest["extra"] == {"note": [1, "é", None]}
    assert found.tensors.keys() == written.tensors.keys()
    assert all(torch.equal(found.tensors[key], written.tensors[key]) for key in written.tensors)


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    for step in (0, 5, 999_999, 1_000_000):
        checkpoints.write(tmp_path, snapshot(step))
    assert names(tmp_path) == ["step-1000000", "step-999999"]
    found, _ = checkpoints.newest(tmp_path)
    assert found is not None
    assert found.step == 1_000_000


def test_writing_a_step_again_replaces_it_and_drops_later_ones(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoints.write(tmp_path, snapshot(step))
    (tmp_path / "step-000002" / TENSORS).write_bytes(b"")
    (tmp_path / "step-000009").mkdir()
    checkpoints.write(tmp_path, snapshot(2))
    assert names(tmp_path) == ["step-000001", "step-000002"]
    assert checkpoints.read(tmp_path / "step-000002").step == 2


def test_an_empty_or_missing_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoints.newest(tmp_path) == (None, [])
    assert checkpoints.newest(tmp_path / "missing") == (None, [])


def test_leftovers_of_killed_writers_are_removed_and_strangers_are_not(tmp_path: Path) -> None:
    checkpoints.write(tmp_path, snapshot(1))
    child = subprocess.Popen([sys.executable, "-S", "-c", ""])
    child.wait()
    with checkpoints.atomic.replacing_folder(tmp_path / "other") as temporary:
        name = temporary.name
    shutil.rmtree(tmp_path / "other")
    leftover = tmp_path / name.replace(f"-{os.getpid()}-", f"-{child.pid}-")
    leftover.mkdir()
    (leftover / TENSORS).write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "step-12").mkdir()
    found, notes = checkpoints.newest(tmp_path)
    assert found is not None
    assert notes == []
    assert names(tmp_path) == ["notes.txt", "step-000001", "step-12"]


@pytest.mark.parametrize("file", [TENSORS, MANIFEST])
@pytest.mark.parametrize("harm", ["flip", "truncate", "empty", "remove", "append"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path, file: str, harm: str) -> None:
    for step in (3, 4):
        checkpoints.write(tmp_path, snapshot(step))
    path = tmp_path / "step-000004" / file
    data = bytearray(path.read_bytes())
    if harm == "flip":
        data[len(data) // 2] ^= 1
    elif harm == "truncate":
        del data[-7:]
    elif harm == "empty":
        data.clear()
    else:
        data += b"{}"
    path.write_bytes(data)
    if harm == "remove":
        path.unlink()
    found, notes = checkpoints.newest(tmp_path)
    assert found is not None
    assert found.step == 3
    assert len(notes) == 1
    assert file in notes[0]
    assert "step-000004" in notes[0]
    shutil.rmtree(tmp_path / "step-000003")
    with pytest.raises(FormatError, match=r"all checkpoints in .* are damaged; remove that folder"):
        checkpoints.newest(tmp_path)


@pytest.mark.parametrize("file", [TENSORS, MANIFEST])
def test_any_flipped_bit_is_noticed_or_harmless(tmp_path: Path, file: str) -> None:
    place = checkpoints.write(tmp_path, snapshot(3))
    whole = (place / file).read_bytes()
    true = checkpoints.read(place)
    draw = generator(0, "flips", file)
    for bit in torch.randint(0, 8 * len(whole), (300,), generator=draw).tolist():
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        (place / file).write_bytes(data)
        try:
            found = checkpoints.read(place)
        except FormatError:
            continue
        assert file == MANIFEST, "every bit of the tensors counts"
        assert found.manifest == true.manifest, "only white space may differ"


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{", "[" * 100_000, '{"format": "openwork checkpoint"}', '{"format": "other", "version": 1}', "\xff"],
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: str) -> None:
    place = checkpoints.write(tmp_path, snapshot(3))
    (place / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(FormatError, match=r"manifest\.json"):
        checkpoints.read(place)


def test_a_forged_manifest_over_bad_tensors_is_refused(tmp_path: Path) -> None:
    place = checkpoints.write(tmp_path, snapshot(3))
    (place / TENSORS).write_bytes(b"\xff" * 64)
    manifest = json.loads((place / MANIFEST).read_text())
    manifest.pop("sha256")
    manifest["tensors_sha256"] = checkpoints.hashlib.sha256(b"\xff" * 64).hexdigest()
    manifest["sha256"] = checkpoints._digest(manifest)
    (place / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(FormatError, match="no safetensors file"):
        checkpoints.read(place)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints.write(tmp_path, snapshot(1))

    def full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StoreError, match="disk is full"):
        checkpoints.write(tmp_path, snapshot(2))
    monkeypatch.undo()
    assert names(tmp_path) == ["step-000001"]
    found, notes = checkpoints.newest(tmp_path)
    assert found is not None
    assert (found.step, notes) == (1, [])
