"""Replies that take long: server-sent events, and the client that goes away before the end."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from retro.serve.errors import api_error

logger = logging.getLogger(__name__)
SLACK_S = 5.0
"""Beyond a request's own time, for a client that reads slowly."""


class GoneError(Exception):
    """The client has gone: nobody is there to be told anything."""


def event(value: Any, name: str | None = None) -> bytes:
    """One server-sent event; a text is sent as it is, anything else as JSON in one line."""
    data = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {data}\n\n".encode()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(request: Request, work: Coroutine[Any, Any, Any], timeout_s: float) -> Any:
    """Waits for work; it is cancelled where it takes too long or the client goes away.

    Raises:
        TimeoutError: It took too long.
        GoneError: The client has gone.
    """
    working, watching = asyncio.create_task(work), asyncio.create_task(_gone(request.receive))
    try:
        done, _ = await asyncio.wait({working, watching}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if working in done:
            return working.result()
        if watching in done:
            raise GoneError
        raise TimeoutError
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


class EventStream(Response):
    """Server-sent events; the generator is closed at once when the client goes away."""

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], *, timeout_s: float, at_end: Callable[[], None] = lambda: None
    ) -> None:
        """Takes a generator.

        Args:
            events: Bytes of events.
            timeout_s: After this, and some slack for it to end by itself, it is closed.
            at_end: Called in any case.
        """
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._timeout_s, self._at_end = events, timeout_s, at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends them."""

        async def pump() -> None:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async with contextlib.aclosing(self._events) as events:
                async for content in events:
                    await send({"type": "http.response.body", "body": content, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        pumping, watching = asyncio.create_task(pump()), asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait(
                {pumping, watching}, timeout=self._timeout_s + SLACK_S, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            self._at_end()
            ended = pumping.done()
            for task in (pumping, watching):
                task.cancel()
            await asyncio.gather(pumping, watching, return_exceptions=True)
        if ended:
            pumping.result()


async def timed(events: AsyncGenerator[bytes, None], timeout_s: float, name: str | None) -> AsyncGenerator[bytes, None]:
    """Events, and at last one that tells of an error where there is one."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    async with contextlib.aclosing(events):
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    content = await anext(events)
            except StopAsyncIteration:
                return
            except Exception as error:
                shown = api_error(error, timeout_s=timeout_s)
                if shown.status == 500:
                    logger.exception("A reply failed")
                body = shown.body()
                body["error"]["status"] = shown.status
                yield event(body, name)
                return
            yield content
