"""`python -m recipes.mini.examples`: the example images, and a figure of images by level."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vlmzip.mini.assets import shipped_assets
from vlmzip.mini.drawing import draw
from vlmzip.mini.scene import make_scene
from vlmzip.mini.splits import EXAMPLES, questions_of
from vlmzip.mini.words import LEVELS

# Chosen by eye among the first of EXAMPLES: a few things on plain ground, many on a photo.
CHOSEN = {"flat": 3_000_006, "cluttered": 3_000_014}
BORDER = 4
IMAGES_PER_ROW = 6


def image(seed: int) -> Image.Image:
    """An example image, 96 by 96."""
    return Image.fromarray(draw(make_scene(seed), shipped_assets("test")))


def write_examples(folder: Path) -> None:
    """At 96 by 96: enlarged ones come back from the processor a little softened, and small digits suffer."""
    for name, seed in CHOSEN.items():
        image(seed).save(folder / f"{name}.png", optimize=True)


def write_figure(path: Path) -> None:
    """One row of images a level, from the example seeds."""
    rows = []
    for number in range(len(LEVELS)):
        seeds = [seed for seed in EXAMPLES if seed % len(LEVELS) == number][:IMAGES_PER_ROW]
        rows.append(np.concatenate([_framed(image(seed)) for seed in seeds], axis=1))
    Image.fromarray(np.concatenate(rows)).resize(
        (rows[0].shape[1] * 2, rows[0].shape[0] * 2 * len(rows)), Image.Resampling.NEAREST
    ).save(path, optimize=True)


def _framed(image: Image.Image) -> np.ndarray:
    return np.pad(np.asarray(image), ((BORDER, BORDER), (BORDER, BORDER), (0, 0)), constant_values=255)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.mini.examples", description=__doc__)
    parser.add_argument("--examples", type=Path, help="folder for the example images")
    parser.add_argument("--figure", type=Path, help="file for the figure of images by level")
    parser.add_argument("--list", type=int, default=0, help="print the questions about this many example images")
    given = parser.parse_args(arguments)
    if given.examples is not None:
        write_examples(given.examples)
    if given.figure is not None:
        write_figure(given.figure)
    for seed in EXAMPLES[: given.list]:
        scene = make_scene(seed)
        for question in questions_of(scene, most=9):
            print(seed, scene.level, f"{question.text} -> {question.answer}", sep="\t")


if __name__ == "__main__":
    main()
