from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from openwork import atomic
from openwork.atomic import replacing, replacing_folder, sweep, write_bytes, write_json
from openwork.errors import StoreError

LOOP = """
import sys
from openwork.atomic import write_bytes
print("ready", flush=True)
count = 0
while True:
    write_bytes(sys.argv[1], bytes([count % 256]) * 300_000)
    count += 1
"""
HOLDER = """
import sys, time
from openwork import atomic
with atomic.alone(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""
FOLDER_LOOP = """
import sys
from openwork.atomic import replacing_folder
print("ready", flush=True)
count = 0
while True:
    with replacing_folder(sys.argv[1]) as folder:
        (folder / "a").write_text(str(count))
        (folder / "b").write_text(str(count))
    count += 1
"""


def temporaries(folder: Path) -> list[Path]:
    return list(folder.glob(atomic.PREFIX + "*"))


def killed_after(program: str, path: Path, seconds: float) -> None:
    child = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    time.sleep(seconds)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()


def test_writes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deep" / "a.bin"
    write_bytes(path, b"one")
    write_bytes(path, bytearray(b"two"))
    assert path.read_bytes() == b"two"
    assert not temporaries(path.parent)


def test_json_is_indented_utf8(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"né": [1, 2.5, None]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert "né" in text
    assert text.endswith("}\n")
    assert json.loads(text) == {"né": [1, 2.5, None]}


@pytest.mark.parametrize("bad", [math.nan, math.inf, {1, 2}, object(), "\ud800"])
def test_json_refuses_what_it_cannot_express(tmp_path: Path, bad: object) -> None:
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(StoreError, match="as JSON"):
        write_json(tmp_path / "a.json", {"x": bad})
    assert json.loads((tmp_path / "a.json").read_text()) == 1


def test_a_failure_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_bytes(path, b"old")

    def interrupted() -> None:
        with replacing(path) as stream:
            stream.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    assert not temporaries(tmp_path)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full; free some space and run the same command again, finished work is kept"),
        (errno.EACCES, "permission denied; choose another folder"),
        (errno.EROFS, "permission denied"),
        (errno.EIO, "check the path and the disk"),
    ],
)
def test_errors_of_the_disk_say_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    path = tmp_path / "a"
    write_bytes(path, b"old")

    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StoreError, match=words) as caught:
        write_bytes(path, b"new")
    assert str(path) in str(caught.value)
    with pytest.raises(StoreError, match=words), replacing_folder(tmp_path / "f") as folder:
        (folder / "x").write_text("x")
    assert path.read_bytes() == b"old"
    assert [child.name for child in tmp_path.iterdir()] == ["a"]


def test_a_full_disk_is_survived(tmp_path: Path) -> None:
    """A file-size limit makes the kernel refuse the write in the middle, as a full disk does."""
    path = tmp_path / "a"
    write_bytes(path, b"old")
    program = (
        "import resource, signal, sys\n"
        "from openwork.atomic import write_bytes\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "write_bytes(sys.argv[1], b'x' * 5000)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=False)
    assert "StoreError: cannot write" in done.stderr
    assert path.read_bytes() == b"old"
    assert not temporaries(tmp_path)


def test_errors_of_other_files_are_not_ours(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "a"):
        (tmp_path / "elsewhere" / "missing").read_text()
    with pytest.raises(FileNotFoundError), replacing_folder(tmp_path / "f"):
        (tmp_path / "elsewhere" / "missing").read_text()
    assert not list(tmp_path.iterdir())


def test_only_files_and_folders_are_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    (tmp_path / "file").write_text("x")
    for path in (Path("/dev/null"), tmp_path / "link", tmp_path / "pipe", tmp_path):
        with pytest.raises(StoreError, match="is not a file"):
            write_bytes(path, b"x")
    with pytest.raises(StoreError, match="is not a folder"), replacing_folder(tmp_path / "file"):
        pass
    assert Path("/dev/null").is_char_device()
    assert (tmp_path / "pipe").is_fifo()


def test_a_link_is_kept_and_its_target_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "a")
    write_bytes(tmp_path / "link", b"x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "a").read_bytes() == b"x"
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(StoreError):
        write_bytes(tmp_path / "loop", b"x")


def test_permissions_are_those_of_the_old_file_or_the_usual_ones(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_bytes(path, b"x")
    (tmp_path / "usual").write_text("x")
    assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode
    path.chmod(0o600)
    write_bytes(path, b"y")
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda one, two: False)
    path = tmp_path / "run"
    for number in range(3):
        with replacing_folder(path) as folder:
            (folder / f"{number}").write_text("x")
            (folder / "deep").mkdir()
            (folder / "deep" / "y").write_text(str(number))
    assert sorted(child.name for child in path.iterdir()) == ["2", "deep"]
    assert (path / "deep" / "y").read_text() == "2"

    def failing() -> None:
        with replacing_folder(path) as folder:
            (folder / "z").write_text("z")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert (path / "2").exists()
    assert [child.name for child in tmp_path.iterdir()] == ["run"]


def test_a_failed_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_exchange", lambda one, two: False)
    path = tmp_path / "run"
    with replacing_folder(path) as folder:
        (folder / "old").write_text("x")
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if Path(target) == path and atomic.ASIDE not in self.name:
            raise OSError(errno.EIO, "no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(StoreError), replacing_folder(path) as folder:
        (folder / "new").write_text("x")
    assert [child.name for child in path.iterdir()] == ["old"]
    assert not temporaries(tmp_path)


def test_sweep_takes_what_dead_writers_left_and_nothing_else(tmp_path: Path) -> None:
    host = atomic._host()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    gone = tmp_path / f"{atomic.PREFIX}{host}-{dead.pid}-aaaa"
    gone_folder = tmp_path / f"{atomic.PREFIX}{host}-{dead.pid}-bbbb"
    living = tmp_path / f"{atomic.PREFIX}{host}-{os.getpid()}-cccc"
    elsewhere = tmp_path / f"{atomic.PREFIX}0000-{dead.pid}-dddd"
    stale = tmp_path / f"{atomic.PREFIX}0000-{dead.pid}-eeee"
    foreign = tmp_path / f"{atomic.PREFIX}notes.txt"
    for path in (gone, living, elsewhere, stale, foreign, tmp_path / "weights"):
        path.write_text("x")
    gone_folder.mkdir()
    (gone_folder / "x").write_text("x")
    os.utime(stale, (0, 0))
    os.utime(foreign, (0, 0))
    assert sweep(tmp_path) == sorted([gone, gone_folder, stale])
    assert sorted(tmp_path.iterdir()) == sorted([living, elsewhere, foreign, tmp_path / "weights"])
    assert sweep(tmp_path / "missing") == []


def test_sweep_gives_a_folder_set_aside_its_name_back(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    name = f"{atomic.PREFIX}{atomic._host()}-{dead.pid}-aaaa"
    for folder in (tmp_path / name, tmp_path / f"{name}{atomic.ASIDE}run", tmp_path / f"{name}{atomic.ASIDE}other"):
        folder.mkdir()
        (folder / "x").write_text(folder.name)
    (tmp_path / "other").mkdir()
    sweep(tmp_path)
    assert sorted(child.name for child in tmp_path.iterdir()) == ["other", "run"]
    assert (tmp_path / "run" / "x").read_text() == f"{name}{atomic.ASIDE}run"


def test_killed_writers_leave_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_bytes(path, b"\0" * 300_000)
    for number in range(50):
        killed_after(LOOP, path, 0.002 + 0.0007 * number)
        data = path.read_bytes()
        assert len(data) == 300_000
        assert len(set(data)) == 1
    sweep(tmp_path)
    assert [child.name for child in tmp_path.iterdir()] == ["a"]


def test_killed_writers_leave_a_whole_folder(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with replacing_folder(path) as folder:
        (folder / "a").write_text("0")
        (folder / "b").write_text("0")
    for number in range(15):
        killed_after(FOLDER_LOOP, path, 0.002 + 0.0011 * number)
        sweep(tmp_path)
        assert (path / "a").read_text() == (path / "b").read_text() != ""
    assert [child.name for child in tmp_path.iterdir()] == ["run"]


def test_a_folder_is_held_by_one_process_until_it_ends(tmp_path: Path) -> None:
    with atomic.alone(tmp_path / "new"):
        with (
            pytest.raises(StoreError, match=rf"\(process {os.getpid()}\) is at work in .*choose another --out"),
            atomic.alone(tmp_path / "new"),
        ):
            pass
        with atomic.alone(tmp_path / "new", "other"):  # another lock
            pass
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "new")], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(StoreError, match=f"process {other.pid}"), atomic.alone(tmp_path / "new"):
            pass
        other.kill()
    with atomic.alone(tmp_path / "new"):
        pass
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(StoreError, match=r"cannot write.*choose another folder"),
        atomic.alone(tmp_path / "file", choose="folder"),
    ):
        pass
