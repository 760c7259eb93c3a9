"""Scores of visual tokens whose patches the model itself shows, against the attention that it computes by patch."""

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from vlmzip import Signal, Site, UserError
from vlmzip.lab.conformance.families import FAMILIES, Tiny
from vlmzip.lab.conformance.prompts import Prompts
from vlmzip.lab.conformance.tiny import folders, model_class, tiny_model
from vlmzip.models import family_of

NEEDS = frozenset({Signal.CLS_ATTENTION, Signal.KEYS})
#: Rows and columns of tokens of the images with even and with odd numbers.
GRIDS = dict.fromkeys(("lfm2_vl", "muse_spark", "video_llama_3", "gemma4", "qwen2_5_omni"), ((3, 2), (2, 2)))
GRIDS |= {"minicpm_ocr": ((4, 2), (2, 2)), "minicpmv4_6": ((2, 1), (1, 1))}
#: Patches per side of a token in the last layer, if not 2.
SIDES = {"gemma4": 3}
#: Encoders that get the patches of each token one after another. Others get them row by row.
IN_ORDER = ("video_llama_3", "minicpmv4_6", "qwen2_5_omni")
#: Encoders that get the patches of all images as one sequence. A token's score is then the sum over attending patches.
ONE_SEQUENCE = (*IN_ORDER, "muse_spark", "minicpm_ocr")

pytestmark = pytest.mark.filterwarnings("ignore")


def made(name):
    is_old = Version(transformers.__version__) < Version("5.23")
    if name not in folders() or (is_old and name == "gemma4"):
        pytest.skip("this version of transformers has no such model, or another config")
    model, tiny = tiny_model(model_class(name), FAMILIES.get(name, Tiny()).changes), FAMILIES.get(name, Tiny())
    return model, Prompts(model, tiny)


def attention_of_patches(name, model, images):
    """Return the attention matrix of the last layer, [patches, patches], as the attention function computes it."""
    matrices = []

    def catch(module, query, key, value, attention_mask=None, scaling=None, **_options):
        shared = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
        scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        weights = (scores if attention_mask is None else scores + attention_mask).softmax(-1)
        matrices.append(weights)
        return (weights @ value).transpose(1, 2), None

    AttentionInterface.register("catching patches", catch)
    AttentionMaskInterface.register("catching patches", eager_mask)
    encoder = family_of(model).vision_encoder
    before = encoder.config._attn_implementation
    encoder.set_attn_implementation("catching patches")
    try:
        getattr(model, "get_image_features", model.base_model.get_image_features)(**images, return_dict=True)
    finally:
        encoder.set_attn_implementation(before)
    return matrices[-1][0].mean(0)


def naive_scores(name, model, prompts, image):
    """Return the score of each token of one image: the mean over its patches of the attention that they receive."""
    matrix = attention_of_patches(name, model, prompts.form(prompts.encodes, [image]))
    (rows, cols), side = GRIDS[name][image % 2], SIDES.get(name, 2)
    count = rows * cols * side**2
    received = matrix[:count, :count].sum(0)  # without padding
    if name not in ONE_SEQUENCE:
        received = received / count
    scores = []
    for row in range(rows):
        for col in range(cols):
            if name in IN_ORDER:
                first = (row * cols + col) * side**2
                patches = range(first, first + side**2)
            else:
                patches = [(row * side + y) * cols * side + col * side + x for y in range(side) for x in range(side)]
            scores.append(sum(received[patch] for patch in patches) / side**2)
    return torch.stack(scores)


@pytest.mark.parametrize("name", GRIDS)
@torch.no_grad()
def test_scores_are_means_over_the_patches_that_make_a_token(name):
    """Of two images of different sizes in one call, which some encoders pad."""
    model, prompts = made(name)
    family = family_of(model)
    expected = [naive_scores(name, model, prompts, image) for image in (0, 1)]
    both, second = prompts.batch([1, "image", 105, 106, "image", 107]), prompts.batch([1, "image", 5], first=1)
    for inputs, images in ((both, (0, 1)), (second, (1,)), (both, (0, 1))):
        groups = family.encode(inputs, Site.PRE_PROJECTOR, NEEDS).groups
        scores = {n: s for g in groups for n, s in zip(g.numbers, g.tokens.cls_attention, strict=True)}
        for number, image in enumerate(images):
            torch.testing.assert_close(scores[number], expected[image], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("idefics2", "gives patches that make several visual tokens each, as cross-attention does"),
        ("hunyuan_vl", "5 of 11 visual tokens are made of no patch of .*, such as the ends of rows"),
    ],
)
@torch.no_grad()
def test_tokens_that_are_not_made_of_patches_of_their_own_are_refused(name, reason):
    model, prompts = made(name)
    with pytest.raises(UserError, match=reason):
        family_of(model).encode(prompts.batch([1, "image", 5]), Site.PRE_PROJECTOR, NEEDS)
