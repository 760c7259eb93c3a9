"""The commands as a user runs them: output, exit codes, one line for each mistake."""

import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tests.families import FAMILIES, save_checkpoint
from vlmzip import RandomTokens, Resampler, available
from vlmzip.cli.main import main
from vlmzip.compressor_file import write_compressor
from vlmzip.errors import how_to_install


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-llava")
    save_checkpoint(folder)
    return str(folder)


@pytest.fixture(scope="session")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(path)
    return str(path)


def run(capsys, *arguments):
    code = main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


def test_ask_prints_answer_and_account(capsys, checkpoint, image):
    code, out, _ = run(capsys, "ask", image, "w4 w5", "--model", checkpoint, "--keep", "8", "--max-new-tokens", "4")
    assert code == 0
    for expected in (
        "visual tokens",
        "36",
        "8",
        "prefill FLOPs",
        "KV cache",
        "36 → 8",
        "4.5x",
        "selection ms",
        "LLM ms",
    ):
        assert expected in out


def test_ask_as_json_with_baseline_and_overlay(capsys, checkpoint, image, tmp_path):
    overlay = tmp_path / "tokens.png"
    arguments = ["--dominant", "5", "--contextual", "2", "--merge=mean", "--baseline", "--overlay", str(overlay)]
    code, out, _ = run(
        capsys, "ask", image, image, "w4", "--model", checkpoint, "--json", "--max-new-tokens", "3", *arguments
    )
    assert code == 0
    result = json.loads(out)
    assert [p["after"] for p in result["images"]] == [7, 7]
    assert (result["plain"]["visual_tokens"], result["compressed"]["visual_tokens"]) == (72, 14)
    assert result["plain"]["prompt_tokens"] - result["compressed"]["prompt_tokens"] == 58
    assert result["compressor"]["merge"] == "mean"
    assert set(result["compressed"]["milliseconds"]) == {"vision encoder", "selection", "LLM"}
    assert "plain_answer" in result
    assert Image.open(overlay).height > 960


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        (
            ["--method", "visionzip", "--keep", "8"],
            "with 8 of 36 visual tokens: prefill FLOPs 3.5x fewer, KV cache 3.2x",
        ),
        (["--method", "fastv", "--keep", "9"], "with 9 of 36 visual tokens at the last layer: prefill FLOPs "),
    ],
)
def test_the_last_line_says_what_was_gained(capsys, checkpoint, image, method, sentence):
    code, out, _ = run(capsys, "ask", image, "w4", "--model", checkpoint, "--baseline", *method)
    *_, plain, compressed = re.findall(r"^(?:plain|visionzip|fastv) +(.*)$", out, flags=re.M)
    last = out.splitlines()[-1]
    assert code == 0
    assert last.startswith(f"{'The same' if plain == compressed else 'Another'} answer {sentence}")


def test_a_method_inside_the_llm_shows_the_first_and_the_last_layer(capsys, checkpoint, image):
    arguments = ["--model", checkpoint, "--baseline", "--method", "fastv", "--keep", "9"]
    _, out, _ = run(capsys, "ask", image, "w4", *arguments)
    rows = re.findall(r"^visual tokens, (first|last) layer +(36 → \d+) +([\d.]+x)$", out, flags=re.M)
    assert rows == [("first", "36 → 36", "1.0x"), ("last", "36 → 9", "4.0x")]
    assert re.search(r"^selection ms +[\d.]+ *$", out, flags=re.M)  # of the method alone


