"""Writing files and folders so that a reader sees the old content or the new one, never half of it.

Everything is written under a temporary name beside its target, flushed to the disk, and renamed once. A process that
is killed leaves its temporary behind; `sweep` removes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from openwork.errors import StoreError

PREFIX = ".openwork-"
ASIDE = ".aside-"
STALE_SECONDS = 86_400.0
_FULL = frozenset({errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)})
_DENIED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_EXCHANGE = 2  # RENAME_EXCHANGE of Linux's renameat2
_HERE = -100  # AT_FDCWD


def write_bytes(path: str | Path, data: bytes | bytearray | memoryview) -> None:
    """Write `data` to `path`; folders above it are made. On any failure the old file stays as it was.

    Raises:
        StoreError: if the disk is full, the path cannot be written, or it names something other than a file.
    """
    with replacing(path) as stream:
        stream.write(data)


def write_json(path: str | Path, obj: Any) -> None:
    """Write `obj` as indented UTF-8 JSON with a final newline, atomically.

    Raises:
        StoreError: as `write_bytes`, and if `obj` holds a NaN, an infinity or what JSON cannot express.
    """
    try:
        data = json.dumps(obj, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        remedy = "keep to finite numbers, text, lists and dicts"
        raise StoreError(f"cannot write {str(path)!r} as JSON: {error}; {remedy}") from error
    write_bytes(path, data)


@contextlib.contextmanager
def alone(folder: str | Path, name: str = ".lock", *, choose: str = "--out") -> Iterator[None]:
    """Hold a folder for this process, made if it is not there; the system lets go when the process ends, however it ends.

    On systems without such locks (Windows) two processes in one folder are the user's own care.

    Args:
        folder: to be held.
        name: of the lock file in it, which keeps the number of the process.
        choose: the setting that takes another folder, for the error.

    Raises:
        StoreError: if the folder cannot be written, or another process holds it.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StoreError(f"cannot write {str(folder)!r}: {error.strerror or error}; choose another {choose}") from error
    try:
        try:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass
        except OSError:
            owner = os.pread(descriptor, 20, 0).decode(errors="replace").strip() or "unknown"
            raise StoreError(
                f"another openwork (process {owner}) is at work in {str(folder)!r}: wait for it, or choose another {choose}"
            ) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """Yield a binary stream whose content takes the place of the file `path` when the block ends without an error.

    Raises:
        StoreError: as `write_bytes`.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(_temporary_name())
    try:
        mode = _mode_of(target, stat.S_ISREG, "a file")
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(descriptor)
        if mode is not None:
            temporary.chmod(mode)
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except OSError as error:
        _forget(temporary)
        if _foreign(error, temporary, target):
            raise
        raise _explained(path, error) from error
    except BaseException:
        _forget(temporary)
        raise


@contextlib.contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of the folder `path` when the block ends without an error.

    Where the system can swap two names (Linux) the change is one step; elsewhere the old folder is set aside for the
    moment between two renames, and `sweep` puts it back if the process dies in that moment.

    Raises:
        StoreError: as `write_bytes`, also for a failure to write inside the yielded folder.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(_temporary_name())
    try:
        mode = _mode_of(target, stat.S_ISDIR, "a folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        _sync_tree(temporary)
        if mode is None:
            temporary.rename(target)
        else:
            temporary.chmod(mode)
            _swap(temporary, target)
        _sync_folder(target.parent)
        _forget(temporary)
    except OSError as error:
        _forget(temporary)
        if _foreign(error, temporary, target):
            raise
        raise _explained(path, error) from error
    except BaseException:
        _forget(temporary)
        raise


def sweep(folder: str | Path) -> list[Path]:
    """Remove the temporaries that killed writers left in `folder`, and return what was removed.

    A temporary is left over when its process on this machine is gone, or when nothing touched it for a day. A folder
    that was set aside and never replaced gets its name back.
    """
    folder = Path(folder)
    removed: list[Path] = []
    for found in sorted(folder.glob(PREFIX + "*")) if folder.is_dir() else []:
        if not _left_over(found):
            continue
        _, aside, original = found.name.partition(ASIDE)
        if aside and original and not (folder / original).exists():
            with contextlib.suppress(OSError):
                found.rename(folder / original)
            continue
        _forget(found)
        if not found.exists():
            removed.append(found)
    return removed


def _temporary_name() -> str:
    """Return `.openwork-HOST-PID-RANDOM`: short, hidden, and telling whether its writer still lives."""
    return f"{PREFIX}{_host()}-{os.getpid()}-{secrets.token_hex(4)}"


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _left_over(path: Path) -> bool:
    host, _, rest = path.name.removeprefix(PREFIX).partition("-")
    pid = rest.partition("-")[0]
    if not pid.isdecimal():
        return False
    if host == _host() and not _alive(int(pid)):
        return True
    with contextlib.suppress(OSError):
        return time.time() - path.lstat().st_mtime > STALE_SECONDS
    return False


def _alive(pid: int) -> bool:
    if os.name == "nt":  # there, signal 0 is not a question
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _mode_of(target: Path, kind: Callable[[int], bool], name: str) -> int | None:
    """Return the permission bits of an existing target, None where there is none; refuse devices and pipes."""
    try:
        found = target.lstat()
    except FileNotFoundError:
        return None
    if not kind(found.st_mode):
        raise StoreError(f"{str(target)!r} exists and is not {name}: choose another path, nothing was written")
    return stat.S_IMODE(found.st_mode)


def _swap(new: Path, old: Path) -> None:
    """Exchange two folders; afterwards `new` holds the old content."""
    if _exchange(new, old):
        return
    aside = new.with_name(f"{new.name}{ASIDE}{old.name}")
    old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        aside.rename(old)
        raise
    aside.rename(new)


def _exchange(one: Path, two: Path) -> bool:
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    return bool(rename(_HERE, os.fsencode(one), _HERE, os.fsencode(two), _EXCHANGE) == 0)


def _sync_tree(folder: Path) -> None:
    for place, _, names in os.walk(folder):
        for name in names:
            descriptor = os.open(os.path.join(place, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        _sync_folder(Path(place))


def _sync_folder(folder: Path) -> None:
    """Make a rename durable. Some systems cannot sync a folder; there the rename is still atomic."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _forget(temporary: Path) -> None:
    if temporary.is_dir() and not temporary.is_symlink():
        shutil.rmtree(temporary, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _foreign(error: OSError, temporary: Path, target: Path) -> bool:
    """Tell whether the error is about a file that has nothing to do with this write."""
    if not isinstance(error.filename, (str, bytes, os.PathLike)):
        return False
    culprit = Path(os.fsdecode(error.filename))
    return temporary not in (culprit, *culprit.parents) and culprit not in (target, *target.parents)


def _explained(path: str | Path, error: OSError) -> StoreError:
    if error.errno in _FULL:
        why, remedy = "the disk is full", "free some space and run the same command again, finished work is kept"
    elif error.errno in _DENIED:
        why, remedy = "permission denied", "choose another folder or change its permissions"
    else:
        why, remedy = error.strerror or str(error), "check the path and the disk, then run the same command again"
    return StoreError(f"cannot write {str(path)!r}: {why}; {remedy}")
