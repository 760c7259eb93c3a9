"""Qwen2.5-VL, images only: grids of any size, windows in the encoder, a merger, positions with three axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.vision_utils import get_vision_window_index

from vlmzip.compressor import Positions, Profile
from vlmzip.errors import UserError
from vlmzip.models.adapter import EncoderAttention, ModelAdapter
from vlmzip.models.layout import Encoded, Layout, Views
from vlmzip.models.pixels import resized
from vlmzip.models.recording import Recording, attention_received, mean_over_heads, record, rotate
from vlmzip.visual_tokens import Grid, Signal, Site, VisualTokens


class Qwen25VL(ModelAdapter):
    """`Qwen2_5_VLForConditionalGeneration`.

    One token becomes one LLM token behind the merger, so that is where compressors act. Score and keys follow
    VisionZip's Qwen2.5-VL variant: attention received in the last vision block, with rotated queries and keys, mean
    over heads and over the patches that the merger joins.
    """

    model_types = ("qwen2_5_vl",)
    example = "Qwen/Qwen2.5-VL-7B-Instruct"
    sites = (Site.PIXELS, Site.PRE_PROJECTOR, Site.POST_PROJECTOR, Site.IN_LLM)
    image_inputs = ("pixel_values", "image_grid_thw")
    default_positions: ClassVar[Positions] = "original"
    position_axes = (3,)

    def profile(self) -> Profile:
        # Any size is native to this family; 448 x 448 pixels stand for a common image.
        vision = self.model.config.vision_config
        side = 448 // vision.patch_size // vision.spatial_merge_size
        return Profile(Grid(1, side, side), self.llm_config.num_hidden_layers)

    def encode(self, inputs: Mapping[str, Any], site: Site, needs: frozenset[Signal]) -> Encoded:
        if inputs.get("pixel_values_videos") is not None:
            raise UserError("videos are not supported in this family yet; images are")
        if Signal.PIXELS in needs:
            raise UserError("this family's inputs are patches, not images, so pixels cannot be looked at")
        visual, thw = self.model.model.visual, _sizes(inputs)
        with self._record([len(visual.blocks) - 1] if needs else []) as recording:
            out = visual(inputs["pixel_values"].type(visual.dtype), grid_thw=thw, return_dict=True)
        signals = self._signals(recording, thw, needs)
        grids = self.grids(inputs)
        ends = torch.tensor([grid.size for grid in grids]).cumsum(0).tolist()
        groups = []
        for grid in dict.fromkeys(grids):
            indices = [index for index, own in enumerate(grids) if own == grid]
            spans = [slice(ends[index] - grid.size, ends[index]) for index in indices]
            own: dict[str, Any] = {
                name: torch.stack([values[span] for span in spans]) for name, values in signals.items()
            }
            features = torch.stack([out.pooler_output[span] for span in spans])
            groups.append(Views(VisualTokens(features, grid, **own), indices))
        return Encoded(groups)

    def layouts(self, inputs: Mapping[str, Any]) -> list[Layout]:
        return [Layout.of_one_view(grid) for grid in self.grids(inputs)]

    def grids(self, inputs: Mapping[str, Any]) -> list[Grid]:
        merge = self.model.config.vision_config.spatial_merge_size
        return [Grid(t, rows // merge, cols // merge) for t, rows, cols in _sizes(inputs).tolist()]

    def view_pixels(self, inputs: Mapping[str, Any]) -> None:
        return None

    def downsample(self, inputs: Mapping[str, Any], grids: Sequence[Grid]) -> dict[str, Any]:
        """Patches to images, images resized, images to patches."""
        config, thw = self.model.config.vision_config, _sizes(inputs)
        merge, side = config.spatial_merge_size, config.patch_size * config.spatial_merge_size
        parts = []
        for patches, old, new in zip(
            inputs["pixel_values"].split(thw.prod(-1).tolist()), self.grids(inputs), grids, strict=True
        ):
            images = resized(images_of(patches, old, config), new.rows * side, new.cols * side)
            parts.append(patches_of(images, new, config))
        sizes = [(grid.frames, grid.rows * merge, grid.cols * merge) for grid in grids]
        return {"pixel_values": torch.cat(parts), "image_grid_thw": thw.new_tensor(sizes)}

    def choose_images(self, inputs: Mapping[str, Any], chosen: list[int]) -> dict[str, Any]:
        sizes = _sizes(inputs)
        parts = inputs["pixel_values"].split(sizes.prod(-1).tolist())
        return {"pixel_values": torch.cat([parts[n] for n in chosen]), "image_grid_thw": sizes[chosen]}

    def feature_width(self, site: Site) -> int:
        return int(self.model.config.vision_config.out_hidden_size)

    @property
    def vision_encoder(self) -> nn.Module:
        encoder: nn.Module = self.model.model.visual  # the projector is a part of it
        return encoder

    @property
    def projector(self) -> nn.Module:
        merger: nn.Module = self.model.model.visual.merger
        return merger

    def project(self, features: Float[Tensor, "tokens dim"], site: Site) -> Float[Tensor, "tokens llm_dim"]:
        return features  # the merger projects, and it comes before both sites

    def original_positions(
        self, inputs: Mapping[str, Any], mask: Int[Tensor, "batch length"]
    ) -> tuple[Int[Tensor, "3 batch length"], Int[Tensor, " batch"]]:
        """Positions on three axes, computed for the full grids (the authors re-slice them likewise)."""
        ids = inputs["input_ids"]
        positions, deltas = self.model.model.get_rope_index(
            ids,
            mm_token_type_ids=(ids == self.placeholder_id).int(),
            image_grid_thw=inputs.get("image_grid_thw"),
            attention_mask=mask,
        )
        return positions, deltas[:, 0] + mask.sum(-1)

    @torch.no_grad()
    def encoder_attention(self, inputs: Mapping[str, Any]) -> EncoderAttention:
        """The attention received in every block. In most of them a patch attends to its own window only, and each
        window gets the same in all: what is concentrated there, is so inside of windows."""
        visual, thw = self.model.model.visual, _sizes(inputs)
        layers = range(len(visual.blocks))
        with self._record(layers) as recording:
            visual(inputs["pixel_values"].type(visual.dtype), grid_thw=thw)
        order = self._raster_order(thw)
        scores = torch.stack([self._received(recording, layer) for layer in layers])
        scores = scores[:, order.to(scores.device)]
        whole = visual.fullatt_block_indexes
        whose = ["all tokens" if layer in whole else "all tokens of the same window" for layer in layers]
        return EncoderAttention(scores.split([grid.size for grid in self.grids(inputs)], dim=1), whose, layers[-1])

    def _record(self, layers: Sequence[int]) -> AbstractContextManager[Recording]:
        """Queries and keys of some blocks, and what their attention is called with."""
        blocks = {str(layer): self.model.model.visual.blocks[layer].attn for layer in layers}
        return record({name: block.qkv for name, block in blocks.items()}, blocks)

    @torch.no_grad()
    def _signals(
        self, recording: Recording, thw: Int[Tensor, "images 3"], needs: frozenset[Signal]
    ) -> dict[str, Float[Tensor, " tokens *key_dim"]]:
        """Score and keys of each merged token of all images, in raster order."""
        if not needs:
            return {}
        visual = self.model.model.visual
        last = len(visual.blocks) - 1
        found: dict[str, Tensor] = {}
        if Signal.CLS_ATTENTION in needs:
            found["cls_attention"] = self._received(recording, last)
        if Signal.KEYS in needs:
            _, key = self._rotated(recording, last)
            keys = mean_over_heads(key[None], visual.blocks[last].attn.num_heads)[0]
            found["keys"] = keys.unflatten(0, (-1, visual.spatial_merge_unit)).mean(1)
        order = self._raster_order(thw)
        return {name: values[order.to(values.device)] for name, values in found.items()}

    def _received(self, recording: Recording, layer: int) -> Float[Tensor, " tokens"]:
        """The attention that each merged token gets in a block, window by window as the encoder runs over them."""
        attention = self.model.model.visual.blocks[layer].attn
        query, key = self._rotated(recording, layer)
        # The sequences of this block: whole images, or windows where it attends in windows.
        lengths = recording.arguments[str(layer)]["cu_seqlens"].diff().tolist()
        parts = zip(query.split(lengths), key.split(lengths), strict=True)
        scores = [
            attention_received(q[None], k[None], attention.num_heads, attention.scaling)[0] * len(k) for q, k in parts
        ]
        by_token: Tensor = torch.cat(scores).unflatten(0, (-1, self.model.model.visual.spatial_merge_unit))
        return by_token.mean(1)

    def _rotated(
        self, recording: Recording, layer: int
    ) -> tuple[Float[Tensor, "patches dim"], Float[Tensor, "patches dim"]]:
        """Queries and keys of a block with rotary positions, heads side by side."""
        heads = self.model.model.visual.blocks[layer].attn.num_heads
        query, key, _ = recording[str(layer)].float().unflatten(-1, (3, heads, -1)).unbind(1)
        cos, sin = (table.float()[:, None] for table in recording.arguments[str(layer)]["position_embeddings"])
        query, key = (rotate(x, cos.expand_as(x), sin.expand_as(x)).flatten(1) for x in (query, key))
        return query, key

    def _raster_order(self, thw: Int[Tensor, "images 3"]) -> Int[Tensor, " tokens"]:
        """For each merged token of all images in raster order, its place in the encoder's window by window."""
        visual = self.model.model.visual
        return get_vision_window_index(
            thw,
            spatial_merge_size=visual.spatial_merge_size,
            window_size=visual.window_size,
            patch_size=visual.patch_size,
        )[0].argsort()


