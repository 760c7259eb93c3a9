"""`eval` as a user runs it: tables, files, a page that needs nothing else, one line for each mistake."""

import csv
import errno
import json
import os
import re
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from tests.cli.test_compare import Elements
from tests.families import save_checkpoint
from tests.lab.test_tasks import question, write
from vlmzip.cli.main import main
from vlmzip.errors import UserError, how_to_install
from vlmzip.lab.tasks.catalogue import read_task
from vlmzip.visualize.page import POLICY

TINY = ("--methods", "pool2d,fastv(layer=1)", "--average-keep", "25%", "--batch", "4", "--max-new-tokens", "3")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-llava")
    save_checkpoint(folder)
    return str(folder)


def write_questions(folder):
    """A folder with ten questions, some of them hard to print."""
    lines = [question("abc"[n % 3] + ".png", question=f"w{n + 4}", type=f"<i>{n % 2}") for n in range(9)]
    return write(folder, *lines, question(question="[bold] <script>alert(1)</script> & w5 ?"))


@pytest.fixture
def asked(tmp_path):
    return write_questions(tmp_path / "asked")


@pytest.fixture
def evaluate(capsys, checkpoint, asked, tmp_path):
    def run(*arguments, tasks=asked + ":exact"):
        out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
        code = main(["eval", "--model", checkpoint, "--tasks", tasks, *TINY, *out, *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


@pytest.mark.draws
def test_the_table_and_the_files(evaluate, tmp_path, asked):
    code, out, err = evaluate()
    assert code == 0
    assert "10 questions of questions.jsonl; exact match" in out
    assert re.search(r"^no_compression +100% +100\.0% +100\.0% +0\.0 ± 0\.0 +— +0 *$", out, re.M)
    assert re.search(r"^pool2d +25% +25\.0% +\d\d\.\d% +0\.0 ± 0\.0 +\+0\.0 ± 0\.0 +\d+ *$", out, re.M)
    assert re.search(r"^fastv\(layer=1\) +25% +— +— ", out, re.M)
    assert "fastv(layer=1) at 25%: 1 of 4 layers see all tokens before fastv acts" in out
    assert "[1/2] " in err
    folder = tmp_path / "out"
    names = {re.sub(r"-[0-9a-f]{6}", "", path.name) for path in folder.iterdir()}
    stem = re.sub(r"[^A-Za-z0-9._=-]+", "-", asked).strip("-")[:60]
    curves = {f"{stem}-{cost}.{kind}" for cost in ("tokens", "flops") for kind in ("png", "svg")}
    assert names == {".lock", "results.csv", "study.json", "records"} | curves
    with (folder / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["budget"], row["compressor"]) for row in rows] == [
        ("no_compression", "100%", "no_compression"),
        ("pool2d", "25%", "pool2d(factor=2)"),
        ("fastv(layer=1)", "25%", ""),
    ]
    assert (rows[1]["tokens"], rows[1]["questions"], rows[1]["type <i>0"]) == ("9", "10", "0.0000")
    for path in folder.glob("*.png"):
        assert Image.open(path).width > 1000
    for path in folder.glob("*.svg"):
        assert ET.parse(path).getroot().tag.endswith("svg")


def test_it_fits_a_terminal_of_80_columns(evaluate, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    table = evaluate()[1].split("\n\n")[1]
    assert max(map(len, table.splitlines())) <= 80
    assert "no_compression" in table


def test_json_has_what_the_table_has_and_more(evaluate):
    code, out, _ = evaluate("--json")
    found = json.loads(out)
    assert (code, [row["method"] for row in found["rows"]]) == (0, ["no_compression", "pool2d", "fastv(layer=1)"])
    row = found["rows"][1]
    assert row["score"]["low"] <= row["score"]["value"] <= row["score"]["high"]
    assert set(row["against_plain"]) == {"value", "low", "high"}
    assert row["compressor"]["factor"] == 2
    assert (row["reached"], row["tokens"], row["questions"]) == (0.25, "9", 10)
    assert found["rows"][2]["note"].startswith("1 of 4 layers")


def test_f1_is_a_column_of_its_own(evaluate, tmp_path):
    lines = [question(answers=["yes", "no"][n % 2], question=f"w{n + 4}") for n in range(4)]
    folder = write(tmp_path / "yesno", *lines)
    out = evaluate(tasks=folder + ":yesno")[1]
    assert re.search(r"changed +F1 *$", out, re.M)
    assert "F1" in json.loads(evaluate("--json", tasks=folder + ":yesno")[1])["rows"][1]


@pytest.fixture(scope="module")
def command(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    tasks = write_questions(folder / "asked") + ":exact"
    out = str(folder / "out")
    return ["eval", "--model", checkpoint, "--tasks", tasks, *TINY, "--report", "--examples", "2", "--out", out]


@pytest.fixture(scope="module")
def page(command):
    assert main(command) == 0
    return Path(command[-1], "report.html").read_text(encoding="utf-8")


class TestReport:
    def test_changed_answers_are_there_as_they_were_given(self, page, command):
        records = {}
        for path in Path(command[-1], "records").rglob("*.jsonl"):
            for record in map(json.loads, path.read_text().splitlines()):
                records[record["method"], record["sample"]] = record
        changed = {
            sample: (record["given"], records["pool2d(factor=2)", sample]["given"])
            for (method, sample), record in records.items()
            if method == "no_compression" and record["given"] != records["pool2d(factor=2)", sample]["given"]
        }
        assert len(changed) > 2
        assert f"pool2d at 25%: {len(changed)} of 10 answers changed, 2 of them chosen at random" in page
        shown = re.findall(r'<p class="answer">(.*?)</p>', page)
        assert len(shown) == 2
        assert set(shown) < {f"{before} → {after}" for before, after in changed.values()}
        assert page.count('<article class="card') == 2
        assert "9 of 36 visual tokens" in page

    def test_nothing_comes_from_outside_and_nothing_runs(self, page):
        assert "://" not in page
        assert POLICY in page
        for tag, attributes in Elements(page).found:
            assert tag not in ("script", "link", "iframe", "object")
            assert "href" not in attributes
            assert attributes.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")

    def test_what_the_data_says_is_escaped(self, page):
        assert "&lt;i&gt;0" in page
        assert "<script>" not in page

    def test_rows_without_a_score_say_why(self, page):
        assert "fastv(layer=1) at 25%: 1 of 4 layers see all tokens" in page

    def test_the_same_seed_shows_the_same_images(self, page, command, capsys):
        assert main(command) == 0
        assert "questions in" not in capsys.readouterr().err  # nothing is asked again
        assert Path(command[-1], "report.html").read_text(encoding="utf-8") == page


class TestFullDisk:
    def test_records_are_kept_and_the_same_command_resumes(self, evaluate, tmp_path, monkeypatch):
        real, left = os.write, [2]

        def write(file, data):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(file, data)

        with monkeypatch.context() as patched:
            patched.setattr("vlmzip.lab.records.os.write", write)
            code, out, err = evaluate()
        assert (code, out, err.count("vlmzip: ")) == (2, "", 1)
        assert "No space left on device; the records so far are kept" in err
        (path,) = (tmp_path / "out" / "records").rglob("*.jsonl")
        assert path.read_text().count("\n") == 8
        before = path.read_text()
        assert evaluate()[0] == 0
        assert path.read_text().startswith(before)
        assert path.read_text().count("\n") == 10

    def test_a_curve_that_cannot_be_written_does_not_cost_the_table(self, evaluate, monkeypatch):
        def fail(*_, **__):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
        code, out, err = evaluate()
        assert code == 2
        assert "No space left" in err.splitlines()[-1]
        assert "pool2d" in out


def test_a_corrupt_line_is_named_and_nothing_is_lost(evaluate, tmp_path):
    evaluate()
    path = next((tmp_path / "out" / "records").rglob("pool2d*.jsonl"))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:4], "{broken\n", *lines[5:]]))
    code, out, err = evaluate()
    assert (code, out, err.count("vlmzip: ")) == (2, "", 1)
    assert f"{path}:5 is not a record of this run" in err
    path.write_text("".join(lines[:4] + lines[5:]))  # as the message says
    assert evaluate()[0] == 0
    assert sorted(path.read_text().splitlines(keepends=True)) == sorted(lines)


