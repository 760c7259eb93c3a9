"""Attention maps of an image, side by side: how much attention each visual token gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vlmzip.visual_tokens import Grid
from vlmzip.visualize.overlay import INK, PAPER, enlarged

SIDE = 190
"""Approximate width of one map, in pixels."""
MARGIN, LINE = 12, 20
BRIGHT = (255, 221, 64)
DIMMED = 0.35
"""Brightness of the image, as a fraction, where no attention falls."""


@dataclass(frozen=True)
class Map:
    """The attention that each token of a grid receives."""

    title: str
    weights: Sequence[float]
    """One weight per token, in raster order and in any unit; each map is normalised to sum to 1."""


def draw_maps(image: Image.Image, grid: Grid, maps: Sequence[Map]) -> Image.Image:
    """Draw the image, then each map, all on one scale.

    The yellow of a token is the square root of its share of the attention.
    """
    cell = max(2, SIDE // max(grid.rows, grid.cols))
    plain = enlarged(image, grid, cell)
    shares = [np.array(attention.weights) / sum(attention.weights) for attention in maps]
    brightest = max(share.max() for share in shares)
    panels = {"image": plain}
    for attention, share in zip(maps, shares, strict=True):
        panels[attention.title] = _lit(plain, grid, share / brightest)
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
    """Return the image in dim grey under yellow, whose opacity is the square root of each token's `light` in [0, 1]."""
    alpha = Image.fromarray((255 * np.sqrt(light)).round().astype(np.uint8).reshape(-1, grid.cols)[: grid.rows])
    dim = Image.blend(Image.new("RGB", plain.size), plain.convert("L").convert("RGB"), DIMMED)
    return Image.composite(
        Image.new("RGB", plain.size, BRIGHT), dim, alpha.resize(plain.size, Image.Resampling.NEAREST)
    )
