"""Downsample: encode a smaller image. The baseline that compresses no tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlmzip.compressor import BudgetedCompressor
from vlmzip.keep import A_NINTH, Keep, round_half_up
from vlmzip.token_map import TokenMap
from vlmzip.visual_tokens import Grid, Site, VisualTokens


@dataclass(frozen=True, kw_only=True)
class Downsample(BudgetedCompressor):
    """Give the vision encoder a smaller image, so that it returns fewer visual tokens.

    This is a baseline that papers on visual tokens seldom run; no paper defines it. The image is resized to the grid
    that `smaller` chooses (bicubic with antialiasing, as the models' processors do). The encoder interpolates its
    position embeddings, if it has any. The LLM gets all tokens that the encoder returns. The encoder becomes cheaper,
    too. Only grids of nearly the image's shape are possible; `at_budget` returns the ratio that it reaches.

    The token map assigns each token of the full image to the cell of the smaller grid that covers it. It is used to
    draw overlays and for `positions="original"`, which keeps the position of the middle token of each cell. The LLM
    does not get the mean of those tokens: its tokens come from the smaller image. A CLS token is dropped, unless the
    image keeps its size.

    When it fails: on models that never saw smaller images. mini is one, and loses 44 points at 25 % of the tokens, more
    than with any other method (docs/results.md).
    """

    kind = "pool"
    cost = "1"
    examples = ("keep=25%",)
    sites = (Site.PIXELS,)
    default_positions = "contiguous"

    site: Site = Site.PIXELS
    """Where the method acts: on the pixels, before the vision encoder."""
    keep: Keep = A_NINTH
    """Tokens per image (int), or a fraction of them (float, "25%"); the nearest grid of the image's shape is used."""

    def token_count(self, grid: Grid) -> int:
        return self.smaller(grid).size

    def smaller(self, grid: Grid) -> Grid:
        """Return the grid of the smaller image: among grids of nearly its shape, the one nearest to the budget."""
        target = self.count(grid.size)
        candidates = {Grid(grid.frames, side, _scaled(grid.cols, side, grid.rows)) for side in range(1, grid.rows + 1)}
        candidates |= {Grid(grid.frames, _scaled(grid.rows, side, grid.cols), side) for side in range(1, grid.cols + 1)}
        # Of two equally near grids take the one with fewer tokens, as pool2d does, and then the squarer one.
        return min(candidates, key=lambda g: (abs(g.size - target), g.size, abs(g.rows - g.cols), g.rows))

    def assign(self, tokens: VisualTokens) -> TokenMap:
        grid = self.grid_of(tokens)
        group = cell_of_each(grid, self.smaller(grid), tokens.features.device)
        return TokenMap.merge(group.expand(len(tokens.features), -1)).after_dropping(tokens.prefix)


def cell_of_each(grid: Grid, smaller: Grid, device: torch.device) -> torch.Tensor:
    """Return the index of the cell of the smaller grid that holds each token's centre; shape [grid.size]."""
    frame = torch.arange(grid.frames, device=device)[:, None, None]
    # The centre of token i lies at (i + 1/2) / rows. Integer arithmetic: rounding cannot move it to another cell.
    row = (2 * torch.arange(grid.rows, device=device) + 1)[None, :, None] * smaller.rows // (2 * grid.rows)
    col = (2 * torch.arange(grid.cols, device=device) + 1)[None, None, :] * smaller.cols // (2 * grid.cols)
    return ((frame * smaller.rows + row) * smaller.cols + col).reshape(-1)


def _scaled(length: int, side: int, of: int) -> int:
    """Return `length` scaled by `side / of`, rounded to whole tokens, at least 1."""
    return max(1, round_half_up(length * side / of))
