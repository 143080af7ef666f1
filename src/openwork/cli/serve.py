"""`openwork serve`: every run on this machine in one local page."""

from __future__ import annotations

import errno
import ipaddress
import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from openwork.errors import RecipeError, StoreError

PORT = 8642
LATEST = 65_535


def serve(
    folders: Annotated[
        list[str] | None,
        typer.Argument(help="Run folders, or folders with runs below; else runs/ and every run known.", metavar="FOLDER"),
    ] = None,
    port: Annotated[int, typer.Option(help="Port of the page; 0 takes any free one.")] = PORT,
    host: Annotated[
        str, typer.Option(help="Address to listen at; other than this machine's own needs the token that is printed.")
    ] = "127.0.0.1",
    show: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """Show every run on this machine in one local page, which only reads.

    Examples:

      openwork serve

      openwork serve runs/compare-digits-cnn --open

      openwork serve --host 0.0.0.0
    """
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    for folder in folders or ():
        _check(folder)
    listening = listen(host, port)
    with listening:
        token = None if is_loopback(host) else secrets.token_urlsafe(24)
        url = address(host, listening.getsockname()[1], token)
        with console.status("starting ..."):
            server = _server(_application(folders, host, token))
        with _interruptible(server):
            threading.Thread(target=_warm).start()  # waited for at the end: an exit in the middle of an import may hang
            console.print(f"runs at {url}", markup=False)
            if token is not None:
                console.print("whoever knows this address can read the runs; it travels unencrypted: keep it to yourself")
            console.print("Ctrl-C ends it")
            if show:
                threading.Thread(target=_open, args=(url,), daemon=True).start()
            server.run(sockets=[listening])
        console.print("ended")


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address.

    Raises:
        RecipeError: if the port is none, is in use or is not allowed, or the address is not this machine's.
    """
    if not 0 <= port <= LATEST:
        raise RecipeError(f"--port {port} is no port: give a number from 0 to {LATEST}")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        listening = socket.socket(*found[0][:3])
    except (OSError, UnicodeError) as error:
        raise RecipeError(f"--host {host!r} is no address of this machine: give 127.0.0.1, or 0.0.0.0 for all") from error
    try:
        if os.name == "posix":  # elsewhere it would let two programs share a port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(found[0][4])
        listening.listen(128)
    except OSError as error:
        listening.close()
        raise RecipeError(_refused(host, port, error)) from error
    return listening


def is_loopback(host: str) -> bool:
    """Tell whether an address can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def address(host: str, port: int, token: str | None) -> str:
    """Return the address to open: with this machine's name where it listens at all of its addresses."""
    name = socket.gethostname() if host in ("0.0.0.0", "::", "") else host
    name = f"[{name}]" if ":" in name else name
    return f"http://{name}:{port}/" + (f"?token={token}" if token else "")


def hosts(host: str) -> Iterable[str]:
    """Return the host names that requests may name when the page listens at `host`."""
    from openwork.web.guard import LOOPBACK

    name = f"[{host}]" if ":" in host else host
    own = (socket.gethostname(), socket.getfqdn()) if not is_loopback(host) else ()
    return {*LOOPBACK, name, *own}


def _application(folders: list[str] | None, host: str, token: str | None) -> Any:
    from openwork.web.app import create

    return create(folders or None, token=token, hosts=hosts(host))


def _server(application: Any) -> Any:
    import uvicorn

    config = uvicorn.Config(
        application, log_level="warning", access_log=False, server_header=False, ws="none", lifespan="off",
        timeout_graceful_shutdown=2, date_header=False, proxy_headers=False,
    )  # fmt: skip
    return uvicorn.Server(config)


@contextmanager
def _interruptible(server: Any) -> Iterator[None]:
    """Let Ctrl-C tell the server to end, also before it runs.

    An exception would do only where Python does not swallow it, as it does in the callbacks of an import.
    """

    def end(number: int, frame: FrameType | None) -> None:
        server.should_exit = True

    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _check(folder: str) -> None:
    try:
        good = Path(folder).is_dir()
    except (OSError, ValueError):
        good = False
    if not good:
        raise StoreError(f"there is no folder {folder!r}: give a run folder, or one with runs below it")


def _refused(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        other = port + 1 if port < LATEST else PORT
        return (
            f"port {port} is in use, maybe by another `openwork serve`: open http://{host}:{port}/, or choose another port "
            f"with --port {other}"
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"port {port} needs more rights than you have: choose one from 1024 on, for example --port {PORT}"
    return f"cannot listen at {host!r}, port {port}: {error.strerror or error}; give an address of this machine with --host"


def _warm() -> None:
    """Import what pages need later, while nobody waits for it."""
    import matplotlib.figure  # noqa: F401
    import scipy.special  # noqa: F401


def _open(url: str) -> None:
    import webbrowser

    webbrowser.open(url)
