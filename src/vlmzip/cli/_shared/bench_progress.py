"""The progress of `bench` on stderr: how far it is, and how long the rest will take."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from rich.status import Status
from rich.text import Text

from vlmzip.cli._shared.console import console
from vlmzip.lab.bench.bench import BenchStep

log = logging.getLogger(__name__)

#: Seconds after which a line is due within a round, and the shortest time between two lines.
DUE, SOON = 20.0, 5.0
#: The cost of measuring the memory: two answers per method and, on a CPU, the seconds until the process starts.
MEMORY_ROUNDS, START = 2, 10.0


class Progress:
    """The progress of `vlmzip bench`: a spinner on a terminal, log lines elsewhere.

    Lines appear once per round, or once in `SOON` seconds if rounds are shorter.
    """

    def __init__(
        self, status: Status | None = None, starting: float = 0.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Start the clock. `starting` is the time that the memory-measuring process takes to start, in seconds."""
        self.status, self.starting, self.clock = status, starting, clock
        self.spoken = clock()
        self.begun: list[float] = []
        """When each round began, the one to warm up first."""

    def __call__(self, step: BenchStep) -> None:
        """Show what is about to run. `bench` calls this before each run."""
        if step.round is None:
            self.say(f"counting tokens and FLOPs: {step.name}", DUE)
            return
        fresh = step.round == len(self.begun)
        if fresh:
            self.begun.append(self.clock())
        now = f"round {step.round} of {step.rounds}" if step.round else "the round to warm up"
        if not step.round:
            self.say(f"{now}: {step.name}", DUE)
            return
        left = self._left(step)
        if fresh and step.round == 1:
            rounds = f"{step.rounds} rounds" if step.rounds > 1 else "one round"
            self.spoken = self.clock()
            log.info(f"warmed up; {rounds} and the memory will take about {left}")
        self.say(f"{now}, about {left} left: {step.name}", SOON if fresh else DUE)

    def memory(self) -> None:
        """Show that the memory is measured next, and how long it will take."""
        took = self._round() * MEMORY_ROUNDS + self.starting
        self.say(f"measuring the memory, about {in_words(took)} left", 0)

    def say(self, text: str, due: float) -> None:
        """Update the spinner; without a terminal, log the text if the last line is at least `due` seconds old."""
        if console.is_terminal and not console.is_dumb_terminal:
            if self.status is not None:
                self.status.update(Text(text, no_wrap=True, overflow="ellipsis"))
        elif self.clock() - self.spoken >= due:
            self.spoken = self.clock()
            log.info(text)

    def _round(self) -> float:
        """Return the duration of a round in seconds. The slower warm-up round counts only while it is the only one."""
        begun = self.begun[1:] if len(self.begun) > 2 else self.begun
        return (begun[-1] - begun[0]) / (len(begun) - 1)

    def _left(self, step: BenchStep) -> str:
        assert step.round is not None
        rounds = step.rounds - step.round + 1
        within = self.clock() - self.begun[-1]
        seconds = self._round()
        return in_words(max(rounds * seconds - within, 0) + MEMORY_ROUNDS * seconds + self.starting)


def in_words(seconds: float) -> str:
    """Return a duration, rounded as coarsely as an estimate deserves: 5 s, 40 s, 2.5 min, 3.2 h."""
    if seconds < 90:
        return f"{max(5 * round(seconds / 5), 5)} s"
    return f"{round(seconds / 30) / 2:g} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
