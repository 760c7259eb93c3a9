"""No compression: the unchanged model, run through the same code path as every method."""

from __future__ import annotations

from dataclasses import dataclass

from vlmzip.compressor import Compressor, keep_all
from vlmzip.token_map import TokenMap
from vlmzip.visual_tokens import Grid, VisualTokens


@dataclass(frozen=True, kw_only=True)
class NoCompression(Compressor):
    """Keep every visual token. This is the baseline of every comparison.

    When it fails: never, but it saves nothing.
    """

    kind = "none"
    cost = "1"
    changes_nothing = True

    def token_count(self, grid: Grid) -> int:
        return grid.size

    def assign(self, tokens: VisualTokens) -> TokenMap:
        return keep_all(tokens)
