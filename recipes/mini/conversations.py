"""`python -m recipes.mini.conversations --out DIR`: write mini's training data in LLaVA's JSON format.

`vlmzip train` reads it: DIR/records.json, and a folder of images next to it.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from recipes.mini.instruct import training_questions
from recipes.mini.sources import add_arguments, training_assets
from vlmzip.errors import UserError
from vlmzip.mini.assets import Assets
from vlmzip.mini.drawing import draw
from vlmzip.mini.scene import make_scene
from vlmzip.mini.splits import TRAIN_LANGUAGE, train_seed

#: The first image in the range of training seeds; the base has seen the images before it (`recipes/mini/base.py`).
FIRST = 100_000
IMAGES, TURNS = 15_360, 12
IMAGES_PER_FOLDER = 1000


def write_conversations(out: Path, count: int, turns: int, assets: Assets) -> Path:
    """Draw `count` images and ask up to `turns` questions about each; return the path of the records."""
    records = []
    for index in tqdm(range(count), "images"):
        scene = make_scene(train_seed(TRAIN_LANGUAGE, FIRST + index))
        path = Path("images") / str(index // IMAGES_PER_FOLDER) / f"{index}.png"
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw(scene, assets)).save(out / path)
        turns_of_image = _as_turns(training_questions(scene, turns))
        records.append({"id": scene.seed, "image": str(path), "conversations": turns_of_image})
    (out / "records.json").write_text(json.dumps(records))
    return out / "records.json"


def _as_turns(pairs: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """Return (question, answer) pairs in LLaVA's format, with the image before the first question."""
    turns = []
    for number, (question, answer) in enumerate(pairs):
        turns.append({"from": "human", "value": question if number else f"<image>\n{question}"})
        turns.append({"from": "gpt", "value": answer})
    return turns


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m recipes.mini.conversations", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--turns", type=int, default=TURNS, help="questions about an image")
    add_arguments(parser)
    args = parser.parse_args(arguments)
    try:
        assets = training_assets(args.fashion_mnist, args.cache)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(write_conversations(args.out, args.images, args.turns, assets))
    return 0


if __name__ == "__main__":
    sys.exit(main())
