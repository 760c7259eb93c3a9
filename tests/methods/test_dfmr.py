import pytest
import torch

from tests.families import FAMILIES
from tests.methods.test_visionzip import tokens_of
from tests.references import dfmr as naive
from tests.tiny import batch, prompt
from vlmzip import DFMR, Grid, Signal, Site, UserError, VisualTokens, attach, catalogue
from vlmzip.models import family_of


def smooth(tokens, strength):
    """Return the same images with decreasing variation from row to row: features move towards their mean."""
    mean = tokens.features.mean(1, keepdim=True)
    share = torch.linspace(1, strength, len(tokens.features))[:, None, None]
    return VisualTokens(mean + share * (tokens.features - mean), tokens.grid, tokens.prefix)


@pytest.mark.parametrize(("rows", "cols", "max_factor"), [(6, 6, 3), (6, 4, 3), (9, 3, 3), (8, 12, 4), (5, 7, 3)])
@pytest.mark.parametrize("normalize", ["layer", "none"])
def test_equals_the_naive_loop(rows, cols, max_factor, normalize):
    tokens = smooth(tokens_of(rows=rows, cols=cols, seed=rows * cols), 0.02)
    taus = DFMR(max_factor=max_factor, normalize=normalize).deviations(tokens).flatten().tolist()
    for tau in [0.0, 0.2, *(t * 1.01 for t in taus), 5.0]:
        check_against_loop(tokens, DFMR(tau=tau, max_factor=max_factor, normalize=normalize))


@pytest.mark.further
def test_equals_the_naive_loop_on_mini(mini_tokens):
    for tau in (0.2, 0.3, 0.4):
        check_against_loop(mini_tokens, DFMR(tau=tau))
    assert len(set(DFMR()(mini_tokens).lengths)) == 3


def check_against_loop(tokens, method):
    token_map = method(tokens)
    token_map.check()
    out = token_map.apply(tokens.features)
    for row, features in enumerate(tokens.features[:, tokens.prefix :]):
        measured = features.tolist()
        if method.normalize == "layer":
            measured = [naive.layer_normalised(token) for token in measured]
        factor, _ = naive.dfmr(measured, tokens.grid.rows, tokens.grid.cols, method.tau, method.max_factor)
        windows = naive.windows(features.tolist(), tokens.grid.rows, tokens.grid.cols, factor)
        expected = torch.tensor([naive.mean(window) for window in windows])
        assert token_map.lengths[row] == len(expected)
        torch.testing.assert_close(out[row, : len(expected)], expected, atol=1e-5, rtol=1e-5)


def test_pixels_are_measured_in_windows_of_patches():
    """Patches have 4 x 4 pixels, so windows of 2 x 2 and 3 x 3 patches are 8 and 12 pixels wide."""
    tokens = tokens_of()
    pixels = torch.rand(3, 3, 24, 24)
    tokens = VisualTokens(tokens.features, tokens.grid, 1, pixels=pixels)
    found = DFMR(measure="pixels").deviations(tokens)
    for row, image in enumerate(pixels):
        values = image.permute(1, 2, 0).flatten(0, 1).tolist()
        for column, side in enumerate((8, 12)):
            assert found[row, column].item() == pytest.approx(naive.deviation(values, 24, 24, side), abs=1e-6)


