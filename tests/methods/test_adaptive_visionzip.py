import pytest
import torch

from tests.methods.test_visionzip import tokens_of
from tests.references import dfmr as naive_dfmr
from tests.references.visionzip import visionzip as naive_visionzip
from vlmzip import DFMR, AdaptiveVisionZip, Signal, UserError, VisionZip, catalogue


def check_against_loops(tokens, method):
    """Compare each image with the naive loops of both papers."""
    token_map = method(tokens)
    token_map.check()
    out = token_map.apply(tokens.features)
    grid = tokens.grid
    for row, features in enumerate(tokens.features):
        measured = [naive_dfmr.layer_normalised(token) for token in features[tokens.prefix :].tolist()]
        factor, _ = naive_dfmr.dfmr(measured, grid.rows, grid.cols, method.tau, method.max_factor)
        if factor == 1:
            expected = features[tokens.prefix :]
        else:
            split = VisionZip(keep=grid.size // factor**2).split(grid.size)
            attention, keys = tokens.cls_attention[row][None], tokens.keys[row]
            expected = naive_visionzip(features, attention, keys, *split, method.merge)
        assert token_map.lengths[row] == len(expected)
        torch.testing.assert_close(out[row, : len(expected)], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("merge", ["reference", "mean"])
def test_equals_the_naive_loops(merge):
    tokens = tokens_of(batch=5)
    deviations = DFMR().deviations(tokens).flatten().sort().values
    for tau in (0.0, *(0.5 * (deviations[:-1] + deviations[1:])).tolist(), 2.0):
        check_against_loops(tokens, AdaptiveVisionZip(tau=tau, merge=merge))


@pytest.mark.further
def test_equals_the_naive_loops_on_mini(mini_tokens):
    check_against_loops(mini_tokens, AdaptiveVisionZip())
    assert AdaptiveVisionZip()(mini_tokens).lengths == DFMR()(mini_tokens).lengths
    assert len(set(AdaptiveVisionZip()(mini_tokens).lengths)) == 3


def test_it_looks_at_what_its_parts_look_at():
    assert AdaptiveVisionZip().needs == {Signal.CLS_ATTENTION, Signal.KEYS}
    assert AdaptiveVisionZip(measure="pixels").needs == {Signal.CLS_ATTENTION, Signal.KEYS, Signal.PIXELS}


@pytest.mark.parametrize(
    "fields",
    [{"tau": "-1"}, {"max_factor": 0}, {"normalize": "no"}, {"measure": "no"}, {"windows": "no"}, {"merge": "no"}],
)
def test_wrong_fields_are_refused(fields):
    with pytest.raises(UserError, match=next(iter(fields))):
        catalogue.make(AdaptiveVisionZip, fields)
