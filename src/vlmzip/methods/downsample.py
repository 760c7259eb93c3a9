"""Fewer pixels: the baseline that needs no method at all."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlmzip.compressor import BudgetedCompressor
from vlmzip.keep import A_NINTH, Keep, count_to_keep, round_half_up
from vlmzip.token_map import TokenMap
from vlmzip.visual_tokens import Grid, Site, VisualTokens


@dataclass(frozen=True, kw_only=True)
class Downsample(BudgetedCompressor):
    """Show the vision encoder a smaller image, so that it puts out fewer visual tokens.

    The baseline that papers on visual tokens seldom run; no paper defines it. The image is resized (bicubic with
    antialiasing, as the families' own processors do) to the grid that `smaller` chooses, position embeddings are
    interpolated by the encoder itself where it has any, and all that it puts out goes to the LLM. The encoder gets
    cheaper too. Reachable are grids of (nearly) the image's own shape; `at_budget` says what is reached.

    The token map says which cell of the smaller grid covers each token that the image would have had: their mean is
    what is drawn, and the middle one's place is what `positions="original"` keeps. The tokens that the LLM gets are not
    that mean: they come from encoding the smaller image. A CLS token is dropped, unless nothing is to be done.
    """

    examples = ("keep=25%",)
    sites = (Site.PIXELS,)
    default_positions = "contiguous"

    site: Site = Site.PIXELS
    """Where it acts: on the pixels, before the vision encoder."""
    keep: Keep = A_NINTH
    """Tokens per image (int), or a fraction of them (float, "25%"); the nearest grid of the image's shape."""

    def token_count(self, grid: Grid) -> int:
        return self.smaller(grid).size

    def smaller(self, grid: Grid) -> Grid:
        """The grid of the smaller image: of those nearest to its shape, the one nearest to the budget in tokens."""
        wanted = count_to_keep(self.keep, grid.size)
        candidates = {Grid(grid.frames, side, _scaled(grid.cols, side, grid.rows)) for side in range(1, grid.rows + 1)}
        candidates |= {Grid(grid.frames, _scaled(grid.rows, side, grid.cols), side) for side in range(1, grid.cols + 1)}
        # Between two equally near grids take the smaller count, as pool2d does, and then the squarer one.
        return min(candidates, key=lambda g: (abs(g.size - wanted), g.size, abs(g.rows - g.cols), g.rows))

    def assign(self, tokens: VisualTokens) -> TokenMap:
        grid = self.grid_of(tokens)
        group = cell_of_each(grid, self.smaller(grid), tokens.features.device)
        return TokenMap.merge(group.expand(len(tokens.features), -1)).after_dropping(tokens.prefix)


def cell_of_each(grid: Grid, smaller: Grid, device: torch.device) -> torch.Tensor:
    """The cell of the smaller grid that holds the centre of each token of the grid; shape [grid.size]."""
    frame = torch.arange(grid.frames, device=device)[:, None, None]
    # A centre lies at i + 1/2 of `rows`; in whole numbers, so that no rounding moves one across a border.
    row = (2 * torch.arange(grid.rows, device=device) + 1)[None, :, None] * smaller.rows // (2 * grid.rows)
    col = (2 * torch.arange(grid.cols, device=device) + 1)[None, None, :] * smaller.cols // (2 * grid.cols)
    return ((frame * smaller.rows + row) * smaller.cols + col).reshape(-1)


def _scaled(length: int, side: int, of: int) -> int:
    """`length` made smaller as `side` is against `of`, to the nearest whole token."""
    return max(1, round_half_up(length * side / of))