def _sizes(inputs: Mapping[str, Any]) -> Int[Tensor, "images 3"]:
    """`image_grid_thw`, which must say of every patch to which image it belongs."""
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
    """The frames that the processor cut into patches: `temporal_patch_size` of them for each of the grid's."""
    patch, merge, together = _patch_sizes(vision_config)
    # The four patches that the merger joins lie one after another: rows and columns come in two steps each.
    cut = patches.reshape(grid.frames, grid.rows, grid.cols, merge, merge, -1, together, patch, patch)
    whole = cut.permute(0, 6, 5, 1, 3, 7, 2, 4, 8)
    return whole.reshape(grid.frames * together, -1, grid.rows * merge * patch, grid.cols * merge * patch)


def patches_of(
    images: Float[Tensor, "frames 3 height width"], grid: Grid, vision_config: Any
) -> Float[Tensor, "patches values"]:
    """The reverse of `images_of`."""
    patch, merge, together = _patch_sizes(vision_config)
    cut = images.reshape(grid.frames, together, -1, grid.rows, merge, patch, grid.cols, merge, patch)
    return cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(grid.size * merge**2, -1)


def _patch_sizes(vision_config: Any) -> tuple[int, int, int]:
    return vision_config.patch_size, vision_config.spatial_merge_size, vision_config.temporal_patch_size
