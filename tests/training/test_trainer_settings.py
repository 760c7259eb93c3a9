"""Settings under `trainer`: every setting of TrainingArguments is known, and its value is checked before a run."""

import inspect

import pytest
from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from tests.training.runs import write_config, write_run
from vlmzip.cli.main import main
from vlmzip.errors import UserError
from vlmzip.training import trainer_settings
from vlmzip.training.config import read_config
from vlmzip.training.run import arguments, try_out
from vlmzip.training.trainer_settings import (
    BY_SCORE,
    MADE_FROM,
    PASSED,
    READ_OF_OPTIM_ARGS,
    REFUSED,
    in_this_version,
)

LEAST = {"model": "mini", "records": "data.json", "out": "runs/x"}
BESIDE = {"workers": 2, "gradient_checkpointing": True, "evaluation": {"every": 5}}


@pytest.fixture
def config(tmp_path):
    def make(trainer, **settings):
        return read_config(write_config(tmp_path, **{**LEAST, **settings, "trainer": trainer}))

    return make


def test_every_setting_of_the_installed_version_is_in_one_table():
    tables = (MADE_FROM, REFUSED, PASSED)
    wrong = [name for name in in_this_version() if sum(name in table for table in tables) != 1]
    assert not wrong
    assert not [name for name in in_this_version() if name in MADE_FROM and MADE_FROM[name] not in {*LEAST, *OURS}]


OURS = {
    "steps", "epochs", "batch_per_process", "learning_rate", "warmup", "weight_decay", "precision", "sharding", "seed",
    "gradient_checkpointing", "group_by_length", "log_every", "save_every", "checkpoints", "evaluation", "workers",
}  # fmt: skip


def test_settings_of_a_newer_version_are_refused(config, monkeypatch):
    known = in_this_version()
    monkeypatch.setattr(trainer_settings, "in_this_version", lambda: known | {"drop_every_other_label"})
    with pytest.raises(UserError, match="trainer: drop_every_other_label is a setting that vlmzip does not know yet"):
        config({"drop_every_other_label": True})


def test_a_setting_that_an_older_version_lacks_is_named(config, monkeypatch):
    known = in_this_version()
    monkeypatch.setattr(trainer_settings, "in_this_version", lambda: known - {"ddp_timeout"})
    with pytest.raises(UserError, match="trainer: the installed transformers has no setting ddp_timeout"):
        config({"ddp_timeout": 5})


@pytest.mark.parametrize("key", [*MADE_FROM, *REFUSED])
def test_refused_settings_are_refused_with_any_value(config, key):
    for value in (None, False, 0, "x"):
        with pytest.raises(UserError, match=f"^trainer: {key} ") as told:
            config({key: value})
        assert "\n" not in str(told.value)


