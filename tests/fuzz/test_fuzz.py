"""The kinds of finds, and a small, fixed part of `make fuzz`."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TARGETS = ["words", "specs", "compressor.json", "images", "yaml", "questions", "model", "store"]
#: A script that replaces `main`; the first word of a case chooses what `main` does.
WHAT_IS_A_FIND = """
import sys, time
from tests.fuzz.process import Case, run
from vlmzip.cli import main as module

DOES = {
    "right": lambda: print("answer"),
    "refused": lambda: print("note: x\\nvlmzip: no such thing", file=sys.stderr) or 2,
    "raises": lambda: 1 / 0,
    "sleeps": lambda: time.sleep(60),
    "code 1": lambda: 1,
    "code 2 alone": lambda: 2,
    "a line beside": lambda: print("libtiff: warning\\nvlmzip: x", file=sys.stderr) or 2,
    "memory": lambda: bytearray(1 << 36),
}
module.main = lambda arguments: DOES[arguments[0]]()
for name in DOES:
    with run(Case([name]), 1 if name == "sleeps" else 60) as outcome:
        print(f"{name}: {outcome.find}")
"""


def python(*arguments):
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_each_kind_of_find():
    code, out, err = python("-c", WHAT_IS_A_FIND)
    assert code == 0, err
    assert out.splitlines() == [
        "right: ", "refused: ", "raises: traceback", "sleeps: hang", "code 1: exit code", "code 2 alone: noise",
        "a line beside: noise", "memory: traceback",
    ]  # fmt: skip


@pytest.mark.slow
def test_broken_input_is_refused_in_a_line(tmp_path):
    cases = ["--seed", "0", "--first", "20", "--cases", "3", "--out", str(tmp_path)]
    code, out, err = python("-m", "tests.fuzz", *cases, "--only", *TARGETS)
    assert code == 0, out + err
    assert out.splitlines()[-1].split()[:2] == ["all", str(3 * len(TARGETS))]
