"""LLaVA-1.5 and models with the same structure: one grid of tokens per image, projected by an MLP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from vlmzip.errors import UserError
from vlmzip.models.family import EncoderAttention, Family
from vlmzip.models.layout import Encoded, Layout, Pixels, Views
from vlmzip.models.vit import (
    downsampled,
    encoder_attention,
    feature_layers,
    grid_of,
    hidden_states,
    prefix_of,
    run_vit,
    views_of_equal_size,
)
from vlmzip.processor import InputDict, Inputs
from vlmzip.visual_tokens import Grid, Signal, Site, VisualTokens

#: The values of `vision_feature_select_strategy`.
STRATEGIES = ("default", "full")


class Llava(Family):
    """`LlavaForConditionalGeneration` with a CLIP or SigLIP encoder.

    The features are the output of `vision_feature_layer`. Attention row and keys come from the same layer, as in
    VisionZip's code (`hidden_states[-2]` and `attentions[-2]`). If features come from several layers, attention row and
    keys come from the deepest.
    """

    model_types = ("llava",)
    example = "llava-hf/llava-1.5-7b-hf"
    sites = (Site.PIXELS, Site.PRE_PROJECTOR, Site.POST_PROJECTOR, Site.IN_LLM)
    image_inputs: tuple[str, ...] = ("pixel_values",)

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.prefix = prefix_of(self.model.config.vision_config)
        hidden_states(self._setting({}, "vision_feature_layer"), self._depth)
        self._passes_prefix({})

    def encode(self, inputs: Inputs, site: Site, needs: frozenset[Signal]) -> Encoded:
        full = self._passes_prefix(inputs)
        if not full and not self.prefix:
            raise UserError(
                "this model drops the first patch of an encoder that has no CLS;"
                ' set vision_feature_select_strategy="full"'
            )
        return Encoded(
            [
                Views(self._encode_views(inputs, pixels, site, needs, passes_prefix=full), numbers)
                for pixels, numbers in views_of_equal_size(self.view_pixels(inputs))
            ]
        )

    def _encode_views(
        self,
        inputs: Inputs,
        pixels: Float[Tensor, "views 3 height width"],
        site: Site,
        needs: frozenset[Signal],
        *,
        passes_prefix: bool,
    ) -> VisualTokens:
        layers = feature_layers(self._setting(inputs, "vision_feature_layer"), self._depth)
        features, signals, _ = run_vit(
            self.vision_encoder, pixels, layers, needs,
            interpolate_pos_encoding=inputs.get("interpolate_pos_encoding", False),
        )  # fmt: skip
        if site is Site.POST_PROJECTOR:
            features = self.project(features.flatten(0, 1), Site.PRE_PROJECTOR).unflatten(0, features.shape[:2])
        grid = grid_of(self.model.config.vision_config, pixels)
        return VisualTokens(features, grid, self.prefix, passes_prefix=passes_prefix, **signals)

    def view_pixels(self, inputs: Inputs) -> Pixels:
        pixels: Pixels = inputs["pixel_values"]
        return pixels

    def encoder_attention(self, inputs: Inputs) -> EncoderAttention:
        scored = max(feature_layers(self._setting(inputs, "vision_feature_layer"), self._depth))
        ((pixels, _),) = views_of_equal_size(self.view_pixels(inputs))
        return encoder_attention(
            self.vision_encoder, pixels, scored,
            interpolate_pos_encoding=inputs.get("interpolate_pos_encoding", False),
        )  # fmt: skip

    def prompt(self, question: str, images: int) -> str:
        return f"USER: {'<image>' * images}\n{question} ASSISTANT:"

    def layouts(self, inputs: Inputs) -> list[Layout]:
        pixels = inputs["pixel_values"]
        grid = grid_of(self.model.config.vision_config, pixels)
        return [Layout.of_one_view(grid, self.prefix, passes_prefix=self._passes_prefix(inputs))] * len(pixels)

    def downsample(self, inputs: Inputs, grids: Sequence[Grid]) -> InputDict:
        return downsampled(self.model.config.vision_config, inputs["pixel_values"], grids[0])

    def feature_width(self, site: Site) -> int:
        layers = feature_layers(self._setting({}, "vision_feature_layer"), self._depth)
        return super().feature_width(site) * (len(layers) if site is Site.PRE_PROJECTOR else 1)

    def project(self, features: Float[Tensor, "tokens dim"], site: Site) -> Float[Tensor, "tokens llm_dim"]:
        return features if site is Site.POST_PROJECTOR else self.projector(features)

    def _passes_prefix(self, inputs: Inputs) -> bool:
        """Return True if the LLM gets the tokens before the patches. Raise `UserError` for an unknown strategy."""
        strategy = self._setting(inputs, "vision_feature_select_strategy", "default")
        if strategy not in STRATEGIES:
            raise UserError(f"unknown vision_feature_select_strategy {strategy!r}; choose default or full")
        return str(strategy) == "full"

    @property
    def _depth(self) -> int:
        return int(self.model.config.vision_config.num_hidden_layers)

    def _setting(self, inputs: Inputs, name: str, default: Any = None) -> Any:
        """Return a forward argument, or the config's value if there is none, as `get_image_features` does."""
        given = inputs.get(name)
        return getattr(self.model.config, name, default) if given is None else given
