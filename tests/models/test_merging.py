"""Merging inside vision encoders, against an encoder that is run layer by layer in loops."""

import threading
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import vlmzip
from tests.families import FAMILIES, tiny_llava
from tests.references.tome import tome as naive
from tests.tiny import batch, prompt
from vlmzip import Chain, FastV, KMeans, Pool2d, Site, ToMe, UserError, attach, compress_inputs
from vlmzip.models import family_of
from vlmzip.models.recording import record
from vlmzip.runtime.flops import flops_inside

ROWS = ([1, "image", 5], [1, "image", 4, "image", 6])
MERGING = [name for name, cls in FAMILIES.items() if Site.ENCODER in family_of(cls().model).sites]


def first_states(tower, pixels):
    """Return what enters the encoder's first layer."""
    layer = tower.encoder.layers[0]
    with torch.no_grad(), record({}, {"first": layer}) as recording:
        tower(pixels)
    return recording.inputs["first"]


def members_of(token_map):
    """Return the tokens that each output token of one image consists of."""
    return [(token_map.group[0] == n).nonzero()[:, 0].tolist() for n in range(token_map.lengths[0])]


def middle(members):
    return sorted(members)[(len(members) - 1) // 2]


def expected_of(layers, states, counts, alone, order=None):
    """Return the tokens of one view in the order of their anchors, and their members, without those that stay alone."""
    order = list(range(len(states))) if order is None else order
    with torch.no_grad():
        tokens, members = naive(layers, states[order], counts, alone)
    members = [sorted(order[n] for n in group) for group in members[alone:]]
    by_place = sorted(range(len(members)), key=lambda n: middle(members[n]))
    return tokens[alone:][by_place], [members[n] for n in by_place]


def merged(model, inputs, keep):
    """Return the projected tokens and the report of each image."""
    with torch.no_grad():
        compressed = compress_inputs(model, inputs, ToMe(keep=keep))
    features = compressed["mm_encoder_outputs"]["image"].pooler_output
    return features, compressed.report.images


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("keep", [35, 24, 12, 9, 4, 1])
def test_clip_equals_the_naive_encoder(attention, keep):
    model, inputs = tiny_llava(attention), batch(prompt("image"), prompt("image"), images=2)
    features, images = merged(model, inputs, keep)
    tower = model.model.vision_tower
    counts = ToMe().counts_by_layer(36, keep, 2)
    for image, states in enumerate(first_states(tower, inputs["pixel_values"])):
        tokens, members = expected_of(tower.encoder.layers[:2], states, counts, alone=1)
        assert members_of(images[image].token_map) == members
        projected = model.model.multi_modal_projector(tokens)
        torch.testing.assert_close(features[image], projected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(images[image].token_map.weight[0].sum(), torch.tensor(float(keep)))


@pytest.mark.parametrize("keep", [30, 12, 5, 2])
def test_siglip_equals_the_naive_encoder(keep):
    family = FAMILIES["paligemma"]()
    inputs, model = family.batch([1, "image", 5], ["image"]), family.model
    features, images = merged(model, inputs, keep)
    features = features.reshape(2, keep, -1)
    tower = model.model.vision_tower
    counts = ToMe().counts_by_layer(36, keep, 3)
    for image, states in enumerate(first_states(tower, inputs["pixel_values"])):
        tokens, members = expected_of(tower.encoder.layers, states, counts, alone=0)
        assert members_of(images[image].token_map) == members
        projected = model.model.multi_modal_projector(tower.post_layernorm(tokens))
        torch.testing.assert_close(features[image], projected, atol=1e-4, rtol=1e-4)


def test_padding_stays_alone_and_goes():
    """The second image has 9 tokens in its base view, and 1 of 3 rows in each of 3 tiles: 18 that the LLM sees."""
    family = FAMILIES["llava_next"]()
    model, inputs = family.model, family.batch(["image", 1, "image"])
    features, images = merged(model, inputs, 10)
    assert [image.after for image in images] == [10, 10]
    pixels = inputs["pixel_values"][1, :4]
    tower, row = model.model.vision_tower, torch.arange(3)
    views = images[1].views
    found = []
    # 10 of 18 tokens: 5, 2, 2 and 1; the first views get more.
    for left, view, states in zip((5, 2, 2, 1), views, first_states(tower, pixels), strict=True):
        seen = [n for n in range(1, 10) if (view.grid.size == 9 or n - 1 in row + 3)]
        alone = [0, *(n for n in range(1, 10) if n not in seen)]
        counts = ToMe().counts_by_layer(len(seen), left, 2)
        tokens, members = expected_of(tower.encoder.layers[:2], states, counts, len(alone), alone + seen)
        shift = 0 if view.grid.size == 9 else 3
        mine = [[n - shift for n in group] for group in members]
        group = view.token_map.group[0]
        numbers = sorted({n for n in group.tolist() if n >= 0})
        assert sorted((group == n).nonzero()[:, 0].tolist() for n in numbers) == sorted(mine)
        found.append(tokens)
    projected = model.model.multi_modal_projector(torch.cat(found))
    for token in projected:
        assert (features[1] - token).abs().amax(-1).min() < 1e-4


@pytest.mark.parametrize("name", MERGING)
@pytest.mark.filterwarnings("ignore:.*changes nothing")
@pytest.mark.parametrize("keep", ["100%", 5000])
def test_keeping_all_is_the_plain_model(name, keep):
    family = FAMILIES[name]()
    inputs = family.batch(*ROWS)
    with torch.no_grad():
        expected = family.model(**inputs).logits
        with attach(family.model, ToMe(keep=keep)) as compressed:
            torch.testing.assert_close(compressed(**inputs).logits, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", MERGING)
def test_an_image_alone_equals_the_image_in_a_batch(name):
    family = FAMILIES[name]()
    with torch.no_grad(), attach(family.model, ToMe(keep=9)) as compressed:
        compressed(**family.batch(*ROWS))
        together = compressed.report.images
        compressed(**family.batch(["image", 3]))
        (alone,) = compressed.report.images
    assert members_of(alone.token_map) == members_of(together[0].token_map)
    assert all(image.after == 9 for image in together)


@pytest.mark.skipif("video_llava" not in FAMILIES, reason="needs a newer transformers")
def test_frames_of_videos_are_merged_like_images():
    family = FAMILIES["video_llava"]()
    with torch.no_grad(), attach(family.model, ToMe(keep_per_view=7)) as compressed:
        compressed(**family.batch([1, "video", 5]))
    assert [image.after for image in compressed.report.images] == [21]


def test_chains_answer():
    inputs = batch(prompt(1, "image", 5), images=1)
    stages = (ToMe(keep=20), KMeans(keep=11, site=Site.POST_PROJECTOR), FastV(keep=5, layer=2))
    with torch.no_grad(), attach(tiny_llava(), Chain(compressors=stages)) as small:
        small(**inputs)
    (image,) = small.report.images
    assert image.by_layer == (11, 11, 5, 5)
    assert image.token_map.lengths == [5]
    grid = attach(tiny_llava(), Chain(compressors=(ToMe(keep=20), Pool2d(factor=2, site=Site.POST_PROJECTOR))))
    with pytest.raises(UserError, match="needs tokens that lie on a grid"):
        grid(**inputs)


def test_the_encoder_computes_less():
    model, inputs = tiny_llava(), batch(prompt(1, "image", 7), images=1)
    plain = flops_inside([model.model.vision_tower], lambda: model(**inputs))
    with attach(model, ToMe(keep=4)) as compressed:
        compressed(**inputs)  # the first call also checks the layers
        fewer = flops_inside([model.model.vision_tower], lambda: compressed(**inputs))
    assert 0.3 * plain < fewer < 0.7 * plain


def test_it_leaves_no_hooks_and_no_changes():
    model, inputs = tiny_llava(), batch(prompt("image"), images=1)
    tower = model.model.vision_tower
    before = {name: dict(vars(module)) for name, module in tower.named_modules()}
    expected = tower(inputs["pixel_values"]).last_hidden_state
    with attach(model, ToMe(keep=4)) as compressed:
        compressed(**inputs)
        assert torch.equal(tower(inputs["pixel_values"]).last_hidden_state, expected)
    for name, module in tower.named_modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert vars(module).keys() == before[name].keys()


def test_another_threads_run_of_the_encoder_is_not_merged():
    model, inputs = tiny_llava(), batch(prompt("image"), images=1)
    tower = model.model.vision_tower
    expected = tower(inputs["pixel_values"]).last_hidden_state
    shapes = []

    def in_between(*_):
        def run():
            shapes.append(torch.equal(tower(inputs["pixel_values"]).last_hidden_state, expected))

        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()

    handle = tower.encoder.layers[1].mlp.register_forward_hook(in_between)
    with attach(model, ToMe(keep=4)) as compressed:
        compressed(**inputs)
    handle.remove()
    assert shapes
    assert all(shapes)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_encoder_can_learn(checkpointing):
    gradients = []
    for on in {False, checkpointing}:
        model = tiny_llava().train()
        if on:
            (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
        inputs = batch(prompt(1, "image", 5), images=1)
        attach(model, ToMe(keep=6))(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append(model.model.vision_tower.encoder.layers[0].self_attn.q_proj.weight.grad)
        assert gradients[0].abs().sum() > 0
        assert all(
            getattr(layer, "gradient_checkpointing", on) == on for layer in model.model.vision_tower.encoder.layers
        )
    torch.testing.assert_close(gradients[0], gradients[-1])


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "llava_onevision", "vipllava", "ovis2"])
def test_other_encoders_are_refused_in_a_line(name):
    if name not in FAMILIES:
        pytest.skip("needs a newer transformers")
    with pytest.raises(
        UserError, match=r"cannot be compressed at site 'encoder'; choose one of pre_projector"
    ) as error:
        attach(FAMILIES[name]().model, ToMe(keep=4))
    assert "\n" not in str(error.value)


def refused(model, inputs, message):
    with torch.no_grad(), pytest.raises(UserError, match=message) as error:
        compress_inputs(model, inputs, ToMe(keep=4))
    assert "\n" not in str(error.value)


def test_features_of_several_layers_are_refused():
    model = tiny_llava(vision_feature_layer=[-2, -1])
    refused(
        model, batch(prompt("image"), images=1), "from several layers of its encoder.*choose a method or a site behind"
    )


def test_frames_that_are_pooled_are_refused():
    family = FAMILIES["llava_next_video"]()
    refused(family.model, family.batch([1, "video", 5]), "visual tokens of 37 tokens of its encoder")


def test_attention_that_takes_no_mask_is_refused():
    model = tiny_llava()
    model.model.vision_tower.config._attn_implementation = "flash_attention_2"
    refused(model, batch(prompt("image"), images=1), "load the model with attn_implementation='sdpa'")


class TestUnknownLayers:
    inputs = batch(prompt("image"), images=1)

    def test_without_the_norm(self):
        model = tiny_llava()
        for layer in model.model.vision_tower.encoder.layers:
            layer.norm_after, layer.layer_norm2 = layer.layer_norm2, None
        refused(model, self.inputs, "does not know where tokens can be merged")

    def test_with_a_scaled_mlp(self):
        model = tiny_llava()
        for layer in model.model.vision_tower.encoder.layers:
            layer.register_forward_hook(lambda _module, _args, output: 2 * output)
        refused(model, self.inputs, "does not know the layers of CLIPVision")

    def test_of_two_kinds(self):
        model = tiny_llava()
        layers = model.model.vision_tower.encoder.layers
        layers[1].__class__ = type("Other", (type(layers[1]),), {})
        refused(model, self.inputs, "does not know the layers of CLIPVision")

    def test_that_ignore_the_mask(self):
        model = tiny_llava()
        for layer in model.model.vision_tower.encoder.layers:
            attention = layer.self_attn
            usual = attention.forward
            attention.forward = lambda *args, usual=usual, **kwargs: usual(*args, **{**kwargs, "attention_mask": None})
        refused(model, self.inputs, "the attention of CLIPVision")


@dataclass(frozen=True, kw_only=True)
class WithoutMethods(vlmzip.Compressor):
    sites = (Site.ENCODER,)
    site: Site = Site.ENCODER

    def assign(self, tokens):
        raise NotImplementedError


def test_methods_that_cannot_merge_inside_an_encoder_are_refused():
    compressed = attach(tiny_llava(), WithoutMethods())
    with pytest.raises(UserError, match="cannot act at site 'encoder': it lacks the methods counts_by_layer and join"):
        compressed(**batch(prompt("image"), images=1))


def test_half_precision_merges():
    model = tiny_llava().bfloat16()
    inputs = batch(prompt(1, "image", 5), images=1)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with torch.no_grad(), attach(model, ToMe(keep=6)) as compressed:
        assert compressed(**inputs).logits.isfinite().all()
    assert isinstance(compressed.inner, nn.Module)
    assert compressed.report.images[0].after == 6


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_encoder_whose_values_are_no_numbers_is_refused_in_a_line(value):
    """float16 can overflow."""
    family = FAMILIES["llava"]()
    inputs = family.batch([1, "image", 5])
    inputs["pixel_values"] = torch.full_like(inputs["pixel_values"], value)
    refused(family.model, inputs, r"values that are infinite or not a number, .* load the model in bfloat16 or float32")
