"""Clients that leave, read slowly or wait too long, and an engine that ends while they wait."""

import gc
import json
import socket
import threading
import time
import weakref
from contextlib import contextmanager
from urllib.parse import urlsplit

import httpx
import pytest

from tests.serving.server.running import asking, engine_of, serving
from vlmzip.serving.server.batch import Batch
from vlmzip.serving.server.metrics import Metrics
from vlmzip.serving.server.row import Row
from vlmzip.serving.server.schema import ImageURL
from vlmzip.serving.server.settings import Settings

#: Settings of an answer that the fixture `endless` repeats.
ENDLESS = {"temperature": 1, "max_tokens": 400}


@contextmanager
def served(mini, **limits):
    settings, metrics = Settings(**limits), Metrics()
    engine = engine_of(mini, settings, metrics)
    with serving(engine, settings, metrics) as address, httpx.Client(base_url=address, timeout=30) as http:
        yield engine, http, metrics


def value(metrics, name, **labels):
    return metrics.registry.get_sample_value(name, labels) or 0


def wait_until(happens, seconds=20):
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@pytest.fixture
def endless(mini, monkeypatch):
    """Sampled answers repeat a word until their longest length; `steps` counts the tokens of all rows."""
    token = mini.processor.tokenizer.convert_tokens_to_ids("red")
    steps = []
    choose = Row.choose
    monkeypatch.setattr(
        Row, "choose", lambda row, scores: choose(row, scores) if row.is_greedy else steps.append(1) or token
    )
    return steps


def raw(http, body):
    """A connection that has sent a request and reads nothing."""
    url = urlsplit(str(http.base_url))
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    connection.connect((url.hostname, url.port))
    content = json.dumps(body).encode()
    head = ["POST /v1/chat/completions HTTP/1.1", "Host: x", "Content-Type: application/json"]
    head += [f"Content-Length: {len(content)}", "", ""]
    connection.sendall("\r\n".join(head).encode() + content)
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_costs_no_further_tokens(mini, endless, stream):
    with served(mini) as (engine, http, metrics):
        connection = raw(http, asking(stream=stream, **ENDLESS))
        wait_until(lambda: len(endless) > 4)  # the last of them may not have been added to the answer yet
        connection.close()
        engine.call(int).result(20)  # the batch has ended
        assert len(endless) < 300
        # What was made counts, although nobody has read it.
        wait_until(lambda: value(metrics, "vlmzip_time_to_first_token_seconds_count") == 1)
        assert value(metrics, "vlmzip_generated_tokens_total") > 3
        if stream:
            wait_until(lambda: value(metrics, "vlmzip_broken_streams_total", reason="client gone") == 1)
        else:
            gone = dict(path="/v1/chat/completions", status="499")
            wait_until(lambda: value(metrics, "vlmzip_requests_total", **gone) == 1)


def test_a_slow_client_starves_nobody(mini, endless):
    with served(mini) as (_, http, _):
        slow = [raw(http, asking(stream=True, **{**ENDLESS, "max_tokens": 60})) for _ in range(4)]
        start = time.monotonic()
        for _ in range(3):
            answer = http.post("/v1/chat/completions", json=asking())
            assert answer.json()["choices"][0]["message"]["content"] == "orange"
        assert time.monotonic() - start < 30
        for connection in slow:
            connection.close()


def test_a_stream_that_is_not_read_ends_at_its_deadline(mini, endless, monkeypatch):
    """The rest of a large answer waits for the client, but not for ever."""
    monkeypatch.setattr(Row, "text", property(lambda row: "red " * 20_000 * row.count))
    with served(mini, max_seconds=2) as (_, http, metrics):
        connection = raw(http, asking(stream=True, **ENDLESS))
        wait_until(lambda: value(metrics, "vlmzip_broken_streams_total", reason="timeout") == 1)
        connection.close()
        assert http.get("/health").json() == {"status": "ok", "waiting": 0}


def test_a_request_that_takes_too_long(mini, endless):
    with served(mini, max_seconds=1) as (engine, http, _):
        held = threading.Event()
        engine.call(held.wait)
        answer = http.post("/v1/chat/completions", json=asking())
        held.set()
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        assert "not answered within 1 second" in answer.json()["error"]["message"]
        engine.call(int).result(20)
        assert not endless


