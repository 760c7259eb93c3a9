"""Several turns on one KV cache: what processors and people hand over, beyond the promises' plain cases."""

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, StoppingCriteria

import vlmzip
from tests.runtime.ragged import Ragged
from tests.runtime.test_promises import GREEDY, interleaved, types, without_padding
from tests.tiny import PAD
from vlmzip import NoCompression, UserError


@pytest.fixture(scope="module", params=["ragged", "none"])
def compressed(family, request):
    return vlmzip.attach(family.model, Ragged() if request.param == "ragged" else NoCompression())


def first_turn(family, compressed):
    first = family.batch([1, "image", 5, 6], [1, 3, "image", 7, 5, 6])
    cache = DynamicCache()
    ids = compressed.generate(**first, **GREEDY, past_key_values=cache)
    mask = torch.cat([first["attention_mask"], torch.ones(2, 6, dtype=torch.long)], 1)
    return first, cache, ids, mask


@pytest.mark.parametrize("given", ["whole", "new"])
def test_one_row_gets_a_new_image_and_all_images_are_given(family, compressed, given):
    first, cache, ids, mask = first_turn(family, compressed)
    new = family.batch([4, "image", 6], [8, 9, 7], first_image=2)
    whole, mask = torch.cat([ids, new["input_ids"]], 1), torch.cat([mask, new["attention_mask"]], 1)
    every = {name: torch.cat([family.images(n, 1)[name] for n in (0, 2, 1)]) for name in family.images(0, 1)}
    fresh = compressed.generate(input_ids=whole, attention_mask=mask, **every, **types(family, whole, first), **GREEDY)
    asked = whole if given == "whole" else new["input_ids"]
    out = compressed.generate(input_ids=asked, attention_mask=mask, **every, **GREEDY, past_key_values=cache)
    assert torch.equal(out[:, asked.shape[1] :], fresh[:, whole.shape[1] :])


def test_a_new_part_longer_than_all_before_it(family, compressed):
    """A turn of text, then an image, as the processor gives it: its own mask, and the same first token."""
    text = family.batch([1, 5, 6, 7])
    cache = DynamicCache()
    ids = compressed.generate(**text, **GREEDY, past_key_values=cache)
    new = family.batch([1, 3, "image", 7, 5, 6])
    assert new["input_ids"].shape[1] > ids.shape[1]
    out = compressed.generate(**new, **GREEDY, past_key_values=cache)
    whole = torch.cat([ids, new["input_ids"]], 1)
    seen = {"input_ids": whole, "attention_mask": torch.ones_like(whole), **family.images(0, 1)}
    fresh = compressed.generate(**seen, **types(family, whole, text), **GREEDY)
    assert torch.equal(out[:, new["input_ids"].shape[1] :], fresh[:, whole.shape[1] :])


class AfterThree(StoppingCriteria):
    """Ends the first row after three tokens, whatever they are."""

    def __init__(self, width):
        self.width = width

    def __call__(self, input_ids, scores, **_):
        done = torch.zeros(len(input_ids), dtype=torch.bool)
        done[0] = input_ids.shape[1] >= self.width + 3
        return done


@pytest.mark.parametrize("ends", [[95], [95, PAD]], ids=["", "pad ends too"])
def test_answers_that_a_criterion_ended(family, ends):
    """Row 0 continues behind its three tokens, without the filler that `generate` put behind them."""
    compressed = vlmzip.attach(family.model, NoCompression())  # the criterion sees the prompt that it was made for
    first = family.batch([1, "image", 5, 6], [1, 3, "image", 7, 5, 6])
    width, cache = first["input_ids"].shape[1], DynamicCache()
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD, "eos_token_id": ends}
    ids = compressed.generate(**first, **how, stopping_criteria=[AfterThree(width)], past_key_values=cache)
    assert ids[0, width:].tolist()[3:] == [PAD] * 3
    new = torch.tensor([[8, 9]] * 2)
    out = compressed.generate(input_ids=new, **GREEDY, past_key_values=cache)
    kept = 4 if PAD in ends else 3  # where pad is an end, the first one counts as what ended the answer
    one = family.batch([1, "image", 5, 6])
    conversation = torch.tensor([one["input_ids"][0].tolist() + ids[0, width : width + kept].tolist() + [8, 9]])
    fresh = {"input_ids": conversation, **family.images(0, 1), **types(family, conversation, one)}
    expected = compressed.generate(**fresh, attention_mask=torch.ones_like(conversation), **GREEDY)
    assert without_padding(out[0, 2:].tolist()) == without_padding(expected[0, conversation.shape[1] :].tolist())


