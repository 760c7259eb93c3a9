"""The shipped configurations can be read, and agree with the papers."""

import dataclasses
import json
from fractions import Fraction
from pathlib import Path

import pytest

from vlmzip import DFMR, LLaVolta, QFormer, VisionZip
from vlmzip.cli.main import main
from vlmzip.training.config import read_config

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_can_be_read(path):
    config = read_config(path)
    config.schedule_for(32)
    for name in config.trainer.values():
        assert (CONFIGS.parent / name).exists()


#: The recipes on mini other than mini.yaml, and the compressor that each model answers with afterwards.
MINI = {
    "mini-llavolta": LLaVolta(layer=4, stride=4),
    "mini-dfmr": DFMR(tau=0.3206),
    "mini-visionzip-tuning": VisionZip(keep=16),
    "mini-qformer": QFormer(queries=36, width=192, heads=6, depth=2),
}


@pytest.mark.parametrize("name", MINI)
def test_recipes_on_mini_differ_only_in_their_subject(name):
    usual, config = read_config(CONFIGS / "mini.yaml"), read_config(CONFIGS / f"{name}.yaml")
    assert config.schedule_for(8).afterwards == MINI[name]
    assert config.out == f"runs/{name}"
    different = {field.name for field in dataclasses.fields(config)} - {"schedule", "out"}
    if name == "mini-visionzip-tuning":
        assert (config.learn, config.share, config.model) == (("projector",), Fraction(1, 10), f"{usual.out}/model")
        different -= {"learn", "fraction", "model"}
    assert {each for each in different if getattr(config, each) != getattr(usual, each)} == set()


#: Visual tokens of an image over mini's eight layers, computed by hand; `None` if they depend on the image.
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


#: The papers' recipes for other models: the preset of the model's shape, its tokens over all layers, computed by hand
#: (a mean over four stages, or one), and what `--explain` shows beside the total.
PAPERS = {
    "llava-1.5-13b-llavolta": (
        "llava-1.5-13b",
        576 * (2 + 38 / 8 + 2 + 38 / 2 + 20 + 20 / 2 + 40) / 4,
        ["17.6 h"],
    ),
    "video-llava-7b-llavolta": (
        "video-llava-7b",
        8 * 256 * (2 + 30 / 8 + 16 + 16 / 8 + 16 + 16 / 2 + 32) / 4,
        ["37.1 h"],
    ),
    "mgm-2b-llavolta": ("mgm-2b", 576 * (1 + 17 / 8 + 1 + 17 / 2 + 9 + 9 / 2 + 18) / 4, ["14.8 h"]),
    "llava-1.5-13b-visionzip-tuning": ("llava-1.5-13b", 40 * 64, []),
    "llava-next-7b-visionzip-tuning": ("llava-next-7b", 32 * 160, []),
    "mini-gemini-7b-visionzip-tuning": ("llava-1.5-7b", 32 * 64, []),
}


@pytest.mark.parametrize("name", PAPERS)
def test_recipes_of_the_papers_are_explained_beside_what_they_print(name, capsys):
    shape, tokens, printed = PAPERS[name]
    words = ["train", str(CONFIGS / f"{name}.yaml"), "--explain", "--json", "--shape", shape, "--set", "steps=400"]
    assert main(words) == 0
    cost = json.loads(capsys.readouterr().out)
    assert cost["tokens"] == pytest.approx(tokens)
    assert cost["printed"] == printed


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_says_how_to_run_it(path):
    assert f"-m vlmzip.cli.main train configs/{path.name}\n" in path.read_text()


@pytest.mark.parametrize("words", [[], ["--explain"], ["--set", "model=mini"]])
@pytest.mark.parametrize("name", ["mini", *MINI])
def test_what_is_missing_is_one_command_away(name, words, tmp_path, monkeypatch, capsys):
    """In a fresh clone, the error points to the comment in the file that names the command to run first."""
    monkeypatch.chdir(tmp_path)
    path = CONFIGS / f"{name}.yaml"
    assert main(["train", str(path), *words]) == 2
    said = capsys.readouterr().err
    assert "runs/mini-" in said
    assert said.endswith(f"; the first lines of {path} say how to get it\n")
    head = path.read_text().split("model:")[0]
    step = "make mini-data" if name != "mini-visionzip-tuning" else "run that\n# first"
    assert step in head
    assert "\nmini-data:" in (ROOT / "Makefile").read_text()


def test_an_error_about_something_else_names_no_head(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(CONFIGS / "mini.yaml"), "--set", "batch=3", "--set", "model=mini", "--json"]) == 2
    assert "first lines" not in capsys.readouterr().err


def test_llavoltas_recipe_is_the_authors_script():
    config = read_config(CONFIGS / "llava-1.5-7b-llavolta.yaml")
    assert (config.batch, config.learning_rate, config.warmup, config.weight_decay) == (128, 2e-5, 0.03, 0)
    stages = [stage.compressor for stage in config.schedule_for(32).stages]
    assert [(getattr(one, "layer", None), getattr(one, "stride", None)) for one in stages] == [
        (2, 8), (2, 2), (16, 2), (None, None)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "compressor"),
    [
        ("llava-1.5-7b", VisionZip(keep=64)),
        ("llava-1.5-13b", VisionZip(keep=64)),
        ("llava-next-7b", VisionZip(keep_per_view=32)),
        ("mini-gemini-7b", VisionZip(keep=64)),
    ],
)
def test_visionzips_tuning_is_the_projector_on_a_tenth_of_the_data(model, compressor):
    config = read_config(CONFIGS / f"{model}-visionzip-tuning.yaml")
    assert (config.learn, config.share) == (("projector",), Fraction(1, 10))
    assert config.schedule_for(32).afterwards == compressor


@pytest.mark.parametrize(("model", "layers"), [("llava-1.5-13b", 40), ("video-llava-7b", 32), ("mgm-2b", 18)])
def test_llavoltas_recipes_differ_in_model_data_and_order(model, layers):
    usual, config = read_config(CONFIGS / "llava-1.5-7b-llavolta.yaml"), read_config(CONFIGS / f"{model}-llavolta.yaml")
    same = ("learn", "batch", "learning_rate", "warmup", "weight_decay", "gradient_checkpointing", "trainer")
    assert [getattr(config, name) for name in same] == [getattr(usual, name) for name in same]
    stages = config.schedule_for(layers).stages
    assert [stage.share for stage in stages] == [1] * 4
    assert max(getattr(stage.compressor, "layer", 0) for stage in stages) == layers // 2