#: For each setting that is passed on: a valid value, then invalid ones.
VALUES = {
    "lr_scheduler_type": ("linear", ["lineare", "reduce_lr_on_plateau", "greedy", 5]),
    "lr_scheduler_kwargs": ({"num_cycles": 1}, [5, "x", []]),
    "optim": ("sgd", ["sgdd", 3, None]),
    "optim_args": (
        "momentum=0.1, nesterov=true",
        [5, {}, "", "x", "betas=(0.1,2)", "momentum=", "momentum=1,momentum=2"],
    ),
    "optim_target_modules": (["attn"], [5, [], [5]]),
    "adam_beta1": (0.8, [5, 1, -0.1, "x", float("nan"), True, None, [0.9]]),
    "adam_beta2": ("9.9e-1", [5, 1.0, -1, "high"]),
    "adam_epsilon": ("1e-8", [-1e-8, "small", float("inf"), "9" * 400]),
    "max_grad_norm": (0, ["x", -1, float("nan"), {}]),
    "tf32": (False, ["yes", 1]),
    "gradient_checkpointing_kwargs": ({"use_reentrant": False}, [True, {"use_reentrant": "no"}, {"reentrant": True}]),
    "activation_checkpointing_kwargs": ({"use_reentrant": False}, [{}, None]),
    "torch_compile": (True, ["inductor", 1]),
    "torch_compile_backend": ("eager", [5, ""]),
    "torch_compile_mode": ("default", ["fast", 1]),
    "torch_empty_cache_steps": (5, [0, -1, 2.5, True, 10**12]),
    "logging_strategy": ("steps", ["epoch", "no", False]),
    "save_strategy": (False, ["epoch", "best", True]),
    "logging_first_step": (False, ["first", 1]),
    "log_on_each_node": (False, [0]),
    "log_level": ("error", ["quiet", 30]),
    "log_level_replica": ("error", ["quiet"]),
    "disable_tqdm": (True, ["no"]),
    "report_to": (["tensorboard"], ["tensorbord", ["none", "wandbb"], 5, None, {}]),
    "run_name": ("a", [5, None, ""]),
    "project": ("a", [5]),
    "trackio_space_id": ("a/b", [5]),
    "trackio_bucket_id": ("a/b", [5]),
    "trackio_static_space_id": ("a/b", [True]),
    "eval_delay": (3, [-1, "x"]),
    "eval_on_start": (True, ["x"]),
    "full_determinism": (True, [1]),
    "use_cpu": (True, ["cpu"]),
    "dataloader_pin_memory": (False, ["no"]),
    "dataloader_persistent_workers": (True, [1]),
    "dataloader_prefetch_factor": (2, [0, -1, 10**9, "2"]),
    "dataloader_multiprocessing_context": ("spawn", ["threads", 5]),
    "ddp_find_unused_parameters": (True, [1]),
    "ddp_bucket_cap_mb": (25, [0, 18446744073709551616, 2.5]),
    "ddp_broadcast_buffers": (False, [0]),
    "ddp_backend": ("gloo", ["glue", 5]),
    "ddp_timeout": (60, [0, -1, 10**30, "long"]),
    "deepspeed": ("zero3.json", [5, "", True, []]),
    "skip_memory_metrics": (False, [0]),
}
TRACKIO = ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")
NEEDS = {"optim_target_modules": {"optim": "galore_adamw"}, "optim_args": {"optim": "sgd"}} | {
    key: {"report_to": "trackio"} for key in TRACKIO
}


def test_every_passed_setting_has_a_test():
    assert VALUES.keys() == PASSED.keys()


