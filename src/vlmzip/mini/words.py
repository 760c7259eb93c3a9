"""The words of mini's world: names of the things in its images, and the words of questions and answers."""

import re

SHAPES = ("circle", "square", "triangle", "cross", "star", "ring")
PLURALS = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "cross": "crosses",
    "star": "stars",
    "ring": "rings",
}
COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
# Fashion-MNIST's coats and shirts are left out: at 28 x 28 grey pixels they look like pullovers and t-shirts.
ITEMS = ("tshirt", "trousers", "pullover", "dress", "sandal", "sneaker", "bag", "boot")
KINDS = ("shape", "number", "item")
RELATIONS = ("left", "right", "above", "below")
LEVELS = ("flat", "patterned", "cluttered")
TYPES = ("exist", "count", "color", "shape", "where", "relation", "read", "item", "kind")
MOST_COUNTED = 5
MOST_DIGITS = 3

QUESTION_WORDS = (
    "a", "above", "an", "are", "below", "bottom", "color", "corner", "count", "do", "how", "in", "is", "it", "item",
    "kind", "left", "many", "number", "of", "one", "or", "read", "right", "shape", "shapes", "shown", "the",
    "there", "thing", "things", "top", "what", "where", "which", "you", "see", "no", "yes",
)  # fmt: skip
ROLE_WORDS = ("user", "assistant")
MARKS = ("?", ":", ".", ",")


def with_article(words: str) -> str:
    """Add an article: 'red circle' -> 'a red circle', 'orange ring' -> 'an orange ring'. 'trousers' get none."""
    if words.split()[-1] == "trousers":
        return words
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def normalized(answer: str) -> str:
    """Return the answer in lower case, with single spaces and without a full stop at the end."""
    return re.sub(r"\s+", " ", answer.lower()).strip().rstrip(".").strip()


def vocabulary() -> list[str]:
    """Return every word of questions and answers once, without digits (the tokenizer spells numbers)."""
    words = [*QUESTION_WORDS, *SHAPES, *PLURALS.values(), *COLORS, *ITEMS, *KINDS, *ROLE_WORDS, *MARKS]
    return list(dict.fromkeys(words))
