"""Requests that wait at the same time are answered together, each as alone; what goes wrong stays with its request."""

import asyncio
import gc
import json
import threading
import weakref
from contextlib import contextmanager

import pytest
import torch

from tests.serving.server.running import QUESTION, asking, data_url, encoded, engine_of, image_url
from vlmzip.errors import UserError
from vlmzip.methods import VisionZip
from vlmzip.mini.splits import test_split as questions_of_mini
from vlmzip.runtime.answering import Answerer
from vlmzip.runtime.attach import attach
from vlmzip.serving.server import worker
from vlmzip.serving.server.batch import Batch
from vlmzip.serving.server.errors import RequestError
from vlmzip.serving.server.metrics import Metrics
from vlmzip.serving.server.progress import Progress
from vlmzip.serving.server.schema import read_request
from vlmzip.serving.server.settings import Settings

SETTINGS = Settings(max_batch=64)


@contextmanager
def running(mini, settings=SETTINGS, died=lambda: None):
    """Yield an engine, and a function that answers requests which all wait before the first is answered."""
    metrics = Metrics()
    engine = engine_of(mini, settings, metrics)
    engine.start(died)

    def answers(bodies, cancelled=(), leaving=()):
        async def all_answers():
            begun, held = threading.Event(), threading.Event()
            engine.call(lambda: (begun.set(), held.wait()))
            begun.wait(60)  # until then, the engine may still hold the batch before
            progress = [Progress(asyncio.get_running_loop()) for _ in bodies]
            try:
                for body, each in zip(bodies, progress, strict=True):
                    engine.submit(engine.prepare(read_request(json.dumps(body).encode())), each)
                for number in cancelled:
                    progress[number].cancel()
            finally:
                held.set()
            waiting = [p.ended() for number, p in enumerate(progress) if number not in {*cancelled, *leaving}]
            await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 60)
            return progress

        return asyncio.run(all_answers())

    answers.metrics = metrics
    try:
        yield engine, answers
    finally:
        engine.stop()


def sizes(answers):
    """The number of batches and of the requests in them."""
    values = {sample.name: sample.value for sample in answers.metrics.batch_size.collect()[0].samples}
    return values["vlmzip_batch_size_count"], values["vlmzip_batch_size_sum"]


@pytest.fixture(scope="module")
def questions():
    return questions_of_mini(16)


def test_a_batch_is_answered_as_each_request_alone(mini, questions):
    bodies = [asking(q.question, data_url(encoded(q.image))) for q in questions]
    with attach(mini.model, VisionZip(keep=16)) as compressed:
        answerer = Answerer(mini.family, mini.processor)
        alone = [answerer.answer(compressed, [q.image], [q.question], 512)[0] for q in questions]
    with running(mini) as (_, answers):
        together = answers(bodies)
        assert sizes(answers) == (1, len(bodies))
    assert [each.text for each in together] == [each.text for each in alone]
    assert [each.usage.new_tokens for each in together] == [each.new_tokens for each in alone]
    assert [each.usage.text_tokens for each in together] == [each.text_tokens for each in alone]
    assert len({each.text for each in alone}) > 5


METHODS = ["dfmr", "fastv(layer=3,keep=20)"]
FURTHER = [pytest.param(method, marks=pytest.mark.slow) for method in ("pyramiddrop", "dfmr+fastv(layer=4)")]


@pytest.mark.parametrize("method", METHODS + FURTHER)
def test_methods_in_a_batch(mini, questions, method):
    bodies = [asking(q.question, data_url(encoded(q.image)), vlmzip={"method": method}) for q in questions[:6]]
    with running(mini) as (_, answers):
        together = answers(bodies)
        alone = [answers([body])[0] for body in bodies]
    assert [(each.text, each.usage) for each in together] == [(each.text, each.usage) for each in alone]


