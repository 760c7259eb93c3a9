"""Families without code: the model is asked for its features, and answers without compression as it does alone."""

import copy

import pytest
import torch
from transformers import (
    AttentionInterface,
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
)

import vlmzip
from tests.tiny import IMAGE_TOKEN, LLM, batch
from vlmzip import (
    FastV,
    Grid,
    KMeans,
    NoCompression,
    Pool2d,
    RandomTokens,
    Signal,
    Site,
    UserError,
    VisionZip,
    compress_inputs,
)
from vlmzip.models import family_of
from vlmzip.models.family import Family as ModelFamily
from vlmzip.models.family import square_of
from vlmzip.models.towers.tower import Tower
from vlmzip.runtime.place import has_sliding_windows

PROJECTS_EACH_TOKEN = ("InternVLForConditionalGeneration",)

VIT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, patch_size=8)
SIGLIP = dict(model_type="siglip_vision_model", **VIT, image_size=32, vision_use_head=False)


def internvl():
    vision = dict(**{**VIT, "patch_size": [8, 8]}, image_size=[32, 32])
    return InternVLForConditionalGeneration(
        InternVLConfig(vision_config=vision, text_config=dict(model_type="qwen2", **LLM), image_token_id=IMAGE_TOKEN)
    )


def gemma3():
    text = dict(model_type="gemma3_text", **LLM, head_dim=8, sliding_window=64)
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            vision_config=SIGLIP, text_config=text, mm_tokens_per_image=4, image_token_index=IMAGE_TOKEN,
            boi_token_index=97, eoi_token_index=96,
        )
    )  # fmt: skip


def aya_vision():
    text = dict(model_type="cohere2", **LLM, sliding_window=64)
    return AyaVisionForConditionalGeneration(
        AyaVisionConfig(vision_config=SIGLIP, text_config=text, image_token_index=IMAGE_TOKEN, downsample_factor=2)
    )


def mistral3():
    vision = dict(model_type="pixtral", **VIT, image_size=32, head_dim=8)
    text = dict(model_type="mistral", **LLM, head_dim=8)
    return Mistral3ForConditionalGeneration(
        Mistral3Config(
            vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, spatial_merge_size=2,
            projector_hidden_act="gelu", vision_feature_layer=-1,
        )
    )  # fmt: skip


#: Makers, and what describes images beside their pixels.
MODELS = {
    "internvl": (internvl, {}),
    "gemma3": (gemma3, {}),
    "aya_vision": (aya_vision, {}),
    "mistral3": (mistral3, {"image_sizes": torch.tensor([[32, 32]] * 3)}),
}


@pytest.fixture(scope="module", params=MODELS)
def asked(request):
    """A model, and inputs with two images in one row and one in another; four tokens each."""
    maker, beside = MODELS[request.param]
    torch.manual_seed(0)
    model = maker().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
    image = [IMAGE_TOKEN] * 4
    inputs = batch([1, *image, 5, *image, 6], [1, *image, 7], [1, 2])
    inputs |= {"pixel_values": torch.randn(3, 3, 32, 32), **beside}
    if request.param == "gemma3":
        inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE_TOKEN).long()
    return model, inputs


@torch.no_grad()
def test_without_compression_the_model_is_the_plain_one(asked):
    model, inputs = asked
    family = ModelFamily(model)
    small = compress_inputs(model, inputs, NoCompression(), family=family)
    assert torch.equal(model(**small).logits, model(**inputs).logits)
    assert [image.views[0].grid for image in small.report.images] == [Grid(1, 2, 2)] * 3


@torch.no_grad()
def test_fewer_tokens_change_the_answer(asked):
    model, inputs = asked
    family = ModelFamily(model)
    for method in (Pool2d(factor=2, site=Site.POST_PROJECTOR), RandomTokens(keep=1, site=Site.POST_PROJECTOR)):
        small = compress_inputs(model, inputs, method, family=family)
        assert [image.after for image in small.report.images] == [1, 1, 1]
        logits = model(**small).logits
        assert logits.isfinite().all()
        assert logits.shape[1] == inputs["input_ids"].shape[1] - 6
    assert set(family.image_inputs) == inputs.keys() & {"pixel_values", "image_sizes"}


