"""Log lines and spinners of commands, on stderr."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from vlmzip.lab.table import Console

console = Console(stderr=True)


class _Lines(logging.Handler):
    """A handler that prints log records on stderr, with "note:" before warnings. Only the first process prints."""

    def emit(self, record: logging.LogRecord) -> None:
        if os.environ.get("RANK", "0") != "0":
            return
        start = "note: " if record.levelno >= logging.WARNING else ""
        console.print(start + record.getMessage(), highlight=False, markup=False, soft_wrap=True)


@contextmanager
def log_on_stderr() -> Iterator[None]:
    """Print what vlmzip logs within the block, and restore the logging settings afterwards."""
    logger, lines = logging.getLogger("vlmzip"), _Lines()
    before = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False  # other libraries may have set up handlers that would print each line again
    logger.addHandler(lines)
    try:
        yield
    finally:
        logger.removeHandler(lines)
        logger.level, logger.propagate = before


@contextmanager
def progress(what: str) -> Iterator[None]:
    """Show a spinner on a terminal, and nothing elsewhere."""
    if not console.is_terminal:
        yield
        return
    with console.status(f"{what} …"):
        yield
