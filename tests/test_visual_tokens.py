import pytest
import torch

from vlmzip import Grid, VisualTokens


def test_prefix_and_grid_must_fill_the_tokens():
    with pytest.raises(ValueError, match="do not fill"):
        VisualTokens(torch.zeros(1, 10, 2), Grid(1, 3, 3), prefix=0)


def test_plain_count_leaves_the_prefix_out_unless_the_model_passes_it():
    features = torch.zeros(1, 10, 2)
    assert VisualTokens(features, Grid(1, 3, 3), prefix=1).plain_count == 9
    assert VisualTokens(features, Grid(1, 3, 3), prefix=1, passes_prefix=True).plain_count == 10


def test_shapes_in_signatures_are_executed():
    with pytest.raises(Exception, match="features"):
        VisualTokens(torch.zeros(10, 2), Grid(1, 3, 3))
