"""Compressors with weights: build the module that `attach` adds to a model, and save and load its weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlmzip.compressor import Compressor
from vlmzip.errors import UserError
from vlmzip.files import is_file, replace_whole
from vlmzip.models.family import Family
from vlmzip.resampler import Resampler

#: The file with a resampler's weights, next to `compressor.json`.
FILE = "resampler.safetensors"


def resampling(compressor: Compressor) -> Resampler | None:
    """Return the first stage of `compressor` if it is a resampler, which has weights; otherwise `None`."""
    first = compressor.stages()[0]
    return first if isinstance(first, Resampler) else None


def build_resampler(family: Family, compressor: Compressor) -> nn.Module | None:
    """Return the untrained module, in the model's dtype and on its device; `None` for methods without weights."""
    method = resampling(compressor)
    if method is None:
        return None
    module = method.build(family.feature_width(method.site), family.llm_config.hidden_size)
    # Take dtype and device from a weight that is neither quantised nor offloaded.
    like = next((p for p in family.model.parameters() if p.is_floating_point() and not p.is_meta), torch.empty(0))
    return module.to(like.device, like.dtype)


def write_weights(weights: Mapping[str, Tensor], folder: str | os.PathLike[str]) -> None:
    """Write `resampler.safetensors` to `folder`; a failed write leaves no partial file."""
    whole = {name: value.detach().contiguous().cpu() for name, value in weights.items()}
    replace_whole(Path(folder) / FILE, lambda name: save_file(whole, name))


def read_weights(resampler: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Load the weights in `folder` into `resampler`, in the dtype in which they were saved.

    Raise `UserError` if they are missing, unreadable, or do not fit the resampler.
    """
    path = Path(folder) / FILE
    if not is_file(path):
        raise UserError(f"there is no {FILE} in {str(folder)!r}; without it the resampler would be untrained")
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{str(path)!r} cannot be read: {error}") from None
    expected = resampler.state_dict()
    for name in sorted(expected.keys() | weights.keys()):
        shapes = [tuple(state[name].shape) if name in state else "none" for state in (weights, expected)]
        if shapes[0] != shapes[1]:
            raise UserError(f"{str(path)!r} does not fit compressor.json: {name} is {shapes[0]}, not {shapes[1]}")
    places = {name: weights[name].to(expected[name].device) for name in expected}
    resampler.load_state_dict(places, assign=True)
