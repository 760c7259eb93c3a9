"""An untrained LLaVA is made from an LLM and an encoder, or one line says why the parts do not fit."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, CLIPVisionModel, LlamaForCausalLM

from tests.families import save_checkpoint, tiny_llava
from tests.tiny import VOCABULARY
from vlmzip.cli._shared.loading import load

SCRIPT = Path(__file__).parents[2] / "recipes" / "llava_untrained.py"


@pytest.fixture
def parts(tmp_path):
    """Write a tiny LLaVA, and an LLM (without the last eight words) and an encoder of its shape."""
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
    """Run the script, and return its exit code and stderr."""

    def run(llm="llm", encoder="encoder"):
        given = {"llm": parts / llm, "encoder": parts / encoder, "like": parts / "llava", "out": parts / "untrained"}
        words = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
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
