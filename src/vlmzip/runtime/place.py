"""Checks that a compressor fits a model, and a warning if it changes nothing there."""

from __future__ import annotations

import warnings

from vlmzip.compressor import Compressor
from vlmzip.errors import UserError, closest
from vlmzip.models.family import Family
from vlmzip.runtime.cache import cache_name
from vlmzip.runtime.resample import resampling
from vlmzip.visual_tokens import Site

SLIDING = "this LLM has sliding-window layers, inside which tokens cannot be dropped yet; choose a site before the LLM"


def inside_the_llm(compressor: Compressor) -> list[Compressor]:
    """Return the stages of `compressor` that act inside the LLM."""
    return [stage for stage in compressor.stages() if stage.site is Site.IN_LLM]


def check_place(compressor: Compressor, family: Family) -> None:
    """Raise `UserError` if `compressor` is not a compressor, or if one of its stages cannot act in the model."""
    if not isinstance(compressor, Compressor):
        raise UserError(f"{compressor!r} is no compressor; try vlmzip.VisionZip(keep=64)")
    for stage in compressor.stages():
        if stage.site not in family.sites:
            known = closest(stage.site, family.sites)
            raise UserError(f"{type(family.model).__name__} has no site {stage.site.value!r}{known}")
    cache_name(family.model)
    for stage in inside_the_llm(compressor):
        _check_place_inside(stage, family)


def _check_place_inside(compressor: Compressor, family: Family) -> None:
    """Raise `UserError` if a compressor cannot act inside this LLM."""
    if has_sliding_windows(family):
        raise UserError(SLIDING)
    if compressor.positions == "contiguous":
        raise UserError("inside the LLM tokens keep their positions: positions='contiguous' is not possible there")
    if not compressor.layers:
        raise UserError(f"{compressor.name()} inside the LLM needs a layer to act at")
    compressor.check_layers(len(family.decoder_layers), family.first_free_layer)


def has_sliding_windows(family: Family) -> bool:
    """Return True if some layers of the LLM attend only to the most recent tokens."""
    kinds = getattr(family.llm_config, "layer_types", None)
    window = getattr(family.llm_config, "sliding_window", None)
    return "sliding_attention" in kinds if kinds else bool(window)


def warn_if_nothing_to_do(compressor: Compressor, family: Family) -> None:
    """Warn if a method keeps all tokens of a common image, unless it is a resampler or is meant to change nothing."""
    if compressor.changes_nothing or resampling(compressor) is not None:
        return
    profile = family.profile()
    try:
        counts = compressor.tokens_by_layer(profile)
    except UserError:  # too few tokens for the views of a common image; a real image can have fewer views
        return
    if counts is not None and min(counts) >= profile.size:
        warnings.warn(
            f"{compressor.name()} keeps all of an image's {profile.size} visual tokens: it changes nothing",
            stacklevel=5,
        )
