"""The image processor of Mini-Gemini, on PIL and NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import BatchFeature
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.processing_utils import ImagesKwargs


class MiniGeminiImagesKwargs(ImagesKwargs, total=False):
    """The settings beside LLaVA's."""

    view_size: int
    """The side in pixels of the views that CLIP sees."""
    image_grid: int
    """The crops per side: 1, or 2 for HD models."""


class MiniGeminiImageProcessor(LlavaImageProcessorPil):
    """Make the pixels of both encoders.

    Images are padded to a square with CLIP's mean, resized and normalised for the second encoder
    (`pixel_values_aux`). CLIP's pixels (`pixel_values`) are the normalised ones, resized again: bilinear and without
    antialiasing. For HD models, they are cut into crops, and resized once more for a global view, which stands first.
    """

    model_input_names = ["pixel_values", "pixel_values_aux"]  # noqa: RUF012 (transformers sets it so)
    valid_kwargs = MiniGeminiImagesKwargs
    size = {"shortest_edge": 768}  # noqa: RUF012
    crop_size = {"height": 768, "width": 768}  # noqa: RUF012
    do_pad = True
    view_size = 336
    image_grid = 1

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def _preprocess(  # type: ignore[override]  # transformers calls it with keywords
        self,
        images: list[np.ndarray],
        *,
        view_size: int,
        image_grid: int,
        return_tensors: str | None = None,
        **settings: Any,
    ) -> BatchFeature:
        batch = super()._preprocess(images, return_tensors="pt", **settings)
        aux = batch["pixel_values"].float()
        pixels = {"pixel_values": views_of(aux, view_size, image_grid), "pixel_values_aux": aux}
        return BatchFeature(pixels, tensor_type=return_tensors)


def views_of(pixels: Float[Tensor, "images 3 _ _"], size: int, grid: int) -> Float[Tensor, "images *views 3 size size"]:
    """Return CLIP's views of images: the image if `grid` is 1, else a global view and `grid` x `grid` crops."""
    whole = interpolate(pixels, (grid * size, grid * size), mode="bilinear", align_corners=False)
    if grid == 1:
        return whole
    crops = whole.unflatten(3, (grid, size)).unflatten(2, (grid, size))  # [image, channel, row, y, col, x]
    crops = crops.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    # The authors resize the resized image, not the original one.
    base = interpolate(whole, (size, size), mode="bilinear", align_corners=False)
    return torch.cat([base[:, None], crops], dim=1)
