"""Tests that need no lmms-eval: suites, averages, settings in one line, generation settings, incompatible options.

The adapter and whole runs are tested in tests/lmms (`make test-lmms`).
"""

from contextlib import nullcontext
from importlib.util import find_spec

import pytest
from PIL import Image

from vlmzip import NoCompression, VisionZip
from vlmzip.cli.main import main
from vlmzip.errors import UserError, how_to_install
from vlmzip.lab.lmms.requests import read_chat, read_generation, read_settings
from vlmzip.lab.lmms.run import _check_judged as check_judged
from vlmzip.lab.lmms.run import task_files, wrong_result
from vlmzip.lab.lmms.scores import measured, suite_scores, table
from vlmzip.lab.lmms.suites import LLAVOLTA, SUITES, VISIONZIP, Benchmark, Suite, read_suite
from vlmzip.lab.papers import against, averages, published

# ---------------------------------------------------------------- suites and averages


def test_the_suites_are_the_papers_benchmarks():
    assert (len(LLAVOLTA.benchmarks), len(VISIONZIP.benchmarks)) == (13, 11)
    of_13 = {row.benchmark for row in published("llavolta") if row.table == "Table 2" and row.metric == "score"}
    assert {one.name for one in LLAVOLTA.benchmarks} == of_13 - {"average of 13"}
    every = {row.benchmark for row in published("visionzip")}
    assert {one.name for one in VISIONZIP.benchmarks} <= every


def test_llavoltas_average_is_the_one_that_the_paper_prints():
    rows = [row for row in published("llavolta") if row.table == "Table 2" and row.method == "no_compression"]
    scores = {row.benchmark: row.value for row in rows if row.metric == "score" and "average" not in row.benchmark}
    (printed,) = [a.row.value for a in averages("llavolta") if a.row.table == "Table 2" and not a.row.compressed][:1]
    assert len(scores) == 13
    assert LLAVOLTA.mean(scores, {}) == pytest.approx(printed, abs=0.06)


def test_visionzips_average_is_of_shares_of_the_plain_scores():
    assert VISIONZIP.mean({"MME": 900.0, "GQA": 60.0}, {"MME": 1800.0, "GQA": 60.0}) == 75.0
    assert VISIONZIP.mean({"MME": 900.0, "GQA": 60.0}, {"MME": 1800.0, "GQA": 0.0}) == 50.0  # no ratio to a score of 0
    assert VISIONZIP.mean({}, {}) is None


def test_a_score_is_in_the_papers_unit():
    found = {"alias": "x", "acc,none": 0.5, "acc_stderr,none": 0.1, "f1,none": 0.25, "f1,other": 0.75}
    assert Benchmark("x", "x", ("f1",), 100).score(found) == 25
    assert Benchmark("x", "x", ("f1", "acc")).score(found) == 0.75  # MME's two parts are added
    assert Benchmark("x", "x").score(found) == 0.5
    assert Benchmark("x", "x", ("f1", "missing")).score(found) is None
    assert Benchmark("x", "x").score({"alias": "x", "submission,none": None}) is None
    assert Benchmark("x", "x").score({"a,none": None, "a_stderr,none": 0.1, "b,none": 0.5}) == 0.5


#: Tasks of lmms-eval with scores from 0 to 1; all others give percent, or MME's points.
SHARES = {"gqa", "scienceqa_img", "textvqa_val", "pope", "vqav2_val", "mmmu_val", "vizwiz_vqa_val", "seedbench"}


def test_scales_are_of_the_units_in_which_lmms_eval_scores():
    scales = {(one.task, one.scale) for suite in SUITES.values() for one in suite.benchmarks}
    others = {"mme", "mmbench_en_dev", "mmbench_cn_dev", "mmvet", "llava_in_the_wild", "activitynetqa"}
    assert scales == {(task, 100.0) for task in SHARES} | {(task, 1.0) for task in others}


