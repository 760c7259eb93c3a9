"""Answers of the server to OpenAI's own client, compared with those of the façade."""

import openai
import pytest

from tests.serving.server.running import EXAMPLES, QUESTION, image_url, user
from vlmzip.methods import NoCompression, VisionZip
from vlmzip.runtime.answering import Answerer
from vlmzip.runtime.attach import attach
from vlmzip.runtime.images import load_image

METHODS = ["no_compression", "pool2d", "dfmr", "fastv", "sparsevlm", "visionzip(keep=8)+fastv(layer=4,keep=4)"]


def answer_of(mini, compressor, images, questions):
    with attach(mini.model, compressor) as compressed:
        return Answerer(mini.family, mini.processor).answer(compressed, images, questions, 32)


def test_an_answer_is_that_of_the_facade(client, mini):
    reply = client.chat.completions.create(model="mini", messages=[user(QUESTION, image_url())])
    (expected,) = answer_of(mini, VisionZip(keep=16), [load_image(EXAMPLES / "flat.png")], [QUESTION])
    assert reply.choices[0].message.content == expected.text
    assert reply.choices[0].finish_reason == "stop"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (
        expected.text_tokens + 16,
        expected.new_tokens,
    )
    assert reply.usage.vlmzip["visual_tokens"] == {"before": 144, "after": 16, "last_layer": 16}


@pytest.mark.parametrize("method", METHODS)
def test_a_request_chooses_its_method(client, mini, method):
    reply = client.chat.completions.create(
        model="mini", messages=[user(QUESTION, image_url())], extra_body={"vlmzip": {"method": method}}
    )
    (expected,) = answer_of(mini, method, [load_image(EXAMPLES / "flat.png")], [QUESTION])
    assert reply.choices[0].message.content == expected.text
    visual = reply.usage.vlmzip["visual_tokens"]
    assert (visual["before"], visual["after"]) == (expected.visual_tokens, expected.by_layer[0])
    assert visual["last_layer"] in (expected.by_layer[-1], None)


def test_a_stream_has_the_same_answer_and_the_usage_if_asked(client):
    messages = [user(QUESTION, image_url())]
    whole = client.chat.completions.create(model="mini", messages=messages)
    stream = client.chat.completions.create(
        model="mini", messages=messages, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1
    without = list(client.chat.completions.create(model="mini", messages=messages, stream=True))
    assert all(chunk.usage is None for chunk in without)


def test_images_of_several_turns(client, mini):
    first = client.chat.completions.create(model="mini", messages=[user(QUESTION, image_url())])
    messages = [
        {"role": "system", "content": "what"},
        user(QUESTION, image_url()),
        first.choices[0].message,  # as the client received it
        user("how many shapes are there ?", image_url("first"), image_url("cluttered")),
    ]
    reply = client.chat.completions.create(model="mini", messages=messages, max_tokens=3)
    assert reply.usage.vlmzip["images"] == 3
    assert reply.usage.vlmzip["visual_tokens"] == {"before": 3 * 144, "after": 3 * 16, "last_layer": 3 * 16}
    assert reply.choices[0].message.content


def test_models(client):
    assert [model.id for model in client.models.list()] == ["mini"]
    assert client.models.retrieve("mini").owned_by == "vlmzip"
    with pytest.raises(openai.NotFoundError, match="this server has 'mini'"):
        client.models.retrieve("other")


def test_text_alone(client, mini):
    reply = client.chat.completions.create(model="mini", messages=[{"role": "user", "content": QUESTION}], max_tokens=2)
    assert reply.usage.vlmzip["visual_tokens"] == {"before": 0, "after": 0, "last_layer": 0}
    with attach(mini.model, NoCompression()) as compressed:
        answerer = Answerer(mini.family, mini.processor)
        (expected,) = answerer.answer_prompts(compressed, answerer._prompts([QUESTION], [[]]), [[]], max_new_tokens=2)
    assert reply.choices[0].message.content == expected.text
