"""Write the log in a thread, so that a stderr that nobody reads cannot stop the server."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import QueueHandler, QueueListener
from queue import Full, Queue
from threading import Thread

#: Lines that wait to be written. Further ones are dropped and counted.
MOST_LINES = 1000
#: Seconds that the end of the server waits for the last lines.
LAST_LINES = 2.0


class _Dropping(QueueHandler):
    """A handler that puts records into a queue, and drops them if it is full."""

    queue: Queue[logging.LogRecord | None]

    def __init__(self, queue: Queue[logging.LogRecord | None]) -> None:
        super().__init__(queue)
        self._dropped = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        """Put a record into the queue. The lock of the handler is held."""
        try:
            self.queue.put_nowait(record)
        except Full:
            self._dropped += 1

    def take_dropped(self) -> int:
        """Return how many records were dropped since the last call."""
        self.acquire()
        try:
            dropped, self._dropped = self._dropped, 0
            return dropped
        finally:
            self.release()


class LogThread(QueueListener):
    """A thread that passes the records of a queue to handlers."""

    _thread: Thread | None
    queue: Queue[logging.LogRecord | None]

    def __init__(self, *handlers: logging.Handler) -> None:
        queue: Queue[logging.LogRecord | None] = Queue(MOST_LINES)
        super().__init__(queue, *handlers)
        self.handler = _Dropping(queue)
        self.stuck = False
        """Whether the thread could not write its last lines in time."""

    def handle(self, record: logging.LogRecord) -> None:
        """Write a record, and after the last one that waits, how many were dropped."""
        super().handle(record)
        if self.queue.empty():
            self._tell_dropped()

    def _tell_dropped(self) -> None:
        if dropped := self.handler.take_dropped():
            text = f"{dropped:,} lines of the log were dropped, because stderr was not read in time"
            super().handle(logging.LogRecord(__name__, logging.WARNING, __file__, 0, text, (), None))

    def stop(self) -> None:
        """Let the thread write its last lines, for a limited time. That of the library waits without a limit."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        try:
            self.queue.put(None, timeout=LAST_LINES)
            thread.join(LAST_LINES)
        except Full:
            pass
        self.stuck = thread.is_alive()
        if not self.stuck:
            self._tell_dropped()


@contextmanager
def logging_in_thread() -> Iterator[LogThread]:
    """Let a thread write what vlmzip and the web server log in the block, with the handlers of vlmzip's log."""
    ours, root = logging.getLogger("vlmzip"), logging.getLogger()
    handlers = ours.handlers[:]
    thread, propagate = LogThread(*handlers), ours.propagate
    ours.propagate = False  # each line once
    for handler in handlers:
        ours.removeHandler(handler)
    ours.addHandler(thread.handler)
    root.addHandler(thread.handler)  # uvicorn and asyncio log here
    thread.start()
    try:
        yield thread
    finally:
        root.removeHandler(thread.handler)
        ours.removeHandler(thread.handler)
        ours.propagate = propagate
        for handler in handlers:
            ours.addHandler(handler)
        thread.stop()
