"""The settings of transformers' TrainingArguments that a run can have under `trainer`, and their valid values.

Every setting is in one of three tables: `MADE_FROM` (a setting of vlmzip sets it), `REFUSED` (with the reason) or
`PASSED` (with its valid values). A setting that a newer transformers adds is refused until it is in a table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol

from torch.distributed import Backend
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from vlmzip.errors import UserError, closest, nearest

#: TrainingArguments that vlmzip sets, and the setting of the run that each comes from.
MADE_FROM = {
    "output_dir": "out",
    "max_steps": "steps",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_per_process",
    "gradient_accumulation_steps": "batch_per_process",
    "auto_find_batch_size": "batch_per_process",
    "learning_rate": "learning_rate",
    "warmup_steps": "warmup",
    "warmup_ratio": "warmup",
    "weight_decay": "weight_decay",
    "bf16": "precision",
    "fp16": "precision",
    "gradient_checkpointing": "gradient_checkpointing",
    "activation_checkpointing": "gradient_checkpointing",
    "group_by_length": "group_by_length",
    "train_sampling_strategy": "group_by_length",
    "logging_steps": "log_every",
    "save_steps": "save_every",
    "save_total_limit": "checkpoints",
    "eval_strategy": "evaluation",
    "eval_steps": "evaluation",
    "dataloader_num_workers": "workers",
    "seed": "seed",
    "data_seed": "seed",
    "resume_from_checkpoint": "out",
    "parallelism_config": "sharding",
}

_ASKS = "it changes nothing: an evaluation asks questions and does not run Trainer's evaluation loop"
_HUB = "a run writes only into out; upload out/model to a hub yourself"
_LAST = "the model after the last step is saved"
_NOTHING = "it changes nothing"
#: Settings that a run cannot have, and why.
REFUSED = {
    # With these, a run would break its promises.
    "save_only_model": "a run could not resume from its checkpoints with the same losses",
    "ignore_data_skip": "a resumed run would see other records",
    "logging_nan_inf_filter": "a loss of NaN would go unnoticed",
    "accelerator_config": "a step could have other records than batch says",
    "dataloader_in_order": "a step could have other records than in another run",
    "remove_unused_columns": "records have no columns for Trainer to remove",
    "average_tokens_across_devices": "the loss would depend on the number of processes",
    "load_best_model_at_end": _LAST,
    "metric_for_best_model": _LAST,
    "greater_is_better": _LAST,
    # These use the uncompressed prompt, or the logits outside the model.
    "label_smoothing_factor": "its loss compares logits and labels outside the model, where compression has moved them",
    "neftune_noise_alpha": "its noise would be scaled by the length of the uncompressed prompt",
    "include_num_input_tokens_seen": "it would count the tokens of the uncompressed prompt",
    # These would have no effect here.
    "do_train": f"{_NOTHING}: a run trains",
    "do_eval": f"{_NOTHING}; set evaluation instead",
    "do_predict": f"{_NOTHING}: a run predicts nothing",
    "dataloader_drop_last": f"{_NOTHING}: an epoch consists of whole steps",
    "length_column_name": f"{_NOTHING}: records have no columns",
    "local_rank": f"{_NOTHING}: torchrun numbers the processes",
    "use_liger_kernel": f"{_NOTHING}: its kernels patch transformers' own classes, not a compressed model",
    "liger_kernel_config": f"{_NOTHING}: a compressed model has no Liger kernels",
    "use_cache": f"{_NOTHING}: training fills no KV cache",
    "restore_callback_states_from_checkpoint": f"{_NOTHING}: a resumed run always restores what it needs",
    **dict.fromkeys(
        ["per_device_eval_batch_size", "eval_accumulation_steps", "prediction_loss_only", "eval_do_concat_batches",
         "eval_use_gather_object", "include_for_metrics", "batch_eval_metrics", "bf16_full_eval", "fp16_full_eval",
         "label_names"],
        _ASKS,
    ),
    # vlmzip does these in another way, or not at all.
    "debug": "a run whose loss or gradients are NaN ends with an error message anyway",
    "save_on_each_node": "only the first process writes the run's folder",
    "enable_jit_checkpoint": "a stopped run resumes from its last complete checkpoint; lower save_every instead",
    "ddp_static_graph": "stages run different parts of the model",
    "fsdp": "fsdp silently shards nothing on a CPU; write sharding: fsdp instead",
    "fsdp_config": "write sharding: fsdp instead, which has no further settings",
    **dict.fromkeys(
        ["push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push",
         "hub_revision"],
        _HUB,
    ),
}  # fmt: skip


class Run(Protocol):
    """The configuration of a run: its other settings are looked up by name."""

    @property
    def trainer(self) -> Mapping[str, object]:
        """The settings for Trainer."""
        ...


@dataclass(frozen=True)
class Kind:
    """The valid values of a setting."""

    description: str
    """The valid values in words, for messages."""
    read: Callable[[object], object]
    """A function from a given value to the value for Trainer, or to `None` if it is invalid."""


def _number(value: Any) -> float:
    """Return a value as a number, NaN if it is not a number. YAML reads 1e-8 as text, which counts as a number."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _number_in(description: str, is_valid: Callable[[float], bool]) -> Kind:
    return Kind(description, lambda value: number if is_valid(number := _number(value)) else None)


