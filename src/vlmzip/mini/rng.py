"""Random choices that are equal on every machine and in every version of Python and numpy."""

import random
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


class Rng:
    """A random generator on `random.Random.random()`, the only stream that Python promises not to change.

    Python makes no such promise for `randrange`, `choice` and `shuffle`, so they are implemented here.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def below(self, end: int) -> int:
        """Return a random integer from 0 to `end` - 1."""
        return int(self._random() * end)

    def between(self, low: int, high: int) -> int:
        """Return a random integer from `low` to `high`, both included."""
        return low + self.below(high - low + 1)

    def chance(self, percent: int) -> bool:
        """Return True with a probability of `percent` in 100."""
        return self.below(100) < percent

    def pick(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def shuffled(self, options: Sequence[T]) -> list[T]:
        rest = list(options)
        return [rest.pop(self.below(len(rest))) for _ in options]

    def noise(self, shape: tuple[int, ...], low: int, high: int) -> np.ndarray:
        """Return integers in [low, high] from numpy's legacy stream, which NEP 19 freezes."""
        stream = np.random.RandomState(self.below(2**31))
        return stream.randint(low, high + 1, size=shape).astype(np.int32)
