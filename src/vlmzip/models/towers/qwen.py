"""Qwen's vision encoder: grids of any size, a merger that joins squares of patches, and fused queries and keys."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.vision_utils import get_vision_window_index

from vlmzip.errors import UserError
from vlmzip.models.pixels import resized
from vlmzip.models.recording import Recording, attention_received, mean_over_heads, record, rotate
from vlmzip.processor import InputDict, Inputs
from vlmzip.visual_tokens import Grid, Signal


class QwenTower:
    """Qwen's vision encoder, with the score and the keys of VisionZip's Qwen2.5-VL variant.

    The score is the attention received in the last block, computed with rotated queries and keys. Score and keys are
    means over heads and over the patches that the merger joins.
    """

    def __init__(self, visual: Any) -> None:
        self.visual = visual

    @property
    def depth(self) -> int:
        """The number of blocks of the encoder."""
        return len(self.visual.blocks)

    def run(self, inputs: Inputs, layers: Sequence[int]) -> tuple[Any, Recording, Int[Tensor, "images 3"]]:
        """Return the encoder's output, the recording of `layers`, and frames, rows and columns of patches per image."""
        sizes = sizes_of(inputs)
        with self._record(layers) as recording:
            out = self.visual(inputs["pixel_values"].type(self.visual.dtype), grid_thw=sizes, return_dict=True)
        return out, recording, sizes

    def grids(self, inputs: Inputs) -> list[Grid]:
        """Return the grid of merged tokens of each image."""
        merge = self.visual.spatial_merge_size
        return [Grid(t, rows // merge, cols // merge) for t, rows, cols in sizes_of(inputs).tolist()]

    def whose(self, layer: int) -> str:
        """Return in a few words which tokens attend in a block."""
        everywhere = getattr(self.visual, "fullatt_block_indexes", None)
        windowed = everywhere is not None and layer not in everywhere
        return "all tokens of the same window" if windowed else "all tokens"

    @torch.no_grad()
    def signals(
        self, recording: Recording, sizes: Int[Tensor, "images 3"], needs: frozenset[Signal]
    ) -> dict[str, Float[Tensor, " tokens *key_dim"]]:
        """Return the score and keys in `needs` for each merged token of all images, in raster order."""
        if not needs:
            return {}
        last = self.depth - 1
        found: dict[str, Tensor] = {}
        if Signal.CLS_ATTENTION in needs:
            found["cls_attention"] = self._received(recording, last)
        if Signal.KEYS in needs:
            _, key = self._rotated(recording, last)
            keys = mean_over_heads(key[None], self.visual.blocks[last].attn.num_heads)[0]
            found["keys"] = keys.unflatten(0, (-1, self.visual.spatial_merge_unit)).mean(1)
        order = self._raster_order(sizes)
        return {name: values[order.to(values.device)] for name, values in found.items()}

    @torch.no_grad()
    def scores(self, recording: Recording, sizes: Int[Tensor, "images 3"]) -> Float[Tensor, "layers tokens"]:
        """Return the attention that each merged token receives in every block, in raster order."""
        scores = torch.stack([self._received(recording, layer) for layer in range(self.depth)])
        return scores[:, self._raster_order(sizes).to(scores.device)]

    def downsample(self, inputs: Inputs, grids: Sequence[Grid]) -> InputDict:
        """Return the image inputs with images resized to these grids of merged tokens."""
        config, sizes = self.visual.config, sizes_of(inputs)
        merge, side = config.spatial_merge_size, config.patch_size * config.spatial_merge_size
        parts = []
        for patches, old, new in zip(
            inputs["pixel_values"].split(sizes.prod(-1).tolist()), self.grids(inputs), grids, strict=True
        ):
            images = resized(images_of(patches, old, config), new.rows * side, new.cols * side)
            parts.append(patches_of(images, new, config))
        smaller = [(grid.frames, grid.rows * merge, grid.cols * merge) for grid in grids]
        return {"pixel_values": torch.cat(parts), "image_grid_thw": sizes.new_tensor(smaller)}

    def _record(self, layers: Sequence[int]) -> AbstractContextManager[Recording]:
        """Record queries, keys and keyword arguments of the attention in some blocks."""
        blocks = {str(layer): self.visual.blocks[layer].attn for layer in layers}
        return record({name: block.qkv for name, block in blocks.items()}, blocks)

    def _received(self, recording: Recording, layer: int) -> Float[Tensor, " tokens"]:
        """Return the attention that each merged token receives in a block, in the order in which the encoder runs.

        Attention is multiplied by the length of its sequence, so that windows of different sizes are comparable.
        """
        attention = self.visual.blocks[layer].attn
        query, key = self._rotated(recording, layer)
        # The sequences of this block: whole images, or windows if the block attends in windows.
        lengths = recording.arguments[str(layer)]["cu_seqlens"].diff().tolist()
        parts = zip(query.split(lengths), key.split(lengths), strict=True)
        scores = [
            attention_received(q[None], k[None], attention.num_heads, attention.scaling)[0] * len(k) for q, k in parts
        ]
        by_token: Tensor = torch.cat(scores).unflatten(0, (-1, self.visual.spatial_merge_unit))
        return by_token.mean(1)

    def _rotated(
        self, recording: Recording, layer: int
    ) -> tuple[Float[Tensor, "patches dim"], Float[Tensor, "patches dim"]]:
        """Return the queries and keys of a block with rotary positions and concatenated heads."""
        heads = self.visual.blocks[layer].attn.num_heads
        query, key, _ = recording[str(layer)].float().unflatten(-1, (3, heads, -1)).unbind(1)
        cos, sin = (table.float()[:, None] for table in recording.arguments[str(layer)]["position_embeddings"])
        query, key = (rotate(x, cos.expand_as(x), sin.expand_as(x)).flatten(1) for x in (query, key))
        return query, key

    def _raster_order(self, thw: Int[Tensor, "images 3"]) -> Int[Tensor, " tokens"]:
        """Return, for all merged tokens in raster order, their indices in the encoder's order, which goes by window."""
        visual = self.visual
        if getattr(visual, "window_size", None) is None:
            return torch.arange(int(thw.prod(-1).sum()) // visual.spatial_merge_unit)
        return get_vision_window_index(
            thw,
            spatial_merge_size=visual.spatial_merge_size,
            window_size=visual.window_size,
            patch_size=visual.patch_size,
        )[0].argsort()


def sizes_of(inputs: Inputs) -> Int[Tensor, "images 3"]:
    """Return `image_grid_thw`. Raise `UserError` if it is missing or does not cover all patches."""
    sizes: Tensor | None = inputs.get("image_grid_thw")
    patches = len(inputs["pixel_values"])
    if sizes is None:
        raise UserError("image_grid_thw is missing: give the model everything that its processor returns")
    if int(sizes.prod(-1).sum()) != patches:
        raise UserError(f"image_grid_thw tells of {int(sizes.prod(-1).sum())} patches, pixel_values has {patches}")
    return sizes


def images_of(
    patches: Float[Tensor, "patches values"], grid: Grid, vision_config: Any
) -> Float[Tensor, "frames 3 height width"]:
    """Return the images that the processor cut into patches, `temporal_patch_size` of them per frame of the grid."""
    patch, merge, together = _patch_sizes(vision_config)
    # The patches that the merger joins are consecutive, so rows and columns each have two dimensions here.
    cut = patches.reshape(grid.frames, grid.rows, grid.cols, merge, merge, -1, together, patch, patch)
    whole = cut.permute(0, 6, 5, 1, 3, 7, 2, 4, 8)
    return whole.reshape(grid.frames * together, -1, grid.rows * merge * patch, grid.cols * merge * patch)


def patches_of(
    images: Float[Tensor, "frames 3 height width"], grid: Grid, vision_config: Any
) -> Float[Tensor, "patches values"]:
    """Cut images into patches; the inverse of `images_of`."""
    patch, merge, together = _patch_sizes(vision_config)
    cut = images.reshape(grid.frames, together, -1, grid.rows, merge, patch, grid.cols, merge, patch)
    return cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(grid.size * merge**2, -1)


def _patch_sizes(vision_config: Any) -> tuple[int, int, int]:
    return vision_config.patch_size, vision_config.spatial_merge_size, vision_config.temporal_patch_size
