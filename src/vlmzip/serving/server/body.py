"""Read the body of a request within limits of size, time and memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from starlette.requests import ClientDisconnect, Request

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
        """Read a body; it counts as held until the end of the block. Raise `RequestError` beyond a limit."""
        chunks: list[bytes] = []
        size = 0
        try:
            try:
                async with asyncio.timeout(self._settings.upload_seconds):
                    self._refuse_large(_announced(request))
                    async for chunk in request.stream():
                        size += len(chunk)
                        self._held += len(chunk)
                        chunks.append(chunk)
                        self._refuse_large(size)
                        if self._held > self._settings.max_held:
                            raise overloaded("too many large requests at once; try again later")
            except TimeoutError:
                message = f"the request did not arrive within {self._settings.upload_seconds:g} seconds"
                raise RequestError(message, 408, code="upload_timeout", headers={"Connection": "close"}) from None
            except ClientDisconnect:
                raise RequestError("the client has gone", CLIENT_GONE) from None
            except RequestError:
                chunks.clear()
                await _drain(request)
                raise
            body = b"".join(chunks)
            chunks.clear()
            yield body
        finally:
            self._held -= size

    def _refuse_large(self, size: int) -> None:
        limit = self._settings.max_body
        if size > limit:
            raise RequestError(
                f"the request has more than {limit:,} bytes; send fewer or smaller images",
                413,
                code="request_too_large",
                headers={"Connection": "close"},
            )


def _announced(request: Request) -> int:
    length = request.headers.get("content-length", "")
    return int(length) if length.isdecimal() and len(length) < 20 else 0


async def _drain(request: Request) -> None:
    with suppress(TimeoutError, ClientDisconnect, RuntimeError):  # RuntimeError: the stream was read to its end
        async with asyncio.timeout(DRAIN):
            while (message := await request.receive())["type"] == "http.request" and message.get("more_body"):
                pass
