"""FasterVLM against a naive loop, and its counts, ties and precision."""

import pytest
import torch

from tests.methods.test_visionzip import tokens_of
from tests.references.fastervlm import fastervlm as naive
from vlmzip import FasterVLM, Grid


def kept_by(method, tokens, row=0):
    token_map = method(tokens)
    token_map.check()
    return (token_map.group[row] >= 0).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize(
    ("rows", "cols", "keep"), [(1, 2, 1), (3, 4, 1), (3, 4, 7), (3, 4, 11), (6, 6, "25%"), (24, 24, 64)]
)
def test_equals_the_naive_loop(rows, cols, keep, prefix):
    tokens = tokens_of(rows=rows, cols=cols, prefix=prefix, seed=rows)
    method = FasterVLM(keep=keep)
    for row in range(3):
        expected = naive(tokens.cls_attention[row, prefix:].tolist(), method.count(rows * cols))
        assert kept_by(method, tokens, row) == [prefix + patch for patch in expected]


@pytest.mark.parametrize("keep", [192, 128, 64])
def test_a_count_is_reached_exactly_and_without_cls(keep):
    tokens = tokens_of(rows=24, cols=24)
    kept = kept_by(FasterVLM(keep=keep), tokens)
    assert len(kept) == FasterVLM(keep=keep).token_count(Grid(1, 24, 24)) == keep
    assert 0 not in kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_equally_attended_patches_the_first_stay(dtype):
    attention = torch.arange(37).div(12, rounding_mode="floor").expand(2, -1).to(dtype)
    assert kept_by(FasterVLM(keep=8), tokens_of(2).replace(cls_attention=attention)) == [*range(24, 31), 36]
