"""Progress as a user sees it: a bar with the time left on a terminal, lines elsewhere, and nothing of it on stdout."""

import json
import os
import pty
import re
import sys
import threading
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from tests.families import save_checkpoint
from tests.lab.test_tasks import question, write
from vlmzip.cli._shared import console
from vlmzip.cli._shared.console import log_on_stderr, show_work
from vlmzip.cli.main import main
from vlmzip.lab.bench import presets
from vlmzip.lab.bench.presets import Llava
from vlmzip.progress import Work, showing, working
from vlmzip.visual_tokens import Grid

#: What a terminal is told to do, such as to move the cursor.
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """A pseudo-terminal in place of stderr. `text` is what it got."""

    def __init__(self):
        self.text = ""

    @contextmanager
    def as_stderr(self, monkeypatch, width=100):
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("COLUMNS", str(width))
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            monkeypatch.delenv(name, raising=False)
        reading, writing = pty.openpty()
        got = []

        def read():
            while True:
                try:
                    part = os.read(reading, 65536)
                except OSError:  # Linux: the other end is closed
                    return
                if not part:
                    return
                got.append(part)

        reader = threading.Thread(target=read)
        reader.start()
        with open(writing, "w") as stderr:
            monkeypatch.setattr(sys, "stderr", stderr)
            # rich asks for these when the console is made.
            monkeypatch.setattr(console.console, "is_interactive", True)
            monkeypatch.setattr(console.console, "_width", width)
            try:
                yield
            finally:
                monkeypatch.undo()
        reader.join()
        os.close(reading)
        self.text = b"".join(got).decode()

    def lines(self):
        return [line.strip() for line in re.split(r"[\r\n]+", CONTROL.sub("", self.text)) if line.strip()]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a checkpoint, and 20 images from plain to noisy, eight of them with a question."""
    folder = tmp_path_factory.mktemp("progress")
    save_checkpoint(folder / "tiny")
    write(folder / "asked", *(question(f"{n:02}.png", question=f"w{n + 4}") for n in range(8)))
    rng = np.random.default_rng(0)
    for path in (folder / "asked").glob("*.png"):
        path.unlink()
    for n in range(20):
        noise = rng.integers(-6 * n, 6 * n + 1, (48, 48, 3))
        Image.fromarray((128 + noise).astype(np.uint8)).save(folder / "asked" / f"{n:02}.png")
    return folder


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    preset = Llava(
        images=1, grid=Grid(1, 4, 4), layers=2, heads=1, mlp=32, vision_layers=2, vision_heads=1, vision_mlp=32
    )
    monkeypatch.setitem(presets.PRESETS, "llava-1.5-7b", preset)
    monkeypatch.setattr("vlmzip.lab.analyses.encoder_attention.TOGETHER", 2)
    monkeypatch.setattr("vlmzip.cli.bench.in_frugal_process", lambda peaks, *recipe: [2**20] * len(recipe[-1]))


ASKED = ("--methods", "pool2d", "--average-keep", "25%", "--batch", "2", "--max-new-tokens", "2", "--out", "{out}")
COMMANDS = {
    "eval": (["--tasks", "{asked}:exact", *ASKED], r"asking .*, pool2d\(factor=2\) .* (8|10|12|14)/16 about"),
    "tune": (["--tasks", "{asked}:exact", "--max-loss", "100", *ASKED], r"asking .* \d+/\d+ about"),
    "study": (["encoder_attention", "--task", "{asked}:exact", "--out", "{out}"], r"encoding images .* [246]/8 about"),
    "compare": (
        ["{asked}/00.png", "w4", "--methods", "pool2d,visionzip", "--max-new-tokens", "2"],
        r"(pool2d|visionzip|no_compression) .* \d+/\d+ about",
    ),
    "calibrate": (
        ["{asked}", "--method", "dfmr", "--keep", "50%", "--max-factor", "2", "--measure", "pixels"],
        r"measuring images .* 16/20 about",
    ),
    "bench": (
        ["--methods", "pool2d", "--keep", "4", "--repeats", "2", "--new-tokens", "2", "--text-tokens", "6",
         "--device", "cpu", "--scale", "1", "--out", "{out}"],
        r"round [12] of 2: \w+ .* \d/10 about",
    ),
}  # fmt: skip


@pytest.fixture
def every_change(monkeypatch):
    """Draw bars at each change, and not ten times in a second, because tests are fast."""
    from rich.progress import Progress

    update = Progress.update
    monkeypatch.setattr(Progress, "update", lambda *args, **more: update(*args, refresh=True, **more))


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.usefixtures("every_change")
def test_a_terminal_shows_a_bar_with_the_time_left(command, place, tmp_path, monkeypatch, capsys):
    arguments, bar = COMMANDS[command]
    model = [] if command == "bench" else ["--model", str(place / "tiny")]
    words = [word.format(asked=place / "asked", out=tmp_path / "out") for word in arguments]
    terminal = Terminal()
    with terminal.as_stderr(monkeypatch, width=200):
        assert main([command, *words, *model, "--json"]) == 0, terminal.lines()
    out = capsys.readouterr().out
    json.loads(out)
    assert any(re.search(bar, line) and "left" in line for line in terminal.lines()), terminal.lines()[-20:]


def test_a_bar_leaves_only_the_lines(monkeypatch):
    """The bar is removed, the log lines stay, and a long name is cut, so that the bar has one line."""
    terminal = Terminal()
    bar = working("asking " + 100 * "x", 2)
    with terminal.as_stderr(monkeypatch, width=60), log_on_stderr(), showing(show_work), bar as work:
        work.advance()
        console.log.info("a line")
    lines = terminal.lines()
    assert "a line" in lines
    assert all(len(line) <= 60 for line in lines)
    assert terminal.text.rstrip("\r\n").endswith("\x1b[2K")  # the last thing is that the bar's line is erased


def test_elsewhere_a_line_a_minute_says_the_time_left(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    work = Work("measuring images", 1000, clock=lambda: now)
    with log_on_stderr(), show_work(work) as work.changed:
        for _ in range(10):
            now += 25
            work.advance()
    assert capsys.readouterr().err.splitlines() == [
        "measuring images: 3 of 1,000, about 6.9 h left",
        "measuring images: 6 of 1,000, about 6.9 h left",
        "measuring images: 9 of 1,000, about 6.9 h left",
    ]


def test_only_the_first_process_shows_it(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    terminal = Terminal()
    with terminal.as_stderr(monkeypatch), log_on_stderr(), show_work(Work("asking", 2)) as changed:
        changed()
    assert terminal.text == ""


def test_eval_says_the_time_left_in_lines(place, tmp_path, capsys):
    words = [word.format(asked=place / "asked", out=tmp_path / "out") for word in COMMANDS["eval"][0]]
    assert main(["eval", *words, "--model", str(place / "tiny"), "--json"]) == 0
    out, err = capsys.readouterr()
    json.loads(out)
    first, last = (line for line in err.splitlines() if "questions in" in line)
    assert re.search(r"^\[1/2\] .*, no_compression: 8 questions in \d+ s, about \d+ s left$", first)
    assert re.search(r"^\[2/2\] .*, pool2d\(factor=2\): 8 questions in \d+ s$", last)
    assert "\x1b" not in err
