"""Prompts that take more positions than the LLM has: counted as the LLM counts them, and said once."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, Gemma3TextConfig, LlamaConfig, Qwen2Config

import vlmzip
from tests.families import FAMILIES
from tests.runtime.ragged import Ragged
from tests.tiny import skip_without
from vlmzip import Downsample, FastV, NoCompression, VisionZip
from vlmzip.errors import BeyondPositions, telling_beyond_positions
from vlmzip.models import family_of
from vlmzip.runtime.position_limit import llm_positions, warn_beyond

ROWS = ([1, "image", 5, 6, 7], [1, "image", 4, "image", 5], [1, 2, 3, 4], ["image", 8])
GREEDY = {"do_sample": False}


def limit(model, positions):
    """Give the model's LLM so many positions; weights and rotary embeddings stay as they are."""
    model.config.get_text_config().max_position_embeddings = positions


def said(work):
    """What is said about positions while `work` is done."""
    found: list[str] = []
    with warnings.catch_warnings(), telling_beyond_positions(found.append):
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("always", BeyondPositions)
        work()
    return found


# --- how many the LLM has -----------------------------------------------------------------------------------------


def scaled(kind, **settings):
    return {"rope_type": kind, "rope_theta": 10000.0, **settings}


LONG = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        (None, 100),
        (scaled("default"), 100),
        (scaled("linear", factor=4.0), 400),
        (scaled("dynamic", factor=2.0), 200),
        (scaled("yarn", factor=4.0), 400),
        (scaled("yarn", factor=4.0, original_max_position_embeddings=25), 100),
        (scaled("llama3", factor=8.0, original_max_position_embeddings=10, low_freq_factor=1, high_freq_factor=4), 100),
        (scaled("longrope", original_max_position_embeddings=50, **LONG), 100),
    ],
)
def test_scaled_positions_reach_farther(rope, expected):
    config = LlamaConfig(
        hidden_size=32, num_attention_heads=4, max_position_embeddings=100, rope_parameters=rope, vocab_size=8
    )
    assert llm_positions(SimpleNamespace(llm_config=config)) == expected


def test_several_axes_are_no_scaling():
    config = Qwen2Config(max_position_embeddings=100, rope_parameters=scaled("default", mrope_section=[2, 1, 1]))
    assert llm_positions(SimpleNamespace(llm_config=config)) == 100


def test_the_layers_that_reach_least_far_decide():
    rope = {"sliding_attention": scaled("default"), "full_attention": scaled("linear", factor=8.0)}
    config = Gemma3TextConfig(max_position_embeddings=100, rope_parameters=rope)
    assert llm_positions(SimpleNamespace(llm_config=config)) == 100


def test_a_config_may_not_say():
    silent = SimpleNamespace(llm_config=SimpleNamespace(), model=None)
    assert llm_positions(silent) is None
    assert said(lambda: warn_beyond(silent, NoCompression(), [10**9], original=False)) == []


# --- how many a prompt takes --------------------------------------------------------------------------------------

METHODS = {
    "plain": NoCompression(),
    "contiguous": Ragged(positions="contiguous"),
    "original": Ragged(positions="original"),
    "smaller images": Downsample(keep=4),
    "in the LLM": FastV(keep=4, layer=2),
}


