"""A process that has imported everything once and forks a child for each trial: a trial starts in milliseconds.

Importing torch and what its optimizers pull in takes longer than many a trial. The nursery itself computes nothing (no
thread pool is started before the fork), so a child is as good as a fresh process and shares nothing it could disturb.
Run as `python -m openwork.lab.nursery`; it reads folders from standard input, a line each, writes `PID started` and
`PID ended STATUS`, and ends its children when its input closes, that is, when the sweep is gone.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from openwork.errors import TrialError
from openwork.lab import environment
from openwork.lab.store import SCRATCH

_PRELOAD = ("torch._dynamo", "openwork.lab.compare", "openwork.lab.store", "sklearn.datasets", "scipy.stats")


class Nursery:
    """The sweep's side: starts children and tells how they ended; safe to use from several threads."""

    def __init__(self) -> None:
        paths = os.pathsep.join(path for path in sys.path if path)
        quiet = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": paths}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "openwork.lab.nursery"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, **quiet}, text=True, start_new_session=True,
        )  # fmt: skip
        self._ended: dict[int, int] = {}
        self._started: list[int] = []
        self._news = threading.Condition()
        self._asking = threading.Lock()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def start(self, folder: Path) -> int:
        """Fork a child for the trial in `folder` and return its process id.

        Raises:
            TrialError: if the nursery is gone.
        """
        with self._asking:
            try:
                assert self._process.stdin is not None
                self._process.stdin.write(f"{folder.resolve()}\n")
                self._process.stdin.flush()
            except (OSError, ValueError) as error:
                raise TrialError("the process that starts trials has ended; start the same command again") from error
            with self._news:
                self._news.wait_for(lambda: self._started or self._gone())
                if not self._started:
                    raise TrialError("the process that starts trials has ended; start the same command again")
                return self._started.pop(0)

    def wait(self, pid: int, seconds: float) -> int | None:
        """Return the exit status of a child (negative: its signal) if it ends within `seconds`, else None."""
        with self._news:
            self._news.wait_for(lambda: pid in self._ended or self._gone(), timeout=seconds)
            if pid in self._ended:
                return self._ended.pop(pid)
            return -signal.SIGKILL if self._gone() else None

    @property
    def alive(self) -> bool:
        """Tell whether it can still start children."""
        return not self._gone() and self._process.poll() is None

    def close(self) -> None:
        """End the nursery and every child that still runs."""
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        self._process.wait()
        self._reader.join()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _gone(self) -> bool:
        return not self._reader.is_alive()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            word = line.split()
            with self._news:
                if word[1:] == ["started"]:
                    self._started.append(int(word[0]))
                elif word[1:2] == ["ended"]:
                    self._ended[int(word[0])] = int(word[2])
                self._news.notify_all()
        with self._news:
            self._news.notify_all()


def main() -> None:
    """Fork a child for every folder that is read, until the input closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in _PRELOAD:
        importlib.import_module(name)
    environment.code_digest()  # of the code that was just imported; children inherit it
    running: set[int] = set()
    waiting = b""
    news = _child_news()
    while True:
        ready = select.select([0, news], [], [], 1.0)[0]
        if news in ready:
            os.read(news, 65536)
        if 0 in ready:
            text = os.read(0, 65536)
            if not text:
                break
            *lines, waiting = (waiting + text).split(b"\n")
            for line in lines:
                running.add(_fork(os.fsdecode(line)))
        _reap(running)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
    for pid in running:
        os.waitpid(pid, 0)


def _child_news() -> int:
    """Return a descriptor that becomes readable when a child ends."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
    return reading


def _fork(folder: str) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = _child(folder)
        finally:
            os._exit(code)
    _say(f"{pid} started")
    return pid


def _child(folder: str) -> int:
    """Become the trial: own log, no input, signals as usual, and an end with the nursery."""
    from openwork.lab import child

    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    log = os.open(os.path.join(folder, "log.txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    _volunteer()
    if not _alone(Path(folder) / SCRATCH):
        print("another process still runs this trial in the same folder", file=sys.stderr)
        return 1
    code = child.main(folder)
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _volunteer() -> None:
    """Let the system end this process first when memory is short: the trial is lost then, not the sweep."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _alone(scratch: Path) -> bool:
    """Wait until no other process runs the trial, then hold its scratch until this process ends.

    The sweep before this one, or its worker, may just have been killed; its child is then about to end too.
    """
    try:
        import fcntl

        scratch.mkdir(exist_ok=True)
        descriptor = os.open(scratch / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except (ImportError, OSError):
        return True
    for _ in range(300):
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(0.1)
    return False


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _reap(running: set[int]) -> None:
    for pid in list(running):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            running.discard(pid)
            _say(f"{pid} ended {os.waitstatus_to_exitcode(status)}")


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(1, f"{text}\n".encode())


if __name__ == "__main__":
    main()
    os._exit(0)  # taking down all that was imported would take a second that the sweep waits for
