"""The shipped folder is small, safe to load and complete."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlmzip.mini import load, weights_folder

FOLDER = weights_folder()
HARMLESS = {".json", ".jinja", ".safetensors", ".md"}


def test_folder_is_small_and_holds_nothing_that_runs() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 20_000_000
    assert {path.suffix for path in files} <= HARMLESS
    assert not any(path.stat().st_mode & 0o111 for path in files)
    assert "auto_map" not in "".join(path.read_text() for path in files if path.suffix == ".json")


def test_weights_are_16_bit_under_the_names_that_servers_expect() -> None:
    with safe_open(FOLDER / "model.safetensors", "pt") as weights:
        names = list(weights.keys())
        assert {weights.get_tensor(name).dtype for name in names} == {torch.float16}
    assert any(name.startswith("vision_tower.vision_model.") for name in names)
    assert not any("vision_tower." in name and "vision_tower.vision_model." not in name for name in names)


def test_everything_loads_and_nothing_is_left_over() -> None:
    model, about = AutoModelForImageTextToText.from_pretrained(FOLDER, output_loading_info=True)
    assert not any(about[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.float32
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert (model.config.vision_feature_layer, model.config.vision_feature_select_strategy) == (-2, "default")


def test_load_takes_a_dtype() -> None:
    model, _ = load(torch.bfloat16)
    assert model.dtype == torch.bfloat16


def test_importing_mini_is_cheap() -> None:
    code = "import sys, vlmzip.mini; assert not {'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("size", [(96, 96), (7, 300), (640, 480)])
def test_processor_takes_any_image(mode: str, size: tuple[int, int]) -> None:
    processor = AutoProcessor.from_pretrained(FOLDER)
    inputs = processor(
        images=Image.new(mode, size), text="USER: <image>\nwhere is it ? ASSISTANT:", return_tensors="pt"
    )
    assert inputs["pixel_values"].shape == (1, 3, 96, 96)
    assert (inputs["input_ids"] == 4).sum() == 144


def test_chat_template_spells_a_conversation() -> None:
    processor = AutoProcessor.from_pretrained(FOLDER)
    image_part, question = {"type": "image"}, {"type": "text", "text": "What item is there?"}
    asked = {"role": "user", "content": [image_part, question]}
    assert processor.apply_chat_template([asked], add_generation_prompt=True) == (
        "USER: <image>\nWhat item is there? ASSISTANT:"
    )
    told = {"role": "assistant", "content": [{"type": "text", "text": "bag"}]}
    again = {"role": "user", "content": "Where is the bag?"}
    assert processor.apply_chat_template([asked, told, again], add_generation_prompt=True) == (
        "USER: <image>\nWhat item is there? ASSISTANT: bag</s>USER: Where is the bag? ASSISTANT:"
    )
    two = processor.apply_chat_template([{"role": "user", "content": [image_part, image_part, question]}])
    assert two.count("<image>") == 2


def test_templated_and_written_prompts_give_the_same_tokens() -> None:
    processor = AutoProcessor.from_pretrained(FOLDER)
    image = Image.new("RGB", (96, 96))
    content = [{"type": "image", "image": image}, {"type": "text", "text": "What item is there?"}]
    templated = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    written = processor(images=image, text="USER: <image>\nwhat item is there ? ASSISTANT:", return_tensors="pt")
    assert templated["input_ids"].tolist() == written["input_ids"].tolist()


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("What colour is the T-shirt?", "what color is the tshirt ?"),
        ("HOW MANY red   shapes are there?", "how many red shapes are there ?"),
        ("read the number.", "read the number ."),
    ],
)
def test_questions_may_be_typed_naturally(typed: str, meant: str) -> None:
    tokenizer = AutoProcessor.from_pretrained(FOLDER).tokenizer
    assert tokenizer(typed)["input_ids"] == tokenizer(meant)["input_ids"]
    assert tokenizer.unk_token_id not in tokenizer(typed)["input_ids"]


def test_numbers_come_back_in_one_piece_and_unknown_words_as_unknown() -> None:
    tokenizer = AutoProcessor.from_pretrained(FOLDER).tokenizer
    assert tokenizer.decode(tokenizer("347")["input_ids"]) == "347"
    assert tokenizer.convert_ids_to_tokens(tokenizer("zebra")["input_ids"]) == ["<unk>"]
    assert tokenizer.padding_side == "left"


def test_config_says_how_many_visual_tokens() -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["image_seq_length"] == 144
    assert config["dtype"] == config["text_config"]["dtype"] == config["vision_config"]["dtype"] == "float32"
