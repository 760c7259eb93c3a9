"""Configuration files: their settings, and one line for each mistake."""

from fractions import Fraction
from typing import get_args, get_type_hints

import pytest

from vlmzip.errors import UserError
from vlmzip.training.config import Config, Evaluation, Lora, read_config

LEAST = "model: mini\nrecords: data.json\nout: runs/x\n"


@pytest.fixture
def read(tmp_path):
    def run(text, *changes):
        (tmp_path / "run.yaml").write_text(text)
        return read_config(tmp_path / "run.yaml", changes)

    return run


def test_a_whole_file(read):
    config = read(
        LEAST
        + """
learning_rate: 1e-3
learn: projector
fraction: 10%
steps: 12
schedule: {name: two-stage, split: [25, 75]}
evaluation: {every: 5, compressor: "visionzip(keep=16)"}
gradient_checkpointing: true
trainer: {deepspeed: zero3.json}
"""
    )
    assert (config.learning_rate, config.learn, config.share, config.steps) == (
        0.001,
        ("projector",),
        Fraction(1, 10),
        12,
    )
    assert config.evaluation == Evaluation(every=5, compressor="visionzip(keep=16)")
    assert config.schedule_for(8).steps(12) == [3, 9]
    assert config.gradient_checkpointing is True
    assert config.trainer == {"deepspeed": "zero3.json"}


def test_changes_win_over_the_file(read):
    config = read(
        LEAST + "steps: 5\n", "steps=7", "evaluation.every=3", "lora={r: 8}", "schedule=none", "learning_rate=2e-4"
    )
    assert (config.steps, config.evaluation.every, config.lora, config.learning_rate) == (7, 3, Lora(r=8), 2e-4)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: mini\n", "records is missing"),
        (LEAST + "stepps: 3\n", "unknown key 'stepps'; did you mean 'steps'"),
        (LEAST + "steps: many\n", "steps must be a whole number from 1 to 1,000,000,000, got 'many'"),
        (LEAST + "steps: true\n", "steps must be a whole number .*, got True"),
        (LEAST + "steps: 0\n", "steps must be a whole number from 1 to 1,000,000,000, got 0"),
        (LEAST + "learning_rate: fast\n", "learning_rate must be a number above 0, got 'fast'"),
        (LEAST + "gradient_checkpointing: 1\n", "gradient_checkpointing must be true or false, got 1"),
        (LEAST + "precision: fp8\n", "precision must be bf16 or float32, got 'fp8'"),
        (
            LEAST + "learn: [projektor]\n",
            "learn must be .* projector, llm or vision, .* did you mean 'projector'",
        ),
        (LEAST + "learn: projector\nlora: {}\n", "lora trains the LLM, so learn must include llm"),
        (LEAST + "lora: {rank: 3}\n", "lora: unknown key 'rank'"),
        (LEAST + "evaluation: {}\n", "evaluation.every is missing"),
        (LEAST + "evaluation: 5\n", "evaluation must be a mapping of settings such as {every: …}, got 5"),
        (LEAST + "trainer: 5\n", "trainer must be a mapping, got 5"),
        (LEAST + "fraction: lots\n", "fraction: 'lots' is not a number"),
        (LEAST + "fraction: -10%\n", "fraction: '-10%' is below 0"),
        (LEAST + "fraction: 110%\n", "got 110%"),
        (LEAST + "fraction: 10\n", "got 10"),
        (LEAST + "learning_rate: " + "9" * 400 + "\n", "learning_rate must be a number above 0, got 9+"),
        (LEAST + "learn: []\n", "learn must not be empty; give at least one of projector"),
        (LEAST + "steps: 3\nseed: 1\nsteps: 4\n", "steps is repeated in line 6"),
        (LEAST + "lora: {r: 1, r: 2}\n", "r is repeated"),
        (LEAST + "images: 2026-13-45\n", "is not YAML: month must be"),
        (LEAST + "evaluation: {every: 1, compressor: random_factor}\n", "evaluation.compressor: random_factor is for"),
        (LEAST + "evaluation: {every: 1, compressor: visionsip}\n", "did you mean 'visionzip'"),
        (LEAST + "schedule: two-stages\n", "did you mean 'two-stage'"),
        ("model: [\n", "is not YAML"),
        ("model: " + "[" * 20_000, "is nested too deeply"),
        ("model: " + "{a: " * 20_000, "is nested too deeply"),
        (LEAST + r'schedule: "\ud800"', "half a character in the text of line 4"),
        (LEAST + r'"\ud800": 3', "half a character in the text of line 4"),
        ("- model\n", "must be a YAML mapping such as model: mini"),
        ("", "must be a YAML mapping such as model: mini"),
    ],
)
def test_mistakes_are_named(read, text, said):
    with pytest.raises(UserError, match=said):
        read(text)


