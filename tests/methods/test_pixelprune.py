"""PixelPrune: its decision against a naive loop, and its runs of Qwen's encoders against runs with hidden patches."""

import copy

import pytest
import torch

import vlmzip
from tests.families import FAMILIES
from tests.families.qwen2_5_vl import window_order
from tests.references.pixelprune import hidden_patches, pixelprune
from vlmzip import BudgetError, Grid, NoCompression, PixelPrune, Profile, UserError, VisualTokens
from vlmzip.models import family_of

ROWS = ([1, "image", 5, 6, 7], [1, "image", 4, "image", 5], [1, 2, 3, 4], ["image", 8])
GREEDY = {"max_new_tokens": 4, "do_sample": False}
QWENS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


# --- the decision -----------------------------------------------------------------------------------------------


def images(grid, prefix):
    """Return tokens of three pixel values each, which take few levels, so that neighbours are often similar."""
    batch, generator = 3, torch.Generator().manual_seed(grid.rows * 31 + grid.cols)
    colours = torch.randint(4, (4, 3), generator=generator)
    values = colours[torch.randint(4, (batch, grid.size), generator=generator)] / 10
    return VisualTokens(torch.cat([torch.randn(batch, prefix, 3, generator=generator), values], 1), grid, prefix)


@pytest.mark.parametrize("tau", [0.0, 0.15, 0.25, 2.0])
@pytest.mark.parametrize(("prefix", "frames"), [(0, 1), (1, 1), (0, 3)])
def test_equals_the_naive_loop(tau, prefix, frames):
    for rows, cols in ((1, 1), (1, 7), (6, 1), (2, 2), (3, 5), (5, 3), (8, 8), (13, 24)):
        tokens = images(Grid(frames, rows, cols), prefix)
        token_map = PixelPrune(tau=tau)(tokens)
        token_map.check()
        for row in range(3):
            by_frame = tokens.features[row, prefix:].unflatten(0, (frames, -1)).tolist()
            of_frame = [pixelprune(frame, rows, cols, tau) for frame in by_frame]
            expected = [prefix + n * rows * cols + token for n, numbers in enumerate(of_frame) for token in numbers]
            assert token_map.anchor_index()[row, : len(expected)].tolist() == expected
            assert token_map.lengths[row] == len(expected)


def test_a_rectangle_leaves_the_tokens_at_its_corners():
    grid = Grid(1, 8, 9)
    pixels = torch.zeros(1, 8, 9, 2)
    assert PixelPrune()(VisualTokens(pixels.flatten(1, 2), grid)).lengths == [1]
    pixels[:, 2:5, 3:7] = 1
    kept = PixelPrune()(VisualTokens(pixels.flatten(1, 2), grid)).anchor_index()[0].tolist()
    # The rectangle begins at row 2, column 3, and the background goes on at column 7 and at row 5.
    assert kept == [0, 2 * 9 + 3, 2 * 9 + 7, 5 * 9 + 3]


def test_small_steps_do_not_add_up():
    """Each token differs from the one before by less than `tau`, and the third from the first by more."""
    steps = torch.tensor([0.0, 0.3, 0.6, 0.9, 1.2])[None, :, None]
    kept = PixelPrune(tau=0.4)(VisualTokens(steps, Grid(1, 1, 5))).anchor_index()[0]
    assert kept.tolist() == [0, 2, 4]


def test_the_image_decides_the_count():
    assert PixelPrune().token_count(Grid(1, 4, 4)) is None
    with pytest.raises(BudgetError, match=r"has no budget to set, because the image decides .* set tau"):
        PixelPrune().at_budget("25%", Profile(Grid(1, 4, 4), 4))
    with pytest.raises(BudgetError, match="depends on the image"):
        PixelPrune().reached(Profile(Grid(1, 4, 4), 4))
    with pytest.raises(UserError, match="tau must be a number of at least 0"):
        PixelPrune(tau=-1.0)


# --- the encoder ------------------------------------------------------------------------------------------------


@pytest.fixture(params=QWENS)
def qwen(request):
    return FAMILIES[request.param]()


def in_order_of_the_encoder(qwen, sizes, kept):
    """Return the marks of patches for the marks of tokens, in the order in which the encoder runs over them."""
    marks = []
    for (frames, rows, cols), part in zip(sizes, kept.split([t * r * c for t, r, c in sizes]), strict=True):
        order = window_order(rows, cols) if qwen.windowed else list(range(rows * cols))
        marks += [frame[order] for frame in part.view(frames, -1)]
    return torch.cat(marks).repeat_interleave(4)


