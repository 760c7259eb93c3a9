"""Image inputs for tiny models, in the forms that the models of transformers take."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

Inputs = dict[str, Any]
#: The side of an image in pixels, for encoders whose config has none.
SIDE = 24
#: A token id that begins, ends or separates parts of an image.
SEPARATOR = 120


def vision_config(model: PreTrainedModel) -> PreTrainedConfig:
    """Return the config that has the encoder's patch size."""
    config = first_of(model.config, "vision_config", "vq_config") or model.config
    return getattr(config, "sam_config", config)


def side_of(model: PreTrainedModel) -> int:
    """Return the side of an image in pixels."""
    side: int | list[int] = first_of(vision_config(model), "image_size", "resolution") or SIDE
    return side if isinstance(side, int) else side[0]


def pixels(model: PreTrainedModel, images: list[int]) -> Inputs:
    """Return images of one size: `pixel_values` [images, 3, side, side]."""
    side = side_of(model)
    return {"pixel_values": torch.stack([noise(number, 3, side, side) for number in images])}


def twice(model: PreTrainedModel, images: list[int]) -> Inputs:
    """Return images at two resolutions, the higher one as `pixel_values_aux`, as Mini-Gemini takes them."""
    side = 2 * side_of(model)
    aux = torch.stack([noise(1000 + number, 3, side, side) for number in images])
    return pixels(model, images) | {"pixel_values_aux": aux}


def sized(model: PreTrainedModel, images: list[int]) -> Inputs:
    """Return images of one size with `image_sizes`, as Pixtral takes them."""
    inputs = pixels(model, images)
    side = inputs["pixel_values"].shape[-1]
    return inputs | {"image_sizes": torch.tensor([[side, side]] * len(images))}


def masked(model: PreTrainedModel, images: list[int]) -> Inputs:
    """Return images as rows of one tile with a mask of pixels, as Idefics takes them."""
    values = pixels(model, images)["pixel_values"][None]
    return {"pixel_values": values, "pixel_attention_mask": torch.ones_like(values[:, :, 0], dtype=torch.bool)}


def patches(model: PreTrainedModel, images: list[int]) -> Inputs:
    """Return images of two sizes as rows of flattened patches with `image_grid_thw`, as Qwen2-VL takes them."""
    config = vision_config(model)
    together = first_of(config, "temporal_patch_size", "patch_temporal") or 1
    grids = grids_of(images, sizes=((6, 4), (4, 4)))
    return {
        "pixel_values": noise_of(images, grids, channels(config) * together * config.patch_size**2),
        "image_grid_thw": torch.tensor([(1, *grid) for grid in grids]),
    }


def square_patches(model: PreTrainedModel, images: list[int]) -> Inputs:
    """Return images as rows of patches [channels, side, side] with `image_grid_thw`."""
    inputs, config = patches(model, images), vision_config(model)
    shape = (channels(config), config.patch_size, config.patch_size)
    return inputs | {"pixel_values": inputs["pixel_values"].unflatten(-1, shape)}


def merging_patches(model: PreTrainedModel, images: list[int]) -> Inputs:
    """Return images as rows of patches with the number of patches per side that become one token."""
    return patches(model, images) | {"image_merge_sizes": torch.full((len(images),), 2)}


def patches_by_side(model: PreTrainedModel, images: list[int]) -> Inputs:
    """Return images as rows of flattened patches with `image_grid_hw`, as Nemotron takes them."""
    inputs = patches(model, images)
    return {"pixel_values": inputs["pixel_values"], "image_grid_hw": inputs["image_grid_thw"][:, 1:]}


def token_pixels(model: PreTrainedModel, images: list[int]) -> Inputs:
    """Return images as the pixels of each token, channels last, with the grid of tokens, as Inkling 2 takes them."""
    config = vision_config(model)
    grids, side = grids_of(images, sizes=((3, 2), (2, 2))), config.patch_size * config.spatial_merge_size
    return {
        "pixel_values": noise_of(images, grids, side, side, channels(config)),
        "image_grid_thw": torch.tensor([(1, *grid) for grid in grids]),
    }


def cubes(model: PreTrainedModel, images: list[int]) -> Inputs:
    """Return images as cubes of pixels, one for each token, without the sizes of the images, as Inkling takes them."""
    config = vision_config(model)
    shape = (config.temporal_patch_size, config.patch_size, config.patch_size, channels(config))
    return {"pixel_values": noise_of(images, grids_of(images, sizes=((3, 2), (2, 2))), *shape)}


def padded_shapes(model: PreTrainedModel, images: list[int]) -> Inputs:
    """Return images as flattened patches, padded to one number, with `spatial_shapes` and a mask, for SigLIP 2."""
    config, grids = vision_config(model), grids_of(images, sizes=((6, 4), (4, 4)))
    values = torch.zeros(len(images), 24, channels(config) * config.patch_size**2)
    mask = torch.zeros(values.shape[:2], dtype=torch.long)
    for row, (number, (rows, columns)) in enumerate(zip(images, grids, strict=True)):
        values[row, : rows * columns] = noise(number, rows * columns, values.shape[-1])
        mask[row, : rows * columns] = 1
    return {"pixel_values": values, "spatial_shapes": torch.tensor(grids), "pixel_attention_mask": mask}


