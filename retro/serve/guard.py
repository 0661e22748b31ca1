"""What every request passes before anything reads it: its size, its host, the headers of its reply, a line in the log."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Collection
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from retro.serve.errors import ApiError, api_error
from retro.serve.metrics import Metrics

logger = logging.getLogger(__name__)
BODY_TIMEOUT_S = 30.0
"""From the first byte of a request's body to its last."""
DRAIN_S, DRAIN_BYTES = 2.0, 64 << 20
"""So long, and so much, of a body that was refused is taken all the same."""
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; frame-ancestors 'none'; form-action 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_RAW_HEADERS = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]


class Guard:
    """Wraps the whole application."""

    def __init__(
        self, app: ASGIApp, *, max_body_bytes: int, metrics: Metrics, hosts: Collection[str] | None = None
    ) -> None:
        """Takes the application.

        Args:
            app: What is guarded.
            max_body_bytes: Longest body of a request.
            metrics: Told of every request.
            hosts: Names by which the server may be called; None means any. Without keys, a page of another site could otherwise
                call a server on this machine by giving its own name this machine's address.
        """
        self._app, self._metrics = app, metrics
        self._max_body_bytes = max_body_bytes
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0

        async def send_guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = {name for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *((n, v) for n, v in _RAW_HEADERS if n not in own)]
            is_last = message["type"] == "http.response.body" and not message.get("more_body", False)
            if is_last and status in (408, 413):
                await send({**message, "more_body": True})
                await body.drain()
                message = {"type": "http.response.body", "body": b"", "more_body": False}
            await send(message)

        body = _Body(receive, self._max_body_bytes)
        try:
            headers = dict(scope["headers"])
            self._check_host(headers)
            body.check_length(headers)
            await self._app(scope, body.receive, send_guarded)
        except ApiError as error:
            if status:
                raise
            await error.response()(scope, receive, send_guarded)
        except Exception as error:
            # Here and not in a handler of starlette's, which would answer without the headers, and close the connection.
            if status:
                raise
            logger.error("A request failed", exc_info=error)
            await api_error(error).response()(scope, receive, send_guarded)
        finally:
            # Of a path that is none of ours nothing is written: it could be anything.
            route = getattr(scope.get("route"), "path", "(none)")
            seconds = time.perf_counter() - began
            self._metrics.requests.labels(route, str(status or 499)).inc()
            self._metrics.request_seconds.labels(route).observe(seconds)
            logger.info("%s %s %s %.3f s", scope["method"], route, status or "client gone", seconds)

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        if self._hosts is None:
            return
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]
        if name not in self._hosts:
            raise ApiError(
                421,
                "this server is called by another name than its own: without a key it answers to this machine's names only",
                code="wrong_host",
            )


class _Body:
    """A request's body, which may not be too long or too slow."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive, self._limit = receive, limit
        self._size = 0
        self._is_complete = False
        self._deadline: float | None = None

    def check_length(self, headers: dict[bytes, bytes]) -> None:
        """Raises ApiError where the headers announce too much."""
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._limit:
            raise ApiError(413, self._too_long, headers=_CLOSE)

    async def receive(self) -> Message:
        """See ASGI. Whoever reads a body turns any other exception than an HTTPException into one of its own."""
        if self._is_complete:
            return await self._receive()
        loop = asyncio.get_running_loop()
        self._deadline = self._deadline or loop.time() + BODY_TIMEOUT_S
        try:
            async with asyncio.timeout_at(self._deadline):
                message: Any = await self._receive()
        except TimeoutError:
            raise HTTPException(408, f"the request did not come within {BODY_TIMEOUT_S:g} s", headers=_CLOSE) from None
        self._size += len(message.get("body", b""))
        if self._size > self._limit:
            raise HTTPException(413, self._too_long, headers=_CLOSE)
        self._is_complete = not message.get("more_body", False)
        return message  # type: ignore[no-any-return]

    async def drain(self) -> None:
        """Takes what still comes of it, for a while: a connection that is closed before is reset, and a reply on it lost."""
        size = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                while not self._is_complete and size < DRAIN_BYTES:
                    message: Any = await self._receive()
                    size += len(message.get("body", b""))
                    self._is_complete = not message.get("more_body", False)

    @property
    def _too_long(self) -> str:
        return f"the request is longer than {self._limit:,} bytes"


_CLOSE = {"Connection": "close"}
