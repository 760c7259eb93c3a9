"""A compressor as a setting of the engine or of a request: its text form, and the check that the engine can run it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from jaxtyping import UInt8
from torch import Tensor
from transformers import PreTrainedConfig

from vlmzip import catalogue, spec
from vlmzip.compressor import Compressor, Profile
from vlmzip.errors import UserError
from vlmzip.models.layout import Layout
from vlmzip.resampler import Resampler
from vlmzip.runtime.compress import least_counts
from vlmzip.serving.request_fields import refuse_fields
from vlmzip.sites import Cost, Signal, Site
from vlmzip.visual_tokens import VisualTokens

#: The key of the setting in `--hf-overrides`, in `mm_processor_kwargs` and among the inputs of the model.
KEY = "vlmzip"
#: The key of vlmzip's version, which is part of the keys of vLLM's caches: some outlive a process.
VERSION_KEY = f"{KEY}_version"
#: The longest spec that a request may give.
LONGEST = 1000
#: The costs of methods that are slow for large images. Others grow with N² at most, as the attention of encoders does.
SLOW: frozenset[Cost] = frozenset({"N·k²", "k·N²", "N³"})
#: Sites that vLLM has. At each other site: the reason why it has none, and what to use.
SITES = (Site.PRE_PROJECTOR, Site.POST_PROJECTOR)
ELSEWHERE = {
    Site.PIXELS: "vLLM's vision encoders take images of one size",
    Site.ENCODER: "vLLM's vision encoders cannot merge tokens between their layers",
    Site.IN_LLM: "all layers of vLLM's LLM share one table of KV cache blocks, so no layer can drop tokens",
}
ELSEWHERE_OF_PATCHES = {
    **ELSEWHERE,
    Site.PIXELS: "vLLM's own processor makes images smaller, with max_pixels in mm_processor_kwargs",
}
USE = "use a method before the LLM, such as visionzip, divprune, kmeans or pool2d"
#: Signals of the last encoder layer.
OF_LAST_LAYER = frozenset({Signal.LAST_CLS_ATTENTION, Signal.LAST_KEYS})
#: Signals of images with a common size and a projector behind the encoder, and the reason why others lack them.
OF_IMAGES = {
    Signal.PIXELS: "the inputs of this model are patches, not images",
    Signal.PROJECTOR: "the projector of this model does not map each token by itself",
}


@dataclass(frozen=True)
class Traits:
    """What decides whether a compressor can act in a model of vLLM."""

    takes_patches: bool = False
    """True if images of any size go through the encoder as patches, which its last module joins to tokens."""
    keeps_positions: bool = False
    """True if the remaining tokens can have the positions that they have in the whole image."""
    loads_all_layers: bool = False
    """True if vLLM loads all layers of the vision encoder, not only those up to the one that gives the features."""


#: A model whose inputs are images, and whose positions have one axis.
DEFAULT = Traits()
#: A model whose inputs are patches and whose positions have three axes.
PATCHES = Traits(takes_patches=True, keeps_positions=True, loads_all_layers=True)


def of_engine(config: PreTrainedConfig) -> str | None:
    """Return the canonical spec of the engine's compressor, which `start.resolve` wrote into the config."""
    text: str | None = getattr(config, KEY, None)
    return text


@lru_cache(maxsize=256)
def read_request(text: str, traits: Traits = DEFAULT, allowed_methods: frozenset[str] = frozenset()) -> Compressor:
    """Return the compressor of a request, whose spec names installed methods with their budgets.

    Other fields are the operator's: some make a method slow. So are methods that are slow for large images, unless
    they are in `allowed_methods`. Raise `UserError` for a spec that has them. vlmzip's own server permits more: it has
    a limit of time for each request. It also limits budgets. Here they have none, because clips can have many tokens.
    """
    if len(text) > LONGEST:
        raise UserError(f"{KEY} must have at most {LONGEST} characters, got {len(text)}")
    compressor = spec.read_named(text, catalogue.available())
    for stage in compressor.stages():
        if stage.cost in SLOW and stage.name() not in allowed_methods:
            raise UserError(
                f"a request cannot choose {stage.name()}, whose time grows with {stage.cost} for N tokens, unless the"
                f" server was started with it: {USE}"
            )
        refuse_fields(stage, ["site"])
    check(compressor, traits)
    return compressor


def check(compressor: Compressor, traits: Traits = DEFAULT) -> None:
    """Raise `UserError` with the reason if a model of vLLM with these traits cannot run this compressor."""
    for stage in compressor.stages():
        name = stage.name()
        if stage.site not in SITES:
            where = ELSEWHERE_OF_PATCHES if traits.takes_patches else ELSEWHERE
            raise UserError(f"{name} acts at site {stage.site.value!r}: {where[stage.site]}; {USE}")
        if stage.text_aware:
            raise UserError(
                f"{name} reads the question, and vLLM encodes an image once for all questions about it: {USE}"
            )
        if isinstance(stage, Resampler):
            raise UserError(f"{name} has trained weights, and the plugin for vLLM loads none: {USE}")
        if stage.for_training_only:
            raise UserError(f"{name} is for training only: {USE}")
    _check_grids(compressor.stages())
    first = compressor.stages()[0]
    if traits.takes_patches and (lacking := sorted(first.needs & OF_IMAGES.keys())):
        raise UserError(f"{first.name()} cannot run here: {OF_IMAGES[lacking[0]]}; {USE}")
    if compressor.positions == "original" and not traits.keeps_positions:
        raise UserError(
            'positions="original" leaves gaps between positions, and vLLM counts the tokens of this model from 0:'
            ' give positions="contiguous", or leave it out'
        )


@torch.no_grad()
def _check_grids(stages: Sequence[Compressor]) -> None:
    """Raise `UserError` for a stage that needs a grid after one that leaves none.

    Whether a stage leaves a grid depends on the size of an image: one that keeps all tokens does.
    """
    for before, stage in pairwise(stages):
        if not before.changes_nothing:
            smallest = stage.with_fields(keep=1) if "keep" in stage.field_names() else stage
            smallest.assign(VisualTokens(torch.eye(9)[None], None, projector=lambda features: features))


def needs_processor(compressor: Compressor, profile: Profile, traits: Traits = DEFAULT) -> bool:
    """Return whether the encoder must run in the processor.

    It must if the number of tokens depends on what an image shows, and for signals of a layer that vLLM does not load.
    """
    if compressor.tokens_by_layer(profile) is None:
        return True
    return not traits.loads_all_layers and bool(compressor.stages()[0].needs & OF_LAST_LAYER)


def counts(layouts: Sequence[Layout], compressor: Compressor) -> list[int]:
    """Return the number of placeholders that remain of each image, which must follow from shapes."""
    return least_counts(layouts, compressor)


def to_tensor(text: str) -> UInt8[Tensor, " bytes"]:
    """Return a text as a tensor, because vLLM hands only tensors from the processor to the model."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def from_tensor(values: UInt8[Tensor, " bytes"]) -> str:
    """Return the text of such a tensor."""
    return bytes(values.tolist()).decode()
