"""Compressors with weights: the module that `attach` makes for a model, and what it does to its images."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlmzip.compressor import Compressor
from vlmzip.errors import UserError
from vlmzip.files import is_file, replace_whole
from vlmzip.models.adapter import ModelAdapter
from vlmzip.resampler import Resampler
from vlmzip.runtime.report import CompressedImage, ImageReport, Stopwatch

#: The weights of a resampler, beside `compressor.json`.
FILE = "resampler.safetensors"


def resampling(compressor: Compressor) -> Resampler | None:
    """The compressor that has weights: itself, or the one that a chain begins with."""
    first = compressor.stages()[0]
    return first if isinstance(first, Resampler) else None


def build_resampler(adapter: ModelAdapter, compressor: Compressor) -> nn.Module | None:
    """The untrained module, in the model's precision and where the model is; `None` for methods without weights."""
    method = resampling(compressor)
    if method is None:
        return None
    module = method.build(adapter.feature_width(method.site), adapter.llm_config.hidden_size)
    # Quantised weights have no precision to follow, offloaded ones no place.
    like = next((p for p in adapter.model.parameters() if p.is_floating_point() and not p.is_meta), torch.empty(0))
    return module.to(like.device, like.dtype)


def resample_images(
    adapter: ModelAdapter,
    inputs: Mapping[str, Any],
    compressor: Resampler,
    resampler: nn.Module | None,
    watch: Stopwatch,
) -> list[CompressedImage]:
    """Encodes and resamples; the model's projector is not asked."""
    if resampler is None:
        raise UserError(f"{compressor.name()} has weights: use what vlmzip.attach returns, which holds them")
    with watch.time("encoder"):
        groups = adapter.encode(inputs, compressor.site, compressor.needs)
    found: dict[int, CompressedImage] = {}
    for tokens, indices in groups:
        with watch.time("selection"):
            resampled = resampler(tokens.features)
        before, after = tokens.plain_count, resampled.shape[1]
        # Spread over the placeholders, so that "where did this come from" has an answer; positions do not use it.
        offsets = [n * before // after for n in range(after)]
        report = ImageReport(
            row=-1,
            before=before,
            after=after,
            by_layer=(after,) * len(adapter.decoder_layers),
            token_map=None,
            grid=tokens.grid,
            prefix=tokens.prefix,
            features=None,
        )
        found |= {index: CompressedImage(resampled[place], offsets, report) for place, index in enumerate(indices)}
    return [found[index] for index in sorted(found)]


def write_weights(weights: Mapping[str, Tensor], folder: str | os.PathLike[str]) -> None:
    """Writes `resampler.safetensors` whole or not at all."""
    whole = {name: value.detach().contiguous().cpu() for name, value in weights.items()}
    replace_whole(Path(folder) / FILE, lambda name: save_file(whole, name))


def read_weights(resampler: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Fills `resampler` with the weights saved in `folder`, in the precision in which they were saved.

    Raises `UserError` where they are missing, unreadable, or another resampler's.
    """
    path = Path(folder) / FILE
    if not is_file(path):
        raise UserError(f"there is no {FILE} in {str(folder)!r}; without it the resampler would be untrained")
    try:
        found = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{str(path)!r} cannot be read: {error}") from None
    expected = resampler.state_dict()
    for name in sorted(expected.keys() | found.keys()):
        shapes = [tuple(state[name].shape) if name in state else "none" for state in (found, expected)]
        if shapes[0] != shapes[1]:
            raise UserError(f"{str(path)!r} does not fit compressor.json: {name} is {shapes[0]}, not {shapes[1]}")
    places = {name: found[name].to(expected[name].device) for name in expected}
    resampler.load_state_dict(places, assign=True)
