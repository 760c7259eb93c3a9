"""`python -m vlmzip.mini.conversations --out DIR`: mini's training images and questions in LLaVA's JSON format.

What `vlmzip train` reads: records.json, and images beside it. With --base also mini as it is before it learns to
answer: the shipped encoder, and a projector and an LLM that have seen some text and captions.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageTextToText

from vlmzip.mini import weights_folder
from vlmzip.mini.assets import Assets, AssetsMissing, training_assets
from vlmzip.mini.drawing import draw
from vlmzip.mini.export import export
from vlmzip.mini.instruct import Lessons, training_questions
from vlmzip.mini.loop import Run, train_stage
from vlmzip.mini.model import make_model
from vlmzip.mini.processes import TrainingProcesses
from vlmzip.mini.recipe import Recipe
from vlmzip.mini.scene import make_scene
from vlmzip.mini.splits import TRAIN_LANGUAGE, train_seed

#: Images of the pre-training come first in the range; these come behind them.
FIRST = 100_000
TO_A_FOLDER = 1000


def write_conversations(out: Path, count: int, turns: int, assets: Assets) -> Path:
    """`count` images with up to `turns` questions each; returns the path of the records."""
    records = []
    for index in tqdm(range(count), "images"):
        scene = make_scene(train_seed(TRAIN_LANGUAGE, FIRST + index))
        path = Path("images") / str(index // TO_A_FOLDER) / f"{index}.png"
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw(scene, assets)).save(out / path)
        records.append({"id": scene.seed, "image": str(path), "conversations": _said(training_questions(scene, turns))})
    (out / "records.json").write_text(json.dumps(records))
    return out / "records.json"


def _said(pairs: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    said = []
    for number, (question, answer) in enumerate(pairs):
        said.append({"from": "human", "value": question if number else f"<image>\n{question}"})
        said.append({"from": "gpt", "value": answer})
    return said


def write_base(out: Path, assets: Assets) -> Path:
    """mini with its encoder, before it learns to answer; returns its folder. Resumes where it was stopped."""
    recipe = Recipe()
    model: Any = make_model(recipe.shape, recipe.seed)
    shipped = AutoModelForImageTextToText.from_pretrained(weights_folder())
    model.model.vision_tower.load_state_dict(shipped.model.vision_tower.float().state_dict())
    (out / "base").mkdir(parents=True, exist_ok=True)
    run = Run(out / "base", recipe, TrainingProcesses())
    run.load_model(model)
    lessons = Lessons(run, model, assets)
    language = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    both = [*language, *model.model.multi_modal_projector.parameters()]
    if not run.finished("text"):
        train_stage(run, "text", {"model": model}, language, lessons.text_loss)
    train_stage(run, "projector", {"model": model}, both, lessons.caption_loss)
    if run.processes.first:
        export(model, recipe.shape, out / "base" / "model")
    run.processes.wait()
    run.processes.leave()
    return out / "base" / "model"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vlmzip.mini.conversations", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=15_360)
    parser.add_argument("--turns", type=int, default=12, help="questions about an image")
    parser.add_argument("--base", action="store_true", help="instead, make the model before it learns to answer")
    parser.add_argument("--fashion-mnist", type=Path, help="folder of Fashion-MNIST's gz files")
    parser.add_argument("--cache", type=Path, help="where to unpack Fashion-MNIST (default ~/.cache/vlmzip)")
    given = parser.parse_args(arguments)
    try:
        assets = training_assets(given.fashion_mnist, given.cache)
    except AssetsMissing as error:
        print(error, file=sys.stderr)
        return 2
    print(
        write_base(given.out, assets)
        if given.base
        else write_conversations(given.out, given.images, given.turns, assets)
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
