"""The shipped weights, tokenizer and examples are those that the recipe makes, and mini answers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from recipes.mini.encoder import pixels_of, position_probe
from recipes.mini.evaluate import ModelAnswer, accuracy, share_right
from recipes.mini.examples import CHOSEN, image
from recipes.mini.tokenizer import make_tokenizer
from vlmzip.mini import load, weights_folder
from vlmzip.mini.assets import shipped_assets
from vlmzip.mini.drawing import draw
from vlmzip.mini.scene import make_scene
from vlmzip.mini.splits import VALIDATION, questions_of, test_split, validation_split

test_split.__test__ = False  # type: ignore[attr-defined]  # its name looks like a test's
FOLDER = weights_folder()
EXAMPLES_FOLDER = Path(__file__).parents[3] / "examples"
LEAST_RIGHT = 0.78  # of the first 150 validation questions; 0.827 was measured when the weights were shipped


@pytest.fixture(scope="module")
def mini():
    return load()


def test_processor_makes_the_pixels_that_training_made() -> None:
    processor = AutoProcessor.from_pretrained(FOLDER)
    array = draw(make_scene(0), shipped_assets("validation"))
    mine = pixels_of([array], torch.device("cpu"))
    theirs = processor.image_processor(Image.fromarray(array), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(mine, theirs)


def test_the_shipped_tokenizer_is_the_one_the_code_makes() -> None:
    shipped = AutoProcessor.from_pretrained(FOLDER).tokenizer.backend_tokenizer
    made = make_tokenizer().backend_tokenizer
    assert shipped.get_vocab() == made.get_vocab()
    for text in ("What COLOUR is the T-shirt?", "read 347.", "USER: <image>\nwhere is it ? ASSISTANT:", "zebra"):
        assert shipped.encode(text).ids == made.encode(text).ids


def test_every_word_is_known() -> None:
    tokenizer = make_tokenizer()
    assert len(tokenizer) <= 100
    for sample in test_split() + validation_split():
        for text in (sample.question, sample.answer):
            assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"], text


@pytest.mark.slow
def test_mini_answers(mini) -> None:
    records = accuracy(ModelAnswer(*mini), validation_split(150))
    assert share_right(records) > LEAST_RIGHT


def test_a_batch_answers_as_its_rows_alone(mini) -> None:
    answer = ModelAnswer(*mini)
    samples = validation_split(6)
    images, questions = [sample.image for sample in samples], [sample.question for sample in samples]
    alone = [answer([image], [question])[0] for image, question in zip(images, questions, strict=True)]
    assert answer(images, questions) == alone


def test_features_tell_where_a_patch_is(mini) -> None:
    arrays = [draw(make_scene(seed), shipped_assets("validation")) for seed in VALIDATION[:12]]
    assert min(position_probe(mini[0], pixels_of(arrays, torch.device("cpu")))) > 0.9


@pytest.mark.parametrize("name", CHOSEN)
def test_examples_are_what_the_generator_draws_and_mini_answers_most(mini, name: str) -> None:
    shown = Image.open(EXAMPLES_FOLDER / f"{name}.png")
    assert shown.tobytes() == image(CHOSEN[name]).tobytes()
    asked = questions_of(make_scene(CHOSEN[name]), most=9)
    given = ModelAnswer(*mini)([shown] * len(asked), [question.text for question in asked])
    assert np.mean([text == question.answer for text, question in zip(given, asked, strict=True)]) > 0.7
