"""Video-LLaVA: LLaVA with a second encoder for videos, whose frames keep their CLS."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import nn

from vlmzip.models.llava import Llava, LlavaFrames
from vlmzip.processor import Inputs


class VideoLlavaFrames(LlavaFrames):
    """The videos of Video-LLaVA.

    The LLM gets 257 tokens of each of eight frames: CLS and 16 x 16 patches. The papers count 8 x 256. VisionZip keeps
    8 x 17 = 136 of them and does not publish how the 17 are split. `VisionZip(keep_per_view=17)` keeps 14 dominant
    tokens, CLS among them, and 3 contextual ones: the proportion of the paper's other settings.
    """

    features_as_list = False

    @property
    def vision_encoder(self) -> nn.Module:
        encoder: nn.Module = self.model.base_model.video_tower
        return encoder

    def passes_prefix(self, inputs: Inputs) -> bool:
        return self.prefix > 0


class VideoLlava(Llava):
    """`VideoLlavaForConditionalGeneration`. Its images are as LLaVA's."""

    model_types = ("video_llava",)
    example = "LanguageBind/Video-LLaVA-7B-hf"
    image_inputs = ()  # the name depends on the version of transformers
    former_names: ClassVar[Mapping[str, str]] = {"pixel_values_images": "pixel_values"}
    video_inputs = VideoLlavaFrames.video_inputs
    video_family = VideoLlavaFrames
    features_as_list = False
