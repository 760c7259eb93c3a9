"""Recorded signals against eager attention, and the family's settings."""

import pytest
import torch

import vlmzip
from tests.families import FAMILIES, tiny_llava
from tests.tiny import batch, prompt
from vlmzip import Signal, Site, UserError, VisionZip
from vlmzip.models import family_of
from vlmzip.models.recording import record

NEEDS = frozenset({Signal.CLS_ATTENTION, Signal.KEYS})


def eager_truth(model, pixels):
    """The attention matrix and hidden states as transformers itself gives them."""
    model = tiny_llava("eager").to(pixels.dtype)
    with torch.no_grad():
        return model.model.vision_tower(pixels, output_attentions=True, output_hidden_states=True)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layer", [-2, -1, 1, 3])
def test_attention_row_features_and_keys_equal_eager(attention, layer):
    """In float64: in float32, sdpa and eager differ by more than 1e-5 on some processors."""
    model = tiny_llava(attention, vision_feature_layer=layer).double()
    inputs = batch(prompt("image"), prompt("image"), images=2)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    (group,) = family_of(model).encode(inputs, Site.PRE_PROJECTOR, NEEDS).groups
    tokens = group.tokens
    indices = list(group.numbers)
    truth = eager_truth(model, inputs["pixel_values"])
    block = layer % 4 - 1
    assert indices == [0, 1]
    row = truth.attentions[block][:, :, 0].mean(1)
    torch.testing.assert_close(tokens.cls_attention, row.float(), atol=1e-6, rtol=0)  # vlmzip's rows are float32
    torch.testing.assert_close(tokens.features, truth.hidden_states[layer], atol=1e-5, rtol=0)
    tower = model.model.vision_tower
    with torch.no_grad(), record({"in": tower.encoder.layers[block].layer_norm1}) as seen:
        tower(inputs["pixel_values"])
    keys = tower.encoder.layers[block].self_attn.k_proj(seen["in"])
    by_head = torch.stack(keys.split(8, dim=-1)).mean(0)
    torch.testing.assert_close(tokens.keys, by_head, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("layer", "needs", "last"),
    [
        (1, (), 0),
        (-2, (Signal.CLS_ATTENTION, Signal.KEYS), 1),
        (-1, (), 2),
        ([1, 2], (), 1),
        (1, (Signal.LAST_KEYS,), 2),
    ],
)
def test_layers_whose_output_nobody_reads_can_be_left_out(layer, needs, last):
    model = tiny_llava("sdpa", vision_feature_layer=layer)
    inputs = batch(prompt("image"), prompt("image"), images=2)
    family, ran = family_of(model), []
    for number, block in enumerate(model.model.vision_tower.encoder.layers):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))

    def encoded(early):
        ran.clear()
        family.leaves_encoder_early = early
        with torch.no_grad():
            (group,) = family.encode(inputs, Site.PRE_PROJECTOR, frozenset(needs)).groups
        return group.tokens, list(ran)

    (whole, all_layers), (tokens, layers) = encoded(False), encoded(True)
    assert all_layers == [0, 1, 2]
    assert layers == list(range(last + 1))
    assert tokens.signals == whole.signals
    for name in ("features", *whole.signals):
        assert torch.equal(getattr(tokens, name), getattr(whole, name))


def test_the_attention_is_far_from_uniform():
    """Otherwise the comparison above would compare constants."""
    tower = tiny_llava("eager").model.vision_tower
    rows = tower(batch([1], images=1)["pixel_values"], output_attentions=True).attentions[1][0, :, 0]
    assert rows.max() > 5 * rows.mean()


def test_features_of_several_layers_are_put_side_by_side():
    model = tiny_llava(vision_feature_layer=[-2, -1])
    (group,) = family_of(model).encode(batch([1], images=1), Site.PRE_PROJECTOR, NEEDS).groups
    tokens = group.tokens
    assert tokens.features.shape == (1, 37, 64)


@pytest.mark.parametrize("layer", [4, -5, 9, [-2, 4], [], "-2", None, True, 1.0])
@pytest.mark.parametrize("make", [tiny_llava, FAMILIES["vipllava"].build])
def test_layers_that_the_encoder_does_not_have_are_refused(make, layer):
    model = make()
    name = "vision_feature_layer" if hasattr(model.config, "vision_feature_layer") else "vision_feature_layers"
    model.config.__dict__[name] = layer  # set in another way, transformers refuses some of them
    with pytest.raises(UserError, match=r"vision_feature_layer=.*has 3 layers; give one of -3 to 3"):
        vlmzip.attach(model, VisionZip(keep=4))