@pytest.mark.parametrize(
    ("verdict", "counts"),
    [
        ({"score": 0.0, "eval_model": "it"}, True),
        ({"score": 0.0, "eval_model": ""}, False),
        ({"score": 0.0, "eval_model": "Failed Request"}, False),
        ({"scores": [8, 0], "eval_model": "it"}, True),
        ({"scores": [8, -1], "eval_model": "it"}, False),  # lmms-eval's value for a judgement that it cannot parse
    ],
)
def test_an_answer_without_a_verdict_is_no_wrong_answer(verdict, counts):
    samples = [{"m": {"scores": [7, 7], "eval_model": "it"}}, {"m": verdict}]
    check_judged(Benchmark("A", "a", ("m",), judge="sometimes"), samples)
    with nullcontext() if counts else pytest.raises(UserError, match="judge of a gave no score for 1 of 2 answers"):
        check_judged(Benchmark("A", "a", ("m",), judge="always"), samples)


class Configured:
    """The part of a configuration that `suite_scores` uses."""

    def __init__(self, method, compressor="some", note=""):
        self.method, self.budget, self.compressor, self.note = method, "25%", compressor, note


def test_columns_have_scores_beside_the_plain_models_and_reasons():
    suite = Suite("s", "", (Benchmark("A", "a", ("m",), 100), Benchmark("B", "b"), Benchmark("C", "c")), "scores")
    files = {("a", "plain"): 0.5, ("a", "small"): 0.4, ("b", "plain"): 10.0}

    def look(benchmark, one):
        value = files.get((benchmark.task, one.method))
        return None if value is None else {"results": {"m,none": value}, "retention": 0.25}

    every = [Configured("plain"), Configured("small"), Configured("none", None, "cannot be")]
    plain, compressed, none = suite_scores(suite, every, look, lambda one: "no judge" if one.name == "C" else "")
    assert [row.note for row in compressed.rows] == ["", "not run yet", "no judge"]
    assert [row.score for row in compressed.rows] == [40.0, None, None]
    assert (compressed.rows[0].plain, compressed.rows[0].difference, compressed.rows[0].relative) == (50.0, -10.0, 80.0)
    assert (plain.average, plain.averaged) == (30.0, 2)
    # Both averages are over the same benchmarks.
    assert (compressed.average, compressed.plain_average, compressed.averaged) == (40.0, 50.0, 1)
    assert (none.rows, none.configuration.note) == ((), "cannot be")


def test_the_rows_of_a_suite_leave_out_what_they_do_not_have():
    suite = Suite("s", "", (Benchmark("A", "a", ("m",), 100), Benchmark("B", "b")), "scores")
    result = {"results": {"m,none": 0.5}, "retention": 0.25, "questions": 3, "model": "mini"}
    every = [Configured("plain", note="odd"), Configured("none", None, "cannot be")]
    scores = suite_scores(suite, every, lambda benchmark, one: result if benchmark.task == "a" else None, lambda _: "")
    rows = table(suite, scores)
    a, b, average, none = rows.as_json()
    assert (a["task"], a["score"], a["relative"], a["questions"], a["note"]) == ("a", 50, 100, 3, "odd")
    assert (b["score"], b["difference"], b["retention"], b["note"]) == (None, None, None, "odd; not run yet")
    costs = {"score": 50, "plain": 50, "difference": 0}
    assert average == {"suite": "s", "method": "plain", "budget": "25%", "benchmark": "average of 1", **costs}
    assert none == {"suite": "s", "method": "none", "budget": "25%", "note": "cannot be"}
    assert [row["retention"] for row in rows.as_csv()] == ["0.2500", "", "", ""]
    assert [row["difference"] for row in rows.as_csv()] == ["0.0000", "", "0.0000", ""]
    text = [line.split() for line in table(suite, scores[:1]).text().splitlines()]
    assert text == [
        ["benchmark", "score", "plain", "difference", "tokens", "kept"],
        ["A", "50.0", "50.0", "+0.000", "25.0%"],
        ["B", "—", "—", "—", "—"],
        ["average", "of", "1", "50.0", "50.0", "+0.000", "—"],
    ]