def _whole(least: int, most: int = 10**9) -> Kind:
    def read(value: object) -> int | None:
        return value if type(value) is int and least <= value <= most else None

    return Kind(f"a whole number from {least:,} to {most:,}", read)


def _choice(*values: str) -> Kind:
    return Kind(f"one of {', '.join(values)}", lambda value: value if value in values else None)


def _texts(value: object) -> object:
    texts = [value] if isinstance(value, str) else value
    are_texts = isinstance(texts, list) and all(isinstance(text, str) and text for text in texts)
    return value if texts and are_texts else None


def _optim_args(value: object) -> object:
    """Return valid text such as momentum=0.9,nesterov=true, which transformers splits at each comma and "="."""
    pairs = [part.split("=") for part in value.replace(" ", "").split(",")] if isinstance(value, str) else []
    are_pairs = all(len(pair) == 2 and all(pair) for pair in pairs)
    return value if pairs and are_pairs and len({pair[0] for pair in pairs}) == len(pairs) else None


def _numbers_as_such(value: object) -> dict[object, object] | None:
    """Return a mapping with every text that is a number, such as YAML's 1e-6, as a number."""
    if not isinstance(value, Mapping):
        return None
    numbers = {key: _number(entry) for key, entry in value.items() if isinstance(entry, str)}
    return {**value, **{key: number for key, number in numbers.items() if math.isfinite(number)}}


def _save_strategy(value: object) -> object:
    return "no" if value is False else _choice("steps", "no").read(value)  # YAML reads no as false


TRUTH = Kind("true or false", lambda value: value if isinstance(value, bool) else None)
TEXT = Kind("text", lambda value: value if isinstance(value, str) and value else None)
TEXTS = Kind("a text or a list of texts", _texts)
MAPPING = Kind("a mapping", _numbers_as_such)
OPTIM_ARGS = Kind("name=value,name=value with each name once and no comma in a value", _optim_args)
FILE = Kind("a file name or a mapping", lambda value: value if value and isinstance(value, str | dict) else None)
FROM_0 = _number_in("a number of at least 0", lambda value: 0 <= value < math.inf)
BELOW_1 = _number_in("a number of at least 0 and below 1", lambda value: 0 <= value < 1)
LOG_LEVEL = _choice("debug", "info", "warning", "error", "critical", "passive")
#: The settings of activation checkpointing. Its others are PyTorch's own, and are not offered.
RECOMPUTE = Kind(
    "{use_reentrant: true} or {use_reentrant: false}",
    lambda value: dict(value) if value in ({"use_reentrant": True}, {"use_reentrant": False}) else None,
)
#: Learning-rate schedules that follow an evaluation loss, which runs do not have.
BY_SCORE = ("reduce_lr_on_plateau", "greedy")


def _reporters(value: object) -> object:
    names = [value] if isinstance(value, str) else value
    return value if isinstance(names, list) and all(name in REPORTERS for name in names) else None


