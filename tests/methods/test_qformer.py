import copy
import json
import pickle
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from transformers import AutoModelForImageTextToText, DynamicCache, PreTrainedModel

import vlmzip
from tests.families import FAMILIES, tiny_llava
from tests.methods.test_visionzip import tokens_of
from tests.references.in_llm import logits_of
from tests.references.qformer import qformer as naive
from tests.tiny import IMAGE_TOKEN, batch
from vlmzip import (
    Chain,
    Downsample,
    FastV,
    Grid,
    LLaVolta,
    Pool2d,
    Profile,
    QFormer,
    RandomTokens,
    Resampler,
    Site,
    UserError,
    VisionZip,
    catalogue,
)
from vlmzip.models import family_of

ROWS = ([1, "image", 5, 6, 7], [1, "image", 4, "image", 5], [1, 2, 3, 4], ["image", 8])
GREEDY = {"max_new_tokens": 6, "do_sample": False}
TINY = QFormer(queries=5, depth=3, width=24, heads=4)

pytestmark = [
    pytest.mark.filterwarnings("ignore:qformer is untrained"),
    # The name before transformers 5.23.
    pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing:FutureWarning"),
]


def attached(model, settings=TINY):
    """Attach with weights large enough that answers depend on the image, as after training."""
    compressed = vlmzip.attach(model, settings)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in compressed.resampler.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return compressed


# --- the module -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cross_every", [1, 2])
def test_equals_the_naive_loop(cross_every):
    settings = QFormer(queries=5, depth=3, width=24, heads=4, cross_every=cross_every)
    module = settings.build(16, 20)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
        features = torch.randn(2, 9, 16, generator=generator)
        got = module(features)
    weights = {name: value.detach() for name, value in module.named_parameters()}
    for row in range(2):
        read = naive(weights, weights["queries"], features[row], 3, 4, cross_every)
        expected = read @ weights["to_llm.weight"].T + weights["to_llm.bias"]
        torch.testing.assert_close(got[row], expected, atol=1e-5, rtol=1e-5)


def test_the_papers_parameter_counts():
    with torch.device("meta"):
        from vlmzip.methods.qformer import QFormerModule

        blip2 = QFormerModule(QFormer(), 1408, 2560)
        llava = QFormerModule(QFormer(), 1024, 4096)
    assert sum(p.numel() for p in blip2.qformer.parameters()) == 105_137_664
    assert sum(p.numel() for p in llava.parameters()) == 104_773_120


def test_llavoltas_token_count():
    """Table 4: 1024 tokens over 32 layers, compression ratio 1800 %."""
    profile = Profile(Grid(1, 24, 24), 32)
    assert sum(QFormer().tokens_by_layer(profile)) == 1024
    assert 1 / QFormer().reached(profile) == 18


def test_initial_weights_follow_the_seed_and_nothing_else():
    before = torch.get_rng_state()
    one = TINY.build(16, 20).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(77)
    again = TINY.build(16, 20).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in one.items())
    other = QFormer(queries=5, depth=3, width=24, heads=4, seed=1).build(16, 20).state_dict()
    assert not torch.equal(one["queries"], other["queries"])
    assert len(one["queries"].unique()) == one["queries"].numel()
    matrices = [value for value in one.values() if value.ndim == 2]
    assert torch.cat([m.flatten() for m in matrices]).std().item() == pytest.approx(0.02, rel=0.05)
    assert one["qformer.layernorm.weight"].eq(1).all()
    assert one["to_llm.bias"].eq(0).all()


def test_eager_and_sdpa_agree():
    module = TINY.build(16, 20)
    features = torch.randn(2, 9, 16)
    assert module.qformer.config._attn_implementation == "sdpa"
    with torch.no_grad():
        fast = module(features)
        module.qformer.set_attn_implementation("eager")
        torch.testing.assert_close(module(features), fast, atol=1e-6, rtol=1e-5)


