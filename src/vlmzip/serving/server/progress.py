"""The way of an answer from the thread of the engine to the client.

The engine writes the text so far and never waits for a client. What a slow client has not read yet is a part of one
text, which is at most as long as an answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic
from typing import Literal

from vlmzip.serving.server.errors import RequestError

Reason = Literal["stop", "length"]


@dataclass(frozen=True)
class VisualTokens:
    """The visual tokens of all images of a request."""

    before: int
    """Without compression."""
    after: int
    """Those that enter the LLM."""
    last_layer: int | None
    """Those that the last layer of the LLM sees; `None` if the method decides by content inside the LLM."""


@dataclass(frozen=True)
class Usage:
    """The token counts of an answer."""

    text_tokens: int
    new_tokens: int
    visual: VisualTokens


@dataclass
class Progress:
    """An answer in the making. `text`, `reason`, `usage` and `error` are written in the thread of the engine."""

    loop: asyncio.AbstractEventLoop
    text: str = ""
    reason: Reason | None = None
    usage: Usage | None = None
    """The tokens so far; `None` before the first."""
    error: RequestError | None = None
    cancelled: bool = False
    """True once nobody waits for the answer."""
    arrived: float = field(default_factory=monotonic)
    started: float | None = None
    """When the model began with the batch of the request."""
    first: float | None = None
    """When the first token was there."""
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def is_over(self) -> bool:
        """Return whether the answer is complete or failed."""
        return self.reason is not None or self.error is not None

    def tell(self) -> None:
        """Wake what waits for the answer. Call it from any thread after a change."""
        with suppress(RuntimeError):  # the event loop has been closed
            self.loop.call_soon_threadsafe(self._changed.set)

    def write(self, text: str) -> None:
        """Set the text so far. A shorter one than before is that of a second try, and is ignored."""
        if len(text) > len(self.text):
            self.text = text
            self.tell()

    def finish(self, reason: Reason) -> None:
        if not self.is_over:
            self.reason = reason
            self.tell()

    def fail(self, error: RequestError) -> None:
        if not self.is_over:
            self.error = error
            self.tell()

    def cancel(self) -> None:
        self.cancelled = True

    async def pieces(self) -> AsyncIterator[str]:
        """Yield the parts of the text as they come. Raise the error if the answer fails."""
        at = 0
        while True:
            self._changed.clear()
            over, text = self.is_over, self.text  # in this order: text that is written before the end is complete
            if len(text) > at:
                yield text[at:]
                at = len(text)
            elif over:
                if self.error is not None:
                    raise self.error
                return
            else:
                await self._changed.wait()

    async def begun(self) -> None:
        """Wait for the first text or the end. Raise the error if the answer fails before its first text."""
        while not (self.text or self.is_over):
            self._changed.clear()
            if not (self.text or self.is_over):
                await self._changed.wait()
        if self.error is not None and not self.text:
            raise self.error

    async def ended(self) -> None:
        """Wait for the end. Raise the error if the answer fails."""
        while not self.is_over:
            self._changed.clear()
            if not self.is_over:
                await self._changed.wait()
        if self.error is not None:
            raise self.error
