"""Setting a threshold from images, so that what they keep on average meets a budget."""

from __future__ import annotations

import dataclasses
import os
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from vlmzip.compressor import BudgetError, Calibratable, Compressor
from vlmzip.errors import UserError
from vlmzip.keep import Keep, count_to_keep, parse_keep
from vlmzip.models import adapter_for
from vlmzip.models.adapter import ModelAdapter
from vlmzip.runtime.images import load_image

#: How far the average may lie from the budget, as a share of it.
TOLERANCE = 0.05

ImageLike = Image.Image | str | os.PathLike[str]


@dataclass(frozen=True)
class Calibration:
    """A compressor whose threshold was set from images, and what it does to them; lists have one entry an image."""

    compressor: Compressor
    """The compressor that was given, with its threshold set."""
    before: list[int]
    """Visual tokens on the grid."""
    after: list[int]
    """Output tokens."""
    factors: list[int]
    """The factor that the image gets."""
    deviations: list[dict[int, float]]
    """What was compared with the threshold, by factor."""

    @property
    def average(self) -> float:
        """Output tokens per image."""
        return sum(self.after) / len(self.after)

    @property
    def reached(self) -> float:
        """The retention ratio over all images."""
        return sum(self.after) / sum(self.before)


def calibrate(
    model: nn.Module,
    images: Iterable[ImageLike],
    compressor: Compressor,
    keep: Keep,
    *,
    processor: Any = None,
    batch: int = 16,
) -> Calibration:
    """Sets a compressor's threshold so that images like `images` keep `keep` visual tokens on average.

    `compressor` is one whose threshold decides by content (`DFMR`, `AdaptiveVisionZip`); its other fields stay.
    `images` are images or paths of them, read and encoded `batch` at a time. `keep` is, as everywhere, tokens per
    image or a fraction of them. `processor` is the model's; left out, it is loaded from where the model came from.

    The average is a step function of the threshold: the nearest step is taken, and it lies within 5 % of the budget.
    Raises `BudgetError` where no step does, with the averages that can be reached; `UserError` for a compressor without
    a threshold, images that cannot be read, or none at all.
    """
    _calibratable(compressor)
    parse_keep(keep)
    return meet(compressor, measure(model, images, compressor, processor=processor, batch=batch), keep)


@dataclass(frozen=True)
class MeasuredImage:
    """One image: its visual tokens, its output tokens by factor, and its deviation by factor beyond 1."""

    size: int
    counts: dict[int, int]
    deviations: dict[int, float]


def measure(
    model: nn.Module, images: Iterable[ImageLike], compressor: Compressor, *, processor: Any = None, batch: int = 16
) -> list[MeasuredImage]:
    """The first half of `calibrate`: encodes the images and measures them, once for any number of budgets."""
    if batch < 1:
        raise UserError(f"batch={batch}: give at least 1")
    adapter = adapter_for(model)
    processor = processor or _processor_of(model)
    rest, found = iter(images), []
    while some := list(islice(rest, batch)):
        found += _measure_together(adapter, processor, _calibratable(compressor), some)
    return found


def meet(compressor: Compressor, images: Sequence[MeasuredImage], keep: Keep) -> Calibration:
    """The second half of `calibrate`: the threshold that comes nearest to the budget."""
    if not images:
        raise UserError("there is no image to calibrate on")
    steps = _Steps(images)
    wanted = sum(count_to_keep(keep, one.size) for one in images) / len(images)
    number = steps.nearest(wanted)
    if abs(steps.average(number) - wanted) > TOLERANCE * wanted:
        raise _out_of_reach(compressor.name(), wanted, steps)
    choice = steps.choice(number)
    setting: dict[str, Any] = {_calibratable(compressor).threshold: steps.threshold(number)}
    return Calibration(
        dataclasses.replace(compressor, **setting),
        before=[one.size for one in images],
        after=steps.tokens(choice).tolist(),
        factors=[steps.factors[index] for index in choice],
        deviations=[one.deviations for one in images],
    )


def _calibratable(compressor: Compressor) -> Any:
    if not isinstance(compressor, Calibratable):
        raise UserError(f"{compressor.name()} has no threshold to calibrate; give keep to the method itself")
    return compressor


