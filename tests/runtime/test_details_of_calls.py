"""Settings that meet each other in a call: positions and policies, limits and padding, losses and counts."""

import copy

import pytest
import torch

import vlmzip
from tests.runtime.ragged import Ragged
from tests.tiny import PAD, wrong_copies
from vlmzip import FastV, LLaVolta, VisionZip

ROWS = ([1, "image", 5, 6, 7], [1, "image", 4, "image", 5], [1, 2, 3, 4])
GREEDY = {"max_new_tokens": 4, "do_sample": False}


@pytest.mark.parametrize("positions", ["contiguous", "original"])
def test_positions_of_your_own_are_kept_whatever_the_policy(family, positions):
    inputs = family.batch(ROWS[0])
    own = (7 + 2 * torch.arange(inputs["input_ids"].shape[1])).expand(*family.position_axes, 1, -1)
    compressed = vlmzip.compress_inputs(
        family.model, inputs | {"position_ids": own}, VisionZip(keep=8, positions=positions)
    )
    assert torch.equal(compressed["position_ids"], own[..., compressed.report.source[0]])


def test_pad_tokens_that_also_end_are_not_taken_for_padding(family):
    """As `generate` infers a mask: only where pad and end differ."""
    model = copy.deepcopy(family.model)
    compressed = vlmzip.attach(model, VisionZip(keep=8))
    inputs = family.batch([1, PAD, "image", 5])
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    model.generation_config.eos_token_id = [2, PAD]
    model.generation_config.pad_token_id = PAD
    whole = compressed.generate(**inputs, **GREEDY)
    del inputs["attention_mask"]
    assert torch.equal(compressed.generate(**inputs, **GREEDY), whole)


@wrong_copies
def test_rows_that_end_early_are_filled_with_the_pad_token_also_where_rows_run_one_by_one(family):
    compressed = vlmzip.attach(family.model, Ragged())
    inputs, how = family.batch(*ROWS), {"max_new_tokens": 4, "do_sample": True, "top_k": 1, "num_return_sequences": 2}
    free = compressed.generate(**inputs, **how)[:, inputs["input_ids"].shape[1] :]
    end = free[0, 1].item()
    out = compressed.generate(**inputs, **how, eos_token_id=end, pad_token_id=PAD)
    new = out[:, inputs["input_ids"].shape[1] :].tolist()
    assert new[0] == [free[0, 0].item(), end, PAD, PAD]
    assert any(end not in row for row in new)


@pytest.mark.parametrize("compressor", [VisionZip(keep=8), FastV(keep=8, layer=2), LLaVolta(stride=4, layer=2)])
def test_the_loss_is_divided_by_the_number_given_as_under_gradient_accumulation(family, compressor):
    inputs = family.batch(ROWS[0])
    labels = torch.where(inputs["input_ids"] < 96, inputs["input_ids"], -100)
    labels[:, 0] = -100
    count = int((labels != -100).sum())
    compressed = vlmzip.attach(family.model, compressor)
    with torch.no_grad():
        mean = compressed(**inputs, labels=labels).loss
        shared = compressed(**inputs, labels=labels, num_items_in_batch=torch.tensor(10 * count)).loss
    torch.testing.assert_close(shared, mean / 10)


def test_no_graph_is_held_by_the_report_or_by_generate(family):
    compressed = vlmzip.attach(family.model, VisionZip(keep=8))
    inputs = family.batch(ROWS[0])
    compressed(**inputs)
    assert all(not image.features.requires_grad for image in compressed.report.images)
    seen = []
    tower = next(m for n, m in family.model.named_modules() if n.endswith(("vision_tower", "image_tower", "visual")))
    handle = tower.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    compressed.generate(**inputs, **GREEDY)
    handle.remove()
    assert seen == [False]