def test_each_request_of_a_batch_has_its_own_settings(mini, questions):
    """Lengths, stop texts, temperatures, seeds, numbers of images."""
    texts = [data_url(encoded(q.image)) for q in questions[:4]]
    fields = [
        {"max_tokens": 1}, {"max_tokens": 3}, {}, {"stop": "a"}, {"stop": ["r", "ng"]},
        {"temperature": 1.5, "seed": 7}, {"temperature": 1.5, "seed": 8}, {"temperature": 2, "top_p": 0.8, "seed": 9},
    ]  # fmt: skip
    bodies = [asking(QUESTION, *texts[: n % 3 + 1], **more) for n, more in enumerate(fields)]
    with running(mini) as (_, answers):
        together = answers(bodies)
        assert sizes(answers) == (1, len(bodies))
        alone = [answers([body])[0] for body in bodies]
        again = answers(bodies)
    for each, single, repeated in zip(together, alone, again, strict=True):
        assert (each.text, each.reason, each.usage) == (single.text, single.reason, single.usage)
        assert each.text == repeated.text
    assert together[0].reason == "length"
    assert together[0].usage.new_tokens == 1


def test_other_methods_wait_for_the_next_batch(mini):
    methods = ["pool2d", "dfmr", "pool2d", "visionzip", "dfmr"]
    with running(mini) as (_, answers):
        answers([asking(vlmzip={"method": method}) for method in methods])
        assert sizes(answers) == (3, 5)


def test_a_request_that_fails_does_not_affect_its_batch(mini, monkeypatch):
    """A batch that fails is answered one by one, and texts go on where they stopped."""
    run, tried = Batch.run, []

    def fails(batch):
        tried.append(len(batch._requests))
        if any(request.sampling.seed == 13 for request in batch._requests):
            if len(batch._requests) > 1:
                batch._progress[0].write("o")  # the first part of "orange"
            raise UserError("this one is at fault") if tried[-1] > 1 else RuntimeError("secret detail")
        run(batch)

    monkeypatch.setattr(Batch, "run", fails)
    with running(mini) as (_, answers):
        good, bad, other = answers([asking(), asking(seed=13), asking()])
    assert tried == [3, 1, 1, 1]
    assert (good.text, other.text) == ("orange", "orange")
    assert (bad.error.status, bad.error.message) == (500, "the model failed on this request")


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UserError("too many views"), 400, "too many views"),
        (torch.OutOfMemoryError("CUDA out of memory"), 503, "the memory is full"),
        (MemoryError(), 503, "the memory is full"),
        (ValueError("/etc/secret"), 500, "the model failed on this request"),
    ],
)
def test_errors_of_the_model(mini, monkeypatch, error, status, message):
    def fail(batch):
        raise error

    with running(mini) as (engine, answers):
        with monkeypatch.context() as patched:
            patched.setattr(Batch, "run", fail)
            (failed,) = answers([asking()])
        assert failed.error.status == status
        assert message in failed.error.message
        assert engine.trouble() is None
        assert answers([asking()])[0].text == "orange"


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: device-side assert triggered"), SystemExit(1)])
def test_an_engine_that_dies_says_so_and_answers_all(mini, monkeypatch, error):
    def die(batch):
        raise error

    dead = threading.Event()
    monkeypatch.setattr(Batch, "run", die)
    with running(mini, died=dead.set) as (engine, answers):
        failed = answers([asking(), asking(vlmzip={"method": "pool2d"})])
        assert [each.error.status for each in failed] == [503, 503]
        assert dead.wait(10)
        engine._thread.join(10)
        assert engine.trouble() == "the engine has stopped"
        with pytest.raises(RequestError, match="the engine has stopped"):
            engine.submit(engine.prepare(read_request(json.dumps(asking()).encode())), None)


def test_an_engine_that_is_stuck_says_so(mini, monkeypatch):
    with running(mini) as (engine, _):
        assert engine.trouble() is None
        engine._beat_at = worker.monotonic() - 1000
        assert engine.trouble() == "the model has made no token for 240 seconds"
        engine._beat_at = None


