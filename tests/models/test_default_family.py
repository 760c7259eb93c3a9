"""Families without code: the model is asked for its features, and answers without compression as it does alone."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from threading import Barrier

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image
from transformers import (
    AttentionInterface,
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    JanusConfig,
    JanusForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

import vlmzip
from tests.tiny import IMAGE_TOKEN, LLM, batch, tiny_tokenizer
from vlmzip import (
    DFMR,
    Downsample,
    FastV,
    Grid,
    KMeans,
    NoCompression,
    Pool2d,
    QFormer,
    RandomTokens,
    Signal,
    Site,
    UserError,
    VisionZip,
    compress_inputs,
)
from vlmzip.models import family_of
from vlmzip.models.encoder_run import WithStreams
from vlmzip.models.family import Family as ModelFamily
from vlmzip.models.prompt_layout import placeholders_of_groups, square_of
from vlmzip.models.towers.tower import Tower
from vlmzip.runtime.fitting import has_sliding_windows
from vlmzip.runtime.generation import COPIES_WHOLE_ROWS

PROJECTS_EACH_TOKEN = tuple(f"{name}ForConditionalGeneration" for name in ("InternVL", "Janus", "Glm4v"))

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


def smolvlm():
    text = dict(model_type="llama", **LLM)
    return SmolVLMForConditionalGeneration(
        SmolVLMConfig(
            vision_config=dict(**VIT, image_size=32), text_config=text, image_token_id=IMAGE_TOKEN, scale_factor=2,
            pad_token_id=0,
        )
    )  # fmt: skip


def janus():
    """`get_image_features` is only on the model without its head."""
    codes = dict(
        embed_dim=8, num_embeddings=8, base_channels=32, channel_multiplier=[1, 1], image_token_embed_dim=8,
        num_patches=4, latent_channels=8, z_channels=8,
    )  # fmt: skip
    vision = dict(**{**VIT, "patch_size": 16}, image_size=32, projection_dim=48)
    text = dict(model_type="llama", **LLM)
    return JanusForConditionalGeneration(
        JanusConfig(vision_config=vision, text_config=text, vq_config=codes, image_token_id=IMAGE_TOKEN)
    )


#: Positions with three axes, from the model's own `get_rope_index`.
ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
PATCHES = dict(depth=2, num_heads=4, patch_size=4, spatial_merge_size=2, temporal_patch_size=2)


def qwen2_vl():
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            vision_config=dict(**PATCHES, embed_dim=32, mlp_ratio=2, hidden_size=48),
            text_config=dict(**LLM, rope_parameters=ROTARY),
            image_token_id=IMAGE_TOKEN, video_token_id=98, vision_start_token_id=97, vision_end_token_id=96,
        )
    )  # fmt: skip


def glm4v():
    return Glm4vForConditionalGeneration(
        Glm4vConfig(
            vision_config=dict(**PATCHES, hidden_size=32, intermediate_size=64, out_hidden_size=48, image_size=16),
            text_config=dict(**LLM, head_dim=8, rope_parameters={**ROTARY, "partial_rotary_factor": 1.0}),
            image_token_id=IMAGE_TOKEN, video_token_id=98, image_start_token_id=97, image_end_token_id=96,
        )
    )  # fmt: skip


IMAGES = {"pixel_values": torch.randn(3, 3, 32, 32)}
SIZED = {**IMAGES, "image_sizes": torch.tensor([[32, 32]] * 3)}
#: Images of each row, and an empty one that pads the second.
BY_ROW = {"pixel_values": torch.cat([torch.randn(3, 3, 32, 32), torch.zeros(3, 3, 32, 32)]).view(3, 2, 3, 32, 32)}
CUT = {"pixel_values": torch.randn(3 * 16, 2 * 3 * 4 * 4), "image_grid_thw": torch.tensor([[1, 4, 4]] * 3)}

#: Makers, and the inputs that describe three images of four tokens each.
VITS = {
    "internvl": (internvl, IMAGES),
    "gemma3": (gemma3, IMAGES),
    "aya_vision": (aya_vision, IMAGES),
    "mistral3": (mistral3, SIZED),
}
MODELS = {
    **VITS,
    "smolvlm": (smolvlm, BY_ROW),
    "janus": (janus, IMAGES),
    "qwen2_vl": (qwen2_vl, CUT),
    "glm4v": (glm4v, CUT),
}
if Version(transformers.__version__) < Version("5.23"):
    del MODELS["smolvlm"]  # its features are one tensor there, [views, tokens, width], and tell rows apart by its shape


@cache
def made(name):
    """A model, and inputs with two images in one row and one in another."""
    maker, images = MODELS[name]
    torch.manual_seed(0)
    model = maker().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
    image = [IMAGE_TOKEN] * 4
    inputs = batch([1, *image, 5, *image, 6], [1, *image, 7], [1, 2]) | images
    is_image = (inputs["input_ids"] == IMAGE_TOKEN).long()
    if name == "gemma3":
        inputs["token_type_ids"] = is_image
    if "image_grid_thw" in images:
        inputs["mm_token_type_ids"] = is_image
    return model, inputs


@pytest.fixture(params=MODELS)
def asked(request):
    return made(request.param)


@pytest.fixture(params=VITS)
def vit(request):
    """A model whose encoder sees 4 x 4 patches of each image."""
    return made(request.param)


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
    per_token = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}
    assert inputs.keys() - per_token <= set(family.image_inputs)
    assert family.image_inputs[0] == "pixel_values"


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
def test_tokens_are_scored_by_the_attention_that_the_model_computes(vit):
    model, inputs = vit
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


@torch.no_grad()
def test_an_image_of_one_token_decides_nothing():
    """Whether tokens are projected by themselves, and which patches make a token, is decided with the next image."""
    model, inputs = made("internvl")
    family, one = ModelFamily(model), batch([1, IMAGE_TOKEN, 5]) | {"pixel_values": torch.randn(1, 3, 16, 16)}
    for _ in range(2):
        small = compress_inputs(model, one, VisionZip(keep=1), family=family)
        assert torch.equal(model(**small).logits, model(**one).logits)
        assert (family.projects_each_token, family.is_confirmed) == (None, False)
    compress_inputs(model, inputs, VisionZip(keep=2), family=family)
    assert (family.projects_each_token, family.is_confirmed) == (True, True)


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
    with pytest.raises(UserError, match=r"the prompt has 11 image placeholders, but .* 12 visual tokens"):
        vlmzip.attach(model, VisionZip(keep=2))(**fewer)


def tiled():
    """InternVL's inputs: an image of four tiles, whose placeholders are one run, and an image of one view."""
    inputs = batch([1, *[IMAGE_TOKEN] * 16, 5, *[IMAGE_TOKEN] * 4, 6])
    return made("internvl")[0], inputs | {"pixel_values": torch.randn(5, 3, 32, 32)}


