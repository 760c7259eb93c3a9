"""Signals of encoders without CLS, against attention matrices that the model itself computes."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

from tests.families import FAMILIES, tiny_llava
from tests.families.qwen2_5_vl import window_order
from tests.tiny import with_large_weights
from vlmzip import Signal, Site, UserError
from vlmzip.models import family_of
from vlmzip.models.recording import attention_received, record

NEEDS = frozenset({Signal.CLS_ATTENTION, Signal.KEYS})


@pytest.mark.parametrize("chunk", [1, 5, 256])
def test_attention_received_equals_the_matrix(chunk):
    query, key = torch.randn(2, 3, 17, 24)
    q, k = (x.unflatten(-1, (4, 6)).transpose(1, 2) for x in (query, key))
    matrix = (q @ k.transpose(2, 3) * 0.3).softmax(-1)
    torch.testing.assert_close(attention_received(query, key, 4, 0.3, chunk), matrix.mean((1, 2)), atol=1e-6, rtol=0)


def test_paligemma_takes_the_attention_of_the_last_layer():
    family = FAMILIES["paligemma"]()
    inputs = family.batch([1, "image"], ["image", 4])
    (group,) = family_of(family.model).encode(inputs, Site.PRE_PROJECTOR, NEEDS).groups
    tokens = group.tokens
    tower = FAMILIES["paligemma"].build("eager").model.vision_tower
    with torch.no_grad():
        truth = tower(inputs["pixel_values"], output_attentions=True)
    torch.testing.assert_close(tokens.cls_attention, truth.attentions[-1].mean((1, 2)), atol=1e-6, rtol=0)
    torch.testing.assert_close(tokens.features, truth.last_hidden_state, atol=1e-5, rtol=1e-5)
    assert tokens.prefix == 0


@pytest.mark.parametrize("layer", [-1, -2, 1])
def test_llava_on_siglip_takes_the_attention_of_its_feature_layer(layer):
    """No CLS: the attention received in the layer whose output the features are, whichever that is."""
    model = llava_on_siglip(side=48, vision_feature_layer=layer)
    inputs = {"pixel_values": torch.randn(2, 3, 48, 48)}
    (group,) = family_of(model).encode(inputs, Site.PRE_PROJECTOR, NEEDS).groups
    tokens = group.tokens
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        truth = tower(inputs["pixel_values"], output_attentions=True, output_hidden_states=True)
    block = layer % 4 - 1
    torch.testing.assert_close(tokens.cls_attention, truth.attentions[block].mean((1, 2)), atol=1e-6, rtol=0)
    torch.testing.assert_close(tokens.features, truth.hidden_states[layer], atol=1e-5, rtol=1e-5)
    others = [matrix.mean((1, 2)) for number, matrix in enumerate(truth.attentions) if number != block]
    assert all((tokens.cls_attention - other).abs().max() > 1e-3 for other in others)
    assert tokens.prefix == 0


def test_vipllava_takes_the_attention_of_its_deepest_feature_layer():
    family = FAMILIES["vipllava"]()
    inputs = family.batch([1, "image"], ["image", 4])
    (group,) = family_of(family.model).encode(inputs, Site.PRE_PROJECTOR, NEEDS).groups
    tokens = group.tokens
    tower = FAMILIES["vipllava"].build("eager").model.vision_tower
    with torch.no_grad():
        truth = tower(inputs["pixel_values"], output_attentions=True, output_hidden_states=True)
    side_by_side = torch.cat([truth.hidden_states[-2], truth.hidden_states[1]], dim=-1)
    torch.testing.assert_close(tokens.features, side_by_side, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tokens.cls_attention, truth.attentions[1][:, :, 0].mean(1), atol=1e-6, rtol=0)
    assert (tokens.cls_attention - truth.attentions[0][:, :, 0].mean(1)).abs().max() > 1e-3


class TestFurtherSignalsOfTheEncoder:
    """LLaVA's encoder has CLS, 3 layers and 4 heads of width 8. The layer before the last gives the features."""

    NEEDS = frozenset({Signal.ATTENTION_RECEIVED, Signal.LAST_CLS_ATTENTION, Signal.LAST_KEYS})

    @pytest.fixture
    def inputs(self):
        return FAMILIES["llava"]().batch([1, "image"], ["image", 4])

    @pytest.fixture
    def tokens(self, inputs):
        (group,) = family_of(tiny_llava()).encode(inputs, Site.PRE_PROJECTOR, self.NEEDS, lambda depth: (0,)).groups
        return group.tokens

    def test_attention_received_is_of_the_chosen_layers_and_then_of_that_of_the_features(self, tokens, inputs):
        tower = FAMILIES["llava"].build("eager").model.vision_tower
        with torch.no_grad():
            matrices = tower(inputs["pixel_values"], output_attentions=True).attentions
        truth = torch.stack([matrices[layer].mean((1, 2)) for layer in (0, 1)], -1)
        torch.testing.assert_close(tokens.attention_received, truth, atol=1e-6, rtol=0)

    def test_the_last_layer_is_read_with_joined_heads(self, tokens, inputs):
        tower = tiny_llava().model.vision_tower
        attention = tower.encoder.layers[-1].self_attn
        with torch.no_grad(), record({"q": attention.q_proj, "k": attention.k_proj}) as seen:
            tower(inputs["pixel_values"])
        row = (seen["q"][:, :1] @ seen["k"].transpose(1, 2) / 32**0.5).softmax(-1)[:, 0]
        torch.testing.assert_close(tokens.last_cls_attention, row, atol=1e-6, rtol=0)
        torch.testing.assert_close(tokens.last_keys, seen["k"], atol=1e-6, rtol=0)

    def test_features_before_the_projector_and_the_projector_give_the_projected_tokens(self, inputs):
        family = family_of(tiny_llava())
        needs = frozenset({Signal.ENCODER_FEATURES, Signal.PROJECTOR})
        (group,) = family.encode(inputs, Site.POST_PROJECTOR, needs).groups
        projected = group.tokens.projector(group.tokens.encoder_features)
        torch.testing.assert_close(projected, group.tokens.features)
        assert group.tokens.encoder_features.shape[-1] == 32

    def test_the_projector_computes_in_the_type_of_its_input(self, inputs):
        model = copy.deepcopy(tiny_llava()).bfloat16()
        needs = frozenset({Signal.PROJECTOR})
        half = {**inputs, "pixel_values": inputs["pixel_values"].bfloat16()}
        (group,) = family_of(model).encode(half, Site.POST_PROJECTOR, needs).groups
        features = torch.randn(2, 5, 32)
        with torch.no_grad():
            exact = copy.deepcopy(model.model.multi_modal_projector).float()(features)
            projected = group.tokens.projector(features)
            half_projected = group.tokens.projector(features.bfloat16())
        torch.testing.assert_close(projected, exact)
        assert half_projected.dtype is torch.bfloat16

    @pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_onevision"])  # LLaVA-OneVision shrinks projected tokens
    def test_a_projector_that_makes_no_token_of_each_feature_is_refused(self, name):
        family = FAMILIES[name]()
        inputs = family.batch([1, "image"], ["image", 4])
        with pytest.raises(UserError, match="does not make one visual token of each feature of the encoder: choose a"):
            family_of(family.model).encode(inputs, Site.POST_PROJECTOR, frozenset({Signal.PROJECTOR}))


