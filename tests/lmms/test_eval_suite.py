"""`vlmzip eval --suite` and `python -m lmms_eval --model vlmzip`, on mini's questions as a task of lmms-eval."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval")

from tests.lmms.mini_as_task import write_task
from vlmzip.cli.main import main
from vlmzip.lab.lmms import suites
from vlmzip.lab.lmms.adapter import CompressedForLmms

ROOT = Path(__file__).parents[2]
BROKEN = "tests.lmms.broken:Broken"


@pytest.fixture
def suite(capsys, tasks, tmp_path):
    """Return a function that runs `eval --suite mini_exact` by default and returns the exit code and the output."""

    def run(*arguments, name="mini_exact", methods="visionzip", batch="8", folder="out"):
        fixed = ["eval", "--suite", name, "--include-path", str(tasks), "--methods", methods, "--average-keep", "25%"]
        try:
            code = main([*fixed, "--batch", batch, "--out", str(tmp_path / folder), *arguments])
        except SystemExit as ended:
            code = ended.code
        return code, *capsys.readouterr()

    return run


def read(folder, task="mini_exact"):
    """The result files of a task, by method."""
    found = [json.loads(path.read_text()) for path in (folder / "results" / task).glob("*.json")]
    return {one["method"]: one for one in found}


def rows(folder, name="mini_exact"):
    with (folder / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_scores_are_those_of_vlmzip_eval(suite, tmp_path, capsys):
    """The same questions, methods and batches: the same answers, so the same scores to the last digit."""
    code, out, _ = suite("--json")
    assert code == 0
    ours = ["eval", "--limit", "24", "--methods", "visionzip", "--average-keep", "25%", "--batch", "8"]
    assert main([*ours, "--out", str(tmp_path / "ours"), "--json"]) == 0
    theirs, mine = json.loads(out)["rows"], json.loads(capsys.readouterr().out)["rows"]
    assert [row["score"] for row in theirs] == [row["score"]["value"] for row in mine]
    assert theirs[1]["difference"] == pytest.approx(mine[1]["against_plain"]["value"], abs=1e-12)
    assert theirs[0]["score"] != theirs[1]["score"]  # equal for a reason
    assert [row["retention"] for row in theirs] == [row["reached"] for row in mine] == [1.0, 0.25]
    records = {}
    for path in (tmp_path / "ours" / "records").rglob("*.jsonl"):
        found = [json.loads(line) for line in path.read_text().splitlines()]
        records[found[0]["method"]] = [(record["given"], record["text_tokens"]) for record in found]
    results = read(tmp_path / "out")
    assert records.keys() == results.keys() == {"no_compression", "visionzip(keep=25%)"}
    for method, kept in (("no_compression", 144), ("visionzip(keep=25%)", 36)):
        asked = results[method]["requests"]
        assert [(one["given"], one["input_tokens"] - kept) for one in asked] == records[method]


def test_batches_of_any_size_give_the_same(suite, tmp_path):
    assert [suite(batch=batch, folder=batch)[0] for batch in ("1", "8")] == [0, 0]
    one, eight = read(tmp_path / "1"), read(tmp_path / "8")
    assert [found["batch"] for found in (*one.values(), *eight.values())] == [1, 1, 8, 8]
    assert one.keys() == eight.keys()
    for method in one:
        assert one[method]["requests"] == eight[method]["requests"]
        assert one[method]["results"] == eight[method]["results"]


def test_the_table_and_the_files(suite, tmp_path):
    code, out, err = suite("--limit", "6")
    assert code == 0
    assert "tasks of lmms-eval, by lmms-eval; the first 6 questions of each" in out
    assert "visionzip at 25%" in out
    assert "[2/2] mini_exact, visionzip(keep=25%): 6 in" in err
    plain, compressed = rows(tmp_path / "out")
    assert (plain["method"], plain["difference"], plain["relative"]) == ("no_compression", "0.0000", "100.0000")
    assert (compressed["benchmark"], compressed["questions"], compressed["retention"]) == ("mini_exact", "6", "0.2500")
    assert (compressed["lmms_eval"], compressed["model"], compressed["visual_tokens"]) == ("0.7.3", "mini", "144.0000")


def test_what_is_finished_is_not_asked_again(suite, tmp_path, monkeypatch):
    first = suite("--json")
    monkeypatch.setattr(CompressedForLmms, "generate_until", lambda self, requests: 1 / 0)
    assert suite("--json")[:2] == first[:2]
    gone = next((tmp_path / "out" / "results" / "mini_exact").glob("visionzip*"))
    gone.unlink()
    code, _, err = suite()
    assert (code, "failed with ZeroDivisionError" in err) == (2, True)


def test_another_number_of_questions_needs_another_folder(suite):
    assert suite("--limit", "2")[0] == 0
    code, _, err = suite("--limit", "3")
    assert (code, "limit is 2 there and 3 here; give another --out" in err) == (2, True)


def test_a_method_that_breaks_stops_the_run(suite, tmp_path):
    code, out, err = suite("--average-keep", "as-set", methods=f"{BROKEN},visionzip")
    assert (code, out) == (1, "")
    assert "broke on mini_exact, document 0 to mini_exact, document 7: failed with RuntimeError: no tokens today" in err
    assert list(read(tmp_path / "out")) == ["no_compression"]
    assert not (tmp_path / "out" / "mini_exact.csv").exists()


def test_what_cannot_be_fetched_is_named_and_the_rest_is_kept(suite, tasks, tmp_path):
    text = (tasks / "mini_exact.yaml").read_text()
    lines = [
        line for line in text.splitlines() if not line.startswith((" data", "  data", "    test", "dataset_kwargs"))
    ]
    far = "\n".join(lines).replace("dataset_path: json", "dataset_path: nobody/nothing")
    (tasks / "far.yaml").write_text(far.replace("task: mini_exact", "task: far"))
    code, out, err = suite(name="mini_exact,far")
    (tasks / "far.yaml").unlink()
    assert (code, out) == (2, "")
    (line,) = [line for line in err.splitlines() if line.startswith("vlmzip: ")]
    assert line.startswith("vlmzip: lmms-eval cannot get the benchmark far: ")
    assert "nobody/nothing" in line
    assert list(read(tmp_path / "out")) == ["no_compression"]


def test_names_that_are_none_are_refused(suite):
    code, _, err = suite(name="mini_exakt")
    assert (code, "has no task 'mini_exakt'; did you mean 'mini_exact'?" in err) == (2, True)
    code, _, err = suite(name="mmmu")
    assert (code, "'mmmu' is a group of tasks" in err) == (2, True)


def test_a_suite_has_its_average_and_leaves_out_what_has_no_judge(suite, tasks, tmp_path, monkeypatch):
    write_task(tasks, 12, "mini_dozen")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    three = (
        suites.Benchmark("GQA", "mini_exact", ("exact",), 100),
        suites.Benchmark("MME", "mini_dozen", ("exact",), 2000),
        suites.Benchmark("MM-Vet", "mmvet", ("gpt_eval_score",), judge="always"),
    )
    monkeypatch.setitem(suites.SUITES, "three", suites.Suite("three", "three of them", three, "scores"))
    code, out, _ = suite(name="three")
    assert code == 0
    assert "MM-Vet: left out: a language model scores its answers, and OPENAI_API_KEY is not set" in out
    assert not (tmp_path / "out" / "results" / "mmvet").exists()
    found = [row for row in rows(tmp_path / "out", "three") if row["method"] == "visionzip"]
    assert [row["benchmark"] for row in found] == ["GQA", "MME", "MM-Vet", "average of 2"]
    gqa, mme, vet, average = found
    assert vet["score"] == ""
    assert float(average["score"]) == pytest.approx((float(gqa["score"]) + float(mme["score"]) / 20) / 2, abs=1e-3)
    assert float(gqa["score"]) > 2  # in percent


def test_a_judge_that_did_not_answer_is_an_error(suite, tasks, tmp_path, monkeypatch):
    write_task(tasks, 3, "mini_judged")
    path = tasks / "mini_judged_utils.py"
    path.write_text(path.read_text().replace('"exact": exact(', '"exact": judged('))
    path.write_text(path.read_text() + '\n\ndef judged(given, right):\n    return {"score": 0.0, "eval_model": ""}\n')
    yaml = tasks / "mini_judged.yaml"
    mean = "\n\ndef mean(found):\n    return sum(one['score'] for one in found) / len(found)\n"
    path.write_text(path.read_text() + mean)
    yaml.write_text(yaml.read_text().replace("aggregation: mean", "aggregation: !function mini_judged_utils.mean"))
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    one = suites.Benchmark("MM-Vet", "mini_judged", ("exact",), judge="always")
    monkeypatch.setitem(suites.SUITES, "judged", suites.Suite("judged", "one", (one,)))
    code, _, err = suite(name="judged")
    assert (code, "the judge of mini_judged gave no score for 3 of 3 answers" in err) == (2, True)
    assert not list((tmp_path / "out").rglob("no_compression*"))


# ---------------------------------------------------------------- lmms-eval's own command line


def lmms_eval(tasks, out, method):
    settings = f"pretrained=mini,method={method}"
    command = ["--model", "vlmzip", "--model_args", settings, "--tasks", "mini_exact", "--include_path", str(tasks)]
    command += ["--limit", "8", "--batch_size", "4", "--output_path", str(out), "--log_samples"]
    paths = os.pathsep.join(filter(None, [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "lmms_eval", *command], env=env, capture_output=True, text=True)


def test_lmms_eval_finds_the_adapter_and_writes_what_it_cost(tasks, tmp_path):
    done = lmms_eval(tasks, tmp_path, "visionzip(dominant=10,contextual=6)")
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.rglob("*results.json")
    found = json.loads(path.read_text())
    assert found["throughput"]["avg_retention"] == pytest.approx(16 / 144)
    assert found["config"]["model_backend"] == "vlmzip.lab.lmms.adapter.CompressedForLmms (chat)"
    (path,) = tmp_path.rglob("*samples_mini_exact.jsonl")
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    assert [sample["token_counts"][0]["visual_tokens_by_layer"] for sample in samples] == ["16"] * 8
    right = sum(sample["exact"] for sample in samples) / 8
    assert found["results"]["mini_exact"]["exact,none"] == right


def test_under_lmms_eval_a_method_that_breaks_ends_the_process(tasks, tmp_path):
    """Whose command line would otherwise log the exception and end with 0."""
    done = lmms_eval(tasks, tmp_path, BROKEN)
    assert done.returncode == 1
    assert "RuntimeError: no tokens today" in done.stderr
    assert done.stderr.strip().endswith("failed with RuntimeError: no tokens today")
    assert not list(tmp_path.rglob("*.json*"))