def test_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        module = TINY.build(16, 20).train()
        if checkpointing:
            inner = module.qformer  # the new name of transformers 5.23, or the old one
            (getattr(inner, "activation_checkpointing_enable", None) or inner.gradient_checkpointing_enable)()
        module(torch.ones(2, 9, 16)).square().sum().backward()
        gradients.append([p.grad for p in module.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


# --- settings ---------------------------------------------------------------------------------------------------


def test_json_and_pickle_round_trips():
    assert pickle.loads(pickle.dumps(TINY)) == TINY
    saved = json.loads(json.dumps(TINY.to_dict()))
    assert catalogue.make(catalogue.find(saved.pop("method")), saved) == TINY


@pytest.mark.parametrize(("keep", "queries"), [("50%", 18), ("25%", 9), (4, 4), (5000, 36)])
def test_a_budget_sets_the_queries(keep, queries):
    chosen, reached = QFormer().at_budget(keep, Profile(Grid(1, 6, 6), 4))
    assert (chosen.queries, reached) == (queries, queries / 36)


def test_more_queries_than_tokens_are_counted_as_such():
    assert QFormer(queries=72).reached(Profile(Grid(1, 6, 6), 4)) == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"queries": 0}, "queries must be a whole number from 1 to 1,000,000,000, got 0"),
        ({"depth": "two"}, "depth must be a whole number .*, got 'two'"),
        ({"heads": 5}, "width must be a multiple of heads=5, got 768"),
        ({"seed": -1}, "seed must be a whole number from 0 to .*, got -1"),
        ({"positions": "original"}, "contiguous positions only"),
        ({"site": "post_projector"}, "site must be pre_projector, got 'post_projector'"),
    ],
)
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        catalogue.make(QFormer, fields)


def test_there_is_no_token_map():
    for ask in (TINY, TINY.assign, QFormer(queries=50)):
        with pytest.raises(UserError, match="qformer has no token map"):
            ask(tokens_of())


# --- the façade ------------------------------------------------------------------------------------------------


def test_equals_a_hand_made_sequence(family):
    """The reference puts the module's tokens between embedded text by hand; only the LLM is shared."""
    compressed, model = attached(family.model), family.model
    inputs = family.batch([1, "image", 5, 6])
    with torch.no_grad():
        features = family.encoded(inputs)
        images = compressed.resampler(features).flatten(0, 1)
        embed = model.get_input_embeddings()
        sequence = torch.cat([embed(torch.tensor([1])), images, embed(torch.tensor([5, 6]))])[None]
        if family.sees_prompt_both_ways:  # embeddings alone do not mark the image
            ids = torch.tensor([[1, *[IMAGE_TOKEN] * len(images), 5, 6]])
            mm = family_of(model).encoder_outputs([images])
            expected = model(input_ids=ids, mm_encoder_outputs=mm, **family.token_types(ids, 8)).logits
        else:
            expected = model(inputs_embeds=sequence).logits
        torch.testing.assert_close(compressed(**inputs).logits, expected, atol=1e-5, rtol=0)


def alone(family, row):
    return family.batch(ROWS[row], first_image=sum(other.count("image") for other in ROWS[:row]))


def rounding(logits):
    """Return the tolerance for different orders of float32 summation, which batches and threads change."""
    return 1e-5 * float(logits.abs().max())


def test_a_row_of_a_batch_is_that_row_alone(family):
    """The batch is left-padded, has rows with two and with no images, and no two rows are equal."""
    compressed = attached(family.model)
    inputs = family.batch(*ROWS)
    width = inputs["input_ids"].shape[1]
    with torch.no_grad():
        together = compressed(**inputs).logits
    out = compressed.generate(**inputs, **GREEDY)
    assert torch.equal(out[:, :width], inputs["input_ids"])
    assert len(set(map(tuple, out[:, width:].tolist()))) > 1
    for row in range(len(ROWS)):
        one = alone(family, row)
        with torch.no_grad():
            logits = compressed(**one).logits[0]
        torch.testing.assert_close(together[row, -len(logits) :], logits, atol=rounding(logits), rtol=0)
        single = compressed.generate(**one, **GREEDY)[0, one["input_ids"].shape[1] :].tolist()
        assert out[row, width : width + len(single)].tolist() == single


def test_permuting_the_batch_permutes_the_result(family):
    compressed = attached(family.model)
    parts = [family.batch([1, "image", 5], first_image=n) for n in (0, 2)]  # of equal size in every family
    both = [{k: torch.cat([part[k] for part in order]) for k in order[0]} for order in (parts, parts[::-1])]
    with torch.no_grad():
        logits = [compressed(**inputs).logits for inputs in both]
    torch.testing.assert_close(logits[1], logits[0].flip(0), atol=rounding(logits[0]), rtol=0)
    assert (logits[0][0] - logits[0][1]).abs().max() > 1e-2


