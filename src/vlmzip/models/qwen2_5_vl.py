"""Qwen2.5-VL: grids of any size, windows in the encoder, a merger, and positions with three axes."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Bool
from torch import Tensor

from vlmzip.compressor import Positions
from vlmzip.errors import UserError
from vlmzip.models.encoder_run import Batch, of_views
from vlmzip.models.family import Family
from vlmzip.models.layout import Encoded, Views, numbers_by_kind
from vlmzip.models.pixels import SAME_SIZE_IN_VIDEO
from vlmzip.models.towers.qwen import arguments_of_part, downsampled_patches, pixels_of_tokens, sizes_of
from vlmzip.processor import InputDict, Inputs
from vlmzip.visual_tokens import Grid, Site, VisualTokens


class Qwen25VL(Family):
    """`Qwen2_5_VLForConditionalGeneration`.

    Compressors act after the merger, because each of its output tokens becomes one LLM token. The features are thus
    projected already, and `project` returns them unchanged. `QwenTower` describes score and keys.
    """

    model_types = ("qwen2_5_vl",)
    example = "Qwen/Qwen2.5-VL-7B-Instruct"
    sites = (Site.PIXELS, Site.PRE_PROJECTOR, Site.POST_PROJECTOR, Site.IN_LLM)
    encodes_parts = True
    projects_each_token = False
    image_inputs = ("pixel_values", "image_grid_thw")
    video_inputs: tuple[str, ...] = ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts")
    default_positions: Positions = "original"
    position_axes = (3,)

    def view_pixels(self, inputs: Inputs) -> None:
        return None

    def token_pixels(self, inputs: Inputs) -> Encoded:
        grids = self.grids(inputs)
        pixels = pixels_of_tokens(self.model.config.vision_config, inputs[self.image_inputs[0]])
        sizes = [grid.size for grid in grids]
        return Encoded([
            Views(VisualTokens(of_views(pixels, sizes, rows), grid), rows)
            for grid, rows in numbers_by_kind(grids).items()
        ])  # fmt: skip

    def encode_part(self, inputs: Inputs, kept: Bool[Tensor, " tokens"]) -> Encoded:
        patches, grids = self.image_inputs[:2]
        sizes, merge = sizes_of(inputs, patches, grids), self.patches_per_side
        parts = kept.split([size // merge**2 for size in sizes.prod(-1).tolist()])
        # The kept tokens of an image form one row, so that the model splits its output by image.
        rows = [Grid(1, 1, int(part.sum())) for part in parts]
        arguments = {
            **self.feature_arguments(inputs),
            patches: inputs[patches][kept.repeat_interleave(merge**2)],
            grids: sizes.new_tensor([(1, merge, row.cols * merge) for row in rows]),
            **arguments_of_part(self.vision_encoder, sizes, kept),
        }
        batch = Batch(arguments, rows, range(len(rows)))
        run = self.run(batch, ())
        features = self.features(batch, run)
        self._check_count(len(features), batch)
        counts = [row.cols for row in rows]
        views = zip(*(values.split(counts) for values in (features, *run.streams)), strict=True)
        return Encoded(
            [
                Views(VisualTokens(tokens[None], row), [number], tuple(stream[None] for stream in streams))
                for number, (row, (tokens, *streams)) in enumerate(zip(rows, views, strict=True))
            ],
            further=run.further,
        )

    def downsample(self, inputs: Inputs, grids: Sequence[Grid]) -> InputDict:
        views = iter(grids)
        frames = [[next(views) for _ in layout.views] for layout in self.layouts(inputs)]
        if any(len(set(of_video)) > 1 for of_video in frames):
            raise UserError(SAME_SIZE_IN_VIDEO)
        new_grids = [of_video[0]._replace(frames=len(of_video)) for of_video in frames]
        return downsampled_patches(self.model.config.vision_config, inputs, new_grids, self.image_inputs[:2])
