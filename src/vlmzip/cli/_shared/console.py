"""Log lines, spinners and progress bars of commands, on stderr."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from vlmzip.lab.table import Console
from vlmzip.progress import Work

log = logging.getLogger(__name__)

console = Console(stderr=True)
#: Without a terminal, seconds between two lines about the same work.
LINES_APART = 60.0


class _Lines(logging.Handler):
    """A handler that prints log records on stderr, with "note:" before warnings. Only the first process prints."""

    def emit(self, record: logging.LogRecord) -> None:
        if not _first_process():
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


def on_terminal() -> bool:
    """Return whether stderr is a terminal that can redraw a line."""
    return console.is_terminal and not console.is_dumb_terminal


@contextmanager
def spinner(what: str) -> Iterator[None]:
    """Show a spinner on a terminal, and nothing elsewhere."""
    if not console.is_terminal:
        yield
        return
    with console.status(f"{what} …"):
        yield


@contextmanager
def show_work(work: Work) -> Iterator[Callable[[], None]]:
    """Show a bar on a terminal, and log a line per minute elsewhere."""
    with bar(work) as update:
        yield update if on_terminal() else _line_by_line(work)


@contextmanager
def bar(work: Work) -> Iterator[Callable[[], None]]:
    """Show a bar with the time left on a terminal, and nothing elsewhere. Only the first process shows it."""
    what = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
    columns = (SpinnerColumn(), what, BarColumn(20), MofNCompleteColumn(), _TimeLeft(work))
    hidden = not on_terminal() or not _first_process()
    with Progress(*columns, console=console, transient=True, redirect_stdout=False, disable=hidden) as progress:
        row = progress.add_task(work.what, total=work.steps)
        yield lambda: progress.update(row, description=work.what, completed=work.done, total=work.steps)


class _TimeLeft(ProgressColumn):
    """The time left as the work estimates it: rich's forgets steps that take more than half a minute."""

    def __init__(self, work: Work) -> None:
        super().__init__(Column(no_wrap=True))
        self.work = work

    def render(self, task: Task) -> Text:
        return Text(self.work.left)


def _line_by_line(work: Work) -> Callable[[], None]:
    """Return a function that logs how far the work is, at most once in `LINES_APART` seconds."""
    spoken = time.monotonic()

    def say() -> None:
        nonlocal spoken
        if work.left and time.monotonic() - spoken >= LINES_APART:
            spoken = time.monotonic()
            log.info(f"{work.what}: {work.done:,} of {work.steps:,}, {work.left}")

    return say


def _first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
