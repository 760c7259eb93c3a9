import pytest
import torch

from tests.methods.test_visionzip import tokens_of
from tests.references.kmeans import kmeans as naive
from vlmzip import Grid, KMeans, UserError, VisualTokens, catalogue
from vlmzip.methods import kmeans as module


@pytest.mark.parametrize("iterations", [1, 4])
@pytest.mark.parametrize(
    ("rows", "cols", "keep"), [(6, 6, 1), (6, 6, 4), (6, 6, 20), (6, 6, 35), (5, 7, 9), (12, 12, 16)]
)
def test_equals_the_naive_loop(rows, cols, keep, iterations):
    tokens = tokens_of(rows=rows, cols=cols, dim=6, seed=rows * cols)
    check_against_loop(tokens, KMeans(keep=keep, iterations=iterations))


def test_equals_the_naive_loop_on_mini(mini_tokens):
    check_against_loop(mini_tokens, KMeans(keep=16, iterations=5))


def check_against_loop(tokens, method):
    token_map = method(tokens)
    token_map.check()
    out = token_map.apply(tokens.features)
    assert (token_map.group[:, : tokens.prefix] == -1).all()
    for row, features in enumerate(tokens.features[:, tokens.prefix :]):
        clusters = naive(features, method.keep, method.iterations)
        group = token_map.group[row, tokens.prefix :].tolist()
        assert [[t for t, g in enumerate(group) if g == i] for i in range(method.keep)] == clusters
        means = torch.stack([features[own].mean(0) for own in clusters])
        torch.testing.assert_close(out[row], means, atol=1e-5, rtol=1e-5)
        anchors = (token_map.anchor_index()[row] - tokens.prefix).tolist()
        for own, mean, anchor in zip(clusters, means, anchors, strict=True):
            away = [float((features[t] - mean).square().sum()) for t in own]
            assert anchor == next(t for t, d in zip(own, away, strict=True) if d <= 1.0001 * min(away))


@pytest.mark.parametrize("distinct", [1, 2, 5])
def test_exactly_as_many_tokens_where_fewer_differ(distinct):
    """Equal tokens leave clusters empty. They are filled in the image that has them, and other images do not change."""
    tokens = tokens_of(prefix=0)
    features = tokens.features.clone()
    features[1] = features[1, :distinct].repeat(36 // distinct + 1, 1)[:36]
    tokens = VisualTokens(features, tokens.grid)
    token_map = KMeans(keep=12, iterations=3)(tokens)
    token_map.check()
    assert token_map.lengths == [12, 12, 12]
    alone = KMeans(keep=12, iterations=3)(tokens.rows(torch.tensor([0])))
    assert torch.equal(alone.group[0], token_map.group[0])


def test_clear_clusters_are_found():
    """Tokens are noisy copies of four distant points, mixed in raster order; clusters start at one of each."""
    place = torch.arange(36)
    kind = (place // 9 + place % 9) % 4
    features = 100 * torch.eye(4)[kind][None] + torch.randn(1, 36, 4)
    group = KMeans(keep=4)(VisualTokens(features, Grid(1, 6, 6))).group[0]
    first = [int((kind == k).nonzero()[0]) for k in range(4)]
    order = sorted(range(4), key=lambda k: first[k])
    assert group.tolist() == [order.index(int(k)) for k in kind]


def test_cosine_ignores_length():
    tokens = tokens_of()
    louder = VisualTokens(tokens.features * torch.rand(3, 37, 1).add(0.1), tokens.grid, 1)
    by_direction = KMeans(keep=6, metric="cosine")
    assert torch.equal(by_direction(tokens).group, by_direction(louder).group)
    assert not torch.equal(KMeans(keep=6)(tokens).group, KMeans(keep=6)(louder).group)


def test_a_common_offset_costs_no_precision():
    tokens = tokens_of(prefix=0)
    far = VisualTokens(tokens.features + 1000, tokens.grid)
    exact = VisualTokens(far.features - 1000, tokens.grid)  # the digits that remain after adding 1000
    assert torch.equal(KMeans(keep=9)(far).group, KMeans(keep=9)(exact).group)


def test_memory_is_chunked(monkeypatch):
    """Distances are computed for a few tokens at a time, with the same result as all at once."""
    tokens = tokens_of(rows=24, cols=24, dim=4)
    whole = KMeans(keep=288, iterations=2)(tokens)
    monkeypatch.setattr(module, "CHUNK", 50)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(o.numel() for o in (out if isinstance(out, tuple | list) else [out]) if torch.is_tensor(o))
            return out

    with Watch():
        parts = KMeans(keep=288, iterations=2)(tokens)
    assert torch.equal(whole.group, parts.group)
    assert max(sizes) <= 3 * 50 * 288  # all at once would be 3 * 576 * 288


def test_iterations_end_where_nothing_moves(monkeypatch):
    tokens = tokens_of(rows=6, cols=6, dim=6)
    nearest, calls = module._nearest, []
    monkeypatch.setattr(module, "_nearest", lambda *args: calls.append(1) or nearest(*args))
    check_against_loop(tokens, KMeans(keep=9, iterations=100))
    assert len(calls) < 50


@pytest.mark.parametrize(
    "fields",
    [
        {"keep": 0},
        {"iterations": 0},
        {"iterations": "many"},
        {"metric": "manhattan"},
        {"layer": -1},
        {"site": "pixels"},
    ],
)
def test_wrong_fields_are_refused(fields):
    with pytest.raises(UserError):
        catalogue.make(KMeans, fields)
