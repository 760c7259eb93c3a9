"""The order in which records are trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Sampler

from vlmzip.seeds import mixed

#: Steps among whose records those of similar length are grouped.
TOGETHER = 50


class EpochSampler(Sampler[int]):
    """A sampler that shuffles the records of each epoch into whole steps; an epoch leaves out an incomplete last step.

    The order depends only on the seed and the number of the epoch, so a resumed run draws the same order. With
    `lengths`, a step has records of similar length: within every 50 steps, the records are sorted from long to short.
    """

    def __init__(
        self, count: int, batch: int, seed: int, epoch: Callable[[], int], *, lengths: Sequence[int] | None = None
    ) -> None:
        """Take the number of records and of records per step. `epoch` returns the number of the epoch, from 0."""
        self.count, self.batch, self.seed, self.epoch, self.lengths = count, batch, seed, epoch, lengths

    def __len__(self) -> int:
        return self.count // self.batch * self.batch

    def __iter__(self) -> Iterator[int]:
        rng = torch.Generator().manual_seed(mixed(self.seed, self.epoch()))
        order = torch.randperm(self.count, generator=rng).tolist()[: len(self)]
        if self.lengths is not None:
            size = TOGETHER * self.batch
            parts = [order[start : start + size] for start in range(0, len(order), size)]
            order = [n for part in parts for n in sorted(part, key=self.lengths.__getitem__, reverse=True)]
        yield from order
