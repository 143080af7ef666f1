from __future__ import annotations

import sys
from typing import Any

import pytest

from openwork.errors import ModelError
from openwork.runtime.kernels import target
from openwork.runtime.kernels.target import VARIABLE, Target, host, targets


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Any:
    target._targets.cache_clear()
    target._chosen.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    target._targets.cache_clear()
    target._chosen.cache_clear()


def test_targets_go_from_the_fastest_to_the_slowest() -> None:
    found = list(targets().values())
    assert [one.name for one in found] == list(targets())
    assert [one.lanes for one in found] == sorted((one.lanes for one in found), reverse=True)
    assert all(one.lanes * 4 in (16, 32, 64) and one.registers in (16, 32) for one in found)
    targets().clear()
    assert list(targets().values()) == found


def test_the_variable_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert host() == next(iter(targets().values()), None)
    for name, one in targets().items():
        monkeypatch.setenv(VARIABLE, name)
        assert host() == one
    monkeypatch.setenv(VARIABLE, "none")
    assert host() is None
    monkeypatch.setenv(VARIABLE, "z80")
    with pytest.raises(ModelError, match=f"{VARIABLE} is 'z80': this machine runs .*or give none"):
        host()


@pytest.mark.parametrize(
    ("machine", "flags", "names"),
    [
        (
            "x86_64",
            {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma", "f16c", "bmi2"},
            ["avx512", "avx2", "generic"],
        ),
        ("AMD64", {"avx512f", "avx2", "fma", "f16c", "bmi2"}, ["avx2", "generic"]),
        ("x86_64", {"avx2"}, ["generic"]),
        ("arm64", set(), ["neon"]),
        ("aarch64", set(), ["neon"]),
        ("riscv64", set(), ["generic"]),
    ],
)
def test_targets_follow_the_processor(machine: str, flags: set[str], names: list[str], fresh: pytest.MonkeyPatch) -> None:
    import llvmlite.binding as llvm

    fresh.setattr(target.platform, "machine", lambda: machine)
    fresh.setattr(llvm, "get_host_cpu_features", lambda: dict.fromkeys(flags, True))
    assert list(targets()) == names


def test_without_llvm_there_are_none(fresh: pytest.MonkeyPatch) -> None:
    fresh.setitem(sys.modules, "llvmlite.binding", None)
    fresh.delenv(VARIABLE, raising=False)
    assert targets() == {}
    assert host() is None
    fresh.setenv(VARIABLE, "avx2")
    with pytest.raises(ModelError, match="runs no kernels"):
        host()


def test_a_target_says_what_it_is() -> None:
    assert Target("neon", "generic", "+neon", 4, 32) == Target("neon", "generic", "+neon", 4, 32)
    assert 8 * 1024 <= target.first_cache() <= 1024 * 1024
    assert target.processor()
