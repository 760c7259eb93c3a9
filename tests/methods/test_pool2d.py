import pytest
import torch

from tests.methods.test_visionzip import tokens_of
from vlmzip import Grid, Pool2d, Profile, UserError, catalogue


@pytest.mark.parametrize("factor", [1, 2, 3, 6])
def test_equals_torch_average_pooling_where_the_factor_divides(factor):
    tokens = tokens_of()
    image = tokens.features[:, 1:].transpose(1, 2).unflatten(2, (6, 6))
    expected = torch.nn.functional.avg_pool2d(image, factor).flatten(2).transpose(1, 2)
    torch.testing.assert_close(Pool2d(factor=factor)(tokens).apply(tokens.features), expected)


def test_smaller_windows_at_the_edge_average_what_is_there():
    tokens = tokens_of(rows=5, cols=7)
    image = tokens.features[:, 1:].transpose(1, 2).unflatten(2, (5, 7))
    expected = torch.nn.functional.avg_pool2d(image, 3, ceil_mode=True, count_include_pad=False)
    torch.testing.assert_close(Pool2d(factor=3)(tokens).apply(tokens.features), expected.flatten(2).transpose(1, 2))


def test_frames_are_not_mixed():
    assert Pool2d(factor=2).token_count(Grid(3, 4, 4)) == 12


def test_the_papers_counts():
    assert [Pool2d(factor=f).token_count(Grid(1, 24, 24)) for f in (1, 2, 3)] == [576, 144, 64]


@pytest.mark.parametrize(
    ("keep", "factor", "reached"), [("25%", 2, 0.25), ("11%", 3, 1 / 9), ("50%", 2, 0.25), (0.9, 1, 1.0)]
)
def test_nearest_factor_to_a_budget(keep, factor, reached):
    chosen, got = Pool2d().at_budget(keep, Profile(Grid(1, 24, 24), 32))
    assert (chosen.factor, got) == (factor, pytest.approx(reached))


@pytest.mark.parametrize("factor", [0, -1, "2.5", "two"])
def test_wrong_factors_are_refused(factor):
    with pytest.raises(UserError, match="factor"):
        catalogue.make(Pool2d, {"factor": factor})
