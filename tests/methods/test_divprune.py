"""DivPrune against a naive loop."""

import pytest
import torch

from tests.references.divprune import divprune as naive
from vlmzip import DivPrune, Grid, Site, VisualTokens


def tokens_of(rows, cols, prefix=1, batch=3, dim=12, copies=0.0, seed=0):
    """Return visual tokens, a share of which are copies of another token of the image."""
    generator = torch.Generator().manual_seed(seed)
    size = rows * cols
    features = torch.randn(batch, size, dim, generator=generator) + 0.5
    source = torch.randint(size, (batch, size), generator=generator)
    is_copy = torch.rand(batch, size, generator=generator) < copies
    source = torch.where(is_copy, source, torch.arange(size))
    features = features.gather(1, source[..., None].expand_as(features))
    cls = torch.randn(batch, prefix, dim, generator=generator)
    return VisualTokens(torch.cat([cls, features], 1), Grid(1, rows, cols), prefix)


def kept_by(method, tokens):
    """Return the kept tokens of each row, counted without the prefix."""
    token_map = method(tokens)
    token_map.check()
    return [[n - tokens.prefix for n in (row >= 0).nonzero()[:, 0].tolist()] for row in token_map.group]


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("copies", [0.0, 0.6])
@pytest.mark.parametrize(("rows", "cols"), [(1, 2), (2, 2), (3, 5), (6, 6)])
def test_equals_the_naive_loop_at_every_budget(rows, cols, copies, prefix):
    tokens = tokens_of(rows, cols, prefix, copies=copies, seed=rows)
    for keep in {keep for keep in (1, 2, 3, rows * cols // 2, rows * cols - 1) if 0 < keep < rows * cols}:
        expected = [naive(row.tolist(), keep) for row in tokens.features[:, prefix:]]
        assert kept_by(DivPrune(keep=keep), tokens) == expected


@pytest.mark.parametrize("keep", [64, 128, 192])
def test_the_published_counts(keep):
    tokens = tokens_of(24, 24, batch=1, dim=6)
    (kept,) = kept_by(DivPrune(keep=keep), tokens)
    assert len(kept) == keep
    if keep == 64:  # the loops take seconds
        assert kept == naive(tokens.features[0, 1:].tolist(), keep)


def test_the_authors_ratio_keeps_56_of_576():
    assert DivPrune(keep="9.8%").token_count(Grid(1, 24, 24)) == 56


def test_of_equal_tokens_the_first_stay():
    features = torch.randn(1, 1, 40).expand(2, 37, 40)
    assert kept_by(DivPrune(keep=7), VisualTokens(features, Grid(1, 6, 6), prefix=1)) == [list(range(7))] * 2


@pytest.mark.parametrize("site", DivPrune.sites)
def test_every_site_uses_the_features_that_it_finds(site):
    tokens = tokens_of(4, 4)
    assert kept_by(DivPrune(keep=5, site=site), tokens) == kept_by(DivPrune(keep=5), tokens)


def test_it_acts_behind_the_projector_unless_told_otherwise():
    assert DivPrune().site is Site.POST_PROJECTOR
