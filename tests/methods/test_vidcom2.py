"""VidCom2 against a naive loop, and on what it says of frames, ties and images."""

import pytest
import torch

from tests.references.vidcom2 import vidcom2 as naive
from vlmzip import BudgetError, Grid, Profile, UserError, VidCom2, VisualTokens

GRID = Grid(5, 3, 4)


def clips(grid=GRID, prefix=0, batch=2, dim=9, spread=1.0, seed=0):
    """Return videos whose frames differ by `spread`, the later ones more; the first half of each is still."""
    generator = torch.Generator().manual_seed(seed)
    size = grid.size // grid.frames
    still = torch.randn(batch, 1, size, dim, generator=generator)
    changes = torch.randn(batch, grid.frames, size, dim, generator=generator)
    amount = (torch.arange(grid.frames) - grid.frames // 2).clamp(min=0)[:, None, None]
    features = (still + spread * amount * changes).flatten(1, 2)
    return VisualTokens(torch.cat([torch.randn(batch, prefix, dim, generator=generator), features], 1), grid, prefix)


def kept_by(method, tokens, row=0):
    token_map = method(tokens)
    token_map.check()
    return (token_map.group[row] >= 0).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("spread", [0.0, 0.03, 1.0])
@pytest.mark.parametrize("pruned", [0.1, 0.29, 0.5, 0.75, 0.9, 0.99])
@pytest.mark.parametrize("grid", [Grid(2, 1, 2), GRID, Grid(4, 6, 6)])
def test_equals_the_naive_loop(grid, pruned, spread, prefix):
    tokens = clips(grid, prefix, spread=spread)
    for row in range(2):
        expected = naive(tokens.features[row, prefix:].tolist(), grid.frames, pruned)
        assert kept_by(VidCom2(keep=1 - pruned), tokens, row) == [prefix + n for n in expected]


def test_a_frame_that_differs_gets_more_tokens():
    tokens = clips(Grid(4, 6, 6), batch=1)
    odd = tokens.features.clone()
    odd[:, 36:72] = -odd[:, :36]
    kept = kept_by(VidCom2(keep="25%"), tokens.replace(features=odd))
    counts = [sum(n // 36 == frame for n in kept) for frame in range(4)]
    assert sum(counts) == 36
    assert counts[1] == max(counts) > 9


@pytest.mark.parametrize(("keep", "count"), [("25%", 15), (20, 20), (1, 5), ("1%", 5), (0.494, 29), (59, 59)])
def test_counts_are_exact_and_at_least_one_for_each_frame(keep, count):
    assert len(kept_by(VidCom2(keep=keep), clips())) == VidCom2(keep=keep).token_count(GRID) == count


def test_of_equally_redundant_tokens_the_first_stay():
    still = clips().replace(features=torch.ones(2, GRID.size, 9))
    assert kept_by(VidCom2(keep=20), still) == [
        *range(4),
        *range(12, 16),
        *range(24, 28),
        *range(36, 40),
        *range(48, 52),
    ]
    # Each frame keeps 1.6 tokens, which are 2. The last ones go, as all are equally redundant.
    assert kept_by(VidCom2(keep=8), still) == [0, 1, 12, 13, 24, 25, 36, 37]


def test_bfloat16_decides_like_float32():
    tokens = clips()
    half = tokens.features.bfloat16()
    whole = VidCom2(keep=17)(tokens.replace(features=half.float()))
    assert torch.equal(VidCom2(keep=17)(tokens.replace(features=half)).group, whole.group)


def test_keep_per_view_counts_tokens_per_frame():
    (share,) = VidCom2(keep_per_view=4).shared([GRID])
    assert share.token_count(GRID) == 20


def test_an_image_keeps_all_and_has_no_budget():
    image = clips(Grid(1, 3, 4))
    assert kept_by(VidCom2(keep=2), image) == list(range(12))
    with pytest.raises(BudgetError, match="keeps all tokens of an image: it drops tokens of videos only"):
        VidCom2().at_budget("50%", Profile(Grid(1, 3, 4), layers=4))


def test_tokens_without_a_grid_are_refused():
    with pytest.raises(UserError, match="put it before the method that leaves none"):
        VidCom2().assign(VisualTokens(torch.randn(1, 6, 8), None))
