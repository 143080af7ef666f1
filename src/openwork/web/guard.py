"""What stands before every page: foreign hosts, writing methods and strangers are refused; answers have the same headers.

A page on loopback is open to other programs of the same machine's user, yet not to other sites: a name that was made to
point at this machine (DNS rebinding) is refused by its Host header. Without loopback there is a token.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Iterable
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, quote, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
POLICY = (
    "default-src 'none'; style-src 'self'; img-src 'self' data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}
_HOST = re.compile(r"(\[[0-9a-fA-F:.%]+\]|[A-Za-z0-9._-]+)(?::(\d{1,5}))?")


class Guard:
    """The middleware.

    Args:
        app: what is guarded.
        hosts: host names that requests may name, without port.
        token: if set, who does not give it is refused, and requests may name any IP address as well: only names can be
            made to point elsewhere.
    """

    def __init__(self, app: ASGIApp, *, hosts: Iterable[str] = LOOPBACK, token: str | None = None) -> None:
        self.app, self.token = app, token
        self.hosts = frozenset(host.lower() for host in hosts)
        self.cookie = "openwork-" + hashlib.sha256((token or "").encode()).hexdigest()[:8]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or let the application answer it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        else:
            answer = self._refusal(scope) or self.app
            await answer(scope, receive, _with_headers(send))

    def _refusal(self, scope: Scope) -> Response | None:
        """Return the answer to a request that does not pass, or None."""
        headers = Headers(scope=scope)
        if not self._is_host(headers.getlist("host")):
            return _plain(400, "This page does not answer to that host name: open the address that openwork serve printed.")
        if scope["method"] not in ("GET", "HEAD"):
            return _plain(405, "This page can only be read: use GET or HEAD.", allow="GET, HEAD")
        return None if self.token is None else self._stranger(scope, headers, self.token)

    def _is_host(self, given: list[str]) -> bool:
        match = _HOST.fullmatch(given[0]) if len(given) == 1 else None
        if match is None:
            return False
        host = match[1].lower()
        return host in self.hosts or (self.token is not None and _is_address(host.strip("[]")))

    def _stranger(self, scope: Scope, headers: Headers, token: str) -> Response | None:
        """Return None to who gives the token, by cookie or header; who gives it in the address gets the cookie."""
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        if _same(bearer, token) or _same(_cookie(headers, self.cookie), token):
            return None
        asked = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True, max_num_fields=None)
        if not any(name == "token" and _same(value, token) for name, value in asked):
            return _plain(401, "This page needs its token: open the whole address that openwork serve printed.")
        rest = urlencode([(name, value) for name, value in asked if name != "token"], errors="replace")
        path = "/" + quote(scope["path"].lstrip("/\\"), errors="replace")
        answer = RedirectResponse(path + (f"?{rest}" if rest else ""), 303, {"cache-control": "no-store"})
        answer.set_cookie(self.cookie, token, httponly=True, samesite="strict")
        return answer


def _with_headers(send: Send) -> Send:
    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers[name] = value
            headers.setdefault("cache-control", "no-store")
        await send(message)

    return sent


def _plain(status: int, text: str, **headers: str) -> Response:
    return PlainTextResponse(text + "\n", status, headers)


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), token.encode())


def _cookie(headers: Headers, name: str) -> str:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(name)
    except CookieError:
        return ""
    return found.value if found else ""


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