def test_the_answer_is_that_of_the_model(capsys, checkpoint, image):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    inputs = processor(images=Image.open(image), text="USER: <image>\nw4 ASSISTANT:", return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    expected = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    arguments = ["--model", checkpoint, "--method", "no_compression", "--max-new-tokens", "5", "--json"]
    _, printed, _ = run(capsys, "ask", image, "w4", *arguments)
    assert json.loads(printed)["answer"] == expected


def reads_the_question(cls):
    return any(stage.site == "in_llm" or stage.text_aware for stage in cls().stages())


DRAWN = [
    name
    for name, cls in available().items()
    if not issubclass(cls, Resampler)
    and not cls.drops_patches  # LLaVA encodes whole images
    and not reads_the_question(cls)
]


@pytest.mark.parametrize("method", DRAWN)
def test_show_draws_every_method(capsys, checkpoint, image, tmp_path, method):
    out = tmp_path / "out.png"
    code, text, _ = run(capsys, "show", image, "--method", method, "--model", checkpoint, "--out", str(out))
    assert code == 0
    assert "36 →" in text
    assert Image.open(out).width > 900


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("fastv", "fastv chooses inside the LLM, by the question; use vlmzip ask"),
        ("chain", "fastv chooses inside the LLM, by the question"),
        ("pool2d+fastv", "fastv chooses inside the LLM, by the question"),
        ("random_tokens(site=in_llm)", "random_tokens chooses inside the LLM, by the question"),
        ("mmtok", "mmtok chooses by the question; use vlmzip ask"),
        ("cdpruner", "cdpruner chooses by the question"),
    ],
)
def test_show_refuses_what_the_question_decides(capsys, checkpoint, image, method, message):
    code, _, err = run(capsys, "show", image, "--method", method, "--model", checkpoint)
    assert code == 2
    assert message in err


def test_methods_in_one_line(capsys, checkpoint, image):
    spec = "pool2d(factor=2)+random_tokens(site=in_llm,layer=1,keep=4)"
    code, out, _ = run(capsys, "ask", image, "w4", "--method", spec, "--model", checkpoint, "--json")
    assert code == 0
    assert set(json.loads(out)["images"][0]["by_layer"][1:]) == {4}
    code, out, _ = run(capsys, "ask", image, "w4", "--method", "visionzip(merge=mean)", "--keep", "5", "--model",
                       checkpoint, "--json")  # fmt: skip
    fields = json.loads(out)["compressor"]
    assert (code, fields["keep"], fields["merge"]) == (0, 5, "mean")


def test_the_saved_compressor_is_what_a_saved_model_answers_with(capsys, checkpoint, image, tmp_path):
    folder = tmp_path / "saved"
    shutil.copytree(checkpoint, folder)
    write_compressor(RandomTokens(keep=7, seed=3), folder)
    _, out, _ = run(capsys, "ask", image, "w4", "--model", str(folder), "--json")
    assert json.loads(out)["compressor"] == RandomTokens(keep=7, seed=3).to_dict()
    _, out, _ = run(capsys, "ask", image, "w4", "--model", str(folder), "--method", "visionzip", "--json")
    assert json.loads(out)["compressor"]["method"] == "visionzip"


def test_a_budget_that_is_not_met_is_said(capsys, checkpoint, image):
    code, _, err = run(capsys, "ask", image, "w4", "--method", "pool2d", "--keep", "70%", "--model", checkpoint)
    assert code == 0
    assert "note: pool2d: the nearest to 69.4% that it has is 100.0%" in err


def test_a_field_of_another_method_is_named(capsys, image):
    code, _, err = run(capsys, "ask", image, "w4", "--factor", "2")
    assert code == 2
    assert "pool2d has this field: --method pool2d" in err


def test_keep_means_the_nearest_factor_for_pooling(capsys, checkpoint, image):
    arguments = ["--method", "pool2d", "--keep", "25%", "--model", checkpoint, "--json"]
    _, out, _ = run(capsys, "ask", image, "w4", *arguments)
    assert json.loads(out)["compressor"]["factor"] == 2


def test_published_layers_move_into_a_smaller_llm_unless_they_are_asked_for(capsys, checkpoint, image):
    """SparseVLM's layers 3, 7 and 16 of 32, in an LLM of 4."""
    ask = ["ask", image, "w4", "--method", "sparsevlm", "--model", checkpoint, "--max-new-tokens", "2", "--json"]
    code, out, _ = run(capsys, *ask)
    assert code == 0
    assert json.loads(out)["compressor"]["layer"] == [1, 2]
    assert json.loads(out)["images"][0]["by_layer"] == [36, 14, 9, 9]
    _, out, _ = run(capsys, *ask, "--layer", "1,3", "--counts", "12,0.5", "--recycle", "0")
    assert json.loads(out)["images"][0]["by_layer"] == [36, 12, 12, 6]
    _, out, _ = run(capsys, *ask, "--keep", "60%")
    assert json.loads(out)["images"][0]["by_layer"] == [36, 25, 22, 22]  # 60 % remain after the last of its layers
    code, _, err = run(capsys, *ask, "--layer", "3,7,15")
    assert code == 2
    assert "layer must be from 1 to 3 in this LLM of 4 layers, got 7" in err


