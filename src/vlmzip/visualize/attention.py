"""How much attention each visual token of an image gets, drawn on the image: one map beside another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vlmzip.visual_tokens import Grid
from vlmzip.visualize.overlay import INK, PAPER, enlarged

SIDE = 190
"""Width in pixels of one map, about."""
MARGIN, LINE = 12, 20
BRIGHT = (255, 221, 64)
DIMMED = 0.35
"""How much is left of the image's own light where no attention goes."""


@dataclass(frozen=True)
class Map:
    """What the tokens of a grid get, in raster order, in any unit."""

    title: str
    weights: Sequence[float]


def draw_maps(image: Image.Image, grid: Grid, maps: Sequence[Map]) -> Image.Image:
    """The image, then the maps, on one scale: yellow as the square root of a token's share of the attention."""
    cell = max(2, SIDE // max(grid.rows, grid.cols))
    plain = enlarged(image, grid, cell)
    shares = [np.array(one.weights) / sum(one.weights) for one in maps]
    brightest = max(share.max() for share in shares)
    panels = {"image": plain}
    panels |= {one.title: _lit(plain, grid, s / brightest) for one, s in zip(maps, shares, strict=True)}
    step = plain.width + MARGIN
    page = Image.new("RGB", (len(panels) * step + MARGIN, plain.height + 2 * LINE + MARGIN), PAPER)
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=14)
    for left, (title, panel) in zip(range(MARGIN, page.width, step), panels.items(), strict=False):
        pen.text((left, MARGIN // 2), title, fill=INK, font=font)
        page.paste(panel, (left, MARGIN // 2 + LINE))
    legend = f"yellow: share of the attention, as its square root; brightest: {100 * brightest:.1f} % for one token,"
    legend += f" an even spread gives {100 / grid.size:.2g} %"
    pen.text((MARGIN, plain.height + LINE + MARGIN - 2), legend, fill=INK, font=font)
    return page


def _lit(plain: Image.Image, grid: Grid, light: np.ndarray) -> Image.Image:
    """The image in dim grey, and yellow over each token as its `light`, from 0 to 1, says."""
    alpha = Image.fromarray((255 * np.sqrt(light)).round().astype(np.uint8).reshape(-1, grid.cols)[: grid.rows])
    dim = Image.blend(Image.new("RGB", plain.size), plain.convert("L").convert("RGB"), DIMMED)
    return Image.composite(
        Image.new("RGB", plain.size, BRIGHT), dim, alpha.resize(plain.size, Image.Resampling.NEAREST)
    )
