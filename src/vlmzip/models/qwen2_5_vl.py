"""Qwen2.5-VL: grids of any size, windows in the encoder, a merger, and positions with three axes."""

from __future__ import annotations

from collections.abc import Sequence

from vlmzip.compressor import Positions
from vlmzip.errors import UserError
from vlmzip.models.family import Family
from vlmzip.models.pixels import SAME_SIZE_IN_VIDEO
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
    video_inputs: tuple[str, ...] = ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts")
    default_positions: Positions = "original"
    position_axes = (3,)

    def view_pixels(self, inputs: Inputs) -> None:
        return None

    def downsample(self, inputs: Inputs, grids: Sequence[Grid]) -> InputDict:
        views = iter(grids)
        frames = [[next(views) for _ in layout.views] for layout in self.layouts(inputs)]
        if any(len(set(of_video)) > 1 for of_video in frames):
            raise UserError(SAME_SIZE_IN_VIDEO)
        new_grids = [of_video[0]._replace(frames=len(of_video)) for of_video in frames]
        return downsampled_patches(self.model.config.vision_config, inputs, new_grids, self.image_inputs[:2])
