"""One large trial in several processes that share each batch, and the engine that runs a sweep of such trials.

`torchrun --nproc-per-node N -m openwork.lab.ddp_trial FOLDER` runs the trial whose spec.json lies in FOLDER, over as many
machines as torchrun spans; the first process leaves result.json beside it. On one machine `python -m
openwork.lab.ddp_trial FOLDER --processes N` does the same without torchrun, and `run` is an engine (see
`openwork.lab.engines.catalog`) that does it for every trial of a sweep, one after the other.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from openwork.errors import RecipeError, StoreError, TrialError
from openwork.lab import child
from openwork.lab.engines.catalog import Done
from openwork.lab.execute import attempt
from openwork.lab.nursery import Nursery
from openwork.lab.spec import Trial
from openwork.lab.store import Store, write_result

_TORCHRUN = ("RANK", "LOCAL_RANK", "GROUP_", "ROLE_", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_", "TORCHELASTIC_")
_PATIENCE = 10.0  # seconds that a process which failed gives the first one to write down why


def run(
    trials: Iterable[Trial], store: Store, *, workers: int, timeout: float | None, done: Done, processes: int = 2
) -> None:
    """Run trials on this machine, one after the other, each in `processes` processes; see `catalog.Engine`.

    `workers` is not used: the processes of one trial are meant to fill the machine.
    """
    launcher = Launcher(processes)
    try:
        for trial in trials:
            result = attempt(trial, store.begin(trial), launcher, timeout=timeout)
            if result is not None:
                done(trial, result)
    finally:
        launcher.close()


def asked_by_torchrun(environment: Mapping[str, str] = os.environ) -> int | None:
    """Return in how many processes torchrun wants each trial of this command to run; None without torchrun.

    `torchrun --nproc-per-node N -m openwork compare ...` starts the command N times. The first one runs the sweep, each
    trial in N processes of its own, so that one that dies costs one trial; the others have nothing to do and get 0.

    Raises:
        RecipeError: if torchrun spans several machines.
    """
    if "RANK" not in environment or environment.get("WORLD_SIZE", "1") == "1":
        return None
    if environment.get("LOCAL_WORLD_SIZE", environment["WORLD_SIZE"]) != environment["WORLD_SIZE"]:
        raise RecipeError(
            f"torchrun started {environment['WORLD_SIZE']} processes on several machines, over which a sweep is not run; "
            "use one machine, --engine ray, or -m openwork.lab.ddp_trial FOLDER for one planned trial"
        )
    return int(environment["WORLD_SIZE"]) if environment["RANK"] == "0" else 0


class Launcher(Nursery):
    """Starts the processes of a trial, one of which is their parent and ends as they end."""

    def __init__(self, processes: int) -> None:
        """Prepare to start trials of `processes` processes.

        Raises:
            TrialError: if that is no number of processes.
        """
        if isinstance(processes, bool) or not isinstance(processes, int) or processes < 1:
            raise TrialError(f"processes is {processes!r}; it must be a whole number of at least 1")
        self.processes = processes
        self._running: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, folder: Path) -> int:
        """Start the trial in `folder` and return the process id of its parent process."""
        paths = os.pathsep.join(path for path in sys.path if path)
        command = [sys.executable, "-m", "openwork.lab.ddp_trial", str(folder.resolve()), "--processes", str(self.processes)]
        with open(folder / "log.txt", "wb") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env={**{k: v for k, v in os.environ.items() if not k.startswith(_TORCHRUN)}, "PYTHONPATH": paths},
            )  # fmt: skip
        self._running[process.pid] = process
        return process.pid

    def wait(self, pid: int, seconds: float) -> int | None:
        """Return the exit status of a trial (negative: its signal) if it ends within `seconds`, else None."""
        try:
            code = self._running[pid].wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        del self._running[pid]
        return code

    @property
    def alive(self) -> bool:
        """Tell whether it can still start trials."""
        return True

    def close(self) -> None:
        """End every trial that still runs."""
        for process in self._running.values():
            process.kill()
            process.wait()
        self._running.clear()


def trial(folder: Path) -> int:
    """Take part in the trial in `folder` as one of torchrun's processes, and return the exit status."""
    from openwork.train.ddp import processes

    spec = json.loads((folder / "spec.json").read_text(encoding="utf-8"))
    spec.pop("elsewhere", None)
    started = time.monotonic()
    with processes() as peers, tempfile.TemporaryDirectory() as own:
        try:
            result = child.run(spec, folder if peers.first else Path(own))
            if peers.first:
                result["timings"] = {"seconds": round(time.monotonic() - started, 3), "processes": peers.world}
                write_result(folder, result)
        except StoreError as error:
            print(error, file=sys.stderr)
            return child.STORE_FAILED
    return 0 if peers.first or result["status"] != "failed" else _told(folder, peers.rank, result["error"])


def _told(folder: Path, rank: int, error: str) -> int:
    """Return 0 if the first process wrote a result too: all failed alike. Otherwise it still waits, and must be ended."""
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        if (folder / "result.json").exists():
            return 0
        time.sleep(0.05)
    print(f"rank {rank} failed: {error}", file=sys.stderr)
    return 1


def supervise(folder: Path, processes: int) -> int:
    """Start the trial's processes on this machine, end all when one fails, and return or repeat how that one ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    common |= {"LOCAL_WORLD_SIZE": str(processes), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "openwork.lab.ddp_trial", str(folder)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(processes)
    ]
    try:
        codes = [process.poll() for process in ranks]
        while None in codes and not any(codes):
            time.sleep(0.05)
            codes = [process.poll() for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    failed = next(((rank, code) for rank, code in enumerate(codes) if code), None)
    if failed is None:
        return 0
    rank, code = failed
    if code < 0:
        print(f"rank {rank} was ended by {signal.Signals(-code).name}", file=sys.stderr, flush=True)
        os.kill(os.getpid(), -code)
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m openwork.lab.ddp_trial", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="folder of the trial, with its spec.json")
    parser.add_argument("--processes", type=int, default=1, help="how many to start here; none are started under torchrun")
    given: Any = parser.parse_args(arguments)
    if not (given.folder / "spec.json").is_file():
        parser.error(f"{str(given.folder)!r} holds no spec.json; give the folder of a planned trial")
    if given.processes < 1:
        parser.error(f"--processes is {given.processes}; it must be at least 1")
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    if "RANK" in os.environ or given.processes == 1:
        return trial(given.folder)
    return supervise(given.folder, given.processes)


def _end_with(parent: int) -> None:
    """End this process soon after the one that started it, however that ended."""
    while os.getppid() == parent:
        time.sleep(0.5)
    with contextlib.suppress(OSError):
        os.write(2, b"the process that started this one has ended\n")
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
