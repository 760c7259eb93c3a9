"""The compressors inside an LLM, and the layers before which they act."""

from __future__ import annotations

from collections.abc import Sequence

from vlmzip.compressor import Compressor
from vlmzip.models.family import Family
from vlmzip.runtime.report import Stopwatch
from vlmzip.visual_tokens import Signal


class Plan:
    """The compressors inside an LLM by the layer before which they act, and the layers that they watch."""

    def __init__(self, family: Family, compressors: Sequence[Compressor], watch: Stopwatch) -> None:
        self.family, self.watch = family, watch
        self.at = {layer: compressor for compressor in compressors for layer in compressor.layers}
        asks = {layer: c for layer, c in self.at.items() if Signal.TEXT_ATTENTION in c.needs}
        self.watched = {layer - 1 for layer, c in asks.items() if not c.asks_next_layer}
        """The layers whose attention the compressor before the next layer needs."""
        self.asked = {layer for layer, c in asks.items() if c.asks_next_layer}
        """The layers whose attention the compressor before them needs."""

    @property
    def flash(self) -> bool:
        """Return True if the LLM uses FlashAttention, which takes masks of shape [batch, all]."""
        return "flash" in (self.family.llm_config._attn_implementation or "")
