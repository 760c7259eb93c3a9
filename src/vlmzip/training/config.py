"""What a training run is: a YAML file, read once, with every mistake named in a line."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from vlmzip.compressor import check_choice
from vlmzip.errors import UserError
from vlmzip.training.schedule import Schedule, read_schedule, read_share, refuse_unknown

#: Parts of a model that can learn.
PARTS = ("projector", "llm", "vision")


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters on the LLM's linear layers instead of all its weights."""

    r: int = 128
    alpha: int = 256
    dropout: float = 0.05


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


@dataclass(frozen=True, kw_only=True)
class Config:
    """A training run. Paths are as on the command line: from where it is started."""

    model: str
    """mini, a checkpoint folder or a hub id."""
    records: str
    """A file in LLaVA's JSON format."""
    out: str
    """The folder of checkpoints, logs, and of the trained model."""
    pictures: str | None = None
    """The folder that paths of pictures start from; default: the records'."""
    schedule: Any = "none"
    """See `read_schedule`."""
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
    warmup: float = 0.03
    """Share of the steps in which the learning rate rises; after them it falls in a cosine."""
    weight_decay: float = 0.0
    precision: Literal["bf16", "float32"] = "bf16"
    """bf16: automatic mixed precision."""
    weights: Literal["float32", "bfloat16"] = "float32"
    """What the model is loaded as, whatever the checkpoint has; bfloat16 for what is frozen under LoRA, say."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    gradient_checkpointing: bool = False
    max_length: int = 2048
    """Tokens of a record, visual ones uncompressed; longer records are left out and counted."""
    group_by_length: bool = True
    """Records of like length stand in a batch, so that little is padded."""
    evaluation: Evaluation | None = None
    save_every: int = 500
    """Optimiser steps between checkpoints."""
    checkpoints: int = 2
    """How many are kept."""
    log_every: int = 10
    workers: int = 0
    """Processes that read records and pictures, beside each training process."""
    seed: int = 0
    sharding: Literal["none", "fsdp"] = "none"
    """fsdp: several processes share weights, gradients and the optimiser's state out, instead of a copy each."""
    text_tokens: int = 62
    """Tokens of text beside a picture, for what `--explain` counts; LLaVolta's tables fit 62."""
    trainer: Mapping[str, Any] = field(default_factory=dict)
    """Further settings of transformers' TrainingArguments, such as deepspeed."""

    def __post_init__(self) -> None:
        for name in ("batch", "batch_per_process", "steps", "save_every", "checkpoints", "log_every", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}: {value} is too few; give at least 1")
        for part in self.learn:
            check_choice("learn", part, PARTS)
        if self.lora is not None and "llm" not in self.learn:
            raise UserError("lora: adapters are on the LLM; put llm among what learns")
        if not 0 < read_share(self.fraction) <= (100 if self.fraction.endswith("%") else 1):
            raise UserError(f"fraction: {self.fraction} is no share of the records; give 10% or 0.1")
        if not 0 <= self.warmup < 1:
            raise UserError(f"warmup: {self.warmup} is no share of the steps; give 0.03")
        if self.trainer.get("fsdp"):
            raise UserError("trainer: fsdp shares nothing out on a CPU, and says nothing; write sharding: fsdp instead")
        if self.sharding != "none" and self.trainer.get("deepspeed"):
            raise UserError("sharding: fsdp does what trainer: deepspeed does; choose one of them")
        self.schedule_for(32)  # refuses what is none, whatever the depth

    def chosen(self, records: int) -> int:
        return max(1, round(self.share * records))

    def steps_for(self, records: int) -> int:
        from fractions import Fraction

        return self.steps or int(Fraction(str(self.epochs)) * (self.chosen(records) // self.batch))

    def schedule_for(self, depth: int) -> Schedule:
        """The schedule for an LLM of that many layers."""
        return read_schedule(self.schedule, depth)

    @property
    def share(self) -> float:
        """Of the records, from 0 to 1."""
        return float(read_share(self.fraction)) / (100 if self.fraction.endswith("%") else 1)


def read_config(path: Path, changes: Sequence[str] = ()) -> Config:
    """The run that a YAML file describes, with `changes` such as "steps=100" or "evaluation.every=50".

    Raises `UserError` for a file that cannot be read, a key that there is not, or a value that cannot be.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{str(path)!r} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{str(path)!r} is no list of settings, such as model: mini")
    for change in changes:
        _change(content, change, yaml.safe_load)
    return _read(Config, content, "")


def _change(content: dict[str, Any], change: str, load: Any) -> None:
    key, equals, value = change.partition("=")
    if not equals:
        raise UserError(f"--set {change!r} is no setting; write key=value")
    *outer, last = key.strip().split(".")
    for name in outer:
        content = content.setdefault(name, {})
        if not isinstance(content, dict):
            raise UserError(f"--set {change!r}: {name} has no settings of its own")
    content[last] = load(value)


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
    kinds = [kind for kind in get_args(hint) if kind is not type(None)] if type(None) in get_args(hint) else [hint]
    kind = kinds[0]
    if value is None and len(kinds) < len(get_args(hint) or (hint,)):
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
        except (TypeError, ValueError):
            pass
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise UserError(f"{where}: {value!r} is no {getattr(kind, '__name__', 'mapping').lower()}")
