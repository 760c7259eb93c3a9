"""`switch`: the same façade continues with another compressor, as training in stages does."""

import pytest
import torch
from transformers import DynamicCache

from tests.families import tiny_llava
from tests.tiny import batch, prompt
from vlmzip import FastV, LLaVolta, NoCompression, Pool2d, QFormer, VisionZip, attach
from vlmzip.compressor_file import write_compressor
from vlmzip.errors import UserError

STAGES = (LLaVolta(layer=1, stride=4), Pool2d(factor=2), NoCompression(), FastV(layer=2, keep=9), VisionZip(keep=9))


@pytest.fixture
def inputs():
    return batch(prompt(7, "image", 5, 6), prompt(7, 8, "image", 9), images=2)


def hooks_on(model):
    return sum(len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.filterwarnings("ignore:.*changes nothing")
def test_after_a_switch_it_is_as_if_attached_anew(inputs):
    model = tiny_llava()
    compressed = attach(model, NoCompression())
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] < 5, -100)
    for compressor in (*STAGES, *STAGES[::-1]):
        compressed.switch(compressor)
        here = compressed(**inputs, labels=labels)
        with attach(tiny_llava(), compressor) as fresh:
            there = fresh(**inputs, labels=labels)
        torch.testing.assert_close(here.loss, there.loss, atol=1e-6, rtol=0)
        torch.testing.assert_close(here.logits, there.logits, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:.*changes nothing")
def test_hooks_are_there_only_while_something_acts_inside_the_llm(inputs):
    model = tiny_llava()
    compressed = attach(model, STAGES[0])
    inside = hooks_on(model)
    for compressor in (*STAGES, *STAGES):
        compressed.switch(compressor)
        assert hooks_on(model) == (inside if compressor.layers else 0)
    compressed.switch(STAGES[0])
    compressed.detach()
    assert hooks_on(model) == 0


def test_caches_of_the_compressor_before_are_not_continued(inputs):
    compressed = attach(tiny_llava(), Pool2d(factor=2))
    cache = DynamicCache()
    compressed(**inputs, past_key_values=cache)
    compressed.switch(Pool2d(factor=3))
    with pytest.raises(UserError, match="another model or compressor filled it"):
        compressed(input_ids=torch.tensor([[5], [6]]), past_key_values=cache)


def test_a_spec_or_a_path_can_replace_the_compressor(inputs, tmp_path):
    write_compressor(VisionZip(keep=5), tmp_path)
    compressed = attach(tiny_llava(), NoCompression())
    for compressor, after in (("pool2d(factor=2)", 9), (tmp_path, 5), (str(tmp_path / "compressor.json"), 5)):
        compressed.switch(compressor)
        compressed(**inputs)
        assert [image.after for image in compressed.report.images] == [after] * 2
    assert compressed.compressor == VisionZip(keep=5)


def test_what_has_no_place_is_refused_and_nothing_changes(inputs):
    model = tiny_llava()
    compressed = attach(model, Pool2d(factor=2))
    before = compressed(**inputs).logits
    untrained = "cannot add, remove or replace a method with weights"
    for wrong, message in ((FastV(layer=40), "got 40"), (3, "must be a compressor"), (QFormer(), untrained)):
        with pytest.raises(UserError, match=message):
            compressed.switch(wrong)
    assert compressed.compressor == Pool2d(factor=2)
    assert hooks_on(model) == 0
    torch.testing.assert_close(compressed(**inputs).logits, before)
