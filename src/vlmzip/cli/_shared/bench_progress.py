"""The progress of `bench` on stderr: how far it is, and how long the rest will take."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from vlmzip.cli._shared.console import on_terminal
from vlmzip.lab.bench.bench import BenchStep
from vlmzip.progress import Work, in_words

log = logging.getLogger(__name__)

#: Seconds after which a line is due within a round, and the shortest time between two lines.
DUE, SOON = 20.0, 5.0
#: The cost of measuring the memory: two answers per method and, on a CPU, the seconds until the process starts.
MEMORY_ROUNDS, START = 2, 10.0


class Progress:
    """The progress of `vlmzip bench`: a bar on a terminal, log lines elsewhere.

    Lines appear once per round, or once in `SOON` seconds if rounds are shorter.
    """

    def __init__(
        self, work: Work | None = None, starting: float = 0.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Start the clock. `starting` is the time that the memory-measuring process takes to start, in seconds."""
        self.work, self.starting, self.clock = work, starting, clock
        self.spoken = clock()
        self.begun: list[float] = []
        """When each round began, the one to warm up first."""

    def __call__(self, step: BenchStep) -> None:
        """Show what is about to run. `bench` calls this before each run."""
        if step.round is None:
            self.say("counting tokens and FLOPs", DUE, name=step.name)
            return
        if self.work is not None and self.begun:  # the run before this one is done
            self.work.advance()
        fresh = step.round == len(self.begun)
        if fresh:
            self.begun.append(self.clock())
        now = f"round {step.round} of {step.rounds}" if step.round else "the round to warm up"
        if not step.round:
            self.say(now, DUE, name=step.name)
            return
        seconds = self._left(step)
        if fresh and step.round == 1:
            rounds = f"{step.rounds} rounds" if step.rounds > 1 else "one round"
            self.spoken = self.clock()
            log.info(f"warmed up; {rounds} and the memory will take about {in_words(seconds)}")
        self.say(now, SOON if fresh else DUE, seconds, step.name)

    def memory(self) -> None:
        """Show that the memory is measured next, and how long it will take."""
        if self.work is not None:
            self.work.advance()
        self.say("measuring the memory", 0, self._round() * MEMORY_ROUNDS + self.starting)

    def say(self, text: str, due: float, left: float | None = None, name: str = "") -> None:
        """Update the bar; without a terminal, log the text if the last line is at least `due` seconds old.

        `left` is the time left in seconds, and `name` the method that runs.
        """
        named = f": {name}" if name else ""
        if on_terminal():
            if self.work is not None:
                self.work.begin(text + named)
                if left is not None:
                    self.work.estimate(left)
        elif self.clock() - self.spoken >= due:
            self.spoken = self.clock()
            log.info(text + ("" if left is None else f", about {in_words(left)} left") + named)

    def _round(self) -> float:
        """Return the duration of a round in seconds. The slower warm-up round counts only while it is the only one."""
        begun = self.begun[1:] if len(self.begun) > 2 else self.begun
        return (begun[-1] - begun[0]) / (len(begun) - 1)

    def _left(self, step: BenchStep) -> float:
        """Return the seconds that are left."""
        assert step.round is not None
        rounds = step.rounds - step.round + 1
        within = self.clock() - self.begun[-1]
        seconds = self._round()
        return max(rounds * seconds - within, 0) + MEMORY_ROUNDS * seconds + self.starting
