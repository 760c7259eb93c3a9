"""`attach`: put a compressor on a model, and load the weights of the method."""

from __future__ import annotations

import os
import warnings

from torch import nn

from vlmzip import spec
from vlmzip.runtime.facade import CompressedModel
from vlmzip.runtime.resample import read_weights, resampling
from vlmzip.runtime.versions import warn_if_untested


def attach(
    model: nn.Module, compressor: spec.CompressorLike, *, weights: str | os.PathLike[str] | None = None
) -> CompressedModel:
    """Return a model that wraps `model` and answers with fewer visual tokens.

    In a `with` statement, the result is detached at the end of the block, even after an error.

    `model` itself still answers as before. You can use it next to the result, and attach other compressors to it with
    further calls. A compressor inside the LLM puts hooks on the LLM and its layers. They act only in calls of the
    result, and `detach` removes them.

    `compressor` may be text, as on the command line: `"visionzip(keep=64)"`, `"dfmr(tau=0.3)+fastv(layer=3)"`, or the
    path of a saved `compressor.json` or of its folder. A method at its default layers moves to later ones if the LLM
    cannot drop tokens there (deepstack); other layers that the LLM cannot use are an error.

    `weights` is a folder that `save_pretrained` wrote. A method with weights loads them from there. By default they
    come from the folder of a compressor given as a path; for any other compressor they are untrained.

    Raise `UserError` if vlmzip cannot compress the model, if the compressor has no place in it, or if weights are
    missing or do not fit.
    """
    if weights is None:
        weights = spec.folder_of(compressor)
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
