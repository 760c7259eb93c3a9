"""Questions about a scene, with answers taken from the scene.

If a scene allows several answers, the answer is drawn first and then a question with this answer. Answers are therefore
hard to guess without the image.
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

OFF_CENTER = 8  # least distance in pixels of a "where" question's thing from the image's middle lines
MOST_NEW_TOKENS = 6  # of an answer: up to three words or digits and </s>, and two more for wrong answers
APART = 14  # least distance in pixels between the centers of the two things of a "relation" question


@dataclass(frozen=True)
class Question:
    """A question about a scene, with its answer."""

    type: str
    text: str
    answer: str


@dataclass(frozen=True)
class ImageQuestion:
    """A question about an image. The image is drawn from `seed`."""

    seed: int
    image: "Image.Image"
    question: str
    answer: str
    type: str
    level: str


def ask(scene: Scene, rng: Rng, question_type: str) -> Question | None:
    """Return a question of a type about the scene, or None if the scene allows no such question."""
    pair = MAKERS[question_type](scene, rng)
    return None if pair is None else Question(question_type, *pair)


def ask_all(scene: Scene, rng: Rng, most: int) -> list[Question]:
    """Return up to `most` questions of different types, in random order."""
    questions = (ask(scene, rng, question_type) for question_type in rng.shuffled(TYPES))
    return [question for question in questions if question is not None][:most]


# ---------------------------------------------------------------- naming things


def names(scene: Scene) -> dict[Thing, str]:
    """Return the shortest unique names of things: 'the star', else 'the red star', else no entry."""
    by_name = Counter(_word(thing) for thing in scene.things)
    by_both = Counter((_word(thing), thing.color) for thing in scene.things)
    unique = {}
    for thing in scene.things:
        if by_name[_word(thing)] == 1:
            unique[thing] = f"the {_word(thing)}"
        elif by_both[_word(thing), thing.color] == 1:
            unique[thing] = f"the {thing.color} {_word(thing)}"
    return unique


def _word(thing: Thing) -> str:
    return "number" if thing.kind == "number" else thing.name


def _only_of_its_color(things: list[Thing]) -> list[Thing]:
    colors = Counter(thing.color for thing in things)
    return [thing for thing in things if colors[thing.color] == 1]


def _of_kind(scene: Scene, kind: str) -> list[Thing]:
    return [thing for thing in scene.things if thing.kind == kind]


# ---------------------------------------------------------------- types: each returns (question, answer) or None


def _exist(scene: Scene, rng: Rng) -> tuple[str, str] | None:
    shapes = _of_kind(scene, "shape")
    pairs = {(thing.color, thing.name) for thing in shapes}
    answer = rng.pick(("yes", "no"))
    if answer == "yes":
        color, name = rng.pick(sorted(pairs))
    else:
        # The color and the shape are both in the image, but not in one thing, so that both must be looked at together.
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
    """Return the corner of a thing, or '' for things close to the image's middle lines."""
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
    """Draw the answer among all three kinds, so that no kind is favored. Return None if the scene does not have it."""
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
