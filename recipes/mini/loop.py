"""The training loop of all stages. A run that is killed at any moment can resume from its checkpoint."""

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from tqdm import tqdm

from recipes.mini.processes import average_gradients, share
from recipes.mini.recipe import ENCODER_TURNS, STAGES, Recipe, RecipeStage
from vlmzip.errors import UserError

CHECKPOINT = "checkpoint.pt"


@dataclass
class Run:
    """A training run: its folder, its recipe, its processes and the content of its last checkpoint.

    Raise `UserError` if the folder has a run with another recipe.
    """

    folder: Path
    recipe: Recipe
    processes: PartialState
    saved: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        path = self.folder / CHECKPOINT
        if path.exists():
            self.saved = torch.load(path, map_location=self.processes.device, weights_only=True)
            self._check_recipe(self.saved["recipe"])

    def _check_recipe(self, saved: dict[str, Any]) -> None:
        """Raise `UserError` if the shape, the seed or a stage that has begun differs from the checkpoint's."""
        assert self.saved is not None
        begun = STAGES[: STAGES.index(self.saved["stage"]) + 1]
        mine = asdict(self.recipe)
        for name in (*begun, *ENCODER_TURNS, "shape", "seed"):
            if mine[name] != saved[name]:
                raise UserError(
                    f"{self.folder} has a run with another {name}: {saved[name]}, not {mine[name]}; give another --out"
                )

    def finished(self, stage: str) -> bool:
        """Return whether the checkpoint is from a later stage."""
        return self.saved is not None and STAGES.index(self.saved["stage"]) > STAGES.index(stage)

    def load_model(self, model: nn.Module) -> None:
        if self.saved is not None:
            model.load_state_dict(self.saved["model"])

    def save(self, stage: str, step: int, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> None:
        if not self.processes.is_main_process:
            return
        states = {name: module.state_dict() for name, module in modules.items()}
        write_atomically(
            {
                "stage": stage,
                "step": step,
                "recipe": asdict(self.recipe),
                "optimizer": optimizer.state_dict(),
                **states,
            },
            self.folder / CHECKPOINT,
        )


def write_atomically(content: dict[str, Any], path: Path) -> None:
    """Write a file so that readers always see the complete old or the complete new file, even after a kill."""
    partial = path.with_suffix(".partial")
    torch.save(content, partial)
    os.replace(partial, path)


def train_stage(
    run: Run,
    name: str,
    modules: dict[str, nn.Module],
    learning: list[nn.Parameter],
    loss_of: Callable[[range], Tensor],
    report: Callable[[int], str] | None = None,
    stop_at: int | None = None,
) -> None:
    """Train `learning` for the steps of a stage. `loss_of` returns the mean loss of a range of image numbers.

    A step depends only on its image numbers, so a resumed run gives the same result as an uninterrupted one. `stop_at`
    ends the stage after that step, as a kill would.
    """
    stage: RecipeStage = getattr(run.recipe, name)
    optimizer = make_optimizer(modules, learning, stage)
    start = _resume(run, name, modules, optimizer)
    silent = not run.processes.is_main_process
    bar = tqdm(range(start, stage.steps), name, initial=start, total=stage.steps, disable=silent)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(stage, step)
        with torch.autocast(run.processes.device.type, torch.bfloat16):
            loss = loss_of(share(run.processes, stage.batch, step))
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        average_gradients(run.processes, learning)
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
        done = step + 1
        if done % run.recipe.save_every == 0 or done == stage.steps:
            run.save(name, done, modules, optimizer)
            if report is not None and run.processes.is_main_process:
                bar.write(f"{name} {done}: {report(done)}")
        if done == stop_at:
            break
    run.processes.wait_for_everyone()


def _resume(run: Run, name: str, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> int:
    """Load the checkpoint if it is from this stage, and return the step to resume from."""
    if run.saved is None or run.saved["stage"] != name:
        return 0
    for key, module in modules.items():
        module.load_state_dict(run.saved[key])
    optimizer.load_state_dict(run.saved["optimizer"])
    return int(run.saved["step"])


def make_optimizer(
    modules: dict[str, nn.Module], learning: list[nn.Parameter], stage: RecipeStage
) -> torch.optim.Optimizer:
    """Make AdamW for the parameters in `learning` and freeze all others. Weight decay is for matrices only."""
    for module in modules.values():
        module.requires_grad_(False)
    for parameter in learning:
        parameter.requires_grad_(True)
    groups = [
        {"params": [p for p in learning if p.dim() >= 2], "weight_decay": stage.weight_decay},
        {"params": [p for p in learning if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=stage.learning_rate, betas=(0.9, 0.98), fused=True)


def learning_rate(stage: RecipeStage, step: int) -> float:
    """Return the learning rate of a step: linear warm-up, then cosine decay to 1 % of the peak."""
    if step < stage.warmup:
        return stage.learning_rate * (step + 1) / stage.warmup
    done = (step - stage.warmup) / max(1, stage.steps - stage.warmup)
    return stage.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
