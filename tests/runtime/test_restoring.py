"""VCC in a model against a naive reference: layers see fewer tokens, and give all of them back."""

import copy
from dataclasses import dataclass

import pytest
import torch
from transformers import DynamicCache

import vlmzip
from tests.families import FAMILIES
from tests.references.vcc import logits_of, scores_of
from tests.runtime.test_in_llm import ROWS, RaggedInside, alone, checkpoint, separators_of
from tests.tiny import IMAGE_TOKEN, VIDEO_TOKEN
from vlmzip import VCC, Chain, FastV, Signal, Site, TokenMap, UserError, VisionZip
from vlmzip.compressor import Compressor
from vlmzip.models import family_of
from vlmzip.runtime.in_llm.hooks import RestoreHook

#: In quick runs.
pytestmark = pytest.mark.crossed(method=["two of nine"])

STEPS = 4
CASES = {
    "two of nine": VCC(block=4, fine=2, layer=1),
    "none, with a rest": VCC(block=5, fine=0, layer=2),
    "larger than some images": VCC(block=20, fine=0, layer=1),
    "in the last layer": VCC(block=6, fine=1, layer=3),
}


@pytest.fixture(scope="module")
def family(family):
    """Logits below 3, of which float32 rounds off less than the 1e-5 that the reference allows."""
    with torch.no_grad():
        family.model.get_output_embeddings().weight.mul_(0.4)
    return family


@pytest.fixture(params=CASES)
def method(request):
    return CASES[request.param]


def fits(method, family):
    """Return the method from the first layer on that the family leaves free."""
    return method.with_fields(layer=max(method.layer, family_of(family.model).first_free_layer))


@pytest.mark.crossed(method=["two of nine"], attention=["sdpa"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_row_of_a_ragged_batch_equals_the_reference(family, method, attention):
    """Prefill and decode steps with a KV cache, left-padded, against the reference on each row alone, without one."""
    method = fits(method, family)
    family.model.set_attn_implementation(attention)
    inputs = family.batch(*ROWS)
    with vlmzip.attach(family.model, method) as compressed:
        out = compressed.generate(
            **inputs, max_new_tokens=STEPS + 1, min_new_tokens=STEPS + 1, do_sample=False,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        by_layer = [image.by_layer for image in compressed.report.images]
        with torch.no_grad():
            prefill = compressed(**inputs).logits
    width = inputs["input_ids"].shape[1]
    assert prefill.shape[1] == width
    family.model.set_attn_implementation("eager")
    for row in range(len(ROWS)):
        one, images = alone(family, row)
        new = out.sequences[row, width:-1]
        with torch.no_grad():
            expected, saw = logits_of(
                family.model, one, new, images, separators_of(family, row, images), method, family.sees_prompt_both_ways
            )
        length = one["input_ids"].shape[1]
        torch.testing.assert_close(prefill[row, -length:], expected[:length], atol=1e-5, rtol=0)
        got = torch.stack([step[row] for step in out.logits])
        torch.testing.assert_close(got, expected[length - 1 :], atol=1e-5, rtol=0)
        counts = [by_layer.pop(0) for _ in images]
        text = length + STEPS - sum(len(columns) for columns in images)
        assert saw == [text + sum(seen) for seen in zip(*counts, strict=True)] or not images
    family.model.set_attn_implementation("sdpa")


@pytest.mark.filterwarnings("ignore:vcc keeps all")
def test_with_all_blocks_fine_nothing_changes(family):
    inputs, plain = family.batch(*ROWS), family.model
    how = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}
    with torch.no_grad():
        expected, answers = plain(**inputs).logits, plain.generate(**inputs, **how)
    with vlmzip.attach(plain, fits(VCC(block=4, fine=99, layer=1), family)) as compressed, torch.no_grad():
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(compressed(**inputs).logits[real], expected[real], atol=1e-5, rtol=0)
        assert torch.equal(compressed.generate(**inputs, **how), answers)


def test_without_a_cache_and_padded_on_the_right(family, method):
    with vlmzip.attach(family.model, fits(method, family)) as compressed, torch.no_grad():
        left, right = family.batch(*ROWS), family.batch(*ROWS, pad="right")
        logits = compressed(**left).logits
        torch.testing.assert_close(compressed(**left, use_cache=False).logits, logits, atol=1e-5, rtol=0)
        mirrored = compressed(**right).logits
        how = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}
        assert torch.equal(compressed.generate(**left, use_cache=False, **how), compressed.generate(**left, **how))
    for row, real in enumerate(left["attention_mask"].bool()):
        count = int(real.sum())
        # Positions count padding on the left in `forward`, so only relative positions agree: enough for rotary ones.
        torch.testing.assert_close(mirrored[row, :count], logits[row, -count:], atol=1e-5, rtol=0)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.crossed(method=["two of nine"], checkpointing=[True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_reference(family, method, checkpointing):
    """The sum over rows of a loss on the logits of all real tokens, in double precision."""
    method = fits(method, family)
    model, other = copy.deepcopy(family.model).double().train(), copy.deepcopy(family.model).double()
    other.set_attn_implementation("eager")
    rows = [row for row in range(len(ROWS)) if "image" in ROWS[row]][:3]
    inputs = family.batch(*(ROWS[row] for row in rows))
    with vlmzip.attach(model, method) as compressed:
        if checkpointing:
            checkpoint(compressed)
        logits = compressed(**inputs).logits
        logits[inputs["attention_mask"].bool()].square().sum().backward()
    for row in rows:
        one, images = alone(family, row)
        expected, _ = logits_of(
            other, one, [], images, separators_of(family, row, images), method, family.sees_prompt_both_ways
        )
        expected.square().sum().backward()
    got, expected = gradients(model), gradients(other)
    assert got.keys() == expected.keys()
    # Of a bias of keys, which changes no attention, the gradient is nothing but rounding.
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], atol=5e-7 * scale, rtol=1e-4)


def test_the_loss_is_on_all_tokens(family, method):
    inputs = family.batch(*ROWS)
    labels = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)
    labels[labels == IMAGE_TOKEN] = -100
    labels[:, :-2] = -100
    with vlmzip.attach(family.model, fits(method, family)) as compressed, torch.no_grad():
        out = compressed(**inputs, labels=labels)
        assert compressed.report.source.shape == labels.shape
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)


