"""Mini-Gemini: CLIP's patches look up details in a ConvNeXt that sees the image at a high resolution.

The published checkpoints use the trunk of OpenCLIP's ConvNeXt, which timm builds. transformers' ConvNeXt computes the
same from the same weights under other names, so that users need no further library.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import ConvNextConfig, ConvNextModel, LlavaForConditionalGeneration, LlavaModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from vlmzip.mini_gemini.configuration import MiniGeminiConfig


class MiniGeminiAuxTower(ConvNextModel):
    """A ConvNeXt without head, which returns the features of all stages at the size of the first."""

    def __init__(self, config: ConvNextConfig) -> None:
        super().__init__(config)
        self.layernorm: Any = nn.Identity()  # instead of the norm of ConvNeXt's head

    def forward(self, pixel_values: Float[Tensor, "images 3 _ _"]) -> Float[Tensor, "images channels rows cols"]:
        features = self.embeddings(pixel_values.to(self.dtype))
        stages = []
        for stage in self.encoder.stages:
            features = stage(features)
            stages.append(features)
        first, *others = stages
        return torch.cat([first, *(_resized(each, size=first.shape[-2:]) for each in others)], dim=1)


class MiniGeminiPatchMiner(nn.Module):
    """The paper's patch info mining: each patch of CLIP attends to the features of the second encoder below it."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        vision, aux = config.vision_config, config.aux_config
        dim, aux_dim = vision.hidden_size, sum(aux.hidden_sizes)
        self.query_projector = _normalized_linear(dim, dim)
        self.key_projector = _normalized_linear(aux_dim, dim)
        self.value_projector = _normalized_linear(aux_dim, dim)

    def forward(
        self, patches: Float[Tensor, "views patches dim"], features: Float[Tensor, "views channels rows cols"]
    ) -> Float[Tensor, "views patches dim"]:
        candidates = self.candidates(features, math.isqrt(patches.shape[1]))
        query = self.query_projector(patches)[:, :, None]
        key = self.key_projector(candidates) / math.sqrt(query.shape[-1])
        attention = (query @ key.transpose(-1, -2)).softmax(-1)
        mined: Tensor = (attention @ self.value_projector(candidates))[:, :, 0]
        return mined

    @staticmethod
    def candidates(
        features: Float[Tensor, "views channels rows cols"], side: int
    ) -> Float[Tensor, "views patches candidates channels"]:
        """Return the features below each patch of a grid of `side` x `side` patches."""
        rows, cols = features.shape[-2:]
        if rows % side or cols % side:
            raise ValueError(
                f"the second encoder makes {rows} x {cols} features of a view of {side} x {side} patches, which cannot"
                " share them evenly: use the model's own processor"
            )
        windows = features.unflatten(3, (side, -1)).unflatten(2, (side, -1))  # [view, channel, row, y, col, x]
        candidates: Tensor = windows.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)
        return candidates


