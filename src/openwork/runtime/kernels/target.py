"""The vector features that kernels are generated for: the host's own, and every smaller set that it can run too."""

from __future__ import annotations

import functools
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from openwork.errors import ModelError

VARIABLE = "OPENWORK_KERNELS"
"""Environment variable that names the target to use: avx512, avx2, neon, generic, or none to do without kernels."""


@dataclass(frozen=True)
class Target:
    """What code is generated for.

    Attributes:
        name: avx512, avx2, neon or generic.
        cpu: the processor in LLVM's words.
        features: the features in LLVM's words, empty for those that `cpu` implies.
        lanes: float32 numbers of a vector register.
        registers: vector registers.
    """

    name: str
    cpu: str
    features: str
    lanes: int
    registers: int


def targets() -> dict[str, Target]:
    """Return every target that this machine can run, by name, the fastest first; empty where LLVM is not to be had."""
    return dict(_targets())


def host() -> Target | None:
    """Return the target in use: what OPENWORK_KERNELS names, else the fastest; None where there are no kernels.

    Raises:
        ModelError: if OPENWORK_KERNELS names a target that this machine cannot run.
    """
    return _chosen(os.environ.get(VARIABLE, ""))


@functools.cache
def _chosen(wanted: str) -> Target | None:
    found = targets()
    if wanted == "none":
        return None
    if wanted and wanted not in found:
        raise ModelError(f"{VARIABLE} is {wanted!r}: this machine runs {', '.join(found) or 'no kernels'}, or give none")
    return found[wanted] if wanted else next(iter(found.values()), None)


@functools.cache
def _targets() -> tuple[tuple[str, Target], ...]:
    try:
        import llvmlite.binding as llvm
    except (ImportError, OSError):  # no wheel for this platform: torch's own formats remain
        return ()
    machine = platform.machine().lower()
    found = []
    if machine in ("x86_64", "amd64"):
        flags = dict(llvm.get_host_cpu_features())
        if all(flags.get(flag) for flag in ("avx512f", "avx512bw", "avx512dq", "avx512vl", "fma")):
            found.append(Target("avx512", "x86-64-v4", "", 16, 32))
        if all(flags.get(flag) for flag in ("avx2", "fma", "f16c", "bmi2")):
            found.append(Target("avx2", "x86-64-v3", "", 8, 16))
        found.append(Target("generic", "x86-64", "", 4, 16))
    elif machine in ("aarch64", "arm64"):
        found.append(Target("neon", "generic", "+neon", 4, 32))
    else:
        found.append(Target("generic", "generic", "", 4, 16))
    return tuple((one.name, one) for one in found)


@functools.cache
def first_cache() -> int:
    """Return the bytes of the first data cache of a core, 32 KiB where the system does not say."""
    for place in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            words = [(place / name).read_text().strip() for name in ("level", "type", "size")]
        except OSError:
            continue
        if words[:2] == ["1", "Data"] and words[2].endswith("K"):
            return int(words[2][:-1]) * 1024
    return 32 * 1024


@functools.cache
def processor() -> str:
    """Return the name of the processor, as the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith(("model name", "Model"))]
    return next(iter(names), platform.processor() or platform.machine())