@pytest.mark.parametrize("whole", [True, False])
def test_later_turns_on_a_cache(family, whole):
    compressed, cache = attached(family.model), DynamicCache()
    first = family.batch([1, "image", 5, 6], [1, 3, "image", 7, 5, 6])
    ids = compressed.generate(**first, **GREEDY, min_new_tokens=6, past_key_values=cache)
    part = batch(*family.ids([4, "image", 6], [4, "image", 6], first_image=2))
    conversation = torch.cat([ids, part["input_ids"]], 1)
    mask = torch.cat([first["attention_mask"], torch.ones(2, 6, dtype=torch.long), part["attention_mask"]], 1)
    new = {"input_ids": conversation if whole else part["input_ids"], "attention_mask": mask}
    got = compressed.generate(**new, **family.images(2, 2), **GREEDY, past_key_values=cache)
    assert [p.after for p in compressed.report.images] == [5 * family.views(image) for image in (2, 3)]
    fresh = family.pixels([0, 2, 1, 3]) | family.token_types(conversation, first["input_ids"].shape[1])
    expected = compressed.generate(input_ids=conversation, attention_mask=mask, **fresh, **GREEDY)
    assert torch.equal(got[:, new["input_ids"].shape[1] :], expected[:, conversation.shape[1] :])


def test_gradients_reach_every_weight_and_the_encoder(family):
    compressed = attached(copy.deepcopy(family.model))
    inputs = family.batch(*ROWS)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE_TOKEN, -100)
    compressed(**inputs, labels=labels.masked_fill(inputs["attention_mask"] == 0, -100)).loss.backward()
    for name, parameter in compressed.resampler.named_parameters():
        assert parameter.grad.isfinite().all(), name
        # A key's bias shifts all scores of a query equally, so it has no effect.
        assert name.endswith("key.bias") or parameter.grad.abs().sum() > 0, name
    encoder = vlmzip.models.family_of(compressed.inner).vision_encoder
    patch = next(p for name, p in encoder.named_parameters() if "patch_emb" in name)
    assert patch.grad.abs().sum() > 0


