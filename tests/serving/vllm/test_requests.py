"""Requests of all kinds get the answers that they get alone: caches, chunks, several images, text, bad settings."""

import pytest

from tests.serving.vllm.asking import generate, mini_model, of_facade, of_vllm, prompt, questions, request

pytest.importorskip("vllm")

#: Both leave 36 tokens, so prompts of both consist of the same token ids.
ONE, OTHER = "visionzip(keep=36)", "divprune(keep=36)"


@pytest.fixture(scope="module")
def small(start):
    """mini with VisionZip, in an engine that takes a prompt in several chunks."""
    return start(ONE, max_num_batched_tokens=48, max_num_seqs=4)


@pytest.fixture(scope="module")
def stock(start):
    """mini without a compressor, with the plugin installed."""
    return start()


@pytest.fixture(scope="module")
def in_bfloat16(start):
    return start(ONE, dtype="bfloat16")


def likelihoods(engine, requests):
    """Return the log-probability of the first token of each answer."""
    from vllm import SamplingParams

    outputs = engine.generate(requests, SamplingParams(temperature=0, max_tokens=1, logprobs=0), use_tqdm=False)
    return [next(iter(output.outputs[0].logprobs[0].values())).logprob for output in outputs]


def forget(engine):
    engine.reset_mm_cache()
    assert engine.reset_prefix_cache()


def test_caches_keep_settings_apart(engine):
    (question,) = questions(1)
    requests = [request(question, ONE), request(question, OTHER)]
    alone = []
    for each in requests:
        forget(engine)
        alone += likelihoods(engine, [each])
    assert abs(alone[0] - alone[1]) > 1e-3, "the settings must give other answers"
    forget(engine)
    hits = [likelihoods(engine, [each])[0] for each in requests * 3]
    assert hits == pytest.approx(alone * 3, abs=1e-5)
    assert likelihoods(engine, requests * 3) == pytest.approx(alone * 3, abs=1e-5)


def test_caches_keep_settings_apart_although_the_client_names_the_image(engine):
    (question,) = questions(1)
    named = [{**request(question, each), "multi_modal_uuids": {"image": ["mine"]}} for each in (ONE, OTHER)]
    forget(engine)
    expected = likelihoods(engine, [request(question, ONE), request(question, OTHER)])
    assert likelihoods(engine, named * 2) == pytest.approx(expected * 2, abs=1e-5)


def test_equal_settings_share_a_cache_entry(engine):
    (question,) = questions(1)
    processor = engine.renderer.mm_processor
    texts = ("visionzip(keep=36)", "visionzip( keep = 036 )", "visionzip(keep=35)")
    same, also, other = (hash_of(processor, question, text) for text in texts)
    assert same == also != other


def hash_of(processor, question, text):
    items = processor.info.parse_mm_data({"image": question.image})
    result = processor(prompt(question.question), items, hf_processor_mm_kwargs={"vlmzip": text})
    return result["mm_hashes"]["image"]


def test_engines_with_other_settings_live_in_one_process(engine, small, stock):
    asked = questions(20)
    assert of_vllm(small, asked) == of_facade(ONE, asked) == of_vllm(engine, asked, ONE)
    assert of_vllm(stock, asked) == of_facade("no_compression", asked) == of_vllm(engine, asked)


def test_without_a_compressor_parts_are_those_of_vllm(stock, small):
    from vllm.model_executor.models.llava import LlavaMultiModalProcessor

    assert type(stock.renderer.mm_processor) is LlavaMultiModalProcessor
    assert type(small.renderer.mm_processor) is not LlavaMultiModalProcessor


def test_a_request_chooses_its_budget_where_prompts_come_in_chunks(small):
    asked = questions(12)
    budgets = ("visionzip(keep=9)", ONE, "kmeans(keep=20)")
    requests = [request(question, budgets[number % 3]) for number, question in enumerate(asked)]
    answers = [list(output.outputs[0].token_ids) for output in generate(small, requests)]
    for number, budget in enumerate(budgets):
        assert answers[number::3] == of_facade(budget, asked[number::3])


def test_several_images_and_none(small):
    asked = questions(8)
    text = {"prompt": "USER: what color is the ring ? ASSISTANT:"}
    pairs = [
        {"prompt": prompt(one.question, 2), "multi_modal_data": {"image": [one.image, other.image]}}
        for one, other in zip(asked[::2], asked[1::2], strict=True)
    ]
    mixed = [each for triple in zip(pairs, [text] * 4, map(request, asked), strict=False) for each in triple]
    alone = [generate(small, [each])[0] for each in mixed]
    together = generate(small, mixed)
    assert [one.outputs[0].token_ids for one in together] == [one.outputs[0].token_ids for one in alone]
    single = len(generate(small, [request(asked[0])])[0].prompt_token_ids)
    assert len(together[0].prompt_token_ids) == single + 36


BAD = [
    ("nonsense", "unknown method 'nonsense'"),
    ("visionzip(keep=-1)", "keep"),
    ("fastv(keep=9)", "acts at site 'in_llm'"),
    ("dfmr(tau=0.1)", "dfmr needs the vision encoder in the processor"),
    ("visionzip(keep=64)+pool2d(site=post_projector)", "needs tokens that lie on a grid"),
    (5, "must be a text"),
]


@pytest.mark.parametrize(("setting", "reason"), BAD)
def test_a_request_with_a_bad_setting_fails_alone(engine, setting, reason):
    from vllm.exceptions import VLLMValidationError  # the server answers 400

    (question,) = questions(1)
    with pytest.raises(VLLMValidationError, match=reason):
        generate(engine, [request(question, setting)])
    assert of_vllm(engine, [question], ONE) == of_facade(ONE, [question])


def test_the_server_answers_400_to_a_bad_setting(engine):
    """vLLM's server answers with what `create_error_response` makes of an error of the processor."""
    from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
    from vllm.exceptions import VLLMValidationError

    (question,) = questions(1)
    with pytest.raises(VLLMValidationError) as refused:
        generate(engine, [request(question, "nonsense")])
    response = create_error_response(refused.value)
    assert response.error.code == 400
    assert "unknown method 'nonsense'" in response.error.message


def test_in_bfloat16_prompts_have_the_same_length_and_answers_come(in_bfloat16):
    asked = questions(8)
    requests = [request(question) for question in asked]
    outputs = generate(in_bfloat16, requests)
    plain = len(mini_model()[1].tokenizer(prompt(asked[0].question))["input_ids"]) - 1
    assert len(outputs[0].prompt_token_ids) == plain + 36
    assert all(len(output.outputs[0].token_ids) > 0 for output in outputs)
    expected = of_facade(ONE, asked)
    assert sum(list(o.outputs[0].token_ids) == e for o, e in zip(outputs, expected, strict=True)) >= 6


def test_a_budget_that_fits_no_cache_is_refused(small):
    from vllm.exceptions import VLLMValidationError

    (question,) = questions(1)
    with pytest.raises(VLLMValidationError, match="encoder cache size"):
        generate(small, [request(question, "no_compression")])
    assert of_vllm(small, [question]) == of_facade(ONE, [question])
