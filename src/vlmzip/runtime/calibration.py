"""Calibrate a compressor's threshold on images and videos, so that the tokens kept on average meet a budget."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import BatchFeature

from vlmzip import spec
from vlmzip.compressor import BudgetError, Calibratable, ComparesViews, Compressor, Measured
from vlmzip.errors import UserError, refusing
from vlmzip.keep import Keep, count_to_keep, parse_keep
from vlmzip.models import family_of
from vlmzip.models.family import Family
from vlmzip.processor import Processor
from vlmzip.progress import working
from vlmzip.runtime.compress import view_numbers, without_padding
from vlmzip.runtime.images import load_image
from vlmzip.runtime.pretrained import load_processor
from vlmzip.runtime.prompt_text import chat_prompt, special_tokens, visual_prompt
from vlmzip.runtime.videos import Clip, clip_arguments, is_video, read_clip_for, video_processor_of

#: The largest deviation of the average from the budget, as a fraction of the budget.
TOLERANCE = 0.05

ImageLike = Image.Image | str | os.PathLike[str]
#: An image or its path; a video's path, some frames of it, or its frames as a list of images.
VisualLike = ImageLike | Clip | Sequence[ImageLike]


@dataclass(frozen=True)
class Calibration:
    """A calibrated compressor and its effect on the images and videos. Below, a video counts as an image.

    Separators between the rows of tiles (LLaVA-NeXT) and CLS of frames (Video-LLaVA) are not counted. They remain only
    in views that keep all tokens.
    """

    compressor: Compressor
    """The given compressor with its threshold set."""
    before: list[int]
    """Visual tokens on the grids of each image."""
    after: list[int]
    """Output tokens of each image."""
    after_by_view: list[int]
    """Output tokens of each view, image by image. In most models, an image has one view; a video's are its frames."""
    factors: list[int]
    """The factor chosen for each view, image by image."""
    deviations: list[dict[int, float]]
    """The values that are compared with the threshold, by factor, for each view, image by image."""

    @property
    def average(self) -> float:
        """Return the mean number of output tokens per image."""
        return sum(self.after) / len(self.after)

    @property
    def upper(self) -> int:
        """Return the most output tokens of an image."""
        return max(self.after)

    @property
    def reached(self) -> float:
        """Return the retention ratio over all images."""
        return sum(self.after) / sum(self.before)


def calibrate(
    model: nn.Module,
    images: Iterable[VisualLike],
    compressor: spec.CompressorLike,
    keep: Keep | None = None,
    *,
    keep_per_view: Keep | None = None,
    processor: Processor | None = None,
    batch: int = 16,
    frames: int | None = None,
) -> Calibration:
    """Set a compressor's threshold so that images like `images` keep `keep` visual tokens on average.

    `compressor` must decide by content and a threshold (`DFMR`, `AdaptiveVisionZip`); its other fields are unchanged.
    It may be text or a path, as in `attach`. `images` are images or their paths, which are read and encoded in batches
    of `batch`. `keep` is tokens per image or a fraction of them, as everywhere. If an image has several views
    (LLaVA-NeXT), the compressor decides about each view, and the budget counts the tokens of all views. `processor` is
    the model's processor; by default it is loaded from the model's checkpoint.

    Videos may stand among the images: paths of video files, of which `frames` evenly spaced frames are read (by default
    as many as the processor expects), `Clip`, or lists of frames. `keep` counts all frames of a video. Give
    `keep_per_view` in its place for a budget of each frame or other view on average.

    The average is a step function of the threshold. The nearest step is chosen; it must lie within 5 % of the budget.
    Raise `BudgetError`, with the averages that are possible, if no step does. Raise `UserError` for a compressor
    without a threshold, for an image that cannot be read, and if there are no images.
    """
    compressor = spec.as_compressor(compressor)
    _calibratable(compressor)
    _check_budget(keep, keep_per_view)
    measured = measure(model, images, compressor, processor=processor, batch=batch, frames=frames)
    return meet(compressor, measured, keep, keep_per_view=keep_per_view)


@dataclass(frozen=True)
class MeasuredImage:
    """The measurements of one image or video."""

    views: tuple[Measured, ...]
    """The views, or their parts that get one factor."""
    view_sizes: tuple[int, ...]
    """The number of visual tokens on the grid of each view."""

    @property
    def size(self) -> int:
        """Return the number of visual tokens on the grids of all views."""
        return sum(view.size for view in self.views)


