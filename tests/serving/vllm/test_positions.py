"""Positions of visual tokens in columns behind their features, and in chunks of a prompt."""

import pytest
import torch

from vlmzip.serving.vllm.positions import BASE, DIGITS, split_positions, updated_positions, with_positions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_positions_of_any_size_are_exact_in_any_dtype(dtype):
    largest = BASE**DIGITS - 1
    positions = torch.tensor([[0, 255, 256, 257], [1000, 6399, 12801, 65_537], [1, 2, largest - 1, largest]])
    features = torch.randn(4, 5).to(dtype)
    rows = with_positions(features, positions)
    assert rows.dtype == dtype
    alone, exact = split_positions(rows)
    assert torch.equal(alone, features)
    assert torch.equal(exact, positions)


#: Text, an image of 3 tokens that began as 4 x 4, text, a video of 2 tokens, text.
PROMPT = [5, 6, 99, 99, 99, 7, 98, 98, 8]
TEXT = [0, 1, 2, 2, 2, 6, 7, 7, 20]
OF_IMAGE = torch.tensor([[0, 0, 0], [0, 2, 3], [1, 3, 0]])
OF_VIDEO = torch.tensor([[0, 12], [1, 1], [0, 1]])
EXPECTED = torch.tensor([
    [0, 1, 2, 2, 2, 6, 7, 19, 20],
    [0, 1, 2, 4, 5, 6, 8, 8, 20],
    [0, 1, 3, 5, 2, 6, 7, 8, 20],
])  # fmt: skip


def rows_of(positions):
    return with_positions(torch.zeros(positions.shape[1], 4), positions)


def updated(rows, positions, computed):
    features, after, delta = updated_positions(PROMPT, [99, 98], rows, positions, computed)
    assert all(part.shape[1] == 4 for part in features)
    assert delta == 21 - len(PROMPT)
    return after


def test_a_whole_prompt_gets_its_positions():
    before = torch.tensor(TEXT).expand(3, -1)
    after = updated([rows_of(OF_IMAGE), rows_of(OF_VIDEO)], before, 0)
    assert torch.equal(after, EXPECTED)
    # A prompt that starts again, because vLLM took its memory for others, gets the same.
    assert torch.equal(updated([rows_of(OF_IMAGE), rows_of(OF_VIDEO)], after, 0), EXPECTED)


@pytest.mark.parametrize("chunk", range(1, len(PROMPT)))
def test_chunks_give_the_same_positions(chunk):
    positions = torch.tensor(TEXT).expand(3, -1)
    for start in range(0, len(PROMPT), chunk):
        parts = []
        for of_item, first in ((OF_IMAGE, 2), (OF_VIDEO, 6)):
            low, high = (min(max(end - first, 0), of_item.shape[1]) for end in (start, start + chunk))
            parts += [rows_of(of_item)[low:high]] if high > low else []
        positions = updated(parts, positions, start)
        assert torch.equal(positions[:, start : start + chunk], EXPECTED[:, start : start + chunk])
    assert torch.equal(positions, EXPECTED)


def test_a_prompt_whose_beginning_is_in_the_cache_gets_the_positions_of_the_rest():
    after = updated([rows_of(OF_IMAGE)[1:], rows_of(OF_VIDEO)], torch.tensor(TEXT).expand(3, -1), 3)
    assert torch.equal(after[:, 3:], EXPECTED[:, 3:])


def test_a_prompt_may_start_with_an_image():
    _, after, _ = updated_positions([99, 99, 99, 7], [99], [rows_of(OF_IMAGE)], torch.tensor([[0, 0, 0, 4]] * 3), 0)
    assert torch.equal(after[:, :3], OF_IMAGE)
