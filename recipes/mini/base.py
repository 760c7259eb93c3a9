"""`python -m recipes.mini.base --out DIR`: make mini before its instruction training, in DIR/base/model.

It has the shipped encoder, and a projector and an LLM that have seen some text and captions. If the command is stopped,
the same command resumes.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForImageTextToText

from recipes.mini.export import export
from recipes.mini.instruct import Lessons, train_before_questions
from recipes.mini.loop import Run
from recipes.mini.model import make_model
from recipes.mini.processes import default_count, join_processes, start
from recipes.mini.recipe import Recipe
from recipes.mini.sources import add_arguments, training_assets
from vlmzip.errors import UserError
from vlmzip.mini import weights_folder
from vlmzip.mini.assets import Assets


def write_base(out: Path, assets: Assets) -> Path:
    """Train projector and LLM on text and captions; return the model's folder."""
    recipe, processes = Recipe(), join_processes()
    model: Any = make_model(recipe.shape, recipe.seed)
    shipped = AutoModelForImageTextToText.from_pretrained(weights_folder())
    model.model.vision_tower.load_state_dict(shipped.model.vision_tower.float().state_dict())
    model.to(processes.device)
    folder = out / "base"
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(folder, recipe, processes)
    run.load_model(model)
    train_before_questions(run, model, Lessons(run, model, assets))
    if processes.is_main_process:
        export(model, recipe.shape, folder / "model")
    processes.wait_for_everyone()
    processes.destroy_process_group()
    return folder / "model"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m recipes.mini.base", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=default_count(), help="processes to start")
    add_arguments(parser)
    args = parser.parse_args(arguments)
    start("recipes.mini.base", args.processes, sys.argv[1:] if arguments is None else arguments)
    try:
        print(write_base(args.out, training_assets(args.fashion_mnist, args.cache)))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
