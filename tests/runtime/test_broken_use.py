"""Mistakes, exceptions and interruptions: a clear sentence, and the model afterwards as before."""

import copy

import pytest
import torch

import vlmzip
from tests.tiny import IMAGE_TOKEN, batch, prompt
from vlmzip import UserError, VisionZip
from vlmzip.compressor import Compressor

ONE = prompt(1, "image", 5)
GREEDY = {"max_new_tokens": 3, "do_sample": False}


def hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
    return {name: [len(getattr(module, kind)) for kind in kinds] for name, module in model.named_modules()}


@pytest.fixture
def unchanged(llava):
    """The model before the test and after it must agree in weights, hooks and answers."""
    model = copy.deepcopy(llava)
    inputs = batch(ONE, pictures=1)
    before = model.generate(**inputs, **GREEDY)
    state, hooked = {n: p.clone() for n, p in model.state_dict().items()}, hooks(model)
    yield model
    assert hooks(model) == hooked
    assert all(torch.equal(p, state[n]) for n, p in model.state_dict().items())
    assert torch.equal(model.generate(**inputs, **GREEDY), before)


class Failing(Compressor):
    """Fails when it is asked, or interrupts like Ctrl-C."""

    error = RuntimeError("broken in the middle of a batch")

    def assign(self, tokens):
        raise self.error


class Interrupted(Failing):
    error = KeyboardInterrupt()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({**batch([1, IMAGE_TOKEN, 4], pictures=1)}, "1 image placeholders, but its 1 picture"),
        ({**batch([1, 4, 5], pictures=1)}, "0 image placeholders"),
        ({**batch(ONE)}, "no pixel_values"),
        ({**batch(ONE, ONE, pictures=1)}, "72 image placeholders"),
        ({**batch(ONE, pictures=1), "attention_mask": torch.ones(1, 1, 38, 38)}, "attention_mask must be"),
        ({**batch(ONE, pictures=1), "token_type_ids": torch.ones(38).long()}, "token_type_ids must be"),
    ],
)
def test_inputs_that_do_not_match(unchanged, inputs, message):
    small = vlmzip.attach(unchanged, VisionZip(keep=8))
    for call in (small, small.generate):
        with pytest.raises(UserError, match=message):
            call(**inputs)


def test_an_exception_in_the_middle_of_a_batch(unchanged):
    with pytest.raises(RuntimeError, match="in the middle"), Failing().on(unchanged) as small:
        small.generate(**batch(ONE, ONE, pictures=2), **GREEDY)


def test_ctrl_c_in_generate(unchanged):
    small = vlmzip.attach(unchanged, Interrupted())
    with pytest.raises(KeyboardInterrupt):
        small.generate(**batch(ONE, pictures=1), **GREEDY)


def test_ctrl_c_while_decoding(unchanged):
    from transformers import StoppingCriteria

    class Stop(StoppingCriteria):
        def __call__(self, *_, **__):
            raise KeyboardInterrupt

    small = vlmzip.attach(unchanged, VisionZip(keep=8))
    with pytest.raises(KeyboardInterrupt):
        small.generate(**batch(ONE, pictures=1), **GREEDY, stopping_criteria=[Stop()])


def test_attach_twice_and_detach_twice(unchanged):
    small = vlmzip.attach(unchanged, VisionZip(keep=8))
    with pytest.raises(UserError, match="already has a compressor"):
        vlmzip.attach(small, VisionZip(keep=4))
    assert small.detach() is unchanged
    assert small.detach() is unchanged
    with pytest.raises(UserError, match="was detached"):
        small(**batch(ONE, pictures=1))


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
    unchanged.model.vision_tower.eval()
    small = vlmzip.attach(unchanged, VisionZip(keep=8))
    assert small.training
    assert unchanged.lm_head.training
    assert not unchanged.model.vision_tower.training
    unchanged.eval()


def test_pictures_that_a_later_turn_has_no_place_for(unchanged):
    from transformers import DynamicCache

    small, cache = vlmzip.attach(unchanged, VisionZip(keep=8)), DynamicCache()
    small.generate(**batch(ONE, pictures=1), **GREEDY, past_key_values=cache)
    with pytest.raises(UserError, match="has 0 image placeholders"):
        small.generate(**batch([4, 5], pictures=1), **GREEDY, past_key_values=cache)


def test_a_method_that_keeps_nothing(unchanged):
    class Nothing(Compressor):
        def assign(self, tokens):
            return vlmzip.TokenMap.keep(torch.zeros(tokens.features.shape[:2], dtype=torch.bool))

    with pytest.raises(UserError, match="left no token"):
        vlmzip.attach(unchanged, Nothing())(**batch(ONE, pictures=1))


def test_a_generation_config_set_on_the_facade_counts(unchanged):
    from transformers import GenerationConfig

    small, old = vlmzip.attach(unchanged, VisionZip(keep=8)), unchanged.generation_config
    small.generation_config = GenerationConfig(max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    inputs = batch(ONE, pictures=1)
    assert small.generate(**inputs).shape[1] == inputs["input_ids"].shape[1] + 3
    assert unchanged.generation_config.max_new_tokens == 3
    unchanged.generation_config = old


def test_attach_inside_on(unchanged):
    """Two façades on one model, one inside the other's block: each keeps its own budget."""
    inputs = batch(ONE, pictures=1)
    with VisionZip(keep=8).on(unchanged) as outer:
        inner = vlmzip.attach(unchanged, VisionZip(keep=4))
        with torch.no_grad():
            assert inner(**inputs).logits.shape[1] == 6
            assert outer(**inputs).logits.shape[1] == 10
    with torch.no_grad():
        assert inner(**inputs).logits.shape[1] == 6


def test_a_site_the_model_has_not(unchanged):
    class Inside(VisionZip):
        sites = (vlmzip.Site.IN_LLM,)
        site = vlmzip.Site.IN_LLM

    compressor = Inside(site=vlmzip.Site.IN_LLM)
    with pytest.raises(UserError, match="has no site 'in_llm'"):
        vlmzip.attach(unchanged, compressor)


def test_500_pictures_leave_nothing_behind(unchanged):
    """A soak: memory held by tensors, and hooks, are flat after the first few pictures."""
    import gc

    def held():
        gc.collect()
        return sum(t.numel() for t in gc.get_objects() if isinstance(t, torch.Tensor))

    small = vlmzip.attach(unchanged, VisionZip(keep=8))
    counts = []
    for n in range(500):
        small.generate(**batch(ONE, pictures=1, seed=n), max_new_tokens=2, do_sample=False)
        if n % 100 == 49:
            counts.append((held(), sum(map(sum, hooks(unchanged).values()))))
    assert len(set(counts)) == 1, counts
