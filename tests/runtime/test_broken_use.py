"""Mistakes, exceptions and interruptions, in every family: a clear sentence, and the model afterwards as before."""

import copy
import dataclasses

import pytest
import torch

import vlmzip
from tests.families import FAMILIES
from tests.tiny import IMAGE_TOKEN
from vlmzip import FastV, Site, UserError, VisionZip
from vlmzip.compressor import Compressor
from vlmzip.models import family_of

ONE = [1, "image", 5]
GREEDY = {"max_new_tokens": 3, "do_sample": False}


def hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
    return {name: [len(getattr(module, kind)) for kind in kinds] for name, module in model.named_modules()}


@pytest.fixture
def unchanged(family):
    """The model before the test and after it must agree in weights, hooks and answers."""
    model = copy.deepcopy(family.model)
    inputs = family.batch(ONE)
    before = model.generate(**inputs, **GREEDY)
    state, hooked = {n: p.clone() for n, p in model.state_dict().items()}, hooks(model)
    yield model
    assert hooks(model) == hooked
    assert all(torch.equal(p, state[n]) for n, p in model.state_dict().items())
    assert torch.equal(model.generate(**inputs, **GREEDY), before)


def test_what_is_no_model_is_refused(family, unchanged):
    with pytest.raises(UserError, match="must be a loaded model, got 'some/name'; load it first"):
        vlmzip.attach("some/name", VisionZip())
    with pytest.raises(UserError, match="has no head that answers"):
        vlmzip.attach(unchanged.model, VisionZip())


def test_patches_without_or_with_other_sizes_are_refused():
    family = FAMILIES["qwen2_5_vl"]()
    inputs, compressed = family.batch(ONE), vlmzip.attach(family.model, VisionZip(keep=8))
    with pytest.raises(UserError, match="image_grid_thw is missing"):
        compressed(**without(inputs, "image_grid_thw"))
    with pytest.raises(UserError, match="image_grid_thw describes"):
        compressed(**inputs | {"image_grid_thw": inputs["image_grid_thw"] * 2})


def test_assisted_decoding_by_early_exit_is_refused(family, unchanged):
    with pytest.raises(UserError, match="assisted decoding is not supported"):
        vlmzip.attach(unchanged, VisionZip(keep=8)).generate(**family.batch(ONE), assistant_early_exit=1)


class Failing(Compressor):
    """Fails when it is asked, or interrupts like Ctrl-C."""

    error = RuntimeError("broken in the middle of a batch")

    def assign(self, tokens):
        raise self.error


class Interrupted(Failing):
    error = KeyboardInterrupt()


def without(inputs, name):
    return {other: value for other, value in inputs.items() if other != name}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda f: f.batch([1, IMAGE_TOKEN, 4]) | f.images(0, 1), "1 image placeholders, but its 1 image"),
        (lambda f: f.batch([1, 4, 5]) | f.images(0, 1), "has 0 image placeholders"),
        (lambda f: without(f.batch(ONE), "pixel_values"), "has image placeholders, but pixel_values is missing"),
        (lambda f: f.batch(ONE, ONE) | f.images(0, 1), r"image placeholders, but its 1 image\(s\) have"),
        (lambda f: f.batch(ONE) | {"attention_mask": torch.ones(1, 1, 38, 38)}, "attention_mask must be"),
        (lambda f: f.batch(ONE) | {"token_type_ids": torch.ones(38).long()}, "token_type_ids must be"),
        (lambda f: without(f.batch(ONE), "input_ids"), "give input_ids together with the images"),
        (lambda f: f.batch(ONE) | {"input_ids": f.batch(ONE)["input_ids"][0]}, r"input_ids must be a tensor \[batch"),
        (lambda f: f.batch(ONE) | {"attention_mask": torch.ones(1, 5)}, "attention_mask must be"),
        (lambda f: f.batch(ONE) | {"pixel_values": f.batch(ONE)["pixel_values"][:0]}, "pixel_values is empty"),
        (
            lambda f: f.batch(ONE) | {"logits_to_keep": torch.tensor([3])},
            "logits_to_keep must be a number",
        ),
    ],
)
def test_inputs_that_do_not_match(family, unchanged, wrong, message):
    compressed = vlmzip.attach(unchanged, VisionZip(keep=8))
    for call in (compressed, compressed.generate):
        with pytest.raises(UserError, match=message):
            call(**wrong(family))


