"""Tests that every method must pass. A new method is tested as soon as it can be imported."""

import contextlib
import json
import pickle
from pathlib import Path

import pytest
import torch

import vlmzip.methods
from tests.methods import test_visionzip
from vlmzip import (
    BudgetError,
    Chain,
    Downsample,
    Pool2d,
    Profile,
    Resampler,
    UserError,
    VisualTokens,
    available,
    catalogue,
    spec,
)
from vlmzip.compressor import Calibratable
from vlmzip.keep import count_to_keep

METHODS = available()


def tokens_of(method=None):
    """Return three images that vary between tokens, between 2 x 2 windows only, and between 3 x 3 windows only.

    A question attends to the tokens that `method` asks for.
    """
    tokens = test_visionzip.tokens_of()
    features, pixels = tokens.features.clone(), torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    for row, factor in ((1, 2), (2, 3)):
        blocks = Pool2d(factor=factor)(tokens)
        features[row] = blocks.apply(tokens.features)[row, blocks.group[row].clamp(min=0)]
        pixels[row] = (
            pixels[row, :, :: 4 * factor, :: 4 * factor]
            .repeat_interleave(4 * factor, 1)
            .repeat_interleave(4 * factor, 2)
        )
    features += 0.01 * tokens.features
    noise = torch.Generator().manual_seed(1)
    outputs = features.shape[1] if method is None else method.candidates(tokens).max_length
    return tokens.replace(
        features=features,
        pixels=pixels,
        text_attention=torch.rand(3, 4, features.shape[1], generator=noise),
        candidate_attention=torch.rand(3, 4, outputs, generator=torch.Generator().manual_seed(2)),
        query_mask=torch.tensor([[False, True, True, True], [True] * 4, [True] * 4]),
        text_features=torch.randn(3, 4, features.shape[2], generator=noise),
        llm_input=torch.randn(features.shape, generator=noise),
        attention_received=torch.rand(*features.shape[:2], 2, generator=noise),
        last_cls_attention=torch.rand(features.shape[:2], generator=noise),
        last_keys=torch.randn(*features.shape[:2], 16, generator=noise),
        encoder_features=torch.randn(*features.shape[:2], 12, generator=noise),
        projector=torch.nn.functional.gelu,
        llm_keys=torch.randn(*features.shape[:2], 8, generator=noise),
        text_keys=torch.randn(3, 4, 8, generator=noise),
        llm_states=torch.randn(features.shape, generator=noise),
        text_states=torch.randn(3, 4, features.shape[2], generator=noise),
    )


def left_by(method, tokens):
    """Return how many tokens of the first image remain after the last of the method's layers."""
    for layer in method.layers or (None,):
        token_map = method(tokens.replace(layer=layer)).in_anchor_order()
        features = token_map.apply(tokens.features)
        anchors = token_map.anchor_index()[:, None].expand(-1, tokens.text_attention.shape[1], -1)
        asked = tokens.text_attention.gather(2, anchors)
        tokens = VisualTokens(
            features,
            grid=None,
            text_attention=asked,
            query_mask=tokens.query_mask,
            text_features=tokens.text_features,
            llm_input=tokens.llm_input,
        )
    return features.shape[1]


def configured(cls):
    """Yield the tested settings of a method: defaults, budgets, its examples and thresholds between the images.

    Settings are slow tests if others are like them.
    """
    yield cls(), ()
    if "keep" in cls.field_names():
        yield cls(keep=1), ()
        yield from ((cls(keep=keep), pytest.mark.slow) for keep in (5, "50%"))
    yield from ((spec.read(f"{cls.name()}({settings})"), ()) for settings in cls.examples)
    if isinstance(cls(), Calibratable):
        yield from ((cls(**{cls.threshold: 0.1, "measure": measure}), ()) for measure in ("features", "pixels"))


PROFILE = Profile(tokens_of().grid, layers=4)
CONFIGURED = [
    pytest.param(method, id=f"{name}-{i}", marks=marks)
    for name, cls in METHODS.items()
    # Chains are tested in tests/runtime/test_in_llm.py, because they act at several sites. Resamplers have no token map
    # and are tested in a model.
    if cls is not Chain and not issubclass(cls, Resampler)
    for i, (method, marks) in enumerate(configured(cls))
]


def test_the_folder_and_the_list_agree():
    files = {p.stem for p in Path(vlmzip.methods.__file__).parent.glob("*.py")} - {"__init__"}
    assert files <= set(METHODS)


