"""Compressors inside the LLM against the oracle: dropping is masking, merging is writing at the anchor's place."""

import copy
import pickle
import time
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from transformers import DynamicCache

import vlmzip
from tests.families import FAMILIES, tiny_llava
from tests.references.dart import dart
from tests.references.in_llm import logits_of
from tests.references.kmeans import kmeans
from tests.references.sparsevlm import raters, sparsevlm
from tests.tiny import IMAGE_TOKEN, batch, prompt
from vlmzip import (
    DART,
    Chain,
    FastV,
    KMeans,
    LLaVolta,
    Pool2d,
    PyramidDrop,
    RandomTokens,
    Signal,
    Site,
    SparseVLM,
    TokenMap,
    UserError,
    VisionZip,
)
from vlmzip.compressor import Compressor, keep_all
from vlmzip.models import family_of
from vlmzip.runtime.in_llm.hooks import LayerHook, LLMHook

#: In quick runs: one that drops and one that merges.
pytestmark = pytest.mark.crossed(case=["fastv", "ragged merging"])

TOWERS = ("vision_tower", "image_tower", "visual")
ROWS = ([1, "image", 5, 6, 7], [1, "image", 4, "image", 5], [1, 2, 3, 4], ["image", 8], [1, 7, "image"])
STEPS = 16


