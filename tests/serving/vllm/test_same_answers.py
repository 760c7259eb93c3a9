"""vLLM with the plugin answers as the façade does."""

import pytest

from tests.serving.vllm.asking import generate, of_facade, of_vllm, questions, request

pytest.importorskip("vllm")

COUNT = 200
METHODS = {
    "no_compression": 144,
    "visionzip(keep=36)": 36,
    "pool2d(factor=2)": 36,
    "divprune(keep=36)": 36,
    "kmeans(keep=36)": 36,
    "random_tokens(keep=36)": 36,
}
#: Each reads another signal of the encoder; the last is a chain.
FURTHER = [
    "hiprune(keep=20)", "fastervlm(keep=9)", "holov(keep=20)", "zoo_prune(keep=20)",
    "visionzip(keep=64)+divprune(keep=16)",
]  # fmt: skip


@pytest.mark.parametrize("compressor", METHODS)
def test_answers_are_those_of_the_facade(engine, compressor):
    asked = questions(COUNT)
    assert of_vllm(engine, asked, compressor) == of_facade(compressor, asked)


@pytest.mark.parametrize("compressor", FURTHER)
def test_signals_of_the_encoder_are_those_of_the_facade(engine, compressor):
    asked = questions(40)
    assert of_vllm(engine, asked, compressor) == of_facade(compressor, asked)


@pytest.mark.parametrize("compressor", METHODS)
def test_a_prompt_has_the_tokens_that_remain(engine, compressor):
    (question,) = questions(1)
    whole, compressed = generate(engine, [request(question), request(question, compressor)])
    assert len(whole.prompt_token_ids) - len(compressed.prompt_token_ids) == 144 - METHODS[compressor]