def measure(
    model: nn.Module,
    images: Iterable[VisualLike],
    compressor: Compressor,
    *,
    processor: Processor | None = None,
    batch: int = 16,
    frames: int | None = None,
) -> list[MeasuredImage]:
    """Encode and measure images and videos: the first half of `calibrate`, which serves any number of budgets."""
    if batch < 1:
        raise UserError(f"batch must be at least 1, got {batch}")
    family = family_of(model)
    processor = processor or _processor_of(model)
    measured: list[MeasuredImage] = []
    with working("measuring images", len(images) if isinstance(images, Sized) else 0) as work:
        for are_videos, visuals in groupby(images, _is_video):
            while part := list(islice(visuals, 1 if are_videos else batch)):
                if are_videos:
                    clip = _clip(processor, type(family.model).__name__, part[0], frames)
                    measured.append(_measure_clip(family, processor, _calibratable(compressor), clip))
                else:
                    measured += _measure_together(family, processor, _calibratable(compressor), part)
                work.advance(len(part))
    return measured


def meet(
    compressor: Compressor, images: Sequence[MeasuredImage], keep: Keep | None, *, keep_per_view: Keep | None = None
) -> Calibration:
    """Set the threshold that comes nearest to the budget: the second half of `calibrate`."""
    _check_budget(keep, keep_per_view)
    if not images:
        raise UserError("there is no image to calibrate on; give at least one")
    steps = _Steps(images)
    budgets = [count_to_keep(keep, image.size) for image in images] if keep is not None else []
    if keep_per_view is not None:
        budgets = [count_to_keep(keep_per_view, size) for image in images for size in image.view_sizes]
    budget = sum(budgets) / len(images)
    number = steps.nearest(budget)
    if abs(steps.average(number) - budget) > TOLERANCE * budget:
        raise _out_of_reach(compressor.name(), budget, steps)
    choice = steps.choice(number)
    return Calibration(
        compressor.with_fields(**{_calibratable(compressor).threshold: steps.threshold(number)}),
        before=[image.size for image in images],
        after=steps.tokens(choice).tolist(),
        after_by_view=steps.tokens_by_view(choice).tolist(),
        factors=[steps.factors[index] for index in choice],
        deviations=[view.deviations for image in images for view in image.views],
    )


def _check_budget(keep: Keep | None, keep_per_view: Keep | None) -> None:
    if (keep is None) == (keep_per_view is None):
        raise UserError("give either keep or keep_per_view")
    if keep is not None:
        parse_keep(keep)
    if keep_per_view is not None:
        parse_keep(keep_per_view, "keep_per_view")


def _calibratable(compressor: Compressor) -> Any:
    if not isinstance(compressor, Calibratable):
        raise UserError(f"{compressor.name()} has no threshold to calibrate; give keep to the method itself")
    return compressor


def _is_video(visual: VisualLike) -> bool:
    return is_video(visual) if isinstance(visual, str | os.PathLike) else not isinstance(visual, Image.Image)


def _clip(processor: Processor, model: str, video: VisualLike, frames: int | None) -> Clip:
    video_processor = video_processor_of(processor, model)
    if isinstance(video, Clip):
        return video
    if isinstance(video, str | os.PathLike):
        return read_clip_for(video_processor, video, frames)
    images: Any = video  # a list of frames
    loaded = [load_image(image) for image in images]
    if not loaded:
        raise UserError("a video has no frames; give a list of images")
    same_size = [frame.resize(loaded[0].size) for frame in loaded]
    return Clip("a list of frames", same_size, list(range(len(loaded))), len(loaded), None)


def _measure_clip(family: Family, processor: Processor, compressor: Any, clip: Clip) -> MeasuredImage:
    """Measure the frames of a video, also for models that take them as images."""
    prompt = visual_prompt(family, processor, "", ["video"])
    special = special_tokens(processor.tokenizer, prompt)
    with refusing(f"the processor refuses {clip.path}"):
        inputs = processor(text=[prompt], return_tensors="pt", **clip_arguments([clip]), **special)
    (present,) = family.present_in(inputs)
    are_frames = present.modality == "video"
    return _joined(_measured(present, inputs, compressor), compressor, are_frames=are_frames)


def _measure_together(family: Family, processor: Processor, compressor: Any, images: list[Any]) -> list[MeasuredImage]:
    inputs = _inputs_of(family, processor, [load_image(image) for image in images])
    return [_joined([views], compressor, are_frames=False) for views in _measured(family, inputs, compressor)]


def _measured(family: Family, outputs: BatchFeature, compressor: Any) -> list[list[Measured]]:
    """Measure the views of each image as the compressor will see them: without the padding of tiles."""
    inputs = family.with_names_of_model(outputs.to(family.model.device, family.model.dtype))
    measured: dict[int, Measured] = {}
    with torch.no_grad():
        encoded = family.encode(inputs, compressor.site, compressor.needs, compressor.encoder_layers)
        layouts, encoded = without_padding(family.layouts(inputs), encoded, compressor)
        for group in encoded.groups:
            compressor.grid_of(group.tokens)
            measured.update(zip(group.numbers, Measured.of(compressor, group.tokens), strict=True))
    return [[measured[number] for number in numbers] for numbers in view_numbers(layouts)]


