"""LLaVA-NeXT: images of several views, with newlines and without the padding of the tiles."""

import dataclasses

import pytest
import torch

import vlmzip
from tests.families.llava_next import LlavaNext
from tests.references.smaller_model import model_for, smaller_image
from tests.references.visionzip import visionzip_tiles
from vlmzip import (
    DFMR,
    AdaptiveVisionZip,
    BudgetError,
    Chain,
    Downsample,
    FastV,
    KMeans,
    LLaVolta,
    NoCompression,
    Pool2d,
    Profile,
    PyramidDrop,
    QFormer,
    RandomTokens,
    Site,
    UserError,
    VisionZip,
    catalogue,
)
from vlmzip.models import family_of
from vlmzip.runtime.compress import view_numbers, without_padding
from vlmzip.visual_tokens import Grid

ROWS = ([1, "image", 5, 6], [1, "image", 4, "image", 7], [1, 2, 3], ["image", 8])


class AllShapes(LlavaNext):
    """The family with tiles in all shapes. The padding of the third image takes two of the three rows of each tile."""

    sizes = ((96, 96), (40, 90), (20, 120), (60, 31))
    tiles = ((2, 2), (1, 2), (1, 3), (2, 1))
    seen = ((6, 6), (3, 6), (1, 9), (6, 3))


FAMILY = AllShapes()


@pytest.fixture(scope="module")
def model():
    """3 x 3 tokens a view; four layers in the LLM."""
    return FAMILY.model


@pytest.mark.parametrize("pad", ["left", "right"])
@torch.no_grad()
def test_without_compression_the_model_is_the_plain_one(model, pad):
    inputs = FAMILY.batch(*ROWS, pad=pad)
    assert torch.equal(vlmzip.attach(model, NoCompression())(**inputs).logits, model(**inputs).logits)


def test_answers_without_compression_are_the_models_own(model):
    inputs = FAMILY.batch(*ROWS)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        vlmzip.attach(model, NoCompression()).generate(**inputs, **options), model.generate(**inputs, **options)
    )


def configured():
    """Every method; what depends on counts of the model's layers fits them."""
    for name, cls in vlmzip.available().items():
        if cls.drops_patches:  # its encoder takes whole images
            continue
        settings = {"queries": 3, "depth": 2, "width": 16, "heads": 2} if issubclass(cls, QFormer) else {}
        yield pytest.param(cls(**settings), id=name)
    yield pytest.param(LLaVolta(stride=2, window="2d", layer=1), id="2d inside")
    yield pytest.param(KMeans(keep=12, site=Site.IN_LLM), id="kmeans inside")
    yield pytest.param(Pool2d(factor=2, site=Site.POST_PROJECTOR), id="behind the projector")
    yield pytest.param(Chain(compressors=(NoCompression(), Pool2d(factor=2, site=Site.POST_PROJECTOR))), id="whole, 2d")
    yield pytest.param(VisionZip(keep_per_view=2, positions="original"), id="original positions")
    stages = (VisionZip(keep_per_view=3), FastV(keep_per_view=2, layer=1))
    yield pytest.param(Chain(compressors=stages), id="a count per view, in and before the LLM")
    stages = (PyramidDrop(layer=(1, 3)), FastV(keep_per_view=1, layer=2))
    yield pytest.param(Chain(compressors=stages), id="interleaved layers")


@pytest.mark.filterwarnings("ignore:.*changes nothing", "ignore:.*is untrained")
@pytest.mark.parametrize("method", list(configured()))
@torch.no_grad()
def test_every_method_keeps_what_it_says(model, method):
    """Counts from shapes are the real ones, layer by layer; the map has a group for each token that the LLM gets."""
    profile = family_of(model).profile()
    method = method.placed(profile)
    inputs = FAMILY.batch(*ROWS)
    compressed = vlmzip.attach(model, method)
    logits = compressed(**inputs).logits
    assert logits.isfinite().all()
    layouts = family_of(model).layouts(inputs)
    for image, layout in zip(compressed.report.images, layouts, strict=True):
        assert image.before == layout.placeholders
        views = layout.views if method.whole_views else layout.unpadded()[0].views
        promised = method.tokens_by_layer(dataclasses.replace(profile, grid=views[0], tiles=views[1:]))
        whole = sum(grid.size for grid in views)
        if promised is not None:  # newlines stay as long as nothing is gone
            stay = [count + layout.separators if count == whole else count for count in promised]
            assert list(image.by_layer) == stay
        if image.token_map is not None:
            image.token_map.check()
            assert image.token_map.lengths == [image.by_layer[-1]]
            assert [view.grid for view in image.views] == list(views)
            assert image.detail_lost is None or 0 <= image.detail_lost <= 1