@pytest.mark.parametrize("method", CONFIGURED)
class TestEveryMethod:
    def test_count_is_what_was_promised(self, method):
        tokens = tokens_of(method)
        token_map = method(tokens)
        token_map.check()
        promised = method.token_count(tokens.grid)
        assert promised is None or token_map.lengths == [min(promised, tokens.grid.size)] * 3

    def test_a_row_alone_equals_that_row_in_a_batch(self, method):
        tokens = tokens_of(method)
        whole = method(tokens).apply(tokens.features)
        for row in range(3):
            alone = tokens.rows(torch.tensor([row]))
            out = method(alone).apply(alone.features)[0]
            torch.testing.assert_close(out, whole[row, : len(out)])
            assert not whole[row, len(out) :].any()

    def test_permuting_the_batch_permutes_the_result(self, method):
        tokens = tokens_of(method)
        swapped = tokens.rows(torch.tensor([2, 0, 1]))
        assert torch.equal(method(swapped).group, method(tokens).group[[2, 0, 1]])

    def test_bfloat16_decides_like_float32(self, method):
        tokens = tokens_of(method)
        # Scores and keys differ clearly, so that rounding them does not change a decision. Features have values that
        # both types can represent, so that only rounding in intermediate results could change a decision.
        separated = torch.rand(3, 37).argsort(1).float() + 1
        keys = torch.eye(37)[None].repeat(3, 1, 1) + 0.3 * torch.eye(37).roll(1, 0)
        names = (
            "features", "text_features", "llm_input", "llm_keys", "text_keys", "llm_states", "text_states",
        )  # fmt: skip
        exact = {name: getattr(tokens, name).bfloat16().float() for name in names}
        tokens = tokens.replace(**exact, cls_attention=separated, keys=keys)
        tokens = tokens.replace(text_attention=separated[:, None].expand(-1, 4, -1))
        scores = (*names, "cls_attention", "keys", "text_attention")
        half = tokens.replace(**{name: getattr(tokens, name).bfloat16() for name in scores})
        assert torch.equal(method(tokens).group, method(half).group)

    def test_gradients_are_finite(self, method):
        tokens = tokens_of(method)
        features = tokens.features.clone().requires_grad_()
        method(tokens.replace(features=features)).apply(features).square().sum().backward()
        assert features.grad.isfinite().all()
        assert features.grad.abs().sum() > 0

    def test_deterministic(self, method):
        assert torch.equal(method(tokens_of(method)).group, method(tokens_of(method)).group)

    def test_pickle_and_json_round_trip(self, method):
        assert pickle.loads(pickle.dumps(method)) == method
        saved = json.loads(json.dumps(method.to_dict()))
        assert catalogue.from_dict(saved) == method

    @pytest.mark.parametrize("keep", ["50%", "25%", 4])
    def test_the_budget_reached_is_the_one_reported(self, method, keep):
        try:
            chosen, reached = method.at_budget(keep, PROFILE)
        except BudgetError:
            return  # the message is tested with each method
        by_layer = chosen.tokens_by_layer(PROFILE)
        assert left_by(chosen, tokens_of(chosen)) == by_layer[-1]
        assert reached == pytest.approx(sum(by_layer) / (36 * PROFILE.layers))
        if "keep" in method.field_names() and type(method) is not Downsample:  # it can only reach whole grids
            # Inside the LLM, a token counts in some of the layers only.
            assert abs(reached - count_to_keep(keep, 36) / 36) <= (0.5 / 36 if method.layers else 0)


@pytest.mark.parametrize("cls", [cls for cls in METHODS.values() if "keep" in cls.field_names()])
@pytest.mark.parametrize("keep", [36, 37, 5000, "100%"])
def test_keeping_all_is_the_identity(cls, keep):
    tokens = tokens_of()
    token_map = cls(keep=keep)(tokens)
    assert torch.equal(token_map.apply(tokens.features), tokens.features[:, 1:])


@pytest.mark.parametrize("cls", [cls for cls in METHODS.values() if isinstance(cls(), Calibratable)])
class TestEveryCalibratableMethod:
    def test_a_threshold_of_nothing_is_the_identity(self, cls):
        tokens = tokens_of()
        method = cls(**{cls.threshold: 0.0})
        assert torch.equal(method(tokens).apply(tokens.features), tokens.features[:, 1:])
        full = tokens.replace(passes_prefix=True)
        assert torch.equal(method(full).apply(full.features), full.features)

    @pytest.mark.parametrize("measure", ["features", "pixels"])
    def test_the_count_is_that_of_the_largest_factor_below_the_threshold(self, cls, measure):
        method, tokens = cls(**{cls.threshold: 0.1, "measure": measure}), tokens_of()
        assert method.counts_by_factor(tokens.grid) == {1: 36, 2: 9, 3: 4}
        assert method(tokens).lengths == [36, 9, 4]
        below = (method.deviations(tokens) < 0.1).tolist()
        assert below[:2] == [[False, False], [True, False]]
        # Factor 3 is chosen although features vary inside 2 x 2 windows.
        assert below[2] == [measure == "pixels", True]

    def test_it_has_no_budget_without_images(self, cls):
        assert cls().tokens_by_layer(PROFILE) is None
        for ask in (lambda: cls().at_budget("25%", PROFILE), lambda: cls().reached(PROFILE)):
            with pytest.raises(BudgetError, match=r"depends on the images.*vlmzip calibrate"):
                ask()
        assert cls(max_factor=1).reached(PROFILE) == 1


@pytest.mark.parametrize("cls", METHODS.values(), ids=METHODS)
def test_unknown_fields_and_positions_are_refused(cls):
    with pytest.raises(UserError, match="did you mean 'positions'"):
        catalogue.make(cls, {"position": "original"})
    with pytest.raises(UserError, match="positions must be contiguous or original, got 'elsewhere'"):
        cls(positions="elsewhere")


@pytest.mark.parametrize("name", METHODS)
def test_a_budget_sets_the_fields_that_are_said_to_hold_it(name):
    method = METHODS[name]()
    assert set(method.budget_fields) <= {*method.field_names(), "keep"}  # a method may have no budget
    if isinstance(method, Calibratable):
        assert method.budget_fields == (method.threshold,)
        return
    profile = Profile(vlmzip.Grid(1, 24, 24), layers=32)
    for keep in ("30%", "60%", 1.0):
        with contextlib.suppress(BudgetError):
            chosen, _ = method.at_budget(keep, profile)
            changed = {field for field in method.field_names() if getattr(chosen, field) != getattr(method, field)}
            assert changed <= set(method.budget_fields)
