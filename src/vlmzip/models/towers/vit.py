"""CLIP and SigLIP vision encoders: their settings, the pixels of their views, and views of other sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils.constants import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from vlmzip.errors import UnfitMethod, UserError
from vlmzip.models.layout import Pixels, numbers_by_kind
from vlmzip.models.pixels import resized
from vlmzip.processor import InputDict
from vlmzip.visual_tokens import Grid

#: Supported encoders, and the number of tokens that each puts before the patches.
PREFIX = {"clip_vision_model": 1, "siglip_vision_model": 0}

#: Mean and standard deviation of each color channel that the processors of published checkpoints normalise with.
NORMALISED_BY = {
    "clip_vision_model": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    "siglip_vision_model": (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD),
}


def prefix_of(vision_config: PreTrainedConfig) -> int:
    """Return the number of tokens before the patches: 1 for CLIP's CLS. Raise `UserError` for unsupported encoders."""
    if vision_config.model_type not in PREFIX:
        known = " and ".join(PREFIX)
        raise UserError(f"vision encoders of type {vision_config.model_type} are not supported yet; {known} are")
    return PREFIX[vision_config.model_type]


def grid_of(vision_config: PreTrainedConfig, pixels: Float[Tensor, "*batch 3 height width"]) -> Grid:
    """Return the grid of patches that all images of a batch have."""
    return Grid(1, pixels.shape[-2] // vision_config.patch_size, pixels.shape[-1] // vision_config.patch_size)


def views_of_equal_size(
    views: Pixels,
) -> list[tuple[Float[Tensor, "views 3 height width"], Sequence[int]]]:
    """Return one batch of pixels for each size of view, with the numbers of its views."""
    if isinstance(views, Tensor):
        return [(views, range(len(views)))]
    groups = numbers_by_kind(view.shape for view in views).values()
    return [(torch.stack([views[number] for number in numbers]), numbers) for numbers in groups]


def resized_views(
    vision_config: PreTrainedConfig, views: Pixels, grids: Sequence[Grid]
) -> list[Float[Tensor, "3 _ _"]]:
    """Return the pixels of views, resized to fit `grids`. Views with the right grid stay unchanged."""
    patch = vision_config.patch_size
    return [
        view if grid == grid_of(vision_config, view) else resized(view[None], grid.rows * patch, grid.cols * patch)[0]
        for view, grid in zip(views, grids, strict=True)
    ]


def downsampled(
    vision_config: PreTrainedConfig, pixels: Float[Tensor, "batch 3 height width"], grid: Grid
) -> InputDict:
    """Return image inputs resized to one grid, for which the encoder interpolates its position embeddings.

    Return the pixels unchanged if they have this grid already.
    """
    patch = vision_config.patch_size
    if grid == grid_of(vision_config, pixels):  # resizing would squeeze in pixels beyond the last patch
        return {"pixel_values": pixels}
    return {"pixel_values": resized(pixels, grid.rows * patch, grid.cols * patch), "interpolate_pos_encoding": True}


def feature_layers(setting: Any, depth: int) -> list[int]:
    """Return the 0-based encoder layers whose outputs are `hidden_states[i]` for each i in `setting`.

    Raise `UserError` for `hidden_states[0]`, the patch embeddings before all layers.
    """
    layers = [index % (depth + 1) - 1 for index in hidden_states(setting, depth)]
    if min(layers) < 0:
        raise UserError("vision_feature_layer points at the patch embeddings, where nothing has been attended to")
    return layers


def hidden_states(setting: Any, depth: int) -> list[int]:
    """Return `vision_feature_layer` as a list. Raise `UserError` for layers that an encoder of `depth` layers lacks."""
    indices = list(setting) if isinstance(setting, list | tuple) else [setting]
    if not indices or any(type(index) is not int or not -depth - 1 <= index <= depth for index in indices):
        raise UserError(
            f"vision_feature_layer={setting!r}: the encoder has {depth} layers; give one of {-depth} to {depth},"
            " or a list of them"
        )
    return indices


def image_of(
    vision_config: PreTrainedConfig, pixels: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, "batch 3 rows_px cols_px"]:
    """Return the area of the images that patches cover, in [0, 1] and float32, without the processor's normalisation.

    A model does not know its processor. We assume the values of published checkpoints: CLIP's mean and standard
    deviation for CLIP encoders, 0.5 for SigLIP. If a processor uses other values (mini has a CLIP encoder and
    normalises by 0.5), brightness and contrast are on another scale, the same for all images of the model. Raise
    `UserError` for other encoders.
    """
    if vision_config.model_type not in NORMALISED_BY:
        raise UnfitMethod(
            f"vlmzip does not know how images are normalised for {vision_config.model_type}:"
            " choose a method that does not look at pixels"
        )
    mean, deviation = (
        torch.tensor(v, device=pixels.device)[:, None, None] for v in NORMALISED_BY[vision_config.model_type]
    )
    patch, (_, rows, cols) = vision_config.patch_size, grid_of(vision_config, pixels)
    return (pixels.float() * deviation + mean).clamp(0, 1)[..., : rows * patch, : cols * patch]