class MiniGeminiProjector(LlavaMultiModalProjector):
    """The projector, with Gemma's factor of word embeddings.

    Mini-Gemini's Gemma multiplies all its inputs by the root of its width, image features, too. transformers' Gemma
    multiplies word embeddings only.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        text = config.text_config
        self.factor = math.sqrt(text.hidden_size) if text.model_type == "gemma" else None

    def forward(self, image_features: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch llm_dim"]:
        projected: Tensor = super().forward(image_features)
        return projected if self.factor is None else projected * projected.new_tensor(self.factor)


def _with_aux_pixels(forward: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """Give `forward` the parameters of `plain` and `pixel_values_aux`. `generate` looks for their names."""
    signature = inspect.signature(plain)
    aux = inspect.Parameter("pixel_values_aux", inspect.Parameter.KEYWORD_ONLY, default=None)
    *named, keywords = signature.parameters.values()
    forward.__signature__ = signature.replace(parameters=[*named, aux, keywords])  # type: ignore[attr-defined]
    return forward


class MiniGeminiModel(LlavaModel):
    """Mini-Gemini without the head of its LLM."""

    config_class = MiniGeminiConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.vision_tower_aux = MiniGeminiAuxTower(config.aux_config)
        self.patch_miner = MiniGeminiPatchMiner(config)
        self.multi_modal_projector = MiniGeminiProjector(config)
        self.post_init()

    def get_image_features(
        self,
        pixel_values: Float[Tensor, "*images 3 height width"],
        pixel_values_aux: Float[Tensor, "images 3 _ _"],
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """Return the visual tokens of each image in `pooler_output`.

        `pixel_values` is [images, 3, height, width]; for HD models [images, views, 3, height, width], the global view
        first, or the views of all images, one after another.
        """
        config = self.config
        seen = self.vision_tower(pixel_values.flatten(0, -4), output_hidden_states=True, return_dict=True)
        patches = seen.hidden_states[config.vision_feature_layer][:, 1:]
        features = self.features_of_views(pixel_values_aux).to(patches)
        if len(patches) != len(features):
            raise ValueError(
                f"pixel_values has {len(patches)} views, and pixel_values_aux {len(pixel_values_aux)} images of"
                f" {config.views}: use the model's own processor"
            )
        projected = self.multi_modal_projector(patches + self.patch_miner(patches, features))
        images: Any = list(projected.unflatten(0, (-1, config.views)).flatten(1, 2))
        output = BaseModelOutputWithPooling(last_hidden_state=seen.last_hidden_state, pooler_output=images)
        return output if return_dict is not False else output.to_tuple()

    def features_of_views(
        self, pixel_values_aux: Float[Tensor, "images 3 _ _"]
    ) -> Float[Tensor, "views channels rows cols"]:
        """Return the second encoder's features of each view. It sees each image once.

        In HD models, crops get parts of the image's features, and the global view gets all of them at a lower
        resolution.
        """
        features, grid = self.vision_tower_aux(pixel_values_aux), self.config.image_grid
        if grid == 1:
            return features
        whole = _resized(features, scale_factor=1 / grid)
        parts = features.unflatten(3, (grid, -1)).unflatten(2, (grid, -1))  # [image, channel, row, y, col, x]
        crops = parts.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
        return torch.cat([whole[:, None], crops], dim=1).flatten(0, 1)

    def forward(
        self,
        *args: Any,
        pixel_values: Tensor | None = None,
        pixel_values_aux: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        if pixel_values is not None:
            if mm_encoder_outputs is not None:
                raise ValueError("give either pixel_values or mm_encoder_outputs, not both")
            if pixel_values_aux is None:
                raise ValueError("pixel_values_aux is missing: give the model everything that its processor returns")
            mm_encoder_outputs = {"image": self.get_image_features(pixel_values, pixel_values_aux, return_dict=True)}
        return super().forward(*args, mm_encoder_outputs=mm_encoder_outputs, **kwargs)

    _with_aux_pixels(forward, LlavaModel.forward)


class MiniGeminiForConditionalGeneration(LlavaForConditionalGeneration):
    """Mini-Gemini, which answers questions about images."""

    config_class = MiniGeminiConfig

    def __init__(self, config: Any) -> None:
        super(LlavaForConditionalGeneration, self).__init__(config)  # LLaVA's own would build a LlavaModel
        self.model = MiniGeminiModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_image_features(
        self,
        pixel_values: Float[Tensor, "*images 3 height width"],
        pixel_values_aux: Float[Tensor, "images 3 _ _"],
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        return self.model.get_image_features(pixel_values, pixel_values_aux, return_dict=return_dict)

    def forward(self, *args: Any, pixel_values_aux: Tensor | None = None, **kwargs: Any) -> Any:
        return super().forward(*args, pixel_values_aux=pixel_values_aux, **kwargs)

    _with_aux_pixels(forward, LlavaForConditionalGeneration.forward)


def _normalized_linear(width: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width, eps=1e-5), nn.Linear(width, dim))


def _resized(features: Float[Tensor, "images channels _ _"], **size: Any) -> Float[Tensor, "images channels _ _"]:
    """Return features resized by bilinear interpolation in float32, without antialiasing."""
    return interpolate(features.float(), **size, mode="bilinear", align_corners=False).to(features.dtype)