def test_a_suite_stands_beside_what_the_paper_prints():
    """The measured scores are the paper's own, of VisionZip at 64 tokens and of its plain model."""
    rows = [
        row for row in published("visionzip") if row.table == "Table 1" and row.metric == "score" and not row.setting
    ]
    kept = {("no_compression", "576"), ("visionzip", "64")}
    scores = {(row.method, row.benchmark): row.value for row in rows if (row.method, row.keep) in kept}

    def look(benchmark, one):
        value = scores.get((one.method, benchmark.name))
        share = 1.0 if one.method == "no_compression" else 64 / 576
        metrics = {
            f"{name},none": (value or 0) / benchmark.scale / len(benchmark.metrics) for name in benchmark.metrics
        }
        return None if value is None else {"results": metrics, "visual_tokens": 576.0, "retention": share}

    every = [Configured("no_compression", NoCompression()), Configured("visionzip", VisionZip(keep=64))]
    model = "llava-hf/llava-1.5-7b-hf"
    mine = [
        m for column in suite_scores(VISIONZIP, every, look, lambda _: "") for m in measured(VISIONZIP, column, model)
    ]
    beside = [one for one in against("visionzip", mine) if one.published and one.published.setting == ""]
    own = [one for one in beside if one.published.table == "Table 1" and one.measured.metric == "score"]
    assert len(own) == len(scores)
    assert {round(one.difference, 9) for one in own} == {0}
    average = [one for one in mine if one.metric == "relative score" and one.method == "visionzip"]
    assert [(one.benchmark, one.tokens) for one in average] == [("average of 9", 64)]
    assert average[0].value == pytest.approx(93.2, abs=0.1)  # MMTok recomputes it over these nine


def test_tasks_can_be_named_in_place_of_a_suite():
    assert read_suite("llavolta13") is LLAVOLTA
    assert [one.task for one in read_suite("pope, gqa,pope").benchmarks] == ["pope", "gqa"]
    with pytest.raises(UserError, match="one suite or a list of tasks, not both: 'llavolta13'"):
        read_suite("llavolta13,pope")
    with pytest.raises(UserError, match="names nothing"):
        read_suite(",")
    with pytest.raises(UserError, match=r"gives lmms-eval no videos yet; .* .no task for TGIF, MSVD or MSRVTT.$"):
        read_suite("videollava4")


# ---------------------------------------------------------------- what lmms-eval hands over


@pytest.mark.parametrize(
    "method",
    ["visionzip(dominant=10,contextual=6)", "dfmr(tau=0.3)+fastv(layer=3)", "sparsevlm", "a/compressor.json"],
)
@pytest.mark.parametrize("quote", ["", "'", '"'])
def test_settings_keep_what_is_in_brackets_together(method, quote):
    found = read_settings(f"pretrained=a/b, method={quote}{method}{quote},device=cuda:1")
    assert found == {"pretrained": "a/b", "method": method, "device": "cuda:1"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("method=visionzip(keep=16", "unclosed bracket or quote"),
        ("method='visionzip", "unclosed bracket or quote"),
        ("pretrained", "'pretrained' in --model_args is not a setting"),
        ("pretraind=x", "did you mean 'pretrained'"),
        ("method=a,method=b", "sets method twice"),
    ],
)
def test_settings_that_are_none_are_refused(text, said):
    with pytest.raises(UserError, match=said):
        read_settings(text)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        (None, {"max_new_tokens": 1024, "do_sample": False}),
        ({"temperature": 0.2, "do_sample": False, "top_p": 1.0}, {"max_new_tokens": 1024, "do_sample": False}),
        ({"temperature": 0, "do_sample": True}, {"max_new_tokens": 1024, "do_sample": False}),
        ({"temperature": 0.5, "top_p": None}, {"max_new_tokens": 1024, "do_sample": True, "temperature": 0.5}),
        ({"max_new_tokens": 6, "num_beams": 3}, {"max_new_tokens": 6, "do_sample": False, "num_beams": 3}),
    ],
)
def test_generation_settings(settings, wanted):
    assert read_generation(settings).arguments == wanted


def test_settings_that_mean_nothing_are_told_and_several_answers_are_refused():
    generation = read_generation({"image_aspect_ratio": "original", "until": "\n\n"})
    assert (generation.unused, generation.until) == (("image_aspect_ratio",), ("\n\n",))
    with pytest.raises(UserError, match="num_return_sequences"):
        read_generation({"num_return_sequences": 2})


