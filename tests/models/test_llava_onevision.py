"""LLaVA-OneVision: tokens of tiles on an interpolated grid, and rows of several images, which have no tiles."""

import pytest
import torch
from torch.nn.functional import interpolate

import vlmzip
from tests.families.llava_onevision import LlavaOnevision
from tests.tiny import IMAGE_TOKEN, batch
from vlmzip import DFMR, FastV, Grid, KMeans, NoCompression, Pool2d, RandomTokens, Signal, Site, UserError, VisionZip
from vlmzip.models import family_of
from vlmzip.models.llava_next import LlavaNext

FAMILY = LlavaOnevision()
#: Tokens of an image without tiles, and a newline.
UNTILED = [IMAGE_TOKEN] * (9 + 1)


def several_in_a_row():
    """Three rows: two images without tiles, one with tiles, and two images."""
    shrunk = [IMAGE_TOKEN] * FAMILY.tokens(3)
    rows = [[1, *UNTILED, 5, *UNTILED, 6], [1, *shrunk, 7], [*UNTILED, *UNTILED, 8, 9]]
    sizes = [FAMILY.sizes[image] for image in (0, 1, 3, 2, 0)]
    pixels = torch.cat([FAMILY.pixels([image])["pixel_values"] for image in range(5)])
    images = {"pixel_values": pixels, "image_sizes": torch.tensor(sizes), "batch_num_images": torch.tensor([2, 1, 2])}
    return {**batch(*rows), **images}


@torch.no_grad()
def test_an_image_with_too_many_tokens_has_one_grid_for_all_tiles():
    """Features and scores of the tiles are interpolated as the model does it: 3 x 9 tokens become 2 x 7."""
    family, inputs = family_of(FAMILY.model), FAMILY.batch([1, "image", 2], first_image=3)
    (layout,) = family.layouts(inputs)
    assert layout.views == (Grid(1, 3, 3), Grid(1, 2, 7))
    assert layout.slots.tolist() == [*range(9), *range(9, 16), -1, *range(16, 23), -1]
    needs = frozenset({Signal.CLS_ATTENTION, Signal.KEYS})
    base, shrunk = family.encode(inputs, Site.PRE_PROJECTOR, needs).groups
    assert (base.numbers, shrunk.numbers) == ([0], [1])
    inner = FAMILY.model.model
    hidden = inner.vision_tower(inputs["pixel_values"][0, :4], output_hidden_states=True).hidden_states[-1]
    projected = inner.multi_modal_projector(hidden)
    in_raster = projected[1:].view(1, 3, 3, 3, -1).permute(4, 0, 2, 1, 3).reshape(1, -1, 3, 9)
    expected = interpolate(in_raster, [2, 7], mode="bilinear").flatten(2).transpose(1, 2)
    assert torch.equal(base.tokens.features, projected[:1])
    assert torch.equal(shrunk.tokens.features, expected)
    (views,) = LlavaNext.encode(family, inputs, Site.PRE_PROJECTOR, needs).groups
    for name in ("cls_attention", "keys"):
        tiles = getattr(views.tokens, name)[1:].view(1, 3, 3, 3, -1).permute(4, 0, 2, 1, 3).reshape(1, -1, 3, 9)
        by_token = interpolate(tiles, [2, 7], mode="bilinear").flatten(2).transpose(1, 2)
        torch.testing.assert_close(getattr(shrunk.tokens, name), by_token.view_as(getattr(shrunk.tokens, name)))


@torch.no_grad()
def test_without_compression_rows_of_several_images_are_the_plain_ones():
    inputs = several_in_a_row()
    small = vlmzip.attach(FAMILY.model, NoCompression())
    assert torch.equal(small(**inputs).logits, FAMILY.model(**inputs).logits)
    assert [image.before for image in small.report.images] == [10, 10, FAMILY.tokens(3), 10, 10]


METHODS = [
    VisionZip(keep=6), KMeans(keep=6), RandomTokens(keep=6), DFMR(tau=0.9), Pool2d(factor=3, site=Site.POST_PROJECTOR),
    FastV(keep=6, layer=2), VisionZip(keep_per_view=2, positions="original"),
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=str)
@torch.no_grad()
def test_a_row_among_others_is_the_row_alone(method):
    inputs = several_in_a_row()
    first = {name: inputs[name][:1] for name in ("input_ids", "attention_mask")}
    images = {"pixel_values": inputs["pixel_values"][:2], "image_sizes": inputs["image_sizes"][:2]}
    start = int(first["attention_mask"].argmax())
    alone = {name: value[:, start:] for name, value in first.items()} | images | {"batch_num_images": [2]}
    with vlmzip.attach(FAMILY.model, method) as small:
        together = small(**inputs)
        counts = [image.by_layer for image in small.report.images]
        by_itself = small(**alone)
        assert counts[:2] == [image.by_layer for image in small.report.images]
    torch.testing.assert_close(together.logits[0, -3:], by_itself.logits[0, -3:], atol=1e-4, rtol=0)


def test_images_without_tiles_stay_so_where_they_are_chosen_alone():
    family, inputs = family_of(FAMILY.model), several_in_a_row()
    for chosen in ([1], [2], [3], [1, 2]):
        later = family.choose_images(inputs, chosen)
        all_of_them = family.layouts(inputs)
        assert [layout.views for layout in family.layouts(later)] == [all_of_them[n].views for n in chosen]
        assert torch.equal(later["pixel_values"], inputs["pixel_values"][chosen])


def test_counts_of_images_that_do_not_fit_are_refused():
    inputs = {**several_in_a_row(), "batch_num_images": [2, 2]}
    with pytest.raises(UserError, match="batch_num_images counts 4 images, image_sizes has 5"):
        vlmzip.compress_inputs(FAMILY.model, inputs, NoCompression())


def test_pixels_of_an_interpolated_grid_are_refused():
    with pytest.raises(UserError, match="shrinks the visual tokens of an image"):
        vlmzip.compress_inputs(FAMILY.model, FAMILY.batch(["image"], first_image=3), DFMR(measure="pixels"))
    vlmzip.compress_inputs(FAMILY.model, FAMILY.batch(["image"]), DFMR(measure="pixels"))
