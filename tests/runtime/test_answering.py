"""Prompts of any form answered together, and what each of them cost."""

import json
import shutil

import pytest
from PIL import Image
from tokenizers.processors import TemplateProcessing

import vlmzip
from tests.families import FAMILIES, tiny_llava
from vlmzip.errors import UserError
from vlmzip.lab.asking import build_inputs
from vlmzip.methods import FastV, VisionZip
from vlmzip.models import family_of
from vlmzip.runtime.answering import Answerer
from vlmzip.runtime.loading import Loaded, load
from vlmzip.runtime.prompt_text import chat_prompt, conversation_prompt


@pytest.fixture(scope="module")
def mini():
    return vlmzip.mini.load()


def test_several_images_and_none_are_counted(mini):
    model, processor = mini
    answerer = Answerer(family_of(model), processor)
    image = Image.open("examples/flat.png").convert("RGB")
    two = "USER: <image>\n<image>\nwhat color is the ring ? ASSISTANT:"
    with vlmzip.attach(model, VisionZip(keep=36)) as compressed:
        (pair,) = answerer.answer_prompts(compressed, [two], [[image, image]], max_new_tokens=6, do_sample=False)
        (none,) = answerer.answer_prompts(
            compressed, ["USER: what ? ASSISTANT:"], [[]], max_new_tokens=3, do_sample=False
        )
        one, other = answerer.answer(compressed, [image] * 2, ["what color is the ring ?", "is there a star ?"], 6)
    assert (pair.visual_tokens, pair.by_layer[0], pair.retention) == (288, 72, 0.25)
    assert (none.visual_tokens, none.by_layer, none.retention) == (0, (), 1.0)
    assert (one.text, one.new_tokens) == ("orange", 2)  # the word, and the end
    assert (other.visual_tokens, other.by_layer[0]) == (144, 36)


class NoTemplate:
    chat_template = None


def text(said):
    return {"type": "text", "text": said}


IMAGE = {"type": "image"}


def test_without_a_template_one_question_with_images_before_it_can_be_asked(mini):
    model_family = family_of(mini[0])
    one = [{"role": "user", "content": [IMAGE, IMAGE, text("a"), text("b")]}]
    assert conversation_prompt(model_family, NoTemplate(), one) == "USER: <image><image>\na\nb ASSISTANT:"
    assert chat_prompt(model_family, NoTemplate(), "a", 1) == "USER: <image>\na ASSISTANT:"


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": [text("a"), IMAGE]}],
        [{"role": "user", "content": [text("a")]}, {"role": "assistant", "content": [text("b")]}],
        [{"role": "system", "content": [text("a")]}],
    ],
)
def test_without_a_template_other_forms_are_refused(mini, messages):
    with pytest.raises(UserError, match="no chat template"):
        conversation_prompt(family_of(mini[0]), NoTemplate(), messages)


@pytest.mark.parametrize("template", ["USER: <image>\n{{ messages[0]['content'][-1]['text'] }}", "<s>USER: <image> ?"])
def test_a_prompt_begins_once(template, tmp_path):
    """Whether the template writes the first token, as Llama-3's does, or the tokenizer adds it."""
    processor = FAMILIES["llava"].processor()
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    processor.chat_template = template
    model = tiny_llava()
    image = Image.new("RGB", (24, 24))
    asked = Answerer(family_of(model), processor).inputs([image], ["w9"])
    image.save(path := tmp_path / "0.png")
    typed = build_inputs(Loaded("tiny", model, processor, family_of(model)), [str(path)], "w9")
    for inputs in (asked, typed):
        assert inputs["input_ids"][0].tolist().count(processor.tokenizer.bos_token_id) == 1
        assert inputs["input_ids"][0, 0] == processor.tokenizer.bos_token_id


def test_without_a_pad_token_answers_of_a_batch_are_those_of_one_by_one(tmp_path):
    """Llama's and Mistral's tokenizers have none, and pad on the right."""
    folder = shutil.copytree(vlmzip.mini.weights_folder(), tmp_path / "model")
    for file, removed in (
        ("tokenizer_config.json", ("pad_token", "padding_side")),
        ("generation_config.json", ("pad_token_id",)),
    ):
        settings = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({name: value for name, value in settings.items() if name not in removed}))
    loaded = load(str(folder), "cpu")
    answerer = Answerer(loaded.family, loaded.processor)
    image = Image.open("examples/flat.png").convert("RGB")
    questions = ["is there a star ?", "what color is the ring ?", "how many things are there in the image ?"]
    for method in (VisionZip(keep=36), FastV(layer=2, keep=36)):
        with vlmzip.attach(loaded.model, method) as compressed:
            together = answerer.answer(compressed, [image] * 3, questions, 6)
            alone = [answerer.answer(compressed, [image], [question], 6)[0] for question in questions]
        assert [one.text for one in together] == [one.text for one in alone]
        assert len({one.text_tokens for one in together}) == 3
        assert together == alone