def test_a_budget_belongs_to_the_image(model):
    inputs = FAMILY.batch(*ROWS)
    views = [5, 3, 4, 3]

    def after(method):
        return [image.after for image in vlmzip.compress_inputs(model, inputs, method).report.images]

    assert after(VisionZip(keep=10)) == [10] * 4
    # 9 tokens a view, of which padding leaves 3 in the tiles of the third image.
    assert after(VisionZip(keep_per_view=4)) == [20, 12, 4 + 3 * 3, 12]
    assert after(VisionZip(dominant=3, contextual=1)) == [20, 12, 4 + 3 * 3, 12]
    assert after(VisionZip(keep_per_view=4, whole_views=True)) == [4 * count for count in views]
    assert after(VisionZip(keep="33%")) == [15, 9, 3 + 3 * 1, 9]
    assert after(VisionZip(keep="33%", whole_views=True)) == [3 * count for count in views]


@pytest.mark.parametrize("merge", ["reference", "mean"])
def test_the_authors_setting_equals_a_naive_reference(model, merge):
    """Each view by itself, in the authors' order, without newlines, the padding of tiles counted as image."""
    inputs = FAMILY.batch([1, "image", 4, "image", "image", "image", 5])
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    method = VisionZip(dominant=4, contextual=2, merge=merge, whole_views=True)
    small = vlmzip.compress_inputs(model, inputs, method)
    tower.set_attn_implementation("eager")
    for image, (rows, cols) in enumerate(FAMILY.tiles):
        views = []
        for pixels in inputs["pixel_values"][image, : 1 + rows * cols]:
            layer = len(tower.encoder.layers) - 2
            keys = []
            hook = tower.encoder.layers[layer].self_attn.k_proj.register_forward_hook(
                lambda _module, _args, out, keys=keys: keys.append(out)
            )
            with torch.no_grad():
                out = tower(pixels[None], output_hidden_states=True, output_attentions=True)
            hook.remove()
            attention = out.attentions[layer][0, :, 0]
            views.append((out.hidden_states[-2][0], attention, keys[0][0].unflatten(-1, (4, -1)).mean(1)))
        with torch.no_grad():
            expected = projector(visionzip_tiles(views, 4, 2, cols, merge))
        torch.testing.assert_close(small["mm_encoder_outputs"]["image"].pooler_output[image], expected)
    tower.set_attn_implementation("sdpa")
    assert "position_ids" not in small


def test_original_positions_ascend(model):
    inputs = FAMILY.batch(*ROWS)
    small = vlmzip.compress_inputs(model, inputs, VisionZip(keep=10, positions="original"))
    for positions, mask in zip(small["position_ids"], small["attention_mask"].bool(), strict=True):
        assert (positions[mask].diff() >= 0).all()


def test_squares_of_tiles_can_be_pooled_inside_the_llm(model):
    """Each square of each tile becomes one token, also where rows of tiles interleave and newlines stand between."""
    inputs = FAMILY.batch([1, "image", 5])
    compressed = vlmzip.attach(model, LLaVolta(stride=2, window="2d", layer=1, last="keep"))
    with torch.no_grad():
        compressed(**inputs)
    (image,) = compressed.report.images
    assert image.by_layer == (51, 20, 20, 20)  # 9 + 36 tokens and 6 newlines; 4 squares in each of 5 views
    for view in image.views:
        assert view.grid == Grid(1, 3, 3)
        squares = view.token_map.group[0, 1:].view(3, 3)
        assert len({int(squares[0, 0]), int(squares[0, 2]), int(squares[2, 0]), int(squares[2, 2])}) == 4
        assert (squares[:2, :2] == squares[0, 0]).all()
    assert image.token_map.group[0, -6:].tolist() == [-1] * 6


def test_smaller_views_give_the_llm_all_that_they_have(model):
    inputs = FAMILY.batch([1, "image", 5])
    small = vlmzip.compress_inputs(model, inputs, Downsample(keep="45%"))
    (image,) = small.report.images
    assert (image.before, image.after) == (51, 5 * 4)
    assert image.token_map.lengths == [20]


