"""`python -m recipes.mini.examples`: write the example images, and a figure of images by level."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vlmzip.mini.examples import CHOSEN, image
from vlmzip.mini.scene import make_scene
from vlmzip.mini.splits import EXAMPLES, questions_of, test_split
from vlmzip.mini.words import LEVELS

SEARCHED = 60  # test questions, among which is the first of type "where"
BORDER = 4
IMAGES_PER_ROW = 6


def write_examples(folder: Path) -> None:
    """Write the images at 96 x 96, and the question of the demo: the test split's first about a place.

    The processor would blur larger copies slightly, which harms small digits.
    """
    for name, seed in CHOSEN.items():
        image(seed).save(folder / f"{name}.png", optimize=True)
    first = next(question for question in test_split(SEARCHED) if question.type == "where")
    first.image.save(folder / "first.png", optimize=True)
    (folder / "first.txt").write_text(f"{first.question}\n")


def write_figure(path: Path) -> None:
    """Draw a row of images for each level, from the example seeds."""
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
    args = parser.parse_args(arguments)
    if args.examples is not None:
        write_examples(args.examples)
    if args.figure is not None:
        write_figure(args.figure)
    for seed in EXAMPLES[: args.list]:
        scene = make_scene(seed)
        for question in questions_of(scene, most=9):
            print(seed, scene.level, f"{question.text} -> {question.answer}", sep="\t")


if __name__ == "__main__":
    main()
