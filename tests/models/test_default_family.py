"""Families without code: the model is asked for its features, and answers without compression as it does alone."""

import pytest
import torch
from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
)

from tests.tiny import IMAGE_TOKEN, LLM, batch
from vlmzip import Grid, NoCompression, Pool2d, RandomTokens, Site, UserError, VisionZip, compress_inputs
from vlmzip.models.family import Family as ModelFamily
from vlmzip.models.family import square_of

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


def test_what_the_encoder_attends_to_cannot_be_asked(asked):
    model, inputs = asked
    with pytest.raises(UserError, match=f"what the encoder of {type(model).__name__} attends to is not known yet"):
        compress_inputs(model, inputs, VisionZip(keep=2), family=ModelFamily(model))


@pytest.mark.parametrize(("tokens", "grid"), [(1, (1, 1, 1)), (16, (1, 4, 4)), (15, (1, 1, 15)), (256, (1, 16, 16))])
def test_tokens_lie_on_a_square_if_they_fill_one(tokens, grid):
    assert square_of(tokens) == Grid(*grid)