@torch.no_grad()
def test_smaller_views_are_those_of_a_smaller_encoder(model):
    """The LLM gets the base image, then the 2 x 2 tiles in raster order over the whole image, without newlines."""
    inputs = FAMILY.batch([1, "image", 5])
    small = vlmzip.compress_inputs(model, inputs, Downsample(keep="45%"))
    plain = model_for(model, 32).model  # 2 x 2 tokens a view
    views = torch.stack([smaller_image(view, 32, 32) for view in FAMILY.pixels_of_views(inputs)])
    features = plain.vision_tower(views, output_hidden_states=True).hidden_states[-2][:, 1:]
    base, *tiles = plain.multi_modal_projector(features)
    expected = torch.cat([base, torch.stack(tiles).view(2, 2, 2, 2, -1).transpose(1, 2).flatten(0, 3)])
    got = small["mm_encoder_outputs"]["image"].pooler_output[0]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_smaller_views_may_differ_in_size(model):
    """22 tokens are 5, 5, 4, 4 and 4 of five views; the nearest grids are not all the same."""
    inputs = FAMILY.batch([1, "image", 5])
    small = vlmzip.compress_inputs(model, inputs, Downsample(keep=24))
    assert small.report.images[0].after == sum(
        share.smaller(Grid(1, 3, 3)).size for share in Downsample(keep=24).shared([Grid(1, 3, 3)] * 5)
    )


def test_later_turns_choose_their_own_images(model):
    inputs = FAMILY.batch([1, "image", 4, "image", 7])
    later = family_of(model).choose_images(inputs, [1])
    assert later["image_sizes"].tolist() == [list(FAMILY.sizes[1])]
    assert torch.equal(later["pixel_values"], inputs["pixel_values"][1:])


@torch.no_grad()
def test_views_of_all_images_may_come_one_after_another(model):
    """[views, 3, height, width], as the model itself takes them: without the empty tiles that pad some images."""
    inputs = FAMILY.batch(*ROWS)
    joined = {**inputs, "pixel_values": FAMILY.pixels_of_views(inputs)}
    assert torch.equal(vlmzip.attach(model, NoCompression())(**joined).logits, model(**joined).logits)
    for method in (VisionZip(keep=10), Downsample(keep=24)):
        padded, same = (vlmzip.compress_inputs(model, batch, method) for batch in (inputs, joined))
        features = zip(*(out["mm_encoder_outputs"]["image"].pooler_output for out in (padded, same)), strict=True)
        assert all(torch.equal(a, b) for a, b in features)
    later = family_of(model).choose_images(joined, [1, 3])
    chosen = family_of(model).choose_images(inputs, [1, 3])
    assert len(later["pixel_values"]) == FAMILY.views(1) + FAMILY.views(3)
    assert torch.equal(later["pixel_values"][: FAMILY.views(1)], inputs["pixel_values"][1, : FAMILY.views(1)])
    assert torch.equal(later["image_sizes"], chosen["image_sizes"])


def test_strategies_that_the_model_cannot_pack_are_refused(model):
    inputs = {**FAMILY.batch([1, "image"]), "vision_feature_select_strategy": "full"}
    with pytest.raises(UserError, match="cannot pack CLS"):
        vlmzip.compress_inputs(model, inputs, VisionZip(keep=10))


