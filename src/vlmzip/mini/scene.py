"""The content of an image: things with a name, a color and a place, on a background."""

from dataclasses import dataclass, replace

from vlmzip.mini.rng import Rng
from vlmzip.mini.words import COLORS, ITEMS, LEVELS, MOST_COUNTED, MOST_DIGITS, SHAPES

SIDE = 96
GAP = 1
GROUNDS = {
    "flat": ("plain",),
    "patterned": ("gradient", "stripes", "checks", "soft noise"),
    "cluttered": ("photo", "photo", "photo", "lines", "noise"),
}


@dataclass(frozen=True)
class Thing:
    """A thing in the image. `left`, `top`, `width` and `height` are in pixels.

    `look` is a number for the drawing: the crop of an item, or whether digits are tall.
    """

    kind: str  # "shape", "number" or "item"
    name: str  # "circle", "347", "dress"
    color: str
    width: int
    height: int
    look: int
    shade: tuple[int, int, int]  # added to the color's red, green and blue
    left: int = 0
    top: int = 0

    @property
    def center(self) -> tuple[float, float]:
        """Return (x, y) in pixels."""
        return self.left + self.width / 2, self.top + self.height / 2

    def inside(self) -> bool:
        """Return whether at least one pixel of background remains on every side."""
        return min(self.left, self.top, SIDE - self.left - self.width, SIDE - self.top - self.height) >= 1

    def near(self, other: "Thing") -> bool:
        return (
            self.left < other.left + other.width + GAP
            and other.left < self.left + self.width + GAP
            and self.top < other.top + other.height + GAP
            and other.top < self.top + self.height + GAP
        )


@dataclass(frozen=True)
class Scene:
    """A background and things, drawn from a seed."""

    seed: int
    level: str
    ground: str
    things: tuple[Thing, ...]
    counted: str  # the name of a shape or the color that a count question asks for


def make_scene(seed: int, crowded: bool = True) -> Scene:
    """Make the scene of a seed. Levels alternate, so consecutive seeds have equally many scenes of each level.

    With `crowded`, things are close together, so that several share a pooling window; otherwise they are scattered.
    """
    rng = Rng(seed)
    level = LEVELS[seed % len(LEVELS)]
    ground = rng.pick(GROUNDS[level])
    counted, repeated = _repeated_shapes(rng)
    things = repeated + _other_things(rng, level, counted, repeated)
    return Scene(seed, level, ground, _placed(rng, things, crowded), counted)


def make_dense_scene(seed: int, crowded: bool = True, numbers: int = 3, shapes: int = 4) -> Scene:
    """Make a scene for the encoder's training, with more numbers and items than the scenes with questions."""
    rng = Rng(seed)
    level = LEVELS[seed % len(LEVELS)]
    ground = rng.pick(GROUNDS[level])
    things = [_number(rng, rng.pick(COLORS)) for _ in range(rng.between(numbers, numbers + 1))]
    things += [_item(rng, rng.pick(COLORS)) for _ in range(2)]
    things += [_shape(rng, rng.pick(SHAPES), rng.pick(COLORS)) for _ in range(shapes)]
    return Scene(seed, level, ground, _placed(rng, things, crowded), "")


def _repeated_shapes(rng: Rng) -> tuple[str, list[Thing]]:
    """Draw one to five shapes that share a name or a color. All counts are equally likely, as the count comes first."""
    count = rng.between(1, MOST_COUNTED)
    if rng.chance(50):
        name = rng.pick(SHAPES)
        colors = rng.shuffled(COLORS)
        return name, [_shape(rng, name, colors[i]) for i in range(count)]
    color = rng.pick(COLORS)
    return color, [_shape(rng, rng.pick(SHAPES), color) for _ in range(count)]


def _other_things(rng: Rng, level: str, counted: str, repeated: list[Thing]) -> list[Thing]:
    """Draw numbers, items and further shapes that do not change the answer of the count question."""
    if level == "flat":
        kinds = [rng.pick(("number", "item"))] + ["shape"] * rng.between(0, 1)
    elif level == "patterned":
        kinds = ["number", "item"] + ["shape"] * rng.between(0, 2)
    else:
        kinds = ["number"] * rng.between(1, 2) + ["item"] * rng.between(1, 2) + ["shape"] * rng.between(1, 3)
    fresh = [color for color in rng.shuffled(COLORS) if color not in {thing.color for thing in repeated}]
    things = []
    for kind in kinds:
        # A unique color lets a question name the thing; a shared color makes the thing a distractor.
        is_unique = bool(fresh) and rng.chance(75)
        color = fresh.pop() if is_unique else rng.pick([color for color in COLORS if color != counted])
        if kind == "number":
            things.append(_number(rng, color))
        elif kind == "item":
            things.append(_item(rng, color))
        else:
            things.append(_shape(rng, rng.pick([name for name in SHAPES if name != counted]), color))
    return things


def _shade(rng: Rng) -> tuple[int, int, int]:
    return rng.between(-14, 14), rng.between(-14, 14), rng.between(-14, 14)


def _shape(rng: Rng, name: str, color: str) -> Thing:
    size = rng.between(9, 15)
    return Thing("shape", name, color, size, size, 0, _shade(rng))


def _number(rng: Rng, color: str) -> Thing:
    digits = rng.between(1, MOST_DIGITS)
    name = str(rng.between(1, 9)) + "".join(str(rng.below(10)) for _ in range(digits - 1))
    tall = rng.below(2)
    return Thing("number", name, color, 6 * digits + 3, 11 + 2 * tall, tall, _shade(rng))


def _item(rng: Rng, color: str) -> Thing:
    size = rng.between(22, 28)
    return Thing("item", rng.pick(ITEMS), color, size, size, rng.below(2**30), _shade(rng))


def _placed(rng: Rng, things: list[Thing], crowded: bool) -> tuple[Thing, ...]:
    """Place the things, large ones first, at any pixel: they are not aligned with patches or pooling windows."""
    order = sorted(things, key=lambda thing: -thing.width * thing.height)
    while True:
        placed: list[Thing] = []
        for thing in order:
            beside = crowded and bool(placed) and rng.chance(65)
            spot = (_spot_beside(rng, thing, placed) if beside else None) or _free_spot(rng, thing, placed)
            if spot is None:
                break
            placed.append(spot)
        else:
            return tuple(placed)


def _free_spot(rng: Rng, thing: Thing, placed: list[Thing]) -> Thing | None:
    for _ in range(60):
        left, top = rng.between(1, SIDE - 1 - thing.width), rng.between(1, SIDE - 1 - thing.height)
        spot = replace(thing, left=left, top=top)
        if not any(spot.near(other) for other in placed):
            return spot
    return None


def _spot_beside(rng: Rng, thing: Thing, placed: list[Thing]) -> Thing | None:
    """Place a thing one to three pixels from another thing, on any side. Return None after 12 failed attempts."""
    for _ in range(12):
        other = rng.pick(placed)
        left = other.left + rng.between(2 - thing.width, other.width - 2)
        top = other.top + rng.between(2 - thing.height, other.height - 2)
        gap = rng.between(GAP, 3)
        if rng.chance(50):
            left = other.left + rng.pick((-thing.width - gap, other.width + gap))
        else:
            top = other.top + rng.pick((-thing.height - gap, other.height + gap))
        spot = replace(thing, left=left, top=top)
        if spot.inside() and not any(spot.near(neighbor) for neighbor in placed):
            return spot
    return None