@torch.no_grad()
def test_tiles_in_one_run_of_placeholders_are_views():
    model, inputs = tiled()
    small = compress_inputs(model, inputs, Pool2d(factor=2, site=Site.POST_PROJECTOR), family=ModelFamily(model))
    assert [[view.grid for view in image.views] for image in small.report.images] == [
        [Grid(1, 2, 2)] * n for n in (4, 1)
    ]
    tiles = torch.stack(list(model.get_image_features(inputs["pixel_values"]).pooler_output))
    torch.testing.assert_close(torch.cat(list(small["mm_encoder_outputs"]["image"].pooler_output)), tiles.mean(1))


@torch.no_grad()
def test_a_conversation_with_tiles_continues():
    """The whole conversation is given again, with the pixels of all views."""
    model, inputs = tiled()
    with vlmzip.attach(model, VisionZip(keep_per_view=2, positions="original")) as compressed:
        whole = compressed(**inputs)
        first = {name: inputs[name][:, :18] for name in ("input_ids", "attention_mask")}
        cache = compressed(**first, pixel_values=inputs["pixel_values"][:4], use_cache=True).past_key_values
        later = compressed(**inputs, past_key_values=cache)
    torch.testing.assert_close(later.logits, whole.logits[:, -later.logits.shape[1] :], atol=1e-5, rtol=0)


@pytest.mark.parametrize("compressor", [NoCompression(), VisionZip(keep=2)])
def test_images_with_the_placeholders_of_others_are_refused(compressor):
    """The sum fits. The first image has three placeholders of four, and the second five."""
    model, _ = made("internvl")
    inputs = batch([1, *[IMAGE_TOKEN] * 3, 5, *[IMAGE_TOKEN] * 5, 6]) | {"pixel_values": torch.randn(2, 3, 32, 32)}
    for family in (known := ModelFamily(model), known):  # a second call stops at the projector
        with pytest.raises(UserError, match=r"not those of the images: .* makes \[4, 4\] visual tokens"):
            compress_inputs(model, inputs, compressor, family=family)


