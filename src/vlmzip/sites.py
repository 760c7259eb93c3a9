"""Where a compressor can act and what it can look at: words that need no torch."""

from __future__ import annotations

import enum


class Site(enum.StrEnum):
    """Where on the way from image to answer a compressor acts."""

    PIXELS = "pixels"
    PRE_PROJECTOR = "pre_projector"  #: the last point where one token still becomes one LLM token
    POST_PROJECTOR = "post_projector"
    IN_LLM = "in_llm"


class Signal(enum.StrEnum):
    """What a compressor may ask for beside the features; the names are attributes of `VisualTokens`."""

    CLS_ATTENTION = "cls_attention"
    KEYS = "keys"
    TEXT_ATTENTION = "text_attention"
    TEXT_FEATURES = "text_features"
    PIXELS = "pixels"
