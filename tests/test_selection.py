"""Selections that several methods share: the same result with and without a matrix of all similarities."""

import pytest
import torch

from vlmzip import selection
from vlmzip.selection import Cosines, spread


@pytest.fixture
def features():
    return torch.randn(3, 50, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=[1, 7, 64])
def small_chunks(request, monkeypatch):
    monkeypatch.setattr(selection, "CHUNK", request.param)


def test_cosines_are_those_of_torch(features, small_chunks):
    truth = torch.nn.functional.cosine_similarity(features[:, :, None], features[:, None], dim=-1)
    token = torch.tensor([0, 3, 49])
    others = truth.masked_fill(torch.eye(50, dtype=torch.bool), -1)
    for most in (0, 10**6):
        cosines = Cosines(features, most=most)
        torch.testing.assert_close(cosines.of(token), truth[range(3), token], atol=1e-6, rtol=0)
        torch.testing.assert_close(cosines.nearest(), others.amax(2), atol=1e-6, rtol=0)


def test_a_matrix_is_kept_only_up_to_the_limit(features):
    assert Cosines(features, most=3 * 50 * 50).whole is not None
    assert Cosines(features, most=3 * 50 * 50 - 1).whole is None


def test_spread_is_the_same_without_a_matrix(features, small_chunks):
    weight = torch.rand(3, 50, generator=torch.Generator().manual_seed(1))
    for of_distance in (None, weight):
        marks = [spread(Cosines(features, most), weight, 9, of_distance) for most in (0, 10**6)]
        assert torch.equal(*marks)
        assert marks[0].sum(1).tolist() == [9, 9, 9]


def test_a_single_token_has_no_neighbour():
    assert Cosines(torch.randn(2, 1, 4)).nearest().tolist() == [[-1], [-1]]


def test_gains_shrink_by_what_changed_rows_lose(monkeypatch):
    """On a CPU only changed rows are read, on other devices the whole matrix: the whole numbers are equal."""
    draw = torch.Generator().manual_seed(0)
    matrix = torch.randint(-(2**20), 2**20, (3, 40, 30), generator=draw, dtype=torch.int32)
    before = torch.randint(0, 2**19, (3, 40), generator=draw, dtype=torch.int32)
    after = torch.maximum(before, matrix[..., 7])
    truth = (matrix.long() - after[..., None]).clamp(min=0).sum(1)
    for entries in (1, 1000, 2**21):
        monkeypatch.setattr(selection, "READ", entries)
        assert torch.equal(selection.gains_at(matrix, after), truth)
        assert torch.equal(selection.gains_at(matrix, before) - selection.gains_lost(matrix, before, after), truth)


def test_views_take_turns_only_as_far_as_they_must(monkeypatch):
    monkeypatch.setattr(selection, "KEPT_TO_COVER", 100)
    assert [list(range(5))[views] for views in selection.views_at_once(5, 50)] == [[0, 1], [2, 3], [4]]
    assert [list(range(2))[views] for views in selection.views_at_once(2, 500)] == [[0], [1]]
