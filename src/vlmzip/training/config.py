"""The configuration of a training run, read from a YAML file. Every mistake gives a one-line error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal, get_args

import yaml
from annotated_types import Ge, Gt, Le, Lt

from vlmzip import schema
from vlmzip.errors import UserError
from vlmzip.files import open_to_read
from vlmzip.schema import Count
from vlmzip.training.schedule import Schedule, read_lasting, read_schedule, read_share

#: The largest size of a configuration file in bytes; a larger file is probably a model's weights.
LARGEST = 1 << 20
#: The parts of a model that can learn.
Part = Literal["projector", "llm", "vision"]
#: A whole number that may be 0.
Whole = Annotated[int, Ge(0), Le(10**9)]
#: A fraction below 1.
BelowOne = Annotated[float, Ge(0), Lt(1)]
#: A seed that NumPy accepts, too.
NumpySeed = Annotated[int, Ge(0), Le(2**32 - 1)]


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters (LoRA) on the LLM's linear layers, trained instead of all its weights."""

    r: Count = 128
    """Rank of the adapters."""
    alpha: Count = 256
    """The adapters are scaled by alpha / r."""
    dropout: BelowOne = 0.05
    """Dropout probability of the adapters' inputs during training."""

    def __post_init__(self) -> None:
        schema.check(self)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """An evaluation during training, with the compressor that the schedule sets for afterwards or with another one."""

    every: Count
    """Optimiser steps between two evaluations."""
    task: str = "mini"
    """One task, written as for `vlmzip eval --tasks`."""
    limit: Count | None = 200
    """Number of questions, from the start of the task."""
    compressor: str | None = None
    """The compressor to evaluate with, instead of the schedule's for afterwards."""

    def __post_init__(self) -> None:
        schema.check(self)
        if self.compressor is not None:
            read_lasting("evaluation.compressor", self.compressor)  # raises for an invalid compressor


@dataclass(frozen=True, kw_only=True)
class Config:
    """A training run. Relative paths start from the current directory."""

    model: str
    """mini, a checkpoint folder or a hub id."""
    records: str
    """The training records: a file in LLaVA's JSON format."""
    out: str
    """The folder for checkpoints, logs and the trained model."""
    images: str | None = None
    """The folder from which image paths start; default: the folder of the records file."""
    frames: Count | None = None
    """Frames of each video, evenly spaced. Default: as many as the model's processor takes; all of a list of frames."""
    schedule: object = "none"
    """A scheme's name, a compressor, or stages; see docs/training.md."""
    learn: tuple[Part, ...] = ("projector", "llm")
    """Which of projector, llm and vision learn; the rest is frozen. The Q-Former's weights always learn."""
    lora: Lora | None = None
    """Adapters on the LLM; requires llm in `learn`."""
    fraction: str = "100%"
    """The fraction of the records to use, such as 10%; the records are drawn with `seed`."""
    epochs: Annotated[float, Gt(0)] = 1.0
    """How often to use each record; ignored if `steps` is set."""
    steps: Count | None = None
    """Optimiser steps."""
    batch: Count = 128
    """Records per optimiser step, over all processes."""
    batch_per_process: Count | None = None
    """Records per forward pass; gradients are accumulated up to `batch`. Default: the process's part of `batch`."""
    learning_rate: Annotated[float, Gt(0)] = 2e-5
    """AdamW's peak learning rate."""
    warmup: BelowOne = 0.03
    """Fraction of the steps in which the learning rate rises; it then falls along a cosine."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """AdamW's weight decay, for all weights except biases and norms."""
    precision: Literal["bf16", "float32"] = "bf16"
    """bf16 is automatic mixed precision, also on a CPU."""
    weights: Literal["float32", "bfloat16"] = "float32"
    """The dtype to load the model in, whatever the checkpoint has; bfloat16 saves memory if LoRA freezes weights."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """The attention implementation of transformers; on a CPU, eager can be faster for a small model."""
    gradient_checkpointing: bool = False
    """Recompute layers in the backward pass instead of storing their outputs: less memory, more time."""
    max_length: Count = 2048
    """Tokens per record that the LLM gets, after compression before it; longer records are left out and counted."""
    max_left_out: str = "25%"
    """The largest fraction of the records to leave out, estimated from a sample before the first step."""
    group_by_length: bool = True
    """Put records of similar length into a batch, so that there is little padding."""
    evaluation: Evaluation | None = None
    """Evaluation during training."""
    save_every: Count = 500
    """Optimiser steps between checkpoints."""
    checkpoints: Count = 2
    """How many checkpoints to keep."""
    log_every: Count = 10
    """Optimiser steps between lines of the log."""
    workers: Annotated[int, Ge(0), Le(512)] = 0
    """Processes that read records and images, per training process."""
    seed: NumpySeed = 0
    """Seed of the order of the records, of the choice by `fraction`, and of new weights."""
    sharding: Literal["none", "fsdp"] = "none"
    """fsdp splits weights, gradients and the optimiser's state between processes instead of copying them."""
    text_tokens: Whole = 62
    """Text tokens per image that `--explain` assumes; 62 fits LLaVolta's tables."""
    trainer: Mapping[str, object] = field(default_factory=dict)
    """Further settings of transformers' TrainingArguments, such as deepspeed."""

    def __post_init__(self) -> None:
        schema.check(self)
        schedule = self.schedule_for(32)  # raises for a schedule that is invalid at any depth
        self._check_what_learns(schedule)
        if not 0 < self.share <= 1:
            raise UserError(f"fraction must be a share of the records such as 10% or 0.1, got {self.fraction}")
        if not 0 <= self.most_left_out <= 1:
            raise UserError(f"max_left_out must be a share of the records such as 25% or 0.25, got {self.max_left_out}")
        self._check_trainer()

    def _check_what_learns(self, schedule: Schedule) -> None:
        trained = [part.trained_weights for stage in schedule.stages for part in stage.compressor.stages()]
        if not self.learn and not any(trained):
            raise UserError(f"learn must not be empty; give at least one of {', '.join(get_args(Part))}")
        if self.lora is not None and "llm" not in self.learn:
            raise UserError("lora trains the LLM, so learn must include llm")

    def _check_trainer(self) -> None:
        if self.trainer.get("fsdp"):
            raise UserError("trainer: fsdp is ignored by transformers on a CPU; write sharding: fsdp instead")
        if self.sharding != "none" and self.trainer.get("deepspeed"):
            raise UserError("sharding: fsdp and trainer: deepspeed both split the model; choose one of them")
        self.for_trainer()

    def for_trainer(self) -> dict[str, object]:
        """Return the settings under `trainer`, as TrainingArguments takes them."""
        if not self.trainer:
            return {}
        from vlmzip.training.trainer_settings import read_trainer  # imports TrainingArguments, which takes a second

        return read_trainer(self.trainer, self)

    def schedule_for(self, depth: int) -> Schedule:
        """Return the schedule for an LLM of `depth` layers."""
        return read_schedule(self.schedule, depth)

    @property
    def share(self) -> Fraction:
        """Return `fraction` as a number from 0 to 1."""
        return read_share(self.fraction, "fraction:") / (100 if self.fraction.endswith("%") else 1)

    @property
    def most_left_out(self) -> Fraction:
        """Return `max_left_out` as a number from 0 to 1."""
        return read_share(self.max_left_out, "max_left_out:") / (100 if self.max_left_out.endswith("%") else 1)

    def chosen(self, records: int) -> int:
        """Return how many of `records` records are used: their `fraction`, rounded, at least 1."""
        return max(1, round(self.share * records))

    def steps_for(self, records: int) -> int:
        """Return the optimiser steps of a run on a file of `records` records: `steps`, or the steps of all epochs.

        An epoch has as many steps as the chosen records fill; records that do not fill a step are left over. Raise
        `UserError` if the records do not fill a step, or if a fraction of an epoch has no whole step.
        """
        chosen = self.chosen(records)
        if chosen < self.batch:
            raise UserError(
                f"batch: a step needs {self.batch:,} records, but there are {chosen:,}; give a smaller batch or a"
                " larger fraction"
            )
        if self.steps is not None:
            return self.steps
        in_epoch = chosen // self.batch
        steps = math.floor(Fraction(str(self.epochs)) * in_epoch)
        if steps == 0:
            raise UserError(
                f"epochs: {self.epochs:g} of an epoch's {in_epoch:,} steps is less than 1 step; give more epochs, or"
                " give steps"
            )
        return steps


