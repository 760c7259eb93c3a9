"""A method in a file of one's own is found in the current folder, and nothing else there is ever run."""

import json
import pickle
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from vlmzip import UserError, catalogue, own_files, spec
from vlmzip.cli.main import main

METHOD = """
from dataclasses import dataclass

import {helper}
from vlmzip import RandomTokens


@dataclass(frozen=True, kw_only=True)
class Mine(RandomTokens):
    \"\"\"Keep some.\"\"\"

    def assign(self, tokens):
        import {late}

        assert {helper}.VALUE == {late}.VALUE
        return super().assign(tokens)
"""
#: What libraries look for, use if it is there, and do without otherwise.
OPTIONAL = (
    "apex", "av", "cv2", "decord", "deepspeed", "detectron2", "essentia", "faiss", "flash_attn", "flax", "ftfy", "gguf",
    "jax", "kernels", "librosa", "mlx", "optimum", "pandas", "phonemizer", "pytesseract", "sacremoses", "sentencepiece",
    "soundfile", "tabulate", "tensorflow", "tiktoken", "timm", "torchaudio", "torchvision", "torch_xla", "triton",
)  # fmt: skip


def write_method(folder, name):
    """A method that imports one file beside it at once, and another as late as it works."""
    helper, late = f"{name}_helper", f"{name}_late"
    (folder / f"{name}.py").write_text(METHOD.format(helper=helper, late=late))
    for beside in (helper, late):
        (folder / f"{beside}.py").write_text("VALUE = 7")
    return f"{name}:Mine"


@pytest.mark.slow
def test_only_the_method_and_what_it_imports_are_run(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    traps = [name for name in OPTIONAL if find_spec(name) is None]
    assert "tabulate" in traps
    for name in traps:
        (tmp_path / f"{name}.py").write_text(
            "from pathlib import Path; Path('was_run').open('a').write(__name__ + ' ')"
        )
    method = write_method(tmp_path, "found_by_asking")
    command = [sys.executable, "-m", "vlmzip.cli.main", "ask", "a.png", "is there a star ?", "--method", method]
    done = subprocess.run([*command, "--keep", "9", "--json"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["compressor"]["method"] == method
    assert not (tmp_path / "was_run").exists(), (tmp_path / "was_run").read_text()


def test_siblings_are_found_by_files_of_the_same_folder_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    catalogue.find(write_method(tmp_path, "found_in_folder"))
    assert sys.path == path
    assert find_spec("found_in_folder_late") is None
    assert find_spec("found_in_folder") is not None


def test_a_package_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "found_package").mkdir()
    (tmp_path / "found_package" / "mine.py").write_text("from vlmzip import Pool2d\nimport found_package.other")
    (tmp_path / "found_package" / "other.py").write_text("")
    assert catalogue.find("found_package.mine:Pool2d").name() == "pool2d"


@pytest.mark.parametrize(
    "command", [["methods"], ["ask", "a.png", "w", "--method"], ["compare", "a.png", "w", "--methods"]]
)
def test_every_command_finds_it(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (9, 9)).save("a.png")
    name = f"found_by_{command[0]}"
    quick = [] if command[0] == "methods" else ["--keep", "9", "--max-new-tokens", "1"]
    assert main([*command, write_method(tmp_path, name), *quick]) == 0
    assert "Keep some." in (out := capsys.readouterr().out) or "144" in out


@pytest.mark.slow
def test_another_process_finds_it_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    method = spec.read(write_method(tmp_path, "found_by_child") + "(keep=5)")
    assert pickle.loads(pickle.dumps(method)) == method
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], input=pickle.dumps(method), capture_output=True, check=True
    )
    assert done.stdout.decode().strip() == str(method)


def test_explaining_a_training_run_runs_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    method = write_method(tmp_path, "found_by_nobody")
    content = {"model": "mini", "records": "data.json", "out": "out", "schedule": method, "steps": 3}
    Path("run.yaml").write_text(json.dumps(content))
    assert main(["train", "run.yaml", "--explain"]) == 2
    assert "'found_by_nobody' is a file of this folder, and files of this folder are not run" in capsys.readouterr().err
    assert "found_by_nobody" not in sys.modules
    with own_files.left_alone(), pytest.raises(UserError, match="cannot import"):
        catalogue.find("found_nowhere:Mine")
    assert catalogue.find(method).name() == "found_by_nobody"
