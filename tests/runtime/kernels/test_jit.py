from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openwork.errors import ModelError
from openwork.runtime.kernels import jit
from openwork.runtime.kernels.emit import Emitter
from openwork.runtime.kernels.target import Target, targets

pytestmark = pytest.mark.skipif(not targets(), reason="no LLVM on this machine")


def text(name: str, target: Target, number: int, built: list[str]) -> str:
    """A kernel that writes `number` to entry `unit` of an array of int64."""
    built.append(name)
    e = Emitter(name, target)
    e.store(e.int(number), e.item(e.pointer(0), e.unit, e.i64), 8)
    return e.text()


def call(where: int) -> int:
    found = np.zeros(3, np.int64)
    slots = np.array([found.ctypes.data], np.int64)
    ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)(where)(slots.ctypes.data, 1)
    assert found[0] == found[2] == 0
    return int(found[1])


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An empty cache folder, and no memory of what was compiled."""
    monkeypatch.setenv("OPENWORK_CACHE", str(tmp_path))
    monkeypatch.setattr(jit, "_ADDRESSES", {})
    return tmp_path / "kernels"


def address(name: str, number: int, built: list[str], target: Target | None = None) -> int:
    target = target or next(iter(targets().values()))
    return jit.address(name, target, functools.partial(text, name, target, number, built))


@pytest.mark.parametrize("name", targets())
def test_cold_warm_and_in_memory(name: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    compile = jit._compile
    monkeypatch.setattr(jit, "_compile", lambda *parts: compiled.append("now") or compile(*parts))
    built: list[str] = []
    assert call(address("jit_a", 11, built, targets()[name])) == 11
    assert len(list(cache.iterdir())) == len(compiled) == len(built) == 1
    assert call(address("jit_a", 11, built, targets()[name])) == 11
    assert len(built) == 1
    monkeypatch.setattr(jit, "_ADDRESSES", {})  # another process
    assert call(address("jit_a", 11, built, targets()[name])) == 11
    assert (len(built), len(compiled)) == (2, 1)


def test_the_text_is_the_key_not_the_name(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    assert call(address("jit_b", 1, built)) == 1
    monkeypatch.setattr(jit, "_ADDRESSES", {})
    assert call(address("jit_b", 2, built)) == 2
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: raw[: len(raw) // 2],
        lambda raw: raw[:-1],
        lambda raw: raw + b"\0",
        lambda raw: raw[:30] + bytes([raw[30] ^ 1]) + raw[31:],
        lambda raw: raw[:-40] + bytes([raw[-40] ^ 128]) + raw[-39:],
        lambda raw: os.urandom(len(raw)),
        lambda raw: b"x" + raw[1:],
    ],
)
def test_a_damaged_file_is_compiled_again(damage: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    assert call(address("jit_c", 5, built)) == 5
    (place,) = cache.iterdir()
    whole = place.read_bytes()
    place.write_bytes(damage(whole))
    monkeypatch.setattr(jit, "_ADDRESSES", {})
    assert call(address("jit_c", 5, built)) == 5
    assert place.read_bytes() == whole


def test_a_whole_file_with_another_function_is_compiled_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    address("jit_d", 6, built)
    (place,) = cache.iterdir()
    whole, start = place.read_bytes(), len(jit._MAGIC)
    address("jit_other", 6, built)
    (other,) = set(cache.iterdir()) - {place}
    jit._write(place, whole[start : start + 64].decode(), other.read_bytes()[start + 128 :])
    assert place.read_bytes() != whole
    monkeypatch.setattr(jit, "_ADDRESSES", {})
    assert call(address("jit_d", 6, built)) == 6
    assert place.read_bytes() == whole


def test_a_folder_that_cannot_be_written_costs_time_only(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("OPENWORK_CACHE", str(blocked))
    assert call(address("jit_e", 7, [])) == 7
    assert blocked.read_text() == "not a folder"


def test_the_folder_follows_the_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPENWORK_CACHE", str(tmp_path))
    assert jit.folder() == tmp_path / "kernels"
    monkeypatch.delenv("OPENWORK_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert jit.folder() == tmp_path / "x" / "openwork" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert jit.folder() == Path.home() / ".cache" / "openwork" / "kernels"


def test_nonsense_is_refused(cache: Path) -> None:
    target = next(iter(targets().values()))
    with pytest.raises(ModelError, match="LLVM refuses a kernel"):
        jit.address("jit_f", target, lambda: "this is no code")
    with pytest.raises(ModelError, match=r"jit_g is not in its own code|cannot be linked"):
        jit.address("jit_g", target, functools.partial(text, "jit_other", target, 1, []))
    assert call(address("jit_f", 3, [])) == 3


def test_many_threads_compile_once(cache: Path) -> None:
    built: list[str] = []
    found: list[int] = []
    together = threading.Barrier(8)

    def work() -> None:
        together.wait()
        found.append(address("jit_h", 9, built))

    workers = [threading.Thread(target=work) for _ in range(8)]
    for one in workers:
        one.start()
    for one in workers:
        one.join()
    assert len(built) == len(set(found)) == 1
    assert call(found[0]) == 9


def test_processes_may_share_a_cold_cache(cache: Path) -> None:
    code = (
        "import numpy as np, torch\n"
        "from openwork.runtime.spmm import pack_spmm, spmm_chw\n"
        "w, x = torch.eye(8) * 3, torch.arange(8 * 20.0).reshape(8, 20)\n"
        "assert torch.equal(spmm_chw(pack_spmm(w, block=1), x), 3 * x)\n"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OPENWORK_CACHE": str(cache.parent)})
        for _ in range(2)
    ]
    assert [one.wait(120) for one in running] == [0, 0]
    assert list(cache.glob("*.o"))
    assert not [one for one in cache.iterdir() if one.suffix != ".o"]


def test_two_files_may_not_share_a_kernel_by_its_name() -> None:
    """A kernel called with the slots of another reads what is not there."""
    import re
    from pathlib import Path

    import openwork.runtime.kernels as kernels

    prefixes: dict[str, set[str]] = {}
    for file in Path(kernels.__path__[0]).glob("*.py"):
        for word in re.findall(r'name = f"(openwork_[a-z]+)', file.read_text(encoding="utf-8")):
            prefixes.setdefault(word, set()).add(file.name)
    assert prefixes
    assert {word: files for word, files in prefixes.items() if len(files) > 1} == {}