@pytest.mark.parametrize("layer", [4, -5, [0, 4]])
def test_layers_given_to_a_call_are_checked_too(llava, layer):
    compressed = vlmzip.attach(llava, VisionZip(keep=4))
    with pytest.raises(UserError, match=r"vision_feature_layer=.*give one of -3 to 3"):
        compressed(**batch(prompt("image"), images=1), vision_feature_layer=layer)


def test_unknown_strategies_are_refused(llava):
    inputs = batch(prompt("image"), images=1)
    message = "unknown vision_feature_select_strategy 'fulll'; choose default or full"
    with pytest.raises(UserError, match=message):
        vlmzip.attach(llava, VisionZip(keep=4))(**inputs, vision_feature_select_strategy="fulll")
    model = tiny_llava()
    model.config.__dict__["vision_feature_select_strategy"] = "fulll"
    with pytest.raises(UserError, match=message):
        vlmzip.attach(model, VisionZip(keep=4))


def test_no_hook_is_left_behind_not_even_after_an_error(llava):
    tower = llava.model.vision_tower
    block = tower.encoder.layers[1]
    before = [len(block._forward_hooks), len(block.self_attn.q_proj._forward_hooks)]  # transformers may have its own
    with pytest.raises(RuntimeError, match="boom"), record({"x": block}):
        raise RuntimeError("boom")
    family_of(llava).encode(batch([1], images=1), Site.PRE_PROJECTOR, NEEDS)
    assert [len(block._forward_hooks), len(block.self_attn.q_proj._forward_hooks)] == before


def test_threads_record_their_own_images(llava):
    from concurrent.futures import ThreadPoolExecutor

    model_family = family_of(llava)
    inputs = [batch([1], images=1, seed=seed) for seed in range(16)]

    def encode(one):
        with torch.no_grad():
            return model_family.encode(one, Site.PRE_PROJECTOR, NEEDS).groups[0].tokens.cls_attention

    alone = [encode(one) for one in inputs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(encode, inputs))
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_post_projector_tokens_are_projected(llava):
    model_family = family_of(llava)
    inputs = batch([1], images=2)
    (group,) = model_family.encode(inputs, Site.PRE_PROJECTOR, frozenset()).groups
    before = group.tokens
    (group,) = model_family.encode(inputs, Site.POST_PROJECTOR, frozenset()).groups
    after = group.tokens
    torch.testing.assert_close(after.features, llava.model.multi_modal_projector(before.features))
    assert not before.signals


def test_other_models_are_refused():
    from transformers import LlamaConfig, LlamaForCausalLM

    with pytest.raises(UserError, match=r"cannot compress LlamaForCausalLM.*supports: llava"):
        family_of(
            LlamaForCausalLM(
                LlamaConfig(
                    hidden_size=8, num_hidden_layers=1, intermediate_size=8, vocab_size=8, num_attention_heads=1
                )
            )
        )
    with pytest.raises(UserError, match="cannot compress Linear"):
        family_of(torch.nn.Linear(1, 1))


def test_embeddings_have_no_attention():
    model = tiny_llava(vision_feature_layer=0)
    with pytest.raises(UserError, match="patch embeddings"):
        family_of(model).encode(batch([1], images=1), Site.PRE_PROJECTOR, NEEDS)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_encoder_keeps_nothing_for_a_backward(fresh, frozen):
    """Not even where embeddings ask for gradients, as they do under gradient checkpointing."""
    model = fresh.model.train()
    model_family = family_of(model)
    if model_family.projector in list(model_family.vision_encoder.modules()):
        pytest.skip("its projector is a part of the encoder")
    model.requires_grad_(not frozen)  # some models have modules beside encoder and projector
    for module in (model_family.llm, model_family.projector):
        module.requires_grad_(True)
    model.enable_input_require_grads()
    inputs = fresh.batch(["image"])
    for site in (Site.PRE_PROJECTOR, Site.POST_PROJECTOR):
        (group,) = model_family.encode(inputs, site, frozenset()).groups
        tokens = group.tokens
        is_projected = site is Site.POST_PROJECTOR or not model_family.projects_each_token
        learns = not frozen or is_projected  # the projector's own weights do
        assert tokens.features.requires_grad == learns
        if site is Site.POST_PROJECTOR:
            tokens.features.sum().backward()
    assert any(weights.grad is not None for weights in model_family.projector.parameters())
    assert any(weights.grad is not None for weights in model_family.vision_encoder.parameters()) != frozen
