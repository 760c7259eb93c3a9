"""Mini-Gemini: CLIP's patches look up details in a ConvNeXt that sees the image at a high resolution.

The published checkpoints use the trunk of OpenCLIP's ConvNeXt, which timm builds. transformers' ConvNeXt computes the
same from the same weights under other names, so that users need no further library.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import LlavaForConditionalGeneration, LlavaModel, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.convnext.modeling_convnext import ConvNextEmbeddings, ConvNextLayer, ConvNextStage
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.utils.generic import can_return_tuple

from vlmzip.mini_gemini.configuration import MiniGeminiConfig

F = TypeVar("F", bound=Callable[..., object])


class MiniGeminiConvNextLayer(ConvNextLayer):
    """ConvNeXt's block. Its linear layers get [images, pixels, channels], because those of bitsandbytes need this."""

    def forward(self, features: Float[Tensor, "images dim rows cols"]) -> Float[Tensor, "images dim rows cols"]:
        normed = self.layernorm(self.dwconv(features).permute(0, 2, 3, 1))
        changes = self.pwconv2(self.act(self.pwconv1(normed.flatten(1, 2))))
        if self.layer_scale_parameter is not None:
            changes = self.layer_scale_parameter * changes
        return features + changes.transpose(1, 2).unflatten(2, features.shape[2:])


class MiniGeminiAuxTower(nn.Module):
    """The stem and the stages of a ConvNeXt. It returns the features of all stages at the size of the first."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        widths = config.hidden_sizes
        depths = config.depths
        self.embeddings = ConvNextEmbeddings(config)
        self.stages = nn.ModuleList()
        for number, (before, width, depth) in enumerate(zip([widths[0], *widths], widths, depths, strict=False)):
            stage = ConvNextStage(config, before, width, stride=2 if number else 1, depth=0)
            stage.layers.extend(MiniGeminiConvNextLayer(config, width) for _ in range(depth))
            self.stages.append(stage)

    def forward(self, pixel_values: Float[Tensor, "images 3 _ _"]) -> Float[Tensor, "images channels rows cols"]:
        features = self.embeddings(pixel_values.to(self.embeddings.patch_embeddings.weight.dtype))
        first, *others = [features := stage(features) for stage in self.stages]
        return torch.cat([first, *(_resized(each, size=first.shape[-2:]) for each in others)], dim=1)


class MiniGeminiPatchMiner(nn.Module):
    """The paper's patch info mining: each patch of CLIP attends to the features of the second encoder below it."""

    def __init__(self, config: PreTrainedConfig) -> None:
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
        # The linear layers get three axes, because those of bitsandbytes need this.
        key, value = (
            projector(candidates.flatten(1, 2)).unflatten(1, candidates.shape[1:3])
            for projector in (self.key_projector, self.value_projector)
        )
        attention = (query @ (key / math.sqrt(key.shape[-1])).transpose(-1, -2)).softmax(-1)
        mined: Tensor = (attention @ value)[:, :, 0]
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


def _with_aux_pixels(forward: F, plain: Callable[..., object]) -> F:
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

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Float[Tensor, "*images 3 height width"],
        pixel_values_aux: Float[Tensor, "images 3 _ _"],
        **kwargs: object,
    ) -> BaseModelOutputWithPooling:
        """Return the visual tokens of each image in `pooler_output`.

        `pixel_values` is [images, 3, height, width]; for HD models [images, views, 3, height, width], the global view
        first, or the views of all images, one after another.
        """
        seen = self.vision_tower(pixel_values.flatten(0, -4), output_hidden_states=True, return_dict=True)
        patches = seen.hidden_states[self.config.vision_feature_layer][:, 1:]
        projected = self.multi_modal_projector(self.with_details(patches, pixel_values_aux))
        images: Any = list(projected.unflatten(0, (-1, self.config.views)).flatten(1, 2))
        return BaseModelOutputWithPooling(last_hidden_state=seen.last_hidden_state, pooler_output=images)

    def with_details(
        self, patches: Float[Tensor, "views patches dim"], pixel_values_aux: Float[Tensor, "images 3 _ _"]
    ) -> Float[Tensor, "views patches dim"]:
        """Return CLIP's patches of all views, each with the details that it looks up in the second encoder."""
        features = self.features_of_views(pixel_values_aux).to(patches)
        if len(patches) != len(features):
            raise ValueError(
                f"pixel_values has {len(patches)} views, and pixel_values_aux {len(pixel_values_aux)} images of"
                f" {self.config.views}: use the model's own processor"
            )
        mined: Tensor = self.patch_miner(patches, features)
        return patches + mined

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
        *args: object,
        pixel_values: Tensor | None = None,
        pixel_values_aux: Tensor | None = None,
        mm_encoder_outputs: dict[str, object] | None = None,
        **kwargs: object,
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

    def __init__(self, config: PreTrainedConfig) -> None:
        super(LlavaForConditionalGeneration, self).__init__(config)  # LLaVA's own would build a LlavaModel
        self.model = MiniGeminiModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_image_features(
        self,
        pixel_values: Float[Tensor, "*images 3 height width"],
        pixel_values_aux: Float[Tensor, "images 3 _ _"],
        **kwargs: object,
    ) -> BaseModelOutputWithPooling:
        return self.model.get_image_features(pixel_values, pixel_values_aux, **kwargs)

    def forward(self, *args: object, pixel_values_aux: Tensor | None = None, **kwargs: object) -> Any:
        return super().forward(*args, pixel_values_aux=pixel_values_aux, **kwargs)

    _with_aux_pixels(forward, LlavaForConditionalGeneration.forward)


def _normalized_linear(width: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width, eps=1e-5), nn.Linear(width, dim))


def _resized(
    features: Float[Tensor, "images channels _ _"], size: Sequence[int] | None = None, scale_factor: float | None = None
) -> Float[Tensor, "images channels _ _"]:
    """Return features resized by bilinear interpolation in float32, without antialiasing."""
    return interpolate(features.float(), size, scale_factor, mode="bilinear", align_corners=False).to(features.dtype)
