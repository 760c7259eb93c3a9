"""Draw a scene. All arithmetic is in integers, so the pixels are the same on every machine."""

from functools import cache

import numpy as np

from vlmzip.mini.assets import Assets
from vlmzip.mini.rng import Rng
from vlmzip.mini.scene import SIDE, Scene, Thing

RGB = {
    "red": (215, 35, 35),
    "orange": (245, 135, 20),
    "yellow": (240, 225, 50),
    "green": (40, 165, 60),
    "cyan": (70, 215, 225),
    "blue": (35, 70, 215),
    "purple": (135, 45, 185),
    "pink": (250, 150, 205),
}
FINE = 8  # anti-aliasing: shapes are drawn on a grid this many times finer, then averaged
DIGITS = {
    "0": "01110 10001 10011 10101 11001 10001 01110",
    "1": "00100 01100 00100 00100 00100 00100 01110",
    "2": "01110 10001 00001 00110 01000 10000 11111",
    "3": "11110 00001 00001 01110 00001 00001 11110",
    "4": "00010 00110 01010 10010 11111 00010 00010",
    "5": "11111 10000 11110 00001 00001 10001 01110",
    "6": "00110 01000 10000 11110 10001 10001 01110",
    "7": "11111 00001 00010 00100 01000 01000 01000",
    "8": "01110 10001 10001 01110 10001 10001 01110",
    "9": "01110 10001 10001 01111 00001 00010 01100",
}
TALL_ROWS = (0, 1, 1, 2, 3, 4, 5, 5, 6)
# Ten corners of a five-pointed star in a square of side 1000, so that no sine is needed.
STAR = (
    (500, 0),
    (618, 345),
    (1000, 363),
    (691, 588),
    (809, 950),
    (500, 725),
    (191, 950),
    (309, 588),
    (0, 363),
    (382, 345),
)


def draw(scene: Scene, assets: Assets) -> np.ndarray:
    """Return the image of a scene, uint8 [96 96 3]."""
    rng = Rng(scene.seed * 2 + 1_000_003)
    canvas = _ground(scene, rng, assets)
    for thing in scene.things:
        _draw_thing(canvas, thing, assets)
    return canvas.astype(np.uint8)


# ---------------------------------------------------------------- grounds


