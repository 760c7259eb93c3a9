"""The two names of the KV cache, and calls that hooks do not understand."""

import copy
import warnings

import pytest
import torch
import transformers
from transformers import DynamicCache

import vlmzip
from vlmzip import FastV, LLaVolta, NoCompression, UserError, VisionZip
from vlmzip.runtime import versions
from vlmzip.runtime.cache_names import NAMES, cache_name, cache_of

ROWS = ([1, "image", 5, 6, 7], ["image", 8])
GREEDY = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
COMPRESSORS = [VisionZip(keep=8), FastV(keep=0.3), LLaVolta(stride=5, layer=1), NoCompression()]
#: In quick runs: one before the LLM and one inside.
pytestmark = pytest.mark.crossed(compressed=COMPRESSORS[:2])


@pytest.fixture(params=COMPRESSORS, ids=lambda compressor: compressor.name())
def compressed(family, request):
    compressed = vlmzip.attach(family.model, request.param)
    yield compressed
    compressed.detach()


@pytest.mark.filterwarnings("error::FutureWarning")
def test_generate_and_forward_take_either_name(family, compressed):
    """The same two turns under both names, whichever of them this transformers has; and no word of deprecation."""
    inputs = family.batch(*ROWS)
    fresh = compressed.generate(**inputs, **GREEDY)
    further = torch.cat([fresh, torch.tensor([[9, 4]] * 2)], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 5, dtype=torch.long)], 1)
    answers, logits = [], []
    for name in NAMES:
        cache = DynamicCache()
        assert torch.equal(compressed.generate(**inputs, **GREEDY, **{name: cache}), fresh)
        answers.append(compressed.generate(input_ids=further, attention_mask=mask, **GREEDY, **{name: cache}))
        with torch.no_grad():
            filled = cache_of(compressed(**inputs, use_cache=True))
            logits.append(compressed(input_ids=further[:, -1:], **{name: filled}).logits)
            given = DynamicCache()
            compressed(**inputs, **{name: given})
        assert given.get_seq_length() == filled.get_seq_length() - 1 > 0
    assert torch.equal(*answers)
    assert torch.equal(*logits)


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_both_names_together_are_refused(family, call):
    compressed = vlmzip.attach(family.model, VisionZip(keep=8))
    with pytest.raises(UserError, match="cache and past_key_values are two names of the KV cache"):
        getattr(compressed, call)(**family.batch(*ROWS), cache=DynamicCache(), past_key_values=DynamicCache())
    compressed(**family.batch(*ROWS), cache=None, past_key_values=DynamicCache())


def test_padded_batches_answer_as_row_by_row(family, compressed):
    """The step after the first sees the mask of the compressed cache, in every row."""
    inputs = family.batch(*ROWS)
    out = compressed.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_logits=True)
    for row, parts in enumerate(ROWS):
        one = family.batch(parts, first_image=row)
        alone = compressed.generate(**one, **GREEDY, return_dict_in_generate=True, output_logits=True)
        for together, single in zip(out.logits, alone.logits, strict=True):
            torch.testing.assert_close(together[row], single[0], atol=1e-5, rtol=0)


class Renaming:
    """Calls a module as a future transformers might: with an argument under another name."""

    def __init__(self, module, name):
        self.name = name
        module.register_forward_pre_hook(self, with_kwargs=True, prepend=True)

    def __call__(self, module, args, kwargs):
        kwargs = dict(kwargs)
        for name in NAMES if self.name == "cache" else (self.name,):
            if name in kwargs:
                kwargs[f"new_{name}"] = kwargs.pop(name)
        return args, kwargs


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("llm", "inputs_embeds"),
        ("llm", "cache"),
        ("layer", "attention_mask"),
        ("layer", "position_embeddings"),
        ("layer", "position_ids"),
    ],
)
@pytest.mark.crossed(compressor=[FastV(keep=0.3)])
@pytest.mark.parametrize("compressor", [FastV(keep=0.3), LLaVolta(stride=5, layer=1)], ids=lambda c: c.name())
def test_hooks_refuse_a_call_that_lacks_an_argument(family, compressor, module, name):
    """A default would be a guess, such as "no padding" for a mask under a new name."""
    compressed = vlmzip.attach(copy.deepcopy(family.model), compressor)
    llm = compressed.inner.model.language_model
    Renaming(llm if module == "llm" else llm.layers[compressor.layers[0]], name)
    words = "cache or past_key_values" if name == "cache" else name
    with pytest.raises(UserError, match=f"was called without {words}: transformers .* may have changed it"):
        compressed.generate(**family.batch(*ROWS), **GREEDY)


def test_a_model_without_a_known_cache_is_refused(family):
    model = copy.deepcopy(family.model)
    model.forward = lambda input_ids, kv=None: None
    with pytest.raises(UserError, match="takes no KV cache named cache or past_key_values"):
        vlmzip.attach(model, VisionZip(keep=8))
    assert cache_name(family.model) in NAMES


def test_a_model_that_would_swallow_the_features_is_refused(family):
    """Under a new name for `mm_encoder_outputs`, a model with `**kwargs` would answer without images."""
    model = copy.deepcopy(family.model)
    compressed = vlmzip.attach(model, VisionZip(keep=8))
    model.forward = lambda input_ids, past_key_values=None, **kwargs: None
    with pytest.raises(UserError, match="forward takes no mm_encoder_outputs"):
        compressed(**family.batch(*ROWS))


@pytest.mark.parametrize(("version", "noted"), [("5.24.9", False), ("5.25.0.dev0", True), ("6.0.0", True)])
def test_one_note_on_a_version_newer_than_any_tested(llava, monkeypatch, version, noted):
    monkeypatch.setattr(transformers, "__version__", version)
    versions._warn.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            vlmzip.attach(llava, VisionZip(keep=8))
    versions._warn.cache_clear()
    words = [str(warning.message) for warning in caught if "is newer" in str(warning.message)]
    expected = f"vlmzip is tested with transformers 5.18 to 5.24; {version} is newer and may behave differently"
    assert words == [expected] * noted