def test_overload_is_refused_with_a_time_to_retry(mini):
    with served(mini, max_queue=2) as (engine, http, _):
        held = threading.Event()
        engine.call(held.wait)
        answers = []

        def ask():
            answers.append(http.post("/v1/chat/completions", json=asking()))

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(answers) == 4)
        held.set()
        for thread in threads:
            thread.join()
        assert sorted(answer.status_code for answer in answers) == [200, 200, 429, 429, 429, 429]
        refused = [answer for answer in answers if answer.status_code == 429]
        assert {answer.headers["retry-after"] for answer in refused} == {"1"}
        assert {answer.json()["error"]["type"] for answer in refused} == {"rate_limit_error"}


def test_clients_that_have_gone_leave_the_queue(mini):
    with served(mini, max_queue=2) as (engine, http, _):
        held = threading.Event()
        engine.call(held.wait)
        connections = [raw(http, asking()) for _ in range(2)]
        wait_until(lambda: engine.waiting == 2)
        for connection in connections:
            connection.close()
        wait_until(lambda: http.get("/health").json()["waiting"] == 0)
        threading.Timer(0.2, held.set).start()
        assert http.post("/v1/chat/completions", json=asking()).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_leaves_its_images_to_the_engine(mini, endless, stream):
    """Neither body nor inputs stay in memory until a slow client has read its answer."""
    with served(mini) as (engine, http, _):
        held = threading.Event()
        engine.call(held.wait)
        connection = raw(http, asking(stream=stream, **ENDLESS))
        wait_until(lambda: engine.waiting == 1)
        kept = weakref.ref(engine._queue[0].request)
        try:
            gc.collect()
            assert [each for each in gc.get_objects() if isinstance(each, ImageURL)] == []
            engine._queue.clear()
            assert kept() is None
        finally:
            held.set()
            connection.close()


def test_an_engine_that_ends_is_told_to_all(mini, monkeypatch):
    def die(batch):
        raise SystemExit(1)

    monkeypatch.setattr(Batch, "run", die)
    with served(mini) as (_, http, _):
        assert http.get("/health").status_code == 200
        answer = http.post("/v1/chat/completions", json=asking())
        assert (answer.status_code, answer.json()["error"]["message"]) == (503, "the engine has stopped")
        wait_until(lambda: http.get("/health").status_code == 503)
        assert http.get("/health").json()["status"] == "the engine has stopped"
        assert http.post("/v1/chat/completions", json=asking()).status_code == 503


def test_a_defect_is_counted_as_500(mini, monkeypatch):
    def fail(*arguments):
        raise ZeroDivisionError

    with served(mini) as (engine, http, metrics):
        monkeypatch.setattr(engine, "prepare", fail)
        assert http.post("/v1/chat/completions", json=asking()).status_code == 500
        for status, count in (("500", 1), ("499", 0)):
            labels = dict(path="/v1/chat/completions", status=status)
            assert value(metrics, "vlmzip_requests_total", **labels) == count


def test_an_answer_that_fails_in_the_middle_of_a_stream(mini, endless, monkeypatch):
    take = Batch._take

    def fail(batch, tokens):
        if len(endless) > 2:
            raise RuntimeError("secret detail")
        return take(batch, tokens)

    monkeypatch.setattr(Batch, "_take", fail)
    with served(mini) as (_, http, metrics):
        lines = http.post("/v1/chat/completions", json=asking(stream=True, **ENDLESS)).text.split("\n\n")
        events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
        assert [event["choices"][0]["delta"].get("content") for event in events[:-1]][:2] == ["", "red"]
        assert events[-1]["error"]["message"] == "the model failed on this request"
        assert lines[-2] == "data: [DONE]"
        wait_until(lambda: value(metrics, "vlmzip_broken_streams_total", reason="error") == 1)


def test_metrics(mini):
    with served(mini) as (_, http, _):
        for stream in (False, True):
            http.post("/v1/chat/completions", json=asking(stream=stream))
        http.get("/nothing/at/all")
        lines = http.get("/metrics").text.splitlines()
    for line in (
        'vlmzip_visual_tokens_total{method="visionzip",when="before"} 288.0',
        'vlmzip_visual_tokens_total{method="visionzip",when="after"} 32.0',
        'vlmzip_requests_total{path="/v1/chat/completions",status="200"} 2.0',
        'vlmzip_requests_total{path="other",status="404"} 1.0',
        "vlmzip_time_to_first_token_seconds_count 2.0",
        "vlmzip_queue_wait_seconds_count 2.0",
        "vlmzip_batch_size_sum 2.0",
        "vlmzip_queue_length 0.0",
    ):
        assert line in lines, line
