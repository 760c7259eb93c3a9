"""Mini-Gemini: CLIP's patches with details from a second encoder. Images of HD models have several views."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

import vlmzip.mini_gemini  # noqa: F401 (it registers the Auto classes)
from vlmzip.compressor import Profile
from vlmzip.models.encoder_run import Batch, Run
from vlmzip.models.family import Family
from vlmzip.models.layout import Layout
from vlmzip.models.recording import record
from vlmzip.models.towers.vit import grid_of
from vlmzip.processor import Inputs
from vlmzip.visual_tokens import Site


class MiniGemini(Family):
    """`MiniGeminiForConditionalGeneration`, also HD, where an image is a global view followed by 2 x 2 crops.

    A token before the projector is a patch of CLIP with the details that it looks up in the second encoder. The
    attention from CLIP's CLS scores the patches. CLS itself covers no part of the image in which it could look up
    details, so it is no token: `VisionZip(dominant=54)` keeps 54 patches.
    """

    model_types = ("mini_gemini",)
    example = "YanweiLi/MGM-2B"
    sites = (Site.PRE_PROJECTOR, Site.POST_PROJECTOR, Site.IN_LLM)
    projects_each_token = True
    image_inputs = ("pixel_values", "pixel_values_aux")

    def profile(self) -> Profile:
        plain = super().profile()
        return replace(plain, tiles=(plain.grid,) * (self.model.config.views - 1))

    def layouts(self, inputs: Inputs) -> list[Layout]:
        grid = grid_of(self.model.config.vision_config, inputs["pixel_values"])
        return Layout.of_equal_views([(grid, self.model.config.views)] * len(inputs["pixel_values_aux"]))

    def batches(self, inputs: Inputs) -> list[Batch]:
        (batch,) = super().batches(inputs)
        return [replace(batch, arguments={**batch.arguments, "pixel_values": self.view_pixels(inputs)})]

    def run(self, batch: Batch, layers: Iterable[int]) -> Run:
        # `get_image_features` asks CLIP for hidden states, whose hooks stay and cannot be pickled. So run CLIP alone.
        outputs, called = self.tower.modules(layers) if layers else ({}, {})
        outputs["patches"] = self.tower.attentions[self.scored_layer({})].layer
        with record(outputs, called) as recording, self._learning(batch):
            self.vision_encoder(pixel_values=batch.arguments["pixel_values"], return_dict=True)
            patches = recording["patches"][:, 1:]
            tokens = self.model.model.with_details(patches, batch.arguments["pixel_values_aux"])
        return Run(None, recording, tokens)

    def view_pixels(self, inputs: Inputs) -> Float[Tensor, "views 3 height width"]:
        pixels: Tensor = inputs["pixel_values"]
        return pixels.flatten(0, -4)
