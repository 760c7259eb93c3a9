"""LLaVA-NeXT-Video: LLaVA-NeXT, and videos whose frames are pooled before the projector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlmzip.models.encoder_run import Batch, Run
from vlmzip.models.family import Family, Modality
from vlmzip.models.llava import LlavaFrames
from vlmzip.models.llava_next import LlavaNext
from vlmzip.processor import InputDict, Inputs
from vlmzip.visual_tokens import Grid


class LlavaNextVideoFrames(LlavaFrames):
    """The videos of LLaVA-NeXT-Video, without CLS and newlines.

    The model pools the patches of each frame, by default 2 x 2, before the projector. Compressors get the pooled
    tokens. The score and the key of a token are the means over its patches.
    """

    def __init__(self, model: nn.Module, modality: Modality = "video") -> None:
        super().__init__(model, modality)
        self.prefix = 0  # CLS is not pooled

    def view_grid(self, pixels: Float[Tensor, "*batch 3 height width"]) -> Grid:
        _, rows, cols = super().view_grid(pixels)
        stride = self.model.config.spatial_pool_stride
        return Grid(1, rows // stride, cols // stride)

    def passes_prefix(self, inputs: Inputs) -> bool:
        return False

    def downsample(self, inputs: Inputs, grids: Sequence[Grid]) -> InputDict:
        return Family.downsample(self, inputs, grids)  # refuses: the model pools squares only

    def features(self, batch: Batch, run: Run) -> Float[Tensor, "tokens dim"]:
        layers = [run.recording[f"layer.{layer}"] for layer in self._layers(batch)]
        pooled: Tensor = self.model.base_model.vision_resampler(torch.cat(layers, dim=-1)[:, self.leading :])
        return pooled.flatten(0, 1)


class LlavaNextVideo(LlavaNext):
    """`LlavaNextVideoForConditionalGeneration`. Its images are as LLaVA-NeXT's."""

    model_types = ("llava_next_video",)
    example = "llava-hf/LLaVA-NeXT-Video-7B-hf"
    video_inputs = LlavaNextVideoFrames.video_inputs
    video_family = LlavaNextVideoFrames