#: The programs that transformers can report to.
REPORTERS = ("all", "none", *INTEGRATION_TO_CALLBACK)
#: Settings that are passed to Trainer, and their valid values.
PASSED: dict[str, Kind] = {
    "lr_scheduler_type": _choice(*(name.value for name in SchedulerType if name.value not in BY_SCORE)),
    "lr_scheduler_kwargs": MAPPING,
    "optim": _choice(*(name.value for name in OptimizerNames)),
    "optim_args": OPTIM_ARGS,
    "optim_target_modules": TEXTS,
    "adam_beta1": BELOW_1,
    "adam_beta2": BELOW_1,
    "adam_epsilon": FROM_0,
    "max_grad_norm": FROM_0,
    "tf32": TRUTH,
    "gradient_checkpointing_kwargs": RECOMPUTE,
    "activation_checkpointing_kwargs": RECOMPUTE,
    "torch_compile": TRUTH,
    "torch_compile_backend": TEXT,
    "torch_compile_mode": _choice("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    "torch_empty_cache_steps": _whole(1),
    "logging_strategy": Kind("steps: steps are counted, set log_every", _choice("steps").read),
    "save_strategy": Kind("steps or no: steps are counted, set save_every", _save_strategy),
    "logging_first_step": TRUTH,
    "log_on_each_node": TRUTH,
    "log_level": LOG_LEVEL,
    "log_level_replica": LOG_LEVEL,
    "disable_tqdm": TRUTH,
    "report_to": Kind(f"one or a list of {', '.join(REPORTERS)}", _reporters),
    "run_name": TEXT,
    "project": TEXT,
    "trackio_space_id": TEXT,
    "trackio_bucket_id": TEXT,
    "trackio_static_space_id": TEXT,
    "eval_delay": FROM_0,
    "eval_on_start": TRUTH,
    "full_determinism": TRUTH,
    "use_cpu": TRUTH,
    "dataloader_pin_memory": TRUTH,
    "dataloader_persistent_workers": TRUTH,
    "dataloader_prefetch_factor": _whole(1, 10**4),
    "dataloader_multiprocessing_context": _choice("fork", "spawn", "forkserver"),
    "ddp_find_unused_parameters": TRUTH,
    "ddp_bucket_cap_mb": _whole(1, 10**6),
    "ddp_broadcast_buffers": TRUTH,
    "ddp_backend": _choice(*(name for name in Backend.backend_list if name != "undefined")),
    "ddp_timeout": _whole(1),
    "deepspeed": FILE,
    "skip_memory_metrics": TRUTH,
}
#: Settings that have an effect only if another setting of the run is set, too.
BESIDE = {
    "gradient_checkpointing_kwargs": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing",
    "eval_delay": "evaluation",
    "eval_on_start": "evaluation",
    "dataloader_persistent_workers": "workers",
    "dataloader_prefetch_factor": "workers",
    "dataloader_multiprocessing_context": "workers",
}
#: Settings that have an effect only if another setting under `trainer` begins with one of these words.
BESIDE_IN_TRAINER = {
    "optim_target_modules": ("optim", ("galore", "apollo")),
    **dict.fromkeys(
        ["project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"],
        ("report_to", ("trackio", "all")),
    ),
}
#: The names in `optim_args` that transformers reads, by the beginning of the optimiser's name, longer beginnings first.
#: Other optimisers read none. `None`: all are passed to the optimiser, which refuses unknown names.
READ_OF_OPTIM_ARGS: dict[str, tuple[str, ...] | None] = {
    "sgd": ("momentum", "dampening", "nesterov"),
    "adagrad": ("lr_decay", "eps"),
    "rmsprop_bnb": None,
    "rmsprop": ("momentum", "alpha", "eps", "centered"),
    **dict.fromkeys(["ademamix", "paged_ademamix"], ("beta1", "beta2", "beta3", "alpha", "eps", "t_alpha", "t_beta3")),
    "adamw_anyprecision": ("use_kahan_summation", "momentum_dtype", "variance_dtype", "compensation_buffer_dtype"),
    **dict.fromkeys(["adamw_torch_4bit", "adamw_torch_8bit"], ("block_size", "bf16_stochastic_round")),
    "galore": ("rank", "update_proj_gap", "scale", "proj_type"),
    "apollo": ("rank", "proj", "scale_type", "update_proj_gap", "scale", "proj_type"),
    "grokadamw": ("alpha_init", "lamb", "gamma", "grokking_signal_decay_rate", "gradient_clipping"),
    "schedule_free": ("weight_lr_power", "r"),
    "stable_adamw": ("max_lr", "kahan_sum", "decouple_lr"),
}
#: Settings that transformers silently reverses if another one is set: the setting, its value, the other setting.
TURNED_ROUND = [
    ("torch_compile", False, "torch_compile_backend"),
    ("torch_compile", False, "torch_compile_mode"),
    ("dataloader_pin_memory", True, "use_cpu"),
]
#: Settings that newer versions of transformers call by another name.
RENAMED = {"gradient_checkpointing_kwargs": "activation_checkpointing_kwargs"}


def read_trainer(given: Mapping[str, object], config: Run) -> dict[str, object]:
    """Return the arguments for Trainer from the settings under `trainer`.

    Raise `UserError` for a setting that does not exist, that a run cannot have, that has an invalid value, or that has
    no effect with the other settings of `config`. Whether this machine supports a setting is not checked here.
    """
    for old, new in RENAMED.items():
        if old in given and new in given:
            raise UserError(f"trainer: {old} and {new} are one setting; leave one of them out")
    for key, value, other in TURNED_ROUND:
        if given.get(key) is value and given.get(other) not in (None, False):
            raise UserError(f"trainer: {key} cannot be {str(value).lower()} beside {other}; leave one of them out")
    return {_name(key): _read(key, value, config) for key, value in given.items()}


def in_this_version() -> set[str]:
    """Return the names of the settings of the installed transformers' TrainingArguments."""
    return {field.name for field in fields(TrainingArguments) if field.init}


def _name(key: str) -> str:
    new = RENAMED.get(key)
    return new if new is not None and new in in_this_version() else key


def _read(key: object, value: object, config: Run) -> object:
    if key in MADE_FROM:
        raise UserError(f"trainer: {key} follows from the run's own setting {MADE_FROM[key]}; set that instead")
    if key in REFUSED:
        raise UserError(f"trainer: {key} cannot be set: {REFUSED[key]}")
    known = in_this_version()
    if key not in PASSED or _name(key) not in known:
        raise UserError(f"trainer: {_unknown(key, known)}")
    if (other := BESIDE.get(key)) and not getattr(config, other):
        raise UserError(f"trainer: {key} changes nothing without {other}; set that too")
    _refuse_alone(key, config.trainer)
    kind = PASSED[key]
    read = kind.read(value)
    if read is None:
        raise UserError(f"trainer: {key} cannot be {value!r}; give {kind.description}")
    if key == "optim_args":
        _refuse_unread(str(read), str(config.trainer.get("optim", "adamw_torch")))
    return read


def _refuse_unread(optim_args: str, optim: str) -> None:
    """Raise `UserError` for a name in `optim_args` that a run sets itself, or that the optimiser does not read."""
    known = next((names for word, names in READ_OF_OPTIM_ARGS.items() if optim.startswith(word)), ())
    for pair in optim_args.replace(" ", "").split(","):
        name = pair.partition("=")[0]
        if name in ("lr", "weight_decay"):
            setting = "learning_rate" if name == "lr" else name
            raise UserError(
                f"trainer: optim_args: {name} follows from the run's own setting {setting}; set that instead"
            )
        if known is not None and name not in known:
            reads = f"reads {', '.join(known)}" if known else "reads no optim_args"
            raise UserError(f"trainer: optim_args: {name} changes nothing: optim {optim} {reads}")


def _refuse_alone(key: str, trainer: Mapping[str, object]) -> None:
    """Raise `UserError` for a setting that has no effect without another one (`BESIDE_IN_TRAINER`)."""
    if key in BESIDE_IN_TRAINER:
        other, words = BESIDE_IN_TRAINER[key]
        set_to = trainer.get(other)
        if not any(str(value).startswith(words) for value in (set_to if isinstance(set_to, list) else [set_to])):
            raise UserError(f"trainer: {key} changes nothing unless {other} includes {' or '.join(words)}")


def _unknown(key: object, known: set[str]) -> str:
    """Return the message for a setting in no table; `known` are the settings of the installed transformers."""
    if key in known:
        return f"{key} is a setting that vlmzip does not know yet; it might break what a run promises"
    if key in PASSED:
        return f"the installed transformers has no setting {key}"
    passed = known & PASSED.keys()
    near = nearest(str(key), passed | MADE_FROM.keys() | set(MADE_FROM.values()))
    if near is not None and near not in passed:
        return (
            f"unknown setting {key!r}; did you mean the run's own setting {MADE_FROM.get(near, near)}, outside trainer?"
        )
    return f"unknown setting {key!r}{closest(str(key), passed)}"
