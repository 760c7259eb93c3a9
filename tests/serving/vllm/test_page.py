"""The example of docs/vllm.md runs and prints what the page says, and the page names what the plugin does."""

import pytest

pytest.importorskip("vllm")

from tests.docs.blocks import ROOT, python_blocks
from vlmzip.serving.vllm import plugin

PAGE = ROOT / "docs" / "vllm.md"


def test_the_example_prints_what_the_page_says(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    block = python_blocks(PAGE)[0]
    capsys.readouterr()
    exec(compile(block.code, block.page, "exec"), {})
    assert capsys.readouterr().out.endswith(block.printed)


def test_the_page_names_the_method_that_the_plugin_replaces():
    assert f"`ModelConfig.{plugin.CHECKED_AT}`" in PAGE.read_text()
