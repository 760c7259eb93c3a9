"""Token maps drawn over images: visual tokens that were kept, merged (one colour per group) or dropped."""

from __future__ import annotations

import colorsys
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vlmzip.token_map import TokenMap
from vlmzip.visual_tokens import Grid

SIDE = 480
"""Approximate width of each of the two panels, in pixels."""
WHITE, INK, PAPER = (255, 255, 255), (30, 30, 30), (250, 250, 248)


def seen_image(pixels: Float[Tensor, "3 height width"], mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    """Return the image as the vision encoder saw it, resized and cropped, with its normalisation undone."""
    values = pixels.float().cpu().numpy().transpose(1, 2, 0) * np.array(std) + np.array(mean)
    return Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8))


def draw_tokens(image: Image.Image, token_map: TokenMap, grid: Grid, prefix: int, title: str = "") -> Image.Image:
    """Draw the image and, beside it, the fate of each token. `token_map` has one row, for this image."""
    cell = max(8, SIDE // max(grid.rows, grid.cols))
    sizes = _sizes(token_map, prefix)
    fates = draw_fates(image, token_map, grid, prefix, cell)
    return _page(enlarged(image, grid, cell), fates, title, _caption(sizes, token_map, prefix), sizes)


def draw_fates(image: Image.Image, token_map: TokenMap, grid: Grid, prefix: int, cell: int) -> Image.Image:
    """Draw the image at `cell` pixels per token: kept tokens framed, merged tokens tinted, dropped tokens dark."""
    fates = enlarged(image, grid, cell)
    group, anchor = token_map.group[0, prefix:].tolist(), token_map.anchor[0, prefix:].tolist()
    sizes = _sizes(token_map, prefix)
    colours = _colours(sizes)
    for place, (g, is_anchor) in enumerate(zip(group, anchor, strict=True)):
        row, col = divmod(place % (grid.rows * grid.cols), grid.cols)
        box = (col * cell, row * cell, (col + 1) * cell, (row + 1) * cell)
        if g < 0:
            fates.paste(_dimmed(fates.crop(box)), box)
        elif sizes[g] > 1:
            tint = Image.new("RGB", (cell, cell), colours[g])
            grey = fates.crop(box).convert("L").convert("RGB")  # the image's own colours must not look like a group's
            fates.paste(Image.blend(grey, tint, 0.75 if is_anchor else 0.5), box)
            if is_anchor:
                ImageDraw.Draw(fates).rectangle((box[0] + 2, box[1] + 2, box[2] - 3, box[3] - 3), outline=INK, width=2)
        else:
            # A white frame inside a black one shows on any background.
            ImageDraw.Draw(fates).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=INK)
            ImageDraw.Draw(fates).rectangle((box[0] + 1, box[1] + 1, box[2] - 2, box[3] - 2), outline=WHITE, width=2)
    return fates


def stack(pages: list[Image.Image]) -> Image.Image:
    """Stack pages from top to bottom on one page."""
    out = Image.new("RGB", (max(page.width for page in pages), sum(page.height for page in pages)), PAPER)
    top = 0
    for page in pages:
        out.paste(page, (0, top))
        top += page.height
    return out


def _page(image: Image.Image, fates: Image.Image, title: str, caption: str, sizes: Counter[int]) -> Image.Image:
    margin, line = 16, 26
    page = Image.new("RGB", (2 * image.width + 3 * margin, image.height + 2 * margin + 3 * line), PAPER)
    draw = ImageDraw.Draw(page)
    font = ImageFont.load_default(size=16)
    draw.text((margin, margin - 8), title, fill=INK, font=font)
    top = margin + line - 8
    page.paste(image, (margin, top))
    page.paste(fates, (2 * margin + image.width, top))
    draw.text((margin, top + image.height + 6), caption, fill=INK, font=font)
    _legend(draw, (margin, top + image.height + 6 + line), font, sizes)
    return page


def _legend(
    draw: ImageDraw.ImageDraw,
    at: tuple[int, int],
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    sizes: Counter[int],
) -> None:
    """Draw one entry for each of kept, merged and dropped that occurs, with up to four group colours."""
    colours = list(_colours(sizes).values())
    swatches: list[tuple[str, list[tuple[int, int, int]]]] = []
    if any(g >= 0 and size == 1 for g, size in sizes.items()):
        swatches.append(("kept", [WHITE]))
    if colours:
        swatches.append(
            (("… " if len(colours) > 4 else "") + "merged, one colour per group, anchor framed", colours[:4])
        )
    if sizes[-1]:
        swatches.append(("dropped", [(52, 52, 52)]))
    x, y = at
    for name, fills in swatches:
        for fill in fills:
            draw.rectangle((x, y + 3, x + 14, y + 17), fill=fill, outline=INK)
            x += 18
        draw.text((x + 4, y), name, fill=INK, font=font)
        x += int(draw.textlength(name, font=font)) + 28


def _caption(sizes: Counter[int], token_map: TokenMap, prefix: int) -> str:
    kept = sum(1 for g, size in sizes.items() if g >= 0 and size == 1)
    merged = [size for g, size in sizes.items() if g >= 0 and size > 1]
    parts = [
        f"{kept} kept",
        f"{sum(merged)} merged into {len(merged)}" if merged else "none merged",
        f"{sizes[-1]} dropped",
    ]
    outside = int((token_map.group[0, :prefix] >= 0).sum())
    return ", ".join(parts) + (f", and {outside} from outside the grid (CLS)" if outside else "")


def counts_of(token_map: TokenMap, prefix: int) -> str:
    """Return how many tokens of a frame are kept, merged and dropped, in the few words for which a panel has space."""
    sizes = _sizes(token_map, prefix)
    kept = sum(1 for g, size in sizes.items() if g >= 0 and size == 1)
    merged = [size for g, size in sizes.items() if g >= 0 and size > 1]
    outside = int((token_map.group[0, :prefix] >= 0).sum())
    parts = [f"{kept} kept" + (f" and {outside} CLS" if outside else "")]
    parts += [f"{sum(merged)} merged into {len(merged)}"] if merged else []
    return ", ".join([*parts, f"{sizes[-1]} dropped"])


def enlarged(image: Image.Image, grid: Grid, cell: int) -> Image.Image:
    """Return a copy with `cell` pixels per token. Enlarging does not smooth, so that small images keep their pixels."""
    size = (cell * grid.cols, cell * grid.rows)
    return image.resize(size, Image.Resampling.NEAREST if image.width < size[0] else Image.Resampling.LANCZOS)


def _sizes(token_map: TokenMap, prefix: int) -> Counter[int]:
    """Count the grid tokens that joined each output token; key -1 counts the dropped tokens."""
    return Counter(token_map.group[0, prefix:].tolist())


def _dimmed(tile: Image.Image) -> Image.Image:
    return Image.blend(tile.convert("L").convert("RGB"), Image.new("RGB", tile.size, (20, 20, 20)), 0.8)


def _colours(sizes: Counter[int]) -> dict[int, tuple[int, int, int]]:
    """Return a colour for each group of two or more tokens. Hues step by the golden ratio, so they lie far apart."""
    out = {}
    for n, g in enumerate(sorted(g for g, size in sizes.items() if g >= 0 and size > 1)):
        red, green, blue = colorsys.hsv_to_rgb((0.05 + n * 0.618034) % 1, 0.85, 0.95 if n % 2 == 0 else 0.7)
        out[g] = (int(red * 255), int(green * 255), int(blue * 255))
    return out
