"""MMTok against a naive loop."""

import pytest
import torch

from tests.methods.test_divprune import kept_by
from tests.methods.test_divprune import tokens_of as spread_tokens
from tests.references.mmtok import mmtok as naive
from vlmzip import Grid, MMTok, Signal, selection


def tokens_of(rows, cols, prefix=1, batch=3, copies=0.0, seed=0):
    """Return projected tokens, features before the projector, and questions of different lengths."""
    tokens = spread_tokens(rows, cols, prefix, batch, copies=copies, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    vision = spread_tokens(rows, cols, prefix, batch, dim=7, copies=copies, seed=seed).features
    lengths = torch.arange(batch) % 4 + 1
    return tokens.replace(
        encoder_features=vision,
        text_features=torch.randn(batch, 4, tokens.features.shape[2], generator=generator),
        query_mask=torch.arange(4) >= 4 - lengths[:, None],
    )


def expected(tokens, keep, **settings):
    views = zip(tokens.features, tokens.encoder_features, tokens.text_features, tokens.query_mask, strict=True)
    start = tokens.prefix
    return [
        naive(projected[start:].tolist(), vision[start:].tolist(), text[is_word].tolist(), keep, **settings)
        for projected, vision, text, is_word in views
    ]


@pytest.mark.parametrize(
    "settings",
    [{}, {"alpha": 0.0, "text_temperature": 0.2}, {"alpha": 3.0, "text_temperature": 0.1, "vision_temperature": 0.05}],
)
@pytest.mark.parametrize("copies", [0.0, 0.6])
@pytest.mark.parametrize(("rows", "cols", "prefix"), [(1, 2, 0), (2, 2, 1), (3, 5, 0), (6, 6, 1)])
def test_equals_the_naive_loop_at_every_budget(rows, cols, prefix, copies, settings):
    tokens = tokens_of(rows, cols, prefix, copies=copies, seed=rows)
    for keep in {keep for keep in (1, 2, 3, rows * cols // 2, rows * cols - 1) if 0 < keep < rows * cols}:
        assert kept_by(MMTok(keep=keep, **settings), tokens) == expected(tokens, keep, **settings)


@pytest.mark.parametrize("keep", [pytest.param(64, marks=pytest.mark.slow), 128, 192])
def test_the_published_counts(keep):
    tokens = tokens_of(24, 24, batch=1)
    kept = kept_by(MMTok(keep=keep), tokens)
    assert len(kept[0]) == MMTok(keep=keep).token_count(Grid(1, 24, 24)) == keep
    if keep == 64:  # the loops take seconds
        assert kept == expected(tokens, keep)


def test_of_equal_tokens_the_first_stay():
    tokens = tokens_of(6, 6)
    equal = {name: getattr(tokens, name)[:, :1].expand(-1, 37, -1) for name in ("features", "encoder_features")}
    assert kept_by(MMTok(keep=7), tokens.replace(**equal)) == [list(range(7))] * 3


def test_another_question_keeps_other_tokens():
    tokens = tokens_of(6, 6)
    other = tokens.replace(text_features=tokens.text_features.roll(1, dims=0))
    assert MMTok.needs == {Signal.ENCODER_FEATURES, Signal.TEXT_FEATURES}
    assert MMTok().text_aware
    assert kept_by(MMTok(keep=5), tokens) != kept_by(MMTok(keep=5), other)


def test_padding_of_questions_changes_nothing():
    tokens = tokens_of(6, 6)
    padding = torch.randn(3, 2, tokens.text_features.shape[2])
    longer = tokens.replace(
        text_features=torch.cat([padding, tokens.text_features], 1),
        query_mask=torch.cat([torch.zeros(3, 2, dtype=torch.bool), tokens.query_mask], 1),
    )
    assert kept_by(MMTok(keep=9), tokens) == kept_by(MMTok(keep=9), longer)


def test_views_that_do_not_fit_into_memory_at_once_take_turns(monkeypatch):
    tokens = tokens_of(5, 5)
    together = kept_by(MMTok(keep=6), tokens)
    monkeypatch.setattr(selection, "KEPT_TO_COVER", 1)
    assert kept_by(MMTok(keep=6), tokens) == together
