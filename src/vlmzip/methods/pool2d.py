"""Pool2d: average pooling over square windows of the grid."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge

from vlmzip.compressor import Compressor, Profile
from vlmzip.keep import Keep, count_to_keep
from vlmzip.token_map import TokenMap
from vlmzip.visual_tokens import Grid, Site, VisualTokens


@dataclass(frozen=True, kw_only=True)
class Pool2d(Compressor):
    """Average each `factor` x `factor` window of visual tokens into one.

    This is the fixed-factor baseline of LLaVA-Zip (arXiv:2412.08771). Factors 1, 2 and 3 pool LLaVA-1.5's 24 x 24
    tokens to 576, 144 and 64. If the factor does not divide a side of the grid, the last windows of that side are
    smaller and average fewer tokens. No token is dropped.

    When it fails: on small things, which a window mixes with their surroundings: mini loses 18 points at 25 % of the
    tokens and 36 at 11 % (docs/results.md).
    """

    paper = "baseline of arXiv:2412.08771"
    kind = "pool"
    examples = ("factor=2",)
    sites = (Site.PRE_PROJECTOR, Site.POST_PROJECTOR)
    budget_fields = ("factor",)

    factor: Annotated[int, Ge(1)] = 3
    """Side of the window, in tokens."""

    def token_count(self, grid: Grid) -> int:
        return grid.frames * _windows(grid.rows, self.factor) * _windows(grid.cols, self.factor)

    def at_budget(self, keep: Keep, profile: Profile) -> tuple[Pool2d, float]:
        target, grids = count_to_keep(keep, profile.size), profile.grids
        sides = range(1, max(max(grid.rows, grid.cols) for grid in grids) + 1)
        counts = {
            factor: sum(dataclasses.replace(self, factor=factor).token_count(grid) for grid in grids)
            for factor in sides
        }
        # Of two equally near factors take the one with fewer tokens, which stays within the budget.
        factor = min(counts, key=lambda factor: (abs(counts[factor] - target), counts[factor]))
        nearest = dataclasses.replace(self, factor=factor)
        return nearest, nearest.reached(profile)

    def assign(self, tokens: VisualTokens) -> TokenMap:
        group = window_of_each(self.grid_of(tokens), self.factor, tokens.features.device)
        batch = tokens.features.shape[0]
        return TokenMap.merge(group.expand(batch, -1)).after_dropping(tokens.prefix)


def window_of_each(grid: Grid, factor: int, device: torch.device) -> torch.Tensor:
    """Return the index of each token's window, with windows in raster order; shape [grid.size]."""
    frame = torch.arange(grid.frames, device=device)[:, None, None]
    row = torch.arange(grid.rows, device=device)[None, :, None] // factor
    col = torch.arange(grid.cols, device=device)[None, None, :] // factor
    down, across = _windows(grid.rows, factor), _windows(grid.cols, factor)
    return ((frame * down + row) * across + col).reshape(-1)


def output_of_each(tokens: VisualTokens, grid: Grid, factor: int) -> torch.Tensor:
    """Return the index of the output token that each token joins, -1 for none; shape [prefix + grid.size].

    Factor 1 gives the model's usual tokens, including the prefix (CLS) if the model passes it to the LLM.
    """
    device = tokens.features.device
    kept = tokens.prefix if factor == 1 and tokens.passes_prefix else 0
    front = torch.arange(tokens.prefix, device=device) if kept else torch.full((tokens.prefix,), -1, device=device)
    return torch.cat([front, window_of_each(grid, factor, device) + kept])


def _windows(length: int, factor: int) -> int:
    return -(-length // factor)
