"""The fault kit: what goes wrong on real machines, on demand. For the tests of openwork and of any other program.

Killed processes, full disks, flipped bits, cut files, NaN in the middle of training, slow disks, clocks that jump, ranks
that disagree, memory that runs out, no network, hostile names, mutants of a file. Everything that is drawn is a function
of a seed, everything that is patched is put back, and nothing here ever writes to a device node: what replaces its target
would replace the node by a plain file.
"""

from __future__ import annotations

import contextlib
import errno
import math
import multiprocessing.process
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openwork import atomic
from openwork.core.masks import Masks
from openwork.errors import FormatError, MaskError, RecipeError
from openwork.sparsifier.sparsifier import Sparsifier
from openwork.testing._mutants import drawn, mutate

Child = subprocess.Popen[Any] | multiprocessing.process.BaseProcess
__all__ = [
    "PLACES", "clock_jump", "flip_bit", "full_disk", "hostile_names", "is_disk", "kill_at_random", "mutate", "nan_at",
    "offline", "offline_environment", "rank_disagrees", "slow_io", "truncate", "worker_oom",
]  # fmt: skip

PLACES = ("input", "weight", "gradient", "loss", "score")

HOSTILE = {
    "script": "<script>alert(1)</script>",
    "quotes": "\"><img src=x onerror='alert(1)'>",
    "parents": "../../../../etc/passwd",
    "right to left": "model\N{RIGHT-TO-LEFT OVERRIDE}gpj.exe",
    "long": "long" * 2500,
    "lines": "one\ntwo\r\nthree",
    "nul": "before\0after",
    "template": "{{7*7}}${7*7}{% raw %}",
    "terminal": "\x1b[31mred\x1b[0m\x1b]0;title\x07",
    "formula": "=1+cmd|' /C calc'!A1",
    "end of script": "</script><!--",
    "lone surrogate": "half \ud83d of a face",
}


def kill_at_random(child: Child, *, within: tuple[float, float] = (0.0, 1.0), seed: int = 0) -> int:
    """Send SIGKILL to a child process at a random moment, wait for its end, and return its exit status.

    Args:
        child: a `subprocess.Popen` or a `multiprocessing` process that has been started.
        within: the earliest and the latest moment, in seconds from now.
        seed: of the moment.

    Returns:
        -9 if the signal ended it; another status if it had ended before.
    """
    time.sleep(drawn(seed, "kill").uniform(*within))
    child.kill()
    if isinstance(child, subprocess.Popen):
        return int(child.wait())
    child.join()
    return int(child.exitcode or 0)


