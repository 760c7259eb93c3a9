"""Write the log in a thread, so that a stderr that nobody reads cannot stop the server, and without texts of errors."""

from __future__ import annotations

import copy
import io
import logging
import re
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, suppress
from logging.handlers import QueueHandler, QueueListener
from queue import Full, Queue
from threading import Thread
from types import TracebackType
from typing import TextIO

from vlmzip.errors import counted

#: Lines that wait to be written. Further ones are dropped and counted.
MOST_LINES = 1000
#: Seconds that the end of the server waits for the last lines.
LAST_LINES = 2.0
#: Letters of a line that a library prints. The rest of a longer one follows in further lines.
LONGEST = 1000


class _WithoutTexts(logging.Formatter):
    """Formats errors as the places in the code and the type. Texts of errors can quote what a request contains."""

    def format(self, record: logging.LogRecord) -> str:
        record = copy.copy(record)
        record.exc_text = None  # another handler may have formatted the error with its text
        return super().format(record)

    def formatMessage(self, record: logging.LogRecord) -> str:
        text = super().formatMessage(record)
        # asyncio goes on in parentheses and on further lines, with values.
        return re.split(r"[\n(]", text)[0] if record.name == "asyncio" else text

    def formatException(
        self, ei: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]
    ) -> str:
        return "" if ei[1] is None else places_of(ei[1])


def places_of(error: BaseException) -> str:
    """Return the type of an error and its places in the code, and those of the errors it came from, without texts."""
    parts: list[str] = []
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        each = pending.pop(0)
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        kind = type(each)
        name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        parts.append("".join(traceback.format_tb(each.__traceback__)) + name)
        pending += [*getattr(each, "exceptions", ()), each.__cause__]
        pending += [] if each.__suppress_context__ else [each.__context__]
    return "\nwhich came from\n".join(parts)


class _Dropping(QueueHandler):
    """A handler that puts records into a queue, and drops them if it is full."""

    queue: Queue[logging.LogRecord | None]

    def __init__(self, queue: Queue[logging.LogRecord | None]) -> None:
        super().__init__(queue)
        self.setFormatter(_WithoutTexts())
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
        self._write(record)
        if self.queue.empty():
            self._tell_dropped()

    def _write(self, record: logging.LogRecord) -> None:
        # Once the reader of stderr has gone, writing fails, and rich would end this thread.
        with suppress(Exception, SystemExit):
            super().handle(record)

    def _tell_dropped(self) -> None:
        if dropped := self.handler.take_dropped():
            text = f"the log lacks {counted(dropped, 'line')}, because stderr was not read in time"
            self._write(logging.LogRecord(__name__, logging.WARNING, __file__, 0, text, (), None))

    def is_current(self) -> bool:
        """Return whether the caller runs in this thread."""
        return threading.current_thread() is self._thread

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


class _Stderr(io.TextIOBase):
    """What libraries see as stderr: their lines go through the thread, which alone writes to the real one."""

    def __init__(self, thread: LogThread, real: TextIO) -> None:
        self._thread, self._real, self._begun = thread, real, ""
        self._lock = threading.RLock()  # a signal handler can write while its thread does

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._real.encoding

    def isatty(self) -> bool:
        return self._real.isatty()

    def fileno(self) -> int:
        return self._real.fileno()

    def write(self, text: str) -> int:
        if self._thread.is_current():
            return self._real.write(text)
        with self._lock:
            *lines, self._begun = re.split(r"[\r\n]", self._begun + text)
            if len(self._begun) > LONGEST:
                lines, self._begun = [*lines, self._begun], ""
        for line in filter(str.strip, lines):
            self._thread.handler.handle(logging.LogRecord("stderr", logging.INFO, "", 0, line, (), None))
        return len(text)

    def flush(self) -> None:
        if self._thread.is_current():
            self._real.flush()


@contextmanager
def logging_in_thread() -> Iterator[LogThread]:
    """Let a thread write in the block what vlmzip logs, and what the web server and libraries write to stderr.

    It uses the handlers of vlmzip's log.
    """
    ours = logging.getLogger("vlmzip")
    thread = LogThread(*ours.handlers)
    with ExitStack() as before:
        before.callback(thread.stop)
        for handler in ours.handlers[:]:
            before.enter_context(_without(ours, handler))
        for logger in _loggers():
            for handler in logger.handlers[:]:
                # Those of libraries, such as transformers, would make their caller wait for stderr.
                if isinstance(handler, logging.StreamHandler) and handler.stream in (sys.stderr, sys.__stderr__):
                    before.enter_context(_without(logger, handler))
        root = logging.getLogger()  # uvicorn and asyncio log here
        root.addHandler(thread.handler)
        before.callback(root.removeHandler, thread.handler)
        stderr = _Stderr(thread, sys.stderr)
        before.callback(stderr.write, "\n")  # ends a last line
        before.enter_context(redirect_stderr(stderr))
        thread.start()
        yield thread


def _loggers() -> list[logging.Logger]:
    """Return all loggers."""
    named = list(logging.root.manager.loggerDict.values())
    return [logging.root, *(logger for logger in named if isinstance(logger, logging.Logger))]


@contextmanager
def _without(logger: logging.Logger, handler: logging.Handler) -> Iterator[None]:
    """Take a handler from a logger in the block, and let those of its parents have its records."""
    propagate, logger.propagate = logger.propagate, True
    logger.removeHandler(handler)
    try:
        yield
    finally:
        logger.addHandler(handler)
        logger.propagate = propagate
