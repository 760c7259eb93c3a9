"""CLIP and SigLIP vision encoders: the features of some layers and the signals of the deepest of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.utils.constants import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from vlmzip.errors import UserError
from vlmzip.models.family import EncoderAttention
from vlmzip.models.layout import Pixels, numbers_by_kind
from vlmzip.models.pixels import resized
from vlmzip.models.recording import Recording, attention_received, cls_attention_row, mean_over_heads, record
from vlmzip.processor import InputDict
from vlmzip.visual_tokens import Grid, Signal

#: Supported encoders, and the number of tokens that each puts before the patches.
PREFIX = {"clip_vision_model": 1, "siglip_vision_model": 0}

#: Mean and standard deviation of each color channel that the processors of published checkpoints normalise with.
NORMALISED_BY = {
    "clip_vision_model": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    "siglip_vision_model": (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD),
}


def prefix_of(vision_config: Any) -> int:
    """Return the number of tokens before the patches: 1 for CLIP's CLS. Raise `UserError` for unsupported encoders."""
    if vision_config.model_type not in PREFIX:
        known = " and ".join(PREFIX)
        raise UserError(f"vision encoders of type {vision_config.model_type} are not supported yet; {known} are")
    return PREFIX[vision_config.model_type]


def grid_of(vision_config: Any, pixels: Float[Tensor, "*batch 3 height width"]) -> Grid:
    """Return the grid of patches that all images of a batch have."""
    return Grid(1, pixels.shape[-2] // vision_config.patch_size, pixels.shape[-1] // vision_config.patch_size)


def views_of_equal_size(
    views: Pixels,
) -> list[tuple[Float[Tensor, "views 3 height width"], Sequence[int]]]:
    """Return one batch of pixels for each size of view, with the numbers of its views."""
    if isinstance(views, Tensor):
        return [(views, range(len(views)))]
    groups = numbers_by_kind(view.shape for view in views).values()
    return [(torch.stack([views[number] for number in numbers]), numbers) for numbers in groups]


def resized_views(vision_config: Any, views: Pixels, grids: Sequence[Grid]) -> list[Float[Tensor, "3 _ _"]]:
    """Return the pixels of views, resized to fit `grids`. Views with the right grid stay unchanged."""
    patch = vision_config.patch_size
    return [
        view if grid == grid_of(vision_config, view) else resized(view[None], grid.rows * patch, grid.cols * patch)[0]
        for view, grid in zip(views, grids, strict=True)
    ]


def downsampled(vision_config: Any, pixels: Float[Tensor, "batch 3 height width"], grid: Grid) -> InputDict:
    """Return image inputs resized to one grid, for which the encoder interpolates its position embeddings.

    Return the pixels unchanged if they have this grid already.
    """
    patch = vision_config.patch_size
    if grid == grid_of(vision_config, pixels):  # resizing would squeeze in pixels beyond the last patch
        return {"pixel_values": pixels}
    return {"pixel_values": resized(pixels, grid.rows * patch, grid.cols * patch), "interpolate_pos_encoding": True}


def feature_layers(wanted: int | list[int], depth: int) -> list[int]:
    """Return the 0-based encoder layers whose outputs are `hidden_states[i]` for each i in `wanted`.

    Raise `UserError` for `hidden_states[0]`, the patch embeddings before all layers.
    """
    layers = [index % (depth + 1) - 1 for index in hidden_states(wanted, depth)]
    if min(layers) < 0:
        raise UserError("vision_feature_layer points at the patch embeddings, where nothing has been attended to")
    return layers


def hidden_states(wanted: Any, depth: int) -> list[int]:
    """Return `vision_feature_layer` as a list. Raise `UserError` for layers that an encoder of `depth` layers lacks."""
    indices = list(wanted) if isinstance(wanted, list | tuple) else [wanted]
    if not indices or any(type(index) is not int or not -depth - 1 <= index <= depth for index in indices):
        raise UserError(
            f"vision_feature_layer={wanted!r}: the encoder has {depth} layers; give one of {-depth} to {depth},"
            " or a list of them"
        )
    return indices


def run_vit(
    tower: Any,
    pixels: Float[Tensor, "batch 3 height width"],
    layers: list[int],
    needs: frozenset[Signal],
    *,
    interpolate_pos_encoding: bool = False,
) -> tuple[Float[Tensor, "batch tokens dim"], dict[str, Any], Any]:
    """Return the concatenated features of the layers, the signals of the deepest layer, and the encoder's own output.

    Set `interpolate_pos_encoding` for images of another size than the encoder's own. A frozen encoder keeps no
    activations for a backward pass. This also holds under gradient checkpointing, for which transformers makes the
    embeddings of every model require gradients.
    """
    learns = pixels.requires_grad or any(parameter.requires_grad for parameter in tower.parameters())
    blocks = tower.encoder.layers
    modules: dict[str, nn.Module] = {f"features.{layer}": blocks[layer] for layer in layers}
    if needs & {Signal.CLS_ATTENTION, Signal.KEYS}:
        attention = blocks[max(layers)].self_attn
        modules |= {"query": attention.q_proj, "key": attention.k_proj}
    with record(modules) as recording, torch.set_grad_enabled(learns and torch.is_grad_enabled()):
        out = tower(pixel_values=pixels, interpolate_pos_encoding=interpolate_pos_encoding, return_dict=True)
    features = torch.cat([recording[f"features.{layer}"] for layer in layers], dim=-1)
    signals = _signals(recording, tower.config, needs)
    if Signal.PIXELS in needs:
        signals["pixels"] = image_of(tower.config, pixels)
    return features, signals, out


def image_of(
    vision_config: Any, pixels: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, "batch 3 rows_px cols_px"]:
    """Return the area of the images that patches cover, in [0, 1] and float32, without the processor's normalisation.

    A model does not know its processor. We assume the values of published checkpoints: CLIP's mean and standard
    deviation for CLIP encoders, 0.5 for SigLIP. If a processor uses other values (mini has a CLIP encoder and
    normalises by 0.5), brightness and contrast are on another scale, the same for all images of the model.
    """
    mean, deviation = (
        torch.tensor(v, device=pixels.device)[:, None, None] for v in NORMALISED_BY[vision_config.model_type]
    )
    patch, (_, rows, cols) = vision_config.patch_size, grid_of(vision_config, pixels)
    return (pixels.float() * deviation + mean).clamp(0, 1)[..., : rows * patch, : cols * patch]


@torch.no_grad()
def _signals(recording: Recording, vision_config: Any, needs: frozenset[Signal]) -> dict[str, Any]:
    signals: dict[str, Any] = {}
    if Signal.CLS_ATTENTION in needs:
        signals["cls_attention"] = _score(recording["query"], recording["key"], vision_config)
    if Signal.KEYS in needs:
        signals["keys"] = mean_over_heads(recording["key"], vision_config.num_attention_heads)
    return signals


def _score(
    query: Float[Tensor, "batch tokens dim"], key: Float[Tensor, "batch tokens dim"], vision_config: Any
) -> Float[Tensor, "batch tokens"]:
    """Return the scores by which VisionZip ranks tokens: attention from CLS, or without CLS attention received."""
    heads = vision_config.num_attention_heads
    scale = (vision_config.hidden_size // heads) ** -0.5
    rule = cls_attention_row if prefix_of(vision_config) else attention_received
    return rule(query, key, heads, scale)


@torch.no_grad()
def encoder_attention(
    tower: Any, pixels: Float[Tensor, "batch 3 height width"], scored: int, *, interpolate_pos_encoding: bool = False
) -> EncoderAttention:
    """Return the scores by which VisionZip ranks patches, in every layer. `scored` is the layer that VisionZip uses.

    Queries and keys of all layers are in memory at once, which takes as much as two hidden states per layer.
    """
    modules: dict[str, nn.Module] = {}
    for layer, block in enumerate(tower.encoder.layers):
        modules |= {f"query.{layer}": block.self_attn.q_proj, f"key.{layer}": block.self_attn.k_proj}
    with record(modules) as recording:
        tower(pixel_values=pixels, interpolate_pos_encoding=interpolate_pos_encoding)
    depth, prefix = len(tower.encoder.layers), prefix_of(tower.config)
    scores = [_score(recording[f"query.{layer}"], recording[f"key.{layer}"], tower.config) for layer in range(depth)]
    whose = "CLS" if prefix else "all tokens"
    return EncoderAttention(list(torch.stack(scores, dim=1)[..., prefix:]), [whose] * depth, scored)
