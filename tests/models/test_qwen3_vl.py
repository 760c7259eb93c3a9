"""Qwen3-VL with three streams of deepstack: features that the LLM adds behind its first three layers."""

import dataclasses

import pytest
import torch

import vlmzip
from tests.families import FAMILIES
from vlmzip import BudgetError, Chain, FastV, KMeans, LLaVolta, NoCompression, Pool2d, RandomTokens, Site, SparseVLM
from vlmzip.models import family_of

ROWS = ([1, "image", 5, 6], [1, "image", 4, "image", 7], [3, 4])


@pytest.fixture(scope="module")
def family():
    family = FAMILIES["qwen3_vl"]()
    family.model = type(family).build(streams=(0, 1, 2))
    return family


@pytest.mark.parametrize("pad", ["left", "right"])
@torch.no_grad()
def test_without_compression_the_model_is_the_plain_one(family, pad):
    inputs = family.batch(*ROWS, pad=pad)
    assert torch.equal(vlmzip.attach(family.model, NoCompression())(**inputs).logits, family.model(**inputs).logits)


@torch.no_grad()
def test_streams_follow_the_map(family):
    """Every stream is pooled as the tokens are: the mean of the features of the same window."""
    inputs = family.batch(*ROWS)
    small = vlmzip.compress_inputs(family.model, inputs, Pool2d(factor=2))
    plain = family.model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    outputs = small["mm_encoder_outputs"]["image"]
    assert len(outputs.deepstack_features) == 3
    for number, report in enumerate(small.report.images):
        for stream, whole in zip(outputs.deepstack_features, plain.deepstack_features, strict=True):
            expected = report.token_map.apply(whole[number][None])[0]
            torch.testing.assert_close(stream[number], expected)
        assert not torch.equal(outputs.deepstack_features[0][number], outputs.deepstack_features[1][number])


@pytest.mark.parametrize(
    "method",
    [FastV(layer=1), LLaVolta(layer=(1, 3), stride=2), SparseVLM(counts=(5, 3), layer=(2, 3)),
     Chain(compressors=(Pool2d(factor=2), KMeans(keep=2, site=Site.IN_LLM, layer=1)))],
    ids=lambda method: method.name(),
)  # fmt: skip
def test_layers_that_still_get_features_are_refused(family, method):
    early = min(layer for layer in method.layers if layer < 3)
    message = (
        f"layer={early} is too early in this LLM, whose layers before 3 still get features of the image: give 3 to 3"
    )
    with pytest.raises(BudgetError, match=message):
        vlmzip.attach(family.model, method)
    with pytest.raises(BudgetError, match=message):
        method.reached(family_of(family.model).profile())


def test_default_layers_move_to_the_first_free_one(family):
    profile = family_of(family.model).profile()
    assert FastV().placed(profile).layer == 3
    assert FastV(layer=1).placed(profile).layer == 1
    assert RandomTokens().placed(profile) == RandomTokens()
    assert RandomTokens(site=Site.IN_LLM).placed(profile).layer == 3
    assert SparseVLM().placed(profile).layer == (3,)
    assert SparseVLM().placed(dataclasses.replace(profile, layers=36, first_layer=5)).layer == (5, 7, 16)


@pytest.mark.parametrize(
    ("method", "layers"),
    [("fastv(keep=5)", (3,)), (LLaVolta(), (3,)), (SparseVLM(), (3,)), (Chain(), (3,)),
     (KMeans(keep=2, site=Site.IN_LLM), (3,))],
    ids=["fastv", "llavolta", "sparsevlm", "chain", "kmeans"],
)  # fmt: skip
def test_attach_and_budgets_move_default_layers_too(family, method, layers):
    with vlmzip.attach(family.model, method) as compressed:
        assert compressed.compressor.layers == layers
        compressed.switch(vlmzip.NoCompression())
        compressed.switch(method)
        assert compressed.compressor.layers == layers
        profile = family_of(family.model).profile()
    method = vlmzip.spec.read(method) if isinstance(method, str) else method
    if not isinstance(method, Chain):
        assert method.at_budget("90%", profile)[0].layers == layers


@torch.no_grad()
def test_behind_the_last_stream_tokens_can_go(family):
    compressed = vlmzip.attach(family.model, FastV(layer=3, keep=5))
    compressed(**family.batch(*ROWS))
    assert [image.by_layer for image in compressed.report.images] == [(24, 24, 24, 5), (15, 15, 15, 5), (24, 24, 24, 5)]


@torch.no_grad()
def test_a_resampler_has_nothing_for_later_layers(family):
    method = vlmzip.QFormer(queries=4, depth=2, width=16, heads=2)
    with pytest.warns(UserWarning, match="untrained"):
        compressed = vlmzip.attach(family.model, method)
    inputs = family.batch(*ROWS)
    small = vlmzip.compress_inputs(family.model, inputs, method, resampler=compressed.resampler)
    streams = small["mm_encoder_outputs"]["image"].deepstack_features
    assert [[tuple(image.shape) for image in stream] for stream in streams] == [[(4, 48)] * 3] * 3
    assert not any(image.any() for stream in streams for image in stream)
