"""Attention of every layer against the matrices that the models themselves compute, and its sums against loops."""

import copy
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface

from tests.families import FAMILIES, tiny_llava
from tests.families.qwen2_5_vl import window_order
from tests.lab.analyses.subjects import make_subject
from tests.models.test_signals import llava_on_siglip
from vlmzip import Signal, Site, UserError
from vlmzip.lab.analyses import encoder_attention
from vlmzip.lab.analyses.encoder_attention import concentration, draw, findings, measure
from vlmzip.lab.analyses.subject import Unsuited
from vlmzip.models import family_of
from vlmzip.models.llava import Llava
from vlmzip.visual_tokens import Grid
from vlmzip.visualize.attention import Map, draw_maps

pytestmark = pytest.mark.slow  # whole runs of an analysis


def assert_scores_are_of_matrices(model, inputs, pixels, whose):
    """The model's own attention matrices, of the `pixels` of all views of the inputs."""
    found = family_of(model).encoder_attention(inputs)
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        matrices = tower(pixels, output_attentions=True).attentions
    assert found.whose == [whose] * len(matrices)
    assert len(found.by_view) == len(pixels)
    for view, scores in enumerate(found.by_view):
        assert scores.shape == (len(matrices), (48 // tower.config.patch_size) ** 2)
        for layer, matrix in enumerate(matrices):
            heads = matrix[view]
            expected = heads[:, 0, 1:].mean(0) if whose == "CLS" else heads.mean((0, 1))
            torch.testing.assert_close(scores[layer], expected, atol=1e-6, rtol=0)


def test_every_layer_is_as_the_matrices_say(fresh):
    if not hasattr(fresh.model.model, "vision_tower"):
        pytest.skip("its encoder gives no matrices: see the tests of Qwen2.5-VL and Qwen3-VL")
    inputs = fresh.batch(["image", "image"])
    assert_scores_are_of_matrices(fresh.model, inputs, fresh.pixels_of_views(inputs), fresh.scored_by)


def test_every_layer_of_an_encoder_without_cls_is_as_the_matrices_say():
    pixels = torch.randn(2, 3, 48, 48)
    model = llava_on_siglip(side=48, vision_feature_layer=-2)
    assert_scores_are_of_matrices(model, {"pixel_values": pixels}, pixels, "all tokens")


def assert_encode_reads_the_layer(model, inputs):
    model_family = family_of(model)
    found = model_family.encoder_attention(inputs)
    with torch.no_grad():
        groups = model_family.encode(inputs, Site.PRE_PROJECTOR, frozenset({Signal.CLS_ATTENTION})).groups
    for tokens, indices in ((group.tokens, group.numbers) for group in groups):
        for row, image in enumerate(indices):
            read = tokens.cls_attention[row, tokens.prefix :]
            torch.testing.assert_close(found.by_view[image][found.scored], read)
            others = [scores for layer, scores in enumerate(found.by_view[image]) if layer != found.scored]
            assert all((scores - read).abs().max() > 1e-4 for scores in others)


def test_the_layer_that_is_read_is_the_one_that_encode_reads(fresh):
    assert_encode_reads_the_layer(fresh.model, fresh.batch(["image", "image"]))


def test_without_cls_too_the_layer_that_is_read_is_the_one_that_encode_reads():
    model = llava_on_siglip(side=48, vision_feature_layer=-2)
    assert_encode_reads_the_layer(model, {"pixel_values": torch.randn(2, 3, 48, 48)})


def attention_in_every_block(family, inputs):
    """Return what merged tokens receive in each block of a Qwen's encoder, by window or image, caught in the model."""
    seen = []

    def catch(module, query, key, value, attention_mask, scaling, **kwargs):
        weights = (query @ key.transpose(2, 3) * scaling).softmax(-1)
        seen.append((module, weights[0].mean(0).sum(0)))
        return (weights @ value).transpose(1, 2), None

    AttentionInterface.register("catching every block", catch)
    model = copy.deepcopy(family.model)
    model.set_attn_implementation({"vision_config": "catching every block"})
    with torch.no_grad():
        model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    return [
        [received.unflatten(0, (-1, 4)).mean(1) for module, received in seen if module is block.attn]
        for block in model.model.visual.blocks
    ]


def test_qwens_windows_are_windows():
    """The model's own attention is in windows of 2 x 2 merged tokens, then of whole images."""
    family = FAMILIES["qwen2_5_vl"]()
    inputs = family.batch([1, "image", "image", 4])
    found = family_of(family.model).encoder_attention(inputs)
    assert (found.whose, found.scored) == (["all tokens of the same window", "all tokens"], 1)
    order = torch.tensor(window_order(4, 6) + [24 + place for place in window_order(5, 3)])
    blocks = attention_in_every_block(family, inputs)
    assert [len(parts) for parts in blocks] == [6 + 6, 2]
    for layer, parts in enumerate(blocks):
        together = torch.cat([scores[layer] for scores in found.by_view])
        torch.testing.assert_close(together[order], torch.cat(parts), atol=1e-5, rtol=1e-5)


def test_qwen3_attends_to_whole_images_in_every_layer():
    family = FAMILIES["qwen3_vl"]()
    inputs = family.batch([1, "image", "image", 4])
    found = family_of(family.model).encoder_attention(inputs)
    assert (found.whose, found.scored) == (["all tokens"] * 4, 3)
    blocks = attention_in_every_block(family, inputs)
    for image, scores in enumerate(found.by_view):
        torch.testing.assert_close(scores, torch.stack([parts[image] for parts in blocks]), atol=1e-5, rtol=1e-5)


def test_no_square_of_the_tokens_and_no_hook_left():
    """2,304 tokens and 4 heads: a matrix of all attention would be 9 times the largest tensor allowed here."""
    model, sizes = llava_on_siglip(side=384), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(o.numel() for o in (out if isinstance(out, tuple | list) else [out]) if torch.is_tensor(o))
            return out

    with torch.no_grad(), Watch():
        found = family_of(model).encoder_attention({"pixel_values": torch.zeros(1, 3, 384, 384)})
    assert found.by_view[0].shape == (3, 2304)
    assert max(sizes) <= 256 * 2304 * 4
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_encoder_without_attention_is_refused(monkeypatch):
    monkeypatch.setattr(Llava, "vision_encoder", torch.nn.Conv2d(3, 8, 8))
    with pytest.raises(UserError, match="vlmzip does not know the attention of Conv2d"):
        family_of(tiny_llava()).encoder_attention({"pixel_values": torch.zeros(1, 3, 48, 48)})


def test_concentration_is_what_a_loop_says():
    scores = torch.rand(3, 40, generator=torch.Generator().manual_seed(3)) ** 4
    found = concentration(scores)
    for layer in range(3):
        values = sorted((float(v) for v in scores[layer]), reverse=True)
        shares = [value / sum(values) for value in values]
        entropy = -sum(share * math.log(share) for share in shares)
        tops = [sum(shares[:count]) for count in (2, 4, 8)]
        np.testing.assert_allclose(found[layer], [*tops, entropy / math.log(40), math.exp(entropy)], rtol=1e-6)


def test_concentration_of_an_even_spread_and_of_a_single_token():
    even, one = concentration(torch.stack([torch.full((100,), 0.3), torch.eye(100)[7]]))
    np.testing.assert_allclose(even, [0.05, 0.1, 0.2, 1, 100], rtol=1e-6)
    np.testing.assert_allclose(one, [1, 1, 1, 0, 1], atol=1e-9)
    np.testing.assert_allclose(concentration(torch.tensor([[0.2]])), [[1, 1, 1, 0, 1]])


class TestStudy:
    @pytest.fixture
    def rows(self, tmp_path):
        return measure(make_subject(tmp_path))

    def test_each_image_counts_once(self, rows, tmp_path):
        subject = make_subject(tmp_path)
        images = [Image.open(tmp_path / "asked" / name) for name in ("a.png", "b.png", "c.png")]
        inputs = subject.processor(images=images, text=["<image>"] * 3, return_tensors="pt")
        found = family_of(subject.model).encoder_attention(inputs)
        tens = 100 * np.stack([concentration(scores)[:, 1] for scores in found.by_view])
        assert [row["images"] for row in rows] == [3] * 3
        assert [row["layer"] for row in rows if row["read_by_visionzip"]] == [1]
        for layer, row in enumerate(rows):
            assert row["top_10"] == pytest.approx(tens[:, layer].mean(), abs=0.006)
            assert row["top_10_beyond_read"] == pytest.approx((tens[:, layer] - tens[:, 1]).mean(), abs=0.006)
            assert tens[:, layer].min() - 0.006 <= row["top_10_low"] <= row["top_10"] <= row["top_10_high"]
            assert row["top_5"] < row["top_10"] < row["top_20"] < 100

    def test_how_many_are_encoded_together_changes_nothing(self, rows, tmp_path, monkeypatch):
        monkeypatch.setattr(encoder_attention, "TOGETHER", 2)
        assert measure(make_subject(tmp_path)) == rows

    def test_other_processes_leave_it_to_the_first(self, tmp_path, monkeypatch):
        monkeypatch.setenv("RANK", "1")
        subject = make_subject(tmp_path)
        assert measure(subject) == []
        assert not list(subject.folder.glob("*.png"))

    def test_an_encoder_without_attention_does_not_suit_it(self, tmp_path, monkeypatch):
        monkeypatch.setattr(Llava, "vision_encoder", torch.nn.Conv2d(3, 8, 8))
        with pytest.raises(Unsuited, match="vlmzip does not know the attention of Conv2d"):
            measure(make_subject(tmp_path))

    @pytest.mark.filterwarnings("ignore:__array__ implementation")  # PaliGemma's processor and NumPy's newest
    def test_every_family(self, fresh, tmp_path):
        rows = measure(make_subject(tmp_path, fresh))
        assert sum(row["read_by_visionzip"] == "yes" for row in rows) == 1
        assert Image.open(tmp_path / "out" / "encoder_attention-maps.png").width > 400
        assert ("inside of windows and are not compared" in " ".join(findings(rows))) == fresh.windowed

    def test_the_figure_shows_the_rows(self, rows):
        above, below = draw(rows, "a title").axes
        drawn = [list(line.get_ydata()) for line in above.get_lines()]
        for name in ("top_5", "top_10", "top_20"):
            assert [row[name] for row in rows] in drawn
        assert [row["effective_tokens"] for row in rows] in [list(line.get_ydata()) for line in below.get_lines()]
        assert above.get_title() == "a title"

    def test_findings_name_the_layers(self, rows):
        for row, value in zip(rows, (50.0, 40.0, 30.0), strict=True):
            row |= {"top_10": value, "top_10_low": value - 1, "top_10_high": value + 1}
            row |= {"top_10_beyond_read": value - 40, "top_10_beyond_read_low": value - 42}
            row |= {"top_10_beyond_read_high": value - 38}
        text = " ".join(findings(rows))
        assert "In layer 1 of 3 (from 0), which VisionZip reads, the most attended tenth of tokens gets 40.0 %" in text
        assert "The most concentrated layer is 0 (50.0 % (49.0 to 51.0)), the least is 2 (30.0 %" in text
        assert "beyond the 95 % interval: 0." in text
        assert "The last layer's tenth gets -10.0 points (-12.0 to -8.0) against it." in text


def test_maps_are_brightest_where_most_attention_goes():
    weights = [1.0, 0.0, 0.0, 4.0, 0.0, 0.0]
    page = draw_maps(Image.new("RGB", (30, 20), (200, 0, 0)), Grid(1, 2, 3), [Map("layer 0", weights)])
    cell, left = 190 // 3, 2 * 12 + 3 * (190 // 3)
    light = [
        sum(page.getpixel((left + col * cell + cell // 2, 6 + 20 + row * cell + cell // 2)))
        for row in range(2)
        for col in range(3)
    ]
    assert light[3] == sum((255, 221, 64))
    assert light[3] > light[0] > light[1] == light[2] == light[4] == light[5]
