"""PixelPrune: drop the visual tokens whose pixels a neighbour predicts, before the vision encoder runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlmzip.compressor import Compressor, Profile
from vlmzip.errors import BudgetError
from vlmzip.keep import Keep
from vlmzip.token_map import TokenMap
from vlmzip.visual_tokens import Grid, Site, VisualTokens


@dataclass(frozen=True, kw_only=True)
class PixelPrune(Compressor):
    """Drop visual tokens whose pixels equal those of a neighbour, and give the vision encoder only the others.

    Wang et al. (arXiv:2604.00886), with the predictor of their code, `pred_2d`. It compares the pixels of the patches
    that the model joins into one visual token.

    1. Each token X in raster order has a left neighbour A, an upper neighbour B, and an upper left neighbour C.
    2. The prediction is B if C is similar to A and not to B, otherwise A. The first row uses A, the first column B.
    3. X is dropped if it is similar to its prediction. Two tokens are similar if no pixel value in [0, 1] differs by
       more than `tau`.
    4. A dropped token counts as its prediction when it is a neighbour itself. So the pixels of a dropped token differ
       by at most `tau` from those of a kept one, and with `tau=0` the kept tokens have all that the image shows.
    5. The encoder runs on the patches of the kept tokens. They keep their positions in the image, and attend to each
       other inside their image or, in Qwen2.5-VL, inside their window.

    The image decides how many tokens remain. In a video, each frame is an image. Only encoders that take any number of
    patches can do this: those of Qwen2-VL, Qwen2.5-VL and Qwen3-VL.

    Differences from the authors' code:

    - It knows Qwen3-VL and Qwen3.5. The windows of Qwen2.5-VL are ours: a window attends among its kept tokens.
    - One step decides all tokens of an antidiagonal, in all images of equal size. With `tau` above 0, theirs loops over
      the tokens.
    - Videos are ours, too: all frames that a token joins are compared. Theirs reads the first one, which for an image
      is the same as the others.
    - Similarity is by the largest difference only. Their code can also take the mean or the root mean square.
    - Values in [0, 1] are those of the published checkpoints, because a model does not know its processor: the
      normalisation undone is CLIP's for Qwen2-VL and Qwen2.5-VL, and 0.5 for Qwen3-VL, as theirs.

    Not confirmed: the values of `tau` above 0 in the paper, and its scores.

    When it fails: on photographs, in which hardly any two patches are equal, so that nearly all tokens remain. It is
    made for documents and screens.
    """

    paper = "arXiv:2604.00886"
    examples = ("tau=0", "tau=0.05")
    sites = (Site.PIXELS,)
    drops_patches = True

    site: Site = Site.PIXELS
    """Where the method acts: on the pixels, before the vision encoder."""
    tau: Annotated[float, Ge(0)] = 0.0
    """The largest difference, in [0, 1], between pixel values of a dropped token and its prediction; 0: none."""

    def assign(self, tokens: VisualTokens) -> TokenMap:
        grid = self.grid_of(tokens)
        pixels = tokens.features[:, tokens.prefix :].float()
        frames = pixels.unflatten(1, (grid.frames, -1)).flatten(0, 1)
        kept = unpredicted(frames, grid, self.tau)
        return TokenMap.keep(kept.view(len(pixels), -1)).after_dropping(tokens.prefix)

    def at_budget(self, keep: Keep, profile: Profile) -> tuple[Compressor, float]:
        raise BudgetError(
            f"{self.name()} has no budget to set, because the image decides how many tokens remain: set tau, the"
            " largest difference in [0, 1] between pixels that count as equal",
            remedy="set tau",
        )


def unpredicted(pixels: Float[Tensor, "images cells values"], grid: Grid, tau: float) -> Bool[Tensor, "images cells"]:
    """Mark the cells of images whose pixels are not predicted. `grid` has the rows and columns of an image."""
    device, images = pixels.device, torch.arange(len(pixels), device=pixels.device)[:, None]
    kept = torch.ones(pixels.shape[:2], dtype=torch.bool, device=device)
    # The kept cell that stands for each cell: itself, or the one that its prediction goes back to.
    source = torch.arange(grid.rows * grid.cols, device=device).repeat(len(pixels), 1)

    def similar(one: Tensor, other: Tensor) -> Bool[Tensor, "images cells"]:
        return (pixels[images, one] - pixels[images, other]).abs().amax(-1) <= tau

    for cell, left, above, corner in antidiagonals(grid, device):
        a, b, c = source[:, left], source[:, above], source[:, corner]
        predicted = torch.where(similar(c, a) & ~similar(c, b), b, a)
        is_predicted = similar(source[:, cell], predicted)
        source[:, cell] = torch.where(is_predicted, predicted, source[:, cell])
        kept[:, cell] = ~is_predicted
    return kept


def antidiagonals(grid: Grid, device: torch.device) -> Iterator[tuple[Int[Tensor, " cells"], ...]]:
    """Yield the cells of each antidiagonal after the first, and their neighbours on the left, above and between these.

    The neighbours of a cell lie on earlier antidiagonals. Cells of the first row and the first column have one
    neighbour, which stands for all three.
    """
    for number in range(1, grid.rows + grid.cols - 1):
        row = torch.arange(max(0, number - grid.cols + 1), min(grid.rows, number + 1), device=device)
        cell = row * grid.cols + number - row
        first_row, first_column = row == 0, row == number
        left = torch.where(first_column, cell - grid.cols, cell - 1)
        above = torch.where(first_row, cell - 1, cell - grid.cols)
        corner = torch.where(first_row | first_column, left, cell - grid.cols - 1)
        yield cell, left, above, corner
