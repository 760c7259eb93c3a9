"""LLaVA-OneVision: LLaVA-NeXT with SigLIP, many tiles, packing that may shrink the tokens of tiles, and videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vlmzip.errors import UnfitMethod, UserError
from vlmzip.models.encoder_run import Batch, Run
from vlmzip.models.family import EncoderLayers, Family, no_layers
from vlmzip.models.layout import SEPARATOR, Encoded, Layout, Views, layout_of, numbers_by_kind
from vlmzip.models.llava import LlavaFrames
from vlmzip.models.llava_next import LlavaNext
from vlmzip.processor import InputDict, Inputs
from vlmzip.visual_tokens import Grid, Signal, Site, VisualTokens

#: The message for methods that compare tokens with the pixels below them.
NO_PIXELS = (
    "LLaVA-OneVision shrinks the visual tokens of an image, so that they do not lie on its pixels: choose a method that"
    " does not look at pixels"
)
#: A packing that never shrinks.
UNLIMITED = "anyres_max_1000000"


class LlavaOnevisionFrames(LlavaFrames):
    """The videos of LLaVA-OneVision, each followed by one newline.

    The model projects all tokens of a frame, and then shrinks the frame to half its sides by bilinear interpolation.
    Score and keys are interpolated with the features. Compressors "before" the projector get projected tokens.
    """

    projects_each_token = False
    features_as_list = False

    def features(self, batch: Batch, run: Run) -> Float[Tensor, "tokens dim"]:
        projected: Tensor = self.projector(super().features(batch, run))
        return projected

    def encode(
        self, inputs: Inputs, site: Site, needs: frozenset[Signal], encoder_layers: EncoderLayers = no_layers
    ) -> Encoded:
        encoded = super().encode(inputs, site, needs, encoder_layers)
        grid = self.layouts(inputs)[0].views[0]
        groups = [Views(self._shrunk(views.tokens, grid), views.numbers) for views in encoded.groups]
        return Encoded(groups, separator=self.model.base_model.image_newline)

    def _shrunk(self, frames: VisualTokens, grid: Grid) -> VisualTokens:
        if "pixels" in frames.signals:
            raise UnfitMethod(NO_PIXELS)
        changes = {}
        for name in ("features", *frames.signals):
            value: Tensor = getattr(frames, name)
            shrunk = self.model.base_model.apply_pooling(value if value.ndim == 3 else value[..., None])
            changes[name] = shrunk if value.ndim == 3 else shrunk[..., 0]
        return VisualTokens(grid=grid, **changes)

    def layouts(self, inputs: Inputs) -> list[Layout]:
        videos, frames = (pixels := inputs["pixel_values_videos"]).shape[:2]
        layout = Layout.of_frames(_half(self.view_grid(pixels)), frames)
        return [replace(layout, slots=torch.cat([layout.slots, torch.tensor([SEPARATOR])]))] * videos

    def downsample(self, inputs: Inputs, grids: Sequence[Grid]) -> InputDict:
        return Family.downsample(self, inputs, grids)  # refuses: the model shrinks frames of one size only


class LlavaOnevision(LlavaNext):
    """`LlavaOnevisionForConditionalGeneration`.

    The model projects all tokens first. If an image then has more tokens than `vision_aspect_ratio` allows, the model
    joins the tiles into one grid and shrinks it by bilinear interpolation. The views of such an image are the base
    image and the shrunk grid; score and keys are interpolated with the features. Compressors "before" the projector
    therefore get projected tokens. In a row of several images, images have no tiles.
    """

    model_types = ("llava_onevision",)
    example = "llava-hf/llava-onevision-qwen2-7b-ov-hf"
    sites = (Site.PRE_PROJECTOR, Site.POST_PROJECTOR, Site.IN_LLM)
    projects_each_token = False
    image_inputs = ("pixel_values", "image_sizes", "batch_num_images")
    video_inputs = LlavaOnevisionFrames.video_inputs
    video_family = LlavaOnevisionFrames

    def features(self, batch: Batch, run: Run) -> Float[Tensor, "tokens dim"]:
        views = super().features(batch, run).unflatten(0, (len(batch.grids), -1))
        projected: Tensor = self.projector(views[:, self.prefix :])
        return projected.flatten(0, 1)

    def encode(
        self, inputs: Inputs, site: Site, needs: frozenset[Signal], encoder_layers: EncoderLayers = no_layers
    ) -> Encoded:
        encoded, layouts = super().encode(inputs, site, needs, encoder_layers), self.layouts(inputs)
        counts = self.encoded_views(inputs)
        shrunk = [image for image, layout in enumerate(layouts) if len(layout.views) < counts[image]]
        if not shrunk:
            return encoded
        (views,) = encoded.groups  # those of the encoder, which have one grid
        rows, numbers = _ranges(counts), _ranges([len(layout.views) for layout in layouts])
        # The base of every image stays, and the tiles of those that are not shrunk.
        staying = [1 if image in shrunk else count for image, count in enumerate(counts)]
        stay = [(n, view) for n, count in enumerate(staying) for view in range(count)]
        rest = views.rows([rows[image][view] for image, view in stay]).tokens
        groups = [Views(rest, [numbers[image][view] for image, view in stay])]
        sizes = self._sizes(inputs)
        for size, images in numbers_by_kind(sizes[image] for image in shrunk).items():
            alike = [shrunk[index] for index in images]
            tokens = views.rows([row for image in alike for row in rows[image]]).tokens
            shrunk_tokens = self._shrunk(tokens, len(alike), size, layouts[alike[0]].views[1])
            groups.append(Views(shrunk_tokens, [numbers[image][1] for image in alike]))
        return replace(encoded, groups=groups)

    def _shrunk(self, views: VisualTokens, images: int, size: tuple[int, int], grid: Grid) -> VisualTokens:
        """Return the tokens of the tiles of several images of one size, each image's on one shrunk grid."""
        if "pixels" in views.signals:
            raise UnfitMethod(NO_PIXELS)
        base, changes = views.features.shape[1], {}
        for name in ("features", *views.signals):
            value: Tensor = getattr(views, name)
            # The model packs one image. Put the channels of all images side by side: [views, tokens, images, channels].
            side_by_side = value.reshape(images, len(value) // images, base, -1).permute(1, 2, 0, 3)
            packed = self._packed(size, side_by_side.flatten(2), newline=None)[base:]
            changes[name] = packed.unflatten(1, (images, -1)).transpose(0, 1).reshape(images, -1, *value.shape[2:])
        return VisualTokens(grid=grid, **changes)

    def layouts(self, inputs: Inputs) -> list[Layout]:
        kinds = list(zip(self._sizes(inputs), self._has_tiles(inputs), strict=True))
        layouts = {
            (size, has_tiles): self._layout(size) if has_tiles else self._layout_without_tiles(size)
            for size, has_tiles in dict.fromkeys(kinds)
        }
        return [layouts[kind] for kind in kinds]

    def _layout_without_tiles(self, size: tuple[int, int]) -> Layout:
        return layout_of((self.model_grid,), lambda numbers: self._pack(size, numbers))

    def _layout(self, size: tuple[int, int]) -> Layout:
        layout = super()._layout(size)
        views = torch.zeros(len(layout.views), self.model_grid.size, 1)
        packed = self._packed(size, views, newline=torch.tensor([float(SEPARATOR)]))[:, 0]
        if len(packed) == layout.placeholders:
            return layout
        is_token = packed >= 0
        slots = torch.where(is_token, is_token.cumsum(0) - 1, SEPARATOR)
        rows = int((~is_token).sum())
        shrunk = Grid(1, rows, (int(is_token.sum()) - self.model_grid.size) // rows)
        return Layout((self.model_grid, shrunk), slots)

    def encoded_views(self, inputs: Inputs) -> list[int]:
        both = zip(self._sizes(inputs), self._has_tiles(inputs), strict=True)
        return [1 + self._tiles(size)[1] if has_tiles else 1 for size, has_tiles in both]

    def _has_tiles(self, inputs: Inputs) -> list[bool]:
        images = len(self._sizes(inputs))
        counts = self._images_of_rows(inputs, images)
        return [True] * images if counts is None else [count == 1 for count in counts.tolist()]

    def _images_of_rows(self, inputs: Inputs, images: int) -> Int[Tensor, " images"] | None:
        """Return for each image the number of images in its row; `None` if each row has one."""
        if inputs.get("batch_num_images") is None:
            return None
        counts = torch.as_tensor(inputs["batch_num_images"])
        if int(counts.sum()) == images:  # one count for each row, as the processor gives them
            counts = counts.repeat_interleave(counts)
        if len(counts) != images:
            raise UserError(
                f"batch_num_images counts {int(counts.sum())} images, image_sizes has {images}: use the model's own"
                " processor"
            )
        return counts

    def choose_images(self, inputs: Inputs, chosen: list[int]) -> InputDict:
        counts = self._images_of_rows(inputs, len(self._sizes(inputs)))
        # With one count for each image, images without tiles remain without them where they are chosen alone.
        others = {name: value for name, value in inputs.items() if name != "batch_num_images"}
        return super().choose_images(others if counts is None else {**others, "batch_num_images": counts}, chosen)

    def _pack(self, size: tuple[int, int], numbers: Float[Tensor, "views tokens 1"]) -> Float[Tensor, "placeholders 1"]:
        return self._packed(size, numbers, newline=torch.tensor([float(SEPARATOR)]), limit=UNLIMITED)

    def _packed(
        self,
        size: tuple[int, int],
        views: Float[Tensor, "views tokens dim"],
        *,
        newline: Float[Tensor, " dim"] | None,
        limit: str | None = None,
    ) -> Float[Tensor, "placeholders dim"]:
        """Return the tokens of an image as the model packs them."""
        limit = limit or self.model.config.vision_aspect_ratio
        packed: list[Tensor]
        packed, _ = self.model.model.pack_image_features(
            [views], [list(size)], image_newline=newline, vision_aspect_ratio=limit
        )
        return packed[0]


def _half(grid: Grid) -> Grid:
    """Return the grid of a frame after the model has shrunk it: half the rows and columns, rounded up."""
    return Grid(1, -(-grid.rows // 2), -(-grid.cols // 2))


def _ranges(counts: Sequence[int]) -> list[range]:
    """Return the numbers of each image's views, counted through all images."""
    return [range(end - count, end) for count, end in zip(counts, accumulate(counts), strict=True)]
