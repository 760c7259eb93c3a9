"""`python -m recipes.mini.train --out DIR`: train mini from scratch. If it is killed, the same command resumes.

On a CPU it starts two processes, which train faster than one process with two threads. You can also start the processes
with torchrun:

    torchrun --nproc_per_node=2 -m recipes.mini.train --out DIR
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from recipes.mini import evaluate
from recipes.mini.encoder import train_encoder
from recipes.mini.export import export
from recipes.mini.instruct import train_language
from recipes.mini.loop import Run
from recipes.mini.model import make_model
from recipes.mini.processes import default_count, join_processes, start
from recipes.mini.recipe import Recipe
from recipes.mini.sources import add_arguments, training_assets
from vlmzip.errors import UserError
from vlmzip.mini.assets import Assets


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m recipes.mini.train", description="Train mini from scratch.")
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints; the model goes to OUT/model")
    parser.add_argument("--scale", type=float, default=1, help="fraction of the recipe's steps (a trial: 0.002)")
    parser.add_argument("--processes", type=int, default=default_count(), help="processes to start")
    add_arguments(parser)
    args = parser.parse_args(arguments)
    start("recipes.mini.train", args.processes, sys.argv[1:] if arguments is None else arguments)
    try:
        train(args.out, Recipe().scaled(args.scale), training_assets(args.fashion_mnist, args.cache))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def train(out: Path, recipe: Recipe, assets: Assets) -> Path:
    """Run all stages, export the model, print its accuracy, and return the model's folder."""
    out.mkdir(parents=True, exist_ok=True)
    processes = join_processes()
    run = Run(out, recipe, processes)
    model = make_model(recipe.shape, recipe.seed)
    model.to(processes.device)
    run.load_model(model)
    if not run.finished("detail"):
        train_encoder(run, model, assets)
    train_language(run, model, assets)
    folder = out / "model"
    if processes.is_main_process:
        export(model, recipe.shape, folder)
        _print_accuracy(folder, recipe)
    processes.wait_for_everyone()
    processes.destroy_process_group()
    return folder


def _print_accuracy(folder: Path, recipe: Recipe) -> None:
    """Print the accuracy on the validation split. A run with fewer steps is measured on fewer questions."""
    full = recipe == Recipe()
    evaluate.main(["--model", str(folder), "--split", "validation", *([] if full else ["--limit", "120"])])


if __name__ == "__main__":
    sys.exit(main())
