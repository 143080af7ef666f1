"""Joining a Ray cluster and asking what it holds; whatever goes wrong there is one sentence with the remedy."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from openwork.errors import MissingExtra, OpenworkError, TrialError
from openwork.lab.engines.catalog import LOCAL
from openwork.lab.engines.needs import Needs

_REACH_SECONDS = 5.0
_SETTINGS = b"\x04"  # the type of the frame that opens a connection, RFC 9113 section 3.4
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0" + _SETTINGS + b"\0\0\0\0\0"
_REMEDY = (
    "start one with `ray start --head` (and `ray start --address HOST:PORT` on every other machine), give the address it "
    "prints, or use --address local"
)
_TOKEN = (
    "if the cluster was started with a token, as newer versions of Ray do, set RAY_AUTH_MODE=token and have the token in "
    "RAY_AUTH_TOKEN or ~/.ray/auth_token"
)


@dataclass(frozen=True)
class Node:
    """What one machine of the cluster has in all, free or not: `cpus`, bytes of `memory`, `gpus`."""

    cpus: float
    memory: float
    gpus: float

    def holds(self, needs: Needs) -> int:
        """Return how many trials of these needs fit here at a time."""
        fits = [self.cpus // max(1, needs.cpus), self.memory // max(1, needs.memory)]
        return int(min([*fits, self.gpus // needs.gpus] if needs.gpus else fits))


def library() -> ModuleType:
    """Import Ray.

    Raises:
        MissingExtra: if it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import ray
    except ImportError as error:
        raise MissingExtra("the engine 'ray' needs Ray: pip install 'openwork[ray]'") from error
    return ray


@contextlib.contextmanager
def joined(address: str | None, cpus: int) -> Iterator[ModuleType]:
    """Yield Ray, joined to the cluster at `address`; a program that has joined one already stays with that one.

    Args:
        address: as for `catalog.find`.
        cpus: of a Ray that has to be started for the sweep.

    Raises:
        TrialError: if there is no such cluster, or it does not take us.
        MissingExtra: if Ray is not installed.
    """
    ray = library()
    if ray.is_initialized():
        yield ray
        return
    address = address or os.environ.get("RAY_ADDRESS") or None
    try:
        if address is None:
            _join_or_start(ray, cpus)
        elif address == LOCAL:
            _start(ray, cpus)
        else:
            _join(ray, address)
        yield ray
    finally:
        ray.shutdown()


def nodes(ray: ModuleType) -> list[Node]:
    """Return the machines that are up."""
    found = [node.get("Resources", {}) for node in ray.nodes() if node.get("Alive")]
    return [Node(float(has.get("CPU", 0)), float(has.get("memory", 0)), float(has.get("GPU", 0))) for has in found]


def able(needs: Needs, there: list[Node]) -> list[Node]:
    """Return the machines that have the threads and the GPU."""
    return [node for node in there if node.cpus >= needs.cpus and node.gpus >= needs.gpus]


def fitting(needs: Needs, there: list[Node]) -> Needs:
    """Return needs that some machine can meet: an estimate above the largest memory asks for all of that machine.

    Raises:
        TrialError: if no machine has the threads or the GPU.
    """
    found = able(needs, there)
    if not found:
        what = f"{needs.cpus} threads" + (" and a GPU" if needs.gpus else "")
        most = max((node.cpus for node in there), default=0.0)
        raise TrialError(
            f"a trial asks for {what} and no machine of the cluster has them (at most {most:g} CPUs): lower --threads"
            + (", use --device cpu" if needs.gpus else "")
            + ", or add a machine and run the same command again"
        )
    return Needs(needs.cpus, int(min(needs.memory, max(node.memory for node in found))), needs.gpus)


def _join_or_start(ray: ModuleType, cpus: int) -> None:
    try:
        _init(ray, address="auto")
    except ConnectionError:
        _start(ray, cpus)


def _start(ray: ModuleType, cpus: int) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read by the processes that are started next
    try:
        _init(ray, address=LOCAL, num_cpus=cpus, include_dashboard=False)
    except Exception as error:
        raise TrialError(f"Ray could not be started on this machine: {_sentence(error)}; use --engine local") from error


def _join(ray: ModuleType, address: str) -> None:
    if address != "auto":
        _reach(address)
    try:
        _init(ray, address=address)
    except OpenworkError:
        raise
    except ConnectionError as error:
        if address != "auto":
            why = _sentence(error)
            raise TrialError(f"what listens at {address!r} lets us into no Ray cluster ({why}): {_TOKEN}") from error
        raise TrialError(f"there is no Ray cluster at the address {address!r}: {_REMEDY}") from error
    except Exception as error:
        why = _sentence(error)
        raise TrialError(f"the Ray cluster at {address!r} does not let this process in: {why}; {_TOKEN}") from error


def _init(ray: ModuleType, **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)


def _reach(address: str) -> None:
    """Make sure that something listens there that speaks HTTP/2, as gRPC does: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _REACH_SECONDS) as line:
            if os.environ.get("RAY_USE_TLS", "0") in ("", "0"):
                line.sendall(_HELLO)
                if line.recv(9)[3:4] != _SETTINGS:
                    raise OSError("what listens there is no Ray")
    except OSError as error:
        why = error.strerror or str(error)
        raise TrialError(f"there is no Ray cluster at the address {address!r} ({why}): {_REMEDY}") from error


def _sentence(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__
