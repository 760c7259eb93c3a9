"""What people do with a Hugging Face model, done with the façade, in every family.

Each test carries the row of `docs/support.md` that it proves; `make support` writes that table from runs of this file.
"""

import contextlib
import copy
import json
import logging
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from transformers import AutoModelForImageTextToText, DynamicCache
from transformers.generation.streamers import BaseStreamer

import vlmzip
from tests.runtime.ragged import Ragged
from tests.tiny import IMAGE_TOKEN, PAD, WRONG_COPIES, batch, wider, wrong_copies
from vlmzip import NoCompression, UserError, VisionZip
from vlmzip.models import family_of
from vlmzip.runtime.cache_names import NAMES

ROWS = ([1, "image", 5, 6, 7], [1, "image", 4, "image", 5], [1, 2, 3, 4], ["image", 8])
GREEDY = {"max_new_tokens": 6, "do_sample": False}
promise = pytest.mark.promise


@pytest.fixture(scope="module")
def compressed(family):
    return vlmzip.attach(family.model, Ragged())


def alone(family, row):
    """One of ROWS as a batch of its own."""
    first = sum(other.count("image") for other in ROWS[:row])
    return family.batch(ROWS[row], first_image=first)


def rows_equal_rows_alone(family, compressed, **how):
    """Generates for the ragged batch and for each row alone; the new tokens must agree. Returns them."""
    inputs = family.batch(*ROWS)
    width = inputs["input_ids"].shape[1]
    together = compressed.generate(**inputs, **how)
    copies = len(together) // len(ROWS)
    assert torch.equal(together[:, :width], inputs["input_ids"].repeat_interleave(copies, 0))
    for row in range(len(ROWS)):
        one = alone(family, row)
        single = compressed.generate(**one, **how)[:, one["input_ids"].shape[1] :]
        for n in range(copies):
            new = together[row * copies + n, width:].tolist()
            assert without_padding(new) == without_padding(single[n].tolist())
    return together[:, width:]


def without_padding(tokens):
    """Tokens up to the end of the sequence; what follows is filler, as long as the longest row needs."""
    end = next((n for n, token in enumerate(tokens) if token in (1, 2)), len(tokens))
    tokens = tokens[: end + 1]
    while tokens and tokens[-1] == PAD:
        tokens.pop()
    return tokens


# --- generate ---------------------------------------------------------------------------------------------------


@pytest.mark.every_family
@promise("no compression ≡ the plain model")
@pytest.mark.parametrize("pad", ["left", "right"])
def test_no_compression(family, pad):
    inputs = family.batch(*ROWS, pad=pad)
    whole = vlmzip.attach(family.model, NoCompression())
    with torch.no_grad():
        torch.testing.assert_close(whole(**inputs).logits, family.model(**inputs).logits, atol=1e-5, rtol=0)
    assert torch.equal(whole.generate(**inputs, **GREEDY), family.model.generate(**inputs, **GREEDY))


@promise("generate: without attention_mask, as transformers infers it")
def test_inferred_mask(family, compressed):
    inputs = family.batch(*ROWS)
    expected = compressed.generate(**inputs, **GREEDY)
    del inputs["attention_mask"]
    assert torch.equal(compressed.generate(**inputs, **GREEDY), expected)


@promise("kept positions: contiguous and original")
@pytest.mark.parametrize("positions", ["contiguous", "original"])
def test_positions(family, positions):
    """Every row of a ragged batch is that row alone, whatever the positions; and the two differ."""
    rows_equal_rows_alone(family, vlmzip.attach(family.model, Ragged(positions=positions)), **GREEDY)
    inputs = family.batch(*ROWS)
    with torch.no_grad():
        both = [vlmzip.attach(family.model, Ragged(positions=p))(**inputs).logits for p in ("contiguous", "original")]
    assert (both[0] - both[1]).abs().max() > 1e-2


@pytest.mark.every_family
@promise("generate: greedy")
def test_greedy(family, compressed):
    new = rows_equal_rows_alone(family, compressed, **GREEDY)
    assert len(set(map(tuple, new.tolist()))) > 1
    compressed.generate(**family.batch(*ROWS), **GREEDY)
    assert len({p.after for p in compressed.report.images}) > 1  # the batch is ragged


@promise("generate: sampling")
def test_sampling(family, compressed):
    """Sampling draws what the plain model draws from hand-compressed inputs under the same seed."""
    inputs = family.batch(*ROWS)
    hand = vlmzip.compress_inputs(family.model, inputs, Ragged(), generating=True)
    torch.manual_seed(3)
    expected = family.model.generate(**hand, max_new_tokens=6, do_sample=True, top_k=20)
    torch.manual_seed(3)
    got = compressed.generate(**inputs, max_new_tokens=6, do_sample=True, top_k=20)
    assert torch.equal(got[:, inputs["input_ids"].shape[1] :], expected[:, hand["input_ids"].shape[1] :])


@wrong_copies
@promise("generate: beam search")
def test_beams(family, compressed):
    rows_equal_rows_alone(family, compressed, max_new_tokens=5, num_beams=3, do_sample=False)


@wrong_copies
@promise("generate: several sequences a prompt")
def test_several_sequences(family, compressed):
    new = rows_equal_rows_alone(
        family, compressed, max_new_tokens=5, num_beams=3, num_return_sequences=3, do_sample=False
    )
    assert len(new) == 3 * len(ROWS)
    # A temperature near 0 makes every sample the most likely one: each row's, not its neighbour's.
    cold = rows_equal_rows_alone(
        family, compressed, max_new_tokens=3, do_sample=True, temperature=1e-4, num_return_sequences=2
    )
    assert torch.equal(cold[0::2], cold[1::2])


