"""`tune` as a user runs it: what it chooses can be used, nothing is asked twice, and it says what nothing meets."""

import csv
import json
import re
import xml.etree.ElementTree as ET

import pytest
from PIL import Image

from tests.families import save_checkpoint
from tests.lab.test_study import asked as listen
from tests.lab.test_tasks import question, write
from vlmzip import Pool2d, spec
from vlmzip.cli.main import main

MINI = ("--limit", "24", "--methods", "pool2d,random_tokens", "--average-keep", "25%,11%")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-llava")
    save_checkpoint(folder)
    return str(folder)


@pytest.fixture
def questions(tmp_path):
    """Twelve images, two questions about each; the tiny model is never right."""
    folder = tmp_path / "asked"
    lines = [question(f"p{n % 12}.png", question=f"w{n + 4}") for n in range(24)]
    place = write(folder, *lines)
    for n in range(12):
        Image.new("RGB", (60, 40), (20 * n, 99, 30)).save(folder / f"p{n}.png")
    return place


@pytest.fixture
def tune(capsys, checkpoint, questions, tmp_path):
    def run(*arguments, out="out"):
        options = ["--methods", "pool2d,visionzip,dfmr", "--average-keep", "50%,25%", "--batch", "4"]
        options += ["--max-new-tokens", "3"]
        options += ["--model", checkpoint, "--tasks", questions + ":exact", "--out", str(tmp_path / out)]
        code = main(["tune", *options, *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def on_mini(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mini")

    def run(capsys, *arguments):
        code = main(["tune", *MINI, "--out", str(folder), "--json", *arguments])
        out, err = capsys.readouterr()
        return code, json.loads(out), err, folder

    return run


@pytest.mark.draws
def test_what_is_chosen_keeps_to_the_limit_and_can_be_used(on_mini, capsys):
    code, found, _, folder = on_mini(capsys, "--max-tokens", "20")
    assert (code, found["verdict"], found["most"]) == (0, "best", 20)
    chosen = found["chosen"]
    assert chosen["tokens"] == chosen["confirmed"]["cost"] == 16
    assert {one["asked"] for one in found["candidates"] if one["tokens"] > 20} == {0}
    assert chosen["score"] == max(one["score"] for one in found["candidates"] if one["asked"])
    # Two candidates and the plain model on one half, one candidate and the plain model on the other.
    assert found["answers"] == 3 * found["questions"]["choose"] + 2 * found["questions"]["confirm"]
    assert found["grid"] == 3 * 24
    method = str(folder / "compressor.json")
    assert found["compressor"] == method
    assert spec.write(spec.read(method)) == chosen["compressor"]
    assert main(["ask", "examples/flat.png", "what color is the ring ?", "--method", method, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"][0]["after"] == 16
    assert {path.name for path in folder.iterdir()} == {
        ".lock", "compressor.json", "curve.png", "curve.svg", "records", "study.json", "tune.csv"
    }  # fmt: skip
    assert Image.open(folder / "curve.png").width > 1000
    assert ET.parse(folder / "curve.svg").getroot().tag.endswith("svg")


def test_limits_that_nothing_meets_leave_no_compressor(on_mini, capsys):
    code, _, err, folder = on_mini(capsys, "--max-tokens", "20")
    assert (folder / "compressor.json").exists()
    code, found, err, _ = on_mini(capsys, "--max-tokens", "20", "--max-loss", "0.5")
    assert re.search(rf"^note: .*{folder}/compressor.json of an earlier run is removed, so", err, re.M)
    assert (code, found["verdict"], found["chosen"], found["compressor"]) == (0, "nothing", None, None)
    assert not (folder / "compressor.json").exists()
    (said,) = found["said"]
    assert re.fullmatch(
        r"(No estimate|Nothing) is within 0\.5 points at 20 visual tokens[;:] the nearest, .*, 16 visual tokens,"
        r" loses .* points on the half that chooses, so 0\.5 is (not )?ruled out.*\.",
        said,
    )
    assert "compressor.json" not in on_mini(capsys, "--max-tokens", "20", "--max-loss", "0.5")[2]


def test_milliseconds_are_measured_once(tune, monkeypatch):
    monkeypatch.setattr("vlmzip.lab.tune.study.TIMED", 1)
    monkeypatch.setattr("vlmzip.lab.tune.study.REPEATS", 2)
    code, out, _ = tune("--max-prefill-ms", "100000", "--json")
    first = json.loads(out)
    assert (code, first["verdict"], first["cost"]) == (0, "best", "ms")
    assert all(one["ms"] > 0 for one in first["candidates"])
    monkeypatch.setattr("vlmzip.lab.tune.study.time_answer", lambda *_: pytest.fail("measured again"))
    assert json.loads(tune("--max-prefill-ms", "100000", "--json")[1]) == first
    fastest = min(one["ms"] for one in first["candidates"])
    (said,) = json.loads(tune("--max-prefill-ms", fastest / 2, "--json")[1])["said"]
    assert said.startswith("Nothing costs at most ")


def test_corrupt_times_are_named(tune, tmp_path, monkeypatch):
    monkeypatch.setattr("vlmzip.lab.tune.study.TIMED", 1)
    monkeypatch.setattr("vlmzip.lab.tune.study.REPEATS", 1)
    tune("--max-prefill-ms", "0.001")
    path = tmp_path / "out" / "prefill.json"
    without_a_time, with_a_wrong_time = (json.loads(path.read_text()) for _ in range(2))
    del without_a_time["ms"]["1"]
    with_a_wrong_time["ms"]["1"] = "soon"
    for content in ("{broken", "[]", json.dumps(without_a_time), json.dumps(with_a_wrong_time)):
        path.write_text(content)
        code, out, err = tune("--max-prefill-ms", "0.001")
        assert (code, out, err.count("\n")) == (2, "", 1), content
        assert err.startswith(f"vlmzip: '{path}' cannot be read: ")
        assert "delete it, and the prefill is timed again" in err
    path.write_text('{"conditions": 1}')  # measured under others, which is not an error
    assert tune("--max-prefill-ms", "0.001")[0] == 0


def test_what_breaks_while_it_is_timed_is_reported_too(tune, tmp_path, monkeypatch):
    def broken(self, tokens):
        raise RuntimeError("boom")

    monkeypatch.setattr("vlmzip.Pool2d.assign", broken)
    monkeypatch.setattr("vlmzip.lab.tune.study.TIMED", 1)
    monkeypatch.setattr("vlmzip.lab.tune.study.REPEATS", 1)
    with pytest.raises(SystemExit) as exit:
        tune("--max-prefill-ms", "100000")
    assert exit.value.code == 1
    with (tmp_path / "out" / "tune.csv").open(newline="") as file:
        fates = {row["compressor"]: (row["fate"], row["detail"]) for row in csv.DictReader(file)}
    assert fates["pool2d(factor=2)"] == ("broke", "failed with RuntimeError: boom")


@pytest.mark.slow
def test_a_stop_in_the_middle_costs_nothing(tune, tmp_path, monkeypatch):
    """Nor do rounds: three of them here, of 4, 8 and 12 questions."""
    from vlmzip.runtime.answering import Answerer

    monkeypatch.setattr("vlmzip.lab.tune.search.FIRST", 4)
    whole = json.loads(tune("--max-flops", "60%", "--max-loss", "5", "--json", out="whole")[1])
    heard, real = listen(monkeypatch), Answerer.answer

    def stops(*arguments):
        if len(heard) == 5:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Answerer, "answer", stops)
        code, out, _ = tune("--max-flops", "60%", "--max-loss", "5")
    assert (code, out) == (130, "")
    again = json.loads(tune("--max-flops", "60%", "--max-loss", "5", "--json")[1])
    assert {**again, "out": 0, "compressor": 0} == {**whole, "out": 0, "compressor": 0}
    assert sum(map(len, heard)) == whole["answers"]
    assert {one["rounds"] for one in whole["candidates"]} == {3}


def test_the_table_says_what_is_certain_and_what_is_not(tune, checkpoint, tmp_path):
    code, out, _ = tune("--max-loss", "5")
    assert code == 0
    assert re.search(r"^candidate +tokens +FLOPs +asked +score % +loss", out, re.M)
    assert re.search(r"^pool2d\(factor=2\) +9\.0 +\d+\.\d% +12 +0\.0 +0\.0 \[0\.0, 0\.0\] +", out, re.M)
    impossible = "3 combinations of method and budget cannot run (1 of pool2d, 2 of dfmr); tune.csv says why"
    assert f"\n{impossible}\n" in out
    assert "The estimate is within 5 points, but 6 images are too few to confirm it; at least 20 are needed." in out
    use = f"use it: vlmzip ask IMAGE QUESTION --model {checkpoint} --method {tmp_path}/out/compressor.json"
    assert use in out
    assert spec.read(str(tmp_path / "out" / "compressor.json")) == Pool2d(factor=2)
    with (tmp_path / "out" / "tune.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["method"] == "no_compression"
    assert sum(row["fate"] == "chosen" for row in rows) == 1
    assert {row["detail"] for row in rows if row["method"] == "dfmr"} == {
        "its threshold must be set from images without questions in the task; give --calibrate-on FOLDER"
    }


def test_what_costs_too_much_is_one_line_and_not_in_the_table(tune):
    code, out, _ = tune("--max-tokens", "9")
    assert code == 0
    assert (
        "\n1 candidate was not asked because of the cost (1 of visionzip); the cheapest: visionzip(keep=50%), 18 "
        in out
    )
    assert not re.search(r"^visionzip\(keep=50%\)", out, re.M)
    assert re.search(r"kept to the end, not chosen *$", out, re.M)


def test_a_broken_method_is_dropped_and_says_why(tune, monkeypatch, capsys):
    def broken(self, tokens):
        raise RuntimeError("[red]boom")

    monkeypatch.setattr("vlmzip.Pool2d.assign", broken)
    with pytest.raises(SystemExit) as exit:
        tune("--max-loss", "5")
    assert exit.value.code == 1
    out = capsys.readouterr().out
    assert re.search(r"^pool2d\(factor=2\) .* broke *$", out, re.M)
    assert "\npool2d(factor=2) failed with RuntimeError: [red]boom\n" in out
    assert re.search(r"^visionzip\(keep=25%\) .* chosen", out, re.M)


def test_without_matplotlib_there_is_a_choice(tune, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    code, _, err = tune("--max-loss", "5")
    assert code == 0
    assert "no curve is drawn: figures need matplotlib" in err
    assert (tmp_path / "out" / "compressor.json").exists()


MISTAKES = [
    ([], "tune needs a limit"),
    (["--max-tokens", "0"], "--max-tokens 0 keeps nothing"),
    (["--max-tokens", "9", "--max-flops", "30%"], "not allowed with"),
    (["--max-flops", "30"], "--max-flops 30: give a share, such as 30% or 0.3"),
    (["--max-flops", "0"], "--max-flops 0: give a share, such as 30% or 0.3"),
    (["--max-prefill-ms", "0"], "--max-prefill-ms 0: give more than 0"),
    (["--max-prefill-ms", "nan"], "--max-prefill-ms nan: give more than 0"),
    (["--max-loss", "-1"], "--max-loss -1: give points from 0 to 100"),
    (["--max-loss", "nan"], "--max-loss nan: give points from 0 to 100"),
    (["--max-loss", "1", "--average-keep", ","], "names no budget"),
    (["--max-loss", "1", "--average-keep", "0"], "--average-keep 0 keeps nothing"),
    (["--max-loss", "1", "--methods", "visionsip"], "did you mean 'visionzip'"),
    (["--max-loss", "1", "--tasks", "mini,{folder}:exact"], "--task takes exactly one task, got 'mini,"),
    (["--max-loss", "1", "--task", ""], "--task takes exactly one task, got ''"),
    (["--max-loss", "1", "--task", "nowhere:exact"], "unknown task or folder 'nowhere'"),
    (["--max-loss", "1", "--limit", "1"], "questions about at least 2 images"),
    (["--max-loss", "1", "--batch", "0"], "--batch 0: give at least 1"),
    (["--max-loss", "1", "--seed", "-1"], "--seed -1: give at least 0"),
    (["--max-loss", "1", "--out", "{folder}/p0.png"], "is a file; give a folder"),
    (["--max-loss", "1", "--out", "{model}"], "holds a model"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(a) for a, _ in MISTAKES])
def test_mistakes_get_one_line_and_exit_code_2(
    capsys, tmp_path, monkeypatch, questions, checkpoint, arguments, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vlmzip.runtime.loading.load", lambda *_: pytest.fail("loaded before it refused"))
    before = sorted(tmp_path.rglob("*"))
    code = main(["tune", *(argument.format(folder=questions, model=checkpoint) for argument in arguments)])
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert sorted(tmp_path.rglob("*")) == before
