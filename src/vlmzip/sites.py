"""The sites at which a compressor can act, and the signals that it can use. This module does not import torch."""

from __future__ import annotations

import enum
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

#: The kinds of methods; see `Compressor.kind`.
Kind = Literal["prune", "merge", "prune and merge", "pool", "chain", "none"]
KINDS: tuple[str, ...] = get_args(Kind)
#: Orders of growth of a method's time; see `Compressor.cost`.
Cost = Literal["1", "N", "N·log N", "N·k", "N·k²", "N²", "k·N²", "N³"]


class Site(enum.StrEnum):
    """The point between image and answer at which a compressor acts."""

    PIXELS = "pixels"
    ENCODER = "encoder"  #: between attention and MLP of the vision encoder's layers
    PRE_PROJECTOR = "pre_projector"  #: the last point at which each token becomes one LLM token
    POST_PROJECTOR = "post_projector"
    IN_LLM = "in_llm"


class Signal(enum.StrEnum):
    """Inputs that a compressor can request in addition to the features; values name attributes of `VisualTokens`."""

    CLS_ATTENTION = "cls_attention"
    KEYS = "keys"
    ATTENTION_RECEIVED = "attention_received"
    LAST_CLS_ATTENTION = "last_cls_attention"
    LAST_KEYS = "last_keys"
    ENCODER_FEATURES = "encoder_features"
    PROJECTOR = "projector"
    TEXT_ATTENTION = "text_attention"
    CANDIDATE_ATTENTION = "candidate_attention"
    TEXT_FEATURES = "text_features"
    LLM_KEYS = "llm_keys"
    LLM_STATES = "llm_states"
    PIXELS = "pixels"


class Described(Protocol):
    """What the catalogue says of a method: its class, or its entry read from the source."""

    @property
    def kind(self) -> str: ...
    @property
    def sites(self) -> Collection[str]: ...
    @property
    def needs(self) -> Collection[str]: ...
    @property
    def trained_weights(self) -> bool: ...
    @property
    def videos_only(self) -> bool: ...


@dataclass(frozen=True)
class Filters:
    """The properties that a method must have to be listed. `None` allows everything."""

    kind: str | None = None
    site: str | None = None
    text_aware: bool | None = None
    trained_weights: bool | None = None
    videos_only: bool | None = None
    without: Collection[str] = ()
    """Signals that the method must not need."""

    def allow(self, method: Described) -> bool:
        needs = set(method.needs)
        return (
            self.kind in (None, method.kind)
            and (self.site is None or self.site in method.sites)
            and self.text_aware in (None, bool(needs & SIGNALS_OF_TEXT))
            and self.trained_weights in (None, method.trained_weights)
            and self.videos_only in (None, method.videos_only)
            and not needs & set(self.without)
        )


#: Signals that depend on the question.
SIGNALS_OF_TEXT = frozenset(
    {
        Signal.TEXT_ATTENTION,
        Signal.CANDIDATE_ATTENTION,
        Signal.TEXT_FEATURES,
        Signal.LLM_KEYS,
        Signal.LLM_STATES,
    }
)
#: Signals that come from the attention of the vision encoder.
ATTENTION_OF_ENCODERS = frozenset(
    {
        Signal.CLS_ATTENTION,
        Signal.KEYS,
        Signal.ATTENTION_RECEIVED,
        Signal.LAST_CLS_ATTENTION,
        Signal.LAST_KEYS,
    }
)