def test_keeping_more_than_there_is_is_said_once(capsys, checkpoint, image):
    code, out, err = run(capsys, "ask", image, "w4", "--keep", "999", "--model", checkpoint, "--json")
    assert code == 0
    assert err.count("changes nothing") == 1
    assert json.loads(out)["images"][0]["after"] == 36


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Twelve images from plain to noisy, among other files."""
    path = tmp_path_factory.mktemp("folder")
    rng = np.random.default_rng(0)
    for number in range(12):
        noise = rng.integers(-10 * number, 10 * number + 1, (48, 48, 3))
        Image.fromarray((128 + noise).astype(np.uint8)).save(path / f"{number:02}.PNG")
    (path / "notes.txt").write_text("no image")
    (path / "below").mkdir()
    return str(path)


@pytest.mark.draws
def test_calibrate_finds_a_threshold_that_ask_takes(capsys, checkpoint, folder, tmp_path):
    histogram = tmp_path / "deviations.png"
    arguments = [folder, "--model", checkpoint, "--keep", "50%", "--max-factor", "2", "--measure", "pixels"]
    code, out, _ = run(capsys, "calibrate", *arguments, "--histogram", str(histogram), "--json")
    assert code == 0
    found = json.loads(out)
    assert found["images"] == 12
    assert found["average"] == pytest.approx(18, rel=0.05)
    assert found["by_factor"] == {"1": 4, "2": 8}
    assert found["histogram"] == str(histogram)
    assert np.asarray(Image.open(histogram)).std() > 10
    tau = found["compressor"]["tau"]

    _, text, _ = run(capsys, "calibrate", *arguments)
    method = f"dfmr(tau={tau},max_factor=2,measure=pixels)"
    assert f'use it: vlmzip ask IMAGE QUESTION --method "{method}"\n' in text
    assert [line.split() for line in text.split("\n")[3:5]] == [["1", "4", "36"], ["2", "8", "9"]]
    for name, after in (("07.PNG", 9), ("08.PNG", 36)):
        arguments = [f"{folder}/{name}", "w4", "--model", checkpoint, "--method", method, "--json"]
        assert json.loads(run(capsys, "ask", *arguments)[1])["images"][0]["after"] == after


def test_a_histogram_without_matplotlib_is_refused_before_anything_slow(capsys, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    arguments = [folder, "--model", "./nowhere", "--keep", "50%"]
    code, _, err = run(capsys, "calibrate", *arguments, "--histogram", str(tmp_path / "x.png"))
    assert (code, err) == (2, f"vlmzip: figures need matplotlib: {how_to_install('eval')}\n")


def test_odd_images_are_answered(capsys, checkpoint, tmp_path):
    for name, odd in {
        "dot.png": Image.new("RGB", (1, 1)),
        "strip.png": Image.new("RGB", (20000, 3)),
        "cmyk.tiff": Image.new("CMYK", (9, 9)),
        "alpha.png": Image.new("RGBA", (9, 9)),
        "palette.png": Image.new("P", (9, 9)),
        "deep.png": Image.fromarray(np.zeros((9, 9), dtype=np.uint16)),
    }.items():
        odd.save(tmp_path / name)
        code, _, err = run(capsys, "ask", str(tmp_path / name), "w4", "--model", checkpoint, "--max-new-tokens", "2")
        assert code == 0
        assert "vlmzip:" not in err


def test_methods_models_and_help(capsys):
    assert "visionzip" in run(capsys, "methods")[1]
    assert {"name": "dominant"}.items() <= json.loads(run(capsys, "methods", "visionzip", "--json")[1])["fields"][
        1
    ].items()
    assert "2412.04467" in run(capsys, "methods", "visionzip")[1]
    assert json.loads(run(capsys, "models", "llava", "--json")[1])[0]["family"] == "llava"
    for arguments in ([], ["--help"], ["--version"]):
        assert run(capsys, *arguments)[0] == 0
    for command in ("ask", "calibrate", "show", "methods", "models"):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        assert "examples:" in capsys.readouterr().out


MISTAKES = [
    (["ask"], "required"),
    (["ask", "{image}"], "no question"),
    (["ask", "What is there?"], "at least one image"),
    (["ask", "{image}", "  "], "question is empty"),
    (["ask", "missing.png", "w4"], "no file 'missing.png'"),
    (["ask", "{checkpoint}/config.json", "w4"], "not an image"),
    (["ask", "{image}", "w4", "--keep", "0"], "--keep 0 keeps nothing"),
    (["ask", "{image}", "w4", "--keep", "-3"], "--keep -3 keeps nothing"),
    (["ask", "{image}", "w4", "--keep", "abc"], "--keep must be a number, got 'abc'"),
    (["ask", "{image}", "w4", "--keep", "nan"], "--keep must be a fraction in (0, 1], got 'nan'"),
    (["ask", "{image}", "w4", "--method", "visionsip"], "did you mean 'visionzip'"),
    (["ask", "{image}", "w4", "--method", "nowhere:Method"], "cannot import"),
    (["ask", "{image}", "w4", "--dominent", "3"], "did you mean '--dominant'"),
    (["ask", "{image}", "w4", "--method", "pool2d", "--dominant", "3"], "has no option --dominant"),
    (["ask", "{image}", "w4", "--method", "pool2d", "--factor", "2", "--keep", "8"], "not both"),
    (["ask", "{image}", "w4", "--dominant", "3", "--contextual", "1", "--keep", "8"], "keep alone"),
    (["ask", "{image}", "w4", "--max-new-tokens", "0"], "at least 1"),
    (["ask", "{image}", "w4", "--max-new-tokens", "x"], "invalid int"),
    (["ask", "{image}", "w4", "--model", "{empty}"], "is not a checkpoint"),
    (["ask", "{image}", "w4", "--model", "./nowhere"], "no folder './nowhere'"),
    (["ask", "{image}", "w4", "--model", "{image}"], "is a file"),
    (["ask", "{image}", "w4", "--model", "{text_model}"], "not a vision-language model"),
    (["ask", "{image}", "w4", "--model", "{broken}"], "cannot load"),
    (["ask", "{image}", "w4", "--device", "warp"], "cannot be used"),
    (["ask", "{image}", "w4", "--dtype", "float3"], "unknown dtype 'float3'; choose one of"),
    (["ask", "{image}", "w4", "--overlay", "{image}", "--model", "{checkpoint}"], "choose another name"),
    (["ask", "{image}", "w4", "--overlay", "out.xyz", "--model", "{checkpoint}"], "no suffix"),
    (["ask", "{image}", "w4", "--method", "dfmr", "--keep", "25%"], "vlmzip calibrate"),
    (["calibrate", "--keep", "25%"], "required"),
    (["calibrate", "{image}"], "needs a budget"),
    (["calibrate", "{image}", "--keep", "0"], "--keep 0 keeps nothing"),
    (["show", "{image}", "--keep", "0"], "--keep 0 keeps nothing"),
    (["calibrate", "{image}", "--keep", "1.5"], "--keep must be a fraction in (0, 1], got"),
    (["calibrate", "{empty}", "--keep", "25%"], "no image in the folder"),
    (["calibrate", "{checkpoint}/config.json", "--keep", "25%", "--model", "{checkpoint}"], "is not an image"),
    (["calibrate", "{image}", "--keep", "1", "--model", "{checkpoint}"], "it can average 4 to 36"),
    (["calibrate", "{image}", "--keep", "25%", "--method", "pool2d"], "these methods do: adaptive_visionzip, dfmr"),
    (["calibrate", "{image}", "--keep", "25%", "--tau", "1"], "leave out --tau: calibrate sets it"),
    (["calibrate", "{image}", "--keep", "25%", "--histogram", "x.txt"], "no suffix"),
    (["calibrate", "{image}", "--keep", "25%", "--factor", "2"], "did you mean '--max-factor'"),
    (["shoe", "{image}"], "did you mean 'show'"),
    (["methods", "vision"], "did you mean 'visionzip'"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(a) for a, _ in MISTAKES])
def test_mistakes_get_one_line_and_exit_code_2(capsys, checkpoint, image, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "text_model", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "text_model" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "broken" / "config.json").write_text("{")
    places = {"checkpoint": checkpoint, "image": image}
    places |= {name: str(tmp_path / name) for name in ("empty", "text_model", "broken")}
    code, out, err = run(capsys, *[a.format(**places) for a in arguments])
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert err.startswith("vlmzip: ")
    assert out == ""
    assert not [p for p in tmp_path.iterdir() if p.is_file()]


ON_GPU = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 6.72 GiB. GPU 0 has a total capacity of 139.80 GiB"
)
ON_CPU = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 270950400000 bytes. Error 12")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["bench"], ON_GPU, ": 6.72 GiB more were needed; try a smaller --batch, or a smaller --scale, or --dtype"),
        (["bench"], ON_CPU, ": 252.3 GiB more were needed; try"),
        (["bench"], MemoryError(), "the memory is full; try a smaller --batch"),
        (["bench", "--dtype", "float16"], ON_GPU, "try a smaller --batch, or a smaller --scale\n"),
        (["eval", "--batch", "900"], ON_GPU, "try a smaller --batch, or --dtype bfloat16\n"),
        (["ask", "a.png", "w", "--dtype", "bfloat16"], ON_GPU, "try fewer images\n"),
        (["train", "run.yaml"], ON_GPU, "try --set batch_per_process=1\n"),
    ],
)
def test_too_much_at_once_gets_one_line(capsys, monkeypatch, arguments, error, message):
    def run(_):
        raise error

    monkeypatch.setattr(f"vlmzip.cli.{arguments[0]}.run", run)
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "the memory is full" in said
    assert message in said
    assert said.count("\n") == 1


def test_ask_with_fewer_pixels_has_no_detail_to_tell_of(capsys, checkpoint, image, tmp_path):
    arguments = ["--method", "downsample", "--keep", "9", "--json", "--overlay", str(tmp_path / "tokens.png")]
    code, out, err = run(capsys, "ask", image, "w4", "--model", checkpoint, "--max-new-tokens", "2", *arguments)
    assert code == 0
    (found,) = json.loads(out)["images"]
    assert (found["before"], found["after"], found["detail_lost"]) == (36, 9, None)
    assert "leave out" not in err
    assert (tmp_path / "tokens.png").exists()


QFORMER = ["--method", "qformer", "--queries", "4", "--depth", "1", "--width", "8", "--heads", "2"]


def test_ask_with_a_resampler_says_that_it_is_untrained(capsys, checkpoint, image):
    code, out, err = run(capsys, "ask", image, "w4", "--model", checkpoint, "--json", "--max-new-tokens", "2", *QFORMER)
    assert code == 0
    (found,) = json.loads(out)["images"]
    assert (found["before"], found["after"], found["by_layer"], found["detail_lost"]) == (36, 4, [4] * 4, None)
    assert err.count("\n") == 1
    assert err.startswith("note: qformer is untrained: ")


@pytest.mark.parametrize("command", [["show", "--out"], ["ask", "w4", "--overlay"]])
def test_a_resampler_has_nothing_to_draw(capsys, checkpoint, image, tmp_path, command):
    name, *words, option = command
    target = tmp_path / "tokens.png"
    code, out, err = run(capsys, name, image, *words, "--model", checkpoint, *QFORMER, option, str(target))
    assert (code, out) == (2, "")
    assert err == "vlmzip: qformer makes each token from the whole image, so there is no token map to draw\n"
    assert not target.exists()


def test_show_tells_average_and_upper_count_where_images_have_tiles(capsys, tmp_path):
    family = FAMILIES["llava_next"]()
    family.model.save_pretrained(tmp_path / "model")
    family.processor().save_pretrained(tmp_path / "model")
    Image.new("RGB", (90, 40), "red").save(tmp_path / "a.png")
    arguments = ["show", str(tmp_path / "a.png"), "--model", str(tmp_path / "model"), "--out", str(tmp_path / "s.png")]
    arguments += ["--method", "visionzip", "--keep-per-view", "4"]
    code, text, _ = run(capsys, *arguments)
    assert code == 0
    assert "12 per image on average; upper count 20, for an image of 5 views" in text
    code, text, _ = run(capsys, *arguments, "--json")
    assert (json.loads(text)["average"], json.loads(text)["upper_count"]) == (12, 20)
