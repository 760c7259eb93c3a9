import copy

import pytest
import torch
from transformers import DynamicCache

import vlmzip
from tests.families import FAMILIES, tiny_llava
from tests.methods.test_visionzip import tokens_of
from tests.references.smaller_model import model_for, smaller_image
from tests.tiny import PATCH, batch, skip_without
from vlmzip import Downsample, Grid, Profile, Site, UserError
from vlmzip.methods.downsample import cell_of_each
from vlmzip.models.towers.qwen import images_of, patches_of

ROWS = ([1, "image", 5, 6, 7], [1, "image", 4, "image", 5], [1, 2, 3, 4], ["image", 8])
GREEDY = {"max_new_tokens": 6, "do_sample": False}


# --- which grid -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "grid", "smaller"),
    [
        (64, (24, 24), (8, 8)),
        ("11%", (24, 24), (8, 8)),
        (192, (24, 24), (14, 14)),
        (0.5, (24, 24), (17, 17)),
        (1, (24, 24), (1, 1)),
        (24, (12, 8), (6, 4)),
        (24, (8, 12), (4, 6)),
        (8, (16, 8), (4, 2)),
        (5, (1, 30), (1, 5)),
        (30, (6, 6), (5, 5)),
        (31, (6, 6), (6, 6)),
        (9, (4, 6), (2, 3)),  # 6 and 12 tokens are equally near
    ],
)
def test_the_nearest_grid_of_the_images_shape(keep, grid, smaller):
    assert Downsample(keep=keep).smaller(Grid(1, *grid)) == Grid(1, *smaller)
    frames = Downsample(keep=keep if isinstance(keep, (float, str)) else 3 * keep)
    assert frames.smaller(Grid(3, *grid)) == Grid(3, *smaller)


def test_no_other_grid_of_this_shape_is_nearer():
    """Compare with an exhaustive search over the grids that have nearly the image's shape."""
    for rows, cols, keep in [(7, 11, 20), (9, 4, 6), (13, 13, 50), (3, 17, 9)]:
        best = min(
            abs(r * c - keep)
            for r in range(1, rows + 1)
            for c in range(1, cols + 1)
            if abs(c - r * cols / rows) <= 0.5 or abs(r - c * rows / cols) <= 0.5
        )
        assert abs(Downsample(keep=keep).smaller(Grid(1, rows, cols)).size - keep) == best


def test_the_reached_budget_is_told():
    chosen, reached = Downsample().at_budget("50%", Profile(Grid(1, 24, 24), 32))
    assert (chosen.keep, reached) == ("50%", 17 * 17 / 576)


def test_each_token_belongs_to_the_cell_that_covers_its_centre():
    tokens = tokens_of(rows=5, cols=7)
    group = Downsample(keep=12)(tokens).group[0, 1:].reshape(5, 7)  # on 3 x 4
    expected = [[int((r + 0.5) * 3 / 5) * 4 + int((c + 0.5) * 4 / 7) for c in range(7)] for r in range(5)]
    assert group.tolist() == expected


def test_frames_are_not_mixed():
    group = cell_of_each(Grid(2, 2, 4), Grid(2, 1, 2), torch.device("cpu"))
    assert group.tolist() == [0, 0, 1, 1] * 2 + [2, 2, 3, 3] * 2


def test_it_acts_on_images_alone():
    with pytest.raises(UserError, match="site"):
        Downsample(site=Site.PRE_PROJECTOR)