def test_an_attention_that_turns_its_queries_in_another_way_is_refused(vit, monkeypatch):
    """The recorded queries and keys would give other scores than the model's own."""
    model, inputs = vit
    monkeypatch.setattr(Tower, "queries_and_keys", lambda *_: (torch.randn(3, 16, 32), torch.randn(3, 16, 32)))
    with pytest.raises(UserError, match="is of a kind that vlmzip does not know"):
        compress_inputs(model, inputs, VisionZip(keep=2), family=ModelFamily(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("factor", "is_right"), [(1, True), (1.2, False)])
def test_another_scale_of_scores_is_refused_in_every_precision(vit, dtype, factor, is_right):
    model, inputs = vit
    model = copy.deepcopy(model).to(dtype)
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    family = ModelFamily(model)
    family.tower.attentions = [replace(each, scale=factor * each.scale) for each in family.tower.attentions]
    with nullcontext() if is_right else pytest.raises(UserError, match="is of a kind that vlmzip does not know"):
        compress_inputs(model, inputs, VisionZip(keep=2), family=family)


@pytest.mark.parametrize(("precision", "is_right"), [("high", True), ("highest", False)])
def test_the_rounding_of_tf32_is_allowed_where_it_is_on(precision, is_right, monkeypatch):
    """GPUs round factors to 10 bits, which changes scores by parts in a thousand."""
    model, inputs = made("internvl")
    queries_and_keys = Tower.queries_and_keys
    rounded = lambda *args: [x.bfloat16().float() / 8 + x * 7 / 8 for x in queries_and_keys(*args)]  # noqa: E731
    monkeypatch.setattr(Tower, "queries_and_keys", rounded)
    torch.set_float32_matmul_precision(precision)
    try:
        with nullcontext() if is_right else pytest.raises(UserError, match="is of a kind that vlmzip does not know"):
            compress_inputs(model, inputs, VisionZip(keep=2), family=ModelFamily(model))
    finally:
        torch.set_float32_matmul_precision("highest")


def test_other_patches_of_a_token_than_expected_are_found_by_asking(vit, monkeypatch):
    model, inputs = vit
    needs = frozenset({Signal.CLS_ATTENTION, Signal.KEYS})

    def signals(family):
        (group,) = family.encode(inputs, Site.PRE_PROJECTOR, needs).groups
        return group.tokens.cls_attention, group.tokens.keys

    expected, by_token = signals(ModelFamily(model)), Tower.by_token
    monkeypatch.setattr(Tower, "by_token", lambda *args: by_token(*args).flip(0))
    family, runs = ModelFamily(model), []
    handle = family.vision_encoder.register_forward_hook(lambda *_: runs.append(1))
    for _ in range(2):
        torch.testing.assert_close(signals(family), expected, atol=1e-6, rtol=1e-5)
    handle.remove()
    assert len(runs) == 3  # the model is asked once, in a run of its own


class WithoutEncoderOutputs(InternVLForConditionalGeneration):
    def forward(self, input_ids=None, pixel_values=None):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        ({"__class__": WithoutEncoderOutputs}, "it has no mm_encoder_outputs among the arguments of forward"),
        ({"get_decoder": torch.nn.Identity}, "it has no LLM with layers that get_decoder returns"),
        ({"pack_image_features": print}, "it has no family file, and it packs several views"),
        ({"image_newline": torch.zeros(48)}, "it has no family file, and it packs several views"),
    ],
)
def test_what_the_default_family_needs_is_named(change, missing):
    model = internvl()
    for name, value in change.items():
        object.__setattr__(model, name, value)
    with pytest.raises(UserError, match=missing) as error:
        vlmzip.attach(model, VisionZip(keep=2))
    assert "\n" not in str(error.value)


def test_streams_that_the_config_does_not_name_are_refused():
    """They would be lost without an error."""
    model, inputs = made("internvl")
    family = ModelFamily(model)
    features = family.get_features

    def with_streams(**arguments):
        out = features(**arguments)
        return WithStreams(pooler_output=out.pooler_output, deepstack_features=[list(out.pooler_output)])

    family.get_features = with_streams
    with pytest.raises(UserError, match="after 1 layers of its LLM, and vlmzip expects 0"):
        compress_inputs(model, inputs, NoCompression(), family=family)


