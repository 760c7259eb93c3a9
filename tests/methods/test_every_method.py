"""Behaviours that every method owes, written once. A new method is in as soon as it is importable."""

import dataclasses
import json
import pickle
from pathlib import Path

import pytest
import torch

import vlmzip.methods
from tests.methods.test_visionzip import tokens_of
from vlmzip import BudgetError, Downsample, Profile, Resampler, UserError, available, catalogue
from vlmzip.keep import count_to_keep

METHODS = available()
#: Methods with a token map; the others do their work behind `attach` and have their own tests of the same behaviours.
MAPPING = {name: cls for name, cls in METHODS.items() if not issubclass(cls, Resampler)}
PROFILE = Profile(tokens_of().grid, layers=4)
CONFIGURED = [
    pytest.param(cls(**fields), id=f"{name}-{i}")
    for name, cls in MAPPING.items()
    for i, fields in enumerate([{}, *([{"keep": k} for k in (1, 5, "50%")] if "keep" in cls.field_names() else [])])
]


def test_the_folder_and_the_list_agree():
    files = {p.stem for p in Path(vlmzip.methods.__file__).parent.glob("*.py")} - {"__init__"}
    assert files <= set(METHODS)


@pytest.mark.parametrize("method", CONFIGURED)
class TestEveryMethod:
    def test_count_is_what_was_promised(self, method):
        tokens = tokens_of()
        token_map = method(tokens)
        token_map.check()
        promised = method.token_count(tokens.grid)
        assert promised is None or token_map.lengths == [promised] * 3

    def test_a_row_alone_equals_that_row_in_a_batch(self, method):
        tokens = tokens_of()
        whole = method(tokens).apply(tokens.features)
        for row in range(3):
            alone = only(tokens, [row])
            torch.testing.assert_close(method(alone).apply(alone.features)[0], whole[row])

    def test_permuting_the_batch_permutes_the_result(self, method):
        tokens = tokens_of()
        swapped = only(tokens, [2, 0, 1])
        assert torch.equal(method(swapped).group, method(tokens).group[[2, 0, 1]])

    def test_bfloat16_decides_like_float32(self, method):
        tokens = tokens_of()
        # Scores a clear distance apart, and keys in clear directions: rounding must not change a decision.
        separated = torch.rand(3, 37).argsort(1).float() + 1
        keys = torch.eye(37)[None].repeat(3, 1, 1) + 0.3 * torch.eye(37).roll(1, 0)
        tokens = dataclasses.replace(tokens, cls_attention=separated, keys=keys)
        half = dataclasses.replace(
            tokens, features=tokens.features.bfloat16(), cls_attention=separated.bfloat16(), keys=keys.bfloat16()
        )
        assert torch.equal(method(tokens).group, method(half).group)

    def test_gradients_are_finite(self, method):
        tokens = tokens_of()
        features = tokens.features.clone().requires_grad_()
        method(dataclasses.replace(tokens, features=features)).apply(features).square().sum().backward()
        assert features.grad.isfinite().all()
        assert features.grad.abs().sum() > 0

    def test_deterministic(self, method):
        assert torch.equal(method(tokens_of()).group, method(tokens_of()).group)

    def test_pickle_and_json_round_trip(self, method):
        assert pickle.loads(pickle.dumps(method)) == method
        saved = json.loads(json.dumps(method.to_dict()))
        assert catalogue.make(catalogue.find(saved.pop("method")), saved) == method

    @pytest.mark.parametrize("keep", ["50%", "25%", 4])
    def test_the_budget_reached_is_the_one_reported(self, method, keep):
        try:
            chosen, reached = method.at_budget(keep, PROFILE)
        except BudgetError:
            return  # it says that it cannot; what it says is tested with each method
        assert chosen(tokens_of()).lengths[0] / 36 == pytest.approx(reached)
        if "keep" in method.field_names() and type(method) is not Downsample:  # which reaches whole grids only
            assert reached == count_to_keep(keep, 36) / 36


@pytest.mark.parametrize("cls", [cls for cls in METHODS.values() if "keep" in cls.field_names()])
@pytest.mark.parametrize("keep", [36, 37, 5000, "100%"])
def test_keeping_all_is_the_identity(cls, keep):
    tokens = tokens_of()
    token_map = cls(keep=keep)(tokens)
    assert torch.equal(token_map.apply(tokens.features), tokens.features[:, 1:])


@pytest.mark.parametrize("cls", METHODS.values(), ids=METHODS)
def test_unknown_fields_and_positions_are_refused(cls):
    with pytest.raises(UserError, match="did you mean 'positions'"):
        catalogue.make(cls, {"position": "original"})
    with pytest.raises(UserError, match="positions="):
        cls(positions="elsewhere")


def only(tokens, rows):
    return dataclasses.replace(
        tokens, features=tokens.features[rows], cls_attention=tokens.cls_attention[rows], keys=tokens.keys[rows]
    )
