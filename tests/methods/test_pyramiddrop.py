"""PyramidDrop's counts, layers and budgets, and its choices against a naive loop. `test_in_llm.py` has the models."""

import pytest
import torch

import vlmzip
from tests.references.pyramiddrop import left_after, pyramiddrop
from tests.tiny import batch, prompt
from vlmzip import BudgetError, Chain, Grid, Profile, PyramidDrop, UserError, VisionZip, VisualTokens, catalogue

#: LLaVA-1.5-7B, as in the paper.
PAPER = Profile(Grid(1, 24, 24), layers=32)


def tokens_of(size, prefix=0, rows=3, seed=0):
    """Return visual tokens whose attention has many ties."""
    generator = torch.Generator().manual_seed(seed)
    attention = torch.randint(6, (rows, 4, prefix + size), generator=generator) / 8
    features = torch.randn(rows, prefix + size, 8, generator=generator)
    return VisualTokens(features, Grid(1, 1, size), prefix, passes_prefix=True, text_attention=attention)


# --- how many tokens ----------------------------------------------------------------------------------------------


def test_the_published_setting():
    assert PyramidDrop().tokens_by_layer(PAPER) == [576] * 8 + [288] * 8 + [144] * 8 + [72] * 8
    assert PyramidDrop().reached(PAPER) == 0.46875
    assert PyramidDrop().left(PAPER) == 0.125


@pytest.mark.parametrize("size", range(1, 200))
def test_halves_round_as_the_authors_do(size):
    by_layer = PyramidDrop().tokens_by_layer(Profile(Grid(1, 1, size), 32))
    assert by_layer[8::8] == left_after(size, 0.5, 3)


@pytest.mark.parametrize(
    ("depth", "first", "layers"),
    [(32, 1, (8, 16, 24)), (28, 1, (7, 14, 21)), (40, 1, (10, 20, 30)), (36, 12, (12, 18, 27)), (8, 1, (2, 4, 6)),
     (4, 1, (1, 2, 3)), (3, 1, (1, 2)), (2, 1, (1,))],
)  # fmt: skip
def test_default_layers_move_with_the_depth(depth, first, layers):
    profile = Profile(Grid(1, 12, 12), depth, first_layer=first)
    assert PyramidDrop(share=0.3).placed(profile) == PyramidDrop(share=0.3, layer=layers)
    assert PyramidDrop(layer=(1, 3)).placed(profile).layer == (1, 3)


def test_one_layer_is_one_count():
    assert PyramidDrop(layer=(3,)).token_count(Grid(1, 5, 5)) == 12
    assert PyramidDrop().token_count(Grid(1, 5, 5)) is None


@pytest.mark.parametrize("depth", [2, 3, 4, 8, 28, 32])
@pytest.mark.parametrize("size", [2, 15, 144, 576, 2880])
def test_budgets_are_met_at_any_depth(depth, size):
    profile = Profile(Grid(1, 1, size), depth)
    whole, share = PyramidDrop().at_budget("100%", profile)
    assert (whole.share, share) == (1, 1)
    least = whole.with_fields(share=1e-5).reached(profile) * size
    for keep in sorted({max(1, size * n // 12) for n in range(1, 13)}):
        try:
            chosen, reached = PyramidDrop().at_budget(keep, profile)
        except BudgetError:
            assert keep < least
            continue
        assert reached == sum(chosen.tokens_by_layer(profile)) / (size * depth)
        # All three layers can drop their first token at the same share, so that counts change by up to 3.
        assert abs(reached * size - keep) <= 1.5
        last, left = PyramidDrop().at_keep(keep, profile)
        assert left == last.tokens_by_layer(profile)[-1] / size
        assert abs(left * size - keep) <= 1.5


def test_a_budget_below_the_first_stage_is_refused():
    message = r"8 of 32 layers see all tokens before pyramiddrop acts: on average at least 25.1%"
    with pytest.raises(BudgetError, match=message):
        PyramidDrop().at_budget("25%", PAPER)
    with pytest.raises(BudgetError, match="at least 2 decoder layers"):
        PyramidDrop().at_budget("50%", Profile(Grid(1, 6, 6), layers=1))
    with pytest.raises(BudgetError, match="layer must be from 1 to 3 in this LLM of 4 layers, got 5"):
        PyramidDrop(layer=(2, 5)).at_budget("50%", Profile(Grid(1, 6, 6), layers=4))


def test_a_chain_multiplies_the_shares():
    chain = Chain(compressors=(VisionZip(keep=192), PyramidDrop()))
    assert chain.tokens_by_layer(PAPER) == [192] * 8 + [96] * 8 + [48] * 8 + [24] * 8
    assert chain.reached(PAPER) == 90 / 576
    fitted, reached = chain.at_budget(64, PAPER)
    assert reached * 576 == pytest.approx(64, abs=0.5)
    assert fitted.compressors[1] == PyramidDrop()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"share": 0}, "share must be"),
        ({"share": 1.5}, "share must be"),
        ({"layer": (16, 8)}, r"layer must be in ascending order, such as 8,16,24, got \(16, 8\)"),
        ({"layer": ()}, "layer must be in ascending order"),
        ({"site": "pre_projector"}, "site must be in_llm, got 'pre_projector'"),
    ],
)
def test_wrong_settings_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        catalogue.make(PyramidDrop, fields)


# --- which tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("size", [2, 3, 16, 36, 576])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.9])
def test_equals_the_naive_loop(size, share, prefix):
    tokens = tokens_of(size, prefix, seed=size)
    token_map = PyramidDrop(share=share, layer=(2,))(tokens)
    token_map.check()
    for row, attention in enumerate(tokens.text_attention[:, -1, prefix:].tolist()):
        kept = (token_map.group[row, prefix:] >= 0).nonzero()[:, 0].tolist()
        assert kept == pyramiddrop(attention, left_after(size, share, 1)[0])


def test_a_model_sees_as_many_tokens_as_promised(llava):
    with vlmzip.attach(llava, PyramidDrop()) as compressed, torch.no_grad():  # default layers move
        compressed(**batch(prompt(1, "image", 5), images=1))
        assert compressed.compressor.layers == (1, 2, 3)
        assert list(compressed.report.images[0].by_layer) == [36, 18, 9, 4]
