"""EVS against a naive loop, and on what it says of frames, ties and images."""

import pytest
import torch

from tests.references.evs import evs as naive
from vlmzip import EVS, BudgetError, Grid, Profile, UserError, VisualTokens

GRID = Grid(5, 3, 4)


def clips(prefix=0, grid=GRID, batch=2):
    """Return videos whose frames resemble the frame before."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(batch, grid.frames, grid.size // grid.frames, 8, generator=generator)
    amount = torch.rand(batch, grid.frames, grid.size // grid.frames, 1, generator=generator)
    amount[:, 0] = 1
    features = torch.cat(
        [torch.randn(batch, prefix, 8, generator=generator), (steps * amount).cumsum(1).flatten(1, 2)], 1
    )
    return VisualTokens(features, grid, prefix)


def kept_by(method, tokens, row=0):
    token_map = method(tokens)
    token_map.check()
    return (token_map.group[row] >= 0).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("pruned", [0.1, 0.29, 0.5, 0.71, 0.75, 0.9, 0.99])
def test_equals_the_naive_loop(pruned, prefix):
    tokens = clips(prefix)
    for row in range(2):
        expected = naive(tokens.features[row, prefix:].tolist(), GRID.frames, pruned)
        assert kept_by(EVS(keep=1 - pruned), tokens, row) == [prefix + n for n in expected]


def test_the_first_frame_stays_and_a_budget_counts_it():
    tokens = clips()
    assert kept_by(EVS(keep=1), tokens) == kept_by(EVS(keep="5%"), tokens) == list(range(12))
    assert len(kept_by(EVS(keep=20), tokens)) == EVS(keep=20).token_count(GRID) == 20
    assert EVS(keep=0.49).token_count(GRID) == 29  # 29.4, and 29.6 is rounded down, too
    assert EVS(keep=0.494).token_count(GRID) == 29


def test_of_equal_changes_the_first_stay():
    still = clips().replace(features=torch.ones(2, GRID.size, 8))
    assert kept_by(EVS(keep=20), still) == list(range(20))


def test_keep_per_view_counts_tokens_per_frame():
    (share,) = EVS(keep_per_view=4).shared([GRID])
    assert share.token_count(GRID) == 20


def test_an_image_keeps_all_and_has_no_budget():
    image = clips(grid=Grid(1, 3, 4))
    assert kept_by(EVS(keep=2), image) == list(range(12))
    with pytest.raises(BudgetError, match="keeps all tokens of an image: it drops tokens of videos only"):
        EVS().at_budget("50%", Profile(Grid(1, 3, 4), layers=4))


def test_tokens_without_a_grid_are_refused():
    with pytest.raises(UserError, match="put it before the method that leaves none"):
        EVS().assign(VisualTokens(torch.randn(1, 6, 8), None))
