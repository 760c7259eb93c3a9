"""Fit a compressor to a model: read it, check its site, place its layers, and warn if it changes nothing there."""

from __future__ import annotations

import warnings

from vlmzip import spec
from vlmzip.compressor import Compressor
from vlmzip.errors import UnfitMethod, UserError, closest
from vlmzip.models.family import NO_PARTS, Family
from vlmzip.runtime.cache_names import cache_name
from vlmzip.runtime.other_methods import names_other_methods
from vlmzip.runtime.resample import resampling
from vlmzip.visual_tokens import Site

SLIDING = "this LLM has sliding-window layers, inside which tokens cannot be dropped yet; choose a site before the LLM"

#: Kinds of layers, in configs, before which tokens can be dropped. Attention alone has no state that runs over tokens.
ATTENTION = ("full_attention", "attention", "chunked_attention", "indexed_attention")


def inside_the_llm(compressor: Compressor) -> list[Compressor]:
    """Return the stages of `compressor` that act inside the LLM."""
    return [stage for stage in compressor.stages() if stage.site is Site.IN_LLM]


def before_the_llm(compressor: Compressor) -> list[Compressor]:
    """Return the stages of `compressor` that act before the LLM."""
    return [stage for stage in compressor.stages() if stage.site is not Site.IN_LLM]


@names_other_methods
def fitted(compressor: spec.CompressorLike, family: Family) -> Compressor:
    """Return the compressor as it acts in the model: default layers that the LLM cannot use move to layers that it can.

    Raise `UserError` if `compressor` is not a compressor, or if one of its stages cannot act in the model.
    """
    compressor = spec.as_compressor(compressor)
    for stage in compressor.stages():
        if stage.site not in family.sites:
            known = closest(stage.site, [site for site in family.sites if site in stage.sites] or family.sites)
            raise UnfitMethod(f"{type(family.model).__name__} cannot be compressed at site {stage.site.value!r}{known}")
        if stage.drops_patches and not family.encodes_parts:
            raise UnfitMethod(NO_PARTS.format(type(family.model).__name__))
    cache_name(family.model)
    if inside := inside_the_llm(compressor):
        for stage in inside:
            _check_inside(stage, family)
        compressor = compressor.placed(family.profile())
        for stage in inside_the_llm(compressor):
            stage.check_layers(len(family.decoder_layers), family.first_free_layer)
    return compressor


def _check_inside(compressor: Compressor, family: Family) -> None:
    """Raise `UserError` if a compressor cannot act inside this LLM at any layer."""
    if has_sliding_windows(family):
        raise UnfitMethod(SLIDING)
    kinds = dict.fromkeys(getattr(family.llm_config, "layer_types", None) or ())
    if others := [repr(kind) for kind in kinds if kind not in ATTENTION]:
        raise UnfitMethod(
            f"this LLM has layers of kind {' and '.join(others)}, whose results for a token depend on the number of"
            " tokens before it, so that none can be dropped inside; choose a site before the LLM"
        )
    if compressor.positions == "contiguous":
        raise UserError("inside the LLM tokens keep their positions: positions='contiguous' is not possible there")
    if not compressor.layers:
        raise UserError(f"{compressor.name()} inside the LLM needs a layer to act at")


def has_sliding_windows(family: Family) -> bool:
    """Return True if some layers of the LLM attend only to the most recent tokens."""
    kinds = getattr(family.llm_config, "layer_types", None)
    window = getattr(family.llm_config, "sliding_window", None)
    return any("sliding" in kind for kind in kinds) if kinds else bool(window)


def warn_if_nothing_to_do(compressor: Compressor, family: Family) -> None:
    """Warn if a method keeps all tokens of a common image, unless it is a resampler or is meant to change nothing."""
    if compressor.changes_nothing or resampling(compressor) is not None:
        return
    if len(family.modalities) > 1 and any(stage.sees_clip for stage in compressor.stages()):
        return  # methods for videos keep all of an image
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
