"""HiPrune against a naive loop, and its layers, neighbours, counts and ties."""

import pytest
import torch

from tests.methods.test_visionzip import tokens_of
from tests.references.hiprune import hiprune as naive
from vlmzip import Grid, HiPrune, UserError, VisualTokens


def with_attention(tokens, layers=2, seed=0):
    shape = (*tokens.features.shape[:2], layers)
    return tokens.replace(attention_received=torch.rand(shape, generator=torch.Generator().manual_seed(seed)))


def kept_by(method, tokens, row=0):
    token_map = method(tokens)
    token_map.check()
    return (token_map.group[row] >= 0).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0])
@pytest.mark.parametrize(
    ("rows", "cols", "keep"), [(1, 2, 1), (3, 4, 1), (3, 4, 8), (3, 4, 11), (6, 6, 15), (24, 24, 64)]
)
def test_equals_the_naive_loop(rows, cols, keep, alpha, prefix):
    tokens = with_attention(tokens_of(rows=rows, cols=cols, prefix=prefix), seed=rows)
    for row in range(3):
        middle, deep = tokens.attention_received[row, prefix:].T.tolist()
        expected = [prefix + n for n in naive(middle, deep, rows, cols, keep, alpha)]
        assert kept_by(HiPrune(keep=keep, alpha=alpha), tokens, row) == expected


@pytest.mark.parametrize(("keep", "anchors"), [(192, 4), (128, 3), (64, 1)])
def test_the_published_counts(keep, anchors):
    """The anchors are the patches of the middle layer that are kept although the deep layer ignores them."""
    attention = torch.zeros(1, 576, 2)
    in_the_middle = [0, 140, 301, 574]
    attention[0, in_the_middle, 0] = torch.tensor([1.0, 0.9, 0.8, 0.7])
    attention[0, :, 1] = torch.arange(576) % 7
    tokens = tokens_of(1, 24, 24, prefix=0).replace(attention_received=attention)
    kept = kept_by(HiPrune(keep=keep), tokens)
    assert len(kept) == HiPrune(keep=keep).token_count(Grid(1, 24, 24)) == keep
    assert [n for n in in_the_middle if n in kept] == in_the_middle[:anchors]


@pytest.mark.parametrize(("anchor", "near"), [(0, [1, 6]), (11, [5, 10, 17]), (14, [8, 13, 15, 20]), (35, [29, 34])])
def test_neighbours_do_not_wrap_around_rows(anchor, near):
    attention = torch.zeros(1, 37, 2)
    attention[0, 1 + anchor, 0] = 1
    attention[0, 1:, 1] = torch.linspace(1, 0, 36).roll(anchor + 18)
    tokens = tokens_of(1).replace(attention_received=attention)
    kept = kept_by(HiPrune(keep=5, alpha=1.0), tokens)
    assert set(kept) >= {1 + n for n in (anchor, *near)}
    assert len(kept) == 5


def test_neighbours_stay_in_their_frame():
    attention = torch.zeros(1, 12, 2)
    attention[0, 3, 0] = 1  # the last token of the first of three frames of 2 x 2
    attention[0, :, 1] = torch.linspace(0, 1, 12)
    tokens = VisualTokens(torch.zeros(1, 12, 4), Grid(3, 2, 2), attention_received=attention)
    assert kept_by(HiPrune(keep=5, alpha=1.0), tokens) == [1, 2, 3, 10, 11]


@pytest.mark.parametrize(("depth", "layers"), [(24, (8,)), (32, (11,)), (3, (0,)), (1, (0,))])
def test_the_object_layer_is_at_the_papers_share_of_the_depth(depth, layers):
    assert HiPrune().encoder_layers(depth) == layers
    assert HiPrune(object_layer=depth).encoder_layers(depth) == (depth - 1,)


def test_a_layer_that_the_encoder_lacks_is_refused():
    with pytest.raises(UserError, match="object_layer must be from 1 to 24 in this encoder, got 30"):
        HiPrune(object_layer=30).encoder_layers(24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_equally_attended_patches_the_first_stay(dtype):
    tokens = tokens_of(2).replace(attention_received=torch.ones(2, 37, 2, dtype=dtype))
    assert kept_by(HiPrune(keep=9, alpha=0.6), tokens) == list(range(1, 10))


def test_tokens_without_a_grid_are_refused():
    with pytest.raises(UserError, match="needs tokens that lie on a grid"):
        HiPrune(keep=2).assign(VisualTokens(torch.zeros(1, 6, 4), None, attention_received=torch.rand(1, 6, 2)))
