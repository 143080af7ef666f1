"""From LLVM IR to an address: compile once, keep the object code on disk, trust nothing on disk without its digest."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from openwork import atomic
from openwork.errors import ModelError, OpenworkError
from openwork.runtime.kernels.target import Target

_LOCK = threading.RLock()
_ADDRESSES: dict[tuple[str, str, str], int] = {}
_ENGINES: list[Any] = []
_MAGIC = b"openwork-kernel-2\n"
_OBJECTS = (b"\x7fELF", b"\xcf\xfa\xed\xfe", b"\x64\x86", b"\x64\xaa")
"""How object files of ELF, Mach-O and COFF begin; LLVM does not survive another file."""


def address(name: str, target: Target, build: Callable[[], str]) -> int:
    """Return the address of the function `name` compiled for `target`.

    Compiled at the first call of a process, or read from the cache folder of an earlier one. The cache is keyed by the
    text of the code, the target and the version of LLVM, so a stale entry is never found; an entry whose digest does
    not match its content is compiled again and written over.

    Args:
        name: the function that the module defines; names stand for one text each.
        target: what to compile for; the machine must be able to run it.
        build: returns the module as LLVM IR text; called at most once a process.

    Raises:
        ModelError: if there is no LLVM on this machine, or it refuses the text.
    """
    key = (name, target.name, str(getattr(getattr(build, "func", build), "__module__", "")))  # a name is one file's own
    found = _ADDRESSES.get(key)
    if found is not None:
        return found
    with _LOCK:
        if key not in _ADDRESSES:
            _ADDRESSES[key] = _load(name, target, build())
        return _ADDRESSES[key]


def folder() -> Path:
    """Return the folder of compiled kernels: OPENWORK_CACHE/kernels, else below the user's cache."""
    base = os.environ.get("OPENWORK_CACHE")
    if base:
        return Path(base) / "kernels"
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "openwork" / "kernels"


def _load(name: str, target: Target, text: str) -> int:
    machine, llvm = _machine(target)
    version = ".".join(map(str, llvm.llvm_version_info))
    key = hashlib.sha256("\n".join((text, target.cpu, target.features, version, "static large")).encode()).hexdigest()
    place = folder() / f"{name[:80]}-{key[:24]}.o"
    code = _read(place, key)
    if code is not None:
        with contextlib.suppress(ModelError):  # whole by its digest, yet not to be linked: compile it again
            return _link(name, code, target)
    code = _compile(text, machine, llvm)
    _write(place, key, code)
    return _link(name, code, target)


def _compile(text: str, machine: Any, llvm: Any) -> bytes:
    try:
        module = llvm.parse_assembly(text)
        module.verify()
    except RuntimeError as error:
        raise ModelError(f"LLVM refuses a kernel ({error}): set OPENWORK_KERNELS=none and report it") from error
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = False
    options.slp_vectorization = False
    options.loop_unrolling = False
    passes = llvm.create_pass_builder(machine, options)
    passes.getModulePassManager().run(module, passes)
    return bytes(machine.emit_object(module))


def _link(name: str, code: bytes, target: Target) -> int:
    _, llvm = _machine(target)
    try:
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _new_machine(target, llvm))
        engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        engine.finalize_object()
        found = int(engine.get_function_address(name))
    except RuntimeError as error:
        raise ModelError(f"the kernel {name} cannot be linked ({error}): set OPENWORK_KERNELS=none") from error
    if not found:
        raise ModelError(f"the kernel {name} is not in its own code: set OPENWORK_KERNELS=none and report it")
    _ENGINES.append(engine)  # an engine owns the memory of its code
    return found


@functools.cache
def _machine(target: Target) -> tuple[Any, Any]:
    try:
        import llvmlite.binding as llvm
    except (ImportError, OSError) as error:
        raise ModelError("there is no llvmlite on this machine: pip install llvmlite") from error
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return _new_machine(target, llvm), llvm


def _new_machine(target: Target, llvm: Any) -> Any:
    triple = llvm.Target.from_triple(llvm.get_process_triple())
    return triple.create_target_machine(
        cpu=target.cpu, features=target.features, opt=3, reloc="static", codemodel="large", jit=True
    )


def _read(place: Path, key: str) -> bytes | None:
    """Return the object code of a cache file; None if there is none, or it is not what was written."""
    try:
        raw = place.read_bytes()
    except OSError:
        return None
    head, code = raw[: len(_MAGIC) + 128], raw[len(_MAGIC) + 128 :]
    whole = head == _MAGIC + key.encode() + hashlib.sha256(code).hexdigest().encode()
    return code if whole and code.startswith(_OBJECTS) else None


def _write(place: Path, key: str, code: bytes) -> None:
    """Keep object code for the next process; a folder that cannot be written costs time only."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with atomic.replacing(place) as stream:
            stream.write(_MAGIC + key.encode() + hashlib.sha256(code).hexdigest().encode() + code)
    except (OSError, OpenworkError):
        return
