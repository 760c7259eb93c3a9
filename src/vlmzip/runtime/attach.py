"""`attach`: a model with a compressor, which may be written as text and bring its own weights."""

from __future__ import annotations

import os
import warnings

from torch import nn

from vlmzip import spec
from vlmzip.compressor import Compressor
from vlmzip.runtime.facade import CompressedModel
from vlmzip.runtime.resample import read_weights, resampling
from vlmzip.runtime.versions import warn_if_untested


def attach(
    model: nn.Module, compressor: Compressor | str, *, weights: str | os.PathLike[str] | None = None
) -> CompressedModel:
    """Return the same model, answering with fewer visual tokens.

    Used in a `with` statement, the result is detached at the end of the block, also after an error.

    `model` answers as before: it can be used beside the result, and in several of them with different compressors. A
    compressor inside the LLM puts hooks on its layers, which act in calls of the result alone; `detach` takes them off.

    `compressor` may be written as on the command line: `"visionzip(keep=64)"`, `"dfmr(tau=0.3)+fastv(layer=3)"`, or the
    path of a saved `compressor.json` or of its folder. `weights` is a folder that `save_pretrained` wrote, from which a
    method with weights takes them; left out, it is the folder of a saved compressor, else the weights are untrained.

    Raise `UserError` for a model that vlmzip cannot compress, a compressor that has no place in it, or weights that are
    missing or do not fit.
    """
    if isinstance(compressor, str):
        if weights is None and spec.is_saved(compressor):
            weights = spec.saved_folder(compressor)
        compressor = spec.read(compressor)
    compressed = CompressedModel(model, compressor)
    warn_if_untested()
    if compressed.resampler is not None:
        if weights is None:
            _warn_if_untrained(compressed)
        else:
            read_weights(compressed.resampler, weights)
    return compressed


def _warn_if_untrained(compressed: CompressedModel) -> None:
    method = resampling(compressed.compressor)
    if method is not None and compressed.resampler is not None:
        count = sum(parameter.numel() for parameter in compressed.resampler.parameters())
        warnings.warn(
            f"{method.name()} is untrained: its {count:,} weights are random, and so are answers about images;"
            " train it first, or load a trained one with vlmzip.from_pretrained",
            stacklevel=3,
        )
