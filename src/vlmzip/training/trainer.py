"""transformers' Trainer, with a compressor that the schedule chooses for each step."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from vlmzip import spec
from vlmzip.compressor import Compressor
from vlmzip.methods import RandomTokens
from vlmzip.runtime.facade import CompressedModel
from vlmzip.training.random_factor import RandomFactor, mixed
from vlmzip.training.schedule import Schedule

#: Written into a checkpoint when everything else is: one without it was cut short.
WHOLE = "whole"
LOG = "log.jsonl"


class StagedTrainer(Trainer):
    """Trains a façade through the stages of a schedule.

    Which stage it is follows from the optimiser steps taken, so it is the same in every process, under accumulation
    and after a resume. Evaluation runs with the compressor for afterwards. Checkpoints count only when they are whole.
    """

    def __init__(
        self,
        small: CompressedModel,
        schedule: Schedule,
        *,
        evaluated_with: Compressor,
        score: Callable[[CompressedModel], dict[str, float]] | None = None,
        lengths: list[int] | None = None,
        **settings: Any,
    ) -> None:
        """`score` measures the model during training; `lengths` of the records put like ones together."""
        super().__init__(small, **settings)
        self.small, self.schedule, self.evaluated_with = small, schedule, evaluated_with
        self._score, self._lengths = score, lengths
        self._forwards = (-1, 0)
        self._trained = self._seen = self._of = 0

    def stage(self) -> int:
        """The number of the present stage, from 0."""
        return self.schedule.index(Fraction(self.state.global_step, max(1, self.state.max_steps)))

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self._trained = self.stage()  # what is logged after a step is about the stage it was in
        self.small.switch(self._compressor())
        loss = super().training_step(model, inputs, num_items_in_batch)
        for picture in self.small.report.pictures:
            self._seen += sum(picture.by_layer)
            self._of += picture.before * len(picture.by_layer)
        return loss

    def _compressor(self) -> Compressor:
        step = self.state.global_step
        self._forwards = (step, self._forwards[1] + 1 if self._forwards[0] == step else 0)
        compressor, salt = self.schedule.stages[self._trained].compressor, self.args.process_index
        salt += self.args.world_size * self._forwards[1]
        if isinstance(compressor, RandomFactor):
            return compressor.drawn(step, salt)
        if isinstance(compressor, RandomTokens):  # not the same places at every step
            return replace(compressor, seed=mixed(compressor.seed, step, salt))
        return compressor

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Scores the model as it will be used, and goes on training as before."""
        with evaluating(self.small, self.evaluated_with) as small:
            found = self._score(small) if self._score else {}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs["stage"] = self._trained + 1
            if self._of:
                logs["retention"] = round(self._seen / self._of, 4)
            self._seen = self._of = 0
        super().log(logs, start_time)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self._lengths is None:
            return super()._get_train_sampler(train_dataset)
        generator = torch.Generator().manual_seed(self.args.data_seed or self.args.seed)
        together = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthGroupedSampler(together, lengths=self._lengths, generator=generator)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            (Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}" / WHOLE).touch()


class JsonLog(TrainerCallback):
    """Every log as a line of JSON, with the step; a run that resumes goes on behind what is still true."""

    def __init__(self, path: Path, schedule: Schedule) -> None:
        self.path, self.schedule = path, schedule

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        kept = [line for line in lines if _step_of(line) <= state.global_step]
        self.path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        line = {"step": state.global_step, **logs}
        if "stage" in line:
            line["compressor"] = spec.write(self.schedule.stages[line["stage"] - 1].compressor)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _step_of(line: str) -> float:
    """The step of a line of the log; one that was cut short is behind every other."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def latest_checkpoint(out: Path) -> Path | None:
    """The last whole checkpoint; what is none is removed, so that nothing takes it for one."""
    whole = []
    for path in out.glob("checkpoint-*"):
        if (path / WHOLE).exists():
            whole.append(path)
        else:
            shutil.rmtree(path)
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


@contextmanager
def evaluating(small: CompressedModel, compressor: Compressor) -> Iterator[CompressedModel]:
    """The façade with another compressor and in evaluation mode, for a block."""
    before, training = small.compressor, small.training
    small.switch(compressor)
    small.eval()
    try:
        yield small
    finally:
        small.switch(before)
        small.train(training)
