"""Qwen2.5-VL, images only: grids of any size, windows in the encoder, a merger, and positions with three axes."""

from __future__ import annotations

from collections.abc import Sequence

from vlmzip.compressor import Positions
from vlmzip.errors import UserError
from vlmzip.models.family import Batch, Family
from vlmzip.models.towers.qwen import downsampled_patches
from vlmzip.processor import InputDict, Inputs
from vlmzip.visual_tokens import Grid, Site


class Qwen25VL(Family):
    """`Qwen2_5_VLForConditionalGeneration`.

    Compressors act after the merger, because each of its output tokens becomes one LLM token. The features are thus
    projected already, and `project` returns them unchanged. `QwenTower` describes score and keys.
    """

    model_types = ("qwen2_5_vl",)
    example = "Qwen/Qwen2.5-VL-7B-Instruct"
    sites = (Site.PIXELS, Site.PRE_PROJECTOR, Site.POST_PROJECTOR, Site.IN_LLM)
    projects_each_token = False
    image_inputs = ("pixel_values", "image_grid_thw")
    default_positions: Positions = "original"
    position_axes = (3,)

    def batches(self, inputs: Inputs) -> list[Batch]:
        if inputs.get("pixel_values_videos") is not None:
            raise UserError("videos are not supported in this family yet; images are")
        return super().batches(inputs)

    def view_pixels(self, inputs: Inputs) -> None:
        return None

    def downsample(self, inputs: Inputs, grids: Sequence[Grid]) -> InputDict:
        return downsampled_patches(self.model.config.vision_config, inputs, grids)
