"""`study` as a user runs it: findings, a table and a figure for each analysis, one line for each mistake."""

import csv
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.cli.test_eval import write_questions
from tests.families import save_checkpoint, tiny_llava
from tests.lab.test_study import asked as listen
from vlmzip.cli.main import main
from vlmzip.errors import UserError, how_to_install
from vlmzip.lab.analyses import NAMES, about
from vlmzip.lab.analyses.subject import Unsuited

pytestmark = pytest.mark.slow  # whole runs of an analysis

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a checkpoint and ten questions."""
    folder = tmp_path_factory.mktemp("study")
    save_checkpoint(folder / "tiny")
    write_questions(folder / "asked")
    return folder


@pytest.fixture(autouse=True)
def fewer_taus(monkeypatch):
    monkeypatch.setattr("vlmzip.lab.analyses.tau.TAUS", (0.0, 0.8))


@pytest.fixture
def study(capsys, place, tmp_path):
    def run(*arguments):
        code = main([*command(place, tmp_path / "out"), *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def command(place, out):
    task = f"{place / 'asked'}:exact"
    return ["study", "--model", str(place / "tiny"), "--task", task, "--batch", "4", "--out", str(out)]


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.draws
def test_findings_table_and_figures(study, tmp_path, place):
    code, out, err = study("tau", "encoder_attention")
    assert code == 0
    told = out.split("\n\n")
    assert told[0].startswith(f"tau: {about('tau')}\nFrom tau=0 to tau=0.8 the share of tokens kept goes from 100.0 %")
    assert told[1].startswith(f"encoder_attention: {about('encoder_attention')}\nIn layer 1 of 3 (from 0), which")
    assert told[2] == f"written to {tmp_path / 'out'}\n"
    assert "[2/3] " in err
    names = {path.name for path in (tmp_path / "out").iterdir()}
    figures = {f"{name}.{kind}" for name in ("tau", "encoder_attention") for kind in ("csv", "png", "svg")}
    assert names == figures | {"encoder_attention-maps.png", "study.json", "records", ".lock"}
    rows = table(tmp_path / "out" / "tau.csv")
    assert [row["tau"] for row in rows] == ["0.0", "0.8"]
    assert {row["task"] for row in rows} == {f"{place / 'asked'}:exact".removesuffix(":exact")}
    assert {"model", "device", "torch", "transformers", "commit"} < set(rows[0])
    assert Image.open(tmp_path / "out" / "tau.png").width > 900


def test_json(study, tmp_path):
    code, out, _ = study("encoder_attention", "--json")
    found = json.loads(out)
    assert (code, list(found["analyses"]), found["out"]) == (0, ["encoder_attention"], str(tmp_path / "out"))
    rows = table(tmp_path / "out" / "encoder_attention.csv")
    assert [str(row["top_10"]) for row in found["analyses"]["encoder_attention"]] == [row["top_10"] for row in rows]


def test_all_are_run_once(study, monkeypatch):
    ran = []
    for name in NAMES:
        module = f"vlmzip.lab.analyses.{name}"
        monkeypatch.setattr(f"{module}.measure", lambda subject, name=name: ran.append(name) or [{"name": name}])
        monkeypatch.setattr(f"{module}.findings", lambda rows: [f"{rows[0]['name']} was run"])
        monkeypatch.setattr("vlmzip.cli.study._write", lambda *_: None)
    code, out, _ = study("tau", "all", "tau")
    assert (code, ran) == (0, list(NAMES))
    assert [line for line in out.splitlines() if line.endswith("was run")] == [f"{name} was run" for name in NAMES]


def test_all_go_without_one_that_does_not_suit_the_task(study, monkeypatch):
    def measure(subject, name):
        if name not in suited:
            raise Unsuited(f"{name} needs more")
        return [{"name": name}]

    for name in NAMES:
        module = f"vlmzip.lab.analyses.{name}"
        monkeypatch.setattr(f"{module}.measure", partial(measure, name=name))
        monkeypatch.setattr(f"{module}.findings", lambda rows: [f"{rows[0]['name']} was run"])
        monkeypatch.setattr("vlmzip.cli.study._write", lambda *_: None)
    suited = set(NAMES) - {"turns"}
    code, out, err = study("all")
    assert (code, out.count("was run")) == (0, len(NAMES) - 1)
    unknown_word, refused = err.splitlines()
    assert "such as '[bold]'" in unknown_word  # said once, not for each analysis
    assert refused == "note: turns is skipped: turns needs more"
    assert study("turns")[0] == 2
    suited = set()
    code, out, err = study("all")
    assert (code, out) == (2, "")


@pytest.mark.parametrize("name", ["all", "encoder_attention"])
def test_a_folder_of_another_model_ends_the_command(study, place, tmp_path, name):
    study("tau")
    other = tiny_llava()
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    save_checkpoint(tmp_path / "other", other)
    code, out, err = study(name, "--model", tmp_path / "other")
    assert (code, out) == (2, "")
    assert "holds answers of another model" in err
    assert not (tmp_path / "out" / "encoder_attention.csv").exists()


@pytest.mark.slow
def test_corrupt_records_end_the_command(study, tmp_path):
    study("layer_stride")
    path = next((tmp_path / "out" / "records").rglob("llavolta*.jsonl"))
    path.write_text("it\n" + path.read_text())
    code, _, err = study("all")
    assert code == 2
    assert f"{path}:1 is not a record of this run" in err
    assert "layer_stride is skipped" not in err


def test_a_full_disk_ends_the_command(study, tmp_path, monkeypatch):
    def full(figure, path):
        raise UserError(f"cannot write {str(path)!r}: No space left on device")

    monkeypatch.setattr("vlmzip.cli.study.save_figure", full)
    code, out, err = study("tau")
    assert (code, out) == (2, "")
    assert "No space left on device" in err.splitlines()[-1]


def test_the_same_command_again_asks_nothing(study, monkeypatch, tmp_path):
    study("tau")
    before = table(tmp_path / "out" / "tau.csv")
    heard = listen(monkeypatch)
    code, _, err = study("tau")
    assert (code, "questions in" in err, heard) == (0, False, [])
    assert table(tmp_path / "out" / "tau.csv") == before


@pytest.mark.slow
def test_a_stopped_run_resumes_where_it_was(study, monkeypatch, tmp_path):
    study("tau")
    (path,) = (tmp_path / "out" / "records").rglob("dfmr-tau=0.8*.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:5]))
    heard = listen(monkeypatch)
    assert study("tau")[0] == 0
    assert list(map(len, heard)) == [4, 2]  # the batches of the last six questions: the second and the third
    assert path.read_text().splitlines(keepends=True) == lines


def test_without_matplotlib_the_table_is_kept(study, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = study("encoder_attention")
    assert code == 0
    assert "In layer 1 of 3" in out
    said = f"note: no figure of encoder_attention is drawn: figures need matplotlib: {how_to_install('eval')}\n"
    assert err.endswith(said)
    assert len(table(tmp_path / "out" / "encoder_attention.csv")) == 3
    assert not (tmp_path / "out" / "encoder_attention.png").exists()


@pytest.mark.slow
def test_two_processes_give_what_one_gives(study, place, tmp_path):
    both, out = ("tau", "encoder_attention", "--limit", "4", "--batch", "2"), tmp_path / "two"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    paths = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(
        [*launch, "vlmzip.cli.main", *command(place, out), *both], env=env, capture_output=True, text=True, timeout=240
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("written to") == 1  # one of them speaks
    assert study(*both)[0] == 0
    for name in both[:2]:
        one, two = ({row_key(row): row for row in table(folder / f"{name}.csv")} for folder in (tmp_path / "out", out))
        assert one == {key: two[key] for key in one}  # fewer taus here than there


def row_key(row):
    """What tells the lines of a table apart; takes the number of threads out of it."""
    del row["device"]
    return row.get("tau") or row["layer"]


MISTAKES = [
    (["taw"], "unknown analysis 'taw'; did you mean 'tau'"),
    ([], "the following arguments are required: NAME"),
    (["tau", "--limit", "0"], "--limit 0: give at least 1"),
    (["tau", "--batch", "0"], "--batch 0: give at least 1"),
    (["tau", "--seed", "-1"], "--seed -1: give at least 0"),
    (["tau", "--out", "{folder}/asked/a.png"], "is a file; give a folder"),
    (["tau", "--task", "nowhere:exact"], "unknown task or folder 'nowhere'"),
    (["tau", "--tasks", "nowhere:exact"], "unknown task or folder 'nowhere'"),
    (["tau", "--task", "mini,easy-vqa"], "--task takes exactly one task, got 'mini,easy-vqa'"),
    (["tau", "--keep", "25%"], "vlmzip study has no option --keep"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(a) for a, _ in MISTAKES])
def test_mistakes_get_one_line_and_exit_code_2(capsys, tmp_path, monkeypatch, place, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vlmzip.runtime.loading.load", lambda *_: pytest.fail("loaded before it refused"))
    code = main(["study", *(argument.format(folder=place) for argument in arguments)])
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("vlmzip: ")
    assert message in err
    assert not list(tmp_path.iterdir())
