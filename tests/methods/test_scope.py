"""SCOPE against a naive loop."""

import pytest
import torch

from tests.methods.test_divprune import kept_by
from tests.methods.test_divprune import tokens_of as spread_tokens
from tests.references.scope import scope as naive
from vlmzip import SCOPE, Grid, UserError, catalogue, selection


def tokens_of(rows, cols, prefix=1, batch=3, copies=0.0, seed=0):
    """Return visual tokens with attention from CLS, a share of which are copies of another token of the image."""
    tokens = spread_tokens(rows, cols, prefix, batch, copies=copies, seed=seed)
    attention = torch.rand(tokens.features.shape[:2], generator=torch.Generator().manual_seed(seed)) + 0.01
    return tokens.replace(cls_attention=attention)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("copies", [0.0, 0.6])
@pytest.mark.parametrize(("rows", "cols", "prefix"), [(1, 2, 0), (2, 2, 1), (3, 5, 0), (6, 6, 1)])
def test_equals_the_naive_loop_at_every_budget(rows, cols, prefix, copies, alpha):
    tokens = tokens_of(rows, cols, prefix, copies=copies, seed=rows)
    features, attention = (values[:, prefix:].tolist() for values in (tokens.features, tokens.cls_attention))
    for keep in {keep for keep in (1, 2, 3, rows * cols // 2, rows * cols - 1) if 0 < keep < rows * cols}:
        expected = [naive(*row, keep, alpha) for row in zip(features, attention, strict=True)]
        assert kept_by(SCOPE(keep=keep, alpha=alpha), tokens) == expected


@pytest.mark.parametrize("keep", [pytest.param(64, marks=pytest.mark.slow), 128, 192])
def test_the_published_counts(keep):
    tokens = tokens_of(24, 24, batch=1)
    (kept,) = kept_by(SCOPE(keep=keep), tokens)
    assert len(kept) == SCOPE(keep=keep).token_count(Grid(1, 24, 24)) == keep
    if keep == 64:  # the loops take seconds
        assert kept == naive(tokens.features[0, 1:].tolist(), tokens.cls_attention[0, 1:].tolist(), keep)


def test_of_equal_tokens_the_first_stay():
    tokens = tokens_of(6, 6)
    equal = tokens.replace(
        features=tokens.features[:, :1].expand(-1, 37, -1), cls_attention=torch.full_like(tokens.cls_attention, 0.3)
    )
    assert kept_by(SCOPE(keep=7), equal) == [list(range(7))] * 3


def test_views_that_do_not_fit_into_memory_at_once_take_turns(monkeypatch):
    tokens = tokens_of(5, 5)
    together = kept_by(SCOPE(keep=6), tokens)
    for entries in (2 * 25 * 25, 1):
        monkeypatch.setattr(selection, "KEPT_TO_COVER", entries)
        assert kept_by(SCOPE(keep=6), tokens) == together


def test_a_negative_exponent_is_refused():
    with pytest.raises(UserError, match="alpha"):
        catalogue.make(SCOPE, {"alpha": -1})