# --- smaller images -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", [None, "contiguous"])
def test_is_the_plain_model_on_a_smaller_image(family, positions):
    """The reference resizes the image and interpolates position embeddings by hand, and runs the plain model."""
    skip_without(family, Site.PIXELS)
    if not family.one_size:
        pytest.skip("its images have sizes: see the test of both Qwens, and tests/models/test_llava_next.py")
    inputs = family.batch(*ROWS)
    side = 4 * PATCH
    small_inputs = batch(*_ids_with(ROWS, 16), pad="left")
    small_inputs |= {key: torch.zeros_like(small_inputs["input_ids"]) for key in inputs.keys() & {"token_type_ids"}}
    small_inputs["pixel_values"] = torch.stack([smaller_image(p, side, side) for p in inputs["pixel_values"]])
    plain = model_for(family.model, side)
    compressed = vlmzip.attach(family.model, Downsample(keep=16, positions=positions))
    with torch.no_grad():
        torch.testing.assert_close(compressed(**inputs).logits, plain(**small_inputs).logits, atol=2e-5, rtol=0)
    new = compressed.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(new, plain.generate(**small_inputs, **GREEDY)[:, small_inputs["input_ids"].shape[1] :])


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_is_plain_qwen_on_a_smaller_image(name):
    """The reference cuts the small image into patches with transformers' code and uses Qwen's positions."""
    family = FAMILIES[name]()
    inputs = family.batch([1, "image", 5, 6, 7], [1, 3, "image", 4])  # grids of 4 x 6 and 5 x 3 tokens
    config = family.model.config.vision_config
    parts = inputs["pixel_values"].split(inputs["image_grid_thw"].prod(-1).tolist())
    # The image is repeated: the processor fills a temporal patch with the same image twice.
    first = [images_of(p, Grid(1, *g), config)[:1] for p, g in zip(parts, [(4, 6), (5, 3)], strict=True)]
    whole = [_cut_by_transformers(image) for image in first]
    smaller = [
        _cut_by_transformers(smaller_image(p[0], 8 * r, 8 * c)[None])
        for p, (r, c) in zip(first, [(2, 3), (4, 2)], strict=True)
    ]
    inputs["pixel_values"] = torch.cat(whole)
    ids = _ids_with([[1, "image", 5, 6, 7]], 6) + _ids_with([[1, 3, "image", 4]], 8)
    small_inputs = batch(*ids)
    small_inputs |= {"pixel_values": torch.cat(smaller), "image_grid_thw": torch.tensor([[1, 4, 6], [1, 8, 4]])}
    small_inputs["mm_token_type_ids"] = (small_inputs["input_ids"] == 99).int()
    downsampled = vlmzip.attach(family.model, Downsample(keep=8))
    with torch.no_grad():
        logits = downsampled(**inputs).logits
        torch.testing.assert_close(logits, family.model(**small_inputs).logits, atol=2e-5, rtol=0)
    new = downsampled.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(new, family.model.generate(**small_inputs, **GREEDY)[:, small_inputs["input_ids"].shape[1] :])
    assert [p.after for p in downsampled.report.images] == [6, 8]


