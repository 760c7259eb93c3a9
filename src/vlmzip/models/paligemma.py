"""PaliGemma: SigLIP without CLS, one linear layer as projector, prompts that see each other both ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from vlmzip.compressor import Profile
from vlmzip.models.adapter import ModelAdapter
from vlmzip.models.vit import run_vit
from vlmzip.visual_tokens import Grid, Signal, Site, VisualTokens


class PaliGemma(ModelAdapter):
    """`PaliGemmaForConditionalGeneration`.

    SigLIP has no CLS: `cls_attention` is the attention received (VisionZip, A.2).
    """

    model_types = ("paligemma",)
    example = "google/paligemma2-3b-mix-224"
    sites = (Site.PRE_PROJECTOR, Site.POST_PROJECTOR)
    picture_inputs = ("pixel_values",)
    features_as_list = False

    @property
    def placeholder_id(self) -> int:
        return self.model.config.image_token_id

    def profile(self) -> Profile:
        vision = self.model.config.vision_config
        side = vision.image_size // vision.patch_size
        return Profile(Grid(1, side, side), self.llm_config.num_hidden_layers)

    def encode(
        self, inputs: Mapping[str, Any], site: Site, needs: frozenset[Signal]
    ) -> Sequence[tuple[VisualTokens, list[int]]]:
        pixels = inputs["pixel_values"]
        last = self.model.config.vision_config.num_hidden_layers - 1
        _, signals, out = run_vit(self.model.model.vision_tower, pixels, [last], needs)
        features = out.last_hidden_state  # behind the encoder's last norm
        if site is Site.POST_PROJECTOR:
            features = self.project(features, Site.PRE_PROJECTOR)
        return [(VisualTokens(features, self._grid(pixels), **signals), list(range(len(pixels))))]

    def plain_counts(self, inputs: Mapping[str, Any]) -> list[int]:
        return [self._grid(inputs["pixel_values"]).size] * len(inputs["pixel_values"])

    def project(self, features: Float[Tensor, "*tokens dim"], site: Site) -> Float[Tensor, "*tokens llm_dim"]:
        return features if site is Site.POST_PROJECTOR else self.model.model.multi_modal_projector(features)

    def forward_positions(self, positions: Int[Tensor, "batch length"]) -> Int[Tensor, "batch length"]:
        return positions + 1  # counted from 1; `generate` adds the 1 itself

    def _grid(self, pixels: Tensor) -> Grid:
        patch = self.model.config.vision_config.patch_size
        return Grid(1, pixels.shape[-2] // patch, pixels.shape[-1] // patch)
