"""Overlays of token maps."""

import numpy as np
import torch
from PIL import Image

from vlmzip import Grid, TokenMap
from vlmzip.visualize.overlay import draw_tokens, seen_image, stack

GRID = Grid(1, 2, 2)
IMAGE = Image.new("RGB", (16, 16), (200, 100, 50))


def cells(page: Image.Image) -> list[tuple[int, int, int]]:
    """Return the colour at the centre of each of the four cells of the right-hand panel."""
    cell, left, top = 240, 16 + 480 + 16, 16 + 26 - 8
    return [page.getpixel((left + c * cell + 120, top + r * cell + 120)) for r in (0, 1) for c in (0, 1)]


def test_kept_merged_and_dropped_look_different():
    # 0: kept, 1 and 2: merged, 3: dropped
    token_map = TokenMap.merge(torch.tensor([[0, 1, 1, -1]]))
    kept, first, second, dropped = cells(draw_tokens(IMAGE, token_map, GRID, 0))
    assert kept == (200, 100, 50)
    assert max(dropped) < 80
    assert len({kept, first, second, dropped}) == 4


def test_each_group_has_a_different_colour():
    token_map = TokenMap.merge(torch.tensor([[0, 1, 0, 1]]), anchor=torch.tensor([[True, True, False, False]]))
    a, b, a2, b2 = cells(draw_tokens(IMAGE, token_map, GRID, 0))
    distance = lambda x, y: sum(abs(i - j) for i, j in zip(x, y, strict=True))  # noqa: E731
    assert distance(a, a2) < distance(a, b)
    assert distance(b, b2) < distance(b, a)


def test_tokens_outside_the_grid_are_not_drawn():
    token_map = TokenMap.keep(torch.tensor([[True, True, False, False, False]]))
    assert cells(draw_tokens(IMAGE, token_map, GRID, 1))[0] == (200, 100, 50)


def test_the_seen_image_is_the_image():
    original = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    pixels = torch.tensor((original / 255 - 0.4) / 0.3).permute(2, 0, 1).float()
    assert np.array_equal(np.asarray(seen_image(pixels, [0.4] * 3, [0.3] * 3)), original)


def test_stack_puts_pages_from_top_to_bottom():
    assert stack([Image.new("RGB", (5, 7)), Image.new("RGB", (9, 4))]).size == (9, 11)
