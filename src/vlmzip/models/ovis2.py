"""Ovis2: as the default family, and the model also needs embeddings for the marks around its tiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlmzip.models.family import Family
from vlmzip.models.layout import Layout
from vlmzip.processor import Inputs
from vlmzip.visual_tokens import Grid


@dataclass
class WithMarks(BaseModelOutputWithPooling):
    """The encoder output of Ovis2."""

    last_hidden_state: Any = None  # first, because accelerate rebuilds outputs from one dict
    pooler_output: Any = None
    visual_indicator_features: Float[Tensor, "marks llm_dim"] | None = None
    """The embeddings of the marks around tiles, which no method compresses."""


class Ovis2(Family):
    """`Ovis2ForConditionalGeneration`. Each tile has its own run of placeholders, and is an image with its own budget.

    The encoder turns patches into probabilities over a visual vocabulary, of which the model takes mean embeddings.
    """

    model_types = ("ovis2",)
    example = "thisisiron/Ovis2-1B-hf"
    projects_each_token = False
    image_inputs = ("pixel_values",)
    features_as_list = False

    @property
    def projector(self) -> nn.Module:
        table: nn.Module = self.model.model.visual_embeddings_table
        return table

    def layouts(self, inputs: Inputs) -> list[Layout]:
        vision, pixels = self.model.config.vision_config, inputs["pixel_values"]
        rows, cols = (-(-size // vision.patch_size // vision.hidden_stride) for size in pixels.shape[-2:])
        return Layout.of_single_views([Grid(1, rows, cols)] * len(pixels))

    def encoder_outputs(
        self,
        features: list[Float[Tensor, "_ llm_dim"]],
        streams: Sequence[tuple[Tensor, ...]] = (),
        further: Mapping[str, object] | None = None,
    ) -> dict[str, BaseModelOutputWithPooling]:
        table = self.model.model.visual_embeddings_table
        count, end = self.model.config.vision_config.num_visual_indicator_tokens, table.num_embeddings
        marks = table(torch.arange(end - count, end, device=features[0].device))
        return {"image": WithMarks(pooler_output=torch.cat(features)[:, None], visual_indicator_features=marks)}
