"""Small process groups for tests: a function run in several processes over gloo, with an end to all waiting."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

PATIENCE = 30.0  # seconds that a rank waits for another
LONGEST = 90.0  # seconds after which all are killed


@dataclass(frozen=True)
class Ended:
    """How a rank ended: with a value, with an error, or (neither) killed."""

    value: Any = None
    error: str | None = None
    message: str = ""
    seconds: float = 0.0


def run(world: int, function: Callable[..., Any], *args: Any, group: bool = True) -> list[Ended]:
    """Run `function(rank, *args)` in `world` processes and return how each ended, in the order of the ranks.

    One server imports torch; each process is forked from it and starts at once. With `group=False` no process group
    is set up, but the environment is that of torchrun.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo", "tests.train.toys", "openwork.train.loop"])
    port = _free_port()
    pairs = [context.Pipe(duplex=False) for _ in range(world)]
    ranks = [
        context.Process(target=_rank, args=(rank, world, port, write, function, args, group), daemon=True)
        for rank, (_, write) in enumerate(pairs)
    ]
    for process, (_, write) in zip(ranks, pairs, strict=True):
        process.start()
        write.close()
    deadline, ended = time.monotonic() + LONGEST, []
    try:
        for read, _ in pairs:
            if not read.poll(max(0.0, deadline - time.monotonic())):
                raise TimeoutError(f"the {world} ranks of {function.__name__} did not end within {LONGEST:g} s")
            try:
                ended.append(pickle.loads(read.recv_bytes()))
            except EOFError:
                ended.append(Ended())
    finally:
        for process in ranks:
            process.join(5 if len(ended) == world else 0)
            if process.is_alive():
                process.kill()
                process.join()
    return ended


def values(ended: list[Ended]) -> list[Any]:
    """Return what the ranks returned; fail with the first error if one did not."""
    for rank, one in enumerate(ended):
        assert one.error is None, f"rank {rank}: {one.error}: {one.message}"
    return [one.value for one in ended]


def _rank(rank: int, world: int, port: int, write: Connection, function: Any, args: Any, group: bool) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(1000 + 17 * rank)  # unequal on purpose: nothing of ours may depend on it
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    if Path("/sys/class/net/lo").exists():
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if group:
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=PATIENCE))
    began = time.monotonic()
    try:
        found = Ended(function(rank, *args), seconds=time.monotonic() - began)
    except BaseException as error:
        found = Ended(None, type(error).__name__, str(error), time.monotonic() - began)
    write.send_bytes(pickle.dumps(found))  # by value: the connection itself would share tensors, whose owner ends here
    write.close()
    sys.stdout.flush()
    os._exit(0)


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
