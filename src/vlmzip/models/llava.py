"""LLaVA-1.5 and models with the same structure: one grid of tokens per image, projected by an MLP."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlmzip.errors import UserError
from vlmzip.models.encoder_run import Batch, Run, learning
from vlmzip.models.family import Family, Modality
from vlmzip.models.layout import Layout, Pixels
from vlmzip.models.pixels import SAME_SIZE_IN_VIDEO
from vlmzip.models.recording import record
from vlmzip.models.towers.vit import (
    downsampled,
    feature_layers,
    grid_of,
    hidden_states,
    prefix_of,
    views_of_equal_size,
)
from vlmzip.processor import InputDict, Inputs
from vlmzip.visual_tokens import Grid, Site

#: The values of `vision_feature_select_strategy`.
STRATEGIES = ("default", "full")


class Llava(Family):
    """`LlavaForConditionalGeneration` with a CLIP or SigLIP encoder.

    The features are the output of `vision_feature_layer`. Attention row and keys come from the same layer, as in
    VisionZip's code (`hidden_states[-2]` and `attentions[-2]`). If features come from several layers, attention row and
    keys come from the deepest. CLS has features, too, although the projector does not get it by default.
    """

    model_types = ("llava",)
    example = "llava-hf/llava-1.5-7b-hf"
    sites: ClassVar[tuple[Site, ...]] = tuple(Site)
    projects_each_token = True
    image_inputs: tuple[str, ...] = ("pixel_values",)

    def __init__(self, model: nn.Module, modality: Modality = "image") -> None:
        super().__init__(model, modality)
        self.prefix = self.leading = prefix_of(self.model.config.vision_config)
        """`leading` is the number of tokens that the encoder puts before the patches of a view."""
        hidden_states(self.setting({}, "vision_feature_layer"), self._depth)
        self.passes_prefix({})

    def batches(self, inputs: Inputs) -> list[Batch]:
        if not self.leading and not self._passes_all(inputs):
            raise UserError(
                "this model drops the first patch of an encoder that has no CLS;"
                ' set vision_feature_select_strategy="full"'
            )
        batches = []
        for pixels, numbers in views_of_equal_size(self.view_pixels(inputs)):
            grids = [self.view_grid(pixels)] * len(pixels)
            arguments = {**self.feature_arguments(inputs), self.image_inputs[0]: pixels}
            batches.append(Batch(arguments, grids, numbers))
        return batches

    def run(self, batch: Batch, layers: Collection[int]) -> Run:
        # `get_image_features` asks its encoder for hidden states. transformers then leaves hooks on the encoder, which
        # cannot be pickled or compiled. So run the encoder alone, and record its layers.
        outputs, called = self.tower.modules(layers) if layers else ({}, {})
        attentions, of_features = self.tower.attentions, self._layers(batch)
        blocks = {f"layer.{layer}": attentions[layer].layer for layer in of_features}
        unread = max([*of_features, *layers]) + 1  # this layer and those after it
        stop_at = None
        if self.leaves_encoder_early and unread < len(attentions):
            stop_at = f"unread.{unread}"
            called = {**called, stop_at: attentions[unread].layer}
        pixels = batch.arguments[self.image_inputs[0]]
        learns = learning(pixels, self.vision_encoder.parameters())
        with record({**outputs, **blocks}, called, stop_at=stop_at) as recording, learns:
            self.run_encoder(batch)
        return Run(None, recording, None)

    def run_encoder(self, batch: Batch) -> object:
        interpolates = batch.arguments.get("interpolate_pos_encoding", False)
        pixels = batch.arguments[self.image_inputs[0]]
        return self.vision_encoder(pixel_values=pixels, interpolate_pos_encoding=interpolates, return_dict=True)

    def features(self, batch: Batch, run: Run) -> Float[Tensor, "tokens dim"]:
        return torch.cat([run.recording[f"layer.{layer}"] for layer in self._layers(batch)], dim=-1).flatten(0, 1)

    def view_pixels(self, inputs: Inputs) -> Pixels:
        pixels: Pixels = inputs[self.image_inputs[0]]
        return pixels

    def prompt(self, question: str, images: int, videos: int = 0) -> str:
        return f"USER: {'<image>' * images}{'<video>' * videos}\n{question} ASSISTANT:"

    def layouts(self, inputs: Inputs) -> list[Layout]:
        pixels = inputs[self.image_inputs[0]]
        grid = self.view_grid(pixels)
        return [Layout.of_one_view(grid, self.prefix, passes_prefix=self.passes_prefix(inputs))] * len(pixels)

    def downsample(self, inputs: Inputs, grids: Sequence[Grid]) -> InputDict:
        return downsampled(self.model.config.vision_config, inputs[self.image_inputs[0]], grids[0])

    def view_grid(self, pixels: Float[Tensor, "*batch 3 height width"]) -> Grid:
        """Return the grid of visual tokens of each view in `pixels`."""
        return grid_of(self.model.config.vision_config, pixels)

    def feature_width(self, site: Site) -> int:
        layers = hidden_states(self.setting({}, "vision_feature_layer"), self._depth)
        is_encoded = site is Site.PRE_PROJECTOR and self.projects_each_token
        return super().feature_width(site) * (len(layers) if is_encoded else 1)

    def passes_prefix(self, inputs: Inputs) -> bool:
        return self._passes_all(inputs) and self.prefix > 0

    def _passes_all(self, inputs: Inputs) -> bool:
        """Return True if the LLM gets the tokens before the patches. Raise `UserError` for an unknown strategy."""
        strategy = self.setting(inputs, "vision_feature_select_strategy", "default")
        if strategy not in STRATEGIES:
            raise UserError(f"unknown vision_feature_select_strategy {strategy!r}; choose default or full")
        return str(strategy) == "full"

    def _layers(self, batch: Batch) -> list[int]:
        """Return the encoder layers whose outputs are the features."""
        return feature_layers(self.setting(batch.arguments, "vision_feature_layer"), self._depth)

    @property
    def _depth(self) -> int:
        return int(self.model.config.vision_config.num_hidden_layers)


class LlavaFrames(Llava):
    """The videos of models of LLaVA's kind: `pixel_values_videos` is [videos, frames, 3, height, width]."""

    video_inputs = ("pixel_values_videos",)

    def view_pixels(self, inputs: Inputs) -> Pixels:
        """Return the pixels of the frames of all videos."""
        pixels: Tensor = inputs["pixel_values_videos"]
        return pixels.flatten(0, 1)

    def layouts(self, inputs: Inputs) -> list[Layout]:
        videos, frames = (pixels := inputs["pixel_values_videos"]).shape[:2]
        grid, passes = self.view_grid(pixels), self.passes_prefix(inputs)
        return [Layout.of_frames(grid, frames, self.prefix, passes_prefix=passes)] * videos

    def choose_images(self, inputs: Inputs, chosen: list[int]) -> InputDict:
        return {"pixel_values_videos": inputs["pixel_values_videos"][chosen]}

    def downsample(self, inputs: Inputs, grids: Sequence[Grid]) -> InputDict:
        if len(set(grids)) > 1:
            raise UserError(SAME_SIZE_IN_VIDEO)
        pixels: Tensor = inputs["pixel_values_videos"]
        smaller = downsampled(self.model.config.vision_config, pixels.flatten(0, 1), grids[0])
        return {"pixel_values_videos": smaller.pop("pixel_values").unflatten(0, pixels.shape[:2]), **smaller}
