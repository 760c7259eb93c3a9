"""docs/support.md shows what differs from version to version, and counts it."""

import json

import pytest


@pytest.fixture
def support(maker, tmp_path):
    """The script, with its page in another folder."""
    module = maker("support")
    module.PAGE = tmp_path / "support.md"
    return module


def run(folder, version, cells):
    path = folder / f"{version}.json"
    path.write_text(json.dumps({"torch": "2.0", "transformers": version, "cells": cells}))
    return str(path)


def test_a_cell_says_where_versions_differ(tmp_path, support):
    new = run(tmp_path, "5.23.0", {"a": {"x": ["works"], "y": ["works", "refused"]}, "b": {"x": ["works"]}})
    old = run(tmp_path, "5.9.0", {"a": {"x": ["works"], "y": ["works", "fails"]}, "b": {"x": ["refused"]}})
    assert support.main([new, old]) == 1  # a cell fails
    lines = (tmp_path / "support.md").read_text().splitlines()
    assert "| a | works | 5.23.0: refused; 5.9.0: fails |" in lines
    assert "| b | 5.23.0: works; 5.9.0: refused | not run |" in lines
    assert lines[-2:] == [
        "- transformers 5.23.0: 2 works, 1 refused, 1 not run",
        "- transformers 5.9.0: 1 works, 1 refused, 1 not run, 1 fails",
    ]


def test_versions_in_which_the_same_was_found_stand_together(tmp_path, support):
    found = {"5.24.0": "works", "5.23.1": "works", "5.19.0": "plain model fails", "5.18.0": "works"}
    runs = [run(tmp_path, version, {"a": {"x": [one], "y": ["works"]}}) for version, one in found.items()]
    assert support.main(runs[::-1]) == 0
    page = (tmp_path / "support.md").read_text()
    assert "| a | 5.24.0, 5.23.1, 5.18.0: works; 5.19.0: plain model fails | works |\n" in page
    assert "(torch 2.0 with transformers 5.24.0, 5.23.1, 5.19.0, 5.18.0)" in page
