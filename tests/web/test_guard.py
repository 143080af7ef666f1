"""Who does not belong here gets one sentence and nothing else, and every answer carries the same headers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from starlette.applications import Starlette

from openwork.web.guard import HEADERS
from tests.web.conftest import ask, id_of, over

FOREIGN = [
    "evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "evil.example:8642", "localhost:8642@evil.example",
    "192.168.0.7", "[::2]", "", " ", "localhost ", "localhost/", "localhost:", "localhost:123456", "127.0.0.1#", "*", "..",
    "[::1", "::1", "LOCALHOST.", "0x7f.1", "local\x00host", "a" * 5000, "127.0.0.1,evil.example",
]  # fmt: skip


@pytest.mark.parametrize("host", ["localhost", "localhost:8642", "LocalHost:1", "127.0.0.1:9", "[::1]:8642", "[::1]"])
def test_own_names_are_answered(app: Starlette, host: str) -> None:
    assert ask(app, "/", host=host).status == 200


@pytest.mark.parametrize("host", FOREIGN)
def test_foreign_hosts_are_refused(app: Starlette, host: str) -> None:
    answer = ask(app, "/", host=host)
    assert answer.status == 400
    assert "evil" not in answer.text
    assert len(answer.text.strip().splitlines()) == 1


def test_one_host_and_no_other(app: Starlette) -> None:
    assert ask(app, "/", host=None).status == 400
    assert ask(app, "/", headers=[(b"host", b"evil.example")]).status == 400
    assert ask(app, "/", headers=[(b"x-forwarded-host", b"evil.example")]).status == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "PROPFIND", "get"])
@pytest.mark.parametrize("address", ["/", "/compare", "/style.css", "/nothing"])
def test_nothing_can_be_written(app: Starlette, method: str, address: str) -> None:
    answer = ask(app, address, method=method)
    assert answer.status == 405
    assert answer.headers["allow"] == "GET, HEAD"


def test_head_is_get_without_a_body_in_what_it_says(app: Starlette) -> None:
    assert ask(app, "/", method="HEAD").status == 200
    assert ask(app, "/nothing", method="HEAD").status == 404


def test_every_answer_has_the_headers(app: Starlette, runs: Path) -> None:
    run = id_of(runs / "compare")
    answers = [ask(app, address) for address in ("/", "/nothing", "/style.css", "/icon.svg", f"/runs/{run}",
                                                 f"/runs/{run}/table.csv", "/runs/x", "/compare")]  # fmt: skip
    answers += [ask(app, "/", host="evil.example"), ask(app, "/", method="POST")]
    for answer in answers:
        assert {name: answer.headers[name] for name in HEADERS} == HEADERS
        assert "cache-control" in answer.headers
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert "script-src" not in answer.headers["content-security-policy"]  # default-src 'none' holds for scripts
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    assert ask(app, "/").headers["cache-control"] == "no-store"


def test_a_websocket_is_closed(app: Starlette) -> None:
    sent = []

    async def send(message: object) -> None:
        sent.append(message)

    async def receive() -> dict[str, str]:
        return {"type": "websocket.connect"}

    asyncio.run(app({"type": "websocket", "path": "/", "headers": [(b"host", b"localhost")]}, receive, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_without_the_token_nothing_is_shown(runs: Path) -> None:
    app = over(runs, token="s3cret", hosts=("box",))
    for address in ("/", "/?token=", "/?token=wrong", "/?token=s3cre", "/style.css", f"/runs/{id_of(runs / 'compare')}"):
        answer = ask(app, address, host="box:8642")
        assert answer.status == 401
        assert "resnet" not in answer.text
    assert ask(app, "/?token=s3cret", host="evil.example").status == 400
    assert ask(app, "/", host="box", headers=[(b"cookie", b"openwork=1; =; ;;\xff")]).status == 401


def test_the_token_is_given_once(runs: Path) -> None:
    app = over(runs, token="s3cret", hosts=("box",))
    first = ask(app, "/?q=rigl&token=s3cret&sort=name", host="box")
    assert first.status == 303
    assert first.headers["location"] == "/?q=rigl&sort=name"
    cookie = first.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "samesite=strict" in cookie.lower()
    again = ask(app, "/", host="box", headers=[(b"cookie", cookie.split(";")[0].encode())])
    assert again.status == 200
    assert "s3cret" not in again.text
    assert ask(app, "/", host="box", headers=[(b"authorization", b"Bearer s3cret")]).status == 200


def test_with_a_token_addresses_of_numbers_are_hosts_too(runs: Path) -> None:
    app = over(runs, token="s3cret", hosts=("box",))
    headers = [(b"authorization", b"Bearer s3cret")]
    assert ask(app, "/", host="192.168.0.7:8642", headers=headers).status == 200
    assert ask(app, "/", host="[fe80::1]:8642", headers=headers).status == 200
    assert ask(app, "/", host="other.example", headers=headers).status == 400


@pytest.mark.parametrize("path", ["//evil.example/", "/\\evil.example", "///evil.example/%2e%2e", "/%0d%0aSet-Cookie:a=b"])
def test_the_way_on_stays_here(runs: Path, path: str) -> None:
    app = over(runs, token="s3cret", hosts=("box",))
    location = ask(app, f"{path}?token=s3cret", host="box").headers["location"]
    assert location.startswith("/")
    assert not location.startswith(("//", "/\\"))
    assert "\r" not in location
    assert "\n" not in location
