"""Timing: variants interleaved in one run, so that whatever else the machine does troubles them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch


class Quartiles(NamedTuple):
    """Median and quartiles of repeated measurements."""

    median: float
    first: float
    third: float


def now(device: str | torch.device = "cpu") -> float:
    """Seconds, after everything that was sent to the device is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def interleaved(
    runs: Mapping[str, Callable[[], object]], repeats: int, *, warmup: int = 1, device: str | torch.device = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each run of each variant. One round runs every variant once, in turns forwards and backwards, so
    that none of them always follows the same other; `warmup` rounds come first and are not counted."""
    if repeats < 1:
        raise ValueError(f"{repeats} repeats measure nothing")
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(warmup + repeats):
        names = list(runs) if turn % 2 == 0 else list(runs)[::-1]
        for name in names:
            start = now(device)
            runs[name]()
            if turn >= warmup:
                seconds[name].append(now(device) - start)
            else:
                now(device)
    return seconds


def quartiles(values: Sequence[float]) -> Quartiles:
    """Of at least one value; of one, three times that."""
    if len(values) == 1:
        return Quartiles(values[0], values[0], values[0])
    first, middle, third = statistics.quantiles(values, n=4, method="inclusive")
    return Quartiles(middle, first, third)


def ratios(seconds: Sequence[float], plain: Sequence[float]) -> Quartiles:
    """How many times faster than `plain`: quartiles of the ratios within each round."""
    return quartiles([slow / fast for slow, fast in zip(plain, seconds, strict=True)])
