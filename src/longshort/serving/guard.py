"""Who is let in, and how much. A `Guard` stands before every route of the server, and looks at these in turn:

    Host      a name that is not this server's is refused, so that no page can have a browser ask under another
    token     where one is set, every route but /healthz wants it, as Bearer or as the password of Basic
    Origin    other pages' requests are refused
    number    more requests at a time than are allowed are told to come back
    body      more than is allowed, or too slow, is refused before it has been read
    answer    a client that does not take it is let go

What it answers itself has the shape that OpenAI's clients read, as all answers have.
"""

from __future__ import annotations

import asyncio
import base64
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from longshort.serving.bodies import problem

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What the guard holds to."""

    token: str | None = None
    hosts: Sequence[str] | None = None
    """Names under which the server is asked, in small letters and without a port; None: any."""
    requests: int = 128
    """At a time."""
    body_bytes: int = 1 << 20
    """Enough for all that the routes take, with every character as an escape."""
    seconds: float = 10.0
    """For a client to send its body, and to take each piece of the answer."""


class Guard:
    """An ASGI application before another one.

    Args:
        app: what the requests go to that are let in.
        rules: which these are.
    """

    def __init__(self, app: ASGIApp, rules: Rules) -> None:
        self._app, self._rules = app, rules
        self._inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_within(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            async with asyncio.timeout(self._rules.seconds):
                await send(message)

        headers, counts = Headers(scope=scope), scope["path"] != "/healthz"
        try:
            if counts:
                self._require_welcome(headers)
            self._inside += counts
            try:
                body = await self._read(headers, receive)
                await self._app(scope, _given(body, receive), send_within)
            finally:
                self._inside -= counts
        except _RefusedError as refused:
            await problem(refused.status, refused.words, headers=refused.headers)(scope, receive, send_within)
        except TimeoutError:  # the client takes nothing any more: what ends without a whole answer is closed
            return

    def _require_welcome(self, headers: Headers) -> None:
        rules, host, origin = self._rules, headers.get("host", "").lower(), headers.get("origin")
        if rules.hosts is not None and _name(host) not in rules.hosts:
            raise _RefusedError(400, "This server is not asked under that name; --allow-host adds one.")
        if rules.token is not None and not _is_token(headers.get("authorization", ""), rules.token):
            how = 'Basic realm="longshort: any name, the token as password", charset="UTF-8"'
            raise _RefusedError(401, "A token is wanted: Authorization: Bearer TOKEN.", {"WWW-Authenticate": how})
        if origin is not None and _place(origin) != host:
            raise _RefusedError(403, "Requests of other pages are not answered.")
        if self._inside >= rules.requests:
            raise _RefusedError(503, f"{rules.requests} requests are being answered already.", {"Retry-After": "1"})

    async def _read(self, headers: Headers, receive: Receive) -> bytes:
        """Return the whole body, within its limits."""
        most, body = self._rules.body_bytes, bytearray()
        declared = headers.get("content-length", "0")
        if not declared.isdecimal() or len(declared) > 15 or int(declared) > most:
            raise _RefusedError(413, f"A body has at most {most:,} bytes.", {"Connection": "close"})
        try:
            async with asyncio.timeout(self._rules.seconds):
                while True:
                    message = await receive()
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise _RefusedError(413, f"A body has at most {most:,} bytes.", {"Connection": "close"})
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            words = f"The body did not come within {self._rules.seconds:g} seconds."
            raise _RefusedError(408, words, {"Connection": "close"}) from None


class _RefusedError(Exception):
    """A request that is not let in."""

    def __init__(self, status: int, words: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(words)
        self.status, self.words, self.headers = status, words, headers


def _given(body: bytes, receive: Receive) -> Receive:
    """Return what gives the whole body, and then what comes after it: that the client goes away."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def give() -> Message:
        return messages.pop() if messages else await receive()

    return give


def _name(host: str) -> str:
    """Return a Host header's name, without the port."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


def _place(origin: str) -> str | None:
    """Return the name and the port of an Origin header; None where it is no address."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


def _is_token(given: str, token: str) -> bool:
    kind, _, value = given.partition(" ")
    if kind.lower() == "basic":
        try:
            value = base64.b64decode(value.strip(), validate=True).decode().partition(":")[2]
        except ValueError:  # no base64, or no UTF-8
            return False
    elif kind.lower() != "bearer":
        return False
    return secrets.compare_digest(value.strip().encode(), token.encode())
