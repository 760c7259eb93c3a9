"""LLaVA-NeXT (LLaVA-1.6): a base image and tiles, packed with newlines and without the padding of the tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution

from vlmzip.compressor import Profile
from vlmzip.errors import UserError
from vlmzip.models.layout import SEPARATOR, Encoded, Layout, layout_of
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
    image_inputs = ("pixel_values", "image_sizes")

    def profile(self) -> Profile:
        return replace(plain := super().profile(), tiles=(plain.grid,) * (COMMON_VIEWS - 1))

    def encode(self, inputs: Inputs, site: Site, needs: frozenset[Signal]) -> Encoded:
        return replace(super().encode(inputs, site, needs), separator=self.model.model.image_newline)

    def layouts(self, inputs: Inputs) -> list[Layout]:
        if self.passes_prefix(inputs):
            raise UserError("LLaVA-NeXT cannot pack CLS: leave vision_feature_select_strategy at 'default'")
        if inputs.get("image_sizes") is None:
            raise UserError("LLaVA-NeXT needs image_sizes, the height and width of each image: use its own processor")
        sizes = [tuple(size) for size in torch.as_tensor(inputs["image_sizes"]).tolist()]
        layouts = {size: self._layout(size) for size in dict.fromkeys(sizes)}
        return [layouts[size] for size in sizes]

    def view_pixels(self, inputs: Inputs) -> list[Float[Tensor, "3 height width"]]:
        """Return the base image and the tiles of every image, without the empty tiles that pad some images."""
        return [view for image in self._images(inputs) for view in image]

    def _images(self, inputs: Inputs) -> list[list[Float[Tensor, "3 height width"]]]:
        """Return the views of each image. Raise `UserError` if `pixel_values` does not hold those of all images."""
        counts, pixels = [len(layout.views) for layout in self.layouts(inputs)], inputs["pixel_values"]
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
        return {"pixel_values": torch.stack(pixels), "image_sizes": inputs["image_sizes"][chosen]}

    def downsample(self, inputs: Inputs, grids: Sequence[Grid]) -> InputDict:
        smaller = iter(resized_views(self.model.config.vision_config, self.view_pixels(inputs), grids))
        images = [[next(smaller) for _ in layout.views] for layout in self.layouts(inputs)]
        return {"pixel_values": images, "interpolate_pos_encoding": True}

    def _layout(self, size: tuple[int, int]) -> Layout:
        """Return the layout of an image of this height and width, found with the model's own packing."""
        vision = self.model.config.vision_config
        height, width = select_best_resolution(size, self.model.config.image_grid_pinpoints)
        side = vision.image_size // vision.patch_size
        views = (Grid(1, side, side),) * (1 + (height // vision.image_size) * (width // vision.image_size))
        return layout_of(views, partial(self._pack, size), self.prefix, partial(self._pack, (height, width)))

    def _pack(self, size: tuple[int, int], numbers: Float[Tensor, "views tokens 1"]) -> Float[Tensor, "placeholders 1"]:
        newline = torch.tensor([float(SEPARATOR)])
        packed: list[Tensor]
        packed, _ = self.model.model.pack_image_features([numbers], [list(size)], "default", image_newline=newline)
        return packed[0]


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
