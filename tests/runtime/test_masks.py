"""Masks cut to the tokens left: every form that a kernel is given, against loops over what may attend to what."""

import itertools

import pytest
import torch

from vlmzip.runtime.in_llm.masks import shrink_mask

#: Two rows of a forward of 5 tokens behind 2 cached ones; the second row has fewer left, padded on the left.
HERE = torch.tensor([[0, 1, 3, 4], [-1, 0, 2, 4]])
KEYS = torch.tensor([[0, 1, 2, 3, 5, 6], [-1, 1, -1, 2, 4, 6]])
PAST = 2


def check(allowed):
    """A token attends to what is there and not behind it; what padding attends to is not used, but must be something:
    a row that attends to nothing is NaN in some kernels."""
    for row, query, key in itertools.product(range(2), range(4), range(6)):
        here, there = int(HERE[row, query]), int(KEYS[row, key])
        if here >= 0:
            assert bool(allowed[row, query, key]) == (0 <= there <= here + PAST)
    assert allowed.any(-1).all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks_of_all_pairs(dtype):
    causal = torch.ones(5, 7).tril(PAST).bool()[None, None]
    mask = causal if dtype is torch.bool else torch.zeros(1, 1, 5, 7).masked_fill(~causal, torch.finfo(dtype).min)
    out = shrink_mask(mask, HERE, KEYS, PAST, padded=True, flash=False)[:, 0]
    check(out if dtype is torch.bool else out == 0)


def test_padding_attends_to_something_even_where_the_mask_lets_it_not():
    closed = torch.zeros(2, 1, 5, 7, dtype=torch.bool)
    assert shrink_mask(closed, HERE, KEYS, PAST, padded=True, flash=False)[1, 0, 0].any()


def test_no_mask_is_a_causal_one_where_rows_have_become_ragged():
    check(shrink_mask(None, HERE, KEYS, PAST, padded=True, flash=False)[:, 0])
    assert shrink_mask(None, HERE, KEYS, PAST, padded=False, flash=False) is None


def test_flash_attention_is_told_which_tokens_are_real():
    """It is causal by itself, and wants [batch, all]."""
    assert torch.equal(shrink_mask(None, HERE, KEYS, PAST, padded=True, flash=True).bool(), KEYS >= 0)
    given = torch.tensor([[1] * 7, [0] + [1] * 6])
    assert torch.equal(shrink_mask(given, HERE, KEYS, PAST, padded=True, flash=True).bool(), KEYS >= 0)