@pytest.mark.parametrize("key", [key for key in VALUES if key in in_this_version()])
def test_values_are_checked_before_a_run(config, key):
    good, bad = VALUES[key]
    read = config({**NEEDS.get(key, {}), key: good}, **BESIDE).for_trainer()
    name = key if key in read else trainer_settings.RENAMED[key]
    assert name in in_this_version()
    assert read[name] == {"adam_beta2": 0.99, "adam_epsilon": 1e-8, "save_strategy": "no"}.get(key, good)
    for value in bad:
        with pytest.raises(UserError, match=f"^trainer: {key} cannot be .*; give .") as told:
            config({**NEEDS.get(key, {}), key: value}, **BESIDE)
        assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("trainer", "said"),
    [
        ({"eval_on_start": True}, "eval_on_start changes nothing without evaluation"),
        ({"dataloader_prefetch_factor": 2}, "dataloader_prefetch_factor changes nothing without workers"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "changes nothing without gradient_checkpointing"),
        (
            {"optim_target_modules": ["x"]},
            "optim_target_modules changes nothing unless optim includes galore or apollo",
        ),
        ({"optim_target_modules": ["x"], "optim": "sgd"}, "changes nothing unless optim includes galore"),
        ({"project": "x", "report_to": ["wandb"]}, "project changes nothing unless report_to includes trackio or all"),
        ({"fp16": True}, "fp16 follows from the run's own setting precision"),
        ({"do_train": False}, "do_train cannot be set: it changes nothing"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor cannot be set: its loss compares logits and labels"),
        ({"optimm": "sgd"}, "unknown setting 'optimm'; did you mean 'optim'"),
        ({"evaluation_strategy": "no"}, "unknown setting 'evaluation_strategy'"),
        ({5: 5}, "unknown setting '5'"),
        ({"lr": 1}, "unknown setting 'lr'; did you mean the run's own setting learning_rate, outside trainer?"),
        ({"num_train_epoch": 1}, "did you mean the run's own setting epochs, outside trainer?"),
        ({"batch_per_proces": 1}, "did you mean the run's own setting batch_per_process, outside trainer?"),
        (
            {"torch_compile": False, "torch_compile_mode": "default"},
            "torch_compile cannot be false beside torch_compile_m",
        ),
        ({"torch_compile": False, "torch_compile_backend": "eager"}, "cannot be false beside torch_compile_backend"),
        ({"dataloader_pin_memory": True, "use_cpu": True}, "dataloader_pin_memory cannot be true beside use_cpu"),
        ({f"{name}_checkpointing_kwargs": {} for name in ("gradient", "activation")}, "are one setting"),
        ({"optim_args": "foo=1"}, "optim_args: foo changes nothing: optim adamw_torch reads no optim_args"),
        (
            {"optim": "sgd", "optim_args": "momentum=0.9, nope=1"},
            "nope changes nothing: optim sgd reads momentum, damp",
        ),
        (
            {"optim": "paged_lion_8bit", "optim_args": "beta1=1"},
            "beta1 changes nothing: optim paged_lion_8bit reads no",
        ),
        ({"optim": "sgd", "optim_args": "weight_decay=1"}, "weight_decay follows from the run's own setting weight_de"),
        ({"optim": "rmsprop_bnb", "optim_args": "lr=1"}, "lr follows from the run's own setting learning_rate"),
    ],
)
def test_unknown_settings_and_settings_without_effect_are_refused(config, trainer, said):
    with pytest.raises(UserError, match=f"trainer: .*{said}"):
        config(trainer)


@pytest.mark.parametrize(
    ("trainer", "said"),
    [
        ({"optim": "galore_adamw"}, "galore_torch"),
        ({"optim": "galore_adamw", "optim_target_modules": ["attn"]}, None),  # checked later, with the model
        ({"optim": "adamw_torch_4bit"}, "torchao"),
        ({"optim": "grokadamw"}, "grokadamw"),
        ({"optim": "sgd", "optim_args": "momentum=fast"}, "trainer: .*optim_args 'momentum=fast'"),
        ({"ddp_backend": "nccl", "use_cpu": True}, "trainer: ddp_backend: nccl needs several processes"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr"),
        ({"lr_scheduler_kwargs": {"nonsense": 1}}, "nonsense"),
        *(
            (
                {"lr_scheduler_type": name, "lr_scheduler_kwargs": kwargs},
                f"^trainer: lr_scheduler_type {name} with lr_s",
            )
            for name, kwargs in [
                ("cosine", {"num_cycles": "x"}),
                ("cosine", {"num_cycles": float("inf")}),
                ("cosine_with_restarts", {"num_cycles": "x"}),
                ("polynomial", {"power": "x"}),
                ("polynomial", {"power": -1}),
                ("polynomial", {"lr_end": -1}),
                ("inverse_sqrt", {"timescale": "x"}),
                ("inverse_sqrt", {"timescale": -1}),
                ("cosine_with_min_lr", {"min_lr": "x"}),
                ("cosine_warmup_with_min_lr", {"min_lr_rate": "x"}),
                ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.1, "warmup_lr_rate": "x"}),
                ("warmup_stable_decay", {"num_decay_steps": 2, "min_lr_ratio": "x"}),
                ("warmup_stable_decay", {"num_decay_steps": 2, "decay_type": "cosine", "num_cycles": "x"}),
            ]
        ),
        ({"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": "1e-6"}}, None),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2}}, None),
        ({"report_to": "comet_ml"}, "comet"),
        ({"deepspeed": "zero3.json"}, "trainer: deepspeed is not installed"),
        ({"torch_compile_backend": "nonsense"}, "NONSENSE"),
        ({"torch_compile_backend": "eager"}, None),
        ({"tf32": True, "use_cpu": True}, "trainer: .*tf32"),
        ({"optim": "adafactor"}, None),
        ({"adam_epsilon": "1e-6", "max_grad_norm": "1e-1", "adam_beta1": 0}, None),
    ],
)
def test_missing_support_of_the_machine_is_found_without_a_model(config, trainer, said):
    made = config(trainer)
    if said is None:
        try_out(made)
        return
    with pytest.raises(UserError, match=said) as told:
        try_out(made)
    assert "\n" not in str(told.value)


