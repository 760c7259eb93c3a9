"""`python -m vlmzip.mini.train --out DIR`: mini from nothing. Killed at any moment, the same command goes on.

On a CPU it starts two processes, which train faster than one process of two threads. Under torchrun it is one of the
processes that torchrun started:

    torchrun --nproc_per_node=2 -m vlmzip.mini.train --out DIR
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from vlmzip.children import end_with_launcher
from vlmzip.mini.assets import Assets, AssetsMissing, training_assets
from vlmzip.mini.loop import OtherRecipe, Run
from vlmzip.mini.recipe import Recipe

MOST_PROCESSES = 2  # the shipped weights' number; the batch is divided among them


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parse(arguments)
    if "RANK" not in os.environ and given.processes > 1:
        _become_torchrun(given.processes, list(sys.argv[1:] if arguments is None else arguments))
    end_with_launcher()
    try:
        train(given.out, Recipe().scaled(given.scale), training_assets(given.fashion_mnist, given.cache))
    except (AssetsMissing, OtherRecipe) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m vlmzip.mini.train", description="Trains mini from nothing.")
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints; the model goes to OUT/model")
    parser.add_argument("--scale", type=float, default=1, help="fraction of the recipe's steps (a trial: 0.002)")
    parser.add_argument("--fashion-mnist", type=Path, help="folder of Fashion-MNIST's gz files")
    parser.add_argument("--cache", type=Path, help="where to unpack Fashion-MNIST (default ~/.cache/vlmzip)")
    parser.add_argument("--processes", type=int, default=_sensible_processes(), help="processes to start")
    return parser.parse_args(arguments)


def _sensible_processes() -> int:
    import torch

    return 1 if torch.cuda.is_available() else min(MOST_PROCESSES, os.cpu_count() or 1)


def _become_torchrun(count: int, arguments: list[str]) -> NoReturn:
    """Runs this training in several processes, which torchrun starts in place of this one: no parent is left to die."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    os.execve(sys.executable, [*torchrun, "-m", "vlmzip.mini.train", *arguments], environment)


def train(out: Path, recipe: Recipe, assets: Assets) -> Path:
    """All stages, then the export and its accuracy; the folder of the model."""
    from vlmzip.mini.encoder import train_encoder
    from vlmzip.mini.export import export
    from vlmzip.mini.instruct import train_language
    from vlmzip.mini.model import make_model
    from vlmzip.mini.processes import TrainingProcesses

    out.mkdir(parents=True, exist_ok=True)
    processes = TrainingProcesses()
    run = Run(out, recipe, processes)
    model = make_model(recipe.shape, recipe.seed)
    model.to(processes.device)  # type: ignore[arg-type]
    run.load_model(model)
    if not run.finished("detail"):
        train_encoder(run, model, assets)
    train_language(run, model, assets)
    folder = out / "model"
    if processes.first:
        export(model, recipe.shape, folder)
        _print_accuracy(folder, recipe)
    processes.wait()
    processes.leave()
    return folder


def _print_accuracy(folder: Path, recipe: Recipe) -> None:
    """On the validation split; a run with fewer steps asks fewer questions."""
    from vlmzip.mini import evaluate

    full = recipe == Recipe()
    evaluate.main(["--model", str(folder), "--split", "validation", *([] if full else ["--limit", "120"])])


if __name__ == "__main__":
    sys.exit(main())
