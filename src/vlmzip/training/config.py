"""What a training run is: a YAML file, read once, with every mistake named in a line."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from annotated_types import Ge, Gt, Le, Lt

from vlmzip import schema
from vlmzip.errors import UserError
from vlmzip.files import open_to_read
from vlmzip.schema import Count
from vlmzip.training.schedule import Schedule, read_lasting, read_schedule, read_share
from vlmzip.training.trainer_settings import read_trainer

#: Bytes that a list of settings has at most; a model's weights have more.
LARGEST = 1 << 20
#: Parts of a model that can learn.
Part = Literal["projector", "llm", "vision"]
#: A whole number that may be 0.
Whole = Annotated[int, Ge(0), Le(10**9)]
#: A share, and never all.
BelowOne = Annotated[float, Ge(0), Lt(1)]
#: What NumPy takes, too.
NumpySeed = Annotated[int, Ge(0), Le(2**32 - 1)]


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters on the LLM's linear layers instead of all its weights."""

    r: Count = 128
    """Rank."""
    alpha: Count = 256
    """Their scale is alpha / r."""
    dropout: BelowOne = 0.05
    """On what goes into them, while training."""

    def __post_init__(self) -> None:
        schema.check(self)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is measured during training, with the compressor that the schedule has for afterwards, or another."""

    every: Count
    """Optimiser steps between two evaluations."""
    task: str = "mini"
    """As `vlmzip eval --tasks` takes it; one."""
    limit: Count | None = 200
    """The first questions of the task."""
    compressor: str | None = None
    """Instead of the schedule's."""

    def __post_init__(self) -> None:
        schema.check(self)
        if self.compressor is not None:
            read_lasting("evaluation.compressor", self.compressor)  # refuses what is none


@dataclass(frozen=True, kw_only=True)
class Config:
    """A training run. Paths are as on the command line: from where it is started."""

    model: str
    """mini, a checkpoint folder or a hub id."""
    records: str
    """A file in LLaVA's JSON format."""
    out: str
    """The folder of checkpoints, logs, and of the trained model."""
    images: str | None = None
    """The folder that paths of images start from; default: the records'."""
    schedule: object = "none"
    """A scheme's name, a compressor, or stages; see docs/training.md."""
    learn: tuple[Part, ...] = ("projector", "llm")
    """Which of projector, llm and vision learn; the rest is frozen. The Q-Former's weights always learn."""
    lora: Lora | None = None
    """Adapters on the LLM; llm must be among what learns."""
    fraction: str = "100%"
    """The share of the records that is used, drawn by `seed`."""
    epochs: Annotated[float, Gt(0)] = 1.0
    """Times that each record is seen; `steps` counts instead if it is given."""
    steps: Count | None = None
    """Optimiser steps."""
    batch: Count = 128
    """Records in an optimiser step, over all processes."""
    batch_per_process: Count | None = None
    """Records in one forward; what is missing to `batch` is accumulated. Default: all of the process's share."""
    learning_rate: Annotated[float, Gt(0)] = 2e-5
    """The highest, of AdamW."""
    warmup: BelowOne = 0.03
    """Share of the steps in which the learning rate rises; after them it falls in a cosine."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """AdamW's, on all weights but biases and those of norms."""
    precision: Literal["bf16", "float32"] = "bf16"
    """bf16: automatic mixed precision, on a CPU too."""
    weights: Literal["float32", "bfloat16"] = "float32"
    """What the model is loaded as, whatever the checkpoint has; bfloat16 for what is frozen under LoRA, say."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """transformers' implementation; on a CPU eager may be faster for a small model."""
    gradient_checkpointing: bool = False
    """Compute layers again in the backward instead of keeping what they put out: less memory, more time."""
    max_length: Count = 2048
    """Tokens of a record, visual ones uncompressed; longer records are left out and counted."""
    max_left_out: str = "25%"
    """The largest share of the records that may be left out, going by some that are read before the first step."""
    group_by_length: bool = True
    """Records of like length stand in a batch, so that little is padded."""
    evaluation: Evaluation | None = None
    """Questions that are asked during training."""
    save_every: Count = 500
    """Optimiser steps between checkpoints."""
    checkpoints: Count = 2
    """How many are kept."""
    log_every: Count = 10
    """Optimiser steps between lines of the log."""
    workers: Annotated[int, Ge(0), Le(512)] = 0
    """Processes that read records and images, beside each training process."""
    seed: NumpySeed = 0
    """Of the order of the records, of those chosen by `fraction`, and of fresh weights."""
    sharding: Literal["none", "fsdp"] = "none"
    """fsdp: several processes share weights, gradients and the optimiser's state out, instead of a copy each."""
    text_tokens: Whole = 62
    """Tokens of text beside an image, for what `--explain` counts; LLaVolta's tables fit 62."""
    trainer: Mapping[str, object] = field(default_factory=dict)
    """Further settings of transformers' TrainingArguments, such as deepspeed."""

    def __post_init__(self) -> None:
        schema.check(self)
        schedule = self.schedule_for(32)  # refuses what is none, whatever the depth
        self._check_what_learns(schedule)
        if not 0 < self.share <= 1:
            raise UserError(f"fraction must be a share of the records such as 10% or 0.1, got {self.fraction}")
        if not 0 <= self.most_left_out <= 1:
            raise UserError(f"max_left_out must be a share of the records such as 25% or 0.25, got {self.max_left_out}")
        self._check_trainer()

    def _check_what_learns(self, schedule: Schedule) -> None:
        trained = [part.trained_weights for stage in schedule.stages for part in stage.compressor.stages()]
        if not self.learn and not any(trained):
            raise UserError(f"learn: nothing would; give at least one of {', '.join(get_args(Part))}")
        if self.lora is not None and "llm" not in self.learn:
            raise UserError("lora: adapters are on the LLM; put llm among what learns")

    def _check_trainer(self) -> None:
        if self.trainer.get("fsdp"):
            raise UserError("trainer: fsdp shares nothing out on a CPU, and says nothing; write sharding: fsdp instead")
        if self.sharding != "none" and self.trainer.get("deepspeed"):
            raise UserError("sharding: fsdp does what trainer: deepspeed does; choose one of them")
        self.for_trainer()

    def for_trainer(self) -> dict[str, object]:
        """Return the settings under `trainer`, as TrainingArguments takes them."""
        return read_trainer(self.trainer, self) if self.trainer else {}

    def schedule_for(self, depth: int) -> Schedule:
        """The schedule for an LLM of that many layers."""
        return read_schedule(self.schedule, depth)

    @property
    def share(self) -> Fraction:
        """Of the records, from 0 to 1."""
        return read_share(self.fraction, "fraction:") / (100 if self.fraction.endswith("%") else 1)

    @property
    def most_left_out(self) -> Fraction:
        """Return `max_left_out` as a number from 0 to 1."""
        return read_share(self.max_left_out, "max_left_out:") / (100 if self.max_left_out.endswith("%") else 1)

    def chosen(self, records: int) -> int:
        """How many of so many records are used: their `fraction`, rounded, and one at least."""
        return max(1, round(self.share * records))

    def steps_for(self, records: int) -> int:
        """Optimiser steps of a run on a file of so many records: `steps`, or else the whole ones of all epochs.

        An epoch has as many as the chosen records fill; the rest of them is left over. Raises `UserError` where they
        do not fill one, or where less than an epoch comes to none.
        """
        chosen = self.chosen(records)
        if chosen < self.batch:
            raise UserError(
                f"batch: {chosen:,} records are fewer than the {self.batch:,} of a step; give a smaller batch or a"
                " larger fraction"
            )
        if self.steps is not None:
            return self.steps
        in_epoch = chosen // self.batch
        steps = math.floor(Fraction(str(self.epochs)) * in_epoch)
        if steps == 0:
            raise UserError(f"epochs: {self.epochs:g} of an epoch's {in_epoch:,} steps is none; give more, or steps")
        return steps


