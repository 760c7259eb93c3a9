"""A budget is given once: in the method or by --keep. A row is never labelled with a budget that did not run."""

import json
from itertools import product

import pytest
from PIL import Image

from vlmzip import UserError, VisionZip, spec
from vlmzip.cli.main import main
from vlmzip.compressor_file import write_compressor

#: Methods that are written with a budget, and the budget.
WRITTEN = {
    "visionzip(keep=16)": "keep=16",
    "visionzip(merge=mean,dominant=13,contextual=3)": "dominant=13,contextual=3",
    "pool2d(factor=3)": "factor=3",
    "llavolta(stride=8)": "stride=8",
    "llavolta(layer=1,3,stride=2,4)": "stride=2,4",
    "sparsevlm(budget=64)": "budget=64",
    "qformer(queries=32)": "queries=32",
    "fastv(layer=1,keep=50%)": "keep=50%",
    "vlmzip.methods.pool2d:Pool2d(factor=2)": "factor=2",
    "visionzip(keep=16)+fastv": "keep=16",
    "fastv+visionzip(keep=16)": "keep=16",
}
BY_CONTENT = {"dfmr(tau=0.3)": "tau=0.3", "adaptive_visionzip(tau=0.3)": "tau=0.3"}
#: What can be set to any budget: its first compressor has none.
FREE = [
    "visionzip",
    "visionzip(merge=mean)",
    "llavolta(layer=1)",
    "visionzip+fastv(keep=50%)",
    "fastv(keep=50%)+pool2d",
]


@pytest.fixture
def refused(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vlmzip.runtime.loading.load", lambda *_: pytest.fail("loaded before it refused"))
    Image.new("RGB", (9, 9)).save("a.png")

    def run(*arguments):
        code = main(list(arguments))
        out, err = capsys.readouterr()
        assert (code, out, err.count("\n")) == (2, "", 1)
        return err

    return run


@pytest.mark.parametrize(("text", "budget"), {**WRITTEN, **BY_CONTENT}.items())
def test_the_budget_in_a_method(text, budget):
    assert spec.budget_in(text) == budget
    with pytest.raises(UserError, match="--keep is 25%: leave it out"):
        spec.refuse_second_budget(text, "25%", "leave it out")


@pytest.mark.parametrize("text", FREE)
def test_methods_without_a_budget_take_any(text):
    assert spec.budget_in(text) == ""
    spec.refuse_second_budget(text, "25%", "")


def test_a_saved_compressor_takes_another_budget(tmp_path):
    write_compressor(VisionZip(keep=16), tmp_path)
    assert spec.budget_in(str(tmp_path)) == ""


LISTS = [["eval"], ["eval", "--suite", "pope"], ["tune", "--max-loss", "5"], ["compare", "a.png", "w"], ["bench"]]
ONE = [["ask", "a.png", "w"], ["show", "a.png"]]


@pytest.mark.parametrize("command", LISTS, ids=" ".join)
@pytest.mark.parametrize(("option", "text"), [*product(["--average-keep"], WRITTEN), ("--keep", "visionzip(keep=16)")])
def test_lists_refuse_a_second_budget(refused, command, option, text):
    err = refused(*command, "--methods", f"kmeans,{text}", option, "25%")
    remedy = f"take the budget out of the method, or give {option} "
    assert f"{text} sets {WRITTEN[text]}, and {option} is 25%: {remedy}" in err


@pytest.mark.parametrize("command", LISTS, ids=" ".join)
def test_the_usual_budget_is_no_exception(refused, command):
    err = refused(*command, "--methods", "visionzip(keep=16)")
    assert "visionzip(keep=16) sets keep=16, and --average-keep is " in err


@pytest.mark.parametrize("command", [["eval"], ["tune", "--max-loss", "5"]], ids=" ".join)
@pytest.mark.parametrize("text", BY_CONTENT)
def test_lists_that_calibrate_refuse_a_second_threshold(refused, command, text):
    assert f"{text} sets tau=0.3, and --keep is 25%" in refused(*command, "--methods", text, "--keep", "25%")


@pytest.mark.parametrize("command", ONE, ids=" ".join)
@pytest.mark.parametrize("text", {**WRITTEN, **BY_CONTENT})
def test_one_method_with_two_budgets_is_refused(refused, command, text):
    assert "and --keep is 25%: give one of them" in refused(*command, "--method", text, "--keep", "25%")


def test_calibrate_refuses_a_threshold(refused):
    err = refused("calibrate", "a.png", "--method", "dfmr(tau=0.3)", "--keep", "25%")
    assert "dfmr(tau=0.3) sets tau=0.3, and --keep is 25%" in err


@pytest.mark.parametrize(
    ("method", "option", "value"),
    [
        ("pool2d", "--factor", "2"),
        ("llavolta", "--stride", "8"),
        ("sparsevlm", "--counts", "9,8,7"),
        ("dfmr", "--tau", "1"),
    ],
)
def test_options_are_no_way_around(refused, method, option, value):
    err = refused("ask", "a.png", "w", "--method", method, option, value, "--keep", "25%")
    assert f"give --keep or {option}, not both" in err


def test_other_options_go_with_keep(capsys, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    arguments = ["--method", "llavolta", "--layer", "1", "--keep", "50%", "--json", "--max-new-tokens", "1"]
    assert main(["ask", str(tmp_path / "a.png"), "is there a star ?", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)["compressor"]
    assert (found["layer"], found["stride"]) == (1, 2)


def test_compare_runs_methods_as_they_are_written(capsys, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    methods = ["--methods", "visionzip(keep=16),pool2d(factor=4)", "--average-keep", "as-set"]
    quick = ["--repeats", "1", "--max-new-tokens", "1"]
    assert main(["compare", str(tmp_path / "a.png"), "is there a star ?", *methods, *quick, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    kept = {row["method"]: row["visual_tokens_by_layer"][0] for row in found["rows"]}
    assert found["average_keep"] is None
    assert kept == {"no_compression": 144, "visionzip(keep=16)": 16, "pool2d(factor=4)": 9}
    assert main(["compare", str(tmp_path / "a.png"), "is there a star ?", *methods, *quick]) == 0
    assert "methods with their own settings, 144 visual tokens per image, mini" in capsys.readouterr().out