def test_beams(family, method):
    how = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 3}
    with vlmzip.attach(family.model, fits(method, family)) as compressed:
        inputs = family.batch(*ROWS[:2])
        width = inputs["input_ids"].shape[1]
        together = compressed.generate(**inputs, **how)
        for row in range(2):
            one, _ = alone(family, row)
            single = compressed.generate(**one, **how)
            assert torch.equal(together[row, width:], single[0, one["input_ids"].shape[1] :])


def test_later_turns_on_one_cache_equal_one_run(family, method):
    """The second turn brings an image, and the third only text. Labels mark the answers in the one run."""
    if family.sees_prompt_both_ways:
        pytest.skip("its first turn sees the prompt both ways, which one run over all turns would not")
    first, second, third = [1, "image", 5, 6], [7, "image", 8, 9], [11, 12]
    with vlmzip.attach(family.model, fits(method, family)) as compressed, torch.no_grad():
        cache, how = DynamicCache(), {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        answer = compressed.generate(**family.batch(first), past_key_values=cache, **how)[0, -4:].tolist()
        turns = [*first, *answer, *second]
        answered = compressed.generate(**family.batch(turns), past_key_values=cache, **how)
        turns += [*answered[0, -4:].tolist(), *third]
        whole = family.batch(turns)
        new = {"input_ids": torch.tensor([third]), "attention_mask": torch.ones(1, 2, dtype=torch.long)}
        got = compressed(**new, past_key_values=cache).logits[0, -1]
        labels = torch.full_like(whole["input_ids"], -100)
        ids, length = whole["input_ids"][0].tolist(), len(family.ids([*first])[0])
        labels[0, length : length + 4] = 1
        labels[0, -6:-2] = 1
        expected = compressed(**whole, labels=labels).logits[0, -1]
        assert ids[length : length + 4] == answer
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_the_report_has_the_map_of_the_last_layer(family, method):
    method = fits(method, family)
    with vlmzip.attach(family.model, method) as compressed, torch.no_grad():
        compressed(**family.batch(*ROWS))
        for image in compressed.report.images:
            image.token_map.check()
            assert image.by_layer[: method.layer] == (image.before,) * method.layer
            assert image.token_map.lengths == [image.by_layer[-1]]
            assert image.by_layer[-1] < image.before or image.before < method.block
            assert len(set(image.by_layer[method.layer :])) == 1


def test_the_question_before_the_first_label_chooses():
    """Two questions choose different blocks, and an answer chooses nothing."""
    family, groups = FAMILIES["llava"](), []
    with vlmzip.attach(family.model, VCC(block=4, fine=2, layer=1)) as compressed, torch.no_grad():
        for question, answer in (([5, 6], [44, 45]), ([5, 6], [50, 51]), ([77, 31], [44, 45])):
            inputs = family.batch([1, "image", *question, *answer])
            labels = torch.full_like(inputs["input_ids"], -100)
            labels[:, -2:] = 1
            compressed(**inputs, labels=labels)
            groups.append(compressed.report.images[0].token_map.group)
    assert torch.equal(groups[0], groups[1])
    assert not torch.equal(groups[0], groups[2])


@pytest.mark.filterwarnings("ignore:vcc keeps all")
@pytest.mark.parametrize("how", [{"num_return_sequences": 2, "do_sample": True}, {"guidance_scale": 1.5}], ids=str)
def test_other_ways_to_answer(how):
    family = FAMILIES["llava"]()
    with vlmzip.attach(family.model, VCC(block=4, fine=9, layer=1)) as whole:
        torch.manual_seed(0)
        expected = whole.generate(**family.batch(*ROWS), max_new_tokens=4, **how)
    torch.manual_seed(0)
    assert torch.equal(family.model.generate(**family.batch(*ROWS), max_new_tokens=4, **how), expected)


def test_after_a_method_before_the_llm(family):
    chain = Chain(compressors=(VisionZip(keep=13), fits(VCC(block=4, fine=1, layer=2), family)))
    with vlmzip.attach(family.model, chain) as compressed, torch.no_grad():
        one, _ = alone(family, 0)
        got = compressed(**one).logits[0]
        assert compressed.report.images[0].by_layer[-1] == 4 + 2 + 1
        assert compressed.report.images[0].token_map.group.shape[1] >= one["input_ids"].eq(IMAGE_TOKEN).sum()
    hand = vlmzip.compress_inputs(family.model, one, VisionZip(keep=13))
    columns = (hand["input_ids"][0] == IMAGE_TOKEN).nonzero()[:, 0].tolist()
    family.model.set_attn_implementation("eager")
    with torch.no_grad():
        expected, _ = logits_of(
            family.model, hand, [], [columns], set(), chain.compressors[1], family.sees_prompt_both_ways
        )
    family.model.set_attn_implementation("sdpa")
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [n for n in ("qwen2_5_vl", "llava_onevision", "video_llava") if n in FAMILIES])
def test_the_frames_of_a_video_are_one_sequence(name):
    """A newline ends LLaVA-OneVision's videos, and skips the layers. Video-LLaVA's LLM sees a CLS for each frame."""
    family, method = FAMILIES[name](), VCC(block=5, fine=1, layer=1)
    one = family.batch([1, "video", 5, 6])
    with vlmzip.attach(family.model, method) as compressed, torch.no_grad():
        got = compressed(**one).logits[0]
        together = compressed(**family.batch([1, "video", 5, 6], [3, "video", 7])).logits[0]
    columns = (one["input_ids"][0] == VIDEO_TOKEN).nonzero()[:, 0].tolist()
    newlines = columns[-1:] if name == "llava_onevision" else []
    family.model.set_attn_implementation("eager")
    with torch.no_grad():
        expected, saw = logits_of(family.model, one, [], [columns], newlines, method)
    assert saw[-1] < len(expected)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(together[-len(got) :], got, atol=2e-5, rtol=0)


