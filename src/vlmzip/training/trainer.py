"""transformers' Trainer with the schedule's compressor at each step."""

from __future__ import annotations

import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from vlmzip.compressor import Compressor
from vlmzip.errors import UserError
from vlmzip.files import write_text
from vlmzip.json_text import JsonError, Line, parse, read_lines, write_line
from vlmzip.processor import InputDict
from vlmzip.runtime.facade import CompressedModel
from vlmzip.seeds import mixed
from vlmzip.training import sharding
from vlmzip.training.batches import IGNORE
from vlmzip.training.sampler import EpochSampler
from vlmzip.training.schedule import Schedule, written

#: A function that evaluates a model during a run. It returns a score and other values to log, by name. All processes
#: call it at the same time.
Score = Callable[[CompressedModel], dict[str, float]]
#: The file that is written into a checkpoint last. A checkpoint without it is incomplete.
WHOLE = "whole"
CHECKPOINT = re.compile(r"checkpoint-\d+")
LOG = "log.jsonl"
#: A key that only the last line of a run's log has.
SUMMARY = "train_runtime"


class StagedTrainer(Trainer):
    """A trainer that takes a façade through the stages of a schedule.

    The number of optimiser steps taken decides the stage. So it is the same in every process, under accumulation and
    after a resume. Evaluation uses the schedule's compressor for afterwards. Incomplete checkpoints are ignored.
    Checkpoints of sharded and of unsharded parameters are the same.
    """

    optimizer: Any  # Trainer's types allow None, which they are only before training
    lr_scheduler: Any

    def __init__(
        self,
        compressed: CompressedModel,
        schedule: Schedule,
        *,
        evaluated_with: Compressor,
        score: Score | None = None,
        batch: int,
        longest: int | None = None,
        checkpoints: int = 2,
        lengths: Sequence[int] | None = None,
        sharded: bool = False,
        **settings: Any,
    ) -> None:
        """Prepare the training; `settings` go to transformers' Trainer.

        `score` evaluates the model during training, with the compressor `evaluated_with`. `batch` is the number of
        records per step over all processes. `longest` is the most tokens of a row after compression; nothing is learned
        from longer rows. `checkpoints` is the number of checkpoints to keep. `lengths`, one per
        record, group records of similar length. `sharded` shards the parameters among the processes.
        """
        self.sharded = sharded  # Trainer's constructor calls methods that read it
        super().__init__(compressed, **settings)
        self.compressed, self.schedule, self.evaluated_with = compressed, schedule, evaluated_with
        self._longest = longest
        self._score, self._lengths, self._batch, self._checkpoints = score, lengths, batch, checkpoints
        self._forwards = (-1, 0)  # an optimiser step, and the number of its current forward, from 0
        # The stage of the last step; and sums since the last log: visual tokens over all layers, the same without
        # compression, padding, positions, rows that were too long, and rows.
        self._trained = self._seen = self._of = self._padding = self._positions = self._too_long = self._rows = 0

    def stage(self) -> int:
        """Return the number of the current stage, from 0."""
        return self.schedule.index(Fraction(self.state.global_step, max(1, self.state.max_steps)))

    def training_step(
        self, model: nn.Module, inputs: InputDict, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        self._trained = self.stage()  # the log after a step describes the step's own stage
        self.compressed.switch(self._compressor())
        learned_from = (inputs["labels"] != IGNORE).any(1).tolist()
        loss = super().training_step(model, {**inputs, "pack_rows": True, "longest": self._longest}, num_items_in_batch)
        for image in self.compressed.report.images:
            if not learned_from[image.row]:  # the blank image of a batch without images
                continue
            self._seen += sum(image.by_layer)
            self._of += image.before * len(image.by_layer)
        self._too_long += len(self.compressed.report.too_long)
        self._rows += sum(learned_from)
        source = self.compressed.report.source  # None only for a batch without images; `Collator` adds a blank one
        if source is not None:
            self._padding += int((source < 0).sum())
            self._positions += source.numel()
        return loss

    def _compressor(self) -> Compressor:
        step = self.state.global_step
        self._forwards = (step, self._forwards[1] + 1 if self._forwards[0] == step else 0)
        compressor, salt = self.schedule.stages[self._trained].compressor, self.args.process_index
        salt += self.args.world_size * self._forwards[1]
        step = mixed(self.args.seed, step)  # runs with different seeds draw differently
        return compressor.at_step(step, salt)

    def evaluate(
        self, eval_dataset: object = None, ignore_keys: object = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Score the model with the compressor that it will be used with, then restore the training state."""
        with evaluating(self.compressed, self.evaluated_with) as compressed:
            scores = self._score(compressed) if self._score else {}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and add stage, retention and padding since the last log. Raise `UserError` for a loss of NaN."""
        if "loss" in logs:
            self._refuse_broken(logs)
            logs["stage"] = self._trained + 1
            counts = [self._seen, self._of, self._padding, self._positions, self._too_long, self._rows]
            sums = torch.tensor(counts, device=self.args.device)
            sums = self.accelerator.reduce(sums, "sum")  # over all processes
            seen, of, padding, positions, too_long, rows = sums.tolist()
            if of:
                logs["retention"] = round(seen / of, 4)
            if positions:
                logs["padding"] = round(padding / positions, 4)
            if too_long:
                logs["too_long"] = round(too_long / rows, 4)
            self._seen = self._of = self._padding = self._positions = self._too_long = self._rows = 0
        if SUMMARY in logs:
            logs["train_loss"] = self._mean_loss()
        super().log(logs, start_time)

    def _mean_loss(self) -> float:
        """Return the mean loss over all steps of the run. Trainer's own mean is over the steps since the last start."""
        total, before = 0.0, 0.0
        for line in self.state.log_history:  # checkpoints save it, and `JsonLog` makes Trainer log before each
            if "loss" in line:
                total += line["loss"] * (line["step"] - before)
                before = line["step"]
        return total / max(1.0, before)

    def _refuse_broken(self, logs: dict[str, float]) -> None:
        scaled = self.accelerator.scaler is not None  # a gradient scaler skips steps whose gradients overflow
        for name in ("loss",) if scaled else ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0)):
                raise UserError(
                    f"the {name} is {logs[name]} at step {self.state.global_step:,}, so training cannot continue;"
                    " lower learning_rate and give another out (checkpoints saved so far are unchanged)"
                )

    def _get_train_sampler(self, train_dataset: Dataset[object] | None = None) -> EpochSampler:
        records = len(train_dataset if train_dataset is not None else self.train_dataset)  # type: ignore[arg-type]
        per_epoch = records // self._batch
        return EpochSampler(
            records, self._batch, self.args.seed, lambda: self.state.global_step // per_epoch, lengths=self._lengths
        )

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # every process writes the state of its rng
        if self.args.should_save:
            out = Path(str(self.args.output_dir))
            (out / f"checkpoint-{self.state.global_step}" / WHOLE).touch()
            # Delete old checkpoints only now that the new one is complete; Trainer itself would delete too early.
            for old in whole_checkpoints(out)[: -self._checkpoints]:
                shutil.rmtree(old)

    # --- sharded parameters -----------------------------------------------------------------------------------

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not self.sharded:  # sharding moves each process's own shards
            super()._move_model_to_device(model, device)

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Create the optimiser, after sharding the parameters. By now Trainer has loaded a checkpoint's weights."""
        if self.sharded and self.optimizer is None:
            sharding.shard(self.compressed, self.args.device, bf16=self.args.bf16)
            # Tell accelerate that the model is already wrapped. It would refuse to wrap a sharded model in DDP, and
            # its autocast would keep a copy of every gathered weight until the end of the forward.
            compressed: Any = self.compressed
            compressed._is_accelerate_prepared = True
        return super().create_optimizer(model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.sharded:
            super().save_model(output_dir, _internal_call)
            return
        state = sharding.whole_state(self.compressed, keep=self.args.should_save)
        if self.args.should_save:
            self._save(output_dir, state_dict=state)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = sharding.whole_optimizer(self.optimizer, keep=self.args.should_save)
        if self.args.should_save:
            torch.save(state, os.path.join(output_dir, OPTIMIZER_NAME))
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.sharded or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        # Map the file instead of reading it: a process needs only its shards, and all of it may not fit on its GPU.
        state = torch.load(os.path.join(checkpoint, OPTIMIZER_NAME), map_location="cpu", mmap=True, weights_only=True)
        self.optimizer.load_state_dict(sharding.shard_optimizer_state(state, self.optimizer))
        self.lr_scheduler.load_state_dict(torch.load(os.path.join(checkpoint, SCHEDULER_NAME), weights_only=True))

    def gather(self) -> dict[str, object] | None:
        """Gather a sharded model in the first process, for saving. Every process must call this.

        Return the state dict if the model itself cannot hold the gathered weights (ZeRO-3, as accelerate documents).
        """
        if self.sharded:
            sharding.make_whole(self.compressed, keep=self.args.should_save)
        elif sharding.moves_together(self.compressed):
            return self.accelerator.get_state_dict(self.model_wrapped)
        return None


class Sharded(TrainerCallback):
    """A callback that checks that parameters are still sharded when training begins, after all wrapping."""

    def on_train_begin(
        self, args: object, state: TrainerState, control: TrainerControl, model: nn.Module | None = None, **_: object
    ) -> None:
        assert model is not None  # Trainer gives it
        sharding.check_sharded(model)


class JsonLog(TrainerCallback):
    """A callback that writes every log as a line of JSON, with its step.

    A resumed run first removes the lines after its checkpoint.
    """

    def __init__(self, path: Path, schedule: Schedule) -> None:
        self.path, self.schedule = path, schedule

    def on_train_begin(self, args: object, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if not state.is_world_process_zero:
            return
        lines = read_lines(self.path) if self.path.exists() else ()
        kept = [line.text.decode() for line in lines if _step_of(line) <= state.global_step]
        write_text(self.path, "".join(kept))

    def on_step_end(self, args: object, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Log before each checkpoint: logs are means since the last log, and a resumed run could not finish a mean."""
        if control.should_save or state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(
        self,
        args: object,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: object,
    ) -> None:
        if not state.is_world_process_zero or logs is None:
            return
        line: dict[str, object] = {"step": state.global_step, **logs}
        if "stage" in logs:
            line["cpu_seconds"] = round(time.process_time(), 2)
            line["compressor"] = written(self.schedule.stages[int(logs["stage"]) - 1].compressor)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(write_line(line))


def _step_of(line: Line) -> float:
    """Return the step of a line of the log; infinity for an incomplete line and for the run's summary."""
    try:
        content = parse(line.text)
        return float("inf") if SUMMARY in content or not line.is_whole else float(content["step"])
    except (JsonError, KeyError, TypeError, ValueError):
        return float("inf")


def whole_checkpoints(out: Path) -> list[Path]:
    """Return the complete checkpoints of a run, from first to last."""
    paths = [path for path in out.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name) and (path / WHOLE).exists()]
    return sorted(paths, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the number of optimiser steps after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def remove_torn_checkpoints(out: Path) -> None:
    """Remove the incomplete checkpoints of a run, so that nothing mistakes them for complete ones."""
    for path in out.glob("checkpoint-*"):
        if CHECKPOINT.fullmatch(path.name) and not (path / WHOLE).exists():
            shutil.rmtree(path)


@contextmanager
def evaluating(compressed: CompressedModel, compressor: Compressor) -> Iterator[CompressedModel]:
    """Yield the façade in evaluation mode, with another compressor, and restore both after the block."""
    before, training = compressed.compressor, compressed.training
    compressed.switch(compressor)
    compressed.eval()
    try:
        yield compressed
    finally:
        compressed.switch(before)
        compressed.train(training)