def test_signals_take_no_square_of_the_tokens():
    """2,304 tokens and 4 heads: a matrix of all attention would be 9 times the largest tensor allowed here."""
    model = llava_on_siglip(side=384)
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(o.numel() for o in (out if isinstance(out, tuple | list) else [out]) if torch.is_tensor(o))
            return out

    with torch.no_grad(), Watch():
        (group,) = (
            family_of(model).encode({"pixel_values": torch.zeros(1, 3, 384, 384)}, Site.PRE_PROJECTOR, NEEDS).groups
        )
        tokens = group.tokens
    assert tokens.grid.size == 2304
    assert max(sizes) <= 256 * 2304 * 4


def llava_on_siglip(side, **settings):
    """A LLaVA whose encoder has no CLS, so that every patch is a visual token."""
    torch.manual_seed(0)
    compressed = tiny_llava().config
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=side, patch_size=8,
        vision_use_head=False,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision,
        text_config=compressed.text_config,
        image_token_index=compressed.image_token_id,
        vision_feature_select_strategy="full",
        **settings,
    )
    return with_large_weights(LlavaForConditionalGeneration(config), "sdpa")


class TestQwen:
    @pytest.fixture
    def family(self):
        return FAMILIES["qwen2_5_vl"]()

    def signals(self, model, inputs):
        """Score and keys of each image, in order."""
        found = {}
        for group in family_of(model).encode(inputs, Site.PRE_PROJECTOR, NEEDS).groups:
            tokens, indices = group.tokens, group.numbers
            found |= {n: (tokens.cls_attention[i], tokens.keys[i], tokens.grid) for i, n in enumerate(indices)}
        return [found[n] for n in sorted(found)]

    def test_score_is_the_attention_that_the_model_computes(self, family):
        """The model's own attention of the last block, caught where it is computed, averaged as the merger joins."""
        seen = []

        def catch(module, query, key, value, attention_mask, scaling, **kwargs):
            weights = (query @ key.transpose(2, 3) * scaling).softmax(-1)
            seen.append((module, weights, key))
            return (weights @ value).transpose(1, 2), None

        AttentionInterface.register("catching", catch)
        inputs = family.batch([1, "image", "image", 4])
        model = copy.deepcopy(family.model)
        model.set_attn_implementation({"vision_config": "catching"})
        with torch.no_grad():
            model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        last = [(weights, key) for module, weights, key in seen if module is model.model.visual.blocks[-1].attn]
        assert len(last) == 2  # one sequence an image
        for (weights, key), (score, keys, grid) in zip(last, self.signals(family.model, inputs), strict=True):
            received = weights[0].mean(0).sum(0).unflatten(0, (-1, 4)).mean(1)
            merged = key[0].mean(0).unflatten(0, (-1, 4)).mean(1)
            order = window_order(grid.rows, grid.cols)
            torch.testing.assert_close(score[order], received, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(keys[order], merged, atol=1e-5, rtol=1e-5)

    def test_images_of_equal_grid_come_together(self, family):
        encoded = family_of(family.model).encode(
            family.batch(["image", "image"], ["image", 3]), Site.PRE_PROJECTOR, frozenset()
        )
        found = [(tuple(group.tokens.grid), group.numbers) for group in encoded.groups]
        assert found == [((1, 4, 6), [0, 2]), ((1, 5, 3), [1])]
        assert "cls_attention" not in encoded.groups[0].tokens.signals

    def test_positions_are_those_of_the_full_grid(self, family):
        """Kept tokens keep their three axes, and the text continues where the full grid ends."""
        from vlmzip import RandomTokens, compress_inputs

        inputs = family.batch([1, 2, "image", 5, 6])
        compressed = compress_inputs(family.model, inputs, RandomTokens(keep=5))
        full, _ = family.model.model.get_rope_index(
            inputs["input_ids"], inputs["mm_token_type_ids"], inputs["image_grid_thw"]
        )
        source = compressed.report.source[0]
        assert torch.equal(compressed["position_ids"][:, 0], full[:, 0, source])
        assert compressed["position_ids"][:, 0, -2:].tolist() == [[8, 9]] * 3  # 2 + max(4, 6), not 2 + 5


def test_other_encoders_are_refused(llava):
    model = copy.deepcopy(llava)
    model.config.vision_config.model_type = "pixtral"
    with pytest.raises(UserError, match="type pixtral are not supported yet"):
        family_of(model)
