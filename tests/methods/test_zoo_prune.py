"""ZOO-Prune against a naive loop."""

import pytest
import torch

from tests.methods.test_divprune import kept_by
from tests.methods.test_divprune import tokens_of as spread_tokens
from tests.references.zoo_prune import zoo_prune as naive
from vlmzip import Grid, ZOOPrune
from vlmzip.selection import Cosines, spread


@pytest.fixture(scope="module")
def projector():
    """Return a projector like that of LLaVA, in float64, and the same in float32."""
    torch.manual_seed(0)
    exact = torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.GELU(), torch.nn.Linear(20, 9)).double()
    single = torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.GELU(), torch.nn.Linear(20, 9))
    single.load_state_dict(exact.state_dict())
    return exact, single


def tokens_of(projector, rows, cols, prefix=1, batch=3, copies=0.0, seed=0):
    """Return projected tokens with their features before the projector."""
    before = spread_tokens(rows, cols, prefix, batch, copies=copies, seed=seed)
    with torch.no_grad():
        projected = projector[1](before.features)
    return before.replace(features=projected, encoder_features=before.features, projector=projector[1])


def expected(tokens, projector, method):
    directions = torch.randn(method.directions, 12, generator=torch.Generator().manual_seed(method.seed)).tolist()
    views = zip(tokens.encoder_features[:, tokens.prefix :], tokens.features[:, tokens.prefix :], strict=True)
    with torch.no_grad():
        return [
            naive(
                before.tolist(), projected.tolist(), lambda x: projector[0](torch.tensor(x).double()).tolist(),
                directions, method.step, method.keep,
            )
            for before, projected in views
        ]  # fmt: skip


@pytest.mark.parametrize("settings", [{"directions": 1}, {"directions": 5, "step": 0.1, "seed": 3}])
@pytest.mark.parametrize("copies", [0.0, 0.6])
@pytest.mark.parametrize(("rows", "cols", "prefix"), [(1, 2, 0), (2, 2, 1), (3, 5, 0), (6, 6, 1)])
def test_equals_the_naive_loop_at_every_budget(projector, rows, cols, prefix, copies, settings):
    tokens = tokens_of(projector, rows, cols, prefix, copies=copies, seed=rows)
    for keep in {keep for keep in (1, 2, 3, rows * cols // 2, rows * cols - 1) if 0 < keep < rows * cols}:
        method = ZOOPrune(keep=keep, **settings)
        assert kept_by(method, tokens) == expected(tokens, projector, method)


@pytest.mark.parametrize("keep", [pytest.param(64, marks=pytest.mark.slow), 128, 192])
def test_the_published_counts(projector, keep):
    tokens = tokens_of(projector, 24, 24, batch=1)
    method = ZOOPrune(keep=keep, directions=2)
    kept = kept_by(method, tokens)
    assert len(kept[0]) == method.token_count(Grid(1, 24, 24)) == keep
    if keep == 64:  # the loops take seconds
        assert kept == expected(tokens, projector, method)


def test_the_projector_is_run_twice_for_each_direction(projector):
    tokens, calls = tokens_of(projector, 3, 3), []

    def counted(features):
        calls.append(features.dtype)
        return projector[1](features)

    ZOOPrune(keep=4, directions=3)(tokens.replace(projector=counted, encoder_features=tokens.encoder_features.half()))
    assert calls == [torch.float32] * 6


def test_of_equal_tokens_the_first_stay(projector):
    tokens = tokens_of(projector, 6, 6)
    equal = {name: getattr(tokens, name)[:, :1].expand(-1, 37, -1) for name in ("features", "encoder_features")}
    assert kept_by(ZOOPrune(keep=7, directions=2), tokens.replace(**equal)) == [list(range(7))] * 3


def test_the_directions_depend_on_the_seed_and_on_the_step_of_training(projector):
    tokens = tokens_of(projector, 6, 6)
    method = ZOOPrune(keep=6, directions=1)
    assert kept_by(method, tokens) == kept_by(ZOOPrune(keep=6, directions=1), tokens)
    assert kept_by(method, tokens) != kept_by(ZOOPrune(keep=6, directions=1, seed=1), tokens)
    assert kept_by(method, tokens) != kept_by(method.at_step(1), tokens)


def test_a_linear_projector_is_equally_sensitive_to_all_tokens(projector):
    tokens = tokens_of(projector, 6, 6, prefix=0)
    linear = torch.nn.Linear(12, 9)
    with torch.no_grad():
        tokens = tokens.replace(features=linear(tokens.encoder_features), projector=linear)
    marked = spread(Cosines(tokens.features), torch.ones(3, 36), 8)
    assert kept_by(ZOOPrune(keep=8), tokens) == [row.nonzero()[:, 0].tolist() for row in marked]