def strip(model: PreTrainedModel, images: list[int]) -> Inputs:
    """Return images as one row of patches side by side with `target_sizes`, as MiniCPM-V takes them."""
    config, grids = vision_config(model), grids_of(images, sizes=((8, 4), (4, 4)))
    side = config.patch_size
    values = noise_of(images, grids, channels(config), side, side)
    return {
        "pixel_values": values.permute(1, 2, 0, 3).flatten(2)[None],
        "target_sizes": torch.tensor(grids, dtype=torch.int32),
    }


def tiled(model: PreTrainedModel, images: list[int]) -> Inputs:
    """Return images of two sizes as tiles with `image_sizes`, as LLaVA-NeXT takes them."""
    side, pinpoints = vision_config(model).image_size, model.config.image_grid_pinpoints
    sizes = [(2 * side - 4, 2 * side - 8) if number % 2 == 0 else (side - 4, 2 * side) for number in images]
    counts = [image_size_to_num_patches(size, pinpoints, side) for size in sizes]
    values = torch.zeros(len(images), max(counts), 3, side, side)
    for row, number, count in zip(values, images, counts, strict=True):
        row[:count] = noise(number, count, 3, side, side)
    return {"pixel_values": values, "image_sizes": torch.tensor(sizes)}


def with_question(model: PreTrainedModel, images: list[int]) -> Inputs:
    """Return images of one size with a question for each, which the Q-Former of InstructBLIP reads."""
    return pixels(model, images) | {"qformer_input_ids": torch.tensor([[101, 102, 103]] * len(images))}


def two_resolutions(model: PreTrainedModel, images: list[int]) -> Inputs:
    """Return images in two sizes, the larger as `high_res_pixel_values`, as DeepSeek-VL hybrid takes them."""
    side = model.config.high_res_vision_config.image_size
    large = torch.stack([noise(number + 50, 3, side, side) for number in images])
    return pixels(model, images) | {"high_res_pixel_values": large}