def _measure_together(
    adapter: ModelAdapter, processor: Any, compressor: Any, images: list[ImageLike]
) -> list[MeasuredImage]:
    loaded = [load_image(image) for image in images]
    inputs = processor.image_processor(loaded, return_tensors="pt").to(adapter.model.device, adapter.model.dtype)
    found: dict[int, MeasuredImage] = {}
    with torch.no_grad():
        for group in adapter.encode(inputs, compressor.site, compressor.needs).groups:
            tokens, indices = group.tokens, group.numbers
            assert tokens.grid is not None  # encoders have grids
            counts = compressor.counts_by_factor(tokens.grid)
            beyond = list(counts)[1:]
            for index, row in zip(indices, compressor.deviations(tokens).tolist(), strict=True):
                found[index] = MeasuredImage(tokens.grid.size, counts, dict(zip(beyond, row, strict=True)))
    return [found[index] for index in sorted(found)]


class _Steps:
    """The average as a function of the threshold: constant between the deviations, and falling from step to step.

    Step 0 is every threshold up to the smallest deviation, step i those beyond i deviations.
    """

    def __init__(self, images: Sequence[MeasuredImage]) -> None:
        self.factors = sorted({factor for one in images for factor in one.counts})
        none = float("inf")  # a factor that does not divide an image's grid never lies below a threshold
        beyond = self.factors[1:]
        self._deviations = np.array([[one.deviations.get(f, none) for f in beyond] for one in images])
        self._deviations = self._deviations.reshape(len(images), len(beyond)).astype(np.float32)
        self._counts = np.array([[one.counts.get(f, 0) for f in self.factors] for one in images])
        self._edges = np.unique(self._deviations[np.isfinite(self._deviations)])

    def __len__(self) -> int:
        return len(self._edges) + 1

    def choice(self, step: int) -> np.ndarray:
        """For each image which of `factors` it gets, as the methods choose it: the largest below the threshold."""
        if step == 0:
            return np.zeros(len(self._counts), dtype=int)
        below = self._deviations <= self._edges[step - 1]
        return (below * np.arange(1, len(self.factors))).max(axis=1)

    def tokens(self, choice: np.ndarray) -> np.ndarray:
        return self._counts[np.arange(len(self._counts)), choice]

    def average(self, step: int) -> float:
        return float(self.tokens(self.choice(step)).mean())

    def nearest(self, wanted: float) -> int:
        """The step whose average is nearest; of two equally near ones the smaller average, which keeps the budget."""
        below = bisect_left(range(len(self)), -wanted, key=lambda step: -self.average(step))
        around = [step for step in (below, below - 1) if 0 <= step < len(self)]
        return min(around, key=lambda step: abs(self.average(step) - wanted))

    def threshold(self, step: int) -> float:
        """A threshold of the step: the shortest decimal near its middle."""
        if step == 0:
            return 0.0
        low = float(self._edges[step - 1])
        high = float(self._edges[step]) if step < len(self._edges) else 2 * low + 1e-3
        for digits in range(1, 7):
            short = float(f"{(low + high) / 2:.{digits}g}")
            if low < np.float32(short) <= high:
                return short
        return high


def _out_of_reach(name: str, wanted: float, steps: _Steps) -> BudgetError:
    least, most = steps.average(len(steps) - 1), steps.average(0)
    if not least * (1 - TOLERANCE) <= wanted <= most * (1 + TOLERANCE):
        return BudgetError(
            f"{wanted:.4g} visual tokens per image are out of {name}'s reach: it can average"
            f" {least:.4g} to {most:.4g} on these images"
        )
    near = steps.average(steps.nearest(wanted))
    return BudgetError(
        f"the nearest average to {wanted:.4g} visual tokens per image is {near:.4g} on these images"
        f" ({least:.4g} to {most:.4g} in steps); give more images"
    )


def _processor_of(model: nn.Module) -> Any:
    from vlmzip.runtime.checkpoints import load_processor

    source = getattr(getattr(model, "config", None), "_name_or_path", "")
    try:
        return load_processor(source, model.config)
    except UserError as error:
        raise UserError(f"there is no processor at {source!r}: give one, calibrate(…, processor=…)") from error
