"""One run of a model's vision encoder: the views that go in, what comes out, and how views find their tokens."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlmzip.models.recording import Recording
from vlmzip.processor import InputDict
from vlmzip.visual_tokens import Grid

#: The fields of an encoder's output that no `forward` reads beside the visual tokens.
ENCODER_FIELDS = ("last_hidden_state", "pooler_output", "hidden_states", "attentions", "deepstack_features")


@dataclass(frozen=True)
class Batch:
    """Views that go through the vision encoder in one call of `get_image_features`."""

    arguments: InputDict
    """The arguments of `get_image_features`."""
    grids: Sequence[Grid]
    """The grid of each view."""
    numbers: Sequence[int]
    """The number of each view, counted through all views of all images."""

    def rows(self, rows: Sequence[int], pixels: str) -> Batch:
        """Return some of the views, for inputs with one row of `pixels` for each view."""
        arguments = {**self.arguments, pixels: self.arguments[pixels][list(rows)]}
        return Batch(arguments, [self.grids[row] for row in rows], [self.numbers[row] for row in rows])


@dataclass(frozen=True)
class Run:
    """One run of `get_image_features`, up to the projector if the projector maps each token by itself."""

    output: Any
    """The output of `get_image_features`; `None` if the run ended at the projector."""
    recording: Recording
    """The recorded attention of the vision encoder, and for some families the outputs of its layers."""
    projector_input: Tensor | None
    """The input of the projector; `None` if the projector does not map each token by itself."""

    @property
    def streams(self) -> list[Float[Tensor, "tokens stream_dim"]]:
        """The features of all tokens that layers of the LLM add (deepstack), one tensor for each layer."""
        return [flat(stream) for stream in getattr(self.output, "deepstack_features", None) or ()]

    @property
    def further(self) -> dict[str, object]:
        """What the model's `forward` reads in the output beside the visual tokens; see `further_fields`."""
        return {} if self.output is None else further_fields(self.output)

    @property
    def sizes(self) -> list[int] | None:
        """The number of tokens of each entry of the output; `None` if entries are not images or views."""
        features = self.projector_input if self.output is None else self.output[token_field(self.output)]
        if features is None or (isinstance(features, Tensor) and features.ndim < 3):
            return None  # the tokens of all views are one entry
        sizes = [entry.shape[:-1].numel() for entry in features]
        return None if set(sizes) == {1} else sizes  # each token may be an entry


@dataclass
class WithStreams(BaseModelOutputWithPooling):
    """The encoder output of models with deepstack: tokens, and the features that layers of the LLM add to them."""

    last_hidden_state: Any = None  # first, because accelerate rebuilds outputs from one dict
    pooler_output: Any = None
    """Projected tokens, one entry per image."""
    deepstack_features: list[list[Tensor]] | None = None
    """Features to add after each of the first layers of the LLM: a list per layer, one entry per image."""


@dataclass(frozen=True)
class EncoderAttention:
    """The attention scores by which VisionZip ranks visual tokens, in every layer of a vision encoder."""

    by_view: Sequence[Float[Tensor, "layers _"]]
    """One tensor for each view of all images: a score for each token of its grid, mean over heads.

    The scores of a layer need not sum to 1.
    """
    whose: Sequence[str]
    """The attending tokens in each layer, in a few words, such as "CLS"."""
    scored: int
    """The 0-based layer whose scores VisionZip uses."""


def learning(pixels: Tensor, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[object]:
    """Return a context that turns gradients off unless these parameters or the pixels learn.

    A frozen encoder then keeps no activations for a backward pass. This also holds under gradient checkpointing, for
    which transformers makes the embeddings of every model require gradients.
    """
    learns = torch.is_grad_enabled() and (pixels.requires_grad or any(p.requires_grad for p in parameters))
    return torch.set_grad_enabled(learns)


def further_fields(output: object) -> dict[str, object]:
    """Return what `forward` of some models reads beside the visual tokens, such as the logits of an encoder's router.

    Fields that are `None` are left out.
    """
    return {name: value for name, value in vars(output).items() if name not in ENCODER_FIELDS and value is not None}


def token_field(output: BaseModelOutputWithPooling) -> str:
    """Return the field of an encoder's output that has the visual tokens: few models have them in the second one."""
    return "last_hidden_state" if output.pooler_output is None else "pooler_output"


def flat(features: Tensor | Sequence[Tensor]) -> Float[Tensor, "tokens dim"]:
    """Return the features of all images, one tensor or one per image, one after another."""
    if isinstance(features, Tensor):
        return features.flatten(0, -2)
    return torch.cat([image.flatten(0, -2) for image in features])


def of_views(values: Tensor, sizes: Sequence[int], rows: Sequence[int]) -> Tensor:
    """Return [views, tokens, ...] for the views in `rows`, which have equal sizes, from values of all tokens.

    `sizes` has the number of tokens of each view.
    """
    if len(rows) == len(sizes):  # all views have one grid
        whole: Tensor = values.unflatten(0, (len(rows), sizes[0]))
        return whole
    parts = values.split(list(sizes))
    return torch.stack([parts[row] for row in rows])


def shape_of(arguments: InputDict, pixels: str) -> Hashable:
    """Return a value that is equal for arguments of equal shapes of images: the shape of `pixels`, and all others."""
    others = {name: value for name, value in arguments.items() if name != pixels}
    return arguments[pixels].shape, *((name, _content(value)) for name, value in others.items())


def _content(value: object) -> Hashable:
    return (value.shape, value.cpu().numpy().tobytes()) if isinstance(value, Tensor) else repr(value)


def ends_with_views(entries: Sequence[int], views: Sequence[int]) -> bool:
    """Return True if each entry of an encoder's output ends where a view ends; both are numbers of tokens.

    The sum of the tokens can be right although one image has too few placeholders and another too many, or although
    several images have one run of placeholders.
    """
    return set(accumulate(entries)) <= set(accumulate(views))
