"""Qwen2.5-VL, images only: grids of any size, windows in the encoder, a merger, and positions with three axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor, nn

from vlmzip.compressor import Positions, Profile
from vlmzip.errors import UserError
from vlmzip.models.family import EncoderAttention, Family
from vlmzip.models.layout import Encoded, Layout, Views, numbers_by_kind
from vlmzip.models.towers.qwen import QwenTower, sizes_of
from vlmzip.processor import InputDict, Inputs
from vlmzip.visual_tokens import Grid, Signal, Site, VisualTokens


class Qwen25VL(Family):
    """`Qwen2_5_VLForConditionalGeneration`.

    Compressors act after the merger, because each of its output tokens becomes one LLM token. The features are thus
    projected already, and `project` returns them unchanged. `QwenTower` describes score and keys.
    """

    model_types = ("qwen2_5_vl",)
    example = "Qwen/Qwen2.5-VL-7B-Instruct"
    sites = (Site.PIXELS, Site.PRE_PROJECTOR, Site.POST_PROJECTOR, Site.IN_LLM)
    image_inputs = ("pixel_values", "image_grid_thw")
    default_positions: ClassVar[Positions] = "original"
    position_axes = (3,)

    def profile(self) -> Profile:
        # This family takes images of any size; we assume 448 x 448 pixels as a common size.
        vision = self.model.config.vision_config
        side = 448 // vision.patch_size // vision.spatial_merge_size
        return Profile(Grid(1, side, side), self.llm_config.num_hidden_layers, first_layer=self.first_free_layer)

    def encode(self, inputs: Inputs, site: Site, needs: frozenset[Signal]) -> Encoded:
        if inputs.get("pixel_values_videos") is not None:
            raise UserError("videos are not supported in this family yet; images are")
        if Signal.PIXELS in needs:
            raise UserError("this family's inputs are patches, not images, so pixels cannot be looked at")
        out, recording, sizes = self.tower.run(inputs, [self.tower.depth - 1] if needs else [])
        signals = self.tower.signals(recording, sizes, needs)
        grids = self.tower.grids(inputs)
        ends = torch.tensor([grid.size for grid in grids]).cumsum(0).tolist()
        groups = []
        for grid, numbers in numbers_by_kind(grids).items():
            spans = [slice(ends[number] - grid.size, ends[number]) for number in numbers]

            def together(values: Tensor, spans: list[slice] = spans) -> Tensor:
                return torch.stack([values[span] for span in spans])

            own: dict[str, Any] = {name: together(values) for name, values in signals.items()}
            streams = tuple(map(together, getattr(out, "deepstack_features", None) or ()))
            groups.append(Views(VisualTokens(together(out.pooler_output), grid, **own), numbers, streams))
        return Encoded(groups)

    @property
    def tower(self) -> QwenTower:
        return QwenTower(self.model.model.visual)

    def layouts(self, inputs: Inputs) -> list[Layout]:
        return Layout.of_single_views(self.tower.grids(inputs))

    def view_pixels(self, inputs: Inputs) -> None:
        return None

    def downsample(self, inputs: Inputs, grids: Sequence[Grid]) -> InputDict:
        return self.tower.downsample(inputs, grids)

    def choose_images(self, inputs: Inputs, chosen: list[int]) -> InputDict:
        sizes = sizes_of(inputs)
        parts = inputs["pixel_values"].split(sizes.prod(-1).tolist())
        return {"pixel_values": torch.cat([parts[n] for n in chosen]), "image_grid_thw": sizes[chosen]}

    def feature_width(self, site: Site) -> int:
        return int(self.model.config.vision_config.out_hidden_size)

    @property
    def vision_encoder(self) -> nn.Module:
        encoder: nn.Module = self.model.model.visual  # it includes the projector
        return encoder

    @property
    def projector(self) -> nn.Module:
        merger: nn.Module = self.model.model.visual.merger
        return merger

    def original_positions(
        self, inputs: Inputs, mask: Int[Tensor, "batch length"]
    ) -> tuple[Int[Tensor, "3 batch length"], Int[Tensor, " batch"]]:
        """Return positions on three axes for the full grids, which VisionZip's authors slice in the same way."""
        ids = inputs["input_ids"]
        positions, deltas = self.model.model.get_rope_index(
            ids,
            mm_token_type_ids=(ids == self.placeholder_id).int(),
            image_grid_thw=inputs.get("image_grid_thw"),
            attention_mask=mask,
        )
        return positions, deltas[:, 0] + mask.sum(-1)

    @torch.no_grad()
    def encoder_attention(self, inputs: Inputs) -> EncoderAttention:
        """Return the attention received in every block.

        In most blocks of Qwen2.5-VL, patches attend only inside their windows, and the scores of each window have the
        same mean. In these blocks, scores show where attention concentrates inside windows, not between them.
        """
        layers = range(self.tower.depth)
        _, recording, sizes = self.tower.run(inputs, layers)
        scores = self.tower.scores(recording, sizes).split([grid.size for grid in self.tower.grids(inputs)], dim=1)
        return EncoderAttention(scores, [self.tower.whose(layer) for layer in layers], layers[-1])
