"""Rows that were prepared one by one make the batch that the processor makes of all of them."""

import pytest
import torch
from PIL import Image

from vlmzip.methods import VisionZip
from vlmzip.serving.server.engine import Sampling
from vlmzip.serving.server.prepare import Request, joined

#: The images of each prompt by their sizes; rows of the same kind may be joined.
PROMPTS = [[(40, 40)], [(40, 40)], [(80, 40)], [(40, 40), (40, 80)], [(80, 40)]]


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # PaliGemma's processor and NumPy's newest
def test_rows_of_a_kind_join(family):
    processor = type(family).processor()
    processor.tokenizer.padding_side = "left"
    images = [[Image.effect_noise(size, 90).convert("RGB") for size in sizes] for sizes in PROMPTS]
    word = f" {processor.tokenizer.convert_ids_to_tokens(5)}"
    texts = [processor.image_token * len(each) + word * (n + 1) for n, each in enumerate(images)]

    def inputs_of(numbers):
        several = [images[n] for n in numbers] if any(images[n] for n in numbers) else None
        if several and all(len(row) == 1 for row in several):
            several = [row[0] for row in several]
        return dict(processor(images=several, text=[texts[n] for n in numbers], padding=True, return_tensors="pt"))

    kinds = {}
    for number in range(len(PROMPTS)):
        request = Request(inputs_of([number]), VisionZip(), None, Sampling(1))
        kinds.setdefault(request.kind, []).append((number, request.inputs))
    assert len(kinds) < len(PROMPTS)
    for rows in kinds.values():
        numbers, inputs = zip(*rows, strict=True)
        batch, expected = joined(inputs, processor.tokenizer.pad_token_id), inputs_of(numbers)
        assert batch.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                batch[name], value, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_other_values_are_joined_only_with_themselves():
    def kind(**inputs):
        return Request({"input_ids": torch.ones(1, 3), **inputs}, VisionZip(), None, Sampling(1)).kind

    assert kind(pixels=torch.ones(1, 2, 3)) == kind(pixels=torch.zeros(4, 2, 3))
    assert kind(pixels=torch.ones(1, 2, 3)) != kind(pixels=torch.ones(1, 2, 4))
    assert kind(pixels=torch.ones(1, 2)) != kind(pixels=torch.ones(1, 2).int())
    assert kind(pixels=torch.ones(1, 2)) != kind()
    assert kind(sizes=[[1, 2]]) == kind(sizes=[[3, 4], [5, 6]])
    assert kind(other=object()) != kind(other=object())