def test_models_without_an_image_token_are_refused():
    model = internvl()
    model.config.__dict__["image_token_id"] = None
    with pytest.raises(UserError, match="it has no image_token_id in its config"):
        family_of(model)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*is untrained")
def test_resamplers_are_built_before_the_first_run(asked):
    """Their input is as wide as the projector's, or as its output if the projector joins patches."""
    model, inputs = asked
    with vlmzip.attach(model, QFormer(queries=2, depth=1, width=16, heads=2)) as compressed:
        assert compressed(**inputs).logits.isfinite().all()
        assert [image.after for image in compressed.report.images] == [2] * 3


@pytest.mark.filterwarnings("ignore:.*is untrained")
def test_features_of_another_width_than_the_projector_suggests_are_refused():
    model, inputs = made("internvl")
    compressed = vlmzip.attach(model, QFormer(queries=2, depth=1, width=16, heads=2))
    vars(compressed._family)["_width_before_projector"] = 5
    with pytest.raises(UserError, match=r"have width 128, not 5 as its weights suggest"):
        compressed(**inputs)


class Words:
    """A processor of a default family: four placeholders for each image."""

    chat_template, tokenizer = None, tiny_tokenizer()

    def __call__(self, images, text, padding, return_tensors):
        pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 for image in images])
        ids = self.tokenizer([words.replace("<image>", "<image> " * 4) for words in text], return_tensors="pt")
        return transformers.BatchFeature({**ids, "pixel_values": pixels})


@pytest.mark.parametrize("name", ["internvl", "gemma3"])
def test_thresholds_are_calibrated_without_a_family_file(name):
    model, _ = made(name)
    images = [Image.effect_noise((32, 32), sigma).convert("RGB") for sigma in (1, 10, 20, 40, 80, 120)]
    calibration = vlmzip.calibrate(model, images, DFMR(max_factor=2), 3, processor=Words())
    assert calibration.before == [4] * 6
    assert sorted(calibration.after) == [1, 1, 4, 4, 4, 4]


def test_two_threads_may_ask_at_once():
    model, inputs = made("internvl")

    def scores(_):
        (group,) = ModelFamily(model).encode(inputs, Site.PRE_PROJECTOR, frozenset({Signal.CLS_ATTENTION})).groups
        return group.tokens.cls_attention

    alone = scores(0)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.allclose(together, alone, atol=1e-6) for together in pool.map(scores, range(12)))


@dataclass
class Routed(BaseModelOutputWithPooling):
    """The encoder output of a model whose `forward` reads more than visual tokens."""

    router_logits: torch.Tensor | None = None


def test_threads_keep_the_further_fields_of_their_own_images():
    """Both runs of the encoder end before either thread writes its output."""
    model, inputs = made("internvl")
    family, both_ran = ModelFamily(model), Barrier(2, timeout=60)
    features = family.get_features

    def routed(pixel_values, **arguments):
        out = features(pixel_values, **arguments)
        both_ran.wait()
        return Routed(pooler_output=out.pooler_output, router_logits=pixel_values.mean())

    def logits_of(scale):
        images = {**inputs, "pixel_values": inputs["pixel_values"] + scale}
        small = compress_inputs(model, images, Pool2d(factor=2), family=family)
        return small["mm_encoder_outputs"]["image"].router_logits

    family.get_features = routed
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(logits_of, (0.0, 5.0))
    assert first == inputs["pixel_values"].mean()
    assert second == (inputs["pixel_values"] + 5).mean()


@torch.no_grad()
@pytest.mark.skipif(not COPIES_WHOLE_ROWS, reason="transformers before 5.19 gives copies of a row other images")
def test_copies_of_a_row_see_its_images(asked):
    """Rows have two images, one and none. With one candidate, each sampled copy is the greedy answer of its row."""
    model, inputs = asked
    settings = {"max_new_tokens": 4, "pad_token_id": 0, "eos_token_id": 0}
    copies = {"do_sample": True, "top_k": 1, "num_return_sequences": 2}

    def generate(**how):
        small = compress_inputs(model, inputs, VisionZip(keep=3), generating=True, family=ModelFamily(model))
        return model.generate(**small, **settings, **how)

    greedy = generate(do_sample=False)
    with vlmzip.attach(model, VisionZip(keep=3)) as compressed:
        answers = compressed.generate(**inputs, **settings, **copies)
    assert torch.equal(answers[:, -4:], greedy[:, -4:].repeat_interleave(2, 0))
    if not isinstance(model, Glm4vForConditionalGeneration):  # its own `generate` mixes the images of a row's copies
        assert torch.equal(generate(**copies), greedy.repeat_interleave(2, 0))
    assert len(set(map(tuple, greedy[:, -4:].tolist()))) > 1


