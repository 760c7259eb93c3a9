"""PruneSID against naive loops, and its components, order, counts, ties and seed."""

import pytest
import torch
from torch.nn.functional import normalize

from tests.methods.test_visionzip import tokens_of
from tests.references.prunesid import components, quotas_of
from tests.references.prunesid import prunesid as naive
from vlmzip import Grid, PruneSID
from vlmzip.methods import prunesid


def correlated(batch=3, rows=6, cols=6, dim=20, prefix=1, seed=0, rank=6):
    """Return tokens whose features have few clear components, as those of encoders do."""
    tokens = tokens_of(batch, rows, cols, dim, prefix=prefix, seed=seed)
    noise = torch.Generator().manual_seed(seed + 1)
    weights, directions = (
        torch.randn(batch, rows * cols + prefix, rank, generator=noise),
        torch.randn(rank, dim, generator=noise),
    )
    scales = torch.linspace(2, 0.7, rank)
    return tokens.replace(features=1 + (weights * scales) @ directions + 0.1 * tokens.features)


def order_of(method, tokens, row=0):
    """Return the kept tokens of an image in the order of the output."""
    token_map = method(tokens)
    token_map.check()
    return token_map.anchor_index()[row].tolist()


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize(
    ("rows", "cols", "keep"),
    [(1, 2, 1), (3, 4, 1), (3, 4, 2), (3, 4, 5), (3, 4, 11), (6, 6, 16), (6, 6, 30), (24, 24, 64)],
)
def test_equals_the_naive_loop(rows, cols, keep, prefix):
    tokens = correlated(2, rows, cols, dim=48, prefix=prefix, seed=rows, rank=6 if rows < 24 else 24)
    x = normalize(tokens.features[:, prefix:], dim=-1)
    for row in range(2):
        group = components(tokens.features[row, prefix:], min(max(keep // 4, 1), rows * cols), seed=0)
        attention = tokens.cls_attention[row, prefix:].tolist()
        expected = naive(group, attention, (x[row] @ x[row].T).tolist(), keep, prefix)
        assert order_of(PruneSID(keep=keep), tokens, row) == [*range(prefix), *(prefix + n for n in expected)]


@pytest.mark.parametrize("chunk", [1, 7, 36])
def test_chunks_choose_the_same(monkeypatch, chunk):
    tokens, method = correlated(), PruneSID(keep=9)
    whole = method(tokens)
    monkeypatch.setattr(prunesid, "CHUNK", chunk)
    assert torch.equal(method(tokens).group, whole.group)


def test_components_are_the_singular_vectors_of_a_matrix_of_low_rank():
    x = correlated(2, 5, 8, dim=64, prefix=0, rank=4).features
    x = x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    centred = (x - x.mean(-1, keepdim=True)).transpose(1, 2)
    truth = torch.linalg.svd(centred, full_matrices=False).Vh[:, :4].transpose(1, 2).abs()
    torch.testing.assert_close(prunesid._components(x, 4, seed=5), truth, atol=1e-3, rtol=0)


@pytest.mark.parametrize("seed", range(20))
def test_quotas_equal_the_naive_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    groups = int(torch.randint(1, 17, (), generator=generator))
    sizes = torch.randint(0, 40, (3, groups), generator=generator)
    sizes[:, 0] += 1
    survivors = (sizes * torch.rand(3, groups, generator=generator)).ceil().long()
    count = min(4 * groups, int(sizes.sum(1).min()))
    for patches in {count, count - 1}:
        quotas = prunesid._quotas(sizes, survivors, count, patches)
        expected = [quotas_of(*row, count, patches) for row in zip(sizes.tolist(), survivors.tolist(), strict=True)]
        assert quotas.tolist() == expected
        assert quotas.sum(1).tolist() == [patches] * 3


@pytest.mark.parametrize("keep", [192, 128, 64])
def test_the_published_counts_include_cls(keep):
    out = order_of(PruneSID(keep=keep), correlated(1, 24, 24, dim=64))
    assert len(set(out)) == PruneSID(keep=keep).token_count(Grid(1, 24, 24)) == keep
    assert out[0] == 0
    assert out != sorted(out)


def test_one_token_is_cls():
    assert order_of(PruneSID(keep=1), tokens_of()) == [0]
    assert len(order_of(PruneSID(keep=1), tokens_of(prefix=0))) == 1


def test_only_the_seed_changes_the_result():
    tokens = correlated(rank=16)
    torch.manual_seed(1)
    first = PruneSID(keep=24)(tokens)
    torch.manual_seed(2)
    assert torch.equal(PruneSID(keep=24)(tokens).group, first.group)
    assert any(not torch.equal(PruneSID(keep=24, seed=seed)(tokens).group, first.group) for seed in range(1, 9))


def test_a_suppressed_patch_comes_after_the_survivors():
    """One group: patches 0 and 1 point almost the same way, the others elsewhere. Attention falls from 0 to 3."""
    features = torch.tensor([[[3.0, 0.0, 0.0], [3.0, 0.1, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 3.0]]])
    tokens = tokens_of(1, 2, 2, prefix=0).replace(features=features, cls_attention=torch.tensor([[0.4, 0.3, 0.2, 0.1]]))
    assert order_of(PruneSID(keep=3), tokens) == [0, 2, 3]


def test_of_equally_attended_equal_patches_the_first_stay():
    equal = tokens_of(2).replace(features=torch.ones(2, 37, 8), cls_attention=torch.ones(2, 37))
    assert order_of(PruneSID(keep=3), equal) == [0, 1, 2]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("rows", [0, slice(None)])
def test_features_that_are_no_numbers_still_leave_the_budget(value, rows):
    """float16 can overflow. Images of the batch without such features keep the same tokens."""
    tokens = correlated(2)
    broken = tokens.features.clone()
    broken[rows] = value
    token_map = PruneSID(keep=9)(tokens.replace(features=broken))
    token_map.check()
    assert token_map.lengths == [9, 9]
    if rows == 0:
        assert torch.equal(token_map.group[1], PruneSID(keep=9)(tokens).group[1])
