"""The example of docs/vllm.md runs and prints what the page says, and the page names what the plugin does."""

import os
import re
import subprocess
import sys
from importlib import import_module

import pytest

pytest.importorskip("vllm")

from tests.docs.blocks import ROOT, python_blocks
from vlmzip.serving.vllm import plugin
from vlmzip.serving.vllm.processor import CompressingProcessor

PAGE = ROOT / "docs" / "vllm.md"


def test_the_example_prints_what_the_page_says_when_it_runs_as_a_script(tmp_path):
    """It runs with vLLM's own settings, such as an engine in another process."""
    block = python_blocks(PAGE)[0]
    script = tmp_path / "example.py"
    script.write_text(block.code)
    settings = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    settings["VLLM_NO_USAGE_STATS"] = "1"
    run = subprocess.run([sys.executable, script], cwd=ROOT, env=settings, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert f"\n{block.printed}" in run.stdout  # vLLM logs before and after it


def overridden():
    """Return what the plugin's classes override of vLLM's, and what it assigns in vLLM's modules."""
    plugins = {getattr(import_module(module), name) for module, name in map(split, plugin.ARCHITECTURES.values())}
    processors = descendants(CompressingProcessor)
    mixins = {base for each in plugins | processors for base in each.__mro__ if base.__module__.startswith("vlmzip.")}
    names = {
        name
        for each in plugins | processors
        for stock in each.__mro__
        if stock.__module__.startswith("vllm.")
        for mixin in mixins & set(each.__mro__)
        for name in vars(mixin).keys() & vars(stock).keys()
        if callable(vars(stock)[name]) and not name.startswith(("__", "_abc"))
    }
    return names | {plugin.CHECKED_AT}


def split(path):
    return path.split(":")


def descendants(cls):
    return {cls}.union(*map(descendants, cls.__subclasses__()))


def test_the_page_names_what_the_plugin_overrides():
    names = overridden()
    assert {"embed_multimodal", "_get_prompt_updates", "get_mrope_input_positions", "get_dummy_inputs"} <= names
    table = PAGE.read_text().partition("## What the plugin replaces in vLLM")[2]
    words = set(re.findall(r"\w+", table))
    assert not names - words