def attention_in_the_last_layer(model, inputs):
    """Return the attention matrices that the model itself computes, caught where it computes them."""
    matrices = {}

    def catch(module, query, key, value, attention_mask, scaling, **kwargs):
        scores = query @ key.transpose(2, 3) * scaling
        weights = (scores if attention_mask is None else scores + attention_mask).softmax(-1)
        matrices[module] = weights
        return (weights @ value).transpose(1, 2), None

    AttentionInterface.register("catching the last layer", catch)
    model = copy.deepcopy(model)
    model.set_attn_implementation({"vision_config": "catching the last layer"})
    with torch.no_grad():
        model.get_image_features(inputs["pixel_values"], **{k: v for k, v in inputs.items() if k == "image_sizes"})
    return list(matrices.values())[-1].mean(1)


@torch.no_grad()
def test_tokens_are_scored_by_the_attention_that_the_model_computes(asked):
    model, inputs = asked
    needs = frozenset({Signal.CLS_ATTENTION, Signal.KEYS})
    (group,) = ModelFamily(model).encode(inputs, Site.PRE_PROJECTOR, needs).groups
    matrix = attention_in_the_last_layer(model, inputs)
    if len(matrix) == 1:  # one sequence of all images: each attends to itself
        matrix = torch.stack([matrix[0, start : start + 16, start : start + 16] for start in (0, 16, 32)])
    scores = matrix[:, 0, 1:] if matrix.shape[-1] == 17 else matrix.mean(1)  # CLS, or all patches
    expected = scores.view(3, 2, 2, 2, 2).mean((2, 4)).flatten(1)
    torch.testing.assert_close(group.tokens.cls_attention, expected, atol=1e-6, rtol=0)
    assert expected.std() > 1e-3
    assert group.tokens.keys.shape == (3, 4, 8)


@torch.no_grad()
def test_the_projector_gets_only_the_tokens_that_remain(asked):
    model, inputs = asked
    family = ModelFamily(model)
    compress_inputs(model, inputs, VisionZip(keep=2), family=family)  # the first call asks
    rows = []
    handle = family.projector.register_forward_hook(lambda _m, args, out: rows.append(out.flatten(0, -2).shape[0]))
    compress_inputs(model, inputs, VisionZip(keep=2), family=family)
    handle.remove()
    assert rows == [6 if family.projects_each_token else 12]
    assert family.projects_each_token == (type(model).__name__ in PROJECTS_EACH_TOKEN)


@pytest.mark.parametrize("compressor", [VisionZip(keep=2), KMeans(keep=2), Pool2d(factor=2), FastV(keep=2, layer=1)])
def test_methods_answer_through_attach(asked, compressor):
    model, inputs = asked
    if isinstance(compressor, FastV) and has_sliding_windows(family_of(model)):
        with pytest.raises(UserError, match="sliding-window layers"):
            vlmzip.attach(model, compressor)
        return
    with vlmzip.attach(model, compressor) as compressed:
        answer = compressed.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)
        left = compressor.token_count(Grid(1, 2, 2))
        assert [image.by_layer[-1] for image in compressed.report.images] == [left] * 3
    assert answer.shape == (3, inputs["input_ids"].shape[1] + 3)


def test_other_counts_of_placeholders_are_refused(asked):
    """In one image too few; the sum would fit, if images were not told apart."""
    model, inputs = asked
    fewer = {**inputs, "input_ids": inputs["input_ids"].clone()}
    fewer["input_ids"][0, -2] = 5
    with pytest.raises(UserError, match=r"the prompt has 11 image placeholders, but .* makes 12 visual tokens"):
        vlmzip.attach(model, VisionZip(keep=2))(**fewer)


def test_an_attention_that_turns_its_queries_in_another_way_is_refused(asked, monkeypatch):
    """The recorded queries and keys would give other scores than the model's own."""
    model, inputs = asked
    monkeypatch.setattr(Tower, "queries_and_keys", lambda *_: (torch.randn(3, 16, 32), torch.randn(3, 16, 32)))
    with pytest.raises(UserError, match="is of a kind that vlmzip does not know"):
        compress_inputs(model, inputs, VisionZip(keep=2), family=ModelFamily(model))


def test_other_patches_of_a_token_are_refused(asked, monkeypatch):
    model, inputs = asked
    by_token = Tower.by_token
    monkeypatch.setattr(Tower, "by_token", lambda *args: by_token(*args).flip(0))
    with pytest.raises(UserError, match=r"which patches of .* make a visual token"):
        compress_inputs(model, inputs, VisionZip(keep=2), family=ModelFamily(model))


@pytest.mark.parametrize(("tokens", "grid"), [(1, (1, 1, 1)), (16, (1, 4, 4)), (15, (1, 1, 15)), (256, (1, 16, 16))])
def test_tokens_lie_on_a_square_if_they_fill_one(tokens, grid):
    assert square_of(tokens) == Grid(*grid)
