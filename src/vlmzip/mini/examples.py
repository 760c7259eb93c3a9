"""Example images with a question about each, drawn from seeds that are in no split."""

from PIL import Image

from vlmzip.mini.assets import shipped_assets
from vlmzip.mini.drawing import draw
from vlmzip.mini.scene import make_scene

#: Chosen by hand among the first of `splits.EXAMPLES`: a few things on a plain background, and many on a photo.
CHOSEN = {"flat": 3_000_006, "cluttered": 3_000_014}
#: A question about each, which mini answers correctly, and further ones.
QUESTIONS = {
    "flat": ("what color is the ring ?", "how many crosses are there ?"),
    "cluttered": ("where is the red star ?",),
}


def image(seed: int) -> Image.Image:
    """Return an example image of 96 x 96 pixels."""
    return Image.fromarray(draw(make_scene(seed), shipped_assets("test")))


def asked() -> list[tuple[Image.Image, str]]:
    """Return the example images with their questions."""
    return [(image(CHOSEN[name]), question) for name, questions in QUESTIONS.items() for question in questions]
