import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.families import tiny_llava
from tests.tiny import batch, prompt
from vlmzip import QFormer, VisionZip, attach, mini
from vlmzip.lab.bench.presets import PRESETS, Qwen25VL, make_model
from vlmzip.models import family_of
from vlmzip.runtime.flops import flops_inside, kv_cache_bytes, prefill_flops
from vlmzip.visual_tokens import Grid


@pytest.mark.parametrize("tokens", [1, 7, 50])
def test_flops_are_those_that_torch_counts(tokens):
    # Torch counts matrix products that it sees; eager attention is made of nothing else.
    model = tiny_llava("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.ones(1, tokens, dtype=torch.long), logits_to_keep=1)
    # Some versions make the rotary table by a matrix product of positions and frequencies: no work of the layers.
    by_module = counter.get_flop_counts()
    rotary = sum(
        sum(counts.values()) for name, counts in by_module.items() if name.endswith("language_model.rotary_emb")
    )
    assert prefill_flops(family_of(model), tokens) == counter.get_total_flops() - rotary


def test_kv_bytes_are_those_of_the_cache(llava):
    with torch.no_grad():
        cache = llava(input_ids=torch.ones(1, 9, dtype=torch.long)).past_key_values
    size = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert kv_cache_bytes(family_of(llava), 9) == size


def counted_by_torch(model, tokens, device="cpu"):
    ids = torch.ones(1, tokens, dtype=torch.long, device=device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, logits_to_keep=1)
    return counter.get_total_flops()


@pytest.mark.parametrize("tokens", [20, 160])
def test_within_a_percent_of_torchs_counter_on_mini(tokens):
    model = mini.load()[0]
    model.set_attn_implementation("eager")
    counted = counted_by_torch(model, tokens)
    assert prefill_flops(family_of(model), tokens) == pytest.approx(counted, rel=0.01)


@pytest.mark.further
@pytest.mark.parametrize("name", ["llava-1.5-7b", "llava-1.5-13b"])
@pytest.mark.parametrize("tokens", [128, 640])
def test_within_a_percent_of_torchs_counter_at_published_dimensions(name, tokens):
    model = make_model(PRESETS[name].config(), "meta", torch.bfloat16, "eager")
    counted = counted_by_torch(model, tokens, "meta")
    assert prefill_flops(family_of(model), tokens) == pytest.approx(counted, rel=0.01)


def encoder_flops(tokens, width, mlp, layers, patches, patch_size):
    """By hand: projections, MLP, products between tokens in each layer; patches are a convolution."""
    layer = 2 * tokens * (4 * width**2 + 2 * width * mlp) + 4 * tokens**2 * width
    return layers * layer + 2 * patches * 3 * patch_size**2 * width


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_flops_inside_modules_are_those_of_encoder_and_projector(attention):
    model, inputs = tiny_llava(attention), batch(prompt(1, "image", 7), prompt(2, "image", 8), images=2)
    compressed = attach(model, VisionZip(keep=9))
    modules = [model.model.vision_tower, model.model.multi_modal_projector]
    with torch.no_grad():
        found = [flops_inside(modules, lambda m=m: m(**inputs)) for m in (model, compressed)]
    encoder = 2 * encoder_flops(37, 32, 64, 3, 36, 8)
    assert found == [encoder + 2 * 2 * tokens * (32 * 48 + 48 * 48) for tokens in (36, 9)]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def test_flops_inside_a_resampler_count_and_the_llms_do_not(llava):
    with pytest.warns(UserWarning, match="untrained"):
        compressed = attach(llava, QFormer(queries=4, depth=1, width=8, heads=2))
    with torch.no_grad():
        found = flops_inside([compressed.resampler], lambda: compressed(**batch(prompt(1, "image", 7), images=1)))
    reading = 2 * 37 * 2 * 32 * 8 + 2 * 4 * 2 * 8 * 8 + 4 * 4 * 37 * 8  # keys and values; queries, output; products
    itself = 2 * 4 * 4 * 8 * 8 + 4 * 4 * 4 * 8  # self-attention
    assert found == reading + itself + 2 * 4 * 2 * 8 * 32 + 2 * 4 * 8 * 48  # MLP, to the LLM


class TestQwen:
    """An encoder that attends in windows, and an LLM with fewer heads of keys than of queries."""

    PRESET = Qwen25VL(
        images=1, grid=Grid(1, 6, 5), layers=2, heads=4, key_value_heads=1, mlp=48, vision_layers=9, vision_heads=2,
        vision_mlp=32, vocabulary=151_936, ties_head=True,
    )  # fmt: skip

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    def test_tokens_of_other_windows_do_not_count(self, attention):
        model = make_model(self.PRESET.config(), "cpu", torch.float32, attention)
        inputs = self.PRESET.inputs(1, 4, "cpu", torch.float32)
        encoder, width = family_of(model).vision_encoder, 160
        with torch.no_grad():
            counted = flops_inside([encoder], lambda: model(**inputs, logits_to_keep=1))
        patches = 6 * 5 * 4
        linear = 2 * patches * (4 * width**2 + 3 * width * 32)
        windows = [64, 16, 32, 8]  # 4 x 4 tokens of 4 patches, and what is left at the right and at the bottom
        products = [4 * width * sum(size**2 for size in sizes) for sizes in (windows, [patches])]
        embedding = 2 * patches * 3 * 2 * 14**2 * width
        merger = 2 * 30 * (640 * 640 + 640 * 512)
        # Block 7 of the nine attends to all patches.
        assert counted == embedding + 9 * linear + 8 * products[0] + products[1] + merger

    def test_few_heads_of_keys_make_small_projections_and_whole_products(self):
        model = make_model(self.PRESET.config(), "cpu", torch.float32, "eager")
        family = family_of(model)
        layer = 2 * (2 * 512 * 512 + 2 * 512 * 128 + 3 * 512 * 48) * 34 + 4 * 34**2 * 512
        assert prefill_flops(family, 34) == 2 * layer + 2 * 512 * 151_936
        rotary = 2 * 3 * 64 * 34
        assert counted_by_torch(model, 34) - prefill_flops(family, 34) in (0, rotary)
        assert kv_cache_bytes(family, 34) == 2 * 2 * 128 * 4 * 34