def flat_patches(model: PreTrainedModel, images: list[int]) -> Inputs:
    """Return images of one size as flattened patches: `pixel_values` [images, patches, values], as Fuyu takes them."""
    config = model.config
    patches = (config.image_size // config.patch_size) ** 2
    return {"pixel_values": torch.stack([noise(n, patches, 3 * config.patch_size**2) for n in images])}


def padded_patches(model: PreTrainedModel, images: list[int]) -> Inputs:
    """Return images of two sizes as padded rows of patches with `image_position_ids`, as Gemma 4 takes them.

    Models with an encoder pool 3 x 3 of its patches into a token. Others take larger patches, each a token.
    """
    config = vision_config(model)
    side = getattr(config, "model_patch_size", config.patch_size)
    pooled = config.pooling_kernel_size if side == config.patch_size else 1
    grids = [(3, 2) if number % 2 == 0 else (2, 2) for number in images]
    values = torch.zeros(len(images), 6 * pooled**2, 3 * side**2)
    positions = torch.full((len(images), 6 * pooled**2, 2), -1)
    for row, (number, (height, width)) in enumerate(zip(images, grids, strict=True)):
        y, x = torch.meshgrid(torch.arange(height * pooled), torch.arange(width * pooled), indexing="ij")
        values[row, : x.numel()] = noise(number, x.numel(), 3 * side**2).sigmoid()
        positions[row, : x.numel()] = torch.stack([x.flatten(), y.flatten()], dim=-1)
    return {"pixel_values": values, "image_position_ids": positions}


def masked_tiles(model: PreTrainedModel, images: list[int]) -> Inputs:
    """Return images as rows of one tile with a mask of tiles, as Granite Docling takes them."""
    values = pixels(model, images)["pixel_values"][:, None]
    return {"pixel_values": values, "pixel_attention_mask": torch.ones(len(images), 1, dtype=torch.bool)}


def with_local_views(model: PreTrainedModel, images: list[int]) -> Inputs:
    """Return images with smaller local views for every other image, as Step-3.7 and DeepSeek-OCR take them."""
    inputs = pixels(model, images)
    counts = [2 if number % 2 == 0 else 0 for number in images]
    if sum(counts):
        views = [
            noise(1000 + number, count, *inputs["pixel_values"].shape[1:])
            for number, count in zip(images, counts, strict=True)
        ]
        inputs["pixel_values_local"] = torch.cat(views)
    if "patches_grid" in parameters_of(model):
        inputs["patches_grid"] = [[2, 1] if count else [1, 1] for count in counts]
    return inputs | {"num_local_patches": counts}


def pooled_crops(model: PreTrainedModel, images: list[int]) -> Inputs:
    """Return images as two crops of flattened patches with the patches of each token, as Molmo 2 takes them."""
    config, side = vision_config(model), 6
    low, high = torch.arange(side * side).view(side, side), torch.arange(side * side).view(side, side) + side * side
    squares = [
        crop.unflatten(1, (-1, 2)).unflatten(0, (-1, 2)).transpose(1, 2).flatten(2).flatten(0, 1)
        for crop in (low, high)
    ]
    pooling = torch.cat(squares)
    return {
        "pixel_values": torch.cat([noise(number, 2, side * side, 3 * config.patch_size**2) for number in images]),
        "image_token_pooling": torch.cat([pooling + row * 2 * side * side for row in range(len(images))]),
        "image_grids": torch.tensor([[side // 2] * 4] * len(images)),
        "image_num_crops": torch.tensor([2] * len(images)),
    }


def in_rows(model: PreTrainedModel, inputs: Inputs, count: int) -> list[int]:
    """Return the placeholders of a square image in rows that each end with a separator."""
    side = math.isqrt(count)
    return ([model.config.image_token_id] * side + [SEPARATOR]) * side


def rows_with_breaks(model: PreTrainedModel, inputs: Inputs, count: int) -> list[int]:
    """Return the placeholders of an image as Pixtral's processor writes them: a token ends each row."""
    side = vision_config(model).patch_size * model.config.spatial_merge_size
    columns = int(inputs["image_sizes"][0][1]) // side
    return ([model.config.image_token_id] * columns + [SEPARATOR]) * (count // columns)


def between_marks(model: PreTrainedModel, inputs: Inputs, count: int) -> list[int]:
    """Return the placeholders of an image between the tokens by which Qwen's Omni models find images."""
    config = model.config
    return [config.vision_start_token_id, *[config.image_token_id] * count, config.vision_end_token_id]


def two_grids(model: PreTrainedModel, inputs: Inputs, count: int) -> list[int]:
    """Return the placeholders of an image as Molmo 2's processor writes them: a whole view, then the crops."""
    config, (low_rows, low_columns, rows, columns) = model.config, inputs["image_grids"][0].tolist()
    low = ([config.image_token_id] * low_columns + [SEPARATOR]) * low_rows
    high = ([config.image_token_id] * columns + [SEPARATOR]) * rows
    end = config.image_end_token_id
    return [config.low_res_image_start_token_id, *low, end, config.image_start_token_id, *high, end]


def indicated(model: PreTrainedModel, inputs: Inputs, count: int) -> list[int]:
    """Return the placeholders of an image between the visual indicators of Ovis 2, which have features, too."""
    start, grid, *_, end = model.config.visual_indicator_token_ids
    return [start, *[model.config.image_token_id] * count, grid, end]


def local_views_between_marks(model: PreTrainedModel, inputs: Inputs, count: int) -> list[int]:
    """Return the placeholders of an image as Step-3.7's processor writes them: local views, then the whole image."""
    views = inputs["num_local_patches"][0]
    view = [model.config.image_token_id] * (count // (views + 1))
    return [*(token for _ in range(views) for token in (120, *view, 121)), 122, *view, 123]


def first_of(config: object, *names: str) -> Any:
    """Return the first value that a config has by one of these names, or `None`."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def parameters_of(model: Any) -> Collection[str]:
    """Return the names of the parameters of `get_image_features`."""
    names = inspect.signature(model.get_image_features).parameters
    # Some heads pass everything on.
    return names if "args" not in names else inspect.signature(model.base_model.get_image_features).parameters


def form_of(model: nn.Module) -> Callable[[PreTrainedModel, list[int]], Inputs]:
    """Return the function of this module that fits the parameters of the model's `get_image_features`."""
    names = parameters_of(model)
    if "image_grid_thw" in names:
        return patches
    if "target_sizes" in names:
        return strip
    if "spatial_shapes" in names:
        return padded_shapes
    if hasattr(model.config, "image_grid_pinpoints"):
        return tiled
    if "pixel_attention_mask" in names:
        return masked
    if "num_local_patches" in names:
        return with_local_views
    return sized if "image_sizes" in names else pixels


def noise(number: int, *shape: int) -> torch.Tensor:
    """Return the pixels of an image. An image with the same number looks the same each time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(100 + number))


def noise_of(images: list[int], grids: list[tuple[int, int]], *shape: int) -> torch.Tensor:
    """Return the pixels of the patches of all images, one after another: [patches, *shape]."""
    return torch.cat([noise(n, rows * columns, *shape) for n, (rows, columns) in zip(images, grids, strict=True)])


def grids_of(images: list[int], sizes: tuple[tuple[int, int], tuple[int, int]]) -> list[tuple[int, int]]:
    """Return rows and columns of each image. Images with an even number have the first size."""
    return [sizes[number % 2] for number in images]


def channels(config: object) -> int:
    """Return the number of channels of an image."""
    return int(first_of(config, "in_channels", "in_chans", "num_channels") or 3)
