"""`vlmzip train`: what it hands on to training, and what `--explain` counts."""

import json

import pytest
import torch

from tests.training.runs import COUNT, write_config, write_run
from vlmzip.cli.main import main


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with a tiny model and 24 records."""
    folder = tmp_path_factory.mktemp("data")
    write_run(folder)
    return folder


@pytest.fixture
def explain(data, capsys):
    """What `--explain --json` prints for the usual run with other settings, and what stderr says."""

    def run(*changes, code=0, **settings):
        path = write_config(data, name="explained.yaml", **settings)
        more = [word for change in changes for word in ("--set", change)]
        assert main(["train", str(path), "--explain", "--json", *more]) == code
        out, err = capsys.readouterr()
        return json.loads(out) if code == 0 else None, err

    return run


@pytest.fixture
def trained_with(data, monkeypatch, capsys):
    """The model that training would get under other settings, and what stderr says."""
    pytest.importorskip("accelerate")

    def run(code=0, **settings):
        got = []
        monkeypatch.setattr("vlmzip.training.run.train", lambda config, model, *_: got.append(model))
        assert main(["train", str(write_config(data, name="trained.yaml", **settings))]) == code
        return (got or [None])[0], capsys.readouterr().err

    return run


def steps(cost):
    return [stage["steps"] for stage in cost["stages"]]


@pytest.mark.parametrize(
    ("settings", "counts"),
    [
        ({"batch": 4}, [2, 2, 2]),
        ({"batch": 4, "fraction": "50%"}, [1, 1, 1]),
        ({"batch": 5, "epochs": 3}, [4, 4, 4]),  # 4 whole steps of 5 in each epoch, not 14 of 72
        ({"batch": 1, "epochs": 0.625}, [5, 5, 5]),
    ],
)
def test_steps_are_those_of_the_records(explain, settings, counts):
    assert COUNT == 24
    assert steps(explain(steps=None, **settings)[0]) == counts


def test_records_that_fill_no_step_are_refused(explain):
    _, err = explain(code=2, steps=None, batch=32)
    assert err.startswith("vlmzip: batch: a step needs 32 records, but there are 24")


def test_with_steps_given_the_records_need_not_be_there(explain):
    assert steps(explain(steps=9, records="nowhere.json", batch=64)[0]) == [3, 3, 3]


@pytest.mark.parametrize(("shape", "tokens"), [("qwen2.5-vl-3b", 972), ("qwen2.5-vl-3b-video", 1008)])
def test_a_shape_brings_the_tokens_of_its_prompts(data, capsys, shape, tokens):
    path = write_config(data, name="shape.yaml")
    assert main(["train", str(path), "--explain", "--json", "--shape", shape]) == 0
    assert json.loads(capsys.readouterr().out)["stages"][-1]["of"] == 36 * tokens  # over all layers


def test_text_is_counted_as_many_tokens_as_the_configuration_says(explain):
    by_text = [explain(text_tokens=count)[0]["flops"] for count in (0, 62, 1000)]
    assert by_text == sorted(by_text)
    assert by_text[0] < by_text[1] - 0.01 < by_text[2] - 0.02


def test_stages_that_are_never_reached_are_noted(explain):
    cost, err = explain(steps=1)
    assert steps(cost) == [1, 0, 0]
    assert cost["tokens"] == cost["stages"][0]["tokens"]
    assert err == "note: too few steps, 1, to reach stage 2, 3\n"
    assert explain(steps=3)[1] == ""


def test_the_model_is_loaded_as_the_configuration_says(trained_with):
    assert {p.dtype for p in trained_with(weights="bfloat16")[0].parameters()} == {torch.bfloat16}
    assert {p.dtype for p in trained_with(weights="float32")[0].parameters()} == {torch.float32}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_is_the_configurations(trained_with, attention):
    model, _ = trained_with(attention=attention)
    parts = (model.config, model.config.text_config, model.config.vision_config)
    assert [part._attn_implementation for part in parts] == [attention] * 3


@pytest.mark.parametrize("error", [ImportError, ValueError])
def test_attention_that_cannot_be_used_is_said_in_a_line(trained_with, monkeypatch, error):
    def refuse(self, name):
        raise error(f"{name} is\nnot there")

    monkeypatch.setattr("transformers.PreTrainedModel.set_attn_implementation", refuse)
    _, err = trained_with(code=2, attention="flash_attention_2")
    assert err == (
        "vlmzip: attention: flash_attention_2 cannot be used, use sdpa or eager: flash_attention_2 is not there\n"
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("steps=[", "--set 'steps=[' is not YAML"),
        ("learning_rate=-1", "learning_rate must be a number above 0, got -1"),
        ("trainer.max_steps=5", "trainer: max_steps follows from the run's own setting steps"),
        ("schedule=random_factor(per=step)+fastv(layer=1)", "random_factor cannot be chained"),
    ],
)
def test_mistakes_are_one_line(explain, change, said):
    _, err = explain(change, code=2)
    assert said in err
    assert err.count("\n") == 1


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = capsys.readouterr().out
    for line in ("learning_rate = 2e-05 ", "lora.alpha = 256 ", "evaluation.every ", "schedule = none ", "model "):
        assert f"\n  {line}" in said
    assert "\n  evaluation.limit = 200 " in said


def test_costs_need_neither_model_nor_records(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("model: nowhere\nrecords: nowhere.json\nout: out\nschedule: two-stage\n")
    explained = ["train", str(path), "--explain"]
    assert main([*explained, "--shape", "llava-1.5-7b", "--set", "steps=10"]) == 0
    assert "10,872" in capsys.readouterr().out
    assert main(explained) == 2
    assert "for costs alone: --shape llava-1.5-7b" in capsys.readouterr().err
    assert main([*explained, "--shape", "llava-1.5-7b"]) == 2
    assert "for costs alone: --set steps=1000" in capsys.readouterr().err
    assert main([*explained, "--shape", "llava-7b", "--set", "steps=10"]) == 2
    assert "--shape: unknown preset 'llava-7b'; did you mean 'llava-1.5-7b'" in capsys.readouterr().err


def test_an_image_that_cannot_be_is_refused_before_the_table(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("model: mini\nrecords: nowhere.json\nout: out\nsteps: 3\n")
    assert main(["train", str(path), "--explain", "--staircase", str(tmp_path / "x.xyz")]) == 2
    assert capsys.readouterr().out == ""