@pytest.mark.skipif(WRONG_COPIES, reason="refused before 5.19: see test_beams")
@pytest.mark.crossed(repeats=[{"num_beams": 2}])
@promise("generate: beams and several sequences with dicts and prefix functions; several with streamers")
@pytest.mark.parametrize("repeats", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True, "top_k": 1}])
@pytest.mark.parametrize("extra", ["return_dict_in_generate", "streamer", "prefix_allowed_tokens_fn"])
def test_beams_with_extras(family, compressed, repeats, extra):
    """As on hand-made inputs."""
    given = {
        "return_dict_in_generate": True,
        "streamer": Collect(),
        "prefix_allowed_tokens_fn": lambda _row, ids: [5, 6, 7] if len(ids) % 2 else [8, 9],
    }
    how = {"max_new_tokens": 4, **repeats, extra: given[extra]}
    inputs = family.batch(*ROWS)
    if extra == "streamer":
        if "num_beams" in repeats:  # as in transformers
            with pytest.raises(ValueError, match="`streamer` cannot be used with beam search"):
                compressed.generate(**inputs, **how)
            return
        compressed.generate(**inputs, **how)
        assert torch.equal(
            torch.stack(given[extra].steps, 1), compressed.generate(**inputs, **repeats, max_new_tokens=4)[:, -4:]
        )
        return
    hand = vlmzip.compress_inputs(family.model, inputs, Ragged(), generating=True)
    expected, got = family.model.generate(**hand, **how), compressed.generate(**inputs, **how)
    if extra == "return_dict_in_generate":
        expected, got = expected.sequences, got.sequences
    assert torch.equal(got[:, inputs["input_ids"].shape[1] :], expected[:, hand["input_ids"].shape[1] :])


@promise("generate: assisted decoding", refused=True)
def test_assisted_decoding(family, compressed):
    with pytest.raises(UserError, match="assisted decoding is not supported"):
        compressed.generate(**family.batch(*ROWS), assistant_model=family.model)


@promise("generate: prompt_lookup_num_tokens (one row, as transformers has it)")
def test_prompt_lookup(family, compressed):
    """Looks up in the compressed prompt; the answer is the greedy one."""
    for row in range(len(ROWS)):
        one = alone(family, row)
        hand = vlmzip.compress_inputs(family.model, one, Ragged(), generating=True)
        expected = family.model.generate(**hand, **GREEDY)[:, hand["input_ids"].shape[1] :]
        got = compressed.generate(**one, **GREEDY, prompt_lookup_num_tokens=3)
        assert torch.equal(got[:, one["input_ids"].shape[1] :], expected)
    with pytest.raises(ValueError, match="only supported for batch_size = 1"):
        compressed.generate(**family.batch(*ROWS), **GREEDY, prompt_lookup_num_tokens=3)


@promise('generate: cache_implementation="static"')
def test_static_cache(family):
    model = copy.deepcopy(family.model)  # transformers notes the cache's length on the model
    compressed = vlmzip.attach(model, Ragged())
    new = rows_equal_rows_alone(family, compressed, **GREEDY, cache_implementation="static")
    inputs = family.batch(*ROWS)
    assert torch.equal(new, compressed.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :])
    full = compressed.generate(**inputs, **GREEDY, cache_implementation="static", return_dict_in_generate=True)
    assert type(full.past_key_values).__name__ == "StaticCache"


@promise("generate: return_dict_in_generate")
def test_return_dict(family, compressed):
    inputs = family.batch(*ROWS)
    width = inputs["input_ids"].shape[1]
    how = {**GREEDY, "return_dict_in_generate": True, "output_scores": True}
    out = compressed.generate(**inputs, **how)
    assert torch.equal(out.sequences, compressed.generate(**inputs, **GREEDY))
    assert len(out.scores) == out.sequences.shape[1] - width
    for row in range(len(ROWS)):
        one = alone(family, row)
        single = compressed.generate(**one, **how)
        new = single.sequences[0, one["input_ids"].shape[1] :]
        assert out.sequences[row, width : width + len(new)].tolist() == new.tolist()
        for together, separate in zip(out.scores, single.scores, strict=False):
            torch.testing.assert_close(together[row], separate[0], atol=1e-4, rtol=0)