@dataclass(frozen=True, kw_only=True)
class RaggedInside(Compressor):
    """Averages neighbours in pairs, as many as the image's tokens say, anchored at the second; drops the rest."""

    sites = (Site.IN_LLM,)
    site: Site = Site.IN_LLM
    layer: int = 1

    def assign(self, tokens):
        features = tokens.features
        count = pairs_of(features)
        place = torch.arange(features.shape[1]).expand(len(count), -1)
        group = torch.where(place < 2 * count[:, None], place // 2, -1)
        return TokenMap.merge(group, anchor=(group >= 0) & (place % 2 == 1))


def pairs_of(features):
    return 1 + (features[..., :2] > 0).sum((-2, -1)) % max(features.shape[-2] // 2 - 1, 1)


def fastv_rule(keep):
    def rule(hidden, attention, *_):
        ranking = sorted(range(len(hidden)), key=lambda i: -float(attention[-1, i]))
        return [[(i, 1.0)] for i in ranking[: max(1, int(keep * len(hidden) + 0.5))]]

    return rule


def pyramiddrop_rule(share):
    def rule(hidden, attention, *_):
        ranking = sorted(range(len(hidden)), key=lambda i: -float(attention[-1, i]))
        return [[(i, 1.0)] for i in ranking[: max(1, int(share * len(hidden)))]]

    rule.asks_next_layer = True
    return rule


def dart_rule(count):
    def rule(hidden, attention, image, question, *keys_and_states):
        lists = (values.tolist() for values in keys_and_states)
        return [[(n, 1.0)] for n in dart(*lists, min(count, len(hidden)))]

    return rule


def pooling_rule(stride):
    def rule(hidden, *_):
        runs = [list(range(start, start + stride)) for start in range(0, len(hidden) - stride + 1, stride)]
        return [[(i, 1 / stride) for i in (run[(stride - 1) // 2], *(j for j in run if j != run[(stride - 1) // 2]))]
                for run in runs]  # fmt: skip

    return rule


def ragged_rule(hidden, *_):
    return [[(2 * n + 1, 0.5), (2 * n, 0.5)] for n in range(int(pairs_of(hidden)))]


def random_rule(keep, seed):
    def rule(hidden, *_):
        order = torch.randperm(len(hidden), generator=torch.Generator().manual_seed(seed))
        return [[(int(i), 1.0)] for i in order[: int(keep * len(hidden) + 0.5)]]

    return rule


def sparsevlm_rule(count, recycle):
    def rule(hidden, attention, image, question, *_):
        return sparsevlm(hidden, attention, raters(image, question), min(count, len(hidden)), recycle)

    return rule


def kmeans_rule(clusters):
    def rule(hidden, *_):
        groups = []
        for members in kmeans(hidden - hidden.mean(0), clusters, 10):
            distance = (hidden[members] - hidden[members].mean(0)).square().sum(-1)
            # Two members are equally far from their mean but for rounding: the first of such is the anchor.
            anchor = members[int((distance <= (1 + 1e-4) * distance.min()).nonzero()[0])]
            groups.append([(i, 1 / len(members)) for i in (anchor, *(j for j in members if j != anchor))])
        return groups

    return rule


def kept_last_rule(stride):
    def rule(hidden, *_):
        runs = [list(range(start, min(start + stride, len(hidden)))) for start in range(0, len(hidden), stride)]
        middle = [run[(len(run) - 1) // 2] for run in runs]
        return [
            [(i, 1 / len(run)) for i in (m, *(j for j in run if j != m))] for run, m in zip(runs, middle, strict=True)
        ]

    return rule


def next_key(setting):
    return next(iter(setting))


CASES = {
    "fastv": (FastV(keep=0.3, layer=2), {2: fastv_rule(0.3)}),
    "fastv at 1": (FastV(keep=0.5, layer=1), {1: fastv_rule(0.5)}),
    "llavolta": (LLaVolta(stride=5, layer=2), {2: pooling_rule(5)}),
    "llavolta, layer-wise": (LLaVolta(stride=(2, 3), layer=(1, 3)), {1: pooling_rule(2), 3: pooling_rule(3)}),
    "sparsevlm": (
        SparseVLM(counts=(12, 8, 3), layer=(1, 2, 3)), 
        {layer: sparsevlm_rule(count, 0.3) for layer, count in ((1, 12), (2, 8), (3, 3))},
    ),
    "sparsevlm, all recycled": (
        SparseVLM(counts=(5, 4), layer=(1, 3), recycle=1.0), {1: sparsevlm_rule(5, 1.0), 3: sparsevlm_rule(4, 1.0)},
    ),
    "llavolta, last run kept": (LLaVolta(stride=5, layer=2, last="keep"), {2: kept_last_rule(5)}),
    "kmeans": (KMeans(keep=4, site=Site.IN_LLM, layer=2), {2: kmeans_rule(4)}),
    "chain given in reverse": (
        Chain(compressors=(FastV(keep=0.5, layer=3), LLaVolta(stride=2, layer=1))),
        {1: pooling_rule(2), 3: fastv_rule(0.5)},
    ),
    "random_tokens": (RandomTokens(keep=0.25, site=Site.IN_LLM, layer=3, seed=7), {3: random_rule(0.25, 7)}),
    "pyramiddrop": (PyramidDrop(share=0.6, layer=(1, 2, 3)), {layer: pyramiddrop_rule(0.6) for layer in (1, 2, 3)}),
    "pyramiddrop between others": (
        Chain(compressors=(RaggedInside(layer=1), PyramidDrop(layer=(2,)), FastV(keep=0.5, layer=3))),
        {1: ragged_rule, 2: pyramiddrop_rule(0.5), 3: fastv_rule(0.5)},
    ),
    "dart": (DART(keep=14, layer=2), {2: dart_rule(14)}),
    "dart after merging": (
        Chain(compressors=(RaggedInside(layer=1), DART(keep=5, layer=2))), {1: ragged_rule, 2: dart_rule(5)},
    ),
    "ragged merging": (RaggedInside(), {1: ragged_rule}),
    "chain of two layers": (
        Chain(compressors=(RaggedInside(layer=1), FastV(keep=0.5, layer=3))), {1: ragged_rule, 3: fastv_rule(0.5)},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def family(family):
    """Logits below 3, of which float32 rounds off less than the 1e-5 that the oracle allows; a norm with weights."""
    with torch.no_grad():
        weight = family.model.model.language_model.norm.weight
        weight.mul_(torch.linspace(0.1, 1, len(weight)))
        family.model.get_output_embeddings().weight.mul_(0.4)
    return family


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def alone(family, row):
    first = sum(other.count("image") for other in ROWS[:row])
    return family.batch(ROWS[row], first_image=first), columns_of(family, row, first)


def separators_of(family, row, images):
    """The columns of what ends a row of tiles."""
    first = sum(other.count("image") for other in ROWS[:row])
    return {columns[n] for image, columns in enumerate(images, first) for n in family.separators(image)}


def columns_of(family, row, first):
    columns, at = [], 0
    for part in ROWS[row]:
        size = family.tokens(first + len(columns)) if part == "image" else 1
        if part == "image":
            columns.append(range(at, at + size))
        at += size
    return columns


@pytest.mark.every_family
@pytest.mark.crossed(case=["fastv", "ragged merging"], attention=["sdpa"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_row_of_a_ragged_batch_equals_masking(family, case, attention):
    """Prefill logits and 16 decode steps with a KV cache, left-padded, against the full forward of each row alone."""
    compressor, rules = case
    family.model.set_attn_implementation(attention)
    compressed = vlmzip.attach(family.model, compressor)
    inputs = family.batch(*ROWS)
    out = compressed.generate(
        **inputs, max_new_tokens=STEPS + 1, min_new_tokens=STEPS + 1, do_sample=False,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    with torch.no_grad():
        prefill = compressed(**inputs).logits
    width = inputs["input_ids"].shape[1]
    assert torch.equal(out.sequences[:, :width], inputs["input_ids"])
    family.model.set_attn_implementation("eager")
    for row in range(len(ROWS)):
        one, images = alone(family, row)
        new = out.sequences[row, width:-1]
        expected, alive = logits_of(
            family.model, one, new, IMAGE_TOKEN, images, rules, bidirectional=family.sees_prompt_both_ways,
            separators=separators_of(family, row, images),
        )  # fmt: skip
        got = torch.stack([step[row] for step in out.logits])
        # A masked row of the reference still holds numbers of its own; only those that are left count.
        left = expected[:-STEPS][alive[:-STEPS]]
        # Where a prompt ends with an image, the last of its tokens that is left begins the answer.
        torch.testing.assert_close(got, torch.cat([left[-1:], expected[-STEPS:]]), atol=1e-5, rtol=0)
        torch.testing.assert_close(prefill[row, -len(left) :], left, atol=1e-5, rtol=0)
    family.model.set_attn_implementation("sdpa")
    compressed.detach()


def test_something_was_dropped(family, case):
    """The oracle would hold for methods that do nothing."""
    compressed = vlmzip.attach(family.model, case[0])
    inputs = family.batch(*ROWS)
    with torch.no_grad():
        logits = compressed(**inputs).logits
    report = compressed.report
    assert logits.shape[1] == report.source.shape[1] < inputs["input_ids"].shape[1]
    for image in report.images:
        first = min(case[0].layers)
        assert image.by_layer[:first] == (image.before,) * first
        assert image.by_layer[-1] == image.token_map.lengths[0] < image.before
        image.token_map.check()
    compressed.detach()


def test_without_a_cache_and_padded_on_the_right(family, case):
    compressed = vlmzip.attach(family.model, case[0])
    with torch.no_grad():
        left, right = family.batch(*ROWS), family.batch(*ROWS, pad="right")
        logits = compressed(**left).logits
        torch.testing.assert_close(compressed(**left, use_cache=False).logits, logits, atol=1e-5, rtol=0)
        mirrored = compressed(**right).logits
    source = compressed.report.source
    for row in range(len(ROWS)):
        count = int((source[row] >= 0).sum())
        # Positions count padding on the left in `forward`, so only relative positions agree: enough for rotary ones.
        torch.testing.assert_close(mirrored[row, :count], logits[row, -count:], atol=1e-5, rtol=0)
    compressed.detach()


def checkpoint(model):
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()


@pytest.mark.crossed(case=["fastv", "ragged merging"], checkpointing=[True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients(family, case, checkpointing):
    """The loss is taken on the tokens left; checkpointing computes layers again and must decide nothing anew."""
    compressor, _ = case
    model = copy.deepcopy(family.model).train()
    inputs = family.batch(*ROWS)
    inputs["labels"] = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)
    inputs["labels"][inputs["labels"] == IMAGE_TOKEN] = -100
    inputs["labels"][:, :-2] = -100
    compressed = vlmzip.attach(model, compressor)
    if checkpointing:
        checkpoint(compressed)
    out = compressed(**inputs)
    out.loss.backward()
    labels = torch.where(
        compressed.report.source < 0, -100, inputs["labels"].gather(1, compressed.report.source.clamp(min=0))
    )
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all(g.isfinite().all() for g in gradients.values())
    vision = [g.abs().sum() for name, g in gradients.items() if any(tower in name for tower in TOWERS)]
    assert sum(vision) > 0
    if checkpointing:
        return
    again = vlmzip.attach(copy.deepcopy(family.model).train(), compressor)
    checkpoint(again)
    again(**inputs).loss.backward()
    for name, parameter in again.inner.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-4)


@pytest.mark.crossed(case=["fastv", "ragged merging"], how=[{"num_beams": 3}])
@pytest.mark.parametrize("how", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True, "num_beams": 2}])
def test_beams(family, case, how):
    compressed = vlmzip.attach(family.model, case[0])
    inputs = family.batch(*ROWS[:2])
    width = inputs["input_ids"].shape[1]
    torch.manual_seed(0)
    together = compressed.generate(**inputs, max_new_tokens=5, min_new_tokens=5, **how)
    if how.get("do_sample"):
        assert len(together) == 4
        assert torch.equal(together[:, :width], inputs["input_ids"].repeat_interleave(2, 0))
        return
    for row in range(2):
        one, _ = alone(family, row)
        single = compressed.generate(**one, max_new_tokens=5, min_new_tokens=5, **how)
        assert torch.equal(together[row, width:], single[0, one["input_ids"].shape[1] :])
    assert compressed.report.retention < 1


def test_second_turn_on_one_cache_equals_a_fresh_run(family, case):
    """Turn 2 brings a new image; masks and caches of the layers behind K are as if the turns had been one."""
    compressor, _ = case
    if family.sees_prompt_both_ways:
        pytest.skip("its first turn sees the prompt both ways, which one run over both turns would not")
    needs_question = compressor.needs or any(stage.needs for stage in compressor.stages())
    if needs_question:
        pytest.skip("one run over both turns asks with the last question, two turns ask with each its own")
    compressed = vlmzip.attach(family.model, compressor)
    first, second = [1, "image", 5, 6], [7, "image", 8, 9]
    cache, how = DynamicCache(), {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    answered = compressed.generate(**family.batch(first), past_key_values=cache, **how)
    answer = answered[0, -4:].tolist()
    new = family.batch(second, first_image=1)
    ids = torch.cat([answered, new["input_ids"]], 1)
    together = {**family.batch([*first, *answer, *second])}
    assert torch.equal(ids, together["input_ids"])
    fresh = compressed.generate(**together, **how)
    continued = compressed.generate(**{**together, "input_ids": ids}, past_key_values=cache, **how)
    assert torch.equal(continued, fresh)


def test_a_turn_without_images_sees_what_the_first_left(family, case):
    compressed = vlmzip.attach(family.model, case[0])
    cache, how = DynamicCache(), {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    inputs = family.batch(*ROWS)
    answered = compressed.generate(**inputs, past_key_values=cache, **how)
    held = [layer.keys.shape[2] for layer in cache.layers]
    further = torch.cat([answered, torch.tensor([[11, 12]] * len(ROWS))], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(ROWS), 5, dtype=torch.long)], 1)
    out = compressed.generate(input_ids=further, attention_mask=mask, past_key_values=cache, **how)
    assert [layer.keys.shape[2] - before for layer, before in zip(cache.layers, held, strict=True)] == [5] * len(held)
    for row in range(len(ROWS)):
        one, _ = alone(family, row)
        own = DynamicCache()
        before = compressed.generate(**one, past_key_values=own, **how)
        again = compressed.generate(torch.cat([before, torch.tensor([[11, 12]])], 1), past_key_values=own, **how)
        assert torch.equal(again[0, -3:], out[row, -3:])


@dataclass(frozen=True, kw_only=True)
class Watching(Compressor):
    """Keeps all tokens, and notes the attention of the question's last token to those of the last image."""

    sites = (Site.IN_LLM,)
    needs = frozenset({Signal.TEXT_ATTENTION})
    site: Site = Site.IN_LLM
    layer: int = 2
    seen: ClassVar[list[torch.Tensor]] = []

    def assign(self, tokens):
        self.seen.append(tokens.text_attention[-1, -1])
        return keep_all(tokens)


class WatchingNext(Watching):
    """Notes the attention of the layer that runs next."""

    asks_next_layer = True


@pytest.mark.parametrize("watching", [Watching(), WatchingNext()], ids=lambda method: type(method).__name__)
def test_an_image_in_a_second_turn_is_asked_about_as_in_one_run(family, watching):
    """Labels end the questions of one run where the turns end. Layer 1 drops tokens, which the cache then lacks."""
    if family.sees_prompt_both_ways:
        pytest.skip("its first turn sees the prompt both ways, which one run over both turns would not")
    dropping = RandomTokens(keep=0.3, site=Site.IN_LLM, layer=1)
    compressed = vlmzip.attach(family.model, Chain(compressors=(dropping, watching)))
    first, second = [1, "image", 5, 6], [7, "image", 8, 9]
    cache, how = DynamicCache(), {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    answered = compressed.generate(**family.batch(first), past_key_values=cache, **how)
    together = family.batch([*first, *answered[0, -4:].tolist(), *second])
    labels = torch.full_like(together["input_ids"], -100)
    labels[:, answered.shape[1] - 4 : answered.shape[1]] = answered[:, -4:]
    watching.seen.clear()
    compressed.generate(**together, past_key_values=cache, **how)
    with torch.no_grad():
        compressed(**together, labels=labels)
    torch.testing.assert_close(watching.seen[0], watching.seen[-1], atol=1e-6, rtol=1e-5)


class TestHooks:
    """Hooks stand on the model as long as a façade needs them, and no longer."""

    def hooks(self, model):
        return [h for m in model.modules() for h in m._forward_pre_hooks.values() if isinstance(h, LLMHook | LayerHook)]

    def test_counted(self, llava):
        one, two = vlmzip.attach(llava, FastV()), vlmzip.attach(llava, LLaVolta(layer=1))
        assert len(self.hooks(llava)) == 5
        one.detach()
        one.detach()
        assert len(self.hooks(llava)) == 5
        two.detach()
        assert not self.hooks(llava)

    def test_go_with_the_facade(self, llava):
        compressed = vlmzip.attach(llava, FastV())
        assert self.hooks(llava)
        del compressed
        assert not self.hooks(llava)

    def test_before_the_llm_there_are_none(self, llava):
        compressed = vlmzip.attach(llava, vlmzip.VisionZip())
        assert not self.hooks(llava)
        compressed.detach()

    def test_copies_have_their_own(self):
        family = FAMILIES["llava"]()
        compressed = vlmzip.attach(family.model, FastV(keep=0.3))
        inputs = family.batch(*ROWS)
        with torch.no_grad():
            expected = compressed(**inputs).logits
            for other in (copy.deepcopy(compressed), pickle.loads(pickle.dumps(compressed))):
                assert len(self.hooks(other.inner)) == 5
                assert torch.equal(other(**inputs).logits, expected)
                assert not self.hooks(other.detach())
        assert len(self.hooks(family.model)) == 5

    def test_the_plain_model_beside_it_is_untouched(self):
        family = FAMILIES["llava"]()
        inputs = family.batch(*ROWS)
        with torch.no_grad():
            plain = family.model(**inputs).logits
            compressed = vlmzip.attach(family.model, FastV(keep=0.3))
            compressed(**inputs)
            assert torch.equal(family.model(**inputs).logits, plain)
        compressed.detach()


@pytest.mark.parametrize(
    ("compressor", "message"),
    [
        (FastV(layer=0), "layer must be from 1 to 3 in this LLM of 4 layers, got 0"),
        (FastV(layer=4), "layer must be from 1 to 3 in this LLM of 4 layers, got 4"),
        (FastV(positions="contiguous"), "tokens keep their positions"),
    ],
)
def test_compressors_without_a_place_are_refused(llava, compressor, message):
    with pytest.raises(UserError, match=message):
        vlmzip.attach(llava, compressor)


def test_two_compressors_at_one_place_are_refused():
    with pytest.raises(UserError, match="two compressors at layer 2"):
        Chain(compressors=(FastV(layer=2), LLaVolta(layer=(1, 2), stride=2)))
    with pytest.raises(UserError, match="two compressors at pre_projector"):
        Chain(compressors=(vlmzip.VisionZip(), RandomTokens()))


@pytest.mark.parametrize(
    ("chain", "last"),
    [
        ("visionzip(keep=50%)+cdpruner(keep=10)", "cdpruner"),
        ("cdpruner(keep=10)+visionzip(keep=50%)", "cdpruner"),
        ("pool2d(factor=2)+zoo_prune", "zoo_prune"),
        ("scope+holov", "holov"),
        ("kmeans+dfmr(measure=pixels,site=post_projector)+fastv", "dfmr"),
    ],
)
def test_a_later_stage_before_the_llm_that_needs_more_than_the_visual_tokens_is_refused(chain, last):
    with pytest.raises(UserError, match=f"^{last} must come first before the LLM: later stages get only the visual"):
        vlmzip.spec.read(chain)


@pytest.mark.parametrize(
    ("chain", "by_layer"),
    [
        ("pyramiddrop(layer=1,3)+fastv(layer=2,keep=50%)", [36, 18, 9, 4]),
        ("pyramiddrop(layer=1,3)+divprune(site=in_llm,layer=2,keep=10)", [36, 18, 10, 5]),
        ("dart(layer=2,keep=50%)+pyramiddrop(layer=1,3)", [36, 18, 9, 4]),
        ("sparsevlm(layer=1,3,counts=20,50%,recycle=0.3)+fastv(layer=2,keep=50%)", [36, 21, 11, 7]),
        ("llavolta(layer=1,3,stride=2,3)+kmeans(site=in_llm,layer=2,keep=7)", [36, 18, 7, 2]),
        (
            "scope(keep=24)+kmeans(site=post_projector,keep=20)+pyramiddrop(layer=1,3)+fastv(layer=2,keep=3)",
            [20, 10, 3, 1],
        ),
    ],
)
def test_stages_inside_the_llm_act_in_the_order_of_their_layers(llava, chain, by_layer):
    """The counts that a chain promises are those that run, also where the layers of its stages interleave."""
    method = vlmzip.spec.read(chain)
    with vlmzip.attach(llava, method) as compressed, torch.no_grad():
        compressed(**FAMILIES["llava"]().batch(ROWS[0]))
    assert list(compressed.report.images[0].by_layer) == by_layer
    assert method.tokens_by_layer(family_of(llava).profile()) == by_layer


@pytest.mark.parametrize(
    "setting", [{"sliding_window": 8}, {"layer_types": ["full_attention", "sliding_attention"] * 2}], ids=next_key
)
def test_sliding_windows_are_refused(setting):
    model = tiny_llava()
    for name, value in setting.items():
        setattr(model.config.text_config, name, value)
    with pytest.raises(UserError, match="sliding-window"):
        vlmzip.attach(model, FastV())


@pytest.mark.parametrize(
    "how",
    [{"cache_implementation": "static"}, {"prefill_chunk_size": 8}, {"prompt_lookup_num_tokens": 2}],
    ids=next_key,
)
def test_generate_refuses_what_would_be_wrong(how):
    family = FAMILIES["llava"]()
    compressed = vlmzip.attach(family.model, FastV())
    with pytest.raises(UserError):
        compressed.generate(**family.batch(ROWS[0]), max_new_tokens=4, **how)


def test_two_rows_that_ask_differently_keep_different_tokens():
    """The same image, two questions: FastV follows the question."""
    family = FAMILIES["llava"]()
    compressed = vlmzip.attach(family.model, FastV(keep=6, layer=2))
    inputs = family.batch([1, "image", 5, 6], [1, "image", 77, 31])
    inputs["pixel_values"][1] = inputs["pixel_values"][0]
    with torch.no_grad():
        compressed(**inputs)
    first, second = compressed.report.images
    assert not torch.equal(first.token_map.group, second.token_map.group)


def test_its_time_counts_as_selection():
    class Slow(FastV):
        def assign(self, tokens):
            time.sleep(0.2)
            return super().assign(tokens)

    compressed = vlmzip.attach(tiny_llava(), Slow(keep=2, layer=2))
    compressed(**batch(prompt(1, "image", 5), images=1))
    assert compressed.report.milliseconds["selection"] >= 200


@pytest.mark.parametrize("method", [FastV(keep=6, layer=2), SparseVLM(counts=(6,), layer=(2,), recycle=0.0)])
def test_in_training_every_image_is_asked_about_by_the_question_before_its_answer(family, method):
    """Image, question, answer, image, question, answer: each decision is that of the prompt up to its question."""
    if family.sees_prompt_both_ways:
        pytest.skip("sees the prompt both ways: what follows a question changes its attention")
    compressed = vlmzip.attach(family.model, method)
    first, second = [1, "image", 5, 6], [7, "image", 8, 9]
    row = family.batch([*first, 44, 45, *second, 50, 51])
    labels = torch.where(torch.isin(row["input_ids"], torch.tensor([44, 45, 50, 51])), row["input_ids"], -100)
    with torch.no_grad():
        compressed(**row, labels=labels)
        trained = [image.token_map.group for image in compressed.report.images]
        compressed(**family.batch(first))
        alone = compressed.report.images[0].token_map.group
        compressed(**family.batch([*first, 44, 45, *second]), labels=labels[:, :-2])
        last = compressed.report.images[1].token_map.group
        other = family.batch([*first, 44, 45, *second, 50, 51], first_image=2)
        compressed(**other, labels=torch.where(torch.isin(other["input_ids"], torch.tensor([44, 45])), 44, -100))
    assert torch.equal(trained[0], alone)
    assert torch.equal(trained[1], last)
    if trained[1].shape == compressed.report.images[1].token_map.group.shape:  # another image, other tokens
        assert not torch.equal(trained[1], compressed.report.images[1].token_map.group)


@pytest.mark.parametrize(
    ("before", "inside", "rules"),
    [
        (VisionZip(keep=12), FastV(keep=5, layer=2), {2: fastv_rule(5 / 12)}),
        (Pool2d(factor=2), LLaVolta(stride=2, layer=1), {1: pooling_rule(2)}),
        (VisionZip(keep=12), DART(keep=7, layer=1), {1: dart_rule(7)}),
        (VisionZip(keep=12), PyramidDrop(layer=(1, 3)), {1: pyramiddrop_rule(0.5), 3: pyramiddrop_rule(0.5)}),
    ],
)
def test_a_chain_from_before_the_llm_into_it(family, before, inside, rules):
    """What the first leaves, compressed by hand, is the prompt that the oracle masks."""
    compressed = vlmzip.attach(family.model, Chain(compressors=(before, inside)))
    inputs = family.batch(ROWS[0])
    with torch.no_grad():
        got = compressed(**inputs).logits[0]
    hand = vlmzip.compress_inputs(family.model, inputs, before)
    columns = (hand["input_ids"][0] == IMAGE_TOKEN).nonzero()[:, 0].tolist()
    expected, alive = logits_of(
        family.model, hand, torch.tensor([], dtype=torch.long), IMAGE_TOKEN, [columns], rules,
        bidirectional=family.sees_prompt_both_ways,
    )  # fmt: skip
    torch.testing.assert_close(got, expected[alive], atol=1e-5, rtol=0)
    compressed.detach()


def test_with_labels_the_question_ends_before_the_first_label():
    family = FAMILIES["llava"]()
    compressed = vlmzip.attach(family.model, FastV(keep=6, layer=2))
    question, answered = family.batch([1, "image", 5, 6]), family.batch([1, "image", 5, 6, 44, 45])
    labels = torch.full_like(answered["input_ids"], -100)
    labels[:, -2:] = answered["input_ids"][:, -2:]
    with torch.no_grad():
        compressed(**question)
        asked = compressed.report.images[0].token_map.group
        compressed(**answered, labels=labels)
        assert torch.equal(compressed.report.images[0].token_map.group, asked)
        compressed(**answered)
        assert not torch.equal(compressed.report.images[0].token_map.group, asked)
