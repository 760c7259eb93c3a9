"""DART against a naive loop. `test_in_llm.py` has the models."""

import pytest
import torch

from tests.references.dart import authors_count
from tests.references.dart import dart as naive
from vlmzip import DART, Grid, Profile, UserError, VisualTokens, catalogue


def tokens_of(size, prefix=0, queries=6, copies=0.0, seed=0, rows=3, dim=10):
    """Return images, a share of whose tokens are copies of others. Each question is one token longer than the last."""
    generator = torch.Generator().manual_seed(seed)

    def some(count, width):
        values = torch.randn(rows, count, width, generator=generator)
        source = torch.randint(count, (rows, count), generator=generator)
        is_copy = torch.rand(rows, count, generator=generator) < copies
        source = torch.where(is_copy, source, torch.arange(count))
        return values.gather(1, source[..., None].expand_as(values))

    visual, text = some(prefix + size, dim + 4), some(queries, dim + 4)
    mask = torch.arange(queries) >= queries - 1 - torch.arange(rows)[:, None] * 2
    return VisualTokens(
        visual,
        Grid(1, 1, size),
        prefix,
        passes_prefix=True,
        query_mask=mask,
        llm_keys=visual[..., :4],
        llm_states=visual[..., 4:],
        text_keys=text[..., :4],
        text_states=text[..., 4:],
    )


def kept_by(method, tokens):
    token_map = method(tokens)
    token_map.check()
    return [(row >= 0).nonzero()[:, 0].tolist() for row in token_map.group[:, tokens.prefix :]]


def expected_of(tokens, count, **pivots):
    rows = []
    for row, mask in enumerate(tokens.query_mask):
        visual = (values[row, tokens.prefix :].tolist() for values in (tokens.llm_keys, tokens.llm_states))
        text = (values[row, mask].tolist() for values in (tokens.text_keys, tokens.text_states))
        rows.append(naive(*visual, *text, count, **pivots))
    return rows


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("copies", [0.0, 0.7])
@pytest.mark.parametrize("size", [2, 3, 5, 12, 36])
def test_equals_the_naive_loop_at_every_budget(size, copies, prefix):
    tokens = tokens_of(size, prefix, copies=copies, seed=size)
    for keep in range(1, size):
        assert kept_by(DART(keep=keep), tokens) == expected_of(tokens, keep)


@pytest.mark.parametrize("pivots", [{"visual_pivots": 0}, {"text_pivots": 0}, {"visual_pivots": 1, "text_pivots": 7}])
def test_other_numbers_of_pivots(pivots):
    tokens = tokens_of(30, 1)
    for keep in (1, 2, 9, 29):
        assert kept_by(DART(keep=keep, **pivots), tokens) == expected_of(tokens, keep, **pivots)


@pytest.mark.parametrize("keep", [64, 128, 192])
def test_counts_are_exact_and_the_authors_keep_four_more(keep):
    tokens = tokens_of(576, 1, queries=9)
    assert kept_by(DART(keep=keep), tokens) == expected_of(tokens, keep)
    assert DART(keep=keep).token_count(Grid(1, 24, 24)) == keep == authors_count(keep) - 4
    more = kept_by(DART(keep=keep + 4), tokens)
    assert [len(row) for row in more] == [keep + 4] * 3


def test_of_equal_tokens_the_first_stay():
    tokens = tokens_of(36)
    same = {name: getattr(tokens, name)[:, :1].expand(-1, 36, -1) for name in ("llm_keys", "llm_states")}
    assert kept_by(DART(keep=11), tokens.replace(**same)) == [list(range(11))] * 3


def test_the_average_budget_counts_the_layers_before():
    profile = Profile(Grid(1, 24, 24), layers=32)
    assert DART(keep=64).tokens_by_layer(profile) == [576] * 2 + [64] * 30
    chosen, reached = DART().at_budget(96, profile)
    assert (chosen, reached * 576) == (DART(keep=64), 96)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"visual_pivots": 0, "text_pivots": 0}, "dart needs a pivot: give visual_pivots or text_pivots of at least 1"),
        ({"visual_pivots": -1}, "visual_pivots must be"),
        ({"site": "post_projector"}, "site must be in_llm, got 'post_projector'"),
    ],
)
def test_wrong_settings_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        catalogue.make(DART, fields)
