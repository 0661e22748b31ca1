"""Connections that neither slow nor silent clients can hold: uvicorn's HTTP/1.1, with limits for what it waits for without end.

uvicorn itself ends only a connection on which nothing comes after a reply. Here, once a second, those are ended
    whose client does not send the head of a request, or the rest of one;
    whose client does not read what is written to it;
    that are closed, but cannot be told so because the client does not read;
and no more of them are taken than are allowed.
"""

import asyncio
import contextlib
import json
from collections.abc import Iterable

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from retro.serve.errors import ApiError
from retro.serve.guard import BODY_TIMEOUT_S

HEAD_TIMEOUT_S = 15.0
"""From a connection, or the first byte of another request on it, to the end of the request's head."""
STALL_S = 30.0
"""For a client that reads nothing although something waits for it; a reply may take longer."""
LINGER_S = 5.0
"""From the end of a connection until what was written last is given up."""


class Connection(H11Protocol):
    """One connection."""

    _owes_since: float | None = None
    """Since when the client has owed the rest of a request."""
    _stalls_since: float | None = None
    _closing_since: float | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio."""
        super().connection_made(transport)
        self._owes_since = self.loop.time()
        limit = self.config.limit_concurrency
        if limit is not None and len(self.connections) >= limit:
            self.connections.discard(self)  # so that those that are refused do not count
            transport.write(_refusal())
            transport.close()

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        if self.transport.is_closing():
            return
        # What is malformed after a reply has begun cannot be answered any more.
        with contextlib.suppress(h11.LocalProtocolError):
            super().data_received(data)
            if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
                self._owes_since = None
            elif self._owes_since is None:
                self._owes_since = self.loop.time()
            return
        self.transport.abort()

    def pause_writing(self) -> None:
        """See asyncio."""
        self._stalls_since = self.loop.time()
        super().pause_writing()

    def resume_writing(self) -> None:
        """See asyncio."""
        self._stalls_since = None
        super().resume_writing()

    def check(self, now: float) -> None:
        """Ends it where its client has taken too long."""
        if self.transport.is_closing():
            self._closing_since = self._closing_since or now
            if now - self._closing_since > LINGER_S:
                self.transport.abort()
            return
        patience = HEAD_TIMEOUT_S if self.conn.their_state is h11.IDLE else HEAD_TIMEOUT_S + BODY_TIMEOUT_S
        if self._owes_since is not None and now - self._owes_since > patience:
            self.transport.close()
        elif self._stalls_since is not None and now - self._stalls_since > STALL_S:
            self.transport.abort()


def check_all(connections: Iterable[object], now: float) -> None:
    """Ends those whose clients have taken too long."""
    for connection in list(connections):
        if isinstance(connection, Connection):
            connection.check(now)


def _refusal() -> bytes:
    error = ApiError(503, "the server has too many connections: try again later", code="too_many_connections")
    body = json.dumps(error.body()).encode()
    head = (
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\nConnection: close\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
