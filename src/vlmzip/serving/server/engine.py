"""The interface between the server and what answers: an engine prepares requests, queues them and answers them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from vlmzip.serving.server.counting import TokenCount
from vlmzip.serving.server.progress import Progress
from vlmzip.serving.server.schema import ChatRequest


@dataclass(frozen=True)
class Sampling:
    """How the tokens of an answer are chosen, and when it ends."""

    max_tokens: int
    temperature: float = 0.0
    """0 takes the most probable token."""
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    """Texts before which the answer ends."""


class Prepared(Protocol):
    """A request that is ready to be answered."""

    @property
    def count(self) -> TokenCount: ...


class Engine(Protocol):
    """What answers requests. Its model works in a thread of the engine; the event loop never waits for it."""

    @property
    def model(self) -> str:
        """The name of the model in requests and answers."""

    @property
    def waiting(self) -> int:
        """The number of requests in the queue."""

    def prepare(self, request: ChatRequest) -> Any:
        """Return the request ready for `submit`. It may take long: the server calls it in threads.

        Raise `RequestError` for a request that cannot be answered.
        """

    def submit(self, prepared: Any, progress: Progress) -> None:
        """Put a request in the queue, without waiting. `progress` gets the answer."""

    def start(self, died: Callable[[], None]) -> None:
        """Start the thread; it calls `died` if it ends without `stop`."""

    def stop(self) -> None:
        """End the thread after its current step. Requests that are not answered yet fail."""

    def trouble(self) -> str | None:
        """Return why the engine cannot answer; `None` if it can."""