def _ground(scene: Scene, rng: Rng, assets: Assets) -> np.ndarray:
    """Return the background, int32 [96 96 3]."""
    if scene.ground == "photo":
        canvas = _photo(rng, assets)
    elif scene.ground == "lines":
        canvas = _lines(np.zeros((SIDE, SIDE, 3), np.int32) + _muted(rng, 40), rng, 45)
    elif scene.ground == "noise":
        cell = rng.between(2, 5)
        cells = -(-SIDE // cell)
        blocks = _muted(rng, 40) + rng.noise((cells, cells, 3), -70, 70)
        canvas = blocks.repeat(cell, 0).repeat(cell, 1)[:SIDE, :SIDE]
    else:
        canvas = _pattern(scene.ground, rng)
    return canvas.clip(0, 255).astype(np.int32)


def _muted(rng: Rng, tint: int) -> np.ndarray:
    grey = rng.between(35, 220)
    return np.array([grey + rng.between(-tint, tint) for _ in range(3)], np.int32)


def _pattern(ground: str, rng: Rng) -> np.ndarray:
    first = _muted(rng, 25)
    if ground == "plain":
        return np.zeros((SIDE, SIDE, 3), np.int32) + first
    if ground == "soft noise":
        return first + rng.noise((SIDE, SIDE, 1), -18, 18)
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    way = (x, y, (x + y) // 2, (x - y + SIDE) // 2)[rng.below(4)][..., None]
    if ground == "gradient":
        second = _muted(rng, 25)
        return first + (second - first) * way // SIDE
    step = rng.between(3, 9)
    second = first + rng.pick((-1, 1)) * rng.between(15, 40)
    odd = (way // step) % 2 if ground == "stripes" else ((x // step + y // step) % 2)[..., None]
    return np.where(odd == 1, second, first)


def _photo(rng: Rng, assets: Assets) -> np.ndarray:
    crop = assets.grounds[rng.below(len(assets.grounds))].astype(np.int32)
    if rng.chance(50):
        crop = crop[:, ::-1]
    if rng.chance(50):
        crop = crop[::-1]
    canvas = crop + rng.between(-25, 25)
    return _lines(canvas.copy(), rng, 8) if rng.chance(40) else canvas


def _lines(canvas: np.ndarray, rng: Rng, count: int) -> np.ndarray:
    """Draw `count` lines of any color, one or two pixels wide: clutter that resembles the edges of things."""
    for _ in range(count):
        x, y = rng.below(SIDE), rng.below(SIDE)
        across, down = rng.between(-40, 40), rng.between(-40, 40)
        steps = max(abs(across), abs(down), 1)
        walk = np.arange(steps + 1)
        rows = (y + down * walk // steps).clip(0, SIDE - 2)
        columns = (x + across * walk // steps).clip(0, SIDE - 2)
        color = np.array([rng.between(20, 235) for _ in range(3)])
        canvas[rows, columns] = color
        if rng.chance(50):
            canvas[rows + (steps == abs(across)), columns + (steps != abs(across))] = color
    return canvas


# ---------------------------------------------------------------- things


def _draw_thing(canvas: np.ndarray, thing: Thing, assets: Assets) -> None:
    part = canvas[thing.top : thing.top + thing.height, thing.left : thing.left + thing.width]
    color = (np.array(RGB[thing.color]) + thing.shade).clip(0, 255)
    if thing.kind == "shape":
        mask, edge = _shape_masks(thing.name, thing.width)
        _blend(part, color * 2 // 5, edge)
        _blend(part, color, mask)
    elif thing.kind == "number":
        light = int(color.sum()) > 330
        part[:] = color
        ink = _number_mask(thing.name, thing.look)
        part[2:-2, 2 : 2 + ink.shape[1]][ink] = 15 if light else 245
    else:
        crop = _resized(assets.item(thing.name, thing.look), thing.width)
        # Dark cloth keeps its color: brightness goes from 40 % to 100 %.
        _blend(part, color * (100 + crop[..., None] * 155 // 255) // 255, (crop * 5).clip(0, 255))


def _blend(part: np.ndarray, color: np.ndarray, mask: np.ndarray) -> None:
    alpha = mask[..., None]
    part[:] = (part * (255 - alpha) + color * alpha + 127) // 255


def _number_mask(name: str, tall: int) -> np.ndarray:
    """Return the pixels of a number's digits, bool [7 or 9, 6 * digits - 1]."""
    rows = TALL_ROWS if tall else range(7)
    glyphs = [DIGITS[digit].split() for digit in name]
    return np.array([[cell == "1" for cell in "0".join(glyph[row] for glyph in glyphs)] for row in rows])


@cache
def _shape_masks(name: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return masks of a shape without and with its one-pixel rim, each int [size size] from 0 to 255."""
    return _average(_inside(name, size, FINE)), _average(_inside(name, size, 0))


def _average(fine: np.ndarray) -> np.ndarray:
    size = len(fine) // FINE
    return fine.reshape(size, FINE, size, FINE).sum((1, 3)) * 255 // FINE**2


def _inside(name: str, size: int, rim: int) -> np.ndarray:
    """Mark the fine cells inside the shape and `rim` fine cells away from its edge, int [size*FINE, size*FINE]."""
    side = size * FINE
    # x and y are twice the cell centers, from -(side-1) to side-1 in steps of two, so that they are integers.
    y, x = np.mgrid[0:side, 0:side] * 2 + 1 - side
    reach = side - 2 * rim
    if name == "circle":
        inside = x * x + y * y <= reach * reach
    elif name == "ring":
        hole = side * 45 // 100 + 2 * rim
        inside = (x * x + y * y <= reach * reach) & (x * x + y * y >= hole * hole)
    elif name == "square":
        short = side * 88 // 100 - 2 * rim
        inside = (abs(x) <= short) & (abs(y) <= short)
    elif name == "cross":
        arm = side * 36 // 100 - rim
        inside = ((abs(x) <= arm) | (abs(y) <= arm)) & (abs(x) <= reach) & (abs(y) <= reach)
    elif name == "triangle":
        inside = (2 * abs(x) <= y + side - 4 * rim) & (y <= reach)
    else:
        inside = _in_polygon(x, y, side, rim)
    return inside.astype(np.int64)


def _in_polygon(x: np.ndarray, y: np.ndarray, side: int, rim: int) -> np.ndarray:
    """Mark cells inside the star by the even-odd rule. It is shrunk by twice the rim, because its points are narrow."""
    reach = side - 2 * rim
    corners = [((a - 500) * 2 * reach, (b - 500) * 2 * reach) for a, b in STAR]
    px, py = x * 1000, y * 1000
    inside = np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        if ay == by:
            continue
        straddles = (ay > py) != (by > py)
        left = (px - ax) * (by - ay) - (bx - ax) * (py - ay)
        inside ^= straddles & ((left < 0) == (by > ay))
    return inside


@cache
def _resize_weights(size: int, full: int = 28) -> np.ndarray:
    """Return the weight of each of `full` pixels in each of `size` pixels, in units of 1/1024, int [size full]."""
    weights = np.zeros((size, full), np.int64)
    for i in range(size):
        for j in range(full):
            weights[i, j] = max(0, min((i + 1) * full, (j + 1) * size) - max(i * full, j * size)) * 1024 // full
    return weights


def _resized(crop: np.ndarray, size: int) -> np.ndarray:
    """Resize a crop by area averaging, from uint8 [28 28] to int [size size]."""
    if size == len(crop):
        return crop.astype(np.int64)
    weights = _resize_weights(size)
    return (weights @ crop.astype(np.int64) @ weights.T + 2**19) >> 20
