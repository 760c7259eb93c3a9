"""The words with which a shell completes a line."""

import os
import subprocess
import sys

import pytest

from vlmzip import outline
from vlmzip.cli.main import COMMANDS

pytestmark = pytest.mark.slow  # starts processes

pytest.importorskip("argcomplete")


def completed(line, tmp_path):
    """The words that argcomplete's shell function gets for a line."""
    words = tmp_path / "words"
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_STDOUT_FILENAME": str(words)}
    asked |= {"COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9"}
    command = "import sys; from vlmzip.cli.main import main; main(); sys.exit(9)"  # 9: it did not end by itself
    subprocess.run([sys.executable, "-c", command], env=os.environ | asked, cwd=tmp_path, check=True)
    return [word.strip() for word in words.read_text().splitlines()]


def test_commands(tmp_path):
    assert set(COMMANDS) <= set(completed("vlmzip ", tmp_path))
    assert completed("vlmzip comp", tmp_path) == ["compare"]


def test_options_of_a_command_and_of_its_method(tmp_path):
    assert completed("vlmzip ask a.png what --base", tmp_path) == ["--baseline"]
    assert completed("vlmzip ask a.png what --method fastv --la", tmp_path) == ["--layer"]
    assert completed("vlmzip ask a.png what --method dfmr --la", tmp_path) == []
    assert completed("vlmzip ask a.png what --method nonsense --base", tmp_path) == ["--baseline"]


def test_values(tmp_path):
    (tmp_path / "minis").mkdir()
    (tmp_path / "minimal.png").touch()
    assert completed("vlmzip ask a.png what --method vis", tmp_path) == ["visionzip", "vispruner"]
    assert {method.name for method in outline.methods()} <= set(completed("vlmzip methods ", tmp_path))
    assert completed("vlmzip eval --methods visionzip,pool", tmp_path) == ["visionzip,pool2d"]
    assert "pool2d,pool2d" not in completed("vlmzip eval --methods pool2d,", tmp_path)
    assert completed("vlmzip ask a.png what --model mini", tmp_path) == ["mini", "minis/"]
    assert completed("vlmzip ask mini", tmp_path) == ["minimal.png", "minis/"]
