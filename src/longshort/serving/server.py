"""Runs the server: one process, one socket, deadlines for what uvicorn lets wait, and an end that lets answers end.

uvicorn (0.54) keeps a connection for ever that has not sent a whole head yet; here it has `HEAD_SECONDS`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from longshort.errors import OutputError, UsageError
from longshort.interruption import Interruption
from longshort.serving.guard import Guard, Rules
from longshort.serving.routes import Served, application

HEAD_SECONDS, DRAIN_SECONDS = 10.0, 9
TOKEN_VARIABLE, TOKEN_CHARACTERS = "LONGSHORT_TOKEN", 16


class Deadline(H11Protocol):
    """HTTP/1.1 whose connections close where the head of a request does not come in time."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """A client has come."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Something has come; perhaps the rest of a head."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        super().connection_lost(exc)
        self._stop()

    def _watch(self) -> None:
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering:
            self._stop()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self._close)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close(self) -> None:
        self._timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


class _Server(uvicorn.Server):
    """One that ends by our signals, and says when it listens."""

    def __init__(self, config: uvicorn.Config, interruption: Interruption, listening: Callable[[], None]) -> None:
        super().__init__(config)
        self._interruption, self._listening = interruption, listening

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave them to `Interruption`: a second one ends the process at once."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin, and say so."""
        await super().startup(sockets)
        self._listening()

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
        return await super().on_tick(counter) or self._interruption.wanted()


def rules(host: str, allowed: Sequence[str]) -> Rules:
    """Return whom a server on this address lets in.

    Raises:
        UsageError: others than this machine could ask, and no token is set; or the token is too short.
    """
    token = os.environ.get(TOKEN_VARIABLE)
    if token is not None and len(token) < TOKEN_CHARACTERS:
        raise UsageError(f"{TOKEN_VARIABLE} must have at least {TOKEN_CHARACTERS} characters, not {len(token)}.")
    address = _address(host)
    if not (address and address.is_loopback) and token is None:
        what = f"{host} lets others than this machine ask, so it wants a token: set {TOKEN_VARIABLE}."
        raise UsageError(what, "Or leave --host away, to be asked from this machine alone.")
    if address and address.is_unspecified and not allowed:
        return Rules(token=token)  # under any name: nobody gets further without the token
    names = ("localhost", "127.0.0.1", "::1", host, *allowed)
    return Rules(token=token, hosts=tuple(name.lower() for name in names))


def serve(
    model: Served,
    name: str,
    host: str,
    port: int,
    rules: Rules,
    interruption: Interruption,
    listening: Callable[[str], None],
) -> None:
    """Answer requests until a signal comes.

    Args:
        model: as of `routes.application`, like `name`.
        name: of the model.
        host: an address or a name of this machine.
        port: 0 for one that is free.
        rules: who is let in.
        interruption: the signals; deferred.
        listening: is called once, with the address, when there will be answers.

    Raises:
        UsageError: `host` can be no name.
        OutputError: the address cannot be had.
    """
    try:
        bound = _bind(host, port)
    except UnicodeError:  # of names, as IDNA encodes them
        raise UsageError(f"--host must be an address or a name, not {host!r}.") from None
    except OSError as error:
        raise OutputError(
            f"Cannot listen on port {port} of {host}: {error.strerror or error}.", "Choose another with --port."
        ) from None
    place = f"[{host}]" if ":" in host else host
    address = f"http://{place}:{bound.getsockname()[1]}"
    config = uvicorn.Config(
        Guard(application(model, name), rules),
        http=Deadline,
        ws="none",
        lifespan="on",
        access_log=False,
        proxy_headers=False,
        log_level="warning",
        server_header=False,
        h11_max_incomplete_event_size=16 << 10,
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )
    with bound:
        asyncio.run(_Server(config, interruption, lambda: listening(address)).serve(sockets=[bound]))


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return a host's address; None of a name, whose address is somebody else's to say."""
    try:
        return ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        return None


def _bind(host: str, port: int) -> socket.socket:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, place = found[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(place)
    except OSError:
        bound.close()
        raise
    return bound