def _cut_by_transformers(image):
    """Return the patches that transformers' processor makes from an image [1, 3, height, width] of fitting size."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(
        do_resize=False, do_rescale=False, do_normalize=False, patch_size=4, merge_size=2, temporal_patch_size=2
    )
    how = {"input_data_format": "channels_first", "do_convert_rgb": False, "return_tensors": "pt"}
    return processor(images=[image[0].numpy()], **how)["pixel_values"]


def _ids_with(rows, tokens):
    return [[i for part in row for i in ([99] * tokens if part == "image" else [part])] for row in rows]


def test_patches_become_the_image_that_was_cut():
    config = FAMILIES["qwen2_5_vl"]().model.config.vision_config
    image = torch.randn(1, 3, 24, 40)
    patches = _cut_by_transformers(image)
    back = images_of(patches, Grid(1, 3, 5), config)
    assert torch.equal(back, image.repeat(2, 1, 1, 1))
    assert torch.equal(patches_of(back, Grid(1, 3, 5), config), patches)


def test_is_resizing_the_image_before_the_processor():
    """The processor rounds to 8 bits and normalises, so results agree up to one rounding step."""
    from PIL import Image
    from transformers import CLIPImageProcessor

    noise = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(noise[None], (48, 48), mode="bicubic")[0].clamp(0.05, 0.95)
    image = Image.fromarray((smooth * 255).byte().permute(1, 2, 0).numpy())
    sizes = [{"height": side, "width": side} for side in (48, 32)]
    whole, smaller = (
        CLIPImageProcessor(size=size, do_center_crop=False)(image, return_tensors="pt")["pixel_values"]
        for size in sizes
    )
    model_family = vlmzip.models.family_of(FAMILIES["llava"]().model)
    got = model_family.downsample({"pixel_values": whole}, [Grid(1, 4, 4)])["pixel_values"]
    assert (got - smaller).abs().max() < 1.5 / 255 / 0.26  # the smallest standard deviation of CLIP's normalisation


def test_pixels_that_fill_no_patch_stay_where_they_are():
    """An encoder of 50 pixels with patches of 8 uses 48 of them. An image that keeps its size must not change."""
    model_family = vlmzip.models.family_of(FAMILIES["llava"]().model)
    pixels = torch.randn(1, 3, 50, 50)
    assert model_family.downsample({"pixel_values": pixels}, [Grid(1, 6, 6)]) == {"pixel_values": pixels}


# --- the façade ------------------------------------------------------------------------------------------------


def alone(family, row):
    return family.batch(ROWS[row], first_image=sum(other.count("image") for other in ROWS[:row]))


@pytest.mark.parametrize("positions", ["contiguous", "original"])
def test_a_row_of_a_ragged_batch_is_that_row_alone(family, positions):
    skip_without(family, Site.PIXELS)
    compressed = vlmzip.attach(family.model, Downsample(keep=8, positions=positions))
    inputs = family.batch(*ROWS)
    with torch.no_grad():
        together = compressed(**inputs).logits
    new = compressed.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    if len(set(family.grids)) > 1:
        assert len({p.after for p in compressed.report.images}) > 1
    for row in range(len(ROWS)):
        one = alone(family, row)
        with torch.no_grad():
            logits = compressed(**one).logits[0]
        torch.testing.assert_close(together[row, -len(logits) :], logits, atol=2e-5, rtol=0)
        single = compressed.generate(**one, **GREEDY)[0, one["input_ids"].shape[1] :].tolist()
        assert new[row, : len(single)].tolist() == single


def test_original_positions_are_those_of_the_middle_of_each_cell(llava):
    inputs = FAMILIES["llava"]().batch([1, "image", 5])
    out = vlmzip.compress_inputs(llava, inputs, Downsample(keep=4, positions="original"))
    # The positions of the first token, of the middle token of each 3 x 3 cell of the 6 x 6 grid, and of the text.
    assert out["position_ids"].tolist() == [[0, 1 + 7, 1 + 10, 1 + 25, 1 + 28, 37]]


@pytest.mark.filterwarnings("ignore:downsample keeps all")
def test_keeping_all_changes_nothing(family):
    skip_without(family, Site.PIXELS)
    inputs = family.batch(*ROWS)
    compressed = vlmzip.attach(family.model, Downsample(keep=200))  # no image has so many tokens
    with torch.no_grad():
        torch.testing.assert_close(compressed(**inputs).logits, family.model(**inputs).logits, atol=1e-5, rtol=0)
    assert torch.equal(compressed.generate(**inputs, **GREEDY), family.model.generate(**inputs, **GREEDY))


@pytest.mark.filterwarnings("ignore:downsample keeps all")
def test_a_cls_token_that_the_llm_gets_is_dropped_with_the_lost_grid():
    model = tiny_llava(vision_feature_select_strategy="full")
    inputs = batch([1] + [99] * 37 + [5], images=1)
    compressed = vlmzip.attach(model, Downsample(keep=9))
    with torch.no_grad():
        assert compressed(**inputs).logits.shape[1] == 11
        assert (compressed.report.before, compressed.report.after) == (37, 9)
        whole = vlmzip.attach(model, Downsample(keep=36))
        torch.testing.assert_close(whole(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("positions", ["contiguous", "original"])
def test_later_turns_on_a_cache(family, positions):
    skip_without(family, Site.PIXELS)
    compressed, cache = vlmzip.attach(family.model, Downsample(keep=8, positions=positions)), DynamicCache()
    first = family.batch([1, "image", 5, 6], [1, 3, "image", 7, 5, 6])
    ids = compressed.generate(**first, **GREEDY, min_new_tokens=6, past_key_values=cache)
    part = batch(*family.ids([4, "image", 6], [4, "image", 6], first_image=2))
    ids = torch.cat([ids, part["input_ids"]], 1)
    mask = torch.cat([first["attention_mask"], torch.ones(2, 6, dtype=torch.long), part["attention_mask"]], 1)
    inputs = {"input_ids": ids, "attention_mask": mask}
    got = compressed.generate(**inputs, **family.images(2, 2), **GREEDY, past_key_values=cache)
    assert len(compressed.report.images) == 2
    inputs |= family.pixels([0, 2, 1, 3]) | family.token_types(ids, first["input_ids"].shape[1])
    assert torch.equal(got, compressed.generate(**inputs, **GREEDY))


def test_loss_has_gradients_for_pixels_and_encoder(family):
    skip_without(family, Site.PIXELS)
    model = copy.deepcopy(family.model)
    inputs = family.batch(*ROWS)
    inputs["labels"] = inputs["input_ids"].masked_fill(
        (inputs["input_ids"] == 99) | (inputs["attention_mask"] == 0), -100
    )
    inputs["pixel_values"].requires_grad_()
    vlmzip.attach(model, Downsample(keep=8))(**inputs).loss.backward()
    encoder = vlmzip.models.family_of(model).vision_encoder
    patch = next(p for name, p in encoder.named_parameters() if "patch_emb" in name)
    for gradient in (inputs["pixel_values"].grad, patch.grad):
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0


def test_bfloat16(family):
    skip_without(family, Site.PIXELS)
    inputs = family.batch(*ROWS)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    compressed = vlmzip.attach(copy.deepcopy(family.model).bfloat16(), Downsample(keep=8))
    views = sum(map(family.views, range(4)))
    smaller = vlmzip.models.family_of(family.model).downsample(inputs, [Grid(1, 2, 3)] * views)
    pixels = smaller["pixel_values"]
    assert (pixels if isinstance(pixels, torch.Tensor) else pixels[0][0]).dtype == torch.bfloat16
    with torch.no_grad():
        out = compressed(**inputs)
    assert out.logits.dtype == torch.bfloat16
    assert out.logits.isfinite().all()


def test_report(llava):
    inputs = FAMILIES["llava"]().batch(*ROWS)
    compressed = vlmzip.attach(llava, Downsample(keep=8))
    compressed.generate(**inputs, **GREEDY)
    image = compressed.report.images[0]
    assert (image.before, image.after, image.grid) == (36, 9, Grid(1, 6, 6))
    assert image.token_map.group.shape == (1, 37)
    assert image.detail_lost is None  # the full image has not been encoded
    assert compressed.report.milliseconds["encoder"] > 0
