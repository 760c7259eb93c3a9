"""Requests about images of a store, by their names."""

import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from tests.serving.server.running import EXAMPLES, QUESTION, asking, image_url, serving, user
from vlmzip.methods import VisionZip
from vlmzip.runtime.answering import Answerer
from vlmzip.runtime.attach import attach
from vlmzip.runtime.images import load_image
from vlmzip.serving.server.metrics import Metrics
from vlmzip.serving.server.settings import Settings
from vlmzip.serving.server.worker import HuggingFaceEngine

pytest.importorskip("pyarrow")

from vlmzip.serving.store.reading import Store
from vlmzip.serving.store.writing import write_store

NAMES = ["flat.png", "first.png", "cluttered.png"]
STORED = VisionZip(keep=36)


@pytest.fixture(scope="module")
def folder(mini, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    write_store(EXAMPLES, folder, mini, STORED, batch=1)
    return folder


@pytest.fixture(scope="module")
def engine(mini, folder):
    """The server's own method is another one than the store's."""
    return HuggingFaceEngine(mini, VisionZip(keep=16), Settings(max_images=4), Metrics(), store=Store(folder))


def answer_of(mini, method, names):
    images = [load_image(EXAMPLES / name) for name in names]
    with attach(mini.model, method) as compressed:
        (answer,) = Answerer(mini.family, mini.processor).answer(compressed, images, [QUESTION], 32)
    return answer


def asked(client, names, **fields):
    messages = [user(QUESTION, *(f"store:{name}" for name in names))]
    return client.chat.completions.create(model="mini", messages=messages, extra_body=fields)


@pytest.mark.parametrize("names", [NAMES[:1], NAMES[1:]])
def test_answers_are_those_about_the_images(client, mini, monkeypatch, names):
    expected = answer_of(mini, STORED, names)
    monkeypatch.setattr(mini.family.vision_encoder, "forward", None)  # a call would raise an error
    reply = asked(client, names)
    assert reply.choices[0].message.content == expected.text
    count = 36 * len(names)
    assert reply.usage.prompt_tokens == expected.text_tokens + count
    assert reply.usage.vlmzip["visual_tokens"] == {"before": 144 * len(names), "after": count, "last_layer": count}


def test_the_request_of_the_page_is_answered(http):
    page = (EXAMPLES.parent / "docs" / "store.md").read_text()
    (body,) = re.findall(r"<<'EOF'\n(.*?)\nEOF", page, flags=re.S)
    reply = http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert reply.json()["choices"][0]["message"]["content"] == "orange"


def test_a_method_inside_the_llm_can_follow(client, mini):
    method = "visionzip(keep=36)+fastv(keep=9,layer=3)"
    reply = asked(client, NAMES[:1], vlmzip={"method": method})
    assert reply.choices[0].message.content == answer_of(mini, method, NAMES[:1]).text
    assert reply.usage.vlmzip["visual_tokens"] == {"before": 144, "after": 36, "last_layer": 9}


def test_requests_about_stored_images_are_answered_together(client, http, mini, caplog):
    def batches():
        lines = dict(line.rsplit(" ", 1) for line in http.get("/metrics").text.splitlines() if line[0] != "#")
        return float(lines["vlmzip_batch_size_count"])

    before = batches()
    with ThreadPoolExecutor(6) as threads:
        replies = list(threads.map(lambda name: asked(client, [name]), NAMES * 4))
    assert batches() - before < len(replies)
    assert "answered alone" not in caplog.text  # a batch that fails is answered one by one
    expected = [answer_of(mini, STORED, [name]).text for name in NAMES]
    assert [reply.choices[0].message.content for reply in replies] == expected * 4
    assert asked(client, NAMES[:1]).choices[0].message.content == expected[0]


def test_images_in_requests_are_answered_beside_the_store(client, mini):
    reply = client.chat.completions.create(model="mini", messages=[user(QUESTION, image_url())])
    assert reply.usage.vlmzip["visual_tokens"]["after"] == 16


def test_tokens_are_counted_before(http):
    counts = http.post("/v1/tokens", json=asking(QUESTION, "store:flat.png")).json()
    assert counts["visual_tokens"] == {"before": 144, "after": 36, "last_layer": 36}
    assert counts["method"] == "visionzip(keep=36)"


@pytest.mark.parametrize(
    ("urls", "fields", "status", "message"),
    [
        (["store:dog.png"], {}, 404, "has no image 'dog.png'"),
        (["store:flat.pgn"], {}, 404, "the store has no image 'flat.pgn'"),
        (["store:"], {}, 404, "has no image ''"),
        (["store:../examples/flat.png"], {}, 404, "has no image '../examples/flat.png'"),
        (["store:/etc/passwd"], {}, 404, "has no image '/etc/passwd'"),
        (["store:index.parquet"], {}, 404, "has no image"),
        (["STORE:flat.png"], {}, 400, "image 1 must be a URL like data:image/png"),
        (["store:flat.png", image_url()], {}, 400, "stored images and others; send them in separate requests"),
        (["store:flat.png"] * 5, {}, 400, "the request has 5 images; the limit is 4"),
        (["store:flat.png"], {"vlmzip": {"keep": 9}}, 400, r"by visionzip(keep=36): leave out method and keep"),
        (["store://flat.png"], {}, 404, "the store has no image '//flat.png'; write store:flat.png, without //"),
        (["store:flat.png"], {"vlmzip": {"method": "dfmr"}}, 400, '{"method": "visionzip(keep=36)+fastv(keep=9)"}'),
        (
            ["store:flat.png"],
            {"vlmzip": {"method": "fastv(positions=original)"}},
            400,
            '{"method": "visionzip(keep=36)+fastv(keep=9)"}',
        ),
        (
            ["store:flat.png"],
            {"vlmzip": {"method": "fastv(layer=3)", "keep": 12}},
            400,
            '{"method": "visionzip(keep=36)+fastv(keep=12,layer=3)"}',
        ),
    ],
)
def test_refusals(http, folder, urls, fields, status, message):
    reply = http.post("/v1/chat/completions", json=asking(QUESTION, *urls, **fields))
    assert reply.status_code == status
    assert message in reply.json()["error"]["message"]
    # Paths and the names of other images are for the operator only.
    assert not any(part in reply.text for part in (str(folder), "did you mean", "first.png"))


def test_a_damaged_image_is_the_fault_of_the_server(mini, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    shard = copy / "shards" / "000000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    store = Store(copy)
    (name,) = [damage.path for damage in store.damaged() if damage is not None]
    engine = HuggingFaceEngine(mini, STORED, Settings(), Metrics(), store=store)
    with serving(engine, Settings()) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.InternalServerError, match="is damaged"):
            asked(client, [name])
        (whole, *_) = [other for other in NAMES if other != name]
        assert asked(client, [whole]).choices[0].message.content


@pytest.mark.slow  # it starts a process
@pytest.mark.parametrize(("options", "after"), [([], 36), (["--keep", "9"], 9)])
def test_the_command_serves_a_store(folder, options, after):
    """The method of the server is the store's unless another one is given for images in requests."""
    command = [sys.executable, "-m", "vlmzip.cli.main", "serve", "--port", "0", "--store", str(folder), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        ready = server.stdout.readline()
        address = ready.split()[-1]
        assert ready == f"mini with visionzip(keep={after}) and 3 stored images at {address}\n"
        client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)
        assert asked(client, NAMES[:1]).usage.vlmzip["visual_tokens"]["after"] == 36
        direct = client.chat.completions.create(model="mini", messages=[user(QUESTION, image_url())])
        assert direct.usage.vlmzip["visual_tokens"]["after"] == after
        server.terminate()


def test_a_server_without_a_store_says_so(mini):
    engine = HuggingFaceEngine(mini, STORED, Settings(), Metrics())
    with serving(engine, Settings()) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.BadRequestError, match="this server has no store of images"):
            asked(client, NAMES[:1])
