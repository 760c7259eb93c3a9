"""Compare LLaVolta's compressor with the paper's tables and with a loop over windows."""

import pytest
import torch

from tests.methods.test_visionzip import tokens_of
from vlmzip import BudgetError, Grid, LLaVolta, Profile, Site, UserError, VisualTokens

#: LLaVA-1.5-7B, as in the paper.
PAPER = Profile(Grid(1, 24, 24), layers=32)


@pytest.mark.parametrize(
    ("layer", "stride", "tokens", "printed"),
    [  # Tables 1, 4 and 5: layer, stride, tokens over all layers by Eq. 3, compression ratio in percent as printed
        (2, 8, 3312, 557),
        (2, 4, 5472, 337),
        (2, 2, 9792, 188),
        (2, 16, 2232, 825),
        (16, 8, 10368, 178),
        (16, 4, 11520, 160),
        (16, 2, 13824, 133),
        (16, 16, 9792, 188),
        (1, 64, 855, 2156),
    ],
)
def test_tokens_and_compression_ratio_are_the_papers(layer, stride, tokens, printed):
    by_layer = LLaVolta(layer=layer, stride=stride).tokens_by_layer(PAPER)
    assert sum(by_layer) == tokens
    # The paper rounds or truncates: Table 1 prints 825 for 825.8, Table 3 prints 556 for 556.5.
    assert abs(100 * 576 * 32 / tokens - printed) < 1


def test_layer_wise_pooling_reaches_the_ratio_of_table_7():
    """Strides 1, 2, 4 and 8 from layers 0, 4, 12 and 24 give 267 %. The row "layer 8, stride 8" contradicts Eq. 3."""
    stages = LLaVolta(layer=(4, 12, 24), stride=(2, 2, 2)).tokens_by_layer(PAPER)
    assert sum(stages) == 6912
    assert round(100 * 576 * 32 / sum(stages)) == 267
    assert round(100 * 576 * 32 / sum(LLaVolta(layer=8, stride=8).tokens_by_layer(PAPER)), 1) == 290.9


@pytest.mark.parametrize("last", ["drop", "keep"])
@pytest.mark.parametrize("stride", [1, 2, 5, 7, 36, 50])
def test_runs_are_means_in_raster_order(stride, last):
    tokens = tokens_of()
    out = LLaVolta(stride=stride, last=last)(tokens).apply(tokens.features)
    patches, expected = tokens.features[:, 1:], []
    for start in range(0, 36, stride):
        run = patches[:, start : start + stride]
        if run.shape[1] == stride or last == "keep" or stride > 36:
            expected.append(run.mean(1))
    torch.testing.assert_close(out, torch.stack(expected, 1))


@pytest.mark.parametrize(("last", "count"), [("drop", 4), ("keep", 9)])
def test_squares(last, count):
    tokens = tokens_of(rows=5, cols=5)
    token_map = LLaVolta(stride=2, window="2d", last=last)(tokens)
    assert token_map.lengths == [count] * 3
    grid = tokens.features[:, 1:].unflatten(1, (5, 5))
    ends = range(0, 5, 2) if last == "keep" else (0, 2)
    squares = [grid[:, r : r + 2, c : c + 2].flatten(1, 2).mean(1) for r in ends for c in ends]
    torch.testing.assert_close(token_map.apply(tokens.features), torch.stack(squares, 1))


def test_squares_lie_within_one_frame():
    tokens = VisualTokens(torch.randn(1, 32, 3, generator=torch.Generator().manual_seed(0)), Grid(2, 4, 4))
    out = LLaVolta(stride=2, window="2d")(tokens).apply(tokens.features)
    frames = [
        LLaVolta(stride=2, window="2d")(half).apply(half.features)
        for half in (VisualTokens(part, Grid(1, 4, 4)) for part in tokens.features.split(16, dim=1))
    ]
    torch.testing.assert_close(out, torch.cat(frames, 1))


def test_a_run_takes_the_position_of_its_middle():
    assert LLaVolta(stride=8)(tokens_of(prefix=0)).anchor_index()[0].tolist() == [3, 11, 19, 27]


def test_layer_minus_one_is_before_the_llm():
    before = LLaVolta(layer=-1, stride=8)
    assert before.site is Site.POST_PROJECTOR
    assert before.layers == ()
    assert before.tokens_by_layer(PAPER) == [72] * 32
    assert LLaVolta(site=Site.POST_PROJECTOR).layer == -1


def test_a_budget_below_the_layers_before_is_refused():
    with pytest.raises(BudgetError, match="16 of 32 layers see all tokens"):
        LLaVolta(layer=16).at_budget("25%", PAPER)
    chosen, reached = LLaVolta(layer=2).at_budget("25%", PAPER)
    assert chosen.stride == 5
    assert reached == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"stride": 0},
            "stride must be a whole number of at least 1 or several, such as 1,3, got 0",
        ),
        ({"layer": (4, 2), "stride": 2}, "ascending"),
        ({"layer": (1, 2, 3), "stride": (2, 2)}, "2 strides for 3 layers"),
        ({"layer": (1, 2), "window": "2d"}, "window='2d' needs a grid"),
    ],
)
def test_wrong_settings_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        LLaVolta(**fields)
