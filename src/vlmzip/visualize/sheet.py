"""A contact sheet: many token maps on one page, of many methods with their answers or of the frames of a video."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from vlmzip.token_map import TokenMap
from vlmzip.visual_tokens import Grid
from vlmzip.visualize.overlay import INK, PAPER, draw_fates, enlarged

SIDE = 312
"""Approximate longer side of one panel, in pixels."""
ACROSS = 4
"""Panels per line."""
MARGIN, LINE = 16, 24
MARKED = (168, 56, 0)
LEGEND = "white frame: kept · tinted: merged, one colour a group, its anchor framed · dark: dropped"
#: Fonts to try in order. Pillow's own font covers little beyond ASCII, and answers come in many scripts.
FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial Unicode.ttf", "arial.ttf")

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


@dataclass(frozen=True)
class Panel:
    """The panel of one image under one method, or of one frame of a video."""

    image: Image.Image
    title: str
    counts: str
    answer: str | None = None
    marked: bool = False
    """Whether to highlight the answer."""


def fates_panel(seen: Image.Image, token_map: TokenMap | None, grid: Grid | None, prefix: int) -> Image.Image:
    """Draw the tokens of one image on it. If they lie on no grid, return the image in grey."""
    if token_map is None or grid is None or token_map.group.shape[1] != prefix + grid.size:
        return plain_panel(seen, None).convert("L").convert("RGB")
    return draw_fates(seen, token_map, grid, prefix, _cell(grid))


def plain_panel(seen: Image.Image, grid: Grid | None) -> Image.Image:
    """Return the image without tokens, at the size of a panel with tokens."""
    if grid is not None:
        return enlarged(seen, grid, _cell(grid))
    scale = SIDE / max(seen.size)
    return seen.resize((max(1, round(seen.width * scale)), max(1, round(seen.height * scale))))


def contact_sheet(title: str, panels: Sequence[Panel], notes: Sequence[str] = (), together: int = 1) -> Image.Image:
    """Draw panels in lines of `ACROSS`, with the title above and the legend and notes below.

    Each `together` successive panels belong to one method and stay on one line.
    """
    across = min(max(ACROSS // together, 1) * together, len(panels))
    width = max(SIDE, *(panel.image.width for panel in panels))
    height = max(panel.image.height + LINE * (2 + len(_answer(panel, width))) for panel in panels) + MARGIN
    down = -(-len(panels) // across)
    page_width = max(across * (width + MARGIN) + MARGIN, 2 * (SIDE + MARGIN) + MARGIN)
    inner = page_width - 2 * MARGIN
    head = _wrapped(title, inner, _font(18))
    foot = [line for text in (LEGEND, *notes) for line in _wrapped(text, inner, _font(14))]
    top = MARGIN + LINE * len(head) + MARGIN // 2
    page = Image.new("RGB", (page_width, top + down * height + LINE * len(foot) + MARGIN), PAPER)
    _write(page, (MARGIN, MARGIN), head, _font(18))
    for number, panel in enumerate(panels):
        _put(page, panel, (MARGIN + number % across * (width + MARGIN), top + number // across * height), width)
    _write(page, (MARGIN, top + down * height), foot, _font(14))
    return page


def _put(page: Image.Image, panel: Panel, at: tuple[int, int], width: int) -> None:
    page.paste(panel.image, at)
    x, y = at[0], at[1] + panel.image.height + 4
    _write(page, (x, y), [_cut(panel.title, width, _font(16))], _font(16))
    _write(page, (x, y + LINE), [_cut(panel.counts, width, _font(14))], _font(14))
    colour = MARKED if panel.marked else INK
    _write(page, (x, y + 2 * LINE), _answer(panel, width), _font(16), colour)


def _answer(panel: Panel, width: int) -> list[str]:
    """Return the answer as one or two lines, or nothing if there is no answer."""
    if panel.answer is None:
        return []
    font = _font(16)
    first, *rest = _wrapped(f"“{panel.answer}”", width, font)
    return [first, _cut(" ".join(rest), width, font)] if rest else [first]


def _write(
    page: Image.Image, at: tuple[int, int], lines: Sequence[str], font: Font, colour: tuple[int, int, int] = INK
) -> None:
    draw = ImageDraw.Draw(page)
    for number, line in enumerate(lines):
        draw.text((at[0], at[1] + number * LINE), line, fill=colour, font=font)


def _cell(grid: Grid) -> int:
    """Return the pixels per token, at least 8: the frame would hide a smaller token."""
    return max(8, SIDE // max(grid.rows, grid.cols))


def _font(size: int) -> Font:
    for name in FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size=size)


def _cut(text: str, width: int, font: Font) -> str:
    """Return the writable text on one line, cut with "…" if it is too long."""
    text = _writable(text, font)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _wrapped(text: str, width: int, font: Font) -> list[str]:
    """Return the writable text as lines of at most `width` pixels."""
    lines = [""]
    for word in _writable(text, font).split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return [_cut(line, width, font) for line in lines]


def _writable(text: str, font: Font) -> str:
    """Return the text on one line. A character that the font lacks becomes its base letter (é: e) or "?", not a box."""
    missing = bytes(font.getmask("\U0010ffff"))

    def known(character: str) -> bool:
        return character.isspace() or (character.isprintable() and bytes(font.getmask(character)) != missing)

    out = ""
    for character in " ".join(text.split()):
        bare = unicodedata.normalize("NFKD", character)[0]
        out += character if known(character) else bare if known(bare) else "?"
    return out
