"""Checkpoints in the authors' layout become checkpoints that transformers and vlmzip load."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlmzip
from tests.mini_gemini import published
from tests.references import mini_gemini as reference
from tests.tiny import LLM, SIDE
from vlmzip import VisionZip
from vlmzip.cli.main import main
from vlmzip.mini_gemini.processing import MiniGeminiProcessor

pytestmark = pytest.mark.slow  # writes and reads whole checkpoints

TOKENS = 36


def arguments(paths, out):
    own, clip, convnext = map(str, paths)
    return ["convert", own, "--clip", clip, "--convnext", convnext, "--out", str(out)]


def converted(tmp_path, **settings):
    out = tmp_path / "out"
    assert main(arguments(published.write(tmp_path, **settings), out)) == 0
    return AutoModelForImageTextToText.from_pretrained(out), AutoProcessor.from_pretrained(out)


def inputs_of(processor, width=70):
    image = Image.effect_noise((width, 50), 90).convert("RGB")
    return processor(images=[image], text="w5 <image> w6", return_tensors="pt")


@pytest.mark.parametrize(
    ("kind", "grid", "tuned", "pickled"),
    [("Llama", 1, None, False), ("Gemma", 1, 7, True), ("Llama", 2, 7, False), ("Gemma", 2, None, True)],
)
def test_the_logits_are_those_of_the_parts(tmp_path, kind, grid, tuned, pickled):
    """The tokens of the reference, between the words, through the LLM."""
    model, processor = converted(tmp_path, kind=kind, grid=grid, tuned=tuned, pickled=pickled)
    inputs = inputs_of(processor)
    views = inputs["pixel_values"].reshape(-1, 3, SIDE, SIDE)
    assert len(views) == (1 if grid == 1 else 5)
    seed = 0 if tuned is None else tuned
    patches = published.patches(published.clip(seed), views)
    weights, aux = published.modules(LLM["hidden_size"]), inputs["pixel_values_aux"][0]
    tokens = reference.tokens_of_image(weights, published.trunk(seed), patches, aux, grid)
    llm = published.llm(kind)
    with torch.no_grad():
        words = [llm.get_input_embeddings()(torch.tensor([[word]]))[0] for word in (5, 6)]
        if kind == "Gemma":  # the authors' version multiplies all inputs
            tokens = tokens * LLM["hidden_size"] ** 0.5
        expected = llm(inputs_embeds=torch.cat([words[0], tokens, words[1]])[None]).logits
        logits = model(**inputs).logits
    assert logits.shape[1] == expected.shape[1] == TOKENS * len(views) + 2
    torch.testing.assert_close(logits[..., :96], expected, rtol=1e-4, atol=1e-4)


def test_no_answer_has_the_new_rows(tmp_path):
    model, processor = converted(tmp_path)
    token = model.config.image_token_id
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == token == 96
    assert len(model.get_input_embeddings().weight) == 128
    logits = model(**inputs_of(processor)).logits
    assert (logits.argmax(-1) < token).all()


@pytest.mark.parametrize(
    ("kind", "prompt"),
    [
        (
            "Llama",
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful,"
            " detailed, and polite answers to the user's questions. USER: <image>\nWhat? ASSISTANT: This.</s>"
            "USER: Why? ASSISTANT:",
        ),
        (
            "Gemma",
            "<start_of_turn>user\n<image>\nWhat?<end_of_turn>\n<start_of_turn>model\nThis.<end_of_turn>\n<eos>"
            "<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n",
        ),
    ],
)
def test_prompts_are_those_of_the_training(tmp_path, kind, prompt):
    _, processor = converted(tmp_path, kind=kind)
    first = [{"type": "image"}, {"type": "text", "text": "What?"}]
    turns = [("user", first), ("assistant", [{"type": "text", "text": "This."}]), ("user", "Why?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == prompt


@pytest.mark.parametrize("grid", [1, 2])
def test_vlmzip_compresses_it(tmp_path, grid, capsys):
    model, processor = converted(tmp_path, grid=grid)
    with vlmzip.attach(model, VisionZip(keep=10)) as small:
        small.generate(**inputs_of(processor), max_new_tokens=2)
        assert [(p.before, p.after) for p in small.report.images] == [(TOKENS * (5 if grid == 2 else 1), 10)]
    Image.effect_noise((70, 50), 90).save(tmp_path / "a.png")
    assert main(["ask", str(tmp_path / "a.png"), "w5", "--model", str(tmp_path / "out"), "--keep", "10"]) == 0


def test_the_dtype_is_that_of_the_llm(tmp_path):
    own, *others = published.write(tmp_path)
    from safetensors.torch import load_file, save_file

    for file in own.glob("*.safetensors"):
        save_file({name: w.to(torch.bfloat16) for name, w in load_file(file).items()}, file, {"format": "pt"})
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    assert main(arguments((own, *others), tmp_path / "out")) == 0
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mm_projector_type": "linear"}, "has mm_projector_type='linear'; only 'mlp2x_gelu' can be converted"),
        ({"mm_vision_select_feature": "cls_patch"}, "only 'patch' can be converted"),
        ({"architectures": ["MGMMixtralForCausalLM"]}, "the architecture 'MGMMixtralForCausalLM'"),
        ({"architectures": None}, "the architecture ''"),
        ({"image_grid": 2}, "crops without a global view"),
        ({"text_config": {}}, "has been converted already"),
        ({"image_size_aux": 80}, "image_size_aux=80 gives 20 features per side"),
        ({"hidden_size": "wide"}, "cannot read the config of"),
        ({"architectures": [3]}, "the architecture '3'"),
        ({"image_size_aux": "768"}, "has image_size_aux='768' in its config.json; it must be an integer of 1 or more"),
        ({"image_size_aux": 0}, "has image_size_aux=0"),
        ({"image_grid": None}, "has image_grid=None"),
        ({"image_grid": 0}, "has image_grid=0"),
        (
            {"mm_vision_select_layer": 99},
            "has mm_vision_select_layer=99 in its config.json; it must be an integer from",
        ),
        ({"mm_vision_select_layer": [-2]}, "has mm_vision_select_layer=[-2]"),
        ({"num_hidden_layers": 2}, "weights that its config.json does not know: model.layers.2."),
    ],
)
def test_configs_that_cannot_be_converted(tmp_path, fields, message, capsys):
    assert main(arguments(published.write(tmp_path, fields=fields), tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def emptied(folder):
    for file in folder.iterdir():
        file.unlink()


def other_widths(folder):
    published.save_file({"stem.0.weight": torch.zeros(1)}, folder / "open_clip_model.safetensors")


def without_miner(own):
    for file in own.glob("*.safetensors"):
        content = published.load_file(file)
        kept = {name: w for name, w in content.items() if "vlm_uni_aux_projector" not in name}
        published.save_file(kept, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (0, emptied, "config.json"),
        (1, emptied, "cannot load"),
        (2, emptied, "has no weights: give a folder with .safetensors or .bin files"),
        (2, other_widths, "has no ConvNeXt of OpenCLIP or timm"),
        (0, without_miner, "lacks 4 weights, such as key_projector.0.bias"),
        (0, lambda own: (own / "config.json").write_text("{}"), "its config.json has no mm_vision_tower_aux"),
        (0, lambda own: (own / "config.json").write_text("[]"), "is not a JSON object"),
        (0, lambda own: next(own.glob("model-*.safetensors")).write_text("no"), "cannot read"),
    ],
)
def test_broken_parts_end_with_a_line(tmp_path, part, change, message, capsys):
    paths = published.write(tmp_path)
    change(paths[part])
    assert main(arguments(paths, tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("part", [0, 1, 2])
def test_folders_that_are_not_there(tmp_path, part, capsys):
    paths = list(published.write(tmp_path))
    paths[part] = tmp_path / "nowhere"
    assert main(arguments(paths, tmp_path / "out")) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_an_encoder_of_another_width(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(published, "WIDTHS", (8, 12, 16, 24))
    paths = published.write(tmp_path)
    monkeypatch.undo()
    other = tmp_path / "other"
    other.mkdir()
    published.save_file(published.trunk(), other / "model.safetensors")
    assert main(arguments((*paths[:2], other), tmp_path / "out")) == 2
    assert "give the encoders that the checkpoint was trained with" in capsys.readouterr().err


def test_what_cannot_be_written_leaves_nothing(tmp_path, capsys, monkeypatch):
    def fail(self, folder, **_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MiniGeminiProcessor, "save_pretrained", fail)
    (tmp_path / "results").mkdir()
    assert main(arguments(published.write(tmp_path), tmp_path / "results" / "out")) == 2
    error = capsys.readouterr().err
    assert "cannot write" in error
    assert "No space left" in error
    assert error.count("\n") == 1
    assert not list((tmp_path / "results").iterdir())


def test_nothing_is_overwritten(tmp_path, capsys):
    assert main(arguments(published.write(tmp_path), tmp_path / "MGM")) == 2
    assert "exists already; give a new folder" in capsys.readouterr().err
