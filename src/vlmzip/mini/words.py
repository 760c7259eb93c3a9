"""The words of mini's world: what can be drawn, how it is called, and what may be answered."""

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
# Fashion-MNIST also has coats and shirts. At 28 grey pixels people confuse them with pullovers and t-shirts: left out.
ITEMS = ("tshirt", "trousers", "pullover", "dress", "sandal", "sneaker", "bag", "boot")
KINDS = ("shape", "number", "item")
CORNERS = ("top left", "top right", "bottom left", "bottom right")
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
    """'red circle' -> 'a red circle'; 'orange ring' -> 'an orange ring'; 'trousers' stay bare."""
    if words.split()[-1] == "trousers":
        return words
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def normalized(answer: str) -> str:
    """Lower case, single spaces, no full stop at the end."""
    return re.sub(r"\s+", " ", answer.lower()).strip().rstrip(".").strip()


def vocabulary() -> list[str]:
    """Every word a question or an answer may hold, each once, digits left out (the tokenizer spells numbers)."""
    words = [*QUESTION_WORDS, *SHAPES, *PLURALS.values(), *COLORS, *ITEMS, *KINDS, *ROLE_WORDS, *MARKS]
    return list(dict.fromkeys(words))
