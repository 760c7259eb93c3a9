"""Tests of the conformance run: checks give what the committed results say, and `vlmzip models` prints them."""

import dataclasses
import json
import os
import re

import pytest
import transformers

from vlmzip.cli.main import main
from vlmzip.lab.conformance import results, run
from vlmzip.lab.conformance.cells import check
from vlmzip.lab.conformance.families import FAMILIES, Tiny
from vlmzip.lab.conformance.prompts import Prompts
from vlmzip.lab.conformance.results import Checked
from vlmzip.lab.conformance.run import check_all, check_each
from vlmzip.lab.conformance.tiny import folders, model_class, tiny_model
from vlmzip.lab.conformance.videos import check_video
from vlmzip.methods import EVS, NoCompression, RandomTokens

COMMITTED = {model.folder: model for model in results.models_of(results.committed())}
#: A family with a file, a model of the default family, refused ones, and one whose placeholders stand in rows.
QUICK = ["llava", "t5gemma2"]
SAMPLE = ["glm4v", "internvl", "lfm2_vl", "llama4"]
FURTHER = ["qwen2_vl", "gemma3", "mistral3", "qwen3_5", "emu3", "hunyuan_vl", "minicpmv4_6"]
is_newest = pytest.mark.skipif(
    transformers.__version__ != results.committed()["versions"]["transformers"],
    reason="the results are those of another version of transformers",
)


def assert_as_committed(folder: str) -> None:
    model, committed = check(folder), COMMITTED[folder]
    assert (model.status, model.reason) == (committed.status, committed.reason)
    assert model.video == committed.video
    statuses = {method: model.status_of(method) for method in model.cells}
    assert statuses == {method: committed.status_of(method) for method in committed.cells}


@is_newest
@pytest.mark.slow
@pytest.mark.parametrize("folder", QUICK)
def test_checks_give_the_committed_statuses(folder):
    assert_as_committed(folder)


@is_newest
@pytest.mark.slow
@pytest.mark.parametrize("folder", [*SAMPLE, *(pytest.param(each, marks=pytest.mark.further) for each in FURTHER)])
def test_checks_of_further_models_give_the_committed_statuses(folder):
    assert_as_committed(folder)


@is_newest
def test_a_video_whose_rows_have_ends():
    """The encoder of HY V4 makes a token for the end of each row, so a frame of 2 x 2 has 6 tokens."""
    tiny = FAMILIES.get("hy_v4_vl", Tiny())
    model = tiny_model(model_class("hy_v4_vl"), tiny.changes)
    methods = [NoCompression(), RandomTokens(keep=0.5), EVS(keep=0.5)]
    assert check_video(model, Prompts(model, tiny), methods, 1e-3) == ["works", ""]


@pytest.mark.slow
@pytest.mark.skipif(transformers.__version__ == "5.24.0", reason="Llama 4 itself fails in this version")
@pytest.mark.skipif("llama4" not in folders(), reason="not in this version of transformers")
def test_llama4_works():
    """Its forward projects the tokens, so that the encoder's output has no others."""
    model = check("llama4")
    assert model.status == "works"
    assert model.status_of("visionzip") == "refused"
    assert model.status_of("dfmr") == "works"


def test_refusals_of_models_link_to_the_page():
    for model in COMMITTED.values():
        if "has no family file" in model.reason or model.video[1].startswith("vlmzip cannot compress videos"):
            assert (model.reason or model.video[1]).endswith("; see docs/add_a_family.md")


@is_newest
def test_every_model_folder_has_a_row():
    assert list(COMMITTED) == folders()


def test_at_least_sixty_models_work_and_every_refusal_has_a_reason():
    assert results.counts(COMMITTED.values())["works"] >= 60
    for model in COMMITTED.values():
        assert not model.untried or model.reason
        for modes in model.cells.values():
            assert all(reason for status, reason in modes.values() if status != "works")


def test_each_model_says_whether_a_video_works():
    statuses = [model.video[0] for model in COMMITTED.values() if not model.untried]
    assert set(statuses) <= {"works", "refused", "plain model fails", "takes no video"}
    assert statuses.count("works") >= 20
    for model in COMMITTED.values():
        assert model.untried or model.video[0] == "works" or model.video[1]


def works(folder: str) -> Checked:
    return Checked(folder, "Model", "family", "", "", {"no_compression": {"image": ["works", ""]}})


def each_until_a_crash(folders):
    for folder in folders:
        if folder == "crashes":
            os._exit(1)
        yield works(folder)


@pytest.mark.slow
def test_a_folder_that_ends_its_process_does_not_lose_the_others(monkeypatch):
    monkeypatch.setattr(run, "check_each", each_until_a_crash)
    checked = check_all(["a", "crashes", "b"], 1, lambda model: None)
    models = results.models_of(checked)
    assert [model.folder for model in models] == ["a", "crashes", "b"]
    assert models[1].status == "fails"
    assert re.search("its check was ended", models[1].reason)


def test_a_model_works_if_it_does_uncompressed_and_with_a_method():
    model = works("a")
    assert model.status == "refused"  # nothing compresses
    model.cells["visionzip"] = {"image": ["works", ""], "batch": ["works", ""]}
    assert model.status == "works"
    model.cells["dfmr"] = {"image": ["refused", "why"], "batch": ["works", ""]}
    assert (model.status, model.status_of("dfmr"), model.modes_of("dfmr")) == ("works", "refused", ["batch"])
    model.cells["fastv"] = {"image": ["fails", "why"]}
    assert model.status == "fails"
    assert dataclasses.replace(works("a"), video=["fails", "why"]).status == "fails"


def test_results_are_read_as_they_were_written(tmp_path):
    results.write(tmp_path / "results.json", results.committed())
    assert json.loads((tmp_path / "results.json").read_text()) == results.committed()


def test_models_prints_the_committed_results(capsys):
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.split()[:1] == [folder] for line in lines for folder in COMMITTED) == len(COMMITTED)
    assert main(["models", "internvl", "t5gemma2"]) == 0
    output = capsys.readouterr().out
    assert re.search(r"random_tokens +works", output)
    assert re.search(r"a video +takes no video: it has no get_video_features", output)
    assert "refused: only its encoder takes mm_encoder_outputs" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["internvk"], "unknown model 'internvk'; did you mean 'internvl'?"),
        (["--out", "x.json"], "--out belongs to --check"),
        (["--check", "--jobs", "0"], "--jobs must be at least 1, got 0"),
    ],
)
def test_models_refuses_odd_input_in_one_line(capsys, arguments, message):
    assert main(["models", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_check_in_a_child_process_gives_the_same(tmp_path):
    (model,) = check_each(["t5gemma2"])
    assert model == COMMITTED["t5gemma2"]
