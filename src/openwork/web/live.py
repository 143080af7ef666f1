"""Whether a command is at work in a run folder, seen without touching its lock."""

from __future__ import annotations

import os
import re
from collections.abc import Set
from pathlib import Path

_LINE = re.compile(r"\d+: +\w+ +\w+ +WRITE +(\d+) +[0-9a-f]+:[0-9a-f]+:(\d+) ")
Held = Set[tuple[int, int]]


def held() -> Held | None:
    """Return process and inode of every file lock that is held, or None where the system does not say."""
    try:
        with open("/proc/locks", encoding="ascii", errors="replace") as stream:
            return {(int(process), int(inode)) for process, inode in _LINE.findall(stream.read())}
    except OSError:
        return None


def running(folder: Path, locks: Held | None) -> bool:
    """Tell whether a process holds the lock of a run folder.

    Where the system does not list its locks, a living process of the number in the lock file counts.

    Args:
        folder: the run folder.
        locks: from `held`.
    """
    try:
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        with os.fdopen(os.open(folder / ".lock", flags), "rb") as stream:
            inode, process = os.fstat(stream.fileno()).st_ino, int(stream.read(20) or b"0")
    except (OSError, ValueError):
        return False
    if locks is not None:
        return (process, inode) in locks
    return process > 0 and _lives(process)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