@promise("generate: max_length, min_length as the user counts")
def test_length_limits(family, compressed):
    inputs = family.batch(*ROWS)
    width = inputs["input_ids"].shape[1]
    assert (
        compressed.generate(**inputs, max_length=width + 4, min_length=width + 4, do_sample=False).shape[1] == width + 4
    )
    config = copy.deepcopy(family.model.generation_config)
    config.max_length, config.min_length = width + 3, width + 3
    assert compressed.generate(**inputs, generation_config=config, do_sample=False).shape[1] == width + 3
    assert compressed.generate(**inputs, max_length=width + 1, do_sample=False).shape[1] == width + 1
    for length in (width + 1, 5):  # the number of new tokens counts
        assert compressed.generate(**inputs, max_length=length, max_new_tokens=3, do_sample=False).shape[1] == width + 3
    config.max_length, config.min_length = 20, None  # shorter than the prompt: refused, as the plain model does
    with pytest.raises(UserError, match="max_length=20 leaves no room"):
        compressed.generate(**inputs, generation_config=config)
    for limit in (width, width // 2):
        with pytest.raises(ValueError, match=f"`max_length` is set to {limit}"):
            copy.deepcopy(family.model).generate(**inputs, max_length=limit)
        with pytest.raises(
            UserError, match=f"max_length={limit} leaves no room .* the prompt alone has {width} tokens"
        ):
            compressed.generate(**inputs, max_length=limit)


@promise("generate: stop strings")
def test_stop_strings(family, compressed):
    tokenizer = one_character_a_token()
    one = alone(family, 0)
    width = one["input_ids"].shape[1]
    free = compressed.generate(**one, **GREEDY)[0, width:].tolist()
    stop = tokenizer.decode([free[2]])
    how = {**GREEDY, "stop_strings": [stop], "tokenizer": tokenizer}
    stopped = compressed.generate(**one, **how)[0, width:].tolist()
    assert stopped == free[: free.index(free[2]) + 1]
    inputs = family.batch(*ROWS)
    together = compressed.generate(**inputs, **how)[:, inputs["input_ids"].shape[1] :].tolist()
    for row in range(len(ROWS)):
        one = alone(family, row)
        single = compressed.generate(**one, **how)[0, one["input_ids"].shape[1] :].tolist()
        assert together[row] == single + [PAD] * (len(together[row]) - len(single))
    assert together[0][: len(stopped)] == stopped


class Collect(BaseStreamer):
    def __init__(self):
        self.prompt, self.steps, self.ended = None, [], False

    def put(self, value):
        if self.prompt is None:
            self.prompt = value
        else:
            self.steps.append(value)

    def end(self):
        self.ended = True


@promise("generate: streamers")
@pytest.mark.parametrize("rows", [ROWS[:1], ROWS], ids=["one row", "ragged"])
def test_streamers(family, compressed, rows):
    inputs, streamer = family.batch(*rows), Collect()
    rows_out = compressed.generate(**inputs, **GREEDY, streamer=streamer)
    assert torch.equal(streamer.prompt, inputs["input_ids"])
    assert torch.equal(torch.stack(streamer.steps, 1), rows_out[:, inputs["input_ids"].shape[1] :])
    assert streamer.ended
    if family_of(family.model).features_as_list or not WRONG_COPIES:  # others refuse: they generate row by row
        twice, several = Collect(), {**GREEDY, "do_sample": True, "num_return_sequences": 2}
        if WRONG_COPIES and len(rows) > 1:  # a row has several images: see test_beams
            with pytest.raises(UserError, match="give wrong answers in transformers"):
                compressed.generate(**inputs, **several, streamer=twice)
        else:
            compressed.generate(**inputs, **several, streamer=twice)
            assert torch.equal(twice.prompt, inputs["input_ids"].repeat_interleave(2, 0))
    for row in range(len(rows)):
        single = Collect()
        compressed.generate(**alone(family, row), **GREEDY, streamer=single)
        for together, separate in zip(streamer.steps, single.steps, strict=False):
            assert together[row] == separate[0]


@promise("generate: chunked prefill")
def test_chunked_prefill(family, compressed, record_property):
    """As the plain model does it: where a prompt is seen both ways (PaliGemma), chunks change the answer too."""
    inputs = family.batch(*ROWS)
    if not hasattr(transformers.generation.utils, "_slice_mm_encoder_output"):  # wrong in older versions, so refused
        with pytest.raises(UserError, match="prefill_chunk_size with images gives wrong answers in transformers"):
            compressed.generate(**inputs, **GREEDY, prefill_chunk_size=5)
        record_property("cell", "refused")
        return
    hand = vlmzip.compress_inputs(family.model, inputs, Ragged(), generating=True)
    expected = family.model.generate(**hand, **GREEDY, prefill_chunk_size=5)[:, hand["input_ids"].shape[1] :]
    got = compressed.generate(**inputs, **GREEDY, prefill_chunk_size=5)[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(got, expected)
    if not family.sees_prompt_both_ways:
        assert torch.equal(got, compressed.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :])


@promise("inputs_embeds with images", refused=True)
def test_embeddings_with_images(family, compressed):
    inputs = family.batch(*ROWS)
    embeds = family.model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(UserError, match="not both"):
        compressed.generate(**inputs, inputs_embeds=embeds, **GREEDY)


@promise("inputs_embeds without images: forward")
def test_embeddings_without_images(family, compressed):
    embeds = family.model.get_input_embeddings()(torch.tensor([[4, 5, 6]]))
    with torch.no_grad():
        assert torch.equal(compressed(inputs_embeds=embeds).logits, family.model(inputs_embeds=embeds).logits)


@promise("inputs_embeds without images: generate")
def test_generate_from_embeddings(family, compressed, record_property):
    embeds = family.model.get_input_embeddings()(torch.tensor([[4, 5, 6]]))
    if not family.generates_from_embeddings:
        for model in (family.model, compressed):
            with pytest.raises(ValueError, match="doesn't have its forwarding implemented"):
                model.generate(inputs_embeds=embeds, **GREEDY)
        record_property("cell", "plain model fails")
        return
    expected = family.model.generate(inputs_embeds=embeds, **GREEDY)
    assert torch.equal(compressed.generate(inputs_embeds=embeds, **GREEDY), expected)


def one_character_a_token():
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({chr(ord("a") + n): n for n in range(100)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


# --- several turns ----------------------------------------------------------------------------------------------


@pytest.mark.crossed(positions=["contiguous"])
@promise("turns: the whole conversation again")
@pytest.mark.parametrize("positions", ["contiguous", "original"])
@pytest.mark.parametrize("images", ["new", "all"])
def test_turns_as_whole(family, positions, images):
    check_turns(family, positions, whole=True, every_image=images == "all")


@pytest.mark.every_family
@pytest.mark.crossed(positions=["contiguous"])
@promise("turns: new tokens only")
@pytest.mark.parametrize("positions", ["contiguous", "original"])
def test_turns_as_new_tokens(family, positions):
    check_turns(family, positions, whole=False)


def check_turns(family, positions, *, whole, every_image=False):
    """Three turns on one cache, a second image in the third, each ≡ a fresh run on the whole conversation."""
    runs = counted_encoder_runs(family)
    model = vlmzip.attach(family.model, Ragged(positions=positions))
    cache = DynamicCache()
    first = family.batch([1, "image", 5, 6], [1, 3, "image", 7, 5, 6])
    ids = model.generate(**first, **GREEDY, past_key_values=cache)
    mask = torch.cat([first["attention_mask"], torch.ones(2, 6, dtype=torch.long)], 1)
    encoded = []
    for turn, parts in enumerate(([8, 9], [4, "image", 6])):
        images = 2 * parts.count("image")
        part = batch(*family.ids(parts, parts, first_image=2))
        new = part["input_ids"]
        ids, mask = torch.cat([ids, new], 1), torch.cat([mask, part["attention_mask"]], 1)
        every = interleaved(family, 2 + images)
        inputs = {"input_ids": ids if whole else new, "attention_mask": mask}
        inputs |= every if every_image else family.images(2, images)
        runs.clear()
        out = model.generate(**inputs, **GREEDY, past_key_values=cache)
        encoded.append(len(runs))
        answer = out[:, inputs["input_ids"].shape[1] :]
        fresh = model.generate(input_ids=ids, attention_mask=mask, **every, **types(family, ids, first), **GREEDY)
        assert torch.equal(answer, fresh[:, ids.shape[1] :]), f"turn {turn + 2}"
        ids, mask = torch.cat([ids, answer], 1), torch.cat([mask, torch.ones_like(answer)], 1)
    assert encoded == [0, 1]  # the first images were encoded once, in the first turn


def counted_encoder_runs(family):
    """A list that grows with every run of the vision encoder."""
    runs = []
    tower = family_of(family.model).vision_encoder
    tower.register_forward_hook(lambda *_: runs.append(1))
    return runs


def interleaved(family, count):
    """All images in the order of their placeholders, row by row: each with its first, then its later one."""
    return family.pixels({2: [0, 1], 4: [0, 2, 1, 3]}[count])


def types(family, ids, first):
    """What the processor says about the tokens of a conversation whose first prompt is `first`."""
    return family.token_types(ids, first["input_ids"].shape[1])


@pytest.mark.crossed(positions=["contiguous"])
@promise("turns: answers that end at different lengths")
@pytest.mark.parametrize("positions", ["contiguous", "original"])
@pytest.mark.parametrize("given", ["whole", "new with mask of whole", "new"])
def test_turns_after_answers_of_different_lengths(family, positions, given):
    """Each row of turn 2 is a fresh run on that row's own conversation, without the filler behind short answers."""
    model = vlmzip.attach(family.model, Ragged(positions=positions))
    parts, cache = ([1, "image", 5, 6], [1, 3, "image", 7, 5, 6]), DynamicCache()
    first = family.batch(*parts)
    width = first["input_ids"].shape[1]
    how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": PAD}
    free = model.generate(**first, **how, eos_token_id=None)[:, width:].tolist()
    end = next(token for token in free[0][:5] if token not in free[1][:6] and token != PAD)
    ids = model.generate(**first, **how, eos_token_id=end, past_key_values=cache)
    answers = [row[: row.index(end) + 1] if end in row else row for row in ids[:, width:].tolist()]
    assert len(answers[0]) < len(answers[1])

    new = torch.tensor([[8, 9]] * 2)
    mask = torch.tensor([[1] * len(answer) + [0] * (len(answers[1]) - len(answer)) + [1, 1] for answer in answers])
    mask = torch.cat([first["attention_mask"], mask], 1)
    again = {"input_ids": torch.cat([ids, new], 1), **family.images(0, 2)} if given == "whole" else {"input_ids": new}
    again |= {"attention_mask": mask} if "whole" in given else {}
    out = model.generate(**again, **GREEDY, past_key_values=cache)
    for row in range(2):
        one = family.batch(parts[row], first_image=row)
        conversation = torch.tensor([one["input_ids"][0].tolist() + answers[row] + [8, 9]])
        fresh = {"input_ids": conversation, **family.images(row, 1), **types(family, conversation, one)}
        expected = model.generate(**fresh, attention_mask=torch.ones_like(conversation), **GREEDY)
        got = out[row, again["input_ids"].shape[1] :].tolist()
        assert without_padding(got) == without_padding(expected[0, conversation.shape[1] :].tolist())


@promise("turns: forward, step by step")
@pytest.mark.parametrize("positions", ["contiguous", "original"])
def test_forward_with_a_cache(family, positions):
    """A user's own decoding loop through `forward` gives what `generate` gives."""
    model = vlmzip.attach(family.model, Ragged(positions=positions))
    inputs = family.batch(*ROWS)
    mask, tokens = inputs["attention_mask"], []
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
        for _ in range(5):
            tokens.append(out.logits[:, -1].argmax(-1, keepdim=True))
            mask = torch.cat([mask, torch.ones_like(tokens[-1])], 1)
            out = model(input_ids=tokens[-1], attention_mask=mask, past_key_values=out.past_key_values)
    generated = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(torch.cat(tokens, 1), generated[:, -5:])


@promise("turns: padded in another way, or continued where the answer was cut")
def test_turns_given_in_other_forms(family, compressed):
    """The whole conversation in wider padding, and an answer that ran into its limit and is continued."""
    first = family.batch([1, "image", 5, 6], [1, 3, "image", 7, 5, 6])
    long = compressed.generate(**first, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    cache = DynamicCache()
    cut = compressed.generate(**first, max_new_tokens=4, min_new_tokens=4, do_sample=False, past_key_values=cache)
    mask = torch.cat([first["attention_mask"], torch.ones(2, 4, dtype=torch.long)], 1)
    limit = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    wide = {"input_ids": torch.nn.functional.pad(cut, (3, 0), value=PAD)}
    wide["attention_mask"] = torch.nn.functional.pad(mask, (3, 0))
    wide |= family.images(0, 2)
    on = compressed.generate(**wide, **limit, past_key_values=cache)
    assert torch.equal(on[:, 3:], long)
    other = torch.where(torch.arange(long.shape[1]) == long.shape[1] - 2, 9, long)
    with pytest.raises(UserError, match="does not begin with what is in the KV cache"):
        compressed.generate(input_ids=other, **limit, past_key_values=cache)


@promise("turns: forward after generate on one cache")
@pytest.mark.parametrize("again", [False, True])
def test_forward_after_generate(family, compressed, again):
    """The answer's last token has not been through the model yet; giving it once more is fine, as in transformers."""
    first = family.batch([1, "image", 5, 6], [1, 3, "image", 7, 5, 6])
    cache = DynamicCache()
    ids = compressed.generate(**first, **GREEDY, past_key_values=cache)
    new = torch.tensor([[8, 9]] * 2)
    mask = torch.cat([first["attention_mask"], torch.ones(2, 8, dtype=torch.long)], 1)
    with torch.no_grad():
        given = torch.cat([ids[:, -1:], new], 1) if again else new
        out = compressed(input_ids=given, attention_mask=mask, past_key_values=cache)
        whole = torch.cat([ids, new], 1)
        fresh = {"input_ids": whole, "attention_mask": mask, **family.images(0, 2), **types(family, whole, first)}
        torch.testing.assert_close(out.logits[:, -1], compressed(**fresh).logits[:, -1], atol=1e-4, rtol=0)


@promise("turns: beams on a cache", refused=True)
def test_beams_on_a_cache(family, compressed):
    with pytest.raises(UserError, match="beams and several sequences per prompt do not work with a KV cache"):
        compressed.generate(**family.batch(*ROWS), num_beams=2, past_key_values=DynamicCache())


@promise("turns: position_ids of your own", refused=True)
def test_own_positions_on_a_cache(family, compressed):
    cache = DynamicCache()
    out = compressed.generate(**alone(family, 0), **GREEDY, past_key_values=cache)
    with pytest.raises(UserError, match="leave out position_ids with a filled KV cache"):
        compressed.generate(input_ids=out, position_ids=torch.zeros_like(out), past_key_values=cache)


@promise("turns: a cache that someone else filled", refused=True)
def test_foreign_caches(family, compressed):
    with torch.no_grad():
        cache = family.model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values
    with pytest.raises(UserError, match="the content of this KV cache is unknown"):
        compressed.generate(input_ids=torch.tensor([[1, 2, 3, 4]]), past_key_values=cache, **GREEDY)
    own = DynamicCache()
    one = alone(family, 0)
    out = compressed.generate(**one, **GREEDY, past_key_values=own)
    for copied in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        with pytest.raises(UserError, match=r"it is a copy \(deepcopy, pickle\)"):
            compressed.generate(input_ids=out, past_key_values=copied, **GREEDY)
    own.crop(-3)
    with pytest.raises(UserError, match="has changed"):
        compressed.generate(input_ids=out, past_key_values=own, **GREEDY)


# --- training ---------------------------------------------------------------------------------------------------


def with_labels(inputs):
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE_TOKEN, -100)
    labels = labels.masked_fill(inputs["attention_mask"] == 0, -100)
    # The first token of a row is predicted from padding in a batch, and from nothing in a row alone.
    return {**inputs, "labels": labels.masked_fill(inputs["attention_mask"].cumsum(1) == 1, -100)}


@pytest.mark.every_family
@promise("forward: loss and gradients to projector and tower")
@pytest.mark.parametrize("pad", ["left", "right"])
def test_loss(family, pad):
    """The loss is that of a batch shrunk by hand, row by row, weighted by the labels of each row."""
    model = copy.deepcopy(family.model)
    compressed = vlmzip.attach(model, Ragged())
    inputs = with_labels(family.batch(*ROWS, pad=pad))
    loss = compressed(**inputs).loss
    loss.backward()
    total = count = 0
    for row in range(len(ROWS)):
        one = with_labels(alone(family, row))
        with torch.no_grad():
            out = compressed(**one)
        source = compressed.report.source if row != 2 else torch.arange(one["labels"].shape[1])[None]
        labels = one["labels"].gather(1, source)[0, 1:]
        total += torch.nn.functional.cross_entropy(out.logits[0, :-1], labels, ignore_index=-100, reduction="sum")
        count += int((labels != -100).sum())
    torch.testing.assert_close(loss.detach(), total / count, atol=1e-5, rtol=1e-5)
    for part in (family_of(model).projector, family_of(model).vision_encoder):
        gradients = [p.grad for p in part.parameters() if p.grad is not None]
        assert all(g.isfinite().all() for g in gradients)
        assert sum(g.abs().sum() for g in gradients) > 0
    patch = next(p for name, p in family_of(model).vision_encoder.named_parameters() if "patch_emb" in name)
    assert patch.grad is not None
    assert patch.grad.abs().sum() > 0


@pytest.mark.parametrize("positions", ["contiguous", "original"])
def test_training_counts_positions_no_more_than_it_must(family, positions, monkeypatch):
    """Positions are counted once for the call, and not again for the cache that it fills."""
    compressed = vlmzip.attach(family.model, Ragged(positions=positions))
    counted = []
    kind = type(family_of(family.model))
    original = kind.original_positions
    monkeypatch.setattr(kind, "original_positions", lambda *a: counted.append(1) or original(*a))
    compressed(**with_labels(family.batch(*ROWS)), use_cache=False).loss.backward()
    family.model.zero_grad()
    needed = int(positions == "original")
    assert len(counted) == needed
    compressed(**family.batch(*ROWS), use_cache=True)
    assert len(counted) == 2 * needed


@promise("forward: gradient checkpointing")
def test_gradient_checkpointing(family):
    gradients = []
    for checkpointing in (False, True):
        model = copy.deepcopy(family.model).train()
        compressed = vlmzip.attach(model, VisionZip(keep=8))
        if checkpointing:
            # The new name of transformers 5.23, or the old one.
            (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
        compressed(**with_labels(family.batch(*ROWS))).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-3, msg=name)


def trainer_for(family, compressed, folder, steps=4, **settings):
    from transformers import Trainer, TrainingArguments

    def collate(rows):
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    rows = [with_labels(family.batch([1, "image", 5, 6]))] * 8
    arguments = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], logging_steps=1,
        save_steps=2, use_cpu=True, lr_scheduler_type="constant", per_device_eval_batch_size=1,
    )  # fmt: skip
    return Trainer(compressed, arguments, train_dataset=rows, data_collator=collate, **settings)


@promise("Trainer on the façade; trainer.model.save_pretrained afterwards")
def test_trainer(family, tmp_path):
    compressed = vlmzip.attach(copy.deepcopy(family.model), VisionZip(keep=8))
    trainer = trainer_for(family, compressed, tmp_path)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    trainer.model.save_pretrained(tmp_path / "whole")
    loaded = vlmzip.from_pretrained(tmp_path / "whole")
    assert loaded.compressor == compressed.compressor
    weights = loaded.inner.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in compressed.inner.state_dict().items())
    assert any(not torch.equal(value, weights[name]) for name, value in family.model.state_dict().items())
    trainer.save_model(tmp_path / "weights")
    for folder in ("checkpoint-4", "weights"):
        with pytest.raises(UserError, match=r"a Trainer wrote weights alone; .* trainer.model.save_pretrained"):
            vlmzip.from_pretrained(tmp_path / folder)