def test_without_matplotlib_there_is_a_table(evaluate, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    code, _, err = evaluate("--report")
    assert code == 0
    assert f"no curves are drawn: figures need matplotlib: {how_to_install('eval')}" in err
    assert not list((tmp_path / "out").glob("*.svg"))
    assert (tmp_path / "out" / "report.html").exists()


def test_a_broken_method_gives_its_row_and_exit_code_1(evaluate, monkeypatch):
    def broken(self, tokens):
        raise RuntimeError("[red]boom")

    monkeypatch.setattr("vlmzip.Pool2d.assign", broken)
    with pytest.raises(SystemExit) as exit:
        evaluate()
    assert exit.value.code == 1


MISTAKES = [
    (["--average-keep", "75%,0"], "--average-keep 0 keeps nothing"),
    (["--average-keep", ","], "names no budget"),
    (["--methods", "visionsip"], "did you mean 'visionzip'"),
    (["--methods", ","], "names no method"),
    (["--tasks", "nowhere:exact"], "unknown task or folder 'nowhere'"),
    (["--tasks", "{folder}"], "needs a metric"),
    (["--limit", "0"], "--limit 0: give at least 1"),
    (["--batch", "0"], "--batch 0: give at least 1"),
    (["--max-new-tokens", "0"], "--max-new-tokens 0: give at least 1"),
    (["--examples", "-1"], "--examples -1: give at least 0"),
    (["--seed", "-1"], "--seed -1: give at least 0"),
    (["--limit", "some"], "invalid int value"),
    (["--out", "{folder}/a.png"], "is a file; give a folder"),
    (["--method", "visionzip"], "did you mean '--methods'"),
    (["--tasks", "{folder}:exact", "--calibrate-on", "{folder}"], "has images with questions in the task"),
    (["mini"], "unexpected argument 'mini'"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(a) for a, _ in MISTAKES])
def test_mistakes_get_one_line_and_exit_code_2(capsys, tmp_path, monkeypatch, asked, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vlmzip.runtime.loading.load", lambda *_: pytest.fail("loaded before it refused"))
    before = sorted(tmp_path.rglob("*"))
    code = main(["eval", *(argument.format(folder=asked) for argument in arguments)])
    out, err = capsys.readouterr()
    assert (code, out, err.count("vlmzip: ")) == (2, "", 1)
    assert err.startswith("vlmzip: ")
    assert message in err
    assert sorted(tmp_path.rglob("*")) == before


def test_an_unreadable_image_is_named_before_the_model_is_loaded(capsys, monkeypatch, tmp_path, asked):
    monkeypatch.setattr("vlmzip.runtime.loading.load", lambda *_: pytest.fail("loaded before it refused"))
    (tmp_path / "asked" / "b.png").write_bytes((tmp_path / "asked" / "b.png").read_bytes()[:200])
    assert main(["eval", "--tasks", asked + ":exact", "--out", str(tmp_path / "out")]) == 2
    assert re.search(r"^vlmzip: 1 of 3 images cannot be read; the first: '.*b\.png' .*$", capsys.readouterr().err)


def test_papers_numbers_stand_beside_what_was_measured(capsys, checkpoint, asked, tmp_path, monkeypatch):
    """The tiny model goes by a name the paper knows; what the paper has for its 36 tokens is made up."""
    from vlmzip.lab.papers import published

    (tmp_path / "llava-1.5-7b-hf").symlink_to(checkpoint)
    (tmp_path / "GQA").symlink_to(asked)
    rows = [row for row in published("visionzip") if (row.model, row.benchmark) == ("LLaVA-1.5-7B", "GQA")]
    made_up = [replace(row, keep={"576": "36", "64": "9"}.get(row.keep, row.keep)) for row in rows]
    module = sys.modules["vlmzip.lab.papers.against"]  # the package has a function of that name
    monkeypatch.setattr(module, "published", lambda name: made_up)
    run = ["eval", "--model", str(tmp_path / "llava-1.5-7b-hf"), "--tasks", f"{tmp_path / 'GQA'}:exact"]
    run += ["--methods", "visionzip,pool2d", "--average-keep", "25%", "--max-new-tokens", "3"]
    run += ["--out", str(tmp_path / "out")]
    assert main([*run, "--against", "visionzip"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"LLaVA-1\.5-7B +no_compression +36 +GQA +61\.9 +0\.0 +-61\.9 ", out)
    assert re.search(r"LLaVA-1\.5-7B +visionzip +9 +GQA +55\.1 +0\.0 +-55\.1 ", out)
    assert re.search(r"pool2d, 9 tokens, GQA = 0: visionzip has no score for this method; it has ", out)
    assert main([*run, "--against", "visionzip", "--json"]) == 0
    beside = json.loads(capsys.readouterr().out)["against"]
    assert beside[0]["published"]["value"] == 61.9


def test_an_unknown_paper_is_refused_before_anything_is_asked(evaluate, tmp_path):
    code, _, err = evaluate("--against", "visonzip")
    assert code == 2
    assert err == "vlmzip: vlmzip has no published numbers of 'visonzip'; did you mean 'visionzip'?\n"
    assert not (tmp_path / "out").exists()


def test_few_images_and_unknown_words_are_told(evaluate, capsys):
    code, out, err = evaluate()
    assert code == 0
    assert "10 questions about 3 images: too few for the intervals to be trusted" in out
    assert "note: 1 of 10 questions of " in err
    assert "such as '[bold]'" in err


def test_a_report_of_an_earlier_run_is_not_taken_for_this_ones(evaluate):
    evaluate("--report")
    assert "report.html is from an earlier run; give --report to write it again" in evaluate()[2].replace("\n", "")


@pytest.mark.parametrize("task", ["mini", "easy-vqa"])
def test_thresholds_come_from_the_users_images_for_every_task(tmp_path, task):
    for shade in range(4):
        Image.new("RGB", (24, 24), (60 * shade, 0, 0)).save(tmp_path / f"{shade}.png")
    calibration = read_task(task, 2, str(tmp_path)).calibration
    assert calibration.about == f"the 4 images of {tmp_path}"
    assert [Path(path).stem for path in calibration.images()] == ["0", "1", "2", "3"]
    with pytest.raises(UserError, match="must be a folder of images"):
        read_task(task, 2, str(tmp_path / "none"))
