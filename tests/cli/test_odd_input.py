"""Texts that can be no path, paths at which nothing can be, outputs that take nothing: a line, never a traceback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from vlmzip import UserError, spec
from vlmzip.cli._shared.words import split_images_and_question
from vlmzip.cli.main import main
from vlmzip.compressor_file import read_compressor
from vlmzip.files import is_file, is_folder, is_there, open_to_read, refuse_place, write_text
from vlmzip.json_text import read_json
from vlmzip.lab.tasks.catalogue import read_task
from vlmzip.runtime import loading
from vlmzip.runtime.saving import from_pretrained

LONG = "what is it and where " * 15
#: What cannot be the name of a file, or leads nowhere.
NO_PATHS = {
    "long": LONG, "very long": "x" * 5000, "long part": f"a/{'x' * 300}/b", "zero": "a\0b", "bytes": "caf\udce9",
    "loop": "loop", "in a loop": "loop/a", "below a file": "a.png/b", "tilde": "~", "empty": "", "spaces": "  ",
}  # fmt: skip
#: Commands with a place for such a text.
PLACES = [
    ["ask", "{}", "w"],
    ["ask", "a.png", "w", "--model", "{}"],
    ["ask", "a.png", "w", "--model", "a/{}"],
    ["ask", "a.png", "w", "--method", "{}"],
    ["ask", "a.png", "w", "--method", "visionzip({})"],
    ["ask", "a.png", "w", "--device", "{}"],
    ["ask", "a.png", "w", "--overlay", "{}"],
    ["show", "{}"],
    ["show", "a.png", "--out", "{}"],
    ["calibrate", "{}", "--keep", "25%"],
    ["calibrate", "a.png", "--keep", "25%", "--histogram", "{}"],
    ["compare", "{}", "w"],
    ["compare", "a.png", "w", "--methods", "{}"],
    ["compare", "a.png", "w", "--sheet", "{}"],
    ["compare", "a.png", "w", "--html", "{}"],
    ["eval", "--tasks", "{}"],
    ["eval", "--tasks", "{}:exact"],
    ["eval", "--methods", "{}"],
    ["eval", "--calibrate-on", "{}"],
    ["eval", "--against", "{}"],
    ["eval", "--suite", "gqa", "--include-path", "{}"],
    ["tune", "--max-loss", "5", "--task", "{}:exact"],
    ["tune", "--max-loss", "5", "--methods", "{}"],
    ["study", "tau", "--task", "{}"],
    ["study", "{}"],
    ["bench", "--methods", "{}"],
    ["bench", "--preset", "{}"],
    ["train", "{}"],
    ["train", "{}", "--explain"],
    ["train", "run.yaml", "--explain", "--set", "schedule={}"],
    ["train", "run.yaml", "--explain", "--staircase", "{}"],
    ["train", "run.yaml", "--shape", "{}", "--explain"],
    ["methods", "{}"],
    ["methods", "{}:Method"],
    ["{}"],
]
OUTS = [["eval"], ["study", "tau"], ["tune", "--max-loss", "5"], ["bench"]]


def load_others(name, device=None, *others, load=loading.load, **settings):
    """Stand for `load`, which has to refuse other models and devices, and must not be reached with the usual ones."""
    if (name, device) == ("mini", None):
        pytest.fail("loaded before it refused")
    return load(name, device, *others, **settings)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vlmzip.runtime.loading.load", load_others)
    monkeypatch.setattr("vlmzip.cli.bench._measure", lambda *_: pytest.fail("measured before it refused"))
    Image.new("RGB", (9, 9)).save("a.png")
    Path("loop").symlink_to("loop")
    Path("dangling").symlink_to("nowhere")
    Path("run.yaml").write_text(json.dumps({"model": "mini", "records": "data.json", "out": "out", "steps": 3}))
    return tmp_path


def refused(capsys, *arguments):
    code = main(list(arguments))
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("vlmzip: ")
    return err


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("place", PLACES, ids=" ".join)
def test_texts_that_are_no_path_are_refused_in_a_line(capsys, place):
    for text in NO_PATHS.values():
        if _means_something(place, text):
            continue
        refused(capsys, *(part.replace("{}", text) for part in place))


def _means_something(place, text):
    """A few texts say something after all: no setting, no schedule, no name of an overlay."""
    said = [part.replace("{}", text) for part in place if "{}" in part]
    return said[0].replace(" ", "") in ("visionzip()", "schedule=", "schedule=~", "")


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("command", OUTS, ids=" ".join)
@pytest.mark.parametrize("out", ["x" * 300, "loop", "loop/a", "dangling", "a.png", "a.png/b", "a\0b", "caf\udce9"])
def test_folders_that_cannot_be_made_are_refused_first(capsys, command, out):
    refused(capsys, *command, "--out", out)


def test_a_training_runs_folder_too(capsys, folder):
    for out in ("x" * 300, "loop", "dangling"):
        assert "out: " in refused(capsys, "train", "run.yaml", "--set", f"out={out}")


@pytest.mark.usefixtures("folder")
def test_a_long_question_is_a_question():
    assert split_images_and_question(["a.png", LONG], "ask") == (["a.png"], LONG)
    chain = "+".join(["visionzip(keep=16)", *(f"random_tokens(site=in_llm,layer={n},keep=9)" for n in range(1, 20))])
    assert len(spec.read(chain).stages()) == 20


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("text", NO_PATHS.values(), ids=NO_PATHS)
def test_the_library_refuses_them_too(text):
    assert not any(look(text) for look in (is_file, is_folder, is_there))
    for read in (read_compressor, from_pretrained, lambda text: read_task(f"{text}:exact", None, None)):
        with pytest.raises(UserError):
            read(f"{text}/below" if text in ("", "  ") else text)


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null"])
def test_devices_are_no_files(capsys, folder, device):
    for reading in (
        ["train", device],
        ["train", device, "--explain"],
        ["train", "run.yaml", "--explain", "--set", f"records={device}", "--set", "steps=null"],
        ["eval", "--tasks", f"{device}:exact"],
        ["ask", device, "w"],
        ["ask", "a.png", "w", "--model", device],
        ["ask", "a.png", "w", "--method", device],
    ):
        refused(capsys, *reading)
    with pytest.raises(UserError, match="it is a device, not a file"):
        read_json(Path(device))


def test_what_is_too_large_for_settings_is_not_read_whole(capsys, folder):
    with Path("weights.yaml").open("wb") as file:
        file.truncate(1 << 40)
    assert "is too large for a configuration" in refused(capsys, "train", "weights.yaml")


def test_a_pipe_is_read(folder):
    reading, writing = os.pipe()
    os.write(writing, b"{}")
    os.close(writing)
    assert read_json(Path(f"/dev/fd/{reading}")) == {}
    os.close(reading)
    with pytest.raises(OSError, match="null byte"):
        open_to_read("a\0b")


def test_a_name_as_long_as_names_may_be_can_be_written(tmp_path):
    path = tmp_path / f"{'x' * 250}.txt"
    refuse_place(path)
    write_text(path, "text")
    assert path.read_text() == "text"


FULL = "the output cannot be written: No space left on device"


@pytest.mark.slow
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("shell", "code", "said"),
    [
        ("{} >/dev/full", 1, f"vlmzip: {FULL}\n"),
        ("{} | true; exit ${{PIPESTATUS[0]}}", 0, ""),
        ("{} >&-", 0, ""),
        ("{} 2>&-", 0, ""),
        ("{} 2>/dev/full", 0, ""),
    ],
)
def test_an_output_that_takes_nothing(shell, code, said, unbuffered):
    for arguments in ("methods", "methods --json", "models", "--help", "--version", "eval --help"):
        command = f"{sys.executable} -m vlmzip.cli.main {arguments}"
        done = subprocess.run(
            ["bash", "-c", shell.format(command)], capture_output=True, text=True,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (code, said), arguments


@pytest.mark.parametrize("where", ["2>/dev/full", "2>&-"])
def test_a_mistake_keeps_its_exit_code_where_nobody_reads_it(where):
    done = subprocess.run(["bash", "-c", f"{sys.executable} -m vlmzip.cli.main shoe {where}"], check=False)
    assert done.returncode == 2