def test_cancelled_requests_are_not_answered(mini):
    with running(mini) as (_, answers):
        progress = answers([asking(), asking(), asking()], cancelled=[0, 2])
        assert [each.text for each in progress] == ["", "orange", ""]
        assert sizes(answers) == (1, 1)


def test_a_cancelled_answer_ends(mini, monkeypatch):
    """A client that has gone costs no further tokens: a batch ends when nobody waits for its longest answer."""
    take, steps = Batch._take, []

    def gone_after_the_first(batch, tokens):
        steps.append(len(tokens))
        batch._progress[1].cancel()
        return take(batch, tokens)

    monkeypatch.setattr(Batch, "_take", gone_after_the_first)
    monkeypatch.setattr("vlmzip.serving.server.row.Row.choose", lambda row, scores: 40)  # an answer without end
    endless = asking(temperature=1, max_tokens=300)
    with running(mini) as (engine, answers):
        other = answers([asking(temperature=1, max_tokens=3), endless], leaving=[1])[0]
        engine.call(int).result(30)  # waits for the end of the batch
    assert (other.reason, steps) == ("length", [2, 2, 2])


def test_the_queue_is_bounded(mini):
    with running(mini, Settings(max_queue=2)) as (_, answers), pytest.raises(RequestError) as error:
        answers([asking()] * 3)
    assert error.value.message == "too many requests are waiting (2); try again later"
    assert (error.value.status, error.value.headers) == (429, {"Retry-After": "1"})


def test_the_memory_of_waiting_requests_is_bounded(mini):
    """The inputs of one image can be a thousand times its body. One request alone is always taken."""
    one = engine_of(mini, SETTINGS).prepare(read_request(json.dumps(asking()).encode())).nbytes
    assert one > 4 * 96 * 96
    with running(mini, Settings(max_inputs=2 * one + 1)) as (_, answers):
        assert [each.text for each in answers([asking()] * 2)] == ["orange"] * 2
        with pytest.raises(RequestError, match="too many large images are waiting") as error:
            answers([asking()] * 3)
        assert error.value.status == 429
    with running(mini, Settings(max_inputs=1)) as (_, answers):
        assert answers([asking()])[0].text == answers([asking()])[0].text == "orange"


@pytest.mark.parametrize(("batch", "batches"), [(2.5, 2), (0, 4)])
def test_the_memory_of_a_batch_is_bounded(mini, batch, batches):
    one = engine_of(mini, SETTINGS).prepare(read_request(json.dumps(asking()).encode())).nbytes
    with running(mini, Settings(batch_inputs=int(batch * one))) as (_, answers):
        assert [each.text for each in answers([asking()] * 4)] == ["orange"] * 4
        assert sizes(answers) == (batches, 4)


def test_only_the_last_methods_stay_attached(mini, monkeypatch):
    monkeypatch.setattr(worker, "MOST_ATTACHED", 2)
    with running(mini) as (engine, answers):
        for keep in (1, 2, 3, 4):
            answers([asking(vlmzip={"method": "fastv", "keep": keep})])
        assert [method.keep for method in engine._attached] == [3, 4]
        for compressed in engine._attached.values():
            compressed.detach()


def test_answers_leave_nothing_behind(mini):
    with running(mini) as (engine, answers):
        progress = answers([asking(), asking()])
        kept = [weakref.ref(each) for each in progress]
        del progress
        answers([asking()])
        gc.collect()
        assert [ref() for ref in kept] == [None, None]
        assert engine.waiting == 0


@pytest.mark.parametrize("method", ["visionzip", "divprune", "random_tokens"])
def test_all_tokens_and_one_token_are_answered_apart(mini, method):
    """In Python, 1.0 equals 1."""
    bodies = [asking(QUESTION, image_url(), vlmzip={"method": method, "keep": keep}) for keep in (1, 1.0, 1, "100%")]
    with running(mini) as (_, answers):
        visual = [progress.usage.visual for progress in answers(bodies)]
    assert [(each.after, each.last_layer) for each in visual] == [(1, 1), (144, 144)] * 2