def test_an_answer_ends_before_the_first_of_its_ends():
    generation = read_generation({"until": ["ASSISTANT:", "", ";"]})
    assert [generation.cut(text) for text in ("a; b ASSISTANT: c", " a ", ";")] == ["a", "a", ""]
    assert read_generation({"until": None}).cut("a\n\nb") == "a\n\nb"


def test_a_chat_has_its_images_in_order_and_in_rgb():
    first, second = Image.new("L", (4, 4), 7), Image.new("RGBA", (4, 4), (1, 2, 3, 255))
    content = [{"type": "text", "text": "a"}, {"type": "image", "url": first}, {"type": "image", "url": second}]
    chat = read_chat([{"role": "system", "content": "be brief"}, {"role": "user", "content": content}], ["<image>"])
    assert [part["type"] for part in chat.messages[1]["content"]] == ["text", "image", "image"]
    assert chat.messages[0]["content"] == [{"type": "text", "text": "be brief"}]
    assert [image.getpixel((0, 0)) for image in chat.images] == [(7, 7, 7), (1, 2, 3)]


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--suite", "pope", "--tasks", "mini"], "--tasks is for vlmzip's own tasks and does not go with --suite"),
        (["--suite", "pope", "--report"], "--report is for"),
        (["--suite", "pope", "--max-new-tokens", "4"], "--max-new-tokens is for"),
        (["--suite", "pope", "--seed", "1"], "--seed is for"),
        (["--suite", "pope", "--examples", "1"], "--examples is for"),
        (["--suite", "pope", "--batch", "0"], "--batch 0: give at least 1"),
        (["--suite", "pope", "--include-path", "nowhere"], "--include-path 'nowhere' is not a folder"),
        (["--include-path", "tests"], "--include-path is for --suite"),
        (["--suite", "videollava4"], "videollava4: vlmzip gives lmms-eval no videos yet"),
        (["--suite", "pope", "--methods", "visionzap"], "did you mean 'visionzip'"),
    ],
)
def test_options_that_do_not_combine_are_refused_in_a_line(arguments, said, capsys):
    assert main(["eval", *arguments]) == 2
    out, err = capsys.readouterr()
    assert said in err
    assert (out, err.count("\n")) == ("", 1)


def test_several_processes_are_sent_to_lmms_eval_itself(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["eval", "--suite", "pope"]) == 2
    assert "accelerate launch -m lmms_eval --model vlmzip" in capsys.readouterr().err


@pytest.mark.skipif(find_spec("lmms_eval") is not None, reason="lmms-eval is installed here")
def test_without_lmms_eval_one_line_says_what_to_install(capsys):
    assert main(["eval", "--suite", "llavolta13"]) == 2
    assert capsys.readouterr().err == f"vlmzip: --suite needs lmms-eval, which is large: {how_to_install('lmms')}\n"


# ---------------------------------------------------------------- what is kept


def result(**more):
    costs = {"questions": 3, "visual_tokens": 36.0, "retention": 0.25}
    return {"method": "pool2d", "results": {"exact_match,none": 0.5}, **costs, **more}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, ""),
        ({"visual_tokens": None, "retention": None}, ""),
        ({"results": {"exact_match,none": "0.5"}}, "its results are not numbers by name"),
        ({"results": {"exact_match,none": None}}, "its results are not numbers by name"),
        ({"results": [1]}, "its results are not numbers by name"),
        ({"results": None}, "its results are not numbers by name"),
        ({"method": 3}, "its method is not a text"),
        ({"questions": -1}, "its questions is not a whole number"),
        ({"retention": "all"}, "its visual_tokens and retention are not numbers from 0"),
        ({"visual_tokens": None}, "its visual_tokens and retention are not numbers from 0"),
    ],
)
def test_a_result_that_was_edited_is_refused(more, said):
    assert wrong_result(result(**more)) == said


def test_task_files_of_ones_own(tmp_path):
    for name in ("a.yaml", "deep/utils.py", "deep/data.json", "b.yml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert [path.name for path in task_files(tmp_path)] == ["a.yaml", "b.yml", "utils.py"]
