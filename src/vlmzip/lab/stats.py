"""Confidence intervals of scores, from a bootstrap over the images of a task.

The bootstrap draws images, not questions, because several questions about one image are not independent. All
configurations of a task use the same draws, so differences between them are paired.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000
#: Percentiles of the draws that bound the 95 % interval.
INTERVAL = (2.5, 97.5)
#: Number of draws to compute at a time.
_TOGETHER = 100


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def half(self) -> float:
        """Return half the width of the interval."""
        return (self.high - self.low) / 2


class Bootstrap:
    """The bootstrap draws for one task. `images` has the image of each question, in the order of the questions."""

    def __init__(self, images: Sequence[str], seed: int, draws: int = DRAWS) -> None:
        number = {image: index for index, image in enumerate(dict.fromkeys(images))}
        self._place = np.array([number[image] for image in images])
        self._count, self._seed, self._draws = len(number), seed, draws

    def share(self, above: np.ndarray, below: np.ndarray) -> np.ndarray:
        """Return sum(above) / sum(below), first for the task itself and then for each draw; shape [1 + draws].

        For a mean, give the scores as `above` and ones as `below`. If sum(below) is 0, the share is 0.
        """
        sums = np.stack([np.bincount(self._place, part, self._count) for part in (above, below)], axis=1)
        drawn = np.concatenate([sums.sum(0)[None], *(times @ sums for times in self._times())])
        return np.divide(drawn[:, 0], drawn[:, 1], out=np.zeros(len(drawn)), where=drawn[:, 1] != 0)

    def means(self, columns: np.ndarray) -> np.ndarray:
        """Return the mean of each column of [questions, columns], first for the task itself and then for each draw.

        The shape is [1 + draws, columns]. Columns share their draws, so differences between them are paired.
        """
        counts = np.bincount(self._place, minlength=self._count)
        sums = np.stack([counts, *(np.bincount(self._place, column, self._count) for column in columns.T)], axis=1)
        drawn = np.concatenate([sums.sum(0)[None], *(times @ sums for times in self._times())])
        return drawn[:, 1:] / drawn[:, :1]

    def _times(self) -> Iterator[np.ndarray]:
        """Yield how often each image is drawn, `_TOGETHER` draws at a time. Every call yields the same values."""
        rng = np.random.default_rng(self._seed)
        for start in range(0, self._draws, _TOGETHER):
            many = min(_TOGETHER, self._draws - start)
            yield rng.multinomial(self._count, np.full(self._count, 1 / self._count), size=many).astype(float)


def estimate(shares: np.ndarray) -> Estimate:
    """Return value and interval of a result of `Bootstrap.share`, or of the difference of two results."""
    low, high = np.percentile(shares[1:], INTERVAL)
    return Estimate(float(shares[0]), float(low), float(high))
