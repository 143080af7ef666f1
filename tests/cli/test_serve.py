"""`openwork serve` listens where it says, says what is wrong in one sentence, and ends cleanly."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from openwork.cli.serve import address, hosts, is_loopback, listen, serve
from openwork.errors import RecipeError, StoreError
from tests.web.conftest import small, write_run

ROOT = Path(__file__).parents[2]
START = "import typer; from openwork.cli.serve import serve; app = typer.Typer(); app.command()(serve); app()"


@contextmanager
def served(*words: str, cwd: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start the command; yield its process and the address that it prints."""
    own = {"PYTHONPATH": str(ROOT / "src"), "OPENWORK_CACHE": str(cwd / "cache"), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", START, "--port", "0", *words], cwd=cwd, env={**os.environ, **own}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        found = re.search(r"runs at (http://\S+)", "".join(iter(process.stdout.readline, "Ctrl-C ends it\n")))
        assert found
        yield process, found[1]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]


def raw(port: int, text: bytes) -> bytes:
    """Send bytes as they are and return what comes back."""
    with closing(socket.create_connection(("127.0.0.1", port), timeout=30)) as one:
        one.sendall(text)
        parts = []
        while part := one.recv(65536):
            parts.append(part)
    return b"".join(parts)


def test_from_the_first_page_to_ctrl_c(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "one", small(seeds=2))
    with served(cwd=tmp_path) as (process, url):
        port = int(url.split(":")[2].strip("/"))
        assert url == f"http://127.0.0.1:{port}/"
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as one:
            one.request("GET", "/")
            answer = one.getresponse()
            text = answer.read().decode()
            assert answer.status == 200
            assert "1 run<" in text
            assert answer.getheader("server") is None
            for host in ("evil.example", "127.0.0.1.evil.example"):
                one.request("GET", "/", headers={"Host": host})
                answer = one.getresponse()
                answer.read()
                assert answer.status == 400
        for line in (b"GET /../../../../etc/passwd", b"GET /runs/..%2f..%2fetc%2fpasswd", b"GET /%00", b"GET \\..\\..\\x"):
            said = raw(port, line + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert said.startswith((b"HTTP/1.1 404", b"HTTP/1.1 400"))
            assert b"root:" not in said
        said = raw(port, b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc")
        assert said.startswith(b"HTTP/1.1 405")
        own = socket.gethostbyname(socket.gethostname())
        if not own.startswith("127."):
            with pytest.raises(OSError):
                socket.create_connection((own, port), timeout=5)
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        rest = process.stdout.read()
        assert process.wait(timeout=60) == 0
        assert rest.strip() == "ended"


@pytest.mark.parametrize("moment", [0, 0.02, 0.2])
def test_ctrl_c_ends_it_from_the_moment_at_which_the_address_is_told(tmp_path: Path, moment: float) -> None:
    with served(str(tmp_path), cwd=tmp_path) as (process, _):
        time.sleep(moment)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0


def test_other_interfaces_need_the_token_that_is_printed(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "one", small(seeds=2))
    with served("runs", "--host", "0.0.0.0", cwd=tmp_path) as (_, url):
        found = re.fullmatch(r"http://([^/:]+):(\d+)/\?token=([\w-]{32})", url)
        assert found
        with closing(http.client.HTTPConnection("127.0.0.1", int(found[2]), timeout=60)) as one:
            for path, host, status in (("/", "localhost", 401), (f"/?token={found[3]}", found[1], 303),
                                       (f"/?token={found[3]}", "evil.example", 400)):  # fmt: skip
                one.request("GET", path, headers={"Host": host})
                answer = one.getresponse()
                answer.read()
                assert answer.status == status
            one.request("GET", "/", headers={"Host": found[1], "Authorization": f"Bearer {found[3]}"})
            assert one.getresponse().status == 200


def test_a_port_in_use_is_one_sentence_with_the_remedy() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RecipeError, match=f"port {port} is in use.*--port") as caught:
            serve(port=port)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("host", "port", "words"),
    [("127.0.0.1", 70_000, "--port 70000"), ("127.0.0.1", -1, "--port -1"), ("no.such.host.invalid", 0, "--host"),
     ("203.0.113.7", 0, "203.0.113.7"), ("a" * 300, 0, "--host"), ("\x00", 0, "--host")],
)  # fmt: skip
def test_addresses_that_are_none(host: str, port: int, words: str) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        listen(host, port)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("folder", ["nothing", "file", "\x00", "x" * 5000])
def test_folders_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="there is no folder"):
        serve(folders=[folder])


def test_what_is_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.8.9.1", "::1", "localhost", "LOCALHOST")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.0.1", "box", "", "localhost.evil.example")))


def test_the_default_is_loopback_only() -> None:
    import inspect

    default = inspect.signature(serve).parameters["host"].default
    assert is_loopback(default)
    with listen(default, 0) as listening:
        assert listening.getsockname()[0] == "127.0.0.1"


def test_addresses_to_open() -> None:
    assert address("127.0.0.1", 8642, None) == "http://127.0.0.1:8642/"
    assert address("::1", 1, None) == "http://[::1]:1/"
    assert address("0.0.0.0", 1, "t") == f"http://{socket.gethostname()}:1/?token=t"
    assert {"[fe80::1]", "localhost", socket.gethostname()} <= set(hosts("fe80::1"))
    assert set(hosts("127.0.0.1")) == {"localhost", "127.0.0.1", "[::1]"}