def test_null_is_only_for_optional_settings(read):
    """This includes settings with choices, lists and mappings."""
    hints = get_type_hints(Config)
    for name in hints:
        if type(None) in get_args(hints[name]):
            assert getattr(read(LEAST, f"{name}=null"), name) is None
        else:
            with pytest.raises(UserError, match=f"^{name}.*None"):
                read(LEAST, f"{name}=null")


def test_wrong_changes_are_named(read, tmp_path):
    with pytest.raises(UserError, match="--set must be key=value, got 'steps'"):
        read(LEAST, "steps")
    with pytest.raises(UserError, match=r"--set 'steps=\[' is not YAML"):
        read(LEAST, "steps=[")
    with pytest.raises(UserError, match=r"--set 'schedule=.*' is not YAML"):
        read(LEAST, "schedule={name: two-stage, split: [1,2}")
    with pytest.raises(UserError, match=r"--set 'lora=.*': r is repeated"):
        read(LEAST, "lora={r: 1, r: 2}")
    with pytest.raises(UserError, match="model has no settings inside it"):
        read(LEAST, "model.name=5")
    with pytest.raises(UserError, match=r"cannot read .*: No such file"):
        read_config(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    "setting",
    [
        "learning_rate=-1", "learning_rate=0", "learning_rate=.nan", "learning_rate=.inf", "learning_rate=1e400",
        "epochs=.nan", "epochs=0", "epochs=-1", "epochs=.inf", "steps=-1", "batch=0", "batch_per_process=0",
        "workers=-1", "seed=-1", "seed=4294967296", "text_tokens=-1", "weight_decay=-0.1", "weight_decay=.nan",
        "warmup=-0.1", "warmup=1", "warmup=30", "warmup=.nan", "save_every=0", "checkpoints=0", "log_every=0",
        "max_length=0", "lora.r=0", "lora.alpha=0", "lora.dropout=2", "lora.dropout=1", "lora.dropout=-0.1",
        "lora.dropout=.nan", "evaluation.every=0", "evaluation.limit=0", "evaluation.limit=-2",
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_named(read, setting):
    name, _, _ = setting.partition("=")
    with pytest.raises(UserError, match=f"^{name} must be a .*number .*, got "):
        read(LEAST + "evaluation: {every: 5}\n", setting)


def test_numbers_at_the_ends_of_their_ranges_are_taken(read):
    ends = ["seed=4294967295", "workers=0", "text_tokens=0", "warmup=0", "weight_decay=0", "lora.dropout=0", "lora.r=1"]
    config = read(LEAST + "evaluation: {every: 1, limit: null}\n", *ends)
    assert (config.seed, config.lora, config.evaluation.limit) == (2**32 - 1, Lora(r=1, dropout=0.0), None)


def test_a_qformer_can_learn_alone(read):
    assert read(LEAST + "learn: []\nschedule: qformer(queries=4)\n").learn == ()


@pytest.mark.parametrize(
    ("key", "own"),
    [
        ("output_dir", "out"), ("max_steps", "steps"), ("num_train_epochs", "epochs"), ("seed", "seed"),
        ("per_device_train_batch_size", "batch_per_process"), ("gradient_accumulation_steps", "batch_per_process"),
        ("auto_find_batch_size", "batch_per_process"), ("learning_rate", "learning_rate"), ("bf16", "precision"),
        ("warmup_steps", "warmup"), ("warmup_ratio", "warmup"), ("weight_decay", "weight_decay"),
        ("gradient_checkpointing", "gradient_checkpointing"), ("activation_checkpointing", "gradient_checkpointing"),
        ("logging_steps", "log_every"), ("save_steps", "save_every"), ("save_total_limit", "checkpoints"),
        ("eval_strategy", "evaluation"), ("eval_steps", "evaluation"), ("dataloader_num_workers", "workers"),
        ("group_by_length", "group_by_length"), ("train_sampling_strategy", "group_by_length"), ("data_seed", "seed"),
        ("resume_from_checkpoint", "out"),
    ],
)  # fmt: skip
def test_settings_of_the_run_are_refused_under_trainer(read, key, own):
    with pytest.raises(UserError, match=f"trainer: {key} follows from the run's own setting {own}; set that instead"):
        read(LEAST, f"trainer.{key}=1")


@pytest.mark.parametrize("setting", ["save_strategy=epoch", "logging_strategy=epoch", "logging_strategy='no'"])
def test_logs_and_checkpoints_are_counted_in_steps(read, setting):
    with pytest.raises(UserError, match=r"trainer: .* cannot be .* steps are counted"):
        read(LEAST, f"trainer.{setting}")


def test_trainer_takes_settings_that_a_run_does_not_have(read):
    said = {"lr_scheduler_type": "linear", "max_grad_norm": 0.5, "optim": "sgd", "adam_beta2": 0.9, "report_to": []}
    said |= {"ddp_timeout": 60, "save_strategy": "no", "logging_strategy": "steps", "deepspeed": "zero3.json"}
    assert read(LEAST, f"trainer={said}").trainer == said


@pytest.mark.parametrize(
    ("settings", "records", "steps"),
    [
        ((), 1280, 10),
        ((), 1407, 10),  # an incomplete step is not counted
        (("epochs=2.5",), 1407, 25),
        (("epochs=0.29", "batch=1"), 100, 29),  # 28.999999999999996 in floats
        (("epochs=1e-1", "batch=1"), 30, 3),
        (("fraction=10%", "batch=1"), 15, 2),  # 1.5 is rounded
        (("fraction=1/3", "batch=10", "epochs=3"), 90, 9),
        (("steps=1000",), 128, 1000),
    ],
)
def test_steps_are_the_whole_ones_of_all_epochs(read, settings, records, steps):
    assert read(LEAST, *settings).steps_for(records) == steps


def test_at_least_one_record_is_chosen(read):
    assert [read(LEAST, f"fraction={share}").chosen(24) for share in ("1%", "50%", "1")] == [1, 12, 24]


def test_no_step_is_refused(read):
    for change in ("epochs=1", "steps=5"):
        with pytest.raises(UserError, match="batch: a step needs 32 records, but there are 12; give a smaller"):
            read(LEAST, "batch=32", "fraction=50%", change).steps_for(24)
    with pytest.raises(UserError, match=r"epochs: 0.4 of an epoch's 2 steps is less than 1 step"):
        read(LEAST, "epochs=0.4", "batch=10").steps_for(25)


@pytest.mark.parametrize(
    "key",
    [
        "save_only_model", "ignore_data_skip", "logging_nan_inf_filter", "load_best_model_at_end", "accelerator_config",
        "remove_unused_columns", "push_to_hub",
    ],
)  # fmt: skip
def test_settings_that_would_break_a_promise_are_refused(read, key):
    with pytest.raises(UserError, match=f"trainer: {key} cannot be set: "):
        read(LEAST, f"trainer.{key}=true")


def test_a_key_that_is_not_text_is_refused_in_a_line(read):
    with pytest.raises(UserError, match=r"no YAML|unhashable"):
        read(LEAST + "steps: {{ N }}\n")
