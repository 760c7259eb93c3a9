"""PaliGemma: SigLIP without CLS, a linear layer as projector, and bidirectional attention in the prompt."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor

from vlmzip.models.family import EncoderAttention, Family
from vlmzip.models.layout import Encoded, Layout, Views
from vlmzip.models.vit import downsampled, encoder_attention, grid_of, run_vit
from vlmzip.processor import InputDict, Inputs
from vlmzip.visual_tokens import Grid, Signal, Site, VisualTokens


class PaliGemma(Family):
    """`PaliGemmaForConditionalGeneration`.

    SigLIP has no CLS, so `cls_attention` is the attention received (VisionZip, A.2).
    """

    model_types = ("paligemma",)
    example = "google/paligemma-3b-mix-224"
    sites = (Site.PIXELS, Site.PRE_PROJECTOR, Site.POST_PROJECTOR, Site.IN_LLM)
    image_inputs = ("pixel_values",)
    features_as_list = False

    def encode(self, inputs: Inputs, site: Site, needs: frozenset[Signal]) -> Encoded:
        pixels = inputs["pixel_values"]
        last = self.model.config.vision_config.num_hidden_layers - 1
        _, signals, out = run_vit(
            self.vision_encoder, pixels, [last], needs,
            interpolate_pos_encoding=inputs.get("interpolate_pos_encoding", False),
        )  # fmt: skip
        features = out.last_hidden_state  # after the encoder's last norm
        if site is Site.POST_PROJECTOR:
            features = self.project(features, Site.PRE_PROJECTOR)
        tokens = VisualTokens(features, grid_of(self.model.config.vision_config, pixels), **signals)
        return Encoded([Views(tokens, range(len(pixels)))])

    def encoder_attention(self, inputs: Inputs) -> EncoderAttention:
        return encoder_attention(
            self.vision_encoder, inputs["pixel_values"],
            self.model.config.vision_config.num_hidden_layers - 1,
            interpolate_pos_encoding=inputs.get("interpolate_pos_encoding", False),
        )  # fmt: skip

    def layouts(self, inputs: Inputs) -> list[Layout]:
        pixels = inputs["pixel_values"]
        return [Layout.of_one_view(grid_of(self.model.config.vision_config, pixels))] * len(pixels)

    def downsample(self, inputs: Inputs, grids: Sequence[Grid]) -> InputDict:
        return downsampled(self.model.config.vision_config, inputs["pixel_values"], grids[0])

    def project(self, features: Float[Tensor, "*tokens dim"], site: Site) -> Float[Tensor, "*tokens llm_dim"]:
        return features if site is Site.POST_PROJECTOR else self.projector(features)

    def forward_positions(self, positions: Int[Tensor, "batch length"]) -> Int[Tensor, "batch length"]:
        return positions + 1  # `forward` counts from 1; `generate` adds the 1 itself
