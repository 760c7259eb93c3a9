"""Requests that cannot be answered: a status, and one line with the reason in OpenAI's error shape."""

import asyncio
import io
import json
import struct
import time
import warnings
import zlib
from types import SimpleNamespace

import httpx
import openai
import pytest
from PIL import Image

from tests.serving.server.running import (
    QUESTION,
    asking,
    data_url,
    encoded,
    engine_of,
    image_url,
    plain_image,
    serving,
    user,
)
from vlmzip.methods import KMeans
from vlmzip.serving.server.app import PATHS, create_app
from vlmzip.serving.server.metrics import Metrics
from vlmzip.serving.server.prepare import placeholders_of
from vlmzip.serving.server.schema import read_request
from vlmzip.serving.server.settings import Settings
from vlmzip.serving.server.worker import HuggingFaceEngine


def bomb(side=60_000):
    """A PNG of a few bytes whose header announces billions of pixels."""

    def part(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = part(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + part(b"IDAT", zlib.compress(b"\0" * 100)) + part(b"IEND", b"")


def jpeg(scans):
    """A JPEG with more scans, each nearly empty."""
    content = encoded(Image.new("L", (64, 64)), "JPEG")
    return content[:-2] + content[content.index(b"\xff\xda") : -2] * scans + content[-2:]


def deep(depth):
    return b'{"model": ' + b"[" * depth + b"]" * depth + b"}"


def with_content(*parts):
    return asking() | {"messages": [{"role": "user", "content": list(parts)}]}


def with_image(url):
    return asking(QUESTION, url)


TRUNCATED = encoded(Image.effect_noise((64, 64), 50))[:-200]

#: What is wrong: the body, the status, and a part of the message.
BODIES = {
    "no model": ({"messages": []}, 400, "model is missing"),
    "another model": (asking(model="gpt-4"), 404, "there is no model 'gpt-4' here; this server has 'mini'"),
    "a model that is no text": (asking(model=7), 400, "model must be a text"),
    "no messages": (asking(messages=[]), 400, "messages must not be empty"),
    "an unknown role": (asking(messages=[{"role": "tool", "content": "a"}]), 400, "got 'tool'; tools are not"),
    "no role": (asking(messages=[{"content": "a"}]), 400, "messages.0.role is missing"),
    "tool calls": (
        asking(messages=[{"role": "assistant", "content": "a", "tool_calls": [{}]}]), 400, "tool_calls must be empty",
    ),
    "content that is a number": (asking(messages=[{"role": "user", "content": 5}]), 400, "must be a text or a list of"),
    "an unknown part": (
        with_content({"type": "video_url"}),
        400,
        "messages.0.content.0.type must be text or image_url, got 'video_url'; videos are not supported",
    ),
    "a part of another API": (
        with_content({"type": "input_image"}), 400, """got 'input_image'; send images as {"type": "image_url", "ima""",
    ),
    "a part without a type": (with_content({"text": "a"}), 400, "messages.0.content.0.type is missing"),
    "no parts": (with_content(), 400, "messages.0.content must not be empty"),
    "an image in a system message": (
        asking(messages=[{**user("a", image_url()), "role": "system"}]), 400, "only messages of the user can",
    ),
    "a URL that is a number": (with_image(5), 400, "messages.0.content.0.image_url.url must be a text"),
    "text for an object": (with_content({"type": "image_url", "image_url": "x"}), 400, "must be an object such as"),
    "bad base64": (with_image("data:image/png;base64,$$$$"), 400, "image 1 is not valid base64"),
    "base64 cut short": (with_image("data:image/png;base64,iVBORw0KG"), 400, "image 1 is not valid base64"),
    "no base64": (with_image("data:image/png,abc"), 400, "image 1 must be PNG, JPEG, WEBP, GIF or BMP, in"),
    "a document": (
        with_image("data:application/pdf;base64,JVBE"),
        400,
        "image 1 must be PNG, JPEG, WEBP, GIF or BMP, in a URL like data:image/png;base64,…",
    ),
    "no bytes": (with_image("data:image/png;base64,"), 400, "image 1 is empty"),
    "text for an image": (with_image(data_url(b"hello")), 400, "image 1 is not PNG, JPEG, WEBP, GIF or BMP"),
    "another format": (
        with_image(data_url(encoded(Image.new("L", (9, 9)), "TIFF"), "tiff")), 400, "image 1 is not PNG, JPEG,",
    ),
    "a script for an image": (with_image(data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n")), 400, "image 1 is not PNG"),
    "a truncated image": (with_image(data_url(TRUNCATED)), 400, "image 1 cannot be read"),
    "a JPEG of many scans": (with_image(data_url(jpeg(200))), 400, "image 1 is a JPEG of more than 100 scans"),
    "a bomb": (with_image(data_url(bomb())), 400, "image 1 would unpack to more than"),
    "a smaller bomb": (with_image(data_url(bomb(10_000))), 400, "image 1 has 10000 x 10000 pixels; all images"),
    "a second image that is too large": (
        asking(QUESTION, image_url(), data_url(bomb(8_000))), 400, "image 2 has 8000 x 8000 pixels",
    ),
    "too many images": (asking(QUESTION, *[plain_image("red")] * 17), 400, "has 17 images; the limit is 16"),
    "too many messages": (asking(messages=[user("a")] * 65), 400, "has 65 messages; the limit is 64"),
    "a remote image": (with_image("https://example.org/a.png"), 400, "this server fetches no addresses"),
    "a file": (with_image("file:///etc/passwd"), 400, "this server fetches no addresses"),
    "a placeholder": (asking("what is <image> ?"), 400, "messages.0: text must not contain <image>"),
    "a placeholder in two parts": (
        with_content({"type": "text", "text": "<ima"}, {"type": "text", "text": "ge>"}), 400, "must not contain <ima",
    ),
    "a part that is text": (with_content("what"), 400, """messages.0.content.0 must be an object such as {"type"""),
    "a message that is text": (asking(messages=["what"]), 400, 'messages.0 must be an object such as {"role"'),
    "no content": (
        asking(messages=[{"role": "assistant", "content": None, "refusal": "no"}]), 400, "content must be a text",
    ),
    "a detail": (
        with_content({"type": "image_url", "image_url": {"url": "x", "detail": "max"}}), 400, "detail must be 'auto', ",
    ),
    "an effort": (asking(reasoning_effort="low"), 400, "reasoning_effort is not supported"),
    "a long text": (asking("what " * 20_000), 400, "the model has 1,024 positions"),
    "many visual tokens": (
        asking(QUESTION, *[plain_image("red")] * 8, vlmzip={"method": "no_compression"}), 400, "1,024 positions",
    ),
    "no room for the answer": (
        asking(QUESTION, *[plain_image("red")] * 6, vlmzip={"method": "no_compression"}, max_tokens=200),
        400,
        "and max_tokens is 200",
    ),
    "a long answer": (asking(max_tokens=100_000), 400, "max_tokens is at most 512 here, got 100000"),
    "no answer": (asking(max_tokens=0), 400, "max_tokens must be at least 1"),
    "text for a number": (asking(max_tokens="12"), 400, "max_tokens must be a whole number"),
    "two lengths": (asking(max_tokens=1, max_completion_tokens=2), 400, "not both"),
    "two answers": (asking(n=2), 400, "n must be 1, got 2"),
    "a hot temperature": (asking(temperature=3), 400, "temperature must be at most 2"),
    "no top_p": (asking(top_p=0), 400, "top_p must be above 0"),
    "a huge seed": (asking(seed=2**80), 400, "seed must be below "),
    "many stops": (asking(stop=["a"] * 5), 400, "stop has more than 4 entries"),
    "an empty stop": (asking(stop=[""]), 400, "stop.0 must not be empty"),
    "stream options alone": (asking(stream_options={"include_usage": True}), 400, "stream_options needs stream=true"),
    "tools": (asking(tools=[{"type": "function"}]), 400, "tools is not supported"),
    "logprobs": (asking(logprobs=True), 400, "logprobs is not supported"),
    "a penalty": (asking(presence_penalty=1), 400, "presence_penalty is not supported"),
    "a setting of other servers": (asking(top_k=40), 400, "top_k is not supported; leave it out"),
    "a format": (asking(response_format={"type": "json_object"}), 400, "response_format is not supported"),
    "an unknown field": (asking(max_token=5), 400, "unknown field 'max_token'; did you mean 'max_tokens'?"),
    "a field at the wrong place": (asking(keep=5), 400, 'write it as {"vlmzip": {"method": …, "keep": …}}'),
    "an unknown method": (asking(vlmzip={"method": "visonzip"}), 400, "did you mean 'visionzip'?"),
    "a method that cannot be read": (asking(vlmzip={"method": "visionzip(keep"}), 400, "cannot be read as a method"),
    "an unknown setting": (asking(vlmzip={"method": "visionzip(kep=1)"}), 400, "visionzip has no field 'kep'"),
    "a setting of a wrong type": (asking(vlmzip={"method": "pool2d(factor=x)"}), 400, "factor"),
    "a setting that takes long": (asking(vlmzip={"method": "kmeans(iterations=20_000)"}), 400, "not iterations"),
    "another that takes long": (asking(vlmzip={"method": "zoo_prune(directions=1_0_000)"}), 400, "not directions"),
    "a large budget": (asking(vlmzip={"method": "visionzip(keep=9_999_999)"}), 400, "must be at most 4096"),
    "a large budget in a chain": (asking(vlmzip={"method": "dfmr+fastv(keep=5000)"}), 400, "must be at most 4096"),
    "a large factor": (asking(vlmzip={"method": "pool2d(factor=1_000_000)"}), 400, "must be at most 4096"),
    "large counts": (asking(vlmzip={"method": "sparsevlm(counts=9999,1,1)"}), 400, "must be at most 4096"),
    "a method without a name": (
        asking(vlmzip={"method": ""}), 400, 'method; write a name, with settings or other methods if you like: vis',
    ),
    "a saved method": (
        asking(vlmzip={"method": "compressor.json"}), 400, "unknown method 'compressor.json'; choose one",
    ),
    "a large keep": (asking(vlmzip={"keep": 10**400}), 400, "must be at most 4096"),
    "a large keep of text": (asking(vlmzip={"keep": "99999"}), 400, "must be at most 4096"),
    "a keep in other digits": (asking(vlmzip={"keep": "٣"}), 400, "keep must be a number, got '٣'"),
    "a keep in wide digits": (asking(vlmzip={"keep": "１６"}), 400, "keep must be a number, got '１６'"),
    "a huge number": (b'{"model": "mini", "vlmzip": {"keep": 1' + b"0" * 9000 + b"}}", 400, ""),
    "a method in a file": (asking(vlmzip={"method": "/etc/passwd"}), 400, "unknown method '/etc/passwd'"),
    "a method in this folder": (asking(vlmzip={"method": "tests"}), 400, "unknown method 'tests'"),
    "a method in a module": (asking(vlmzip={"method": "os:system"}), 400, "unknown method 'os:system'"),
    "a method with weights": (asking(vlmzip={"method": "qformer"}), 400, "has trained weights"),
    "a negative keep": (asking(vlmzip={"keep": -1}), 400, "keep=-1 keeps nothing"),
    "a keep above 1": (asking(vlmzip={"keep": 1.5}), 400, "keep must be a fraction in (0, 1], got 1.5"),
    "a keep of text": (asking(vlmzip={"keep": "many"}), 400, "keep must be a number, got 'many'"),
    "a keep that is true": (asking(vlmzip={"keep": True}), 400, "vlmzip.keep must be a number such as 64"),
    "two budgets": (asking(vlmzip={"method": "visionzip(keep=4)", "keep": 8}), 400, "give one of them"),
    "a budget that decides nothing": (
        asking(vlmzip={"method": "dfmr", "keep": 8}),
        400,
        "depends on the images; leave out keep, or set tau in method: dfmr(tau=0.3)",
    ),
    "a layer that is not there": (asking(vlmzip={"method": "fastv(layer=99)"}), 400, "layer must be from 1 to 7"),
    "an unknown choice": (asking(vlmzip={"budget": 8}), 400, "unknown field 'budget'; choose one of keep, method"),
    "nested lists": (deep(100_000), 400, "the body is not valid JSON"),
    "no JSON": (b"hello", 400, "the body is not valid JSON"),
    "a list": (b"[]", 400, "the body must be an object such as {\"model\": …"),
    "nothing": (b"", 400, "the body is not valid JSON"),
    "bytes that are no text": (b"\xff\xfe", 400, "the body is not valid JSON"),
    "no finite temperature": (
        b'{"model": "mini", "messages": [{"role": "user", "content": "a"}], "temperature": NaN}', 400, "be a finite",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BODIES)
def test_a_wrong_request_gets_a_reason(http, case):
    body, status, message = BODIES[case]
    how = {"content": body} if isinstance(body, bytes) else {"json": body}
    answer = http.post("/v1/chat/completions", headers={"Content-Type": "application/json"}, **how)
    error = answer.json()["error"]
    assert (answer.status_code, message in error["message"]) == (status, True), error
    assert error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}
    assert len(answer.content) < 1000
    assert "Traceback" not in answer.text


def test_the_server_still_answers(http):
    assert http.post("/v1/chat/completions", json=asking()).json()["choices"][0]["message"]["content"] == "orange"


def test_a_method_of_an_answer_can_be_sent_back(mini):
    """Budgets can have many digits, and settings of the server's own method can be repeated."""
    engine = HuggingFaceEngine(mini, KMeans(keep=0.3333333, iterations=5000), Settings(), Metrics())
    for choice in (None, "visionzip(keep=0.44444)", "fastv(keep=0.55556)", "random_tokens(seed=7,keep=9)"):
        body = asking(vlmzip={"method": choice})
        count = engine.prepare(read_request(json.dumps(body).encode())).count
        body["vlmzip"]["method"] = count.method
        assert engine.prepare(read_request(json.dumps(body).encode())).count == count


def test_the_client_raises_its_own_error(client):
    with pytest.raises(openai.BadRequestError, match="n must be 1") as error:
        client.chat.completions.create(model="mini", messages=[user(QUESTION)], n=2)
    assert (error.value.param, error.value.code) == ("n", "unsupported_value")


def test_what_changes_nothing_is_accepted(http):
    fields = {"n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "tools": [], "logprobs": False, "user": "me"}
    fields |= {"response_format": {"type": "text"}, "stop": None, "stream": False, "store": True, "vlmzip": {}}
    fields |= {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "best_of": 1}
    fields |= {"reasoning_effort": None, "verbosity": None, "prediction": None, "web_search_options": None}
    streamed = {"stream": True, "stream_options": {"include_obfuscation": False}}
    assert http.post("/v1/chat/completions", json=asking(**streamed)).status_code == 200
    assert http.head("/health").status_code == 200
    assert http.post("/v1/chat/completions", json=asking(**fields)).status_code == 200
    body = asking(vlmzip=None)
    for detail in (None, "auto", "low", "high", "original"):
        body["messages"][0]["content"][0]["image_url"]["detail"] = detail
        assert http.post("/v1/tokens", json=body).json()["visual_tokens"]["after"] == 16


def test_methods_of_other_models_are_not_suggested(http):
    message = http.post("/v1/tokens", json=asking(vlmzip={"method": "none"})).json()["error"]["message"]
    assert " visionzip," in message
    assert " no_compression," in message
    assert not any(f" {name}," in message for name in ("qformer", "evs", "vidcom2", "pixelprune"))


def test_paths_and_kinds(http):
    message = http.get("/v1/nothing").json()["error"]["message"]
    assert message.startswith("GET /v1/nothing: not found; this server has POST /v1/chat/completions, POST")
    assert http.get("/").json()["paths"][0] == "POST /v1/chat/completions"
    plain = http.post("/v1/chat/completions", content=b"{}", headers={"Content-Type": "text/plain"})
    assert (plain.status_code, "must be JSON" in plain.json()["error"]["message"]) == (415, True)
    assert http.post("/v1/completions", content=b"{}").status_code == 404


@pytest.mark.parametrize(
    "path", ["chat/completions", "tokens", "chat/completions%0A", "tokens%0A", "tokens/", "%74okens"]
)
@pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data", "application/x-www-form-urlencoded", ""])
def test_no_path_takes_what_another_site_can_send(http, path, kind):
    headers = {"Content-Type": kind, "Origin": "https://example.org"}
    body = json.dumps(asking()).encode()
    answer = http.post(f"/v1/{path}", content=body, headers=headers, follow_redirects=True)
    assert answer.status_code in (404, 415)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/chat/completions", "POST"), ("DELETE", "/v1/tokens", "POST"), ("POST", "/v1/models", "GET, HEAD"),
        ("PUT", "/v1/models/mini", "GET, HEAD"), ("POST", "/health", "GET, HEAD"), ("OPTIONS", "/", "GET, HEAD"),
        ("PATCH", "/metrics", "GET, HEAD"),
    ],
)  # fmt: skip
def test_a_path_with_another_method(http, method, path, allowed):
    answer = http.request(method, path, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
    message = f"{method} {path}: method not allowed; use {allowed.replace(', ', ' or ')}"
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    assert answer.json() == {"error": error}


@pytest.mark.parametrize("path", ["/", "/health", "/metrics", "/v1/models", "/v1/models/mini", "/v1/models/other"])
def test_head_has_the_headers_of_get(http, path):
    read, head = http.get(path), http.head(path)
    assert (head.status_code, head.headers["content-type"]) == (read.status_code, read.headers["content-type"])
    assert head.content == b""


def test_operations_have_ids_of_their_own(engine):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths = create_app(engine).openapi()["paths"]
    named = {f"{method.upper()} {path}" for path, operations in paths.items() for method in operations}
    assert named == {*PATHS, "GET /", "GET /v1/models/{name}"}
    ids = [operation["operationId"] for operations in paths.values() for operation in operations.values()]
    assert len(ids) == len(set(ids)) == len(named)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_formats(http, kind):
    flat = Image.open(io.BytesIO(encoded(Image.new("RGB", (60, 40), "red")))).convert("RGB")
    answer = http.post("/v1/chat/completions", json=with_image(data_url(encoded(flat, kind), kind.lower())))
    assert answer.status_code == 200


def test_limits_of_the_operator(mini):
    limits = Settings(max_body=5_000, api_key="secret", upload_seconds=0.5)
    with serving(engine_of(mini, limits), limits) as address, httpx.Client(base_url=address, timeout=10) as http:
        assert http.get("/health").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            answer = http.post("/v1/chat/completions", json=asking("a"), headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
            assert http.get("/metrics", headers=headers).status_code == 401
        http.headers["Authorization"] = "Bearer secret"
        assert http.get("/v1/models").status_code == 200
        large = http.post("/v1/chat/completions", json=asking("a" * 6_000, plain_image("red")))
        assert (large.status_code, "more than 5,000 bytes" in large.json()["error"]["message"]) == (413, True)
        chunks = (b"a" * 1000 for _ in range(9))  # without a Content-Length
        large = http.post("/v1/chat/completions", content=chunks, headers={"Content-Type": "application/json"})
        assert large.status_code == 413
        slow = http.post("/v1/chat/completions", content=slowly(), headers={"Content-Type": "application/json"})
        assert (slow.status_code, "did not arrive" in slow.json()["error"]["message"]) == (408, True)


@pytest.mark.parametrize(
    ("host", "key", "named", "status"),
    [
        ("127.0.0.1", None, "evil.example", 403), ("localhost", None, "evil.example:8000", 403),
        ("127.0.0.1", None, "localhost", 200), ("::1", None, "[::1]:8000", 200), ("127.0.0.2", None, "127.0.0.2", 200),
        ("127.0.0.1", "secret", "my.example", 401), ("0.0.0.0", None, "my.example", 200),
    ],
)  # fmt: skip
def test_other_names_do_not_stand_for_this_machine(engine, host, key, named, status):
    """A page of another site cannot use a server without a key by giving it the page's name."""
    guard = create_app(engine, Settings(host=host, api_key=key))

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(guard), base_url="http://x") as client:
            return await client.get("/v1/models", headers={"Host": named, "Origin": f"http://{named}"})

    assert asyncio.run(ask()).status_code == status


def slowly():
    yield b"{"
    time.sleep(1)
    yield b"}"


PLACEHOLDERS = {"<|image_pad|>", "<|7|>", "<|8|>"}


@pytest.mark.parametrize(
    ("template", "expected"), [("a template", PLACEHOLDERS), (None, PLACEHOLDERS | {"<image>", "<video>"})]
)
def test_a_text_must_not_contain_what_stands_for_images(template, expected):
    """`<image>` is plain text for a model whose template writes something else."""
    tokenizer = SimpleNamespace(convert_ids_to_tokens=lambda number: f"<|{number}|>")
    family = SimpleNamespace(modalities=[SimpleNamespace(placeholder_id=7), SimpleNamespace(placeholder_id=8)])
    processor = SimpleNamespace(
        tokenizer=tokenizer, chat_template=template, image_token="<|image_pad|>", video_token=None
    )
    assert placeholders_of(family, processor) == expected