def test_numbers_that_yaml_takes_for_text_reach_trainer_as_numbers(config):
    made = arguments(config({"adam_epsilon": "1e-6", "max_grad_norm": "1e-1"}), 1)
    assert (made.adam_epsilon, made.max_grad_norm) == (1e-6, 0.1)


def test_every_schedule_can_be_tried(config):
    needs = {"cosine_with_min_lr": {"min_lr": 0}, "cosine_warmup_with_min_lr": {"min_lr": 0}}
    needs["warmup_stable_decay"] = {"num_decay_steps": 2}
    for one in SchedulerType:
        if one.value not in BY_SCORE:
            try_out(config({"lr_scheduler_type": one.value, "lr_scheduler_kwargs": needs.get(one.value, {})}))


def test_the_known_optim_args_are_those_that_transformers_reads():
    """Each name occurs in transformers' own handler of the optimiser."""
    for one in OptimizerNames:
        known = next((names for word, names in READ_OF_OPTIM_ARGS.items() if one.value.startswith(word)), ())
        source = inspect.getsource(_OPTIMIZER_HANDLERS[one])
        assert all(f'"{name}"' in source for name in known or ())
        if "bitsandbytes" not in source:
            assert bool(known) == ("optim_args" in source), one


@pytest.mark.parametrize("words", [(), ("--explain",)])
@pytest.mark.parametrize("trainer", [{"adam_beta1": 5}, {"max_grad_norm": "x"}, {"do_train": False}, {"fp16": True}])
def test_a_wrong_value_is_one_line_at_explain_and_at_the_start(tmp_path, capsys, words, trainer):
    path = write_config(tmp_path, **LEAST, trainer=trainer)
    assert main(["train", str(path), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"vlmzip: trainer: {next(iter(trainer))} ")


def test_missing_packages_are_reported_before_the_model_is_loaded(tmp_path, capsys):
    path = write_config(tmp_path, model="./not-there", trainer={"optim": "galore_adamw"})
    assert main(["train", str(path)]) == 2
    assert "galore_torch" in capsys.readouterr().err


def test_missing_packages_are_a_note_for_explain(tmp_path, capsys):
    path = write_run(tmp_path, trainer={"optim": "galore_adamw"})
    main(["train", str(path), "--explain"])
    out, said = capsys.readouterr()
    assert "note: on this machine the run would be refused: trainer: You need to install `galore_torch`" in said
    assert "stage" in out


@pytest.mark.parametrize(
    "setting",
    ["steps", "batch", "batch_per_process", "max_length", "save_every", "checkpoints", "log_every", "workers", "seed",
     "text_tokens", "lora.r", "lora.alpha", "evaluation.every", "evaluation.limit"],
)  # fmt: skip
@pytest.mark.parametrize("value", [18446744073709551616, 10**400, -(10**30)])
def test_counts_that_are_too_large_are_refused(tmp_path, setting, value):
    path = write_config(tmp_path, **LEAST, evaluation={"every": 5})
    with pytest.raises(UserError, match=f"^{setting} must be a whole number from . to .*, got "):
        read_config(path, [f"{setting}={value}"])


def test_workers_are_counted_before_they_are_made(tmp_path):
    with pytest.raises(UserError, match="workers must be a whole number from 0 to 512, got 513"):
        read_config(write_config(tmp_path, **LEAST, workers=513))
    assert read_config(write_config(tmp_path, **LEAST, workers=512)).workers == 512
