"""An answer as a stream of server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send


class EventStream(Response):
    """Sends events as they come, until the end, the deadline, or the client goes.

    `ended` is called once in every case, with the reason if the stream ended early. While the client does not read, the
    sender waits here: the engine does not notice.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[dict[str, object]], seconds: float, ended: Callable[[str | None], None]
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._seconds, self._ended = events, seconds, ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reason: str | None = "client gone"
        try:
            async with asyncio.timeout(self._seconds):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                if await first_of(self._send(send), gone(receive)):
                    reason = None
        except TimeoutError:
            reason = "timeout"  # an answer without its end makes uvicorn close the connection
        finally:
            self._ended(reason)

    async def _send(self, send: Send) -> None:
        async for event in self._events:
            await send(_message(json.dumps(event, ensure_ascii=False)))
        await send(_message("[DONE]", more=False))


def _message(data: str, *, more: bool = True) -> dict[str, object]:
    return {"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": more}


async def gone(receive: Receive) -> None:
    """Return once the client has gone. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def first_of(work: Awaitable[None], other: Awaitable[None]) -> bool:
    """Wait until one of both is done, and end the other; return whether it was `work`. Errors of `work` pass."""
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(other)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            await tasks[0]
            return True
        return False
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
