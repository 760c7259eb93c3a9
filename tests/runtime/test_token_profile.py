"""The token profile, and the formulas of the papers on it."""

import pytest
import torch

from tests.tiny import batch, prompt
from vlmzip import LLaVolta, NoCompression, VisionZip, attach
from vlmzip.compressor import Profile
from vlmzip.models import family_of
from vlmzip.runtime.flops import kv_cache_bytes, llavolta_flops, prefill_flops, visionzip_flops
from vlmzip.runtime.token_profile import TokenProfile
from vlmzip.visual_tokens import Grid

#: LLaVolta's compression ratios in percent for LLaVA-1.5-7B, recomputed by Eq. 3; all but 825.81 as printed.
EQUATION_3 = {
    (2, 8): 556.52, (2, 4): 336.84, (2, 2): 188.24, (2, 16): 825.81, (16, 8): 177.78, (16, 4): 160.00, (1, 64): 2155.8,
}  # fmt: skip
#: LLaVolta's printed TFLOPs, Tables 2 and 5.
PRINTED = {
    (0, 1): 8.26, (2, 8): 2.14, (2, 4): 3.02, (2, 2): 4.77, (16, 8): 5.00, (16, 4): 5.47, (16, 2): 6.40,
}  # fmt: skip


def llavolta_profile(layer, stride, text=0):
    method = NoCompression() if stride == 1 else LLaVolta(layer=layer, stride=stride)
    return TokenProfile(576, tuple(method.tokens_by_layer(Profile(Grid(1, 24, 24), 32))), text)


@pytest.mark.parametrize(("setting", "percent"), EQUATION_3.items())
def test_the_compression_ratio_is_llavoltas_equation_3(setting, percent):
    layer, stride = setting
    profile = llavolta_profile(layer, stride)
    length, left = 576, 576 // stride
    assert profile.compression_ratio == pytest.approx(32 * length / ((32 - layer) * left + layer * length))
    assert 100 * profile.compression_ratio == pytest.approx(percent, abs=0.05)
    assert profile.retention == pytest.approx(1 / profile.compression_ratio)


@pytest.mark.parametrize(("setting", "tera"), PRINTED.items())
def test_llavoltas_printed_figures_are_one_formula_with_62_tokens_of_text(setting, tera):
    profile = llavolta_profile(*setting, text=62)
    assert llavolta_flops(profile.all, 4096, 11008) / 1e12 == pytest.approx(tera, abs=0.01)


def test_visionzips_formula():
    # T (4nd^2 + 2n^2d + 2ndm), written out for two layers with 3 and 2 tokens of width 5, MLP 7.
    assert visionzip_flops([3, 2], 5, 7) == (4 * 3 * 25 + 2 * 9 * 5 + 2 * 3 * 5 * 7) + (
        4 * 2 * 25 + 2 * 4 * 5 + 2 * 2 * 5 * 7
    )


def test_the_profile_of_each_row_is_what_the_llm_got(llava):
    rows = [prompt(1, "image", 7, 8), prompt(1, "image", 9, "image", 5, 6)]
    inputs = batch(*rows, images=3)
    compressed = attach(llava, LLaVolta(layer=1, stride=4))
    with torch.no_grad():
        out = compressed(**inputs)
    first, second = TokenProfile.rows(compressed.report, [len(row) for row in rows])
    assert first == TokenProfile(36, (36, 9, 9, 9), 3)
    assert second == TokenProfile(72, (72, 18, 18, 18), 4)
    assert second.all == [76, 22, 22, 22]
    assert [layer.keys.shape[2] for layer in out.past_key_values.layers] == second.all


def test_kv_bytes_are_those_of_a_cache_whose_layers_differ(llava):
    compressed, ids = attach(llava, LLaVolta(layer=2, stride=8)), prompt(1, "image", 7)
    with torch.no_grad():
        cache = compressed(**batch(ids, images=1)).past_key_values
    [profile] = TokenProfile.rows(compressed.report, [len(ids)])
    size = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    model_family = family_of(llava)
    assert profile.kv_bytes(model_family) == size == kv_cache_bytes(model_family, [38, 38, 6, 6])
    assert profile.prefill_flops(model_family) == prefill_flops(model_family, [38, 38, 6, 6])


def test_a_method_before_the_llm_has_the_same_count_at_every_layer(llava):
    compressed, ids = attach(llava, VisionZip(keep=9)), prompt(1, "image", 7)
    with torch.no_grad():
        compressed(**batch(ids, images=1))
    [profile] = TokenProfile.rows(compressed.report, [len(ids)])
    assert profile.visual == (9,) * 4
    assert profile.compression_ratio == 4
