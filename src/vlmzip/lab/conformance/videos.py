"""Check whether a video works with one model, compressed and not."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlmzip.compressor import Compressor
from vlmzip.errors import ADD_A_FAMILY, UserError
from vlmzip.lab.conformance.images import (
    SEPARATOR,
    Inputs,
    channels,
    first_of,
    noise,
    side_of,
    square_patches,
    vision_config,
)
from vlmzip.lab.conformance.prompts import Prompts, count_of_tokens
from vlmzip.models import family_of
from vlmzip.runtime.attach import attach

#: The frames of a video, and the rows and columns of patches of each.
FRAMES, ROWS, COLUMNS = 2, 4, 4
#: The status of a model that takes no videos.
NO_VIDEO = "takes no video"


def check_video(model: PreTrainedModel, prompts: Prompts, methods: list[Compressor], tolerance: float) -> list[str]:
    """Return the status of a question about a video, and the reason if it does not work.

    It works if `no_compression` gives the plain model's logits, and all `methods` answer.
    """
    features: Callable[..., BaseModelOutputWithPooling] | None = getattr(model, "get_video_features", None) or getattr(
        model.base_model, "get_video_features", None
    )
    if features is None:
        return [NO_VIDEO, "it has no get_video_features"]
    if len(family_of(model).modalities) == 1:
        return [
            "refused",
            f"vlmzip cannot compress videos of {type(model).__name__} yet: give it images; {ADD_A_FAMILY}",
        ]
    try:
        inputs, plain = _asked(model, features, prompts)
    except Exception as error:  # any code of transformers can run here
        return ["plain model fails", f"{type(error).__name__}: {str(error).strip()[:200]}"]
    for method in methods:
        try:
            logits = _logits(model, inputs, method)
        except UserError as error:
            return ["refused", str(error)]
        except Exception as error:  # whatever a model raises belongs into the table
            return ["fails", f"{method.name()}: {type(error).__name__}: {str(error).strip()[:200]}"]
        if method.changes_nothing and float((logits - plain).abs().max()) > tolerance * float(plain.abs().max()):
            return ["fails", "without compression, logits differ from the plain model's"]
        if not logits.isfinite().all():
            return ["fails", f"{method.name()}: its logits are not finite"]
    return ["works", ""]


@torch.no_grad()
def _logits(model: nn.Module, inputs: Inputs, method: Compressor | None) -> Tensor:
    """Return the logits of the last token, with a method or of the plain model."""
    if method is None:
        plain: Tensor = model(**inputs).logits[:, -1].float()
        return plain
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with attach(model, method) as compressed:
            logits: Tensor = compressed(**inputs).logits[:, -1].float()
            return logits


def _asked(
    model: PreTrainedModel, features: Callable[..., BaseModelOutputWithPooling], prompts: Prompts
) -> tuple[Inputs, Tensor]:
    """Return inputs with a video that the plain model takes, and its logits."""
    pixels = _pixels(model, features, prompts)
    with torch.no_grad():
        count = count_of_tokens(features(**pixels, return_dict=True))
    # Some processors write marks around each frame, or the placeholders of images. A newline may follow a video.
    forms = []
    for token in (first_of(model.config, "video_token_id", "video_token_index"), model.config.image_token_id):
        frame = [SEPARATOR, *[token] * (count // FRAMES), SEPARATOR + 1]
        forms += [(token, frame * FRAMES), (token, [token] * count), (token, [token] * (count + 1))]
    errors: list[Exception] = []
    for token, form in forms:
        inputs = prompts.of_ids([[1, 105, *form, 106, 107]], token) | pixels
        try:
            return inputs, _logits(model, inputs, None)
        except Exception as error:  # the model wants another form
            errors.append(error)
    raise errors[0]


def _pixels(model: PreTrainedModel, features: Callable[..., BaseModelOutputWithPooling], prompts: Prompts) -> Inputs:
    """Return the encoder's inputs for a video: patches with their grid, or frames."""
    config, names = vision_config(model), set(inspect.signature(features).parameters)
    if inside := getattr(model.base_model, "get_video_features", None):
        names |= set(inspect.signature(inside).parameters)  # some heads pass arguments on without naming them
    if "video_grid_thw" not in names:
        side = side_of(model)
        return {"pixel_values_videos": noise(50, FRAMES, 3, side, side)[None]}
    together = first_of(config, "temporal_patch_size", "patch_temporal") or 1
    shape = (channels(config) * together, config.patch_size, config.patch_size)
    values = noise(50, FRAMES * ROWS * COLUMNS, *shape)
    whole = prompts.tiny.images is square_patches
    inputs = {"pixel_values_videos": values if whole else values.flatten(1)}
    inputs["video_grid_thw"] = torch.tensor([[FRAMES, ROWS, COLUMNS]])
    return inputs | ({"video_merge_sizes": torch.tensor([2])} if "video_merge_sizes" in names else {})