def read_config(path: Path, changes: Sequence[str] = ()) -> Config:
    """Read a run from a YAML file and apply `changes` such as "steps=100" or "evaluation.every=50".

    Raise `UserError` for a file that cannot be read, an unknown key or an invalid value.
    """
    try:
        with open_to_read(path) as file:
            text = file.read(LARGEST + 1)
        if len(text) > LARGEST:
            raise UserError(f"{str(path)!r} is too large for a configuration; give a YAML file, see configs/")
        content = _parse(repr(str(path)), text)
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror or error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{str(path)!r} must be a YAML mapping such as model: mini")
    for change in changes:
        _change(content, change)
    return schema.read(Config, content)


class _Loader(yaml.SafeLoader):
    """A YAML loader that refuses repeated keys and lone surrogates.

    PyYAML's own loader silently takes the last of two equal keys.
    """

    def construct_scalar(self, node: yaml.ScalarNode) -> object:
        try:
            node.value.encode()
        except UnicodeEncodeError:
            line = node.start_mark.line + 1
            raise UserError(f"half a character in the text of line {line} (a lone surrogate)") from None
        return super().construct_scalar(node)

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # PyYAML itself raises for invalid keys
            if key.value in seen:
                raise UserError(f"{key.value} is repeated in line {key.start_mark.line + 1}; keep one of them")
            seen.add(key.value)
        return node


def _parse(where: str, text: str | bytes) -> object:
    """Parse YAML text. Raise `UserError`, with a message that starts with `where`, for invalid YAML."""
    try:
        return yaml.load(text, _Loader)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except RecursionError:
        raise UserError(f"{where} is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # a date of month 13 is a ValueError
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        reason = f"{problem} in line {mark.line + 1}" if mark and problem else " ".join(str(error).split())
        raise UserError(f"{where} is not YAML: {reason}") from None


def _change(content: dict[str, object], change: str) -> None:
    key, equals, value = change.partition("=")
    if not equals:
        raise UserError(f"--set must be key=value, got {change!r}")
    *outer, last = key.strip().split(".")
    for name in outer:
        part = content.setdefault(name, {})
        if not isinstance(part, dict):
            raise UserError(f"--set {change!r}: {name} has no settings inside it")
        content = part
    content[last] = _parse(f"--set {change!r}", value)