SHARES = [0.2, 0.5, 0.9, 1]


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["image", "video"])
def test_the_encoder_sees_the_kept_patches_as_if_the_others_were_hidden(qwen, kind, attention):
    model = qwen.build(attention).double()  # so that rounding hides nothing
    family = next(each for each in family_of(model).modalities if each.modality == kind)
    inputs = qwen.batch([1, kind, 5], [kind, 4, kind])
    inputs[family.image_inputs[0]] = inputs[family.image_inputs[0]].double()
    pixels, sizes = (inputs[name] for name in family.image_inputs[:2])
    grids = [(frames, rows // 2, cols // 2) for frames, rows, cols in sizes.tolist()]
    rng = torch.Generator().manual_seed(1)
    for share in SHARES:
        kept = torch.rand(sum(t * r * c for t, r, c in grids), generator=rng) < share
        kept[0] = kept[-1] = True
        kept[grids[0][0] * grids[0][1] * grids[0][2]] = True  # each image keeps a token
        with hidden_patches(model.model.visual, in_order_of_the_encoder(qwen, grids, kept)):
            whole = model.model.visual(pixels, grid_thw=sizes)
        part = family.encode_part(inputs, kept)
        for values, expected in (
            ([view.tokens.features for view in part.groups], whole.pooler_output),
            *(
                ([view.streams[n] for view in part.groups], stream)
                for n, stream in enumerate(getattr(whole, "deepstack_features", ()))
            ),
        ):
            torch.testing.assert_close(torch.cat(values, 1)[0], expected[kept], atol=1e-5, rtol=0)
        assert len(part.groups) == len(grids) == 3


def test_tokens_without_any_kept_neighbour_in_their_window(qwen):
    """Whole windows of the encoder may be empty, and whole rows."""
    family = family_of(qwen.model)
    inputs = qwen.batch([1, "image", 5])  # 4 x 6 tokens in windows of 2 x 2
    kept = torch.zeros(24, dtype=torch.bool)
    kept[[0, 1, 23]] = True
    with torch.no_grad():
        features = family.encode_part(inputs, kept).groups[0].tokens.features[0]
        with hidden_patches(qwen.model.model.visual, in_order_of_the_encoder(qwen, [(1, 4, 6)], kept)):
            whole = qwen.model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
    torch.testing.assert_close(features, whole[kept], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", QWENS)
def test_features_are_the_pixels_in_0_1(name):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    scale = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3} if name == "qwen3_vl" else {}
    processor = Qwen2VLImageProcessorPil(do_resize=False, patch_size=4, merge_size=2, temporal_patch_size=2, **scale)
    image = torch.randint(256, (3, 24, 40), generator=torch.Generator().manual_seed(0)).byte()
    inputs = processor(images=[image.numpy()], input_data_format="channels_first", return_tensors="pt")
    (view,) = family_of(FAMILIES[name]().model).token_pixels(inputs).groups
    assert view.tokens.grid == Grid(1, 3, 5)
    cells = (image / 255).unflatten(1, (3, 8)).unflatten(3, (5, 8)).permute(1, 3, 0, 2, 4).reshape(15, 192)
    # A token has the values of its cell in another order, each of them for both frames of a temporal patch.
    expected = cells.repeat(1, 2).sort(1).values
    torch.testing.assert_close(view.tokens.features[0].sort(1).values, expected, atol=1e-6, rtol=0)


# --- the model --------------------------------------------------------------------------------------------------


def with_repeats(inputs, name="pixel_values"):
    """Return the inputs with 60 % of the tokens of all images looking like the first."""
    tokens = inputs[name].unflatten(0, (-1, 4)).clone()
    tokens[torch.rand(len(tokens), generator=torch.Generator().manual_seed(0)) < 0.6] = tokens[0].clone()
    return {**inputs, name: tokens.flatten(0, 1)}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["image", "video"])
def test_is_the_plain_model_with_the_dropped_tokens_hidden(qwen, kind):
    """The reference hides dropped tokens in the attention of encoder and LLM; all others keep their places."""
    name = "pixel_values" if kind == "image" else "pixel_values_videos"
    inputs = with_repeats(qwen.batch([1, kind, 5, 6, 7], [1, 3, kind, 4]), name)
    compressed = vlmzip.attach(qwen.model, PixelPrune())
    logits = compressed(**inputs).logits
    reports = compressed.report.images
    assert all(0 < report.after < report.before for report in reports)
    plain = vlmzip.compress_inputs(qwen.model, inputs, NoCompression(positions="original"))
    kept, mask = torch.cat([report.token_map.anchor[0] for report in reports]), inputs["attention_mask"].clone()
    is_placeholder = inputs["input_ids"] == (99 if kind == "image" else 98)
    mask[is_placeholder] = kept.long()  # the rows of the batch and the images are in one order
    grids = [(len(r.layout.views), r.grid.rows, r.grid.cols) for r in reports]
    with hidden_patches(qwen.model.model.visual, in_order_of_the_encoder(qwen, grids, kept)):
        masked = qwen.model(**{**inputs, "attention_mask": mask}, position_ids=plain["position_ids"]).logits
    for row in range(2):
        expected = masked[row, mask[row].bool()]
        torch.testing.assert_close(logits[row, -len(expected) :], expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_an_image_without_similar_tokens_is_that_of_the_plain_model(qwen):
    inputs = qwen.batch(*ROWS)
    compressed = vlmzip.attach(qwen.model, PixelPrune())
    torch.testing.assert_close(compressed(**inputs).logits, qwen.model(**inputs).logits, atol=1e-5, rtol=0)
    assert torch.equal(compressed.generate(**inputs, **GREEDY), qwen.model.generate(**inputs, **GREEDY))


def test_a_row_of_a_ragged_batch_is_that_row_alone(qwen):
    inputs = with_repeats(qwen.batch(*ROWS))
    compressed = vlmzip.attach(qwen.model, PixelPrune(tau=0.05))
    with torch.no_grad():
        together = compressed(**inputs).logits
    new = compressed.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    assert len({report.after for report in compressed.report.images}) > 1
    patches = inputs["pixel_values"].split(inputs["image_grid_thw"].prod(-1).tolist())
    for row, mine in enumerate(([0], [1, 2], [], [3])):
        one = qwen.batch(ROWS[row], first_image=min(mine, default=0))
        if mine:
            one["pixel_values"] = torch.cat([patches[image] for image in mine])
        with torch.no_grad():
            logits = compressed(**one).logits[0]
        torch.testing.assert_close(together[row, -len(logits) :], logits, atol=2e-5, rtol=0)
        single = compressed.generate(**one, **GREEDY)[0, one["input_ids"].shape[1] :].tolist()
        assert new[row, : len(single)].tolist() == single


@torch.no_grad()
def test_it_can_be_followed_by_a_method_inside_the_llm(qwen):
    inputs = with_repeats(qwen.batch(*ROWS))
    compressed = vlmzip.attach(qwen.model, "pixelprune+fastv(keep=2,layer=2)")
    assert compressed(**inputs).logits.isfinite().all()
    for report in compressed.report.images:
        assert report.by_layer[0] == report.after < report.before
        assert report.by_layer[-1] == 2
        assert report.detail_lost is None  # the full image has not been encoded


def test_loss_has_gradients_for_kept_pixels_and_the_encoder(qwen):
    model, inputs = copy.deepcopy(qwen.model), with_repeats(qwen.batch([1, "image", 5]))
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == 99, -100)
    inputs["pixel_values"].requires_grad_()
    compressed = vlmzip.attach(model, PixelPrune())
    compressed(**inputs).loss.backward()
    by_token = inputs["pixel_values"].grad.unflatten(0, (-1, 4)).abs().sum((1, 2))
    assert torch.equal(by_token > 0, compressed.report.images[0].token_map.anchor[0])
    assert model.model.visual.patch_embed.proj.weight.grad.abs().sum() > 0


def test_bfloat16(qwen):
    inputs = with_repeats(qwen.batch(*ROWS))
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    compressed = vlmzip.attach(copy.deepcopy(qwen.model).bfloat16(), PixelPrune())
    with torch.no_grad():
        logits = compressed(**inputs).logits
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()
    assert compressed.report.images[0].after < compressed.report.images[0].before


def test_other_models_are_refused_in_one_line():
    llava = FAMILIES["llava"]()
    message = "cannot run the vision encoder of LlavaForConditionalGeneration on a part of an image: choose another"
    with pytest.raises(UserError, match=message):
        vlmzip.attach(llava.model, PixelPrune())
    with pytest.raises(UserError, match=message):
        vlmzip.compress_inputs(llava.model, llava.batch([1, "image", 5]), PixelPrune())
