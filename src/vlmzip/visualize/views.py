"""Draw the views of an image as the encoder sees them, one or several beside each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from PIL import Image

from vlmzip.models.family import Family
from vlmzip.processor import ImageProcessor
from vlmzip.runtime.compress import view_numbers
from vlmzip.runtime.report import ImageReport
from vlmzip.visualize.overlay import PAPER, seen_image
from vlmzip.visualize.sheet import fates_panel, plain_panel

GAP = 6
"""Pixels between two views."""


def seen_views(
    family: Family,
    processor: ImageProcessor,
    inputs: Mapping[str, object],
    reports: Sequence[ImageReport],
    images: Sequence[Sequence[Image.Image]],
) -> list[list[Image.Image]]:
    """Return for each image or video what the tokens of each of its views cover, as the encoder sees it.

    `processor` is the processor of images or videos. `images` has the original of each view, for families whose inputs
    are patches: their grids cover the whole of it.
    """
    pixels = family.view_pixels(inputs)
    if pixels is None:
        return [list(of_image) for of_image in images]
    layouts = family.layouts(inputs)
    out = []
    for layout, numbers, report in zip(layouts, view_numbers(layouts), reports, strict=True):
        views = [seen_image(pixels[number], processor.image_mean, processor.image_std) for number in numbers]
        if report.layout.views != layout.views and not layout.is_video:  # the compressor did not see the padding
            views = [
                _cropped(view, grid.rows, grid.cols, window.rows, window.cols)
                for view, grid, window in zip(views, layout.views, layout.unpadded()[1], strict=True)
                if window is not None
            ]
        out.append(views)
    return out


def plain_views(seen: Sequence[Image.Image], report: ImageReport) -> Image.Image:
    """Return the views of an image without tokens, at the size of `fates_of_views`."""
    return _beside([plain_panel(view, part.grid) for view, part in zip(seen, report.views, strict=True)])


def fates_of_views(seen: Sequence[Image.Image], report: ImageReport) -> Image.Image:
    """Return the views of an image with what became of their tokens."""
    parts = zip(seen, report.views, strict=True)
    return _beside([fates_panel(view, part.token_map, part.grid, part.prefix) for view, part in parts])


def _beside(panels: Sequence[Image.Image]) -> Image.Image:
    """Return the panels in a square, row by row."""
    if len(panels) == 1:
        return panels[0]
    across = math.ceil(math.sqrt(len(panels)))
    width, height = (max(sizes) + GAP for sizes in zip(*(panel.size for panel in panels), strict=True))
    page = Image.new("RGB", (across * width - GAP, math.ceil(len(panels) / across) * height - GAP), PAPER)
    for number, panel in enumerate(panels):
        page.paste(panel, (number % across * width, number // across * height))
    return page


def _cropped(
    view: Image.Image, rows: int, cols: int, kept_rows: tuple[int, int], kept_cols: tuple[int, int]
) -> Image.Image:
    """Return the part of a view that some of its rows and columns of tokens cover."""
    width, height = view.width // cols, view.height // rows
    return view.crop((kept_cols[0] * width, kept_rows[0] * height, kept_cols[1] * width, kept_rows[1] * height))
