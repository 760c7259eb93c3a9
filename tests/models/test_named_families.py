"""What holds for every family, on tiny models of well-known families that the default family serves."""

import functools

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import DynamicCache

import vlmzip
from vlmzip import UserError
from vlmzip.lab.conformance.families import FAMILIES, Tiny
from vlmzip.lab.conformance.prompts import Prompts
from vlmzip.lab.conformance.tiny import folders, model_class, tiny_model
from vlmzip.models import family_of

#: Quick runs have the first three, whose positions, views and masks differ.
NAMES = (
    "qwen2_vl", "smolvlm", "gemma3",
    "glm4v", "idefics3", "internvl", "gemma4", "minicpmv4_6", "mistral3", "molmo2", "qwen3_5",
)  # fmt: skip
#: Models whose inputs do not show which part belongs to which image.
MIXED = ("minicpmv4_6", "molmo2")
#: An image row, a row of two images, and text alone.
ROWS = ([1, "image", 105, 106, 107], [1, 105, "image", 106, "image", 107], [1, 111, 112])
METHOD = "visionzip(keep=50%)"
#: Tokens that an answer may not have: special tokens, such as placeholders and the end of an answer.
GREEDY = {"do_sample": False, "suppress_tokens": list(range(100))}

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="older models have other inputs"),
]


@functools.cache
def built(name):
    tiny = FAMILIES.get(name, Tiny())
    model = tiny_model(model_class(name), tiny.changes)
    return model, Prompts(model, tiny)


@pytest.fixture(params=[pytest.param(name, marks=() if n < 3 else pytest.mark.slow) for n, name in enumerate(NAMES)])
def made(request):
    """Return a model and its prompts, which the tests share."""
    if request.param not in folders():
        pytest.skip("not in this version of transformers")
    return built(request.param)


def alone(prompts, number):
    return prompts.batch(ROWS[number], first=sum(row.count("image") for row in ROWS[:number]))


@torch.no_grad()
def test_a_budget_is_that_of_an_image(made):
    """However the processor writes its placeholders: in rows, or with those of tiles apart."""
    model, prompts = made
    with vlmzip.attach(model, "random_tokens(keep=2)") as small:
        small(**prompts.batch(*ROWS))
        reports = small.report.images
    assert [image.row for image in reports] == [0, 1, 1]
    assert [image.after for image in reports] == [min(2, image.before) for image in reports]


def test_beams_equal_a_row_alone(made):
    model, prompts = made
    how = {"max_new_tokens": 3, "num_beams": 2, **GREEDY}
    with vlmzip.attach(model, METHOD) as small:
        together = small.generate(**prompts.batch(*ROWS), **how)[:, -3:]
        for number in range(len(ROWS)):
            assert torch.equal(small.generate(**alone(prompts, number), **how)[:, -3:], together[number : number + 1])


def test_a_second_turn_equals_the_whole_conversation(made):
    model, prompts = made
    how = {"max_new_tokens": 3, **GREEDY}
    with vlmzip.attach(model, METHOD) as small:
        cache = DynamicCache(config=model.config.get_text_config())
        answer = small.generate(**prompts.batch(ROWS[0]), **how, past_key_values=cache)[0, -3:].tolist()
        later = [108, "image", 109, 110]
        whole = prompts.batch([*ROWS[0], *answer, *later])
        given = whole
        if model.config.model_type in MIXED:
            with pytest.raises(UserError, match="continue a conversation with the new images alone"):
                small.generate(**whole, **how, past_key_values=cache)
            given = prompts.batch(later, first=1)
        second = small.generate(**given, **how, past_key_values=cache)[:, -3:]
        assert [image.row for image in small.report.images] == [0]
        assert torch.equal(second, small.generate(**whole, **how)[:, -3:])


@torch.no_grad()
def test_save_and_load(made, tmp_path):
    model, prompts = made
    inputs = prompts.batch(*ROWS)
    with vlmzip.attach(model, METHOD) as small:
        small.save_pretrained(tmp_path)
        before = small(**inputs).logits
    loaded = type(model).from_pretrained(tmp_path).eval()
    with vlmzip.attach(loaded, tmp_path) as again:
        torch.testing.assert_close(again(**inputs).logits, before, atol=1e-4, rtol=1e-4)


def test_loss_and_gradients(made):
    """Without compression they are the plain model's; with it, they reach the LLM and what is before it."""
    model, prompts = made
    inputs = prompts.batch(*ROWS)
    labels = inputs["input_ids"].clone()
    labels[labels < 100] = -100
    weights = [model.get_input_embeddings().weight, *family_of(model).projector.parameters()]
    plain = model(**inputs, labels=labels).loss
    expected = torch.autograd.grad(plain, weights, allow_unused=True)
    with vlmzip.attach(model, "no_compression") as same:
        loss = same(**inputs, labels=labels).loss
        torch.testing.assert_close(loss, plain, rtol=1e-4, atol=0)
        for gradient, other in zip(torch.autograd.grad(loss, weights, allow_unused=True), expected, strict=True):
            if other is None:
                assert gradient is None
            else:
                torch.testing.assert_close(gradient, other, rtol=1e-2, atol=1e-3 * float(other.abs().max()))
    with vlmzip.attach(model, METHOD) as small:
        loss = small(**inputs, labels=labels).loss
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)
    assert any(gradient.any() for gradient in gradients[1:] if gradient is not None)


@torch.no_grad()
def test_dropping_inside_the_llm_equals_masking(made):
    """The plain model, whose layers from K on do not attend to the dropped tokens, gives the same next token."""
    model, prompts = made
    before = model.config.get_text_config()._attn_implementation
    model.set_attn_implementation("eager")
    try:
        try:
            small = vlmzip.attach(model, "random_tokens(site=in_llm,layer=2,keep=50%)")
        except UserError:
            pytest.skip("no token can be dropped inside this LLM")
        for number in range(2):
            inputs = alone(prompts, number)
            with small:
                logits = small(**inputs).logits[0, -1]
                dropped = dropped_columns(inputs, small.report)
            assert len(dropped) >= 2
            torch.testing.assert_close(logits, masked_logits(model, inputs, dropped), atol=1e-4, rtol=1e-4)
            small = vlmzip.attach(model, small.compressor)
        small.detach()
    finally:
        model.set_attn_implementation(before)


def dropped_columns(inputs, report):
    """Return the columns of the prompt whose tokens do not remain behind the last layer."""
    left = set(report.source[0].tolist())
    return [column for column in range(inputs["input_ids"].shape[1]) if column not in left]


def masked_logits(model, inputs, dropped):
    """Return the plain model's logits for the next token, with a mask in layers 2 and later."""
    handles = []

    def mask(_module, args, kwargs):
        mask = kwargs["attention_mask"]
        assert mask is not None
        mask = mask.clone()
        mask[..., dropped] = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return args, {**kwargs, "attention_mask": mask}

    for layer in family_of(model).decoder_layers[2:]:
        handles.append(layer.register_forward_pre_hook(mask, with_kwargs=True))
    try:
        return model(**inputs).logits[0, -1]
    finally:
        for handle in handles:
            handle.remove()
