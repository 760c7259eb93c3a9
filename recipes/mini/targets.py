"""The training targets of the vision encoder, for each patch and for the whole image."""

from dataclasses import dataclass

import numpy as np

from vlmzip.mini.scene import SIDE, Scene
from vlmzip.mini.words import COLORS, ITEMS, MOST_DIGITS, SHAPES

NAMES = ("ground", *SHAPES, *ITEMS, "number")
NO_DIGIT = 10
IGNORE = -100
LEAST_PIXELS = 12  # a patch of 64 pixels shows a thing if the thing's box covers at least this many
PRESENCE = len(SHAPES) * len(COLORS) + len(SHAPES) + len(ITEMS) + len(COLORS) + 1


@dataclass(frozen=True)
class Targets:
    """The targets of an image; patches are in raster order."""

    name: np.ndarray  # int [patches], 0 is ground
    color: np.ndarray  # int [patches], IGNORE on ground
    digits: np.ndarray  # int [patches 3], the number's digits from the left, IGNORE where there is no number
    middle: np.ndarray  # float [patches], 1 if the patch has the middle of a thing
    place: np.ndarray  # float [patches 4]: the patch's column and row, the thing's middle x and y, all from -1 to 1
    presence: np.ndarray  # float [PRESENCE]: 1 for colored shapes, shapes, items, colors and numbers in the image


def targets(scene: Scene, rows: int) -> Targets:
    patch = SIDE // rows
    owner, middle = _owners(scene, rows, patch)
    name = np.zeros(rows * rows, np.int64)
    color = np.full(rows * rows, IGNORE)
    digits = np.full((rows * rows, MOST_DIGITS), IGNORE)
    place = np.zeros((rows * rows, 4), np.float32)
    line = (np.arange(rows) + 0.5) / rows * 2 - 1
    place[:, 0], place[:, 1] = np.tile(line, rows), np.repeat(line, rows)
    place[:, 2:] = place[:, :2]
    for number, thing in enumerate(scene.things):
        mine = owner == number
        name[mine] = NAMES.index("number" if thing.kind == "number" else thing.name)
        color[mine] = COLORS.index(thing.color)
        place[mine, 2:] = np.array(thing.center) / SIDE * 2 - 1
        if thing.kind == "number":
            spelt = [int(digit) for digit in thing.name]
            digits[mine] = spelt + [NO_DIGIT] * (MOST_DIGITS - len(spelt))
    return Targets(name, color, digits, middle, place, _presence(scene))


def _owners(scene: Scene, rows: int, patch: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the index of the thing that covers most of each patch, or -1, and a mask of the things' middles."""
    edges = np.arange(rows) * patch
    areas = np.zeros((len(scene.things) + 1, rows, rows), np.int64)
    areas[-1] = LEAST_PIXELS - 1
    middle = np.zeros((rows, rows), np.float32)
    for number, thing in enumerate(scene.things):
        across = np.minimum(edges + patch, thing.left + thing.width) - np.maximum(edges, thing.left)
        down = np.minimum(edges + patch, thing.top + thing.height) - np.maximum(edges, thing.top)
        areas[number] = down.clip(0)[:, None] * across.clip(0)
        x, y = thing.center
        middle[int(y) // patch, int(x) // patch] = 1
    owner = areas.argmax(0).reshape(-1)
    return np.where(owner == len(scene.things), -1, owner), middle.reshape(-1)


def _presence(scene: Scene) -> np.ndarray:
    pairs = [f"{color} {name}" for color in COLORS for name in SHAPES]
    words = [*pairs, *SHAPES, *ITEMS, *COLORS, "number"]
    there = {"number" if thing.kind == "number" else thing.name for thing in scene.things}
    there |= {thing.color for thing in scene.things}
    there |= {f"{thing.color} {thing.name}" for thing in scene.things}
    return np.array([word in there for word in words], np.float32)
