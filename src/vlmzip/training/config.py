"""What a training run is: a YAML file, read once, with every mistake named in a line."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from vlmzip.compressor import check_choice
from vlmzip.errors import UserError
from vlmzip.files import open_to_read
from vlmzip.training.schedule import Schedule, read_lasting, read_schedule, read_share, refuse_unknown
from vlmzip.training.trainer_settings import read_trainer

#: Bytes that a list of settings has at most; a model's weights have more.
LARGEST = 1 << 20
#: Parts of a model that can learn.
PARTS = ("projector", "llm", "vision")
#: The largest count; no run needs as much, and some counts are memory or processes.
MOST = 10**9
#: What a number can be: in words, and whether one is.
Range = tuple[str, Callable[[float], bool]]
COUNT_FROM_0: Range = (f"at least 0, at most {MOST:,}", lambda value: 0 <= value <= MOST)
COUNT: Range = (f"at least 1, at most {MOST:,}", lambda value: 1 <= value <= MOST)
WORKERS: Range = ("at least 0, at most 512", lambda value: 0 <= value <= 512)
FROM_0: Range = ("at least 0", lambda value: 0 <= value < math.inf)
ABOVE_0: Range = ("a number above 0", lambda value: 0 < value < math.inf)
BELOW_1: Range = ("at least 0 and less than 1", lambda value: 0 <= value < 1)
SEED: Range = ("0 to 4294967295", lambda value: 0 <= value < 2**32)  # NumPy's seeds
RANGES: dict[str, Range] = {
    "steps": COUNT,
    "epochs": ABOVE_0,
    "batch": COUNT,
    "batch_per_process": COUNT,
    "learning_rate": ABOVE_0,
    "warmup": BELOW_1,
    "weight_decay": FROM_0,
    "max_length": COUNT,
    "save_every": COUNT,
    "checkpoints": COUNT,
    "log_every": COUNT,
    "workers": WORKERS,
    "seed": SEED,
    "text_tokens": COUNT_FROM_0,
}
#: What a value is called that a setting does not take.
KINDS = {int: "whole number", float: "number", bool: "true or false", str: "text"}


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters on the LLM's linear layers instead of all its weights."""

    r: int = 128
    """Rank."""
    alpha: int = 256
    """Their scale is alpha / r."""
    dropout: float = 0.05
    """On what goes into them, while training."""

    def __post_init__(self) -> None:
        check_ranges("lora.", self, {"r": COUNT, "alpha": COUNT, "dropout": BELOW_1})


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is measured during training, with the compressor that the schedule has for afterwards, or another."""

    every: int
    """Optimiser steps between two evaluations."""
    task: str = "mini"
    """As `vlmzip eval --tasks` takes it; one."""
    limit: int | None = 200
    """The first questions of the task."""
    compressor: str | None = None
    """Instead of the schedule's."""

    def __post_init__(self) -> None:
        check_ranges("evaluation.", self, {"every": COUNT, "limit": COUNT})
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
    schedule: Any = "none"
    """A scheme's name, a compressor, or stages; see docs/training.md."""
    learn: tuple[str, ...] = ("projector", "llm")
    """Which of projector, llm and vision learn; the rest is frozen. The Q-Former's weights always learn."""
    lora: Lora | None = None
    """Adapters on the LLM; llm must be among what learns."""
    fraction: str = "100%"
    """The share of the records that is used, drawn by `seed`."""
    epochs: float = 1.0
    """Times that each record is seen; `steps` counts instead if it is given."""
    steps: int | None = None
    """Optimiser steps."""
    batch: int = 128
    """Records in an optimiser step, over all processes."""
    batch_per_process: int | None = None
    """Records in one forward; what is missing to `batch` is accumulated. Default: all of the process's share."""
    learning_rate: float = 2e-5
    """The highest, of AdamW."""
    warmup: float = 0.03
    """Share of the steps in which the learning rate rises; after them it falls in a cosine."""
    weight_decay: float = 0.0
    """AdamW's, on all weights but biases and those of norms."""
    precision: Literal["bf16", "float32"] = "bf16"
    """bf16: automatic mixed precision, on a CPU too."""
    weights: Literal["float32", "bfloat16"] = "float32"
    """What the model is loaded as, whatever the checkpoint has; bfloat16 for what is frozen under LoRA, say."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """transformers' implementation; on a CPU eager may be faster for a small model."""
    gradient_checkpointing: bool = False
    """Compute layers again in the backward instead of keeping what they put out: less memory, more time."""
    max_length: int = 2048
    """Tokens of a record, visual ones uncompressed; longer records are left out and counted."""
    max_left_out: str = "25%"
    """The largest share of the records that may be left out, going by some that are read before the first step."""
    group_by_length: bool = True
    """Records of like length stand in a batch, so that little is padded."""
    evaluation: Evaluation | None = None
    """Questions that are asked during training."""
    save_every: int = 500
    """Optimiser steps between checkpoints."""
    checkpoints: int = 2
    """How many are kept."""
    log_every: int = 10
    """Optimiser steps between lines of the log."""
    workers: int = 0
    """Processes that read records and images, beside each training process."""
    seed: int = 0
    """Of the order of the records, of those chosen by `fraction`, and of fresh weights."""
    sharding: Literal["none", "fsdp"] = "none"
    """fsdp: several processes share weights, gradients and the optimiser's state out, instead of a copy each."""
    text_tokens: int = 62
    """Tokens of text beside an image, for what `--explain` counts; LLaVolta's tables fit 62."""
    trainer: Mapping[str, Any] = field(default_factory=dict)
    """Further settings of transformers' TrainingArguments, such as deepspeed."""

    def __post_init__(self) -> None:
        check_ranges("", self, RANGES)
        schedule = self.schedule_for(32)  # refuses what is none, whatever the depth
        self._check_what_learns(schedule)
        if not 0 < self.share <= 1:
            raise UserError(f"fraction must be a share of the records such as 10% or 0.1, got {self.fraction}")
        if not 0 <= self.most_left_out <= 1:
            raise UserError(f"max_left_out must be a share of the records such as 25% or 0.25, got {self.max_left_out}")
        self._check_trainer()

    def _check_what_learns(self, schedule: Schedule) -> None:
        for part in self.learn:
            check_choice("learn", part, PARTS)
        trained = [part.trained_weights for stage in schedule.stages for part in stage.compressor.stages()]
        if not self.learn and not any(trained):
            raise UserError(f"learn: nothing would; give at least one of {', '.join(PARTS)}")
        if self.lora is not None and "llm" not in self.learn:
            raise UserError("lora: adapters are on the LLM; put llm among what learns")

    def _check_trainer(self) -> None:
        if self.trainer.get("fsdp"):
            raise UserError("trainer: fsdp shares nothing out on a CPU, and says nothing; write sharding: fsdp instead")
        if self.sharding != "none" and self.trainer.get("deepspeed"):
            raise UserError("sharding: fsdp does what trainer: deepspeed does; choose one of them")
        self.for_trainer()

    def for_trainer(self) -> dict[str, Any]:
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


