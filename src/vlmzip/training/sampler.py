"""The order in which records are trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Sampler

from vlmzip.training.random_factor import mixed

#: Steps among whose records those of like length are looked for.
TOGETHER = 50


class EpochSampler(Sampler[int]):
    """The order of an epoch's records, in whole steps; what is left over has its turn in another epoch.

    It follows from the seed and the number of the epoch alone, so that a run that was stopped draws the same again.
    With `lengths` records of like length stand in a step, the long ones of some fifty steps first.
    """

    def __init__(
        self, count: int, batch: int, seed: int, epoch: Callable[[], int], *, lengths: Sequence[int] | None = None
    ) -> None:
        """`epoch` tells which one it is, from 0, whenever an epoch begins."""
        self.count, self.batch, self.seed, self.epoch, self.lengths = count, batch, seed, epoch, lengths

    def __len__(self) -> int:
        return self.count // self.batch * self.batch

    def __iter__(self) -> Iterator[int]:
        rng = torch.Generator().manual_seed(mixed(self.seed, self.epoch()))
        order = torch.randperm(self.count, generator=rng).tolist()[: len(self)]
        if self.lengths is not None:
            many = TOGETHER * self.batch
            parts = [order[start : start + many] for start in range(0, len(order), many)]
            order = [n for part in parts for n in sorted(part, key=self.lengths.__getitem__, reverse=True)]
        yield from order