def read_config(path: Path, changes: Sequence[str] = ()) -> Config:
    """The run that a YAML file describes, with `changes` such as "steps=100" or "evaluation.every=50".

    Raises `UserError` for a file that cannot be read, a key that there is not, or a value that cannot be.
    """
    try:
        with open_to_read(path) as file:
            text = file.read(LARGEST + 1)
        if len(text) > LARGEST:
            raise UserError(f"{str(path)!r} is larger than any list of settings; give a YAML file, see configs/")
        content = _parse(repr(str(path)), text)
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror or error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{str(path)!r} must be a YAML mapping such as model: mini")
    for change in changes:
        _change(content, change)
    return schema.read(Config, content)


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML's own reader silently takes the last, and half characters."""

    def construct_scalar(self, node: Any) -> Any:
        try:
            node.value.encode()
        except UnicodeEncodeError:
            line = node.start_mark.line + 1
            raise UserError(f"half a character in the text of line {line} (a lone surrogate)") from None
        return super().construct_scalar(node)

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # the reader itself refuses what cannot be a key
            if key.value in seen:
                raise UserError(f"{key.value} stands twice, again in line {key.start_mark.line + 1}; keep one of them")
            seen.add(key.value)
        return node


def _parse(where: str, text: str | bytes) -> Any:
    """What YAML says. Raises `UserError`, which begins with `where`, for what is none."""
    try:
        return yaml.load(text, _Loader)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except RecursionError:
        raise UserError(f"{where}: too many brackets in one another") from None
    except (yaml.YAMLError, ValueError) as error:  # a date of month 13 is a ValueError
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        said = f"{problem} in line {mark.line + 1}" if mark and problem else " ".join(str(error).split())
        raise UserError(f"{where} is not YAML: {said}") from None


def _change(content: dict[str, Any], change: str) -> None:
    key, equals, value = change.partition("=")
    if not equals:
        raise UserError(f"--set {change!r} is no setting; write key=value")
    *outer, last = key.strip().split(".")
    for name in outer:
        content = content.setdefault(name, {})
        if not isinstance(content, dict):
            raise UserError(f"--set {change!r}: {name} has no settings of its own")
    content[last] = _parse(f"--set {change!r}", value)
