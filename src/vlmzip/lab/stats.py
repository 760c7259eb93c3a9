"""How sure a score is: intervals from drawing the images of a task again and again.

Images are drawn, not questions, since several questions about one image stand and fall together. All
configurations of a task are summed up over the same draws, so that the difference of two of them is paired.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000
#: Percentiles of the draws: 95 % lie between them.
INTERVAL = (2.5, 97.5)
_TOGETHER = 100


@dataclass(frozen=True)
class Estimate:
    value: float
    low: float
    high: float

    @property
    def half(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2


class Bootstrap:
    """The draws for one task; `images` has the image of each question, in the order of all that is summed up."""

    def __init__(self, images: Sequence[str], seed: int, draws: int = DRAWS) -> None:
        number = {image: index for index, image in enumerate(dict.fromkeys(images))}
        self._place = np.array([number[image] for image in images])
        self._count, self._seed, self._draws = len(number), seed, draws

    def share(self, above: np.ndarray, below: np.ndarray) -> np.ndarray:
        """sum(above) / sum(below) for each draw, after the value for all images as they are.

        A mean is the share of the scores by ones. Where nothing is below, the share is 0.
        """
        sums = np.stack([np.bincount(self._place, part, self._count) for part in (above, below)], axis=1)
        drawn = np.concatenate([sums.sum(0)[None], *(times @ sums for times in self._times())])
        return np.divide(drawn[:, 0], drawn[:, 1], out=np.zeros(len(drawn)), where=drawn[:, 1] != 0)

    def means(self, columns: np.ndarray) -> np.ndarray:
        """The mean of each column (questions by columns) for each draw, after the means for all images as they are.

        Columns share their draws, so differences between them are paired.
        """
        counts = np.bincount(self._place, minlength=self._count)
        sums = np.stack([counts, *(np.bincount(self._place, column, self._count) for column in columns.T)], axis=1)
        drawn = np.concatenate([sums.sum(0)[None], *(times @ sums for times in self._times())])
        return drawn[:, 1:] / drawn[:, :1]

    def _times(self) -> Iterator[np.ndarray]:
        """How often each image is drawn, some draws at a time; the same each time it is called."""
        rng = np.random.default_rng(self._seed)
        for start in range(0, self._draws, _TOGETHER):
            many = min(_TOGETHER, self._draws - start)
            yield rng.multinomial(self._count, np.full(self._count, 1 / self._count), size=many).astype(float)


def estimate(shares: np.ndarray) -> Estimate:
    """Value and interval of what `Bootstrap.share` returned, or of the difference of two of those."""
    low, high = np.percentile(shares[1:], INTERVAL)
    return Estimate(float(shares[0]), float(low), float(high))