def test_without_a_pad_token_rows_are_filled_with_the_end(family, monkeypatch):
    """What transformers writes then; it is no part of the conversation."""
    compressed = vlmzip.attach(family.model, NoCompression())
    first = family.batch([1, "image", 5, 6], [1, 3, "image", 7, 5, 6])
    width, turn = first["input_ids"].shape[1], torch.tensor([[8, 9]] * 2)
    end = int(compressed.generate(**first, **GREEDY)[0, width + 1])
    answers = []
    for pad in (None, end):
        monkeypatch.setattr(family.model.generation_config, "pad_token_id", pad)
        monkeypatch.setattr(family.model.config.get_text_config(), "pad_token_id", pad)
        cache = DynamicCache()
        said = compressed.generate(**first, **GREEDY, eos_token_id=end, past_key_values=cache)
        assert said[0, width + 1 :].tolist() == [end] * (said.shape[1] - width - 1)
        answers.append(compressed.generate(input_ids=turn, **GREEDY, pad_token_id=PAD, past_key_values=cache))
    assert torch.equal(*answers)


class AlwaysPad(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([PAD]), 0.0)


def test_pads_that_the_model_itself_wrote_are_part_of_the_answer(family, compressed):
    first, cache = family.batch([1, "image", 5, 6]), DynamicCache()
    ids = compressed.generate(**first, **GREEDY, eos_token_id=2, logits_processor=[AlwaysPad()], past_key_values=cache)
    new = torch.tensor([[8, 9]])
    out = compressed.generate(input_ids=new, **GREEDY, past_key_values=cache)
    whole = torch.cat([ids, new], 1)
    fresh = {"input_ids": whole, "attention_mask": torch.ones_like(whole), **family.images(0, 1)}
    expected = compressed.generate(**fresh, **types(family, whole, first), **GREEDY)
    assert torch.equal(out[:, 2:], expected[:, whole.shape[1] :])


def test_embeddings_do_not_continue_a_cache(family, compressed):
    _, cache, _, _ = first_turn(family, compressed)
    embeddings = family.model.get_input_embeddings()(torch.tensor([[8, 9]] * 2))
    for call in (compressed, compressed.generate):
        with pytest.raises(UserError, match="give input_ids to continue a filled KV cache"):
            call(inputs_embeds=embeddings, past_key_values=cache)


def test_a_cache_from_a_tuple(family, compressed):
    first = family.batch([1, "image", 5, 6], [1, 3, "image", 7, 5, 6])
    with torch.no_grad():
        out = compressed(**first, use_cache=True, return_dict=False)
        cache = next(value for value in out if isinstance(value, DynamicCache))
        on = compressed(input_ids=torch.tensor([[8], [9]]), past_key_values=cache).logits
        again = compressed(**first, use_cache=True)
        expected = compressed(input_ids=torch.tensor([[8], [9]]), past_key_values=again.past_key_values).logits
    torch.testing.assert_close(on, expected)


@pytest.mark.parametrize("given", ["whole", "new"])
def test_labels_on_a_cache(family, compressed, given):
    """The loss of a later turn is taken on its labels alone."""
    _, cache, ids, mask = first_turn(family, compressed)
    new = torch.tensor([[8, 9, 4]] * 2)
    labels = torch.tensor([[-100, 9, 4], [-100, -100, 4]])
    whole, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
    given_labels = labels if given == "new" else torch.cat([torch.full_like(ids, -100), labels], 1)
    asked = {"input_ids": new if given == "new" else whole, "attention_mask": mask, "labels": given_labels}
    with torch.no_grad():
        out = compressed(**asked, past_key_values=cache)
    logits = out.logits[:, -3:]
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)


@pytest.mark.parametrize("by", [1, 2, 5])
def test_a_cropped_cache_is_noticed(family, compressed, by):
    _, cache, _, _ = first_turn(family, compressed)
    cache.crop(-by)
    with pytest.raises(UserError, match="this KV cache has changed"):
        compressed.generate(input_ids=torch.tensor([[8, 9]] * 2), **GREEDY, past_key_values=cache)


def test_a_loop_over_new_tokens_keeps_the_report_of_its_images(family, compressed):
    first = family.batch([1, "image", 5, 6])
    with torch.no_grad():
        out = compressed(**first, use_cache=True)
        compressed(input_ids=torch.tensor([[8]]), past_key_values=out.past_key_values)
        assert len(compressed.report.images) == 1
        compressed(input_ids=torch.tensor([[8, 9]]))
    assert compressed.report.images == []


def test_the_order_of_images_is_by_row(family):
    """What `interleaved` says above: the promises rely on it."""
    one = interleaved(family, 4)
    assert torch.equal(one["pixel_values"][: len(family.images(0, 1)["pixel_values"])],
                       family.images(0, 1)["pixel_values"])  # fmt: skip
