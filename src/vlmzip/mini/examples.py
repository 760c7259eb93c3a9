"""Example images with a question about each, drawn from seeds that are in no split."""

from PIL import Image

from vlmzip.mini.assets import shipped_assets
from vlmzip.mini.drawing import draw
from vlmzip.mini.scene import make_scene

#: Chosen by hand among the first of `splits.EXAMPLES`: a few things on a plain background, and many on a photo.
CHOSEN = {"flat": 3_000_006, "cluttered": 3_000_014}
#: One image of each level with a question: about a color, a number, and a count. mini answers each correctly with all
#: tokens, and with a third of them by VisionZip or FastV.
ASKED = {
    3_000_006: "what color is the ring ?",
    3_000_007: "what number do you see ?",
    3_000_035: "how many squares do you see ?",
}


def image(seed: int) -> Image.Image:
    """Return an example image of 96 x 96 pixels."""
    return Image.fromarray(draw(make_scene(seed), shipped_assets("test")))


def asked() -> list[tuple[Image.Image, str]]:
    """Return images with a question about each, which mini answers correctly with and without compression."""
    return [(image(seed), question) for seed, question in ASKED.items()]
