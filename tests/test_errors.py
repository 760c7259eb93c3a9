"""Suggestions in place of unknown names, numbers with nouns, and the commands that install extras."""

import re

import pytest

from vlmzip.cli.main import COMMANDS
from vlmzip.errors import closest, counted, how_to_install
from vlmzip.schema import describe
from vlmzip.training.config import Config

NAMES = {
    "settings": [field.name for field in describe(Config)],
    "commands": list(COMMANDS),
    "options": ["--keep", "--json", "--lora", "--max-factor", "--methods", "--dominant"],
    "others": ["mini", "none", "tau", "l2", "layer", "float32", "visionzip", "attention_by_depth", "mean", "cpu"],
}


@pytest.mark.parametrize(
    ("word", "names", "meant"),
    [
        ("lr", "settings", "learning_rate"),
        ("modle", "settings", "model"),
        ("lorra", "settings", "lora"),
        ("batchsize", "settings", "batch"),
        ("shoe", "commands", "show"),
        ("sohw", "commands", "show"),
        ("evl", "commands", "eval"),
        ("trian", "commands", "train"),
        ("--kep", "options", "--keep"),
        ("--factor", "options", "--max-factor"),
        ("--dominent", "options", "--dominant"),
        ("tao", "others", "tau"),
        ("meen", "others", "mean"),
        ("vision", "others", "visionzip"),
        ("attention", "others", "attention_by_depth"),
        ("cpa", "others", "cpu"),
        ("lr", "others", None),
        ("no", "others", None),
        ("in", "others", None),
        ("--lr", "options", None),
        ("ok", "commands", None),
        ("", "commands", None),
    ],
)
def test_a_near_miss_is_named_and_a_far_one_is_not(word, names, meant):
    said = closest(word, NAMES[names])
    assert said == (f"; did you mean {meant!r}?" if meant else f"; choose one of {', '.join(sorted(NAMES[names]))}")


@pytest.mark.parametrize("page", ["serve", "store", "vllm", "video", "evaluate", "start"])
def test_messages_install_extras_as_the_pages_do(page, request):
    text = (request.config.rootpath / "docs" / f"{page}.md").read_text(encoding="utf-8")
    extras = re.findall(r"pip install .vlmzip\[(\w+)\]", text)
    assert extras
    assert all(how_to_install(extra) in text for extra in extras)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 images"), (1, "1 image"), (2, "2 images"), (1_234_567, "1,234,567 images"), (1.0, "1 image")],
)
def test_a_number_has_its_noun(count, text):
    assert counted(count, "image") == text
