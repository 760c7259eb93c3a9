"""Vision encoders of Qwen's kind: images cut into patches of any number, in which the patches of a token are joined."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedConfig
from transformers.utils.constants import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from vlmzip.errors import UserError
from vlmzip.models.pixels import resized
from vlmzip.models.towers.tower import Tower
from vlmzip.processor import InputDict, Inputs
from vlmzip.visual_tokens import Grid

#: Mean and standard deviation of each color channel that the processors of published checkpoints normalise with.
NORMALISED_BY = {
    "qwen2_vl_vision": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    "qwen2_5_vl_vision": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    "qwen3_vl_vision": (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD),
}


class QwenTower(Tower):
    """The vision encoder of Qwen's models, which gets the patches of each token one after another.

    The score is that of VisionZip's Qwen2.5-VL variant: the attention received in the last block, computed with rotated
    queries and keys.
    """

    def whose(self, layer: int, *, cls: bool) -> str:
        full = getattr(self.encoder, "fullatt_block_indexes", None)
        windowed = full is not None and layer not in full
        return "all tokens of the same window" if windowed else super().whose(layer, cls=cls)

    def by_token(
        self, values: Float[Tensor, "rows length *key_dim"], grids: Sequence[Grid], prefix: int
    ) -> Float[Tensor, " tokens *key_dim"]:
        side = self.patches_per_side(values.shape[:2], grids, prefix)
        merged: Tensor = values.flatten(0, 1).unflatten(0, (-1, side**2)).mean(1)
        if getattr(self.encoder, "window_size", None) is None:
            return merged
        # The encoder runs over the windows one after another. Put the tokens back into raster order.
        order: Tensor = get_vision_window_index(
            torch.tensor([(grid.frames, grid.rows * side, grid.cols * side) for grid in grids]),
            spatial_merge_size=side,
            window_size=self.encoder.window_size,
            patch_size=self.encoder.patch_size,
        )[0].argsort()
        return merged[order.to(merged.device)]


def downsampled_patches(
    vision_config: PreTrainedConfig, inputs: Inputs, new_grids: Sequence[Grid], names: tuple[str, str]
) -> InputDict:
    """Return the inputs `names`, patches and their grids, with images resized to these grids of merged tokens."""
    patch, merge, _ = _patch_sizes(vision_config)
    sizes, side = sizes_of(inputs, *names), patch * merge
    parts = []
    for patches, old, new in zip(
        inputs[names[0]].split(sizes.prod(-1).tolist()), grids_of(sizes, merge), new_grids, strict=True
    ):
        images = resized(images_of(patches, old, vision_config), new.rows * side, new.cols * side)
        parts.append(patches_of(images, new, vision_config))
    smaller = [(grid.frames, grid.rows * merge, grid.cols * merge) for grid in new_grids]
    return {names[0]: torch.cat(parts), names[1]: sizes.new_tensor(smaller)}


def pixels_of_tokens(
    vision_config: PreTrainedConfig, patches: Float[Tensor, "patches values"]
) -> Float[Tensor, "tokens token_values"]:
    """Return the pixels, in [0, 1] and float32, of the patches that make each token."""
    _, merge, _ = _patch_sizes(vision_config)
    mean, deviation = (
        torch.tensor(values, device=patches.device)[:, None] for values in NORMALISED_BY[vision_config.model_type]
    )
    pixels = patches.float().unflatten(-1, (len(mean), -1)) * deviation + mean
    of_tokens: Tensor = pixels.flatten(1).unflatten(0, (-1, merge**2)).flatten(1)
    return of_tokens


def arguments_of_part(encoder: nn.Module, sizes: Int[Tensor, "images 3"], kept: Bool[Tensor, " tokens"]) -> InputDict:
    """Return the arguments with which the encoder takes the patches of the tokens marked in `kept` as it would all.

    They are what it otherwise computes from `sizes`, the grids of patches of whole images: the positions of the patches
    and the ends of the sequences that attend together. The encoders of transformers take them in place of their own.
    """
    tower: Any = encoder
    merge = tower.spatial_merge_size
    patches = kept.repeat_interleave(merge**2)
    sequences = get_vision_cu_seqlens(sizes).to(kept.device)
    arguments: InputDict = {
        "position_ids": get_vision_position_ids(sizes, merge).to(kept.device)[patches],
        "cu_seqlens": _ends_of_part(sequences, patches),
    }
    if getattr(tower, "window_size", None) is not None:
        order, windows = get_vision_window_index(sizes, merge, tower.window_size, tower.patch_size)
        order, windows = order.to(kept.device), windows.to(kept.device)
        inside = kept[order]  # the marks of the tokens in the order of the windows
        arguments["window_index"] = (kept.cumsum(0) - 1)[order[inside]]
        arguments["cu_window_seqlens"] = _ends_of_part(windows, inside.repeat_interleave(merge**2))
    if hasattr(tower, "num_grid_per_side"):  # position embeddings, which the encoder interpolates to the grid
        indices, weights = get_vision_interpolation_indices_and_weights(
            sizes,
            tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=merge,
        )
        arguments["interp_indices"] = indices.to(kept.device)[patches]
        arguments["interp_weights"] = weights.to(kept.device)[patches]
    return arguments


def _ends_of_part(ends: Int[Tensor, " ends"], kept: Bool[Tensor, " patches"]) -> Int[Tensor, " ends_left"]:
    """Return the ends of sequences after patches were dropped, without sequences that are empty then."""
    before = pad(kept.cumsum(0), (1, 0))  # the number of kept patches before each patch, and of all
    left: Tensor = before[ends.long()].unique_consecutive()
    return left.to(ends.dtype)


def grids_of(sizes: Int[Tensor, "images 3"], merge: int) -> list[Grid]:
    """Return the grid of merged tokens of each image; `sizes` are frames, rows and columns of patches."""
    return [Grid(frames, rows // merge, cols // merge) for frames, rows, cols in sizes.tolist()]


def sizes_of(inputs: Inputs, pixels: str = "pixel_values", grids: str = "image_grid_thw") -> Int[Tensor, "images 3"]:
    """Return the input `grids`. Raise `UserError` if it is missing or does not cover all patches in `pixels`."""
    sizes: Tensor | None = inputs.get(grids)
    patches = len(inputs[pixels])
    if sizes is None:
        raise UserError(f"{grids} is missing: give the model everything that its processor returns")
    if int(sizes.prod(-1).sum()) != patches:
        raise UserError(f"{grids} describes {int(sizes.prod(-1).sum())} patches, {pixels} has {patches}")
    return sizes


def images_of(
    patches: Float[Tensor, "patches values"], grid: Grid, vision_config: PreTrainedConfig
) -> Float[Tensor, "frames 3 height width"]:
    """Return the images that the processor cut into patches, `temporal_patch_size` of them per frame of the grid."""
    patch, merge, together = _patch_sizes(vision_config)
    # The patches that the merger joins are consecutive, so rows and columns each have two dimensions here.
    cut = patches.reshape(grid.frames, grid.rows, grid.cols, merge, merge, -1, together, patch, patch)
    whole = cut.permute(0, 6, 5, 1, 3, 7, 2, 4, 8)
    return whole.reshape(grid.frames * together, -1, grid.rows * merge * patch, grid.cols * merge * patch)


def patches_of(
    images: Float[Tensor, "frames 3 height width"], grid: Grid, vision_config: PreTrainedConfig
) -> Float[Tensor, "patches values"]:
    """Cut images into patches; the inverse of `images_of`."""
    patch, merge, together = _patch_sizes(vision_config)
    cut = images.reshape(grid.frames, together, -1, grid.rows, merge, patch, grid.cols, merge, patch)
    return cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(grid.size * merge**2, -1)


def _patch_sizes(vision_config: PreTrainedConfig) -> tuple[int, int, int]:
    return vision_config.patch_size, vision_config.spatial_merge_size, vision_config.temporal_patch_size
