"""Compare methods with their naive loops on a real model's data: mini's features, questions and attention.

`dfmr`, `adaptive_visionzip`, `kmeans`, `sparsevlm` and `downsample` have such tests in their own files.
"""

import pytest
import torch

import vlmzip
from tests.references.in_llm import logits_of
from tests.references.visionzip import visionzip
from tests.runtime.test_in_llm import dart_rule, fastv_rule, pooling_rule, pyramiddrop_rule, random_rule, sparsevlm_rule
from vlmzip import DART, FastV, LLaVolta, Pool2d, PyramidDrop, RandomTokens, Site, SparseVLM, VisionZip, mini

QUESTIONS = ("what color is the ring ?", "where is the star ?", "is there a red circle to the left of the word ?")
STEPS = 4


@pytest.mark.parametrize("merge", ["reference", "mean"])
@pytest.mark.parametrize(("dominant", "contextual"), [(13, 3), (61, 11)])
def test_visionzip(mini_tokens, merge, dominant, contextual):
    tokens = mini_tokens
    out = VisionZip(dominant=dominant, contextual=contextual, merge=merge)(tokens).apply(tokens.features)
    for row in range(len(tokens.features)):
        attention = tokens.cls_attention[row][None]
        expected = visionzip(tokens.features[row], attention, tokens.keys[row], dominant, contextual, merge)
        torch.testing.assert_close(out[row], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("factor", [2, 3, 5])
def test_pool2d(mini_tokens, factor):
    out = Pool2d(factor=factor)(mini_tokens).apply(mini_tokens.features)
    grid = mini_tokens.features[:, 1:].unflatten(1, (12, 12))
    corners = [(r, c) for r in range(0, 12, factor) for c in range(0, 12, factor)]
    windows = [grid[:, r : r + factor, c : c + factor].flatten(1, 2).mean(1) for r, c in corners]
    torch.testing.assert_close(out, torch.stack(windows, 1))


@pytest.mark.parametrize("stride", [4, 7])
def test_llavolta_before_the_llm(mini_tokens, stride):
    out = LLaVolta(layer=-1, stride=stride)(mini_tokens).apply(mini_tokens.features)
    runs = [mini_tokens.features[:, 1 + n : 1 + n + stride].mean(1) for n in range(0, 144 - stride + 1, stride)]
    torch.testing.assert_close(out, torch.stack(runs, 1))


def test_random_tokens(mini_tokens):
    out = RandomTokens(keep=20, seed=5)(mini_tokens).apply(mini_tokens.features)
    chosen = torch.randperm(144, generator=torch.Generator().manual_seed(5))[:20].sort().values
    assert torch.equal(out, mini_tokens.features[:, 1 + chosen])


INSIDE = {
    "fastv": (FastV(keep=0.25, layer=2), {2: fastv_rule(0.25)}),
    "llavolta": (LLaVolta(stride=8, layer=2), {2: pooling_rule(8)}),
    "dart": (DART(keep=0.25, layer=2), {2: dart_rule(36)}),
    "pyramiddrop": (PyramidDrop(layer=(2, 4, 6)), {layer: pyramiddrop_rule(0.5) for layer in (2, 4, 6)}),
    "random_tokens": (RandomTokens(keep=0.25, site=Site.IN_LLM, layer=1, seed=7), {1: random_rule(0.25, 7)}),
    "sparsevlm": (
        SparseVLM(counts=(60, 30, 12), layer=(1, 2, 4)),
        {layer: sparsevlm_rule(count, 0.3) for layer, count in ((1, 60), (2, 30), (4, 12))},
    ),
}


@pytest.fixture(scope="module")
def asked(mini_images):
    model, processor = mini.load()
    prompts = [f"USER: <image>\n{question} ASSISTANT:" for question in QUESTIONS]

    def inputs(rows):
        given = {"images": [mini_images[row] for row in rows], "text": [prompts[row] for row in rows]}
        return processor(**given, padding=True, return_tensors="pt")

    return model, inputs


@pytest.mark.parametrize("name", INSIDE)
def test_inside_the_llm(asked, name):
    """Compare a ragged left-padded batch with each row alone and masked: logits of prefill and the first steps."""
    model, inputs = asked
    compressor, rules = INSIDE[name]
    compressed = vlmzip.attach(model, compressor)
    how = {"max_new_tokens": STEPS + 1, "min_new_tokens": STEPS + 1, "do_sample": False}
    out = compressed.generate(**inputs(range(3)), **how, output_logits=True, return_dict_in_generate=True)
    compressed.detach()
    placeholder = model.config.image_token_id
    for row in range(3):
        one = inputs([row])
        columns = (one["input_ids"][0] == placeholder).nonzero()[:, 0].tolist()
        new = out.sequences[row, -STEPS - 1 : -1]
        expected, _ = logits_of(model, one, new, placeholder, [columns], rules)
        got = torch.stack([step[row] for step in out.logits])
        torch.testing.assert_close(got, expected[-STEPS - 1 :], atol=1e-4, rtol=1e-4)
