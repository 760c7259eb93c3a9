"""Questions about a scene, with answers read off the scene itself.

Wherever the scene leaves a choice, the answer is drawn first and a question that has it is looked for, so that a reader
who never sees the image gains little.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlmzip.mini.rng import Rng
from vlmzip.mini.scene import SIDE, Scene, Thing
from vlmzip.mini.words import COLORS, KINDS, PLURALS, SHAPES, TYPES, with_article

if TYPE_CHECKING:
    from PIL import Image

OFF_CENTER = 8  # pixels between a thing that "where" asks for and the lines that divide the corners
MOST_NEW_TOKENS = 6  # of an answer: three words or digits and </s>, and room to be wrong
APART = 14  # pixels between the centers of two things that "relation" compares


@dataclass(frozen=True)
class Question:
    type: str
    text: str
    answer: str


@dataclass(frozen=True)
class ImageQuestion:
    """One question about one image. `seed` is what the image is drawn from."""

    seed: int
    image: "Image.Image"
    question: str
    answer: str
    type: str
    level: str


def ask(scene: Scene, rng: Rng, question_type: str) -> Question | None:
    """A question of that type about the scene, or None where the scene has none."""
    found = MAKERS[question_type](scene, rng)
    return None if found is None else Question(question_type, *found)


def ask_all(scene: Scene, rng: Rng, most: int) -> list[Question]:
    """Up to `most` questions of different types, in random order."""
    made = (ask(scene, rng, question_type) for question_type in rng.shuffled(TYPES))
    return [question for question in made if question is not None][:most]


# ---------------------------------------------------------------- naming things


def names(scene: Scene) -> dict[Thing, str]:
    """The shortest words that mean one thing of the scene only: 'the star', else 'the red star', else none."""
    by_name = Counter(_word(thing) for thing in scene.things)
    by_both = Counter((_word(thing), thing.color) for thing in scene.things)
    found = {}
    for thing in scene.things:
        if by_name[_word(thing)] == 1:
            found[thing] = f"the {_word(thing)}"
        elif by_both[_word(thing), thing.color] == 1:
            found[thing] = f"the {thing.color} {_word(thing)}"
    return found


def _word(thing: Thing) -> str:
    return "number" if thing.kind == "number" else thing.name


def _only_of_its_color(things: list[Thing]) -> list[Thing]:
    colors = Counter(thing.color for thing in things)
    return [thing for thing in things if colors[thing.color] == 1]


def _of_kind(scene: Scene, kind: str) -> list[Thing]:
    return [thing for thing in scene.things if thing.kind == kind]


# ---------------------------------------------------------------- one function a type: (question, answer) or None


def _exist(scene: Scene, rng: Rng) -> tuple[str, str] | None:
    shapes = _of_kind(scene, "shape")
    pairs = {(thing.color, thing.name) for thing in shapes}
    answer = rng.pick(("yes", "no"))
    if answer == "yes":
        color, name = rng.pick(sorted(pairs))
    else:
        # The color is there and the shape is there, only not together: both must be looked at in one place.
        absent = {(thing.color, other.name) for thing in scene.things for other in shapes} - pairs
        if not absent:
            absent = {(color, thing.name) for color in COLORS for thing in shapes} - pairs
        color, name = rng.pick(sorted(absent))
    what = with_article(f"{color} {name}")
    return rng.pick((f"is there {what} ?", f"do you see {what} ?")), answer


def _count(scene: Scene, rng: Rng) -> tuple[str, str] | None:
    counted = scene.counted
    if counted in SHAPES:
        count, what = sum(thing.name == counted for thing in scene.things), PLURALS[counted]
    else:
        count, what = sum(thing.color == counted for thing in _of_kind(scene, "shape")), f"{counted} shapes"
    return rng.pick((f"how many {what} are there ?", f"how many {what} do you see ?")), str(count)


def _color(scene: Scene, rng: Rng) -> tuple[str, str] | None:
    single = [thing for thing, name in names(scene).items() if name == f"the {_word(thing)}"]
    if not single:
        return None
    thing = rng.pick(single)
    return rng.pick((f"what color is the {_word(thing)} ?", f"what is the color of the {_word(thing)} ?")), thing.color


def _shape(scene: Scene, rng: Rng) -> tuple[str, str] | None:
    single = _only_of_its_color(_of_kind(scene, "shape"))
    if not single:
        return None
    thing = rng.pick(single)
    return rng.pick((f"what shape is {thing.color} ?", f"which shape is {thing.color} ?")), thing.name


def _where(scene: Scene, rng: Rng) -> tuple[str, str] | None:
    named = [(thing, name) for thing, name in names(scene).items() if _corner(thing)]
    if not named:
        return None
    thing, name = rng.pick(named)
    return rng.pick((f"where is {name} ?", f"in which corner is {name} ?")), _corner(thing)


def _corner(thing: Thing) -> str:
    """'' for things close to the middle lines."""
    x, y = thing.center
    if min(abs(x - SIDE / 2), abs(y - SIDE / 2)) < OFF_CENTER:
        return ""
    return f"{'top' if y < SIDE / 2 else 'bottom'} {'left' if x < SIDE / 2 else 'right'}"


def _relation(scene: Scene, rng: Rng) -> tuple[str, str] | None:
    named = list(names(scene).items())
    sideways = rng.chance(50)
    axis = 0 if sideways else 1
    pairs = [(a, b) for a in named for b in named if a[0].center[axis] <= b[0].center[axis] - APART]
    if not pairs:
        return None
    (_, first), (_, second) = rng.pick(pairs)
    answer = rng.pick(("left", "right") if sideways else ("above", "below"))
    if answer in ("right", "below"):
        first, second = second, first
    choice = "left or right of" if sideways else "above or below"
    return f"is {first} {choice} {second} ?", answer


def _read(scene: Scene, rng: Rng) -> tuple[str, str] | None:
    numbers = _of_kind(scene, "number")
    if len(numbers) == 1:
        return rng.pick(("what number is shown ?", "what number do you see ?", "read the number .")), numbers[0].name
    return _one_by_color(numbers, rng, "number")


def _item(scene: Scene, rng: Rng) -> tuple[str, str] | None:
    items = _of_kind(scene, "item")
    if len(items) == 1:
        return rng.pick(("what item is there ?", "what item do you see ?", "which item is it ?")), items[0].name
    return _one_by_color(items, rng, "item")


def _one_by_color(things: list[Thing], rng: Rng, word: str) -> tuple[str, str] | None:
    single = _only_of_its_color(things)
    if not single:
        return None
    thing = rng.pick(single)
    return rng.pick((f"what {word} is {thing.color} ?", f"what is the {thing.color} {word} ?")), thing.name


def _kind(scene: Scene, rng: Rng) -> tuple[str, str] | None:
    """Draws the answer among all three kinds and gives up where the scene has none, so that no kind is favored."""
    answer = rng.pick(KINDS)
    single = [thing for thing in _only_of_its_color(list(scene.things)) if thing.kind == answer]
    if not single:
        return None
    color = rng.pick(single).color
    return rng.pick((f"what kind of thing is {color} ?", f"what kind is the {color} thing ?")), answer


MAKERS: dict[str, Callable[[Scene, Rng], tuple[str, str] | None]] = {
    "exist": _exist,
    "count": _count,
    "color": _color,
    "shape": _shape,
    "where": _where,
    "relation": _relation,
    "read": _read,
    "item": _item,
    "kind": _kind,
}