@pytest.mark.parametrize("compressor", [Failing(), VisionZip(keep=8), FastV(keep=8, layer=1)])
def test_an_exception_in_the_middle_of_a_batch(family, unchanged, compressor):
    """In the selection, or behind it in the second layer of the LLM."""

    def fail(*_):
        raise Failing.error

    handle = family_of(unchanged).decoder_layers[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"), vlmzip.attach(unchanged, compressor) as compressed:
        compressed.generate(**family.batch(ONE, ONE), **GREEDY)
    handle.remove()


def test_ctrl_c_in_generate(family, unchanged):
    compressed = vlmzip.attach(unchanged, Interrupted())
    with pytest.raises(KeyboardInterrupt):
        compressed.generate(**family.batch(ONE), **GREEDY)


def test_ctrl_c_while_decoding(family, unchanged):
    from transformers import StoppingCriteria

    class Stop(StoppingCriteria):
        def __call__(self, *_, **__):
            raise KeyboardInterrupt

    compressed = vlmzip.attach(unchanged, VisionZip(keep=8))
    with pytest.raises(KeyboardInterrupt):
        compressed.generate(**family.batch(ONE), **GREEDY, stopping_criteria=[Stop()])


def test_attach_twice_and_detach_twice(family, unchanged):
    compressed = vlmzip.attach(unchanged, VisionZip(keep=8))
    with pytest.raises(UserError, match="already has a compressor"):
        vlmzip.attach(compressed, VisionZip(keep=4))
    assert compressed.detach() is unchanged
    assert compressed.detach() is unchanged
    with pytest.raises(UserError, match="was detached"):
        compressed(**family.batch(ONE))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_attach_around_peft_around_a_facade(unchanged):
    from peft import LoraConfig, get_peft_model

    around = get_peft_model(
        vlmzip.attach(copy.deepcopy(unchanged), VisionZip(keep=8)), LoraConfig(target_modules=["q_proj"])
    )
    with pytest.raises(UserError, match="already has a compressor"):
        vlmzip.attach(around, VisionZip(keep=4))


def test_attach_leaves_the_mode_of_every_part(unchanged):
    unchanged.train()
    tower = next(
        module for name, module in unchanged.named_modules() if name.endswith(("vision_tower", "image_tower", "visual"))
    )
    tower.eval()
    compressed = vlmzip.attach(unchanged, VisionZip(keep=8))
    assert compressed.training
    assert unchanged.lm_head.training
    assert not tower.training
    unchanged.eval()


def test_images_that_a_later_turn_has_no_place_for(family, unchanged):
    from transformers import DynamicCache

    compressed, cache = vlmzip.attach(unchanged, VisionZip(keep=8)), DynamicCache()
    compressed.generate(**family.batch(ONE), **GREEDY, past_key_values=cache)
    with pytest.raises(UserError, match="has 0 image placeholders"):
        compressed.generate(**family.batch([4, 5]), **family.images(0, 1), **GREEDY, past_key_values=cache)


def test_a_method_that_keeps_nothing(family, unchanged):
    class Nothing(Compressor):
        def assign(self, tokens):
            return vlmzip.TokenMap.keep(torch.zeros(tokens.features.shape[:2], dtype=torch.bool))

    with pytest.raises(UserError, match="left no token"):
        vlmzip.attach(unchanged, Nothing())(**family.batch(ONE))


def test_a_method_that_adds_a_token_to_several_outputs_inside_the_llm(family, unchanged):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Adds(Compressor):
        sites = (Site.IN_LLM,)
        site: Site = Site.IN_LLM
        layer: int = 2

        def assign(self, tokens):
            token_map = vlmzip.TokenMap.keep((torch.arange(tokens.features.shape[1]) < 3)[None])
            return dataclasses.replace(token_map, added=torch.zeros(1, 3, tokens.features.shape[1]))

    with pytest.raises(UserError, match="adds a token to several outputs, which works before the LLM only"):
        vlmzip.attach(unchanged, Adds().placed(family_of(unchanged).profile()))(**family.batch(ONE))


def test_a_generation_config_set_on_the_facade_counts(family, unchanged):
    from transformers import GenerationConfig

    compressed, old = vlmzip.attach(unchanged, VisionZip(keep=8)), unchanged.generation_config
    compressed.generation_config = GenerationConfig(max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    inputs = family.batch(ONE)
    assert compressed.generate(**inputs).shape[1] == inputs["input_ids"].shape[1] + 3
    assert unchanged.generation_config.max_new_tokens == 3
    unchanged.generation_config = old


def test_attach_inside_on(family, unchanged):
    """Two façades on one model, one inside the other's block: each keeps its own budget."""
    inputs = family.batch(ONE)
    with vlmzip.attach(unchanged, VisionZip(keep=8)) as outer:
        inner = vlmzip.attach(unchanged, VisionZip(keep=6))
        with torch.no_grad():
            assert inner(**inputs).logits.shape[1] == 8
            assert outer(**inputs).logits.shape[1] == 10
    with torch.no_grad():
        assert inner(**inputs).logits.shape[1] == 8


def test_a_site_the_model_has_not(unchanged, monkeypatch):
    monkeypatch.setattr(type(family_of(unchanged)), "sites", (vlmzip.Site.PRE_PROJECTOR,))
    with pytest.raises(UserError, match="cannot be compressed at site 'in_llm'; choose one of pre_projector"):
        vlmzip.attach(unchanged, vlmzip.FastV())


def test_a_method_inside_the_llm_without_a_layer(unchanged):
    class Inside(VisionZip):
        sites = (vlmzip.Site.IN_LLM,)

    with pytest.raises(UserError, match="needs a layer to act at"):
        vlmzip.attach(unchanged, Inside(site=vlmzip.Site.IN_LLM))


@pytest.mark.further
def test_many_images_leave_nothing_behind(family, unchanged):
    soak(family, unchanged, 100)


@pytest.mark.further
def test_five_times_as_many_leave_nothing_behind():
    family = FAMILIES["llava"]()
    soak(family, family.model, 500)


def soak(family, model, many):
    """Ask about many images: memory held by tensors, and hooks, are flat after the first few.

    Nothing waits for the garbage collector: it runs once, before the first count.
    """
    import gc

    def held():
        return sum(t.numel() for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter))

    compressed = vlmzip.attach(model, VisionZip(keep=8))
    counts = []
    for n in range(many):
        inputs = family.batch(ONE, first_image=n)
        compressed.generate(**inputs, max_new_tokens=2, do_sample=False)
        if n == 0:
            gc.collect()
            gc.disable()
        if n % 10 == 0:
            compressed(**inputs, labels=inputs["input_ids"]).loss.backward()
            compressed.zero_grad()
        if n % (many // 5) == many // 10:
            counts.append((held(), sum(map(sum, hooks(model).values()))))
    gc.enable()
    assert len(counts) == 5
    assert len(set(counts)) == 1, counts