#: Settings that have settings of their own.
WITHIN: dict[type, dict[str, type]] = {Config: {"lora": Lora, "evaluation": Evaluation}}


def check_ranges(where: str, settings: Any, ranges: Mapping[str, Range]) -> None:
    """Raises `UserError` for a number that cannot be, with its name behind `where`; what is not given can be `None`."""
    for name, (wanted, is_one) in ranges.items():
        value = getattr(settings, name)
        if value is not None and not is_one(value):
            raise UserError(f"{where}{name}: {value} is out of range; give {wanted}")


def described(cls: type = Config) -> dict[str, str]:
    """What each setting is, from the sentence behind it; those of `lora` and `evaluation` by their full names."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field_, said in itertools.pairwise(body.body):
        if isinstance(field_, ast.AnnAssign) and isinstance(said, ast.Expr) and isinstance(said.value, ast.Constant):
            found[ast.unparse(field_.target)] = " ".join(str(said.value.value).split())
    for name, part in WITHIN.get(cls, {}).items():
        found |= {f"{name}.{key}": sentence for key, sentence in described(part).items()}
    return found


def defaults(cls: type = Config) -> dict[str, str]:
    """Each setting with its default, as it is written; nothing for what has to be given, or has settings of its own."""
    found = {}
    for field_ in dataclasses.fields(cls):
        missing = field_.default is dataclasses.MISSING or field_.default is None
        found[field_.name] = "" if missing else str(field_.default)
        if part := WITHIN.get(cls, {}).get(field_.name):
            found |= {f"{field_.name}.{name}": value for name, value in defaults(part).items()}
    return found


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
        raise UserError(f"{str(path)!r} is no list of settings, such as model: mini")
    for change in changes:
        _change(content, change)
    return _read(Config, content, "")


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


def _read(cls: Any, content: Any, where: str) -> Any:
    """An instance of a dataclass from a mapping."""
    if not isinstance(content, Mapping):
        raise UserError(f"{where or 'the file'} is no list of settings")
    hints = get_type_hints(cls)
    refuse_unknown(where or "the file", content, list(hints))
    for one in dataclasses.fields(cls):
        needed = one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
        if needed and one.name not in content:
            raise UserError(f"{where + '.' if where else ''}{one.name} is missing")
    prefix = f"{where}." if where else ""
    return cls(**{name: _value(prefix + name, value, hints[name]) for name, value in content.items()})


def _value(where: str, value: Any, hint: Any) -> Any:
    can_be_left_out = type(None) in get_args(hint)
    kind = next(kind for kind in get_args(hint) if kind is not type(None)) if can_be_left_out else hint
    if value is None and can_be_left_out:
        return None
    if dataclasses.is_dataclass(kind):
        return _read(kind, {} if value is True else value, where)
    if kind is Any:
        return value
    if get_origin(kind) is Literal:
        check_choice(where, value, get_args(kind))
        return value
    if get_origin(kind) is tuple:
        several = value if isinstance(value, list) else [value]
        return tuple(_value(where, one, get_args(kind)[0]) for one in several)
    if get_origin(kind) is not None:  # a mapping that somebody else reads
        if isinstance(value, Mapping):
            return dict(value)
    elif kind is str and isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    elif kind is float and not isinstance(value, bool):
        try:  # YAML takes 1e-3 for text
            return float(value)
        except (TypeError, ValueError, OverflowError):
            pass
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise UserError(f"{where}: {value!r} is no {KINDS.get(kind, 'mapping')}")
