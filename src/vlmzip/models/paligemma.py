"""PaliGemma: SigLIP without CLS, a linear layer as projector, and bidirectional attention in the prompt."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Int
from torch import Tensor

from vlmzip.models.family import Family
from vlmzip.models.layout import Layout
from vlmzip.models.towers.vit import downsampled, grid_of
from vlmzip.processor import InputDict, Inputs
from vlmzip.visual_tokens import Grid, Site


class PaliGemma(Family):
    """`PaliGemmaForConditionalGeneration`.

    SigLIP has no CLS, so `cls_attention` is the attention received (VisionZip, A.2).
    """

    model_types = ("paligemma",)
    example = "google/paligemma-3b-mix-224"
    sites = tuple(Site)
    projects_each_token = True
    image_inputs = ("pixel_values",)
    features_as_list = False

    def layouts(self, inputs: Inputs) -> list[Layout]:
        pixels = inputs["pixel_values"]
        return [Layout.of_one_view(grid_of(self.model.config.vision_config, pixels))] * len(pixels)

    def downsample(self, inputs: Inputs, grids: Sequence[Grid]) -> InputDict:
        return downsampled(self.model.config.vision_config, inputs["pixel_values"], grids[0])

    def forward_positions(self, positions: Int[Tensor, "batch length"]) -> Int[Tensor, "batch length"]:
        return positions + 1  # `forward` counts from 1; `generate` adds the 1 itself
