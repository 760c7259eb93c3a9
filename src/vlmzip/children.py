"""Run a function in a child process that sends its results one by one and never outlives its parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from vlmzip.errors import UserError, reason

T = TypeVar("T")


class ChildFailed(UserError):
    """A child process that did not finish its work. The message gives the reason."""


def end_with_parent() -> None:
    """End this process when its parent ends, for whatever reason."""
    parent = multiprocessing.parent_process()
    launcher = os.getppid()

    def wait() -> None:
        if parent is not None:
            parent.join()
        while parent is None and os.getppid() == launcher:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def end_with_launcher() -> None:
    """Call `end_with_parent` if torchrun or `accelerate launch` started this process."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()


def in_child(
    run: Callable[..., Iterable[T]], *arguments: object, environment: Mapping[str, str] = MappingProxyType({})
) -> Iterator[T]:
    """Yield what `run(*arguments)` yields in a fresh process.

    `run`, the arguments and the results are pickled, `run` by its name. `environment` is added to the child's
    environment. Raise `ChildFailed` if `run` raises or the child is killed. If memory runs out, Linux kills the child
    first.
    """
    context = multiprocessing.get_context("spawn")
    results, sender = context.Pipe(duplex=False)
    child = context.Process(target=_hand_over, args=(sender, run, arguments), daemon=True)
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        child.start()
    finally:
        os.environ.clear()
        os.environ.update(before)
    sender.close()  # the child now holds the only sending end, so `recv` raises EOFError when the child ends
    try:
        while (received := _receive(results, child)) is not None:
            yield received[0]
    finally:
        child.kill()
        child.join()


def _receive(results: Connection, child: BaseProcess) -> list[Any] | None:
    """Return the next result, in a list, or `None` after the last one."""
    try:
        received = results.recv()
    except EOFError:
        child.join()
        code = child.exitcode or 0
        why = f"by signal {-code}, perhaps for lack of memory" if code < 0 else "by itself"
        raise ChildFailed(f"its process was ended {why}") from None
    if isinstance(received, str):
        raise ChildFailed(received)
    values: list[object] | None = received
    return values


def _hand_over(results: Connection, run: Callable[..., Iterable[object]], arguments: tuple[object, ...]) -> None:
    """Run in the child: send each result in a list, then `None`, or the reason of an error as text."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C, and then ends this process
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # the first process that Linux kills if memory runs out
    try:
        for result in run(*arguments):
            results.send([result])
        results.send(None)
    except Exception as error:  # the parent raises it
        results.send(reason(error))