def test_too_small_a_budget_is_refused(model):
    with pytest.raises(UserError, match="keep=4 is too few for an image of 5 views: give at least 5"):
        vlmzip.compress_inputs(model, FAMILY.batch([1, "image"]), VisionZip(keep=4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_sizes": None}, "needs image_sizes"),
        (
            {"pixel_values": torch.zeros(4, 3, 48, 48)},
            r"needs pixel_values of \[images, views, 3.*got \[4, 3, 48, 48\]",
        ),
        ({"pixel_values": torch.zeros(1, 3, 3, 48, 48)}, "asks for 5 views of an image; pixel_values has 3"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_in_one_line(model, changes, message):
    with pytest.raises(UserError, match=message):
        vlmzip.compress_inputs(model, {**FAMILY.batch([1, "image"]), **changes}, NoCompression())


@pytest.mark.parametrize("method", [VisionZip(), FastV(layer=1), KMeans(), Downsample()], ids=lambda m: m.name())
def test_a_budget_below_the_views_is_out_of_reach(model, method):
    profile = family_of(model).profile()
    with pytest.raises(BudgetError, match="keep=4 is too few for an image of 5 views: give at least 5"):
        VisionZip(keep=4).reached(profile)
    if method.by_view:
        with pytest.raises(BudgetError, match="is too few for an image of 5 views"):
            method.at_budget(4, profile)
    chain = Chain(compressors=(VisionZip(), FastV(layer=1)))
    assert chain.at_budget("60%", profile)[1] == pytest.approx(0.6, abs=0.05)


def test_sizes_may_be_a_list(model):
    inputs = FAMILY.batch([1, "image"])
    listed = {**inputs, "image_sizes": inputs["image_sizes"].tolist()}
    plain, same = (vlmzip.compress_inputs(model, given, VisionZip(keep=10)) for given in (inputs, listed))
    assert torch.equal(plain["input_ids"], same["input_ids"])


@pytest.mark.parametrize(
    "compressor",
    [
        FastV(keep_per_view=2, layer=1),
        KMeans(keep_per_view=2, site=Site.IN_LLM, layer=1),
        Chain(compressors=(VisionZip(keep_per_view=4), FastV(keep_per_view=2, layer=1))),
    ],
    ids=str,
)
def test_a_budget_of_each_view_holds_inside_the_llm(model, compressor):
    with vlmzip.attach(model, compressor) as compressed, torch.no_grad():
        compressed(**FAMILY.batch(*ROWS))
    assert [image.by_layer[-1] for image in compressed.report.images] == [2 * views for views in (5, 3, 4, 3)]


@pytest.mark.parametrize("cls", [VisionZip, FastV, KMeans, RandomTokens, Downsample])
def test_the_budget_of_a_view_can_be_replaced(cls):
    method = cls(keep_per_view=4)
    assert dataclasses.replace(method, keep_per_view=2) == cls(keep_per_view=2)
    assert dataclasses.replace(method, keep_per_view=None) == cls()
    assert method.with_keep(7) == cls(keep=7)
    assert method.token_count(Grid(1, 6, 6)) == 4
    assert vlmzip.spec.write(method) == f"{cls.name()}(keep_per_view=4)"
    # Files of older versions have the number in both fields.
    assert catalogue.from_dict({**method.to_dict(), "keep": 4}) == method
    with pytest.raises(UserError, match="give either keep"):
        dataclasses.replace(method, keep=7)


@pytest.mark.parametrize("cls", [DFMR, AdaptiveVisionZip])
@torch.no_grad()
def test_tiles_may_get_one_factor_together(model, cls):
    """By the mean of their deviations, weighted by size; the base image keeps its own factor."""
    family, inputs = family_of(model), FAMILY.batch(*ROWS)
    encoded = family.encode(inputs, Site.PRE_PROJECTOR, cls.needs)
    layouts, encoded = without_padding(family.layouts(inputs), encoded, cls())
    deviations = {}
    for group in encoded.groups:
        grid = group.tokens.grid
        if cls().counts_by_factor(grid).keys() >= {3}:
            deviations |= dict(zip(group.numbers, cls().deviations(group.tokens)[:, -1].tolist(), strict=True))
    taus = sorted(deviations.values())
    choices = set()
    for tau in [0.0, *taus, 10.0]:
        with vlmzip.attach(model, cls(tau=tau, tiles="together")) as small:
            small(**inputs)
        for image, layout, numbers in zip(small.report.images, layouts, view_numbers(layouts), strict=True):
            base, *tiles = numbers
            one_factor = all(number in deviations for number in tiles)  # 3 does not divide tiles of one row
            mean = sum(deviations[n] for n in tiles) / len(tiles) if one_factor else 10.0
            wholes = [deviations[base] < tau, mean < tau]
            sizes = [layout.views[0].size, sum(grid.size for grid in layout.views[1:])]
            expected = sum(size // 9 if pooled else size for size, pooled in zip(sizes, wholes, strict=True))
            assert image.after == expected + layout.separators * (expected == sum(sizes))
            choices.add(tuple(wholes))
    assert len(choices) == 4


@pytest.mark.parametrize("budget", [160, 320, 640])
@torch.no_grad()
def test_the_papers_counts_are_upper_counts(model, budget):
    """VisionZip counts five views of 576 tokens. Images with fewer tiles keep fewer tokens, so the average is lower."""
    grid = Grid(1, 24, 24)
    profile = Profile(grid, layers=32, tiles=(grid,) * 4)
    for method in (VisionZip(keep=budget), VisionZip(keep_per_view=budget // 5), FastV(keep_per_view=budget // 5)):
        assert method.upper_count(profile) == budget
    patches, contextual = 27 * budget // 160, 5 * budget // 160
    assert VisionZip(dominant=patches, contextual=contextual).upper_count(profile) == budget
    small = vlmzip.compress_inputs(model, FAMILY.batch(*ROWS), VisionZip(keep_per_view=3))
    assert small.report.average == 3 * (5 + 3 + 4 + 3) / 4
    assert VisionZip(keep_per_view=3).upper_count(family_of(model).profile()) == 15
    assert DFMR().upper_count(profile) is None