@contextlib.contextmanager
def full_disk(path: str | Path, *, room: int = 64 * 1024) -> Iterator[Path]:
    """Yield a folder on a disk that has `room` bytes, rounded up to whole pages; writing more fails.

    Where this process may mount, the disk is a real one in memory (tmpfs) over the folder `path`, and a write beyond it
    fails with ENOSPC in this and every other process. Elsewhere no file of this process and of the children that it
    starts may grow beyond `room` (RLIMIT_FSIZE), and a longer write fails with EFBIG. `is_disk` tells which it was.

    Args:
        path: a folder that is empty or not there; what is written on a mounted disk is gone afterwards.
        room: bytes.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise RecipeError(f"{str(folder)!r} is not empty: give a folder of its own to the full disk")
    size = -(-room // 4096) * 4096
    if _run("mount", "-t", "tmpfs", "-o", f"size={size},mode=0755", "openwork-full-disk", str(folder)):
        try:
            yield folder
        finally:
            if not _run("umount", str(folder)):
                _run("umount", "-l", str(folder))
        return
    with _limited("RLIMIT_FSIZE", room):
        yield folder


def is_disk(folder: str | Path) -> bool:
    """Tell whether a folder that `full_disk` yielded is a disk of its own, rather than a limit on file sizes."""
    return os.path.ismount(folder)


def flip_bit(path: str | Path, *, bit: int | None = None, seed: int = 0) -> int:
    """Flip one bit of a file in place and return which: `bit`, or one drawn by `seed`.

    Raises:
        FormatError: if the file is empty, no regular file, or shorter than that.
    """
    size = 8 * _regular(path)
    place = drawn(seed, "flip", size).randrange(size) if bit is None and size else bit or 0
    if not 0 <= place < size:
        raise FormatError(f"{str(path)!r} has {size} bits and no bit {place}")
    with open(path, "r+b") as stream:
        stream.seek(place // 8)
        byte = stream.read(1)[0]
        stream.seek(place // 8)
        stream.write(bytes([byte ^ 1 << place % 8]))
    return place


def truncate(path: str | Path, *, keep: int | None = None, seed: int = 0) -> int:
    """Cut a file in place to its first `keep` bytes, or to a number drawn by `seed` below its size; return it.

    Raises:
        FormatError: if the file is no regular file, or not longer than that.
    """
    size = _regular(path)
    left = drawn(seed, "truncate", size).randrange(size) if keep is None and size else keep or 0
    if not 0 <= left < max(size, 1):
        raise FormatError(f"{str(path)!r} has {size} bytes and cannot be cut to {left}")
    os.truncate(path, left)
    return left


@contextlib.contextmanager
def nan_at(
    step: int,
    where: str,
    model: nn.Module,
    *,
    name: str | None = None,
    sparsifier: Sparsifier | None = None,
    value: float = math.nan,
) -> Iterator[None]:
    """Put one number that is not finite into training at a step, while the block runs.

    Args:
        step: the forward pass with gradients that it happens in, from 0; an optimizer step of a plain loop.
        where: "input" (the batch), "weight" (of a parameter, before the pass), "gradient" (of a parameter, after it),
            "loss" (all of the model's output, and so the loss), or "score" (what
            a sparsifier ranks a parameter's weights by, at that step).
        model: called as usual; hooks are on it while the block runs.
        name: the parameter; the first one (of those that are masked, for a score) if it is not given.
        sparsifier: for "score".
        value: NaN or an infinity.

    Raises:
        RecipeError: for another place, or a score without a sparsifier.
    """
    if where not in PLACES or (where == "score") != (sparsifier is not None):
        raise RecipeError(f"nan_at knows the places {', '.join(PLACES)}, the last with a sparsifier; got {where!r}")
    if sparsifier is not None:
        with _bad_score(step, sparsifier, name, value):
            yield
        return
    params = dict(model.named_parameters())
    target = params[name or next(iter(params))]
    passes = -1

    def before(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        nonlocal passes
        passes += torch.is_grad_enabled()
        if passes == step and where == "weight":
            _spoil(target, value)
        return (_spoilt(inputs[0], value), *inputs[1:]) if passes == step and where == "input" else None

    def after(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor | None:
        return torch.full_like(output, value) + 0 * output if passes == step and where == "loss" else None

    def backward(grad: Tensor) -> Tensor | None:
        return _spoilt(grad, value) if passes == step and where == "gradient" else None

    watched: Any = target  # torch does not type the hooks of tensors
    handles: list[Any] = [
        model.register_forward_pre_hook(before),
        model.register_forward_hook(after),
        watched.register_hook(backward),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def slow_io(seconds: float = 0.01) -> Iterator[list[str]]:
    """Make `os.open`, `os.fsync` and `os.replace` of this process take `seconds` longer; yield the calls so far."""
    calls: list[str] = []
    before = {name: getattr(os, name) for name in ("open", "fsync", "replace")}

    def slowed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wait(*args: Any, **more: Any) -> Any:
            calls.append(name)
            time.sleep(seconds)
            return call(*args, **more)

        return wait

    with _replaced(os, {name: slowed(name, call) for name, call in before.items()}):
        yield calls


@contextlib.contextmanager
def clock_jump(seconds: float, *, after: int = 0, monotonic: bool = False) -> Iterator[None]:
    """Let the clock of this process jump by `seconds` (backwards if negative) after it was read `after` times.

    `time.time` and `time.time_ns` jump, as when a clock is set; with `monotonic` also `time.monotonic` and
    `time.perf_counter`, as after a machine slept (forward only).

    Raises:
        RecipeError: if a monotonic clock is to go backwards.
    """
    if monotonic and seconds < 0:
        raise RecipeError(f"a monotonic clock cannot go back by {-seconds} s; leave monotonic=False")
    readings, lock = 0, threading.Lock()

    def shift() -> float:
        nonlocal readings
        with lock:
            readings += 1
            return seconds if readings > after else 0.0

    names = ["time", *(["monotonic", "perf_counter"] if monotonic else [])]
    clocks: dict[str, Any] = {name: getattr(time, name) for name in names}
    jumping: dict[str, Any] = {name: partial(_shifted, clock, shift) for name, clock in clocks.items()}
    whole = time.time_ns
    with _replaced(time, {**jumping, "time_ns": lambda: whole() + int(shift() * 1e9)}):
        yield


def rank_disagrees(sparsifier: Sparsifier, *, rank: int, name: str | None = None, index: int = 0) -> bool:
    """Flip one bit of a mask on one rank of the process group, and tell whether this is that rank.

    To be called on all ranks. The flipped bit is a mask that no other rank has: what a broken network card, a rank-local
    criterion or a forgotten seed would do.

    Args:
        sparsifier: attached.
        rank: where; without a process group this process is rank 0.
        name: which parameter's mask, the first if it is not given.
        index: the flat index.

    Raises:
        MaskError: if there is no such mask or index.
    """
    from torch import distributed

    here = distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
    masks = dict(sparsifier.masks)
    chosen = next(iter(masks), None) if name is None else name
    if chosen is None or chosen not in masks or not 0 <= index < masks[chosen].numel():
        raise MaskError(
            f"the sparsifier has no mask {chosen!r} with an entry {index}; it masks {', '.join(masks) or 'nothing'}"
        )
    if here != rank:
        return False
    flipped = masks[chosen].clone()
    flipped.view(-1)[index] = ~flipped.view(-1)[index]
    sparsifier.masks = Masks({**masks, chosen: flipped})
    return True


@contextlib.contextmanager
def worker_oom(room: int = 64 * 2**20) -> Iterator[None]:
    """Let this process allocate only `room` bytes more while the block runs, so that it runs out of memory (POSIX).

    Python then raises a MemoryError, torch a RuntimeError. Call it in a worker: it limits the whole process.
    """
    used = 0
    with contextlib.suppress(OSError):
        used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE")
    with _limited("RLIMIT_AS", used + room):
        yield


@contextlib.contextmanager
def offline() -> Iterator[list[Any]]:
    """Refuse every connection of this process to anything but local sockets; yield the addresses that were asked for."""
    asked: list[Any] = []

    def refuse(one: socket.socket, address: Any) -> Any:
        if one.family == getattr(socket, "AF_UNIX", None):
            return connect(one, address)
        asked.append(address)
        raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))

    def resolve(*address: Any, **_more: Any) -> Any:
        asked.append(address)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    connect = socket.socket.connect
    with _replaced(socket, {"getaddrinfo": resolve}), _replaced(socket.socket, {"connect": refuse, "connect_ex": refuse}):
        yield asked


def offline_environment(folder: str | Path) -> dict[str, str]:
    """Return an environment in which Python programs, their children included, have no network; see `offline`.

    Args:
        folder: where the start-up file that does it is written (`sitecustomize.py`).
    """
    text = (
        "import errno, os, socket\n"
        "def _refuse(self, address, _connect=socket.socket.connect):\n"
        "    if self.family == getattr(socket, 'AF_UNIX', None):\n"
        "        return _connect(self, address)\n"
        "    raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))\n"
        "def _resolve(*address, **more):\n"
        "    raise socket.gaierror(socket.EAI_AGAIN, 'Temporary failure in name resolution')\n"
        "socket.socket.connect = socket.socket.connect_ex = _refuse\n"
        "socket.getaddrinfo = _resolve\n"
    )
    atomic.write_bytes(Path(folder) / "sitecustomize.py", text.encode())
    paths = [str(Path(folder).resolve()), *(path for path in sys.path if path)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


def hostile_names() -> dict[str, str]:
    """Return a dozen names that break what shows or stores them, by what they attack.

    Markup, quotes, paths, writing direction, length, line ends, NUL, templates, terminal escapes, spreadsheet formulas,
    the end of a script tag, and a half of a surrogate pair that UTF-8 cannot express. File systems refuse some of them.
    """
    return dict(HOSTILE)


@contextlib.contextmanager
def _bad_score(step: int, sparsifier: Sparsifier, name: str | None, value: float) -> Iterator[None]:
    """Spoil the criterion that the sparsifier scores with at a step; the check behind it sees the bad number."""
    score = sparsifier.score

    def spoilt(params: Any, criterion: Any, grads: Any = None) -> dict[str, Tensor]:
        first = name or next(iter(params), None)

        def bad(weight: Tensor, context: Any) -> Tensor:
            found: Tensor = criterion(weight, context)
            return _spoilt(found, value) if context.step == step and context.name == first else found

        return score(params, bad, grads)

    sparsifier.score = spoilt  # type: ignore[method-assign]
    try:
        yield
    finally:
        del sparsifier.score


def _spoilt(tensor: Tensor, value: float) -> Tensor:
    """Return a copy with `value` as its first number; what holds no floating-point numbers comes back as it is."""
    if not tensor.is_floating_point() or not tensor.numel():
        return tensor
    places = torch.zeros(tensor.shape, dtype=torch.bool, device=tensor.device)
    places.view(-1)[0] = True
    return tensor.masked_fill(places, value)


def _spoil(param: Tensor, value: float) -> None:
    with torch.no_grad():
        param.view(-1)[0] = value


def _regular(path: str | Path) -> int:
    """Return the size of a file in bytes, and refuse everything that is no regular file, links to devices included."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise FormatError(f"cannot damage {str(path)!r}: {error.strerror or error}") from error
    if not stat.S_ISREG(found.st_mode):
        raise FormatError(f"{str(path)!r} is no regular file and is left alone")
    return found.st_size


def _shifted(clock: Callable[[], float], shift: Callable[[], float]) -> float:
    return clock() + shift()


def _run(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@contextlib.contextmanager
def _limited(name: str, most: int) -> Iterator[None]:
    """Lower a soft resource limit while the block runs."""
    import resource

    kind = getattr(resource, name)
    soft, hard = resource.getrlimit(kind)
    low = most if hard == resource.RLIM_INFINITY else min(most, hard)
    handler = signal.getsignal(signal.SIGXFSZ)
    in_main = threading.current_thread() is threading.main_thread()
    if in_main:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(kind, (low, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))
        if in_main and handler is not None:
            signal.signal(signal.SIGXFSZ, handler)


@contextlib.contextmanager
def _replaced(owner: Any, new: dict[str, Any]) -> Iterator[None]:
    """Put other attributes on a module or class while the block runs."""
    before = {name: getattr(owner, name) for name in new}
    try:
        for name, value in new.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)
