"""The compressors inside an LLM, and the layers before which they act."""

from __future__ import annotations

from collections.abc import Sequence

from vlmzip.compressor import Compressor
from vlmzip.errors import UnfitMethod
from vlmzip.models.family import Family
from vlmzip.runtime.report import Stopwatch
from vlmzip.visual_tokens import Signal


class Plan:
    """The compressors inside an LLM by the layer before which they act, and the layers that they watch."""

    def __init__(self, family: Family, compressors: Sequence[Compressor], watch: Stopwatch) -> None:
        self.family, self.watch = family, watch
        self.compressors = tuple(compressors)
        self.at = {layer: compressor for compressor in compressors for layer in self._layers(compressor)}
        asks = {layer: c for layer, c in self.at.items() if Signal.TEXT_ATTENTION in c.needs}
        self.watched = {layer - 1 for layer, c in asks.items() if not c.asks_next_layer}
        """The layers whose attention the compressor before the next layer needs."""
        self.asked = {layer for layer, c in asks.items() if c.asks_next_layer}
        """The layers whose attention the compressor before them needs."""
        self.keyed = {layer - 1 for layer, c in self.at.items() if Signal.LLM_KEYS in c.needs}
        """The layers whose attention keys the compressor before the next layer needs."""
        if self.restores and self.flash:
            raise UnfitMethod(
                f"{compressors[0].name()} gives tokens weights in attention, which FlashAttention cannot do: load the"
                " model with attn_implementation='sdpa' or 'eager'"
            )

    @property
    def restores(self) -> bool:
        """Return True if the tokens are restored after each layer. A compressor that does this acts alone."""
        return any(compressor.restores for compressor in self.compressors)

    def _layers(self, compressor: Compressor) -> Sequence[int]:
        """Return the layers before which a compressor acts."""
        if compressor.restores:
            return range(min(compressor.layers), len(self.family.decoder_layers))
        return compressor.layers

    @property
    def flash(self) -> bool:
        """Return True if the LLM uses FlashAttention, which takes masks of shape [batch, all]."""
        return "flash" in (self.family.llm_config._attn_implementation or "")
