"""The parts of a model, found by the names and the configs that transformers uses."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from vlmzip.models.confirm import evaluating, maps_each_token
from vlmzip.models.recording import Recording

#: Names of projectors in transformers' models.
PROJECTORS = (
    "multi_modal_projector", "connector", "aligner", "projector", "embed_vision", "language_projection",
    "vision_projection", "merger",
)  # fmt: skip
#: Names in configs of the number of patches per side that become one token. Some give the ratio of the sides, below 1.
MERGES = (
    "spatial_merge_size", "merge_size", "merge_kernel_size", "scale_factor", "downsample_factor", "downsample_ratio",
    "pixel_shuffle_factor",
)  # fmt: skip
#: Names in models that pack the views of an image with separators.
PACKING = ("pack_image_features", "image_newline", "view_separator")
#: The number of tokens with which a projector is tried.
PROBED = 16


def without_adapters(model: nn.Module) -> Any:
    """Return the model inside adapters such as LoRA's, which wrap it. The modules inside are those that run."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def method_of(model: nn.Module, name: str) -> Any:
    """Return a method of the model or of the model inside it without the head, or `None` if both lack it."""
    return getattr(model, name, None) or getattr(model.base_model, name, None)


def missing_in(model: nn.Module) -> str | None:
    """Return what a model lacks for the default family, in a few words, or `None` if it has everything."""
    inner = without_adapters(model)
    if getattr(inner, "config", None) is None or not method_of(inner, "get_image_features"):
        return "get_image_features"
    if "mm_encoder_outputs" not in inspect.signature(inner.forward).parameters:
        return "mm_encoder_outputs among the arguments of forward"
    if (
        "generate" in vars(type(inner))
        and not {"cache", "past_key_values"} & inspect.signature(inner.forward).parameters.keys()
    ):
        return "KV cache among the arguments of forward, because its own generate runs the LLM alone"
    if not isinstance(getattr(inner.config, "image_token_id", None), int):
        return "image_token_id in its config"
    if with_layers(inner.get_decoder()) is None:
        return "LLM with layers that get_decoder returns"
    if any(hasattr(owner, name) for owner in (inner, inner.base_model) for name in PACKING):
        return "family file, and it packs several views of an image in its own way"
    return None


def has_known_videos(model: PreTrainedModel) -> bool:
    """Return True if videos become tokens as in Qwen's models: patches with a grid, and placeholders for videos."""
    features, ids = method_of(model, "get_video_features"), model.config
    if features is None or not isinstance(getattr(ids, "video_token_id", None), int):
        return False
    names = [p.name for p in inspect.signature(features).parameters.values() if p.kind is not p.VAR_KEYWORD]
    return names == ["pixel_values_videos", "video_grid_thw"] and ids.video_token_id != ids.image_token_id


def feature_arguments(model: nn.Module, modality: str) -> tuple[str, ...]:
    """Return the names of the parameters of `get_image_features` or `get_video_features`."""
    name = f"get_{modality}_features"
    # Some heads pass arguments on to the model inside without naming them.
    methods = (method_of(model, name), getattr(model.base_model, name, None))
    parameters = [p for method in methods if method for p in inspect.signature(method).parameters.values()]
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return tuple(dict.fromkeys(p.name for p in parameters if p.kind not in variable))


def axes_of_positions(rope_index: Callable[..., tuple[Tensor, Tensor]]) -> tuple[int, ...]:
    """Return the axes of the positions that a model's `get_rope_index` gives for a prompt of one token."""
    token = torch.zeros(1, 1, dtype=torch.long)
    try:
        positions, _ = rope_index(input_ids=token, mm_token_type_ids=token, attention_mask=token + 1)
    except TypeError:  # it has other parameters
        return (3,)
    return tuple(positions.shape[:-2])


def with_layers(module: nn.Module) -> nn.Module | None:
    """Return the outermost module that has a list of layers, `module` itself or one inside it, or `None`."""
    return next(
        (inner for inner in module.modules() if isinstance(getattr(inner, "layers", None), nn.ModuleList)), None
    )


def projector_of(owners: Sequence[nn.Module]) -> nn.Module | None:
    """Return the projector, by its name, in the first of these modules that has one, or `None`."""
    for owner in owners:
        for name in PROJECTORS:
            if isinstance(projector := getattr(owner, name, None), nn.Module):
                return projector
    return None


def width_before(projector: nn.Module) -> int | None:
    """Return the width of a projector's input, found by trying it; `None` if it does not map each token by itself."""
    weights = next(projector.parameters(), None)
    if weights is None:
        return None
    features = torch.randn(1, PROBED, weights.shape[-1]).to(weights)
    recording = Recording(inputs={"projector": features})
    try:
        with torch.no_grad(), evaluating(projector):
            recording.outputs["projector"] = output = projector(features)
    except Exception:  # the projector takes whole images or further arguments
        return None
    is_each = isinstance(output, Tensor) and maps_each_token(projector, recording, output.flatten(0, -2))
    return int(weights.shape[-1]) if is_each else None


def merge_in(configs: Sequence[PreTrainedConfig]) -> int:
    """Return the number of patches per side that become one token, by the first config that names it; else 1."""
    factor = next((v for name in MERGES for config in configs if (v := getattr(config, name, None))), 1)
    factor = factor[0] if isinstance(factor, Sequence) else factor
    return round(factor if factor >= 1 else 1 / factor)


def side_in(size: int | Sequence[int]) -> int:
    """Return the height of a size that a config gives as one number, or as height and width."""
    return size if isinstance(size, int) else int(size[0])
