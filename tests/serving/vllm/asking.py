"""The same questions for mini in vLLM and behind the façade, with greedy answers as token ids."""

from functools import cache

import torch

import vlmzip
from vlmzip import mini
from vlmzip.mini.questions import MOST_NEW_TOKENS
from vlmzip.mini.splits import test_split

#: Logits of both sides differ by less than this share of the largest: float32, and sums in another order.
NEAR_LOGITS = 1e-4
#: Rows of the façade's batches.
ROWS = 20


@cache
def questions(count):
    return test_split(count)


@cache
def mini_model():
    return mini.load()


def prompt(question, images=1):
    return f"USER: {'<image>' * images}\n{question} ASSISTANT:"


def request(question, compressor=None):
    """Return a request about an image to vLLM."""
    kwargs = {} if compressor is None else {"mm_processor_kwargs": {"vlmzip": compressor}}
    return {"prompt": prompt(question.question), "multi_modal_data": {"image": question.image}, **kwargs}


def generate(engine, requests):
    """Return vLLM's outputs for the requests: greedy answers."""
    from vllm import SamplingParams

    return engine.generate(requests, SamplingParams(temperature=0, max_tokens=MOST_NEW_TOKENS), use_tqdm=False)


def of_vllm(engine, asked, compressor=None):
    outputs = generate(engine, [request(question, compressor) for question in asked])
    return [list(output.outputs[0].token_ids) for output in outputs]


def of_facade(compressor, asked):
    model, processor = mini_model()
    answers = []
    with vlmzip.attach(model, compressor) as small, torch.inference_mode():
        for start in range(0, len(asked), ROWS):
            part = asked[start : start + ROWS]
            texts = [prompt(question.question) for question in part]
            inputs = processor(
                images=[question.image for question in part], text=texts, return_tensors="pt", padding=True
            )
            tokens = small.generate(**inputs, max_new_tokens=MOST_NEW_TOKENS, do_sample=False)
            answers += [without_padding(row) for row in tokens[:, inputs["input_ids"].shape[1] :].tolist()]
    return answers


def without_padding(row):
    model, _ = mini_model()
    return [token for token in row if token != model.config.text_config.pad_token_id]


def assert_near_logits(some, others):
    """Assert that the logits of all words are near, at each of the same tokens."""
    assert some.shape == others.shape
    torch.testing.assert_close(some, others, atol=NEAR_LOGITS * others.abs().max().item(), rtol=0)
