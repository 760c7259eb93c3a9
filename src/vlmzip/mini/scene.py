"""What is in a picture, before a pixel is drawn: things with a name, a color and a place, on a ground."""

from dataclasses import dataclass, replace

from vlmzip.mini.dice import Dice
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
    """One drawn thing. `left`, `top`, `width` and `height` are pixels.

    `look` is a number for the drawing: which crop an item is, whether digits are tall.
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
        """(x, y) in pixels."""
        return self.left + self.width / 2, self.top + self.height / 2

    def inside(self) -> bool:
        """Whether a pixel of ground is left on every side."""
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
    seed: int
    level: str
    ground: str
    things: tuple[Thing, ...]
    counted: str  # what a count question asks for: the name of a shape, or a color


def make_scene(seed: int, crowded: bool = True) -> Scene:
    """The scene of a seed. Levels take turns, so any run of seeds holds as many of each.

    Things crowd together, so that several share a pooling window; without `crowded` they are scattered.
    """
    dice = Dice(seed)
    level = LEVELS[seed % len(LEVELS)]
    ground = dice.pick(GROUNDS[level])
    counted, repeated = _repeated_shapes(dice)
    things = repeated + _other_things(dice, level, counted, repeated)
    return Scene(seed, level, ground, _placed(dice, things, crowded), counted)


def make_dense_scene(seed: int, crowded: bool = True, numbers: int = 3, shapes: int = 4) -> Scene:
    """A scene for the encoder only, with more to read and to recognize than the questions' scenes hold."""
    dice = Dice(seed)
    level = LEVELS[seed % len(LEVELS)]
    ground = dice.pick(GROUNDS[level])
    things = [_number(dice, dice.pick(COLORS)) for _ in range(dice.between(numbers, numbers + 1))]
    things += [_item(dice, dice.pick(COLORS)) for _ in range(2)]
    things += [_shape(dice, dice.pick(SHAPES), dice.pick(COLORS)) for _ in range(shapes)]
    return Scene(seed, level, ground, _placed(dice, things, crowded), "")


def _repeated_shapes(dice: Dice) -> tuple[str, list[Thing]]:
    """One to five shapes that share a name or a color. How many is drawn first, so every count is as likely."""
    count = dice.between(1, MOST_COUNTED)
    if dice.chance(50):
        name = dice.pick(SHAPES)
        colors = dice.shuffled(COLORS)
        return name, [_shape(dice, name, colors[i]) for i in range(count)]
    color = dice.pick(COLORS)
    return color, [_shape(dice, dice.pick(SHAPES), color) for _ in range(count)]


def _other_things(dice: Dice, level: str, counted: str, repeated: list[Thing]) -> list[Thing]:
    """Numbers, items and further shapes; none of them joins the counted shapes."""
    if level == "flat":
        kinds = [dice.pick(("number", "item"))] + ["shape"] * dice.between(0, 1)
    elif level == "patterned":
        kinds = ["number", "item"] + ["shape"] * dice.between(0, 2)
    else:
        kinds = ["number"] * dice.between(1, 2) + ["item"] * dice.between(1, 2) + ["shape"] * dice.between(1, 3)
    fresh = [color for color in dice.shuffled(COLORS) if color not in {thing.color for thing in repeated}]
    things = []
    for kind in kinds:
        # A color of its own lets a question name the thing; a shared one makes it a distractor.
        own = bool(fresh) and dice.chance(75)
        color = fresh.pop() if own else dice.pick([color for color in COLORS if color != counted])
        if kind == "number":
            things.append(_number(dice, color))
        elif kind == "item":
            things.append(_item(dice, color))
        else:
            things.append(_shape(dice, dice.pick([name for name in SHAPES if name != counted]), color))
    return things


def _shade(dice: Dice) -> tuple[int, int, int]:
    return dice.between(-14, 14), dice.between(-14, 14), dice.between(-14, 14)


def _shape(dice: Dice, name: str, color: str) -> Thing:
    size = dice.between(9, 15)
    return Thing("shape", name, color, size, size, 0, _shade(dice))


def _number(dice: Dice, color: str) -> Thing:
    digits = dice.between(1, MOST_DIGITS)
    name = str(dice.between(1, 9)) + "".join(str(dice.below(10)) for _ in range(digits - 1))
    tall = dice.below(2)
    return Thing("number", name, color, 6 * digits + 3, 11 + 2 * tall, tall, _shade(dice))


def _item(dice: Dice, color: str) -> Thing:
    size = dice.between(22, 28)
    return Thing("item", dice.pick(ITEMS), color, size, size, dice.below(2**30), _shade(dice))


def _placed(dice: Dice, things: list[Thing], crowded: bool) -> tuple[Thing, ...]:
    """Any pixel will do for a place, so that nothing lines up with patches or pooling windows. Large things first."""
    order = sorted(things, key=lambda thing: -thing.width * thing.height)
    while True:
        placed: list[Thing] = []
        for thing in order:
            beside = crowded and bool(placed) and dice.chance(65)
            spot = (_spot_beside(dice, thing, placed) if beside else None) or _free_spot(dice, thing, placed)
            if spot is None:
                break
            placed.append(spot)
        else:
            return tuple(placed)


def _free_spot(dice: Dice, thing: Thing, placed: list[Thing]) -> Thing | None:
    for _ in range(60):
        left, top = dice.between(1, SIDE - 1 - thing.width), dice.between(1, SIDE - 1 - thing.height)
        spot = replace(thing, left=left, top=top)
        if not any(spot.near(other) for other in placed):
            return spot
    return None


def _spot_beside(dice: Dice, thing: Thing, placed: list[Thing]) -> Thing | None:
    """One to three pixels from another thing, on any side of it."""
    for _ in range(12):
        other = dice.pick(placed)
        left = other.left + dice.between(2 - thing.width, other.width - 2)
        top = other.top + dice.between(2 - thing.height, other.height - 2)
        gap = dice.between(GAP, 3)
        if dice.chance(50):
            left = other.left + dice.pick((-thing.width - gap, other.width + gap))
        else:
            top = other.top + dice.pick((-thing.height - gap, other.height + gap))
        spot = replace(thing, left=left, top=top)
        if spot.inside() and not any(spot.near(one) for one in placed):
            return spot
    return None
