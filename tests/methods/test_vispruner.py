"""VisPruner against a naive loop, and its counts, ties and memory."""

import pytest
import torch
from torch.nn.functional import normalize

from tests.methods.test_visionzip import tokens_of
from tests.references.vispruner import vispruner as naive
from vlmzip import Grid, UserError, VisPruner
from vlmzip.methods import vispruner


def kept_by(method, tokens, row=0):
    token_map = method(tokens)
    token_map.check()
    return (token_map.group[row] >= 0).nonzero()[:, 0].tolist()


def expected_of(tokens, method):
    """Return what the naive loop keeps of each image. Both compare the same rounded similarities."""
    prefix = tokens.prefix
    x = normalize(tokens.features[:, prefix:], dim=-1)
    count = method.count(x.shape[1])
    for attention, similarity in zip(tokens.cls_attention[:, prefix:], x @ x.transpose(1, 2), strict=True):
        yield [prefix + n for n in naive(attention.tolist(), similarity.tolist(), count, method.important)]


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("important", [0.5, 0.75, 0.0])
@pytest.mark.parametrize(
    ("rows", "cols", "keep"),
    [(1, 2, 1), (3, 3, 1), (3, 3, 2), (3, 3, 8), (5, 7, 4), (5, 7, 30), (8, 8, 15), (24, 24, 64)],
)
def test_equals_the_naive_loop(rows, cols, keep, important, prefix):
    tokens = tokens_of(2, rows, cols, dim=16, prefix=prefix, seed=rows + keep)
    method = VisPruner(keep=keep, important=important)
    for row, expected in enumerate(expected_of(tokens, method)):
        assert kept_by(method, tokens, row) == expected


def test_chunks_choose_the_same_as_the_matrix(monkeypatch):
    tokens, method = tokens_of(rows=9, cols=9), VisPruner(keep=20)
    whole = method(tokens)
    monkeypatch.setattr(vispruner, "LARGEST_MATRIX", 0)
    monkeypatch.setattr(vispruner, "CHUNK", 7)
    assert torch.equal(method(tokens).group, whole.group)


@pytest.mark.parametrize("listed", [1, 5, 32, 1000])
def test_lists_choose_the_same_as_the_matrix(monkeypatch, listed):
    tokens, method = tokens_of(rows=24, cols=24), VisPruner(keep=20)
    whole = method(tokens)
    monkeypatch.setattr(vispruner, "SHORT", 0)
    monkeypatch.setattr(vispruner, "LISTED", listed)
    assert torch.equal(method(tokens).group, whole.group)


@pytest.mark.parametrize("keep", [192, 128, 64])
def test_the_published_counts(keep):
    assert len(kept_by(VisPruner(keep=keep), tokens_of(rows=24, cols=24))) == keep
    assert VisPruner(keep=keep).token_count(Grid(1, 24, 24)) == keep


def test_all_important_is_the_ranking_by_attention():
    tokens = tokens_of()
    best = tokens.cls_attention[0, 1:].topk(9).indices + 1
    assert kept_by(VisPruner(keep=9, important=1.0), tokens) == sorted(best.tolist())


def test_of_equal_patches_the_first_stay():
    equal = tokens_of().replace(features=torch.ones(3, 37, 16), cls_attention=torch.ones(3, 37))
    # The important half is patches 1 to 5. Each round drops the first 8 of the even places, so that odd places stay.
    assert kept_by(VisPruner(keep=10), equal) == list(next(expected_of(equal, VisPruner(keep=10))))
    assert kept_by(VisPruner(keep=10), equal)[:5] == [1, 2, 3, 4, 5]


def test_a_share_above_one_is_refused():
    with pytest.raises(UserError, match="important"):
        VisPruner(important=1.5)