@pytest.mark.slow
@promise("Trainer: resumed from a checkpoint")
def test_trainer_resumes(family, tmp_path):
    one = vlmzip.attach(copy.deepcopy(family.model), VisionZip(keep=8))
    trainer_for(family, one, tmp_path / "one", steps=3).train()
    other = vlmzip.attach(copy.deepcopy(family.model), VisionZip(keep=8))
    trainer_for(family, other, tmp_path / "other", steps=2).train()
    fresh = vlmzip.attach(copy.deepcopy(family.model), VisionZip(keep=8))
    trainer_for(family, fresh, tmp_path / "other", steps=3).train(resume_from_checkpoint=True)
    for name, value in one.inner.state_dict().items():
        torch.testing.assert_close(fresh.inner.state_dict()[name], value, msg=name)


@promise("Trainer.predict, lined up with the labels")
def test_predictions_line_up_with_the_labels(family, tmp_path):
    """Cross entropy of predictions and labels, as a user compares them, is the loss that the Trainer reports."""
    compressed = vlmzip.attach(family.model, Ragged())
    lengths = []

    def line_up(logits, labels):
        lengths.append((logits.shape[1], labels.shape[1]))
        return compressed.report.lined_up(logits, labels.shape[1])

    trainer = trainer_for(family, compressed, tmp_path, preprocess_logits_for_metrics=line_up)
    first = with_labels(family.batch(*ROWS, pad="right"))
    second = with_labels(family.batch(["image", 9, 4, 8], [3, "image", 7]))
    text = with_labels(family.batch([9] * 20, [3, 4, 5]))
    # As with the plain model: in some versions and families a Trainer stumbles over outputs that are no tensors.
    others = [*NAMES, "image_hidden_states", "image_outputs", "video_outputs", "rope_deltas"]
    out = trainer.predict([text, first, second, text], ignore_keys=others)
    assert [short < long for short, long in lengths] == [False, True, True, False]
    logits, labels = torch.tensor(out.predictions)[:, :-1], torch.tensor(out.label_ids)[:, 1:]
    assert logits.shape[:2] == labels.shape
    for rows, inputs in ((slice(0, 2), text), (slice(2, 6), first), (slice(6, 8), second), (slice(8, 10), text)):
        loss = torch.nn.functional.cross_entropy(logits[rows].flatten(0, 1), labels[rows].flatten(), ignore_index=-100)
        with torch.no_grad():
            torch.testing.assert_close(loss, compressed(**inputs).loss, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        compressed(**second)
    with pytest.raises(UserError, match=r"predictions must be \[2, .*\], as in the call of this report, got"):
        compressed.report.lined_up(logits, labels.shape[1])


@promise("peft: LoRA under the façade")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_lora_under(family):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(copy.deepcopy(family.model), LoraConfig(target_modules=["q_proj", "qkv"], r=2))
    compressed = vlmzip.attach(model, VisionZip(keep=8))
    inputs = with_labels(family.batch(*ROWS))
    compressed(**inputs).loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "lora_B" in n)
    expected = vlmzip.attach(family.model, VisionZip(keep=8)).generate(**family.batch(*ROWS), **GREEDY)
    assert torch.equal(compressed.generate(**family.batch(*ROWS), **GREEDY), expected)  # LoRA begins as the identity