@pytest.mark.crossed(method=[METHODS["contiguous"], METHODS["in the LLM"]], generating=[True])
@pytest.mark.parametrize("generating", [False, True], ids=["forward", "generate"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_report_counts_what_the_llm_counts(fresh, method, generating):
    """Each row alone: the positions that enter the LLM are caught, and the last of them is the count."""
    skip_without(fresh, method.site)
    llm, seen = family_of(fresh.model).llm, []

    def catch(_module, _args, kwargs):
        positions, length = kwargs.get("position_ids"), kwargs["inputs_embeds"].shape[1]
        seen.append(torch.arange(length) if positions is None else positions)

    together, taken = fresh.batch(*ROWS), []
    handle = llm.register_forward_pre_hook(catch, with_kwargs=True)
    with vlmzip.attach(fresh.model, method) as compressed:
        for row, parts in enumerate(ROWS):
            seen.clear()
            inputs = fresh.batch(parts, first_image=sum(other.count("image") for other in ROWS[:row]))
            compressed.generate(**inputs, max_new_tokens=1, **GREEDY) if generating else compressed(**inputs)
            taken.append(int(seen[0].max()) + 1 - fresh.first_position)
            assert compressed.report.positions == taken[-1:]
        compressed.generate(**together, max_new_tokens=1, **GREEDY) if generating else compressed(**together)
        assert compressed.report.positions == taken
    handle.remove()


# --- what is said -------------------------------------------------------------------------------------------------


@pytest.mark.crossed(method=[METHODS["contiguous"], METHODS["in the LLM"]])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_one_position_too_many_is_said(fresh, method):
    skip_without(fresh, method.site)
    inputs = fresh.batch(*ROWS)
    compressed = vlmzip.attach(fresh.model, method)
    compressed(**inputs)
    most = max(compressed.report.positions)
    limit(fresh.model, most)
    assert said(lambda: compressed(**inputs)) == []
    assert said(lambda: compressed.generate(**inputs, max_new_tokens=1, **GREEDY)) == []
    limit(fresh.model, most - 1)
    (text,) = said(lambda: compressed(**inputs))
    assert f"takes {most:,} positions and the LLM has {most - 1:,}: the answer may be wrong" in text
    compressed.detach()


def test_axes_that_advance_slowly_count_less_than_tokens():
    family = FAMILIES["qwen2_5_vl"]()
    inputs = family.batch([1, "image", 4, "image", 5])
    whole = vlmzip.attach(family.model, NoCompression())
    whole(**inputs)
    (taken,) = whole.report.positions
    assert taken < inputs["input_ids"].shape[1]
    limit(family.model, taken)
    assert said(lambda: whole(**inputs)) == []


def test_it_is_said_once_for_each_model_and_compressor(fresh):
    inputs = fresh.batch(*ROWS)
    limit(fresh.model, 8)
    whole, compressed = vlmzip.attach(fresh.model, NoCompression()), vlmzip.attach(fresh.model, VisionZip(keep=12))
    assert len(said(lambda: [whole(**inputs) for _ in range(3)])) == 1
    assert len(said(lambda: [compressed.generate(**inputs, max_new_tokens=2, **GREEDY) for _ in range(3)])) == 1
    again = vlmzip.attach(fresh.model, VisionZip(keep=12))
    assert said(lambda: again(**inputs)) == []
    other = type(fresh)()
    limit(other.model, 8)
    assert len(said(lambda: vlmzip.attach(other.model, VisionZip(keep=12))(**inputs))) == 1


def test_of_a_plain_prompt_alone_that_is_too_long_alone():
    family = FAMILIES["llava"]()
    inputs = family.batch(ROWS[0])
    limit(family.model, 20)
    assert said(lambda: vlmzip.attach(family.model, VisionZip(keep=12))(**inputs)) == []
    (text,) = said(lambda: vlmzip.attach(family.model, NoCompression())(**inputs))
    assert text == (
        "without compression the prompt takes 40 positions and the LLM has 20: the answer may be wrong;"
        " give fewer images or less text"
    )


@pytest.mark.parametrize(
    ("method", "advised"),
    [
        (VisionZip(keep=30), True),
        (VisionZip(keep=30, positions="original"), False),  # they keep their positions
        (FastV(keep=8, layer=2), False),  # all of them enter the LLM
        (NoCompression(), False),
    ],
)
def test_fewer_visual_tokens_are_advised_where_they_help(method, advised):
    family = FAMILIES["llava"]()
    limit(family.model, 20)
    (text,) = said(lambda: vlmzip.attach(family.model, method)(**family.batch(ROWS[0])))
    assert ("keep fewer visual tokens" in text) is advised


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_answers_that_grow_beyond(fresh, how):
    """The last token of an answer does not go through the LLM: six of them take five positions."""
    inputs = fresh.batch([1, "image", 5, 6, 7], [1, 2, 3, 4])
    compressed = vlmzip.attach(fresh.model, VisionZip(keep=12))
    answer = lambda: compressed.generate(**inputs, max_new_tokens=6, min_new_tokens=6, **GREEDY, **how)  # noqa: E731
    answer()
    most = max(compressed.report.positions) + 5
    limit(fresh.model, most)
    assert said(answer) == []
    limit(fresh.model, most - 1)
    (text,) = said(answer)
    assert f"the prompt and its answer take {most} positions and the LLM has {most - 1}" in text
    assert "ask for a shorter answer" in text


def test_short_answers_of_long_prompts_do_not_grow_beyond():
    """A row that ends at once, beside a short prompt whose answer is long."""
    family = FAMILIES["llava"]()
    inputs = family.batch([1, "image", 5, 6, 7], [1, 2, 3])
    compressed = vlmzip.attach(family.model, VisionZip(keep=12))

    class EndLongRow:
        def __call__(self, ids, scores):
            scores[0, 2] = 1e9  # the end of text
            scores[1, 2] = -1e9
            return scores

    limit(family.model, 18)  # the long prompt takes 16
    assert (
        said(lambda: compressed.generate(**inputs, max_new_tokens=10, logits_processor=[EndLongRow()], **GREEDY)) == []
    )


def test_turns_on_a_cache_add_up():
    family = FAMILIES["llava"]()
    compressed = vlmzip.attach(family.model, VisionZip(keep=12))
    cache, one = DynamicCache(), {"max_new_tokens": 1, "do_sample": False}
    limit(family.model, 19)
    assert said(lambda: compressed.generate(**family.batch(ROWS[0]), past_key_values=cache, **one)) == []  # 16 and 1
    assert said(lambda: compressed.generate(torch.tensor([[9, 9]]), past_key_values=cache, **one)) == []  # 2 and 1 more
    (text,) = said(lambda: compressed.generate(torch.tensor([[9]]), past_key_values=cache, **one))
    assert "takes 21 positions" in text


def test_other_warnings_go_where_they_went():
    with pytest.warns(DeprecationWarning, match="old"), telling_beyond_positions(lambda _: pytest.fail("not ours")):
        warnings.warn("old", DeprecationWarning, stacklevel=1)
