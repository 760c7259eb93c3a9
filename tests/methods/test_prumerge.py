"""PruMerge and PruMerge+ against naive loops, and their counts, order, ties and memory."""

import pytest
import torch

from tests.methods.test_visionzip import tokens_of
from tests.references.prumerge import prumerge as naive
from tests.references.prumerge import with_count
from vlmzip import BudgetError, Grid, Profile, PruMerge


def with_outliers(batch=3, rows=6, cols=6, prefix=1, seed=0):
    """Return tokens whose attention has different numbers of outliers in each image."""
    tokens = tokens_of(batch, rows, cols, prefix=prefix, seed=seed)
    noise = torch.Generator().manual_seed(seed)
    shape = tokens.features.shape[:2]
    power = torch.linspace(3, 6, batch)[:, None]
    attention = torch.rand(shape, generator=noise) ** power
    return tokens.replace(
        last_cls_attention=attention / attention.sum(1, keepdim=True),
        last_keys=torch.randn(*shape, 16, generator=noise),
    )


def compare(tokens, method, reference, **settings):
    """Compare the outputs and the kept patches of each image with those of the reference."""
    token_map = method(tokens)
    token_map.check()
    prefix, out, anchors = tokens.prefix, token_map.apply(tokens.features), token_map.anchor_index()
    for row in range(len(out)):
        parts = (
            tokens.features[row, prefix:],
            tokens.last_cls_attention[row, prefix:].tolist(),
            tokens.last_keys[row, prefix:],
        )
        expected, kept = reference(*parts, **settings)
        assert token_map.lengths[row] == len(expected)
        assert anchors[row, : len(kept)].tolist() == [prefix + n for n in kept]
        torch.testing.assert_close(out[row, : len(expected)], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize(("rows", "cols"), [(1, 2), (3, 4), (6, 6), (9, 11), (24, 24)])
def test_equals_the_naive_loop(rows, cols, plus, prefix):
    tokens = with_outliers(3 if rows < 24 else 1, rows, cols, prefix, seed=rows)
    compare(tokens, PruMerge(plus=plus), naive, plus=plus)


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize(
    ("rows", "cols", "keep"), [(1, 2, 1), (3, 4, 1), (3, 4, 2), (3, 4, 7), (3, 4, 11), (6, 6, 20), (24, 24, 64)]
)
def test_a_budget_equals_the_naive_loop(rows, cols, keep, plus, prefix):
    tokens = with_outliers(2 if rows < 24 else 1, rows, cols, prefix, seed=keep)
    compare(tokens, PruMerge(keep=keep, plus=plus, neighbours=5), with_count, count=keep, plus=plus, neighbours=5)


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("keep", [192, 128, 64])
def test_a_budget_is_reached_exactly(keep, plus):
    tokens = with_outliers(2, 24, 24)
    assert PruMerge(keep=keep, plus=plus)(tokens).lengths == [keep] * 2
    assert PruMerge(keep=keep, plus=plus).token_count(Grid(1, 24, 24)) == keep


def test_images_decide_how_many_tokens_remain():
    tokens = with_outliers()
    lengths, more = PruMerge()(tokens).lengths, PruMerge(plus=True)(tokens).lengths
    assert len(set(lengths)) > 1
    assert all(a < b for a, b in zip(lengths, more, strict=True))
    assert PruMerge().token_count(tokens.grid) is None
    with pytest.raises(BudgetError, match="depends on the image"):
        PruMerge().reached(Profile(tokens.grid, layers=4))


@pytest.mark.parametrize("plus", [False, True])
def test_without_outliers_only_the_sum_remains(plus):
    tokens = with_outliers(2)
    even = tokens.replace(last_cls_attention=torch.full((2, 37), 1 / 37))
    token_map = PruMerge(plus=plus)(even)
    token_map.check()
    assert token_map.lengths == [1, 1]
    torch.testing.assert_close(token_map.apply(even.features)[:, 0], even.features[:, 1:].sum(1) / 37)


def test_of_equal_patches_the_first_are_added():
    tokens = with_outliers(1, prefix=0)
    attention = torch.full((1, 36), 0.01)
    attention[0, 20] = 0.65
    equal = tokens.replace(last_cls_attention=attention, last_keys=torch.ones(1, 36, 4))
    added = PruMerge(neighbours=3)(equal).added
    assert added[0, 0].nonzero()[:, 0].tolist() == [0, 1, 2]


def test_memory_has_no_square_of_the_tokens():
    tokens = with_outliers(1, 96, 96)
    assert PruMerge(keep=20)(tokens).added.shape[1] <= 20
