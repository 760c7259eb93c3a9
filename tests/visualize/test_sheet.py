"""Contact sheets."""

import pytest
import torch
from PIL import Image, ImageFont

from vlmzip import Grid, TokenMap
from vlmzip.visualize import sheet
from vlmzip.visualize.sheet import MARKED, Panel, contact_sheet, fates_panel, plain_panel

GRID = Grid(1, 2, 2)
SEEN = Image.new("RGB", (16, 16), (200, 100, 50))
PIXELS = sheet.SIDE * sheet.SIDE


def panel(answer="yes", marked=False):
    return Panel(plain_panel(SEEN, GRID), "method", "4 visual tokens", answer, marked)


def test_tokens_on_a_grid_are_drawn_and_others_leave_the_image_grey():
    token_map = TokenMap.keep(torch.tensor([[True, False, False, False]]))
    drawn = fates_panel(SEEN, token_map, GRID, 0)
    assert drawn.getpixel((78, 78)) == (200, 100, 50)
    assert max(drawn.getpixel((234, 234))) < 80
    for without in (fates_panel(SEEN, token_map, None, 0), fates_panel(SEEN, None, GRID, 0)):
        assert len(set(without.getpixel((78, 78)))) == 1
        assert without.size == (sheet.SIDE, sheet.SIDE)


def test_a_map_of_another_grid_is_not_drawn():
    assert len(set(fates_panel(SEEN, TokenMap.identity(1, 9), GRID, 0).getpixel((78, 78)))) == 1


@pytest.mark.parametrize(
    ("count", "together", "across", "down"), [(1, 1, 2, 1), (5, 1, 4, 2), (6, 3, 3, 2), (10, 5, 5, 2)]
)
def test_panels_of_one_method_stay_in_one_line(count, together, across, down):
    page = contact_sheet("title", [panel()] * count, together=together)
    assert page.width == across * (sheet.SIDE + sheet.MARGIN) + sheet.MARGIN
    assert down * sheet.SIDE < page.height < (down + 1) * sheet.SIDE + 200 * down


def test_an_answer_stands_out_only_where_it_is_marked():
    colours = lambda page: {colour for _, colour in page.getcolors(PIXELS)}  # noqa: E731
    assert MARKED in colours(contact_sheet("title", [panel(), panel(marked=True)]))
    assert MARKED not in colours(contact_sheet("title", [panel(), panel()]))


def test_what_a_font_lacks_becomes_a_letter_or_a_question_mark():
    font = ImageFont.load_default(size=16)
    if not isinstance(font, ImageFont.FreeTypeFont):
        pytest.skip("Pillow without FreeType")
    assert sheet._writable("déjà\nvu: 中 “ok”", font) == "deja vu: ? “ok”"


def test_long_words_are_cut_to_their_panel():
    font = sheet._font(16)
    cut = sheet._cut("w" * 500, 312, font)
    assert cut.endswith("…")
    assert 250 < font.getlength(cut) <= 312
    assert all(font.getlength(line) <= 312 for line in sheet._wrapped("some words " * 20 + "w" * 500, 312, font))
