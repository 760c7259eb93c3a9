"""CDPruner against determinants."""

import pytest
import torch

from tests.methods.test_divprune import kept_by
from tests.methods.test_divprune import tokens_of as spread_tokens
from tests.references.cdpruner import cdpruner as naive
from vlmzip import CDPruner, Grid, UserError, catalogue


def tokens_of(rows, cols, prefix=1, batch=3, dim=12, copies=0.0, seed=0):
    """Return projected tokens and questions of different lengths."""
    tokens = spread_tokens(rows, cols, prefix, batch, dim, copies, seed)
    generator = torch.Generator().manual_seed(seed)
    return tokens.replace(
        text_features=torch.randn(batch, 4, dim, generator=generator),
        query_mask=torch.arange(4) >= 3 - torch.arange(batch)[:, None] % 4,
    )


def expected(tokens, keep, sign=1):
    views = zip(tokens.features[:, tokens.prefix :], tokens.text_features, tokens.query_mask, strict=True)
    return [naive(view.tolist(), text[is_word].tolist(), keep, sign) for view, text, is_word in views]


@pytest.mark.parametrize(("relevance", "sign"), [("similar", 1), ("dissimilar", -1)])
@pytest.mark.parametrize("copies", [0.0, 0.6])
@pytest.mark.parametrize(("rows", "cols", "prefix"), [(1, 2, 0), (2, 2, 1), (3, 5, 0), (6, 6, 1)])
def test_equals_the_naive_search_at_every_budget(rows, cols, prefix, copies, relevance, sign):
    """Beyond 12 tokens, which span all 12 dimensions, and beyond the copies, no token adds anything."""
    tokens = tokens_of(rows, cols, prefix, copies=copies, seed=rows)
    for keep in {keep for keep in (1, 2, 3, rows * cols // 2, rows * cols - 1) if 0 < keep < rows * cols}:
        assert kept_by(CDPruner(keep=keep, relevance=relevance), tokens) == expected(tokens, keep, sign)


@pytest.mark.parametrize("keep", [64, 128, 192])
def test_the_published_counts(keep):
    tokens = tokens_of(24, 24, batch=1, dim=40)
    kept = kept_by(CDPruner(keep=keep), tokens)
    assert len(kept[0]) == CDPruner(keep=keep).token_count(Grid(1, 24, 24)) == keep
    fewer = tokens_of(12, 12, batch=1, dim=40)
    assert kept_by(CDPruner(keep=keep // 9), fewer) == expected(fewer, keep // 9)


def test_of_equal_tokens_the_first_stay():
    tokens = tokens_of(6, 6)
    equal = tokens.replace(features=tokens.features[:, :1].expand(-1, 37, -1))
    assert kept_by(CDPruner(keep=7), equal) == [list(range(7))] * 3


def test_copies_of_kept_tokens_come_last():
    tokens = tokens_of(4, 4, prefix=0, dim=40)
    twice = tokens.replace(features=tokens.features.repeat(1, 2, 1), grid=Grid(1, 8, 4))
    assert kept_by(CDPruner(keep=16), twice) == [list(range(16))] * 3


def test_another_question_keeps_other_tokens():
    tokens = tokens_of(6, 6)
    other = tokens.replace(text_features=tokens.text_features.roll(1, dims=0))
    assert CDPruner().text_aware
    assert kept_by(CDPruner(keep=5), tokens) != kept_by(CDPruner(keep=5), other)


def test_padding_of_questions_changes_nothing():
    tokens = tokens_of(6, 6)
    longer = tokens.replace(
        text_features=torch.cat([torch.randn(3, 2, 12), tokens.text_features], 1),
        query_mask=torch.cat([torch.zeros(3, 2, dtype=torch.bool), tokens.query_mask], 1),
    )
    assert kept_by(CDPruner(keep=9), tokens) == kept_by(CDPruner(keep=9), longer)


def test_an_unknown_relevance_is_refused():
    with pytest.raises(UserError, match="relevance"):
        catalogue.make(CDPruner, {"relevance": "clip"})