def test_nothing_else_acts_inside_the_llm():
    with pytest.raises(UserError, match="vcc restores the tokens after each layer, so no other method can act inside"):
        Chain(compressors=(FastV(layer=1), VCC()))


def test_flash_attention_is_refused():
    family = FAMILIES["llava"]()
    with vlmzip.attach(family.model, VCC(block=4, layer=1)) as compressed:
        family.model.config.text_config._attn_implementation_internal = "flash_attention_2"
        with pytest.raises(UserError, match=r"FlashAttention cannot do.*attn_implementation='sdpa' or 'eager'"):
            compressed(**family.batch(ROWS[0]))


def test_the_hooks_leave_with_the_facade():
    family = FAMILIES["llava"]()

    def hooks():
        return [h for m in family.model.modules() for h in m._forward_hooks.values() if isinstance(h, RestoreHook)]

    with vlmzip.attach(family.model, VCC(block=4, layer=1)):
        assert len(hooks()) == 4
    assert not hooks()


@dataclass(frozen=True, kw_only=True)
class Listener(Compressor):
    """Keep all tokens but the first, and remember the question's attention to each of them."""

    needs = frozenset({Signal.CANDIDATE_ATTENTION})
    sites = (Site.IN_LLM,)
    site: Site = Site.IN_LLM
    layer: int = 2

    def assign(self, tokens):
        HEARD.append(tokens.candidate_attention)
        return TokenMap.keep(torch.arange(tokens.features.shape[1]).expand(len(tokens.features), -1) > 0)


HEARD: list[torch.Tensor] = []


def test_candidate_attention_after_another_compressor():
    """By default the question attends to each remaining token, as that layer would."""
    family = FAMILIES["llava"]()
    llm, entered = family.model.model.language_model, []
    handle = llm.layers[2].register_forward_pre_hook(lambda _layer, args: entered.append(args[0][0]))
    HEARD.clear()
    with vlmzip.attach(family.model, Chain(compressors=(RaggedInside(layer=1), Listener()))) as compressed:
        one = family.batch([1, "image", 5, 6, 7])
        with torch.no_grad():
            compressed(**one)
    handle.remove()
    (hidden,) = entered
    pairs = len(hidden) - 4
    columns = [0, *range(2, 2 + 2 * pairs, 2), 37, 38, 39]
    names = range(len(columns))
    tables = llm.rotary_emb(hidden[None], position_ids=torch.tensor([columns]))
    places = (dict(zip(names, table[0], strict=True)) for table in tables)
    with torch.no_grad():
        states = dict(enumerate(hidden))
        expected = scores_of(llm.layers[2], states, *places, names[-3:], names[1:-3])
    assert HEARD[0].shape == (1, 3, pairs)
    torch.testing.assert_close(HEARD[0][0].mean(0), torch.tensor(expected))
