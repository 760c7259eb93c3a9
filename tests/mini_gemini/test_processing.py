"""Mini-Gemini's processor makes the pixels that the authors' code makes, and as many placeholders as tokens."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from tests.references import mini_gemini as reference
from tests.tiny import IMAGE_TOKEN, tiny_tokenizer
from vlmzip.mini_gemini import MiniGeminiImageProcessor, MiniGeminiProcessor

PUBLISHED = {1: (768, 336), 2: (1536, 336)}


def image(width, height):
    rng = np.random.default_rng(width)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def image_processor(aux, view, grid):
    size = {"height": aux, "width": aux}
    return MiniGeminiImageProcessor(size={"shortest_edge": aux}, crop_size=size, view_size=view, image_grid=grid)


@pytest.mark.parametrize("size", [(61, 40), (40, 61), (50, 50)])
@pytest.mark.parametrize("grid", [1, 2])
def test_pixels_are_those_of_the_reference(size, grid):
    out = image_processor(96 * grid, 42, grid)([image(*size)], return_tensors="pt")
    aux = reference.aux_pixels(image(*size), 96 * grid)
    np.testing.assert_allclose(out["pixel_values_aux"][0].numpy(), aux, atol=1e-5)
    views = np.stack(reference.clip_pixels(aux, 42, grid))
    np.testing.assert_allclose(out["pixel_values"][0].reshape(views.shape).numpy(), views, atol=5e-5)  # in float32


def test_the_second_resize_is_not_antialiased():
    """Where 336 pixels are made of 768, each is a mix of 2 x 2 of them, not of all below it."""
    out = image_processor(768, 336, 1)([image(768, 768)], return_tensors="pt")
    smooth = torch.nn.functional.interpolate(out["pixel_values_aux"], (336, 336), mode="bilinear", antialias=True)
    assert (out["pixel_values"] - smooth).abs().mean() > 0.1


@pytest.mark.parametrize(("grid", "tokens"), [(1, 576), (2, 2880)])
def test_the_counts_of_the_paper(grid, tokens):
    aux, view = PUBLISHED[grid]
    processor = MiniGeminiProcessor(image_processor(aux, view, grid), tiny_tokenizer(), patch_size=14)
    out = processor(images=[image(30, 20)], text="w5 <image> w6", return_tensors="pt")
    assert int((out["input_ids"] == IMAGE_TOKEN).sum()) == tokens
    assert out["pixel_values_aux"].shape[-2:] == (aux, aux)
    assert out["pixel_values"].shape == ((1, 3, 336, 336) if grid == 1 else (1, 5, 3, 336, 336))
    assert processor._get_num_multimodal_tokens([(20, 30)])["num_image_tokens"] == [tokens]


def test_defaults_are_those_of_the_published_checkpoints():
    processor = MiniGeminiImageProcessor()
    assert (processor.size["shortest_edge"], processor.view_size, processor.image_grid) == (768, 336, 1)


def test_the_processor_is_saved_and_loaded(tmp_path):
    processor = MiniGeminiProcessor(image_processor(96, 48, 2), tiny_tokenizer(), patch_size=8)
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, MiniGeminiProcessor)
    inputs = [each(images=[image(30, 20)], text="w5 <image>", return_tensors="pt") for each in (processor, loaded)]
    assert all(torch.equal(inputs[0][name], inputs[1][name]) for name in inputs[0])
