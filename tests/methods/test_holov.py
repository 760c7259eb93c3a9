"""HoloV against a naive loop, and its quotas, order, counts and ties."""

import pytest
import torch

from tests.methods.test_visionzip import tokens_of
from tests.references.holov import holov as naive
from vlmzip import Grid, HoloV


def order_of(method, tokens, row=0):
    """Return the kept tokens of an image in the order of the output."""
    token_map = method(tokens)
    token_map.check()
    return token_map.anchor_index()[row].tolist()


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize(
    ("rows", "cols", "keep", "crops"),
    [(1, 2, 1, 16), (3, 4, 1, 16), (3, 4, 11, 16), (5, 5, 9, 16), (5, 7, 12, 4), (6, 6, 30, 16), (24, 24, 64, 16)],
)
def test_equals_the_naive_loop(rows, cols, keep, crops, prefix):
    tokens = tokens_of(rows=rows, cols=cols, dim=8, prefix=prefix, seed=rows + keep)
    for row in range(3):
        expected = naive(
            tokens.features[row, prefix:].tolist(), tokens.cls_attention[row, prefix:].tolist(), keep, crops
        )
        assert order_of(HoloV(keep=keep, crops=crops), tokens, row) == [prefix + n for n in expected]


@pytest.mark.parametrize("keep", [192, 128, 64])
def test_the_published_counts(keep):
    assert HoloV(keep=keep)(tokens_of(rows=24, cols=24)).lengths == [keep] * 3
    assert HoloV(keep=keep).token_count(Grid(1, 24, 24)) == keep


def test_a_full_crop_gives_its_places_to_the_most_attended_tokens_elsewhere():
    """The first of two crops has nearly all attention, and a quota of 7 for its 6 tokens."""
    attention = torch.full((1, 12), 1e-3)
    attention[0, :6] = 1.0
    attention[0, [8, 10]] = torch.tensor([2e-3, 3e-3])
    tokens = tokens_of(1, 3, 4, prefix=0).replace(cls_attention=attention)
    assert order_of(HoloV(keep=8, crops=2), tokens) == [0, 1, 2, 3, 4, 5, 10, 8]


def test_a_whole_crop_stays_in_raster_order_and_others_stand_by_attention():
    attention = torch.tensor([[0.3, 0.1, 0.2, 0.4, 0.3, 0.2, 0.1, 0.9]])
    tokens = tokens_of(1, 2, 4, prefix=0).replace(cls_attention=attention)
    assert order_of(HoloV(keep=3, crops=2), tokens) == [3, 7, 4]
    assert order_of(HoloV(keep=6, crops=2), tokens) == [3, 0, 4, 5, 6, 7]  # a quota of 4 and one of 2


def test_equal_attention_gives_equal_quotas_and_the_first_tokens():
    tokens = tokens_of(2, 8, 8).replace(cls_attention=torch.ones(2, 65), features=torch.ones(2, 65, 8))
    assert order_of(HoloV(keep=20, crops=4), tokens) == [1 + 16 * crop + n for crop in range(4) for n in range(5)]
