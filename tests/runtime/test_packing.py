"""Rows side by side in training: the same loss, the same gradients, less padding."""

import pytest
import torch

import vlmzip
from tests.families import FAMILIES, tiny_llava
from tests.runtime.ragged import Ragged
from tests.tiny import IMAGE_TOKEN
from vlmzip import FastV, NoCompression, Pool2d, UserError
from vlmzip.methods import Chain
from vlmzip.runtime.inputs import compress_inputs
from vlmzip.runtime.packing import bins_of, cheapest

ROWS = (
    [9, "image", *range(10, 19)],
    [9, 10, 11],
    ["image", 12, "image", 13],
    [9, "image", 14, 15],
    [*range(9, 60)],
    [8, "image", 17],
)


def example(pad="right", family="llava"):
    inputs = FAMILIES[family]().batch(*ROWS, pad=pad)
    mask = inputs["attention_mask"]
    learned = (inputs["input_ids"] >= 9) & (inputs["input_ids"] != IMAGE_TOKEN) & (mask == 1)
    labels = inputs["input_ids"].masked_fill(~learned, -100)
    if pad == "left":  # padded on the right nothing foretells a row's first token; here padding would
        labels[torch.arange(len(ROWS)), mask.argmax(1)] = -100
    return {**inputs, "labels": labels}


def loss_and_gradients(compressed, inputs, **settings):
    compressed.zero_grad()
    out = compressed(**inputs, **settings)
    out.loss.backward()
    return out, {name: value.grad.clone() for name, value in compressed.named_parameters() if value.grad is not None}


@pytest.mark.crossed(attention=["sdpa"], compressor=[Ragged()])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("pad", ["right", "left"])
@pytest.mark.parametrize("compressor", [Ragged(), Pool2d(factor=2), NoCompression()])
def test_loss_and_gradients_are_those_of_padded_rows(family, attention, pad, compressor):
    if not family.packs_rows:
        pytest.skip("its rows are padded: see the test below")
    compressed = vlmzip.attach(family.build(attention), compressor).train()
    inputs = example(pad, family.name)
    out, gradients = loss_and_gradients(compressed, inputs)
    padding = (compressed.report.source < 0).float().mean()
    packed, same = loss_and_gradients(compressed, inputs, pack_rows=True)
    assert compressed.report.packed
    assert packed.logits.shape[0] < len(ROWS)
    assert (compressed.report.source < 0).float().mean() < padding
    torch.testing.assert_close(packed.loss, out.loss, rtol=1e-5, atol=1e-6)
    assert same.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(same[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_the_loss_sees_each_row_alone():
    """One row's loss does not change with what stands beside it."""
    compressed = vlmzip.attach(tiny_llava(), Ragged()).train()
    inputs = example()
    inputs["labels"][torch.arange(len(ROWS)) != 3] = -100
    before = compressed(**inputs, pack_rows=True).loss
    inputs["input_ids"][1, :3] = 40
    inputs["pixel_values"][[0, 1, 2, 4]] = 0
    torch.testing.assert_close(compressed(**inputs, pack_rows=True).loss, before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "compressor"),
    [
        ("qwen2_5_vl", Pool2d(factor=2, positions="contiguous")),  # positions on three axes
        ("qwen3_vl", Pool2d(factor=2, positions="contiguous")),  # these, too
        ("paligemma", Pool2d(factor=2)),  # token types
        ("llava", Pool2d(factor=2, positions="original")),  # gaps
        ("llava", FastV(layer=1, keep=4)),  # acts on rows inside the LLM
        ("llava", Chain(compressors=(Pool2d(factor=2), FastV(layer=1, keep=4)))),
    ],
)
def test_rows_that_cannot_be_packed_are_padded(family, compressor):
    made = FAMILIES[family]()
    inputs = made.batch([9, "image", *range(10, 60)], [9, "image", 10], [9, "image", 11], pad="right")
    compressed = vlmzip.attach(made.model, compressor)
    compressed(**inputs, pack_rows=True)
    assert len(compressed.report.images) == 3
    assert not compressed.report.packed


def test_under_flash_attention_rows_are_padded():
    """transformers finds packed rows there in a batch of one alone, and says nothing where it does not."""
    model = tiny_llava()
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    compressed = compress_inputs(model, example(), Ragged(), pack_rows=True)
    assert not compressed.report.packed


def test_in_an_llm_not_known_to_keep_rows_apart_they_are_padded():
    """gpt_oss makes its masks without positions; others carry a state from row to row."""
    model = tiny_llava()
    model.model.language_model.config.model_type = "gpt_oss"
    assert not compress_inputs(model, example(), Ragged(), pack_rows=True).report.packed


def test_predictions_of_packed_rows_cannot_be_lined_up():
    compressed = vlmzip.attach(tiny_llava(), Ragged())
    out = compressed(**example(), pack_rows=True)
    with pytest.raises(UserError, match="leave out pack_rows"):
        compressed.report.lined_up(out.logits, 80)


def test_bins_hold_no_more_than_their_width():
    assert bins_of([5, 2, 3, 1, 4], 5) == [[0], [4, 3], [2, 1]]
    assert bins_of([4, 4, 4], 4) == [[0], [1], [2]]
    assert bins_of([7, 1, 1, 1, 1, 1, 1, 1], 7) == [[0], [1, 2, 3, 4, 5, 6, 7]]


def test_longer_bins_are_taken_where_they_cost_less():
    assert cheapest([100, 80, 80, 80], 0) == [[0, 1], [2, 3]]  # 2 x 180 places instead of 4 x 100
    assert cheapest([100, 80, 80, 80], 1) == [[0], [1], [2], [3]]  # where pairs cost as much as tokens
    assert cheapest([50] * 4, 0.001) == [[0], [1], [2], [3]]  # nothing is padded