@pytest.mark.parametrize("side", [2, 3, 6])
def test_deviations_are_those_of_torch_to_the_last_bit(side):
    features = 10 * torch.randn(2, 2 * 12 * 12, 33) + 3
    tokens = VisualTokens(features, Grid(2, 12, 12))
    method = DFMR(normalize="none", max_factor=side)
    in_windows = features.view(2, 2, 12 // side, side, 12 // side, side, 33)
    expected = in_windows.var(dim=(3, 5), correction=0).sqrt().mean(-1).flatten(1).mean(1)
    assert method.deviations(tokens)[:, -1].tolist() == expected.tolist()


def test_l2_measures_directions_only():
    tokens = tokens_of()
    louder = VisualTokens(tokens.features * 7, tokens.grid, 1)
    method = DFMR(normalize="l2")
    torch.testing.assert_close(method.deviations(louder), method.deviations(tokens))
    unit = torch.nn.functional.normalize(tokens.features, dim=-1)
    plain = DFMR(normalize="none").deviations(VisualTokens(unit, tokens.grid, 1))
    torch.testing.assert_close(method.deviations(tokens), plain)


def test_one_varied_window_is_enough_for_max():
    features = torch.zeros(1, 36, 8)
    features[0, 0] = torch.randn(8)
    tokens = VisualTokens(features, Grid(1, 6, 6))
    by_mean, by_max = (DFMR(windows=w, normalize="none").deviations(tokens) for w in ("mean", "max"))
    torch.testing.assert_close(by_max, by_mean * torch.tensor([9.0, 4.0]))


def test_frames_are_not_mixed():
    """Two different frames are each constant, so no window has any deviation."""
    features = torch.cat([torch.zeros(1, 4, 8), torch.ones(1, 4, 8)], dim=1)
    tokens = VisualTokens(features, Grid(2, 2, 2))
    assert DFMR(tau=0.01, normalize="none")(tokens).lengths == [2]


def test_the_papers_counts():
    assert DFMR().counts_by_factor(Grid(1, 24, 24)) == {1: 576, 2: 144, 3: 64}
    assert DFMR(max_factor=2).counts_by_factor(Grid(1, 24, 24)) == {1: 576, 2: 144}
    # Larger factors than the sides are not tried.
    assert DFMR(max_factor=10**30).counts_by_factor(Grid(1, 4, 6)) == {1: 24, 2: 6}
    assert DFMR().token_count(Grid(1, 24, 24)) is None
    assert DFMR().token_count(Grid(1, 5, 7)) == 35


def test_pixels_come_from_the_model_in_0_to_1(llava):
    """An image that is normalised as by CLIP's processor comes back unchanged."""
    mean, deviation = (
        torch.tensor([0.48145466, 0.4578275, 0.40821073]),
        torch.tensor([0.26862954, 0.26130258, 0.27577711]),
    )
    image = torch.rand(2, 3, 48, 48)
    inputs = {"pixel_values": (image - mean[:, None, None]) / deviation[:, None, None]}
    (group,) = family_of(llava).encode(inputs, Site.PRE_PROJECTOR, frozenset({Signal.PIXELS})).groups
    tokens = group.tokens
    torch.testing.assert_close(tokens.pixels, image)
    assert "cls_attention" not in tokens.signals
    wider = {"pixel_values": torch.zeros(1, 3, 48, 48)}
    (group,) = family_of(llava).encode(wider, Site.PRE_PROJECTOR, frozenset()).groups
    assert "pixels" not in group.tokens.signals


def test_qwen_has_no_pixels_to_measure():
    family = FAMILIES["qwen2_5_vl"]()
    with pytest.raises(UserError, match="patches, not images"), torch.no_grad():
        attach(family.model, DFMR(measure="pixels"))(**family.batch([1, "image", 4]))


@pytest.mark.parametrize("fields", [{"tau": 0.0}, {"max_factor": 1}])
def test_without_pooling_the_logits_are_the_models(llava, fields):
    inputs = batch(prompt(1, "image", 5, 6), prompt(1, "image", 4), images=2)
    with torch.no_grad():
        torch.testing.assert_close(attach(llava, DFMR(**fields))(**inputs).logits, llava(**inputs).logits)


def test_images_of_different_factors_answer_in_one_batch_as_alone(llava):
    inputs = batch(prompt(1, "image", 5, 6), prompt(1, "image", 4), images=2)
    inputs["pixel_values"][1] = 0.1 * inputs["pixel_values"][1] + 1
    (group,) = family_of(llava).encode(inputs, Site.PRE_PROJECTOR, frozenset()).groups
    tokens = group.tokens
    low, high = DFMR().deviations(tokens)[:, 0].sort().values.tolist()
    compressed = attach(llava, DFMR(tau=(low + high) / 2, max_factor=2))
    with torch.no_grad():
        together = compressed(**inputs).logits[:, -1]
        assert sorted(p.after for p in compressed.report.images) == [9, 36]
        for row in range(2):
            rows = inputs["attention_mask"][row].bool()
            one = {name: inputs[name][row : row + 1, rows] for name in ("input_ids", "attention_mask")}
            alone = compressed(**one, pixel_values=inputs["pixel_values"][row : row + 1]).logits[0, -1]
            torch.testing.assert_close(alone, together[row], atol=1e-5, rtol=1e-5)


def test_tokens_without_a_grid_are_refused():
    with pytest.raises(UserError, match="lie on a grid"):
        DFMR().deviations(VisualTokens(torch.zeros(1, 4, 2), None))


@pytest.mark.parametrize(
    "fields",
    [
        {"tau": -0.1},
        {"tau": "nan"},
        {"tau": "inf"},
        {"tau": "low"},
        {"max_factor": 0},
        {"max_factor": "1.5"},
        {"normalize": "batch"},
        {"measure": "tokens"},
        {"windows": "median"},
        {"site": "in_llm"},
    ],
)
def test_wrong_fields_are_refused(fields):
    with pytest.raises(UserError):
        catalogue.make(DFMR, fields)