def test_a_step_of_training_changes_the_answer(llava):
    compressed = attached(copy.deepcopy(llava))
    inputs = FAMILIES["llava"]().batch([1, "image", 5, 6])
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE_TOKEN, -100)
    optimizer = torch.optim.SGD(compressed.resampler.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = compressed(**inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize("switch", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointing_is_switched_by_the_facade(llava, switch):
    compressed, runs = attached(copy.deepcopy(llava).train()), []
    if not hasattr(PreTrainedModel, f"{switch}_enable"):
        assert not hasattr(compressed, f"{switch}_enable")
        return
    layers = {
        "qformer": compressed.resampler.qformer.encoder.layer[1],
        "llm": compressed.inner.model.language_model.layers[1],
    }
    for name, layer in layers.items():  # a part of the layer, which a recomputation calls again
        part = layer.attention if name == "qformer" else layer.self_attn
        part.register_forward_pre_hook(lambda *_, name=name: runs.append(name))
    inputs = FAMILIES["llava"]().batch(*ROWS)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE_TOKEN, -100)
    gradients = []
    for to, times in (("enable", 2), ("disable", 1)):
        getattr(compressed, f"{switch}_{to}")()
        runs.clear()
        compressed.zero_grad()
        compressed(**inputs, labels=labels).loss.backward()
        assert (runs.count("qformer"), runs.count("llm")) == (times, times)
        gradients.append([p.grad for p in compressed.resampler.parameters()])
    torch.testing.assert_close(*gradients)


def test_checkpointing_of_other_methods_is_the_models(llava):
    compressed = vlmzip.attach(copy.deepcopy(llava), VisionZip(keep=8))
    compressed.gradient_checkpointing_enable()
    assert compressed.inner.is_gradient_checkpointing


def test_precision_and_mode_follow_the_model(family):
    model = copy.deepcopy(family.model).bfloat16().train()
    compressed = vlmzip.attach(model, TINY)
    assert {p.dtype for p in compressed.resampler.parameters()} == {torch.bfloat16}
    assert compressed.resampler.training
    assert not vlmzip.attach(family.model, TINY).resampler.training
    inputs = family.batch(*ROWS)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    for _ in range(2):
        with torch.no_grad():
            out = compressed(**inputs)
        assert out.logits.dtype == torch.bfloat16
        assert out.logits.isfinite().all()
        compressed.resampler.float()  # mixed precision, as in training
    features = torch.zeros(1, 3, compressed.resampler.qformer.config.encoder_hidden_size, dtype=torch.bfloat16)
    assert compressed.resampler(features).dtype == torch.bfloat16


def test_the_weights_are_the_facades(llava):
    compressed = attached(llava)
    own = {name for name in compressed.state_dict() if name.startswith("resampler.")}
    assert {f"resampler.{name}" for name, _ in compressed.resampler.named_parameters()} == own
    assert {f"inner.{name}" for name in llava.state_dict()} | own == set(compressed.state_dict())
    assert {id(p) for p in compressed.resampler.parameters()} <= {id(p) for p in compressed.parameters()}
    inputs = FAMILIES["llava"]().batch(*ROWS)
    expected = compressed.generate(**inputs, **GREEDY)
    fresh = attached(tiny_llava())  # transformers' hooks on a model that has run cannot be pickled
    for twin in (copy.deepcopy(compressed), pickle.loads(pickle.dumps(fresh))):
        assert torch.equal(twin.generate(**inputs, **GREEDY), expected)
        assert twin.resampler.queries is not compressed.resampler.queries
    assert compressed.double().resampler.queries.dtype == torch.float64
    llava.float()


def test_the_facade_moves_as_one(family):
    compressed = attached(copy.deepcopy(family.model)).to(torch.bfloat16)
    assert {p.dtype for p in compressed.parameters()} == {torch.bfloat16}
    inputs = family.batch(*ROWS)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with torch.no_grad():
        logits = compressed(**inputs).logits
        assert torch.equal(copy.deepcopy(compressed)(**inputs).logits, logits)
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()
    assert {p.device.type for p in compressed.to("meta").resampler.parameters()} == {"meta"}


def test_it_says_that_it_is_untrained(llava):
    with pytest.warns(UserWarning, match=r"qformer is untrained: its [\d,]+ weights are random") as said:
        vlmzip.attach(llava, QFormer(queries=50, depth=1, width=8, heads=2))
    assert len(said) == 1
    assert said[0].filename == __file__


def test_report(llava):
    compressed = vlmzip.attach(llava, TINY)
    compressed.generate(**FAMILIES["llava"]().batch(*ROWS), **GREEDY)
    image = compressed.report.images[0]
    assert (image.before, image.after, image.by_layer) == (36, 5, (5, 5, 5, 5))
    assert image.token_map is None
    assert image.detail_lost is None
    assert compressed.report.retention == 5 / 36
    assert repr(compressed.report) == "Report(qformer: 36 → 5, 36 → 5, 36 → 5, 36 → 5)"
    compressed(**FAMILIES["llava"]().batch([1, "image", 5]))
    assert compressed.report.source.tolist() == [[0, 1, 8, 15, 22, 29, 37]]  # spread over the placeholders


def test_more_tokens_than_the_image_had(llava):
    compressed = attached(llava, QFormer(queries=50, depth=1, width=8, heads=2))
    inputs = FAMILIES["llava"]().batch(*ROWS)
    with torch.no_grad():
        assert compressed(**inputs).logits.shape[1] == 2 * 50 + 3
    width = inputs["input_ids"].shape[1]
    assert compressed.generate(**inputs, max_length=width + 4, min_length=width + 4).shape[1] == width + 4


def test_compress_inputs_needs_the_weights(llava):
    inputs = FAMILIES["llava"]().batch(*ROWS)
    with pytest.raises(UserError, match=r"qformer has weights: use what vlmzip\.attach returns"):
        vlmzip.compress_inputs(llava, inputs, TINY)
    compressed = attached(llava)
    with torch.no_grad():
        by_hand = llava(**vlmzip.compress_inputs(llava, inputs, TINY, resampler=compressed.resampler)).logits
        assert torch.equal(by_hand, compressed(**inputs).logits)


# --- in a chain -------------------------------------------------------------------------------------------------


def every_third(hidden, *_):
    runs = [range(start, start + 3) for start in range(0, len(hidden) - 2, 3)]
    return [[(i, 1 / 3) for i in (run[1], run[0], run[2])] for run in runs]


CHAIN = Chain(compressors=(QFormer(queries=9, depth=2, width=24, heads=4), LLaVolta(stride=3, layer=2)))


def test_a_chain_continues_inside_the_llm(family):
    """Compare a batch with the naive loop over layers, on the plain model with the Q-Former's tokens in its prompt."""
    with torch.no_grad():
        compressed = attached(family.model, CHAIN)
        together = compressed(**family.batch(*ROWS)).logits
        queries = [9 * family.views(image) for image in range(4)]
        assert [p.by_layer for p in compressed.report.images] == [(n, n, n // 3, n // 3) for n in queries]
        for row in range(len(ROWS)):
            one = vlmzip.compress_inputs(family.model, alone(family, row), CHAIN, resampler=compressed.resampler)
            columns = [range(span.columns[0], span.columns[-1] + 1) for span in one.spans]
            expected, left = logits_of(
                family.model, one, torch.tensor([], dtype=torch.long), IMAGE_TOKEN, columns, {2: every_third},
                bidirectional=family.sees_prompt_both_ways,
            )  # fmt: skip
            torch.testing.assert_close(together[row, -int(left.sum()) :], expected[left], atol=3e-5, rtol=0)


def test_a_chain_continues_behind_the_projector(llava):
    chain = Chain(compressors=(TINY, RandomTokens(keep=2, site=Site.POST_PROJECTOR)))
    compressed, inputs = attached(llava, chain), FAMILIES["llava"]().batch([1, "image", 5])
    with torch.no_grad():
        read = compressed.resampler(FAMILIES["llava"]().encoded(inputs))[0]
        out = vlmzip.compress_inputs(llava, inputs, chain, resampler=compressed.resampler)
    kept = out["mm_encoder_outputs"]["image"].pooler_output[0]
    assert len(kept) == 2
    assert all(any(torch.allclose(one, other, atol=1e-6) for other in read) for one in kept)
    (image,) = out.report.images
    assert (image.before, image.after, image.token_map, image.detail_lost) == (36, 2, None, None)


def test_turns_and_copies_of_a_chain(llava):
    compressed, cache = attached(tiny_llava(), CHAIN), DynamicCache()
    family = FAMILIES["llava"]()
    first = family.batch([1, "image", 5, 6])
    expected = compressed.generate(**first, **GREEDY)
    assert torch.equal(copy.deepcopy(compressed).generate(**first, **GREEDY), expected)
    compressed.generate(**first, **GREEDY, past_key_values=cache)
    part = batch(*family.ids([4, "image", 6], first_image=1))
    ids = torch.cat([expected, part["input_ids"]], 1)
    pixels = torch.cat([family.images(n, 1)["pixel_values"] for n in (0, 1)])
    got = compressed.generate(input_ids=ids, pixel_values=pixels, **GREEDY, past_key_values=cache)
    assert torch.equal(got, compressed.generate(input_ids=ids, pixel_values=pixels, **GREEDY))


def test_a_chain_is_saved_with_its_weights(tmp_path, llava):
    with pytest.warns(UserWarning, match="qformer is untrained"):
        compressed = vlmzip.attach(llava, CHAIN)
    compressed.resampler.queries.data += 1
    compressed.save_pretrained(tmp_path)
    loaded = vlmzip.from_pretrained(tmp_path)
    assert loaded.compressor == CHAIN
    assert torch.equal(loaded.resampler.queries, compressed.resampler.queries)


def test_a_chain_counts_more_queries_than_tokens():
    profile = Profile(Grid(1, 6, 6), 4)
    chain = Chain(compressors=(QFormer(queries=50), FastV(keep=10, layer=2)))
    assert chain.tokens_by_layer(profile) == [50, 50, 10, 10]
    assert chain.token_count(profile.grid) == 50
    assert chain.at_budget("25%", profile)[0].tokens_by_layer(profile) == [9, 9, 9, 9]


@dataclass(frozen=True, kw_only=True)
class Behind(Resampler):
    sites = (Site.POST_PROJECTOR,)
    site: Site = Site.POST_PROJECTOR

    def build(self, in_dim, out_dim):
        return torch.nn.Linear(in_dim, out_dim)


@pytest.mark.parametrize(
    ("compressors", "settings", "message"),
    [
        ((TINY, FastV()), {"positions": "original"}, "qformer has contiguous positions only"),
        ((TINY, FastV(positions="original")), {}, "qformer has contiguous positions only"),
        ((Downsample(), TINY), {}, "after downsample, a chain can compress inside the LLM only"),
        ((RandomTokens(), Behind()), {}, "must come first in a chain"),
    ],
)
def test_chains_that_cannot_be_are_refused(compressors, settings, message):
    with pytest.raises(UserError, match=message):
        Chain(compressors=compressors, **settings)


@pytest.mark.parametrize("second", [Pool2d(site=Site.POST_PROJECTOR), LLaVolta(window="2d", stride=2, layer=1)])
def test_as_many_queries_as_tokens_lie_on_no_grid(llava, second):
    compressed = attached(llava, Chain(compressors=(QFormer(queries=36, depth=1, width=8, heads=2), second)))
    with pytest.raises(UserError, match="grid"):
        compressed(**FAMILIES["llava"]().batch([1, "image", 5]))


# --- saving -----------------------------------------------------------------------------------------------------

LOAD = """
import sys, torch, vlmzip
compressed = vlmzip.from_pretrained(sys.argv[1])
inputs = torch.load(sys.argv[2], weights_only=True)
torch.save(compressed.generate(**inputs, max_new_tokens=6, do_sample=False), sys.argv[3])
"""


@pytest.mark.further
def test_trained_weights_come_back_in_a_fresh_process(tmp_path, llava):
    compressed = attached(llava)
    inputs = FAMILIES["llava"]().batch(*ROWS)
    compressed.save_pretrained(tmp_path / "saved")
    assert {p.suffix for p in (tmp_path / "saved").iterdir()} == {".json", ".safetensors"}
    torch.save(inputs, tmp_path / "inputs")
    files = [str(tmp_path / name) for name in ("saved", "inputs", "answer")]
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", LOAD, *files], check=True)
    expected = compressed.generate(**inputs, **GREEDY)
    assert torch.equal(torch.load(tmp_path / "answer", weights_only=True), expected)
    assert not torch.equal(vlmzip.attach(llava, TINY).generate(**inputs, **GREEDY), expected)


def test_a_state_dict_that_a_trainer_passes_is_what_is_saved(tmp_path, llava):
    compressed = attached(llava)
    state = {name: value + 1 for name, value in compressed.state_dict().items()}
    compressed.save_pretrained(tmp_path, state_dict=state)
    _, told = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["unexpected_keys"]
    loaded = vlmzip.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(value, loaded[name]) for name, value in state.items())


def test_plain_transformers_loads_the_model_alone(tmp_path, llava):
    attached(llava).save_pretrained(tmp_path)
    loaded, told = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["unexpected_keys"]
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in llava.state_dict().items())


def test_weights_keep_the_precision_they_were_saved_in(tmp_path, llava):
    compressed = attached(copy.deepcopy(llava).bfloat16())
    compressed.resampler.float().queries.data += 1e-4  # bfloat16 cannot represent it
    compressed.save_pretrained(tmp_path)
    loaded = vlmzip.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert all(torch.equal(v, loaded.resampler.state_dict()[n]) for n, v in compressed.resampler.state_dict().items())
    assert loaded.resampler.queries.requires_grad


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda path: path.unlink(), r"there is no resampler\.safetensors"),
        (lambda path: path.write_bytes(b"PK\x03\x04 no tensors"), "cannot be read"),
        (lambda path: _change_json(path, queries=6), r"queries is \(5, 24\), not \(6, 24\)"),
        (lambda path: _change_json(path, depth=4), r"layer\.3\..* is none, not"),
        (lambda path: _change_json(path, depth=2), r"layer\.2\..*, not none"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, llava, break_it, message):
    attached(llava).save_pretrained(tmp_path)
    break_it(tmp_path / "resampler.safetensors")
    with pytest.raises(UserError, match=message) as error:
        vlmzip.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def _change_json(path, **fields):
    file = path.with_name("compressor.json")
    content = json.loads(file.read_text())
    content["fields"] |= fields
    file.write_text(json.dumps(content))
