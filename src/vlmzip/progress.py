"""How far long work is. The library counts its steps, and a command shows them; code that calls the library shows
nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass
class Work:
    """Work of several steps that take about equally long."""

    what: str
    """What happens now, in a few words."""
    steps: int
    clock: Callable[[], float] = time.monotonic
    done: int = 0
    changed: Callable[[], object] = lambda: None
    """What is called after each change."""
    _started: float = field(init=False)
    _estimate: tuple[float, float] | None = None
    """Seconds left, and when they were estimated."""

    def __post_init__(self) -> None:
        self._started = self.clock()

    def advance(self, steps: int = 1) -> None:
        """Count steps that are done."""
        self.done += steps
        now = self.clock()
        self.estimate((now - self._started) / self.done * (self.steps - self.done))

    def begin(self, what: str) -> None:
        """Say what happens next."""
        self.what = what
        self.changed()

    def leave_out(self, steps: int) -> None:
        """Take steps away that will not be done."""
        self.steps -= steps
        self.changed()

    def estimate(self, seconds: float) -> None:
        """Set how long the rest takes. `advance` sets it by the mean of the steps so far."""
        self._estimate = seconds, self.clock()
        self.changed()

    @property
    def left(self) -> str:
        """Return how long the rest takes, such as "about 5 min left"; empty before the first step and at the end."""
        if self._estimate is None or self.done >= self.steps:
            return ""
        seconds, when = self._estimate
        return f"about {in_words(max(seconds - (self.clock() - when), 0))} left"


#: Show work until the block ends. The value of the block is called after each change.
Show = Callable[[Work], AbstractContextManager[Callable[[], object]]]

_show: ContextVar[Show | None] = ContextVar("show", default=None)


@contextmanager
def showing(show: Show) -> Iterator[None]:
    """Let `show` show the long work in the block."""
    token = _show.set(show)
    try:
        yield
    finally:
        _show.reset(token)


@contextmanager
def working(what: str, steps: int) -> Iterator[Work]:
    """Begin work of `steps` steps, which ends with the block."""
    work, show = Work(what, steps), _show.get()
    if show is None or not steps:
        yield work
        return
    with show(work) as work.changed:
        yield work


def in_words(seconds: float) -> str:
    """Return a duration, rounded as coarsely as an estimate deserves: 5 s, 40 s, 2.5 min, 3.2 h."""
    if seconds < 90:
        return f"{max(5 * round(seconds / 5), 5)} s"
    return f"{round(seconds / 30) / 2:g} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
