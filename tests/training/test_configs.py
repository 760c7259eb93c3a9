"""The configurations that are shipped can be read, and say what the papers say."""

import dataclasses
import json
import runpy
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, CLIPVisionModel, LlamaForCausalLM

from tests.tiny import VOCABULARY, save_checkpoint, tiny_llava
from vlmzip import DFMR, LLaVolta, QFormer, VisionZip
from vlmzip.cli.loading import load
from vlmzip.cli.main import main
from vlmzip.training.config import read_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_can_be_read(path):
    config = read_config(path)
    config.schedule_for(32)
    for name in config.trainer.values():
        assert (CONFIGS.parent / name).exists()


@pytest.fixture
def parts(tmp_path):
    """A tiny LLaVA, and an LLM and an encoder of its shape, whose vocabulary lacks the last eight words."""
    save_checkpoint(tmp_path / "llava")
    shape = tiny_llava().config
    text = type(shape.text_config).from_dict({**shape.text_config.to_dict(), "vocab_size": VOCABULARY - 8})
    LlamaForCausalLM(text).save_pretrained(tmp_path / "llm")
    CLIPVisionModel(shape.vision_config).save_pretrained(tmp_path / "encoder")
    smaller = {**shape.vision_config.to_dict(), "image_size": shape.vision_config.image_size // 2}
    CLIPVisionModel(type(shape.vision_config).from_dict(smaller)).save_pretrained(tmp_path / "smaller")
    return tmp_path


@pytest.fixture
def put_together(parts, monkeypatch, capsys):
    """Runs the script; returns its exit code and what it says on stderr."""

    def run(llm="llm", encoder="encoder"):
        given = {"llm": parts / llm, "encoder": parts / encoder, "like": parts / "llava", "out": parts / "untrained"}
        words = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
        monkeypatch.setattr(sys, "argv", [str(CONFIGS / "llava_untrained.py"), *words])
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as ended:
            return ended.code, capsys.readouterr().err
        return 0, capsys.readouterr().err

    return run


def test_an_untrained_llava_is_put_together(parts, put_together):
    assert put_together()[0] == 0
    made = AutoModelForImageTextToText.from_pretrained(parts / "untrained")
    llm = AutoModelForCausalLM.from_pretrained(parts / "llm")
    encoder = CLIPVisionModel.from_pretrained(parts / "encoder")
    rows = VOCABULARY - 8
    for ours, theirs in ((made.model.language_model, llm.model), (made.model.vision_tower, encoder)):
        for name, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name][: len(value)] if value.dim() else value, value)
    torch.testing.assert_close(made.lm_head.weight[:rows], llm.lm_head.weight)
    assert made.lm_head.weight[rows:].std() > 0
    trained = tiny_llava().model.multi_modal_projector.state_dict()
    assert any(not torch.equal(value, trained[name]) for name, value in
               made.model.multi_modal_projector.state_dict().items())  # fmt: skip
    assert load(str(parts / "untrained")).processor.tokenizer is not None
    code, said = put_together()
    assert (code, "exists already" in said) == (2, True)


@pytest.mark.parametrize(
    "wrong", [{"llm": "encoder"}, {"encoder": "llava"}, {"encoder": "smaller"}, {"llm": "nowhere"}]
)
def test_parts_that_do_not_fit_are_a_line(parts, put_together, wrong):
    code, said = put_together(**wrong)
    assert code == 2
    assert said.splitlines()[-1].startswith("llava_untrained.py: error: ")
    assert not (parts / "untrained").exists()


#: What is trained on mini, beside mini.yaml, and what the model answers with afterwards.
MINI = {
    "mini-llavolta": LLaVolta(layer=4, stride=4),
    "mini-dfmr": DFMR(tau=0.3206),
    "mini-visionzip-tuning": VisionZip(keep=16),
    "mini-qformer": QFormer(queries=36, width=192, heads=6, depth=2),
}


@pytest.mark.parametrize("name", MINI)
def test_recipes_on_mini_differ_in_what_they_are_about_alone(name):
    usual, config = read_config(CONFIGS / "mini.yaml"), read_config(CONFIGS / f"{name}.yaml")
    assert config.schedule_for(8).afterwards == MINI[name]
    assert config.out == f"runs/{name}"
    different = {field.name for field in dataclasses.fields(config)} - {"schedule", "out"}
    if name == "mini-visionzip-tuning":
        assert (config.learn, config.share, config.model) == (("projector",), Fraction(1, 10), f"{usual.out}/model")
        different -= {"learn", "fraction", "model"}
    assert {each for each in different if getattr(config, each) != getattr(usual, each)} == set()


#: Visual tokens of an image over mini's eight layers, worked out by hand; `None` where the images decide.
TOKENS = {
    "mini": 8 * 144,
    "mini-llavolta": ((144 + 7 * 9) + 4 * (144 + 9) + 4 * (144 + 36)) / 3,
    "mini-dfmr": None,
    "mini-visionzip-tuning": 8 * 16,
    "mini-qformer": 8 * 36,
}


@pytest.mark.parametrize("name", TOKENS)
def test_recipes_fit_mini(name, capsys):
    changes = ["--set", "model=mini", "--set", "steps=12"]
    assert main(["train", str(CONFIGS / f"{name}.yaml"), "--explain", "--json", *changes]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == TOKENS[name]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_says_how_to_run_it(path):
    assert f"-m vlmzip.cli.main train configs/{path.name}\n" in path.read_text()


def test_llavoltas_recipe_is_that_of_the_authors_script():
    config = read_config(CONFIGS / "llava-1.5-7b-llavolta.yaml")
    assert (config.batch, config.learning_rate, config.warmup, config.weight_decay) == (128, 2e-5, 0.03, 0)
    stages = [stage.compressor for stage in config.schedule_for(32).stages]
    assert [(getattr(one, "layer", None), getattr(one, "stride", None)) for one in stages] == [
        (2, 8), (2, 2), (16, 2), (None, None)
    ]  # fmt: skip


def test_visionzips_tuning_is_the_projector_on_a_tenth_of_the_data():
    config = read_config(CONFIGS / "llava-1.5-7b-visionzip-tuning.yaml")
    assert (config.learn, config.share) == (("projector",), Fraction(1, 10))
    assert config.schedule_for(32).afterwards == VisionZip(keep=64)
