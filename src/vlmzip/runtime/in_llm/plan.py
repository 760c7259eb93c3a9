"""Which compressors act inside an LLM, and before which layers."""

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
        self.watched = {layer - 1 for layer, c in self.at.items() if Signal.TEXT_ATTENTION in c.needs}
        """Layers whose attention the compressor before the next layer asks for."""

    @property
    def flash(self) -> bool:
        """Whether masks have the form that FlashAttention takes."""
        return "flash" in (self.family.llm_config._attn_implementation or "")
