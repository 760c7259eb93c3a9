"""Generation without the KV cache that the compressor filled: with no cache, or with another one beside it."""

import copy

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, UnbatchedClassifierFreeGuidanceLogitsProcessor

import vlmzip
from tests.runtime.test_in_llm import CASES, ROWS
from vlmzip import FastV, NoCompression, UserError, VisionZip

pytestmark = pytest.mark.crossed(compressed=[("ragged merging", "sdpa"), ("visionzip", "sdpa")])

HOW = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
SETTINGS = {**{name: case[0] for name, case in CASES.items()}, "visionzip": VisionZip(keep=8), "none": NoCompression()}


@pytest.fixture(params=[*((name, "sdpa") for name in SETTINGS), ("fastv", "eager"), ("ragged merging", "eager")])
def compressed(family, request):
    """A model with each setting; those that drop and those that merge also under eager attention."""
    name, attention = request.param
    family.model.set_attn_implementation(attention)
    compressed = vlmzip.attach(family.model, SETTINGS[name])
    yield compressed
    compressed.detach()
    family.model.set_attn_implementation("sdpa")


def logits(compressed, inputs, **how):
    out = compressed.generate(**inputs, **HOW, output_logits=True, **how)
    return out.sequences, torch.stack(out.logits, 1)


def test_every_step_sees_the_compressed_prompt(family, compressed):
    inputs = family.batch(*ROWS)
    expected, with_cache = logits(compressed, inputs)
    got, without = logits(compressed, inputs, use_cache=False)
    torch.testing.assert_close(without, with_cache, atol=1e-5, rtol=0)
    assert torch.equal(got, expected)


def test_guidance_asks_the_plain_model_beside(family, compressed):
    """The negative prompt is the last token of the prompt; no image belongs to it, so nothing is compressed in it."""
    inputs = family.batch(*ROWS)
    width = inputs["input_ids"].shape[1]
    guided = compressed.generate(**inputs, **HOW, guidance_scale=2.0, output_logits=True, output_scores=True)
    answer, conditional = guided.sequences[:, width:], torch.stack(guided.logits, 1)
    # Given the same tokens, the answer's own logits are those without guidance.
    forced = compressed.generate(**inputs, **HOW, output_logits=True, logits_processor=[Forced(answer)])
    torch.testing.assert_close(conditional, torch.stack(forced.logits, 1), atol=1e-5, rtol=0)
    beside = UnbatchedClassifierFreeGuidanceLogitsProcessor(2.0, family.model)
    for step, scores in enumerate(guided.scores):
        with torch.no_grad():
            expected = beside(guided.sequences[:, : width + step], conditional[:, step])
        allowed = scores.isfinite()  # the end of the text is forbidden here
        torch.testing.assert_close(scores[allowed], expected[allowed], atol=1e-4, rtol=0)


class Forced:
    """Lets the model generate the given tokens."""

    def __init__(self, tokens):
        self.tokens, self.step = tokens, 0

    def __call__(self, ids, scores):
        chosen = self.tokens[:, self.step]
        self.step += 1
        return torch.full_like(scores, -1e9).scatter(1, chosen[:, None], 0.0)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"use_cache": False, "cache": "empty"}, "use_cache=False with a KV cache"),
        ({"use_cache": False, "guidance_scale": 2.0}, "guidance_scale .* needs use_cache=True"),
        ({"generation_config": GenerationConfig(use_cache=False, guidance_scale=2.0)}, "needs use_cache=True"),
    ],
)
def test_what_would_answer_wrongly_is_refused(family, how, words):
    compressed = vlmzip.attach(family.model, FastV(keep=0.3))
    if how.get("cache"):
        how = {**how, "cache": DynamicCache()}
    with pytest.raises(UserError, match=words):
        compressed.generate(**family.batch(*ROWS), **how, max_new_tokens=3)
    compressed.detach()


def test_generation_configs_without_a_cache(family):
    """The argument, a given generation config and the model's own say the same."""
    compressed = vlmzip.attach(family.model, FastV(keep=0.3))
    inputs = family.batch(*ROWS)
    expected = compressed.generate(**inputs, max_new_tokens=4, do_sample=False)
    given = GenerationConfig(use_cache=False, max_new_tokens=4, do_sample=False)
    assert torch.equal(compressed.generate(**inputs, generation_config=given), expected)
    own = copy.deepcopy(family.model.generation_config)
    family.model.generation_config.use_cache = False
    try:
        assert torch.equal(compressed.generate(**inputs, max_new_tokens=4, do_sample=False), expected)
    finally:
        family.model.generation_config = own
        compressed.detach()


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_beams_without_a_cache(family, how):
    compressed = vlmzip.attach(family.model, FastV(keep=0.3))
    inputs = family.batch(*ROWS[:2])
    limits = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    expected = compressed.generate(**inputs, **limits, **how)
    assert torch.equal(compressed.generate(**inputs, **limits, **how, use_cache=False), expected)
    compressed.detach()


def test_a_copy_of_the_cache_is_refused(family):
    """A decoding loop of the user's that forks the cache would continue with layers of different lengths."""

    def fork(model, input_ids, logits_processor, stopping_criteria, generation_config, **inputs):
        prepared = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **inputs)
        model(**prepared)
        name = "cache" if "cache" in prepared else "past_key_values"
        model(input_ids=input_ids[:, -1:], **{name: copy.deepcopy(prepared[name])})

    compressed = vlmzip.attach(family.model, FastV(keep=0.3))
    with pytest.raises(UserError, match="not a copy of it"):
        compressed.generate(**family.batch(*ROWS), custom_generate=fork, max_new_tokens=3)
    compressed.detach()