@promise("peft: LoRA around the façade")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_lora_around(family):
    from peft import LoraConfig, get_peft_model

    compressed = vlmzip.attach(copy.deepcopy(family.model), VisionZip(keep=8))
    model = get_peft_model(compressed, LoraConfig(target_modules=["q_proj", "qkv"], r=2))
    model(**with_labels(family.batch(*ROWS))).loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "lora_B" in n)
    expected = vlmzip.attach(family.model, VisionZip(keep=8)).generate(**family.batch(*ROWS), **GREEDY)
    assert torch.equal(model.generate(**family.batch(*ROWS), **GREEDY), expected)


# --- save, load, copy, share ------------------------------------------------------------------------------------


@pytest.mark.every_family
@promise("save_pretrained, from_pretrained; plain transformers loads it too")
def test_save_and_load(family, tmp_path):
    compressed = vlmzip.attach(family.model, VisionZip(keep=8, merge="mean"))
    compressed.save_pretrained(tmp_path)
    inputs = family.batch(*ROWS)
    loaded = vlmzip.from_pretrained(tmp_path)
    assert loaded.compressor == compressed.compressor
    assert torch.equal(loaded.generate(**inputs, **GREEDY), compressed.generate(**inputs, **GREEDY))
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert torch.equal(plain.generate(**inputs, **GREEDY), family.model.generate(**inputs, **GREEDY))
    assert json.loads((tmp_path / "compressor.json").read_text())["method"] == "visionzip"
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors"}


