"""LLaVA-1.5 and everything built like it: CLIP encoder, MLP projector, one grid of tokens per picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlmzip.compressor import Profile
from vlmzip.errors import UserError
from vlmzip.models.adapter import ModelAdapter
from vlmzip.models.recording import Recording, cls_attention_row, mean_over_heads, record
from vlmzip.visual_tokens import Grid, Signal, Site, VisualTokens


class Llava(ModelAdapter):
    """`LlavaForConditionalGeneration` with a CLIP vision encoder.

    The features are those of `vision_feature_layer`, and attention row and keys are those of the layer that puts these
    features out (VisionZip's code: `hidden_states[-2]` and `attentions[-2]`, the same layer).
    """

    model_types = ("llava",)
    example = "llava-hf/llava-1.5-7b-hf"
    sites = (Site.PRE_PROJECTOR, Site.POST_PROJECTOR)
    picture_inputs = ("pixel_values",)

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        vision = self.model.config.vision_config
        if vision.model_type != "clip_vision_model":
            raise UserError(
                f"LLaVA with a {vision.model_type} encoder is not supported yet; with clip_vision_model it is"
            )

    @property
    def placeholder_id(self) -> int:
        return self.model.config.image_token_id

    @property
    def llm(self) -> nn.Module:
        return self.model.model.language_model

    def profile(self) -> Profile:
        vision = self.model.config.vision_config
        side = vision.image_size // vision.patch_size
        return Profile(Grid(1, side, side), self.model.config.text_config.num_hidden_layers)

    def encode(
        self, inputs: Mapping[str, Any], site: Site, needs: frozenset[Signal]
    ) -> Sequence[tuple[VisualTokens, list[int]]]:
        pixels = inputs["pixel_values"]
        full = self._setting(inputs, "vision_feature_select_strategy") == "full"
        features, signals = self._run_encoder(pixels, self._feature_layers(inputs), needs)
        if site is Site.POST_PROJECTOR:
            features = self.project(features.flatten(0, 1), Site.PRE_PROJECTOR).unflatten(0, features.shape[:2])
        patch = self.model.config.vision_config.patch_size
        grid = Grid(1, pixels.shape[-2] // patch, pixels.shape[-1] // patch)
        tokens = VisualTokens(features, grid, prefix=1, passes_prefix=full, **signals)
        return [(tokens, list(range(len(pixels))))]

    def project(self, features: Float[Tensor, "tokens dim"], site: Site) -> Float[Tensor, "tokens llm_dim"]:
        return features if site is Site.POST_PROJECTOR else self.model.model.multi_modal_projector(features)

    def _run_encoder(
        self, pixels: Tensor, layers: list[int], needs: frozenset[Signal]
    ) -> tuple[Float[Tensor, "batch tokens dim"], dict[str, Any]]:
        """Features (CLS first) of the wanted layers side by side, and the signals of the last of them."""
        tower = self.model.model.vision_tower
        blocks = tower.encoder.layers
        modules: dict[str, nn.Module] = {f"features.{layer}": blocks[layer] for layer in layers}
        if needs:
            attention = blocks[layers[-1]].self_attn
            modules |= {"query": attention.q_proj, "key": attention.k_proj}
        with record(modules) as recording:
            tower(pixel_values=pixels, return_dict=True)
        features = torch.cat([recording[f"features.{layer}"] for layer in layers], dim=-1)
        return features, self._signals(recording, needs)

    def _signals(self, recording: Recording, needs: frozenset[Signal]) -> dict[str, Any]:
        heads = self.model.config.vision_config.num_attention_heads
        signals: dict[str, Any] = {}
        with torch.no_grad():
            if Signal.CLS_ATTENTION in needs:
                head_dim = recording["key"].shape[-1] // heads
                row = cls_attention_row(recording["query"], recording["key"], heads, head_dim**-0.5)
                signals["cls_attention"] = row
            if Signal.KEYS in needs:
                signals["keys"] = mean_over_heads(recording["key"], heads)
        return signals

    def _feature_layers(self, inputs: Mapping[str, Any]) -> list[int]:
        """The encoder layers, 0-based, whose outputs are the features: `hidden_states[0]` is before the first."""
        wanted = self._setting(inputs, "vision_feature_layer")
        depth = self.model.config.vision_config.num_hidden_layers
        layers = [index % (depth + 1) - 1 for index in ([wanted] if isinstance(wanted, int) else wanted)]
        if min(layers) < 0:
            raise UserError("vision_feature_layer points at the patch embeddings, where nothing has been attended to")
        return layers

    def _setting(self, inputs: Mapping[str, Any], name: str) -> Any:
        """A forward argument that overrides the config's, as in the model's own `get_image_features`."""
        given = inputs.get(name)
        return getattr(self.model.config, name) if given is None else given
