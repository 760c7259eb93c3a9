"""Read the body of a request within limits of size, time and memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from starlette.requests import Request

from vlmzip.errors import counted
from vlmzip.serving.server.errors import CLIENT_GONE, RequestError, overloaded
from vlmzip.serving.server.settings import Settings

#: Seconds for which the rest of a refused body is read and dropped, so that the client reads the refusal.
DRAIN = 5.0


class Bodies:
    """Reads bodies, and bounds the bytes that all of them hold together."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._held = settings, 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """Read a body; it counts as held until the end of the block.

        Raise `RequestError` beyond a limit, and for another content type than JSON.
        """
        # Pages of other sites can send forms and plain text to this server without asking, but not JSON. The check is
        # here and does not compare paths, because several paths lead to a route.
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise RequestError("the body must be JSON: send Content-Type: application/json", 415)
        chunks: list[bytes] = []
        size = 0
        try:
            try:
                async with asyncio.timeout(self._settings.upload_seconds):
                    async for chunk in self._chunks(request):
                        size += len(chunk)
                        self._held += len(chunk)
                        chunks.append(chunk)
            except TimeoutError:
                message = f"the request did not arrive within {counted(self._settings.upload_seconds, 'second')}"
                raise RequestError(message, 408, code="upload_timeout", headers={"Connection": "close"}) from None
            body = b"".join(chunks)
            chunks.clear()
            yield body
        finally:
            self._held -= size

    async def _chunks(self, request: Request) -> AsyncIterator[bytes]:
        """Yield the parts of a body. After a refusal, read the rest without keeping it."""
        size, more = 0, True
        length = request.headers.get("content-length", "")
        refusal = self._refusal(int(length) if length.isdecimal() and len(length) < 20 else 0)
        while more and refusal is None:
            chunk, more = await _next(request)
            size += len(chunk)
            refusal = self._refusal(size)
            if refusal is None:
                yield chunk
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN):
                while more and refusal is not None:
                    _, more = await _next(request)
        if refusal is not None:
            raise refusal

    def _refusal(self, size: int) -> RequestError | None:
        """Return the error for a body of which `size` bytes are known; `None` if it is within the limits."""
        limit = self._settings.max_body
        if size > limit:
            message = f"the request has more than {counted(limit, 'byte')}; send fewer or smaller images"
            return RequestError(message, 413, code="request_too_large", headers={"Connection": "close"})
        if self._held > self._settings.max_held:
            return overloaded("too many large requests at once; try again later")
        return None


async def _next(request: Request) -> tuple[bytes, bool]:
    """Return the next part of a body, and whether more follows."""
    message = await request.receive()
    if message["type"] == "http.disconnect":
        raise RequestError("the client has gone", CLIENT_GONE)
    return message.get("body", b""), message.get("more_body", False)