@promise("deepcopy and pickle")
def test_copies(fresh):
    """Of a fresh model: once transformers has recorded hidden states, its own hooks cannot be pickled."""
    compressed = vlmzip.attach(fresh.model, Ragged())
    inputs = fresh.batch(*ROWS)
    expected = compressed.generate(**inputs, **GREEDY)
    for twin in (copy.deepcopy(compressed), pickle.loads(pickle.dumps(compressed))):
        assert torch.equal(twin.generate(**inputs, **GREEDY), expected)
        assert twin.inner is not compressed.inner


@promise("threads: two façades on one model, many threads")
def test_threads(family):
    facades = [vlmzip.attach(family.model, VisionZip(keep=k)) for k in (6, 10)]
    work = [(facades[n % 2], alone(family, (0, 1, 3)[n % 3])) for n in range(12)]

    def run(job):
        model, inputs = job
        out = model.generate(**inputs, **GREEDY)
        return out, [p.after for p in model.report.images]

    one_by_one = [run(job) for job in work]
    with ThreadPoolExecutor(4) as pool:
        at_once = list(pool.map(run, work))
    for (a, counts), (b, others) in zip(one_by_one, at_once, strict=True):
        assert torch.equal(a, b)
        assert counts == others


# --- precision, devices, compilers ------------------------------------------------------------------------------


