"""Answers of the server to OpenAI's own client, compared with those of the façade."""

import json
import re
import subprocess

import openai
import pytest

from tests.serving.server.running import EXAMPLES, QUESTION, image_url, user
from vlmzip.methods import NoCompression, VisionZip
from vlmzip.runtime.answering import Answerer
from vlmzip.runtime.attach import attach
from vlmzip.runtime.images import load_image
from vlmzip.runtime.prompt_text import conversation_prompt
from vlmzip.serving.server.schema import read_request

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


def test_the_request_with_curl_of_the_page_is_answered(http):
    root = EXAMPLES.parent
    (body,) = re.findall(r"<<EOF\n(.*?\nEOF)\n", (root / "docs" / "serve.md").read_text(), flags=re.S)
    body = subprocess.run(
        ["sh"], input=f"cat <<EOF\n{body}\n", capture_output=True, text=True, check=True, cwd=root
    ).stdout
    reply = http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}).json()
    assert reply["choices"][0]["message"]["content"] == "orange"
    assert reply["usage"]["vlmzip"]["visual_tokens"]["after"] == 16


def test_a_message_of_the_assistant_at_the_end_is_a_finished_answer(mini, engine):
    turns = [{"role": "user", "content": "what is there ?"}, {"role": "assistant", "content": "a ring"}]
    body = json.dumps({"model": "mini", "messages": turns}).encode()
    (row,) = engine.prepare(read_request(body)).inputs["input_ids"]
    prompt = "USER: what is there ? ASSISTANT: a ring</s>ASSISTANT:"
    assert row.tolist() == mini.processor.tokenizer(prompt)["input_ids"]


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


TURNS = [
    ("flat", "what color is the ring ?"), ("first", "how many shapes are there ?"),
    ("cluttered", "what color is the square ?"),
]  # fmt: skip


def conversation_of_the_facade(mini, method, turns):
    """The answers of the façade alone, each asked with those before it in the prompt."""
    answerer = Answerer(mini.family, mini.processor)
    messages, images, answers = [], [], []
    with attach(mini.model, method) as compressed:
        for name, question in turns:
            images.append(load_image(EXAMPLES / f"{name}.png"))
            content = [{"type": "image"}, {"type": "text", "text": question}]
            messages.append({"role": "user", "content": content})
            prompt = conversation_prompt(mini.family, mini.processor, messages)
            (answer,) = answerer.answer_prompts(compressed, [prompt], [images], max_new_tokens=8, do_sample=False)
            answers.append(answer)
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer.text}]})
    return answers


@pytest.mark.parametrize("method", ["visionzip(keep=16)", "pool2d", "dfmr", "fastv(layer=3,keep=20)"])
def test_streams_of_a_conversation_with_images_in_each_turn(client, mini, method):
    """A stream, a whole answer and the façade say the same at each turn, and each turn sees the answers before it."""
    expected = conversation_of_the_facade(mini, method, TURNS)
    messages = []
    for (name, question), alone in zip(TURNS, expected, strict=True):
        messages.append(user(question, image_url(name)))
        asked = dict(model="mini", messages=messages, max_tokens=8, extra_body={"vlmzip": {"method": method}})
        whole = client.chat.completions.create(**asked)
        chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert streamed == whole.choices[0].message.content == alone.text
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
        assert chunks[-1].usage == whole.usage
        assert whole.usage.vlmzip["images"] == len(messages) // 2 + 1
        assert whole.usage.vlmzip["visual_tokens"]["after"] == alone.by_layer[0]
        assert whole.usage.completion_tokens == alone.new_tokens
        messages.append({"role": "assistant", "content": streamed})
    assert len({answer.text for answer in expected}) > 1


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
