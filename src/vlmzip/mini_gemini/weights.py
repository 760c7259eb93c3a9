"""The names of weights in checkpoints of Mini-Gemini's authors, of OpenCLIP and of timm, and their names here."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

#: State dicts: weights by name.
Weights = Mapping[str, Tensor]

#: The authors' modules beside LLM and encoders, and our modules.
MODULES = {
    "mm_projector.0.": "multi_modal_projector.linear_1.",
    "mm_projector.2.": "multi_modal_projector.linear_2.",
    "vlm_uni_query_projector.": "patch_miner.query_projector.",
    "vlm_uni_aux_projector.": "patch_miner.key_projector.",
    "vlm_uni_val_projector.": "patch_miner.value_projector.",
}
#: The encoders that the authors' checkpoints of tuned encoders have inside them.
TUNED_CLIP = "vision_tower.vision_tower."
TUNED_CONVNEXT = "vision_tower_aux.vision_"
#: Names in timm's ConvNeXt, and in transformers' parts of it.
CONVNEXT = (
    (r"^stem\.0\.", "embeddings.patch_embeddings."),
    (r"^stem\.1\.", "embeddings.layernorm."),
    (r"^stages\.(\d+)\.downsample\.", r"stages.\1.downsampling_layer."),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.", r"stages.\1.layers.\2."),
    (r"\.gamma$", ".layer_scale_parameter"),
    (r"\.conv_dw\.", ".dwconv."),
    (r"\.norm\.", ".layernorm."),
    (r"\.mlp\.fc1\.", ".pwconv1."),
    (r"\.mlp\.fc2\.", ".pwconv2."),
)


def module_weights(checkpoint: Weights, module: str) -> dict[str, Tensor]:
    """Return the weights of our module `patch_miner` or `multi_modal_projector` in a checkpoint of the authors."""
    return {
        ours.removeprefix(f"{module}.") + name.removeprefix(theirs): weight
        for full, weight in checkpoint.items()
        for name in [full.removeprefix("model.")]
        for theirs, ours in MODULES.items()
        if name.startswith(theirs) and ours.startswith(f"{module}.")
    }


def tuned_clip_weights(checkpoint: Weights) -> dict[str, Tensor]:
    """Return the weights of CLIP in a checkpoint of the authors, named as `CLIPVisionModel` saves them."""
    return _below(TUNED_CLIP, checkpoint)


def tuned_convnext_weights(checkpoint: Weights) -> dict[str, Tensor]:
    """Return the weights of the ConvNeXt in a checkpoint of the authors."""
    return convnext_weights(_below(TUNED_CONVNEXT, checkpoint))


def convnext_weights(checkpoint: Weights) -> dict[str, Tensor]:
    """Return the weights of the stem and the stages of a ConvNeXt by OpenCLIP or timm; those of its head are left."""
    trunk = {name.removeprefix("visual.trunk."): weight for name, weight in checkpoint.items()}
    return {_convnext_name(name): weight for name, weight in trunk.items() if is_convnext(name)}


def is_convnext(name: str) -> bool:
    """Return True for the name of a weight of a ConvNeXt's stem or stages, by OpenCLIP or timm."""
    return name.removeprefix("visual.trunk.").startswith(("stem.", "stages."))


def convnext_shape(weights: Weights) -> tuple[list[int], list[int]]:
    """Return the widths and depths of the stages of a ConvNeXt, from its weights."""
    blocks = [re.match(r"stages\.(\d+)\.layers\.(\d+)\.dwconv\.bias$", name) for name in weights]
    found = sorted((int(match[1]), int(match[2]), match[0]) for match in blocks if match)
    stages = sorted({stage for stage, _, _ in found})
    depths = [sum(stage == other for other, _, _ in found) for stage in stages]
    widths = [next(len(weights[name]) for other, _, name in found if other == stage) for stage in stages]
    return widths, depths


def _convnext_name(name: str) -> str:
    for pattern, replacement in CONVNEXT:
        name = re.sub(pattern, replacement, name)
    return name


def _below(prefix: str, checkpoint: Weights) -> dict[str, Tensor]:
    """Return the weights whose names begin with `prefix`, without it."""
    names = {name.removeprefix("model."): name for name in checkpoint}
    return {short.removeprefix(prefix): checkpoint[name] for short, name in names.items() if short.startswith(prefix)}