@promise("bfloat16 and float16")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(family, dtype):
    model = copy.deepcopy(family.model).to(dtype)
    inputs = family.batch(*ROWS)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    whole, plain = vlmzip.attach(model, NoCompression()), model
    with torch.no_grad():
        assert torch.equal(whole(**inputs).logits, plain(**inputs).logits)
        out = vlmzip.attach(model, VisionZip(keep=8))(**inputs)
    assert out.logits.dtype == dtype
    assert out.logits.isfinite().all()


@promise("CPU offload (accelerate)")
def test_cpu_offload(family):
    """Weights stay in the CPU's memory and come to the device for each layer; here that is a CPU, too."""
    from accelerate import cpu_offload

    model = cpu_offload(copy.deepcopy(family.model), execution_device=torch.device("cpu"))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    inputs = family.batch(*ROWS)
    expected = vlmzip.attach(family.model, VisionZip(keep=8)).generate(**inputs, **GREEDY)
    assert torch.equal(vlmzip.attach(model, VisionZip(keep=8)).generate(**inputs, **GREEDY), expected)
    assert {p.device.type for p in model.parameters()} == {"meta"}


@promise('device_map="auto" with offload to disk')
def test_offload(family, tmp_path):
    family.model.save_pretrained(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        offloaded = AutoModelForImageTextToText.from_pretrained(
            tmp_path / "model", device_map="auto", max_memory={"cpu": "60KB"}, offload_folder=tmp_path / "disk"
        )
    assert "disk" in offloaded.hf_device_map.values()
    inputs = family.batch(*ROWS)
    expected = vlmzip.attach(family.model, VisionZip(keep=8)).generate(**inputs, **GREEDY)
    assert torch.equal(vlmzip.attach(offloaded, VisionZip(keep=8)).generate(**inputs, **GREEDY), expected)


@pytest.fixture
def compiled(family):
    """A façade on a model cut down to one layer of its LLM, the façade compiled, and the graphs so far."""
    graphs = []

    def backend(graph, _example):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = copy.deepcopy(family.model)
    model.model.language_model.layers = model.model.language_model.layers[:1]
    compressed = vlmzip.attach(model, VisionZip(keep=8))
    with torch.no_grad():
        yield compressed, torch.compile(compressed, backend=backend), graphs


@pytest.mark.slow
@promise("torch.compile of forward, no recompilation from image to image")
def test_compile(family, compiled):
    compressed, fast, graphs = compiled
    counts = []
    for seed in range(4):
        inputs = family.batch([1, "image", 5, 6, 7])
        inputs["pixel_values"] = inputs["pixel_values"] + seed
        torch.testing.assert_close(fast(**inputs).logits, compressed(**inputs).logits, atol=1e-4, rtol=1e-4)
        counts.append(len(graphs))
    assert counts[0] > 0
    assert counts[-1] == counts[0]


@pytest.mark.slow
@promise("torch.compile of forward, prompts of any length after two")
def test_compile_lengths(family, compiled):
    """A second length compiles once more, with lengths left open; later ones compile nothing."""
    compressed, fast, graphs = compiled
    counts = []
    for words in (3, 5, 4, 7):
        inputs = family.batch([1, "image", *range(5, 5 + words)])
        torch.testing.assert_close(fast(**inputs).logits, compressed(**inputs).logits, atol=1e-4, rtol=1e-4)
        counts.append(len(graphs))
    assert counts[0] > 0
    assert counts[1] <= 2 * counts[0]
    assert counts[1:] == [counts[1]] * 3


@pytest.mark.slow
@promise("8-bit weights (bitsandbytes)")
def test_8_bit(family, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    family.model.save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="cpu"
    )
    assert type(model.model.language_model.layers[0].self_attn.q_proj).__name__ == "Linear8bitLt"
    # Which columns are outliers depends on all tokens that are projected together.
    inputs = family.batch(*ROWS, first_image=3 if family.projects_padding else 0)
    whole = vlmzip.attach(model, NoCompression())
    assert torch.equal(whole.generate(**inputs, **GREEDY), model.generate(**inputs, **GREEDY))
    hand = vlmzip.compress_inputs(model, inputs, VisionZip(keep=8), generating=True)
    expected = model.generate(**hand, **GREEDY)[:, hand["input_ids"].shape[1] :]
    got = vlmzip.attach(model, VisionZip(keep=8)).generate(**inputs, **GREEDY)
    assert torch.equal(got[:, inputs["input_ids"].shape[1] :], expected)


@pytest.mark.slow
@promise("4-bit weights (bitsandbytes)")
def test_4_bit(family, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    wider(family.model).save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map="cpu"
    )
    assert type(model.model.language_model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    inputs = family.batch(*ROWS)
    whole = vlmzip.attach(model, NoCompression())
    assert torch.equal(whole.generate(**inputs, **GREEDY), model.generate(**inputs, **GREEDY))
    with torch.no_grad():
        hand = vlmzip.compress_inputs(model, inputs, VisionZip(keep=8), generating=True)
    expected = model.generate(**hand, **GREEDY)[:, hand["input_ids"].shape[1] :]
    got = vlmzip.attach(model, VisionZip(keep=8)).generate(**inputs, **GREEDY)
    assert torch.equal(got[:, inputs["input_ids"].shape[1] :], expected)


@promise('pipeline("image-text-to-text")')
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Pillow beside NumPy 2
def test_pipeline(family, caplog, monkeypatch):
    """Works, and says nothing of the façade's class, which transformers does not know."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # or nobody could see what it says
    from PIL import Image
    from transformers import pipeline

    processor, image = family.processor(), Image.new("RGB", (30, 20), "red")

    def answer(model):
        ask = pipeline("image-text-to-text", model=model, processor=processor)
        out = ask(images=image, text="<image> w4 w5", generate_kwargs={"max_new_tokens": 4, "do_sample": False})
        return out[0]["generated_text"]

    plain = answer(family.model)
    assert answer(vlmzip.attach(family.model, NoCompression())) == plain
    compressed = vlmzip.attach(family.model, VisionZip(keep=6))
    inputs = processor(images=image, text="<image> w4 w5", return_tensors="pt")
    out = compressed.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer(compressed) == "<image> w4 w5 " + processor.decode(out, skip_special_tokens=True)
    assert "is not supported for" not in caplog.text
    with contextlib.suppress(Exception):  # what else it lacks is its own matter
        pipeline("text-generation", model=compressed, tokenizer=processor.tokenizer)
    assert "'CompressedModel' is not supported for text-generation" in caplog.text
    assert compressed.report.after == 6
