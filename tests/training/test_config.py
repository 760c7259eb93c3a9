"""Configuration files: what is read, and one line for each mistake."""

import pytest

from vlmzip.errors import UserError
from vlmzip.training.config import Evaluation, Lora, read_config

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
    assert (config.learning_rate, config.learn, config.share, config.steps) == (0.001, ("projector",), 0.1, 12)
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
        (LEAST + "stepps: 3\n", "there is no 'stepps'; did you mean 'steps'"),
        (LEAST + "steps: many\n", "steps: 'many' is no int"),
        (LEAST + "steps: true\n", "steps: True is no int"),
        (LEAST + "steps: 0\n", "steps: 0 is too few"),
        (LEAST + "learning_rate: fast\n", "learning_rate: 'fast' is no float"),
        (LEAST + "gradient_checkpointing: 1\n", "gradient_checkpointing: 1 is no bool"),
        (LEAST + "precision: fp8\n", "precision"),
        (LEAST + "learn: [projektor]\n", "learn='projektor'.*projector"),
        (LEAST + "learn: projector\nlora: {}\n", "lora: adapters are on the LLM"),
        (LEAST + "lora: {rank: 3}\n", "lora: there is no 'rank'"),
        (LEAST + "evaluation: {}\n", "evaluation.every is missing"),
        (LEAST + "evaluation: 5\n", "evaluation is no list of settings"),
        (LEAST + "trainer: 5\n", "trainer: 5 is no mapping"),
        (LEAST + "fraction: 110%\n", "fraction: 110% is no share"),
        (LEAST + "fraction: 10\n", "fraction: 10 is no share"),
        (LEAST + "warmup: 30\n", "warmup: 30.0 is no share"),
        (LEAST + "schedule: two-stages\n", "did you mean 'two-stage'"),
        ("model: [\n", "is no YAML"),
        ("- model\n", "is no list of settings, such as"),
        ("", "is no list of settings, such as"),
    ],
)
def test_mistakes_are_named(read, text, said):
    with pytest.raises(UserError, match=said):
        read(text)


def test_wrong_changes_are_named(read, tmp_path):
    with pytest.raises(UserError, match="--set 'steps' is no setting"):
        read(LEAST, "steps")
    with pytest.raises(UserError, match="model has no settings of its own"):
        read(LEAST, "model.name=5")
    with pytest.raises(UserError, match=r"cannot read .*: No such file"):
        read_config(tmp_path / "none.yaml")
