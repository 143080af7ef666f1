"""Child processes for measurements: forked from a server that has imported torch, so that one starts in milliseconds."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_PRELOAD = ["torch._dynamo", "openwork.testing.reliability.matrix"]


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit status (negative: a signal) and the JSON value that its function returned."""

    code: int
    value: Any


def start(function: Callable[..., Any], *args: Any) -> BaseProcess:
    """Start a child that calls a module's function; nobody waits for its value."""
    child = _context().Process(target=_quietly, args=(function, args))
    child.start()
    return child


def call(function: Callable[..., Any], *args: Any, timeout: float = 900.0) -> Ended:
    """Call a module's function in a child with one torch thread, and return how it ended and its JSON value.

    Raises:
        AssertionError: with the child's traceback, if the function raised.
    """
    context = _context()
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_reporting, args=(sender, function, args))
    child.start()
    sender.close()
    text = ""
    with contextlib.suppress(EOFError):
        text = receiver.recv_bytes().decode() if receiver.poll(timeout) else ""
    child.join(timeout if text else 0.2)
    if child.is_alive():
        child.kill()
        child.join()
    receiver.close()
    answer = json.loads(text) if text else {}
    if "error" in answer:
        raise AssertionError(f"{function.__name__} failed in a child process: {answer['error']}")
    return Ended(int(child.exitcode or 0), answer.get("value"))


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """Yield an empty folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="openwork-reliability-") as name:
        yield Path(name)


class _Counter:
    """A pytest plugin that counts what passed and keeps the names of what failed."""

    def __init__(self) -> None:
        self.passed = 0
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Take one phase of one test into account."""
        self.passed += report.passed and report.when == "call"
        self.failed += [report.nodeid] if report.failed else []


def tests(root: str, paths: list[str], order: int | None) -> dict[str, Any]:
    """Run tests of a checkout in this process, which is to be a child: how many pass, which fail, pytest's status."""
    import pytest

    from openwork.testing.reliability import _shuffle

    os.chdir(root)
    sys.path.insert(0, root)
    if order is not None:
        os.environ["OPENWORK_ORDER"] = str(order)
    counter = _Counter()
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        code = pytest.main(["-p", "no:cacheprovider", "--no-header", *paths], plugins=[counter, _shuffle])
    return {"passed": counter.passed, "failed": counter.failed, "code": int(code), "said": text.getvalue()[-300:]}


def checkout() -> Path | None:
    """Return the root of the source tree that this openwork lies in, None where it was installed without one."""
    root = Path(__file__).resolve().parents[4]
    return root if (root / "pyproject.toml").is_file() and (root / "tests").is_dir() else None


def environment() -> dict[str, str]:
    """Return the environment in which a fresh Python finds this openwork."""
    source = str(Path(__file__).resolve().parents[3])
    paths = [source, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


def _context() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def _quietly(function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    function(*args)


def _reporting(sender: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    try:
        answer = {"value": function(*args)}
    except Exception:
        answer = {"error": traceback.format_exc()[-2000:]}
    sender.send_bytes(json.dumps(answer).encode())
    sender.close()