class CountsPlaceholders(ModelFamily):
    """A family whose author has defined `downsample` and left `layouts`, which counts placeholders."""

    sites = (Site.PIXELS, *ModelFamily.sites)

    def downsample(self, inputs, grids):
        return {"pixel_values": inputs["pixel_values"][..., :16, :16]}


@torch.no_grad()
def test_layouts_that_do_not_follow_resized_images_are_named():
    model, inputs = made("internvl")
    with pytest.raises(UserError, match=r"CountsPlaceholders\.layouts .* must follow the shapes of the pixels"):
        compress_inputs(model, inputs, Downsample(keep=1), family=CountsPlaceholders(model))


def hooks_of(model):
    """Return the module and the name of each hook, and whether transformers takes its own as installed."""
    return [
        (name, [getattr(hook, "__qualname__", hook) for hooks in (part._forward_hooks, part._forward_pre_hooks)
                for hook in hooks.values()], getattr(part, "_output_capturing_hooks_installed", False))
        for name, part in model.named_modules()
    ]  # fmt: skip


@torch.no_grad()
def test_a_call_leaves_only_the_hooks_of_the_plain_call(asked):
    """If `get_image_features` asks the encoder for hidden states, transformers' hooks stay and cannot be pickled.

    We do not remove them, because the plain model may run in another thread and use them.
    """
    model, inputs = asked
    plain, inner = copy.deepcopy(model), copy.deepcopy(model)
    plain(**inputs)
    compressed = vlmzip.attach(inner, VisionZip(keep=2))
    expected = compressed(**inputs).logits
    assert torch.equal(copy.deepcopy(compressed)(**inputs).logits, expected)
    assert hooks_of(inner) == hooks_of(plain)
    if not any(hooks for _, hooks, _ in hooks_of(plain)):
        assert torch.equal(pickle.loads(pickle.dumps(compressed))(**inputs).logits, expected)


@pytest.mark.parametrize(("tokens", "grid"), [(1, (1, 1, 1)), (16, (1, 4, 4)), (15, (1, 1, 15)), (256, (1, 16, 16))])
def test_tokens_lie_on_a_square_if_they_fill_one(tokens, grid):
    assert square_of(tokens) == Grid(*grid)


@pytest.mark.parametrize("name", ["smolvlm", "mistral3"])
def test_trainer_hands_over_all_inputs_of_images(name, tmp_path):
    """It drops the columns of a data set that the signature of the façade's `forward` does not name."""
    if name not in MODELS:
        pytest.skip("this model needs transformers 5.23")
    model, inputs = made(name)
    model, seen = copy.deepcopy(model), []
    rows = [{key: value[:1] for key, value in inputs.items()} | {"labels": inputs["input_ids"][:1]}]
    if name == "smolvlm":
        rows[0]["pixel_attention_mask"] = torch.ones(1, 2, 32, 32, dtype=torch.bool)
    else:
        rows[0] |= {"pixel_values": inputs["pixel_values"][:2], "image_sizes": inputs["image_sizes"][:2]}
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=1, per_device_train_batch_size=1, report_to=[], use_cpu=True, save_strategy="no"
    )
    compressed = vlmzip.attach(model, RandomTokens(keep=2, site=Site.POST_PROJECTOR))
    compressed.register_forward_pre_hook(lambda _module, _args, given: seen.append(given), with_kwargs=True)
    trainer = transformers.Trainer(compressed, arguments, train_dataset=rows, data_collator=lambda parts: parts[0])
    trainer.train()
    assert rows[0].keys() <= seen[0].keys()
    assert [image.after for image in compressed.report.images] == [2, 2]


@pytest.mark.parametrize(("between", "counts"), [(0, [2, 2, 3, 1]), (1, [4, 3, 1]), (2, [4, 4])])
def test_runs_of_placeholders_are_parts_of_one_image_if_few_tokens_are_between_them(between, counts):
    assert placeholders_of_groups([(1, 3), (4, 6), (10, 13), (15, 16)], between) == counts
