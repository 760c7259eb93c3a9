"""`bench` as a user runs it, on a model so small that it takes seconds."""

import csv
import json
import os
import re
import signal
import weakref
from argparse import Namespace

import pytest
import torch

from vlmzip import LLaVolta, VisionZip
from vlmzip.children import in_child
from vlmzip.cli._shared.bench_progress import Progress
from vlmzip.cli._shared.console import log_on_stderr
from vlmzip.cli.bench import _set_up
from vlmzip.cli.main import main
from vlmzip.compressor import Profile
from vlmzip.errors import UserError
from vlmzip.lab.bench import presets
from vlmzip.lab.bench.bench import BenchStep, Contender, compare
from vlmzip.lab.bench.output import doubts
from vlmzip.lab.bench.presets import PRESETS, Llava, Qwen25VL, make_model
from vlmzip.lab.bench.timing import Spans
from vlmzip.progress import in_words
from vlmzip.visual_tokens import Grid

QUICK = ("--repeats", "2", "--new-tokens", "2", "--text-tokens", "6", "--device", "cpu", "--scale", "1")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Two images of 36 visual tokens, an LLM of 4 layers."""
    preset = Llava(
        images=2, grid=Grid(1, 6, 6), layers=4, heads=1, mlp=64, vision_layers=2, vision_heads=1, vision_mlp=32
    )
    monkeypatch.setitem(presets.PRESETS, "llava-1.5-7b", preset)


#: Peaks of a method's run, where no test needs real ones.
PEAK = 2**20 + 1  # no number of whole pages, which a measured peak is


@pytest.fixture(autouse=True)
def memory_is_known(monkeypatch, request):
    """Spare tests the process that measures the memory, which takes seconds, unless they ask for `real_memory`."""
    if "real_memory" not in request.fixturenames:
        monkeypatch.setattr("vlmzip.cli.bench.in_frugal_process", lambda peaks, *recipe: [PEAK] * len(recipe[-1]))


@pytest.fixture
def real_memory():
    """Measure the memory in a process of its own."""


def run(capsys, *arguments):
    code = main(["bench", *QUICK, *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def test_two_rows_a_method_each_beside_its_limit(capsys):
    code, out, _ = run(capsys, "--methods", "visionzip,llavolta(layer=1)", "--average-keep", "50%", "--json")
    assert code == 0
    rows = json.loads(out)["rows"]
    assert [(row["method"], row["scope"]) for row in rows] == [
        (method, scope)
        for method in ("no_compression", "visionzip", "llavolta(layer=1)")
        for scope in ("LLM prefill", "TTFT")
    ]
    plain, _, before, before_ttft, inside, _ = rows
    assert (plain["visual_tokens"], before["visual_tokens"], inside["visual_tokens"]) == ("72", "36", "72×1 → 24×3")
    assert (plain["speed_up"], plain["flops_limit"], plain["share_of_limit"]) == (1, 1, 1)
    assert before["compression_ratio"] == 2
    assert before["flops_limit"] == plain["flops"] / before["flops"]
    assert before_ttft["flops_limit"] < before["flops_limit"]  # the encoder does the same for both
    for row in rows:
        assert row["speed_up_q1"] <= row["speed_up"] <= row["speed_up_q3"]
        assert row["share_of_limit"] == row["speed_up"] / row["flops_limit"]
        assert row["tokens_per_second"] > 0
        assert row["device"]
    assert (plain["kv_bytes"], before["kv_bytes"]) == (2 * 128 * 4 * 4 * 78, 2 * 128 * 4 * 4 * 42)
    assert {row["peak_bytes"] for row in rows} == {PEAK}


@pytest.mark.slow
@pytest.mark.usefixtures("real_memory")
def test_the_memory_is_measured_in_a_process_of_its_own(capsys):
    code, out, _ = run(capsys, "--methods", "visionzip,llavolta(layer=1)", "--average-keep", "50%", "--json")
    assert code == 0
    peaks = [row["peak_bytes"] for row in json.loads(out)["rows"]]
    assert peaks[0::2] == peaks[1::2]  # a method's two rows tell of the same run
    assert all(peak > 0 for peak in peaks)
    assert PEAK not in peaks


def test_a_batch_counts_all_of_its_rows(capsys):
    single, double = (
        json.loads(run(capsys, "--methods", "pool2d", "--average-keep", 9, "--batch", batch, "--json")[1])["rows"]
        for batch in (1, 2)
    )
    for one, two in zip(single, double, strict=True):
        assert (two["flops"], two["kv_bytes"]) == (2 * one["flops"], 2 * one["kv_bytes"])
        assert (two["visual_tokens"], two["flops_limit"]) == (one["visual_tokens"], one["flops_limit"])


def test_a_smaller_image_saves_the_encoders_work_too(capsys):
    rows = json.loads(run(capsys, "--methods", "downsample,pool2d", "--average-keep", 9, "--json")[1])["rows"]
    limits = {(row["method"], row["scope"]): row["flops_limit"] for row in rows}
    assert limits["downsample", "LLM prefill"] == limits["pool2d", "LLM prefill"]
    assert limits["downsample", "TTFT"] > limits["pool2d", "TTFT"]


def test_the_table_and_the_file(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    code, out, _ = run(capsys, "--methods", "pool2d", "--average-keep", "25%", "--out", tmp_path)
    assert code == 0
    assert "72 visual tokens and 6 of text, batch 1, float32, sdpa, cpu" in out
    assert "written to" in out
    [path] = tmp_path.iterdir()
    assert path.name.startswith("bench-llava-1.5-7b-")
    assert f"torch{torch.__version__}" in path.name
    assert path.name.endswith("scale1-float32-sdpa-batch1-keep0.25.csv")
    rows = list(csv.DictReader(path.open()))
    assert len(rows) == 4
    assert rows[2]["compressor"] == "pool2d(factor=2)"
    assert {"layers", "width", "mlp", "vision_layers", "dtype", "commit", "torch"} <= rows[0].keys()


def test_it_fits_80_columns_and_nothing_is_broken(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    chain = "llavolta(layer=2,stride=8)+random_tokens(keep=4)"
    _, out, _ = run(capsys, "--methods", f"random_tokens,{chain}", "--average-keep", "as-set", "--out", tmp_path)
    *lines, written = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert written.startswith("written to ")
    assert written.endswith(".csv")
    for name in ("no_compression", "random_tokens", "llavolta(layer=2,stride=8)+"):
        assert len([line for line in lines if line.startswith(f"{name} ")]) == 3  # in every block
    assert len(re.findall(r" \d+\.\d\dx \(\d+\.\d\d-\d+\.\d\d\) +\d+\.\d\dx +\d+%$", out, flags=re.M)) == 6
    assert len(re.findall(r" [\d.]+ [KM]iB +[\d.]+ [KM]?i?B +\d+\.\d$", out, flags=re.M)) == 3


def test_a_window_that_is_too_narrow_costs_no_digits(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    _, out, _ = run(capsys, "--methods", "pool2d", "--average-keep", 9)
    assert len(re.findall(r"\d\.\d\dx \([\d.]+-[\d.]+\) +[\d.]+x +\d+%$", out, flags=re.M)) == 4


def test_one_round_has_no_spread(capsys):
    _, out, err = run(capsys, "--methods", "pool2d", "--average-keep", 9, "--repeats", 1)
    assert re.search(r"^no_compression +[\d.]+ +1\.00x +1\.00x +100%$", out, flags=re.M)
    assert "One round: it has no spread" in out
    assert "one round of each" in err


def test_a_scale_at_which_overheads_rule_is_said(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    quick = ("--methods", "pool2d", "--average-keep", 9)
    _, out, _ = run(capsys, *quick, "--scale", "1/64")
    assert "note: at --scale 1/64 most of the time is overhead" in out
    assert "most of the time is overhead" in json.loads(run(capsys, *quick, "--scale", "1/9", "--json")[1])["notes"][-1]
    assert "overhead" not in run(capsys, *quick, "--scale", "1/8")[1]


@pytest.mark.parametrize(
    ("device", "clock", "said"),
    [("cpu", "wall", "--clock cpu"), ("cpu", "cpu", "more --repeats"), ("cuda", "wall", "uses the GPU")],
)
def test_timings_of_a_busy_machine_are_called_unreliable(device, clock, said):
    def found(*seconds):
        plain = Contender("plain", None, flops={"prefill": 1, "ttft": 1})
        plain.spans = [Spans(0.5, one, 0.1) for one in seconds]
        return doubts([plain], Namespace(clock=clock, scale="1"), torch.device(device), narrow=False)

    assert found(1.0, 1.0, 1.24, 1.24, 1.24) == []
    [text] = found(1.0, 1.0, 1.3, 1.3, 1.3)
    assert "quartiles of the plain model's TTFT are 1000 and 1300 ms" in text
    assert said in text
    assert ("--clock cpu" in text) == (clock == "wall" and device == "cpu")


def test_how_far_it_is_is_said_without_a_terminal(capsys):
    _, out, err = run(capsys, "--methods", "pool2d,visionzip", "--average-keep", 9, "--json")
    first, second, third = err.splitlines()
    assert first == "3 methods, no_compression among them: 2 rounds of each, after a warm-up round"
    assert re.fullmatch(r"warmed up; 2 rounds and the memory will take about \d+ s", second)
    assert re.fullmatch(r"measuring the memory, about \d+ s left", third)
    json.loads(out)


def test_a_line_a_round_and_one_in_20_seconds_with_the_time_left(capsys):
    time = 0.0
    progress = Progress(starting=10, clock=lambda: time)
    with log_on_stderr():
        for number in range(4):
            for name, seconds in (("plain", 15), ("slow", 15), ("fast", 1)):
                progress(BenchStep(name, number, 3))
                time += seconds if number else 2 * seconds
        progress.memory()
    assert capsys.readouterr().err.splitlines() == [
        "the round to warm up: slow",
        "the round to warm up: fast",
        "warmed up; 3 rounds and the memory will take about 5.5 min",
        "round 1 of 3, about 5 min left: fast",
        "round 2 of 3, about 1.5 min left: fast",
        "round 3 of 3, about 75 s left: fast",
        "measuring the memory, about 70 s left",
    ]
    progress = Progress(clock=lambda: time)
    with log_on_stderr():
        for number in range(100):  # rounds of a second
            progress(BenchStep("plain", number, 99))
            time += 1
    assert len(capsys.readouterr().err.splitlines()) == 1 + 98 // 5


@pytest.mark.parametrize(("seconds", "words"), [(0.1, "5 s"), (38, "40 s"), (145, "2.5 min"), (9000, "2.5 h")])
def test_times_are_as_exact_as_an_estimate(seconds, words):
    assert in_words(seconds) == words


def test_seconds_that_the_cpu_computed(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    code, out, _ = run(capsys, "--methods", "pool2d", "--average-keep", 9, "--clock", "cpu", "--out", tmp_path)
    assert code == 0
    assert "in seconds that the CPU computed" in out
    [path] = tmp_path.iterdir()
    assert path.name.endswith("keep9-cpu-seconds.csv")
    assert {row["clock"] for row in csv.DictReader(path.open())} == {"cpu"}


def test_one_that_fails_costs_the_others_nothing(capsys, monkeypatch):
    def broken(self, tokens):
        raise RuntimeError("boom")

    monkeypatch.setattr(VisionZip, "assign", broken)
    code, out, _ = run(capsys, "--methods", "visionzip,pool2d", "--average-keep", "25%", "--json")
    assert code == 0
    found = json.loads(out)
    assert {row["method"] for row in found["rows"]} == {"no_compression", "pool2d"}
    assert found["not_measured"] == [{"method": "visionzip", "note": "failed with RuntimeError: boom"}]
    monkeypatch.setenv("COLUMNS", "160")
    assert "(1) visionzip: failed with RuntimeError: boom" in run(capsys, "--methods", "visionzip,pool2d")[1]


def test_a_budget_out_of_reach_is_measured_as_set_and_said():
    profile = Profile(Grid(1, 24, 24), 8)
    late = LLaVolta(layer=4, stride=8)
    one = _set_up("late", late, "11%", profile)
    assert one.compressor == late
    assert one.note.startswith("runs with its own settings, not at this budget: 4 of 8 layers see all tokens")
    assert _set_up("as written", LLaVolta(stride=8), None, profile).compressor == LLaVolta(stride=8)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--preset", "llava-7b"], "unknown preset 'llava-7b'; did you mean 'llava-1.5-7b'?"),
        (["--scale", "2"], "scale 2: give a number above 0 and up to 1"),
        (["--scale", "1/0"], "--scale '1/0' is not a number"),
        (["--scale", "nan"], "--scale 'nan' is not a number"),
        (["--batch", "0"], "--batch 0: give at least 1"),
        (["--new-tokens", "1"], "--new-tokens 1: give at least 2"),
        (["--average-keep", "0"], "--average-keep 0 keeps nothing"),
        (["--average-keep", "none"], "--average-keep must be a number, got 'none'"),
        (["--dtype", "int8"], "unknown dtype 'int8'; choose one of"),
        (["--attention", "flash"], "unknown attention 'flash'; choose one of"),
        (["--clock", "sun"], "unknown clock 'sun'; choose one of"),
        (["--methods", ","], "--methods names no method"),
        (["--methods", "visonzip"], "unknown method 'visonzip'; did you mean 'visionzip'?"),
        (["--device", "tpu"], "--device 'tpu' cannot be used"),
        (["--out", __file__], "is a file; give a folder"),
        (["--attention", "flash_attention_2"], "--attention flash_attention_2 cannot be used"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(capsys, arguments, said):
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert said in err
    assert err.count("\n") == 1
    assert out == ""


def test_weights_that_do_not_fit_are_refused_before_they_are_made(capsys, monkeypatch):
    monkeypatch.setattr("vlmzip.cli.bench.available_bytes", lambda device: 1_000_000)
    code, _, err = run(capsys)
    assert code == 2
    assert "the weights take" in err
    assert "give a smaller --scale" in err


def test_a_full_disk_costs_nothing_that_was_measured(capsys, monkeypatch, tmp_path):
    def full(path, rows):
        raise UserError("no space left")

    monkeypatch.setattr("vlmzip.lab.table.write_csv", full)
    code, out, err = run(capsys, "--methods", "pool2d", "--average-keep", 9, "--out", tmp_path, "--json")
    assert code == 2
    assert "no space left" in err
    assert len(json.loads(out)["rows"]) == 4


class TestWhatIsMeasuredIsKept:
    ASKED = ("--methods", "pool2d,visionzip", "--average-keep", 9)

    def stop_in_round(self, monkeypatch, number):
        def telling(_self, step):
            if step.round == number:
                raise KeyboardInterrupt

        monkeypatch.setattr(Progress, "__call__", telling)

    def test_rounds_are_written_as_they_come(self, capsys, monkeypatch, tmp_path):
        code, _, _ = run(capsys, *self.ASKED, "--out", tmp_path)
        [whole] = tmp_path.iterdir()
        earlier = whole.read_text()
        self.stop_in_round(monkeypatch, 2)
        code, out, _ = run(capsys, *self.ASKED, "--out", tmp_path, "--json")
        assert code == 130
        unfinished = tmp_path / f"{whole.stem}.unfinished.csv"
        assert {row["repeats"] for row in csv.DictReader(unfinished.open())} == {"1"}
        assert whole.read_text() == earlier
        found = json.loads(out)
        assert len(found["rows"]) == 6
        assert found["csv"] == str(unfinished)
        assert "the run was stopped after 1 of 2 rounds" in found["notes"]
        monkeypatch.undo()

    @pytest.mark.slow
    def test_a_kill_while_the_memory_is_measured_costs_the_memory_alone(self, capsys, monkeypatch, tmp_path):
        monkeypatch.setattr("vlmzip.cli.bench.in_frugal_process", lambda *_: in_child(one_and_a_kill))
        code, out, _ = run(capsys, *self.ASKED, "--out", tmp_path, "--json")
        assert code == 0
        rows = json.loads(out)["rows"]
        assert [row["peak_bytes"] for row in rows] == [7, 7, None, None, None, None]
        why = "the memory was not measured: its process was ended by signal 9, perhaps for lack of memory"
        assert [row["note"] for row in rows] == ["", "", why, why, why, why]
        assert f"{why} (pool2d, visionzip)" in json.loads(out)["notes"]
        [path] = tmp_path.iterdir()
        assert [row["peak_bytes"] for row in csv.DictReader(path.open())] == ["7", "7", "", "", "", ""]

    def test_the_model_is_gone_before_another_process_makes_it(self, capsys, monkeypatch):
        models = []

        def remembered(*args):
            models.append(weakref.ref(model := make_model(*args)))
            return model

        def in_another_process(*_):
            yield from [None] * 3 if all(model() is None for model in models) else []

        monkeypatch.setattr("vlmzip.cli.bench.make_model", remembered)
        monkeypatch.setattr("vlmzip.cli.bench.in_frugal_process", in_another_process)
        code, _, _ = run(capsys, "--methods", "fastv(layer=1,keep=9),visionzip", "--average-keep", "as-set")
        assert code == 0
        assert len(models) == 2


def one_and_a_kill():
    yield 7
    os.kill(os.getpid(), signal.SIGKILL)


class TestQwen:
    """A model whose images have a grid of any size, and which takes videos by other inputs."""

    @pytest.fixture(autouse=True)
    def tiny_qwen(self, monkeypatch):
        sizes = dict(layers=4, heads=2, key_value_heads=1, mlp=64, vision_layers=2, vision_heads=1, vision_mlp=32)
        sizes |= dict(vocabulary=151_936, ties_head=True)
        image = Qwen25VL(images=1, grid=Grid(1, 2, 8), **sizes)
        monkeypatch.setitem(presets.PRESETS, "qwen2.5-vl-3b", image)
        video = Qwen25VL(images=2, grid=Grid(1, 2, 4), is_video=True, **sizes)
        monkeypatch.setitem(presets.PRESETS, "qwen2.5-vl-3b-video", video)

    @pytest.mark.parametrize("preset", ["qwen2.5-vl-3b", "qwen2.5-vl-3b-video"])
    def test_budgets_are_shares_of_the_tokens_in_the_prompt(self, capsys, preset):
        methods = "visionzip,pool2d,fastv(layer=1)"
        asked = ("--preset", preset, "--methods", methods, "--average-keep", "50%", "--repeats", "1")
        code, out, _ = run(capsys, *asked, "--json")
        assert code == 0
        rows = {row["method"]: row for row in json.loads(out)["rows"] if row["scope"] == "LLM prefill"}
        plain = rows["no_compression"]
        assert (plain["visual_tokens"], plain["text_tokens"]) == ("16", 6)
        assert plain["kv_bytes"] == 2 * 128 * 4 * 4 * 22  # one head of keys and values, of two heads of queries
        assert rows["visionzip"]["visual_tokens"] == "8"
        assert rows["fastv(layer=1)"]["visual_tokens"] == "16×1 → 5×3"
        assert all(row["flops_limit"] >= 1 for row in rows.values())

    def test_a_method_that_the_model_refuses_gets_one_line(self, capsys):
        asked = (
            "--preset",
            "qwen2.5-vl-3b",
            "--methods",
            "fastv(layer=9),pool2d(factor=2)",
            "--average-keep",
            "as-set",
        )
        code, out, _ = run(capsys, *asked, "--repeats", "1", "--json")
        assert code == 0
        [refused] = json.loads(out)["not_measured"]
        assert refused["method"] == "fastv(layer=9)"
        assert "4 layers" in refused["note"]
        assert "\n" not in refused["note"]

    def test_scaling_keeps_the_grid(self):
        preset = PRESETS["qwen2.5-vl-7b-video"].scaled(1 / 8)
        assert (preset.width, preset.key_value_heads, preset.vision_width, preset.visual_tokens) == (512, 1, 160, 1008)


class TestPresets:
    @pytest.mark.parametrize(
        ("name", "tokens", "parameters"),
        [
            ("llava-1.5-13b", 576, 13.4e9),
            ("llava-next-7b", 2880, 7.06e9),
            ("llava-next-13b", 2880, 13.4e9),
            ("video-llava-7b", 2048, 7.06e9),
            ("qwen2.5-vl-3b", 972, 3.755e9),
            ("qwen2.5-vl-3b-video", 1008, 3.755e9),
            ("qwen2.5-vl-7b", 972, 8.292e9),
            ("qwen2.5-vl-7b-video", 1008, 8.292e9),
        ],
    )
    def test_published_sizes(self, name, tokens, parameters):
        preset = PRESETS[name]
        model = make_model(preset.config(), "meta", torch.bfloat16)
        assert preset.visual_tokens == tokens
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.01)

    def test_scaling_narrows_and_leaves_layers_and_tokens(self):
        preset = PRESETS["llava-next-13b"]
        compressed = preset.scaled(1 / 8)
        assert (compressed.heads, compressed.mlp, compressed.vision_heads, compressed.vision_mlp) == (5, 1728, 2, 512)
        assert (compressed.layers, compressed.vision_layers, compressed.visual_tokens) == (40, 24, 2880)
        assert (compressed.width, compressed.vision_width) == (640, 128)
        assert preset.scaled(1.0) == preset
        assert preset.scaled(0.001).heads == 1

    @pytest.mark.parametrize("scale", [0.9, 0.8, 0.5, 1 / 8, 0.01])
    def test_heads_of_keys_divide_those_of_queries_at_every_scale(self, scale):
        for preset in (PRESETS["mgm-2b"], PRESETS["qwen2.5-vl-7b"]):
            compressed = preset.scaled(scale)
            assert compressed.heads % compressed.key_value_heads == 0

    def test_prompts_have_text_on_both_sides_of_the_images(self):
        preset = PRESETS["llava-1.5-7b"]  # the tiny one
        inputs = preset.inputs(3, 7, "cpu", torch.float32)
        image = inputs["input_ids"] == preset.placeholder
        assert inputs["input_ids"].shape == (3, 79)
        assert image[:, 3:75].all()
        assert not image[:, :3].any()
        assert not image[:, 75:].any()
        assert inputs["pixel_values"].shape == (6, 3, 84, 84)


def test_speed_up_is_the_median_of_ratios_within_rounds():
    plain, fast = Contender("plain", None), Contender("fast", None)
    plain.flops, fast.flops = {"prefill": 100, "ttft": 120}, {"prefill": 10, "ttft": 30}
    plain.spans = [Spans(4.0, 5.0, 0.1), Spans(8.0, 10.0, 0.1), Spans(6.0, 6.0, 0.1)]
    fast.spans = [Spans(1.0, 2.0, 0.1), Spans(1.0, 5.0, 0.1), Spans(1.0, 1.0, 0.1)]
    found = compare(fast, plain, "prefill")
    assert found.speed_up == (6.0, 5.0, 7.0)
    assert found.limit == 10
    assert found.share.median == pytest.approx(0.6)
    assert found.milliseconds.median == 1000
    ttft = compare(fast, plain, "ttft")
    assert (ttft.speed_up.median, ttft.limit) == (2.5, 4)
