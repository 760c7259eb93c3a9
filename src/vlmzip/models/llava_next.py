"""LLaVA-NeXT (LLaVA-1.6): a base image and tiles, packed with newlines and without the padding of the tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution

from vlmzip.compressor import MergesInEncoder, Profile
from vlmzip.errors import UserError
from vlmzip.models.family import EncoderLayers, no_layers
from vlmzip.models.layout import SEPARATOR, Encoded, Layout, MergeTarget, layout_of
from vlmzip.models.llava import Llava
from vlmzip.models.towers.vit import resized_views
from vlmzip.processor import InputDict, Inputs
from vlmzip.visual_tokens import Grid, Signal, Site

#: Number of views of a common image: the base and 2 x 2 tiles. The papers' budgets for this model refer to it.
COMMON_VIEWS = 5


class LlavaNext(Llava):
    """`LlavaNextForConditionalGeneration`. Each view is encoded and projected as LLaVA's single view is."""

    model_types = ("llava_next",)
    example = "llava-hf/llava-v1.6-vicuna-7b-hf"
    image_inputs: tuple[str, ...] = ("pixel_values", "image_sizes")

    def profile(self) -> Profile:
        return replace(plain := super().profile(), tiles=(plain.grid,) * (COMMON_VIEWS - 1))

    def encode(
        self, inputs: Inputs, site: Site, needs: frozenset[Signal], encoder_layers: EncoderLayers = no_layers
    ) -> Encoded:
        return replace(super().encode(inputs, site, needs, encoder_layers), separator=self.model.model.image_newline)

    def encode_merging(self, inputs: Inputs, method: MergesInEncoder, targets: Sequence[MergeTarget | None]) -> Encoded:
        return replace(super().encode_merging(inputs, method, targets), separator=self.model.model.image_newline)

    def layouts(self, inputs: Inputs) -> list[Layout]:
        if self.passes_prefix(inputs):
            raise UserError("LLaVA-NeXT cannot pack CLS: leave vision_feature_select_strategy at 'default'")
        sizes = self._sizes(inputs)
        layouts = {size: self._layout(size) for size in dict.fromkeys(sizes)}
        return [layouts[size] for size in sizes]

    def _sizes(self, inputs: Inputs) -> list[tuple[int, int]]:
        """Return the height and width of each image in pixels."""
        if inputs.get("image_sizes") is None:
            raise UserError("LLaVA-NeXT needs image_sizes, the height and width of each image: use its own processor")
        return [tuple(size) for size in torch.as_tensor(inputs["image_sizes"]).tolist()]

    def encoded_views(self, inputs: Inputs) -> list[int]:
        """Return the number of views of each image that go through the encoder."""
        return [len(layout.views) for layout in self.layouts(inputs)]

    def view_pixels(self, inputs: Inputs) -> list[Float[Tensor, "3 height width"]]:
        """Return the base image and the tiles of every image, without the empty tiles that pad some images."""
        return [view for image in self._images(inputs) for view in image]

    def _images(self, inputs: Inputs) -> list[list[Float[Tensor, "3 height width"]]]:
        """Return the views of each image. Raise `UserError` if `pixel_values` does not hold those of all images."""
        counts, pixels = self.encoded_views(inputs), inputs["pixel_values"]
        if isinstance(pixels, Tensor):  # not a list of views from `downsample`
            _check_pixels(pixels, counts)
            if pixels.ndim == 4:
                pixels = pixels.split(counts)
        return [list(image[:count]) for image, count in zip(pixels, counts, strict=True)]

    def choose_images(self, inputs: Inputs, chosen: list[int]) -> InputDict:
        images = self._images(inputs)
        if inputs["pixel_values"].ndim == 5:
            return super().choose_images(inputs, chosen)
        pixels = [view for number in chosen for view in images[number]]
        others = {name: torch.as_tensor(inputs[name])[chosen] for name in self.image_inputs[1:] if name in inputs}
        return {"pixel_values": torch.stack(pixels), **others}

    def downsample(self, inputs: Inputs, grids: Sequence[Grid]) -> InputDict:
        smaller = iter(resized_views(self.model.config.vision_config, self.view_pixels(inputs), grids))
        images = [[next(smaller) for _ in layout.views] for layout in self.layouts(inputs)]
        return {"pixel_values": images, "interpolate_pos_encoding": True}

    def _layout(self, size: tuple[int, int]) -> Layout:
        """Return the layout of an image of this height and width, found with the model's own packing."""
        resolution, tiles = self._tiles(size)
        views = (self.model_grid,) * (1 + tiles)
        return layout_of(views, partial(self._pack, size), self.prefix, partial(self._pack, resolution))

    @property
    def model_grid(self) -> Grid:
        """The grid of a view at the model's own resolution."""
        side = self.model.config.vision_config.image_size // self.model.config.vision_config.patch_size
        return Grid(1, side, side)

    def _tiles(self, size: tuple[int, int]) -> tuple[tuple[int, int], int]:
        """Return the height and width of the area that an image of this size is cut from, and its number of tiles."""
        side = self.model.config.vision_config.image_size
        height, width = select_best_resolution(size, self.model.config.image_grid_pinpoints)
        return (height, width), (height // side) * (width // side)

    def _pack(self, size: tuple[int, int], numbers: Float[Tensor, "views tokens 1"]) -> Float[Tensor, "placeholders 1"]:
        newline = torch.tensor([float(SEPARATOR)])
        packed = self.model.model.pack_image_features([numbers], [list(size)], "default", image_newline=newline)
        images: list[Tensor] = packed[0] if isinstance(packed, tuple) else packed  # some models return lengths, too
        return images[0]


def _check_pixels(pixels: Tensor, counts: Sequence[int]) -> None:
    """Raise `UserError` if `pixels` does not hold the views of every image. `counts` is the number of views of each."""
    if pixels.ndim == 4 and len(pixels) == sum(counts):
        return
    if pixels.ndim != 5 or len(pixels) != len(counts):
        raise UserError(
            "LLaVA-NeXT needs pixel_values of [images, views, 3, height, width], one entry for each of image_sizes,"
            f" or of [{sum(counts)}, 3, height, width], the views of all images; got {list(pixels.shape)}:"
            " use its own processor"
        )
    if (most := max(counts)) > pixels.shape[1]:
        raise UserError(f"image_sizes asks for {most} views of an image; pixel_values has {pixels.shape[1]}")