def _joined(images: Sequence[Sequence[Measured]], compressor: Any, *, are_frames: bool) -> MeasuredImage:
    """Return images, such as the frames that a model takes as images, as one. Their views may be a video's frames."""
    sizes = tuple(view.size for views in images for view in views)
    if isinstance(compressor, ComparesViews) and compressor.compares_views:
        parts = [Measured.parts(views, are_frames=are_frames) for views in images]
        images = [[Measured.joined(part) for part in of_image] for of_image in parts]
    return MeasuredImage(tuple(view for views in images for view in views), sizes)


def _inputs_of(family: Family, processor: Processor, images: list[Image.Image]) -> BatchFeature:
    """Return the image inputs, with prompts of one image each if the family counts placeholders."""
    if not family.layouts_need_prompt:
        return processor.image_processor(images, return_tensors="pt")
    prompt = chat_prompt(family, processor, "", images=1)
    special = special_tokens(processor.tokenizer, prompt)
    return processor(images=images, text=[prompt] * len(images), padding=True, return_tensors="pt", **special)


class _Steps:
    """The average as a function of the threshold: it is constant between the deviations, and falls at each of them.

    Step 0 is every threshold up to the smallest deviation. Step i is every threshold above exactly i deviations. Arrays
    have one row per view, image by image.
    """

    def __init__(self, images: Sequence[MeasuredImage]) -> None:
        views = [view for image in images for view in image.views]
        self._first_views = np.cumsum([0, *(len(image.views) for image in images)])[:-1]
        self.factors = sorted({factor for view in views for factor in view.counts})
        never = float("inf")  # a factor that does not divide a view's grid is never below a threshold
        beyond = self.factors[1:]
        self._deviations = np.array([[view.deviations.get(factor, never) for factor in beyond] for view in views])
        self._deviations = self._deviations.reshape(len(views), len(beyond)).astype(np.float32)
        self._counts = np.array([[view.counts.get(factor, 0) for factor in self.factors] for view in views])
        self._edges = np.unique(self._deviations[np.isfinite(self._deviations)])

    def __len__(self) -> int:
        return len(self._edges) + 1

    def choice(self, step: int) -> np.ndarray:
        """Return the index of each view's factor: the largest factor whose deviation is below the threshold."""
        if step == 0:
            return np.zeros(len(self._counts), dtype=int)
        below = self._deviations <= self._edges[step - 1]
        return (below * np.arange(1, len(self.factors))).max(axis=1)

    def tokens_by_view(self, choice: np.ndarray) -> np.ndarray:
        return self._counts[np.arange(len(self._counts)), choice]

    def tokens(self, choice: np.ndarray) -> np.ndarray:
        """Return the output tokens of each image."""
        return np.add.reduceat(self.tokens_by_view(choice), self._first_views)

    def average(self, step: int) -> float:
        return float(self.tokens(self.choice(step)).mean())

    def nearest(self, budget: float) -> int:
        """Return the step with the nearest average; of two equally near steps, the one that keeps fewer tokens."""
        below = bisect_left(range(len(self)), -budget, key=lambda step: -self.average(step))
        around = [step for step in (below, below - 1) if 0 <= step < len(self)]
        return min(around, key=lambda step: abs(self.average(step) - budget))

    def threshold(self, step: int) -> float:
        """Return a threshold of the step: the shortest decimal near its middle."""
        if step == 0:
            return 0.0
        low = float(self._edges[step - 1])
        high = float(self._edges[step]) if step < len(self._edges) else 2 * low + 1e-3
        for digits in range(1, 7):
            short = float(f"{(low + high) / 2:.{digits}g}")
            if low < np.float32(short) <= high:
                return short
        return high


def _out_of_reach(name: str, budget: float, steps: _Steps) -> BudgetError:
    """Return the error for a budget outside the possible averages, or too far from the nearest of them."""
    least, most = steps.average(len(steps) - 1), steps.average(0)
    if not least * (1 - TOLERANCE) <= budget <= most * (1 + TOLERANCE):
        return BudgetError(
            f"{budget:.4g} visual tokens per image are out of {name}'s reach: it can average"
            f" {least:.4g} to {most:.4g} on these images"
        )
    near = steps.average(steps.nearest(budget))
    return BudgetError(
        f"the nearest average to {budget:.4g} visual tokens per image is {near:.4g} on these images"
        f" ({least:.4g} to {most:.4g} in steps); give more images"
    )


def _processor_of(model: nn.Module) -> Processor:
    config: Any = getattr(model, "config", None)
    source = getattr(config, "_name_or_path", "")
    try:
        return load_processor(source, config)
    except UserError as error:
        raise UserError(f"there is no processor at {source!r}; give one: calibrate(…, processor=…)") from error
