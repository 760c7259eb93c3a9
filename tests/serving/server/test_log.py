"""The log: a line for each request, and a note for each kind of warning."""

import asyncio
import gc
import io
import logging
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import httpx
import pytest

from tests.serving.server.running import QUESTION, asking, engine_of, image_url, serving
from vlmzip.errors import telling_once
from vlmzip.runtime.images import ignoring_warnings
from vlmzip.serving.server import access, log_thread
from vlmzip.serving.server.access import log_request
from vlmzip.serving.server.batch import Batch
from vlmzip.serving.server.settings import Settings

SECRET = "a-secret-key"
#: What a library quotes of a request.
QUOTED = "secret text"
KEY = {"Authorization": f"Bearer {SECRET}"}


@pytest.fixture(scope="module")
def http(mini):
    settings = Settings(api_key=SECRET)
    with (
        serving(engine_of(mini, settings), settings) as address,
        httpx.Client(base_url=address, timeout=30, headers=KEY) as http,
    ):
        yield http


@pytest.fixture
def lines(caplog):
    """The lines of the log, without time and seconds, as soon as there are `count`."""
    caplog.set_level(logging.INFO, access.__name__)

    def read(count):
        for _ in range(200):  # a line comes after its answer
            if sum(record.name == access.__name__ for record in caplog.records) >= count:
                break
            time.sleep(0.05)
        texts = [record.getMessage() for record in caplog.records if record.name == access.__name__]
        parts = [text.split(" ", 1)[1] for text in texts]
        return [" ".join(part.split(" ")[:3]) + part.partition(" s")[2] for part in parts]

    return read


def test_an_answer_has_its_tokens(http, lines):
    http.post("/v1/chat/completions", json=asking(max_tokens=1))
    http.post("/v1/chat/completions", json=asking(max_tokens=1, stream=True, vlmzip={"keep": 9}))
    http.post("/v1/chat/completions", json=asking(max_tokens=1, vlmzip={"method": "fastv(keep=8)"}))
    http.post("/v1/tokens", json=asking())
    assert lines(4) == [
        "POST /v1/chat/completions 200, visionzip(keep=16): 144 -> 16 visual tokens, 1 new token",
        "POST /v1/chat/completions 200, visionzip(keep=9): 144 -> 9 visual tokens, 1 new token",
        "POST /v1/chat/completions 200, fastv(keep=8): 144 -> 144 visual tokens and 8 at the last layer, 1 new token",
        "POST /v1/tokens 200",
    ]


def test_a_refusal_has_its_reason(http, lines):
    http.post("/v1/chat/completions", json=asking(tools=[5]))
    http.post("/v1/chat/completions", json=asking(), headers={"Authorization": "Bearer wrong"})
    http.post("/v1/chat/completions", content=b"{}", headers={"Content-Type": "text/plain"})
    http.get("/nothing")
    assert lines(4) == [
        "POST /v1/chat/completions 400: tools is not supported; leave it out",
        "POST /v1/chat/completions 401: the API key is missing or wrong; send it as Authorization: Bearer KEY",
        "POST /v1/chat/completions 415: the body must be JSON: send Content-Type: application/json",
        "GET /nothing 404: not found",
    ]


def test_a_long_reason_is_cut_visibly(http, lines):
    http.post("/v1/tokens", json=asking(vlmzip={"method": "magic"}))
    (line,) = lines(1)
    assert line.startswith("POST /v1/tokens 400: unknown method 'magic'; choose one of adaptive_visionzip, ")
    assert line.endswith("…")


def test_reads_that_browsers_and_monitors_repeat_have_no_line(http, lines):
    assert [http.get(path).status_code for path in ("/health", "/metrics", "/")] == [200] * 3
    http.get("/nothing")
    assert lines(1) == ["GET /nothing 404: not found"]


def test_no_line_has_images_keys_or_texts(http, lines):
    url = image_url()
    bodies = [
        asking(), asking("secret text"), asking("secret <image>"), asking(QUESTION, url[:-100]),
        asking(QUESTION, url[5:]),
        asking(messages=[{"role": "user", "content": [{"type": "text", "text": 5}, {"secret text": 1}]}]),
        asking(messages=[{"role": "assistant", "content": "secret text", "refusal": "secret text"}]),
        asking(messages=[{"role": "secret text", "content": "a"}]),
        asking(messages=[{"role": "user", "content": [{"type": "secret text"}]}]),
        asking(messages=[{"role": "user", "content": "a", "secret text": 1}]), asking(**{"secret text": 1}),
    ]  # fmt: skip
    for body in bodies:
        http.post(f"/v1/chat/completions?key={SECRET}", json=body)
    text = "\n".join(lines(len(bodies)))
    assert text.count("POST") == len(bodies)
    assert not any(part in text for part in (SECRET, "secret <", "secret text", url[30:60], url[-160:-120]))


def test_a_request_cannot_write_lines(http, lines):
    """Paths and reasons have parts of requests."""
    http.get("/v1/models/a%0A2026-01-01%20POST%20/v1/x%1B[31m%E2%80%AE")
    http.post("/v1/chat/completions", json=asking(model="b\n2026 GET /\r\x1b[2J\u2028"))
    text = "".join(lines(2))
    assert all(letter.isprintable() for letter in text)
    assert "GET /v1/models/a%0A2026-01-01%20POST%20/v1/x%1B%5B31m%E2%80%AE 404" in text


def test_the_time_has_its_zone(monkeypatch, caplog):
    caplog.set_level(logging.INFO, access.__name__)
    try:
        for zone, offset in (("<+0530>-5:30", "+05:30"), ("UTC0", "+00:00")):
            monkeypatch.setenv("TZ", zone)
            time.tzset()
            before = datetime.now(UTC).replace(microsecond=0)
            log_request({"method": "GET", "path": "/v1/x"}, 404, 0.1)
            text = caplog.messages[-1].split(" ")[0]
            assert text.endswith(offset)
            assert before <= datetime.fromisoformat(text) <= datetime.now(UTC)
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/" + "a" * 9000), ("A" * 9000, "/v1/x")])
def test_long_paths_and_methods_are_cut(lines, method, path):
    log_request({"method": method, "path": path}, 404, 0.1)
    assert len(lines(1)[0]) < 300


class Stuck(logging.Handler):
    """A handler that waits, as one does whose pipe is full."""

    def __init__(self):
        super().__init__()
        self.free, self.texts = threading.Event(), []

    def emit(self, record):
        self.free.wait(30)
        self.texts.append(record.getMessage())


@pytest.fixture
def stuck(monkeypatch):
    monkeypatch.setattr(log_thread, "LAST_LINES", 0.1)
    handler, logger = Stuck(), logging.getLogger("vlmzip")
    logger.addHandler(handler)
    yield handler
    handler.free.set()
    logger.removeHandler(handler)


def test_a_log_that_is_not_read_stops_nobody(stuck):
    log = logging.getLogger("vlmzip.serving.x")
    with log_thread.logging_in_thread() as thread:
        for number in range(2 * log_thread.MOST_LINES):
            log.warning("line %d", number)
    assert thread.stuck
    assert stuck.texts == []


def test_dropped_lines_are_counted():
    stuck, count = Stuck(), 2 * log_thread.MOST_LINES
    thread = log_thread.LogThread(stuck)
    thread.start()
    for number in range(count):
        thread.handler.handle(logging.LogRecord("x", logging.WARNING, __file__, 0, f"line {number}", (), None))
    stuck.free.set()
    while thread.queue.qsize():
        time.sleep(0.01)
    thread.stop()
    *lines, last = stuck.texts
    assert not thread.stuck
    numbers = [int(line.removeprefix("line ")) for line in lines]
    assert numbers == sorted(set(numbers))
    assert log_thread.MOST_LINES <= len(lines) < count
    dropped = f"{count - len(lines):,}"
    assert last == f"the log lacks {dropped} lines, because stderr was not read in time"


def test_a_reader_of_the_log_may_go():
    """Writing then fails, and rich raises `SystemExit`."""

    class Closed(logging.Handler):
        def emit(self, record):
            written.append(record.getMessage())
            raise errors.pop(0)

    written, errors = [], [SystemExit(1), BrokenPipeError(), ValueError()]
    thread = log_thread.LogThread(Closed())
    thread.start()
    for number in range(3):
        thread.handler.handle(logging.LogRecord("x", logging.WARNING, __file__, 0, str(number), (), None))
    thread.stop()
    assert (written, errors, thread.stuck) == (["0", "1", "2"], [], False)


class Kept(logging.Handler):
    """A handler that keeps its lines."""

    def __init__(self):
        super().__init__()
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())

    @property
    def text(self):
        return "\n".join(self.texts)


@pytest.fixture
def kept(monkeypatch):
    """What `vlmzip serve` would write."""
    handler, logger = Kept(), logging.getLogger("vlmzip")
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "level", logging.INFO)
    with log_thread.logging_in_thread():
        yield handler


def wait_for(kept, text):
    for _ in range(200):
        if text in kept.text:
            return
        time.sleep(0.05)
    pytest.fail(f"{text!r} is not in {kept.text!r}")


def test_texts_of_errors_stay_out_of_the_log(http, kept, monkeypatch):
    """Libraries quote what a request contains."""

    def fail(batch):
        try:
            raise KeyError(QUOTED)
        except KeyError as error:
            raise ExceptionGroup(QUOTED, [RuntimeError(QUOTED)]) from error

    monkeypatch.setattr(Batch, "run", fail)
    answer = http.post("/v1/chat/completions", json=asking(QUOTED))
    assert (answer.status_code, answer.json()["error"]["message"]) == (500, "the model failed on this request")
    wait_for(kept, "/v1/chat/completions 500")
    for part in ("a request failed", "ExceptionGroup", "RuntimeError", "KeyError", 'test_log.py", line ', "in fail"):
        assert part in kept.text
    assert "secret" not in kept.text


def test_a_batch_that_fails_together_stays_out_of_the_log(mini, kept, monkeypatch):
    def fail(batch):
        raise RuntimeError(f"{QUOTED} with CUDA error") if len(batch._requests) > 1 else ValueError(QUOTED)

    monkeypatch.setattr(Batch, "run", lambda batch: fail(batch))
    settings = Settings(batch_wait=5, max_batch=2)
    with (
        serving(engine_of(mini, settings), settings) as address,
        ThreadPoolExecutor(2) as pool,
    ):
        answers = pool.map(lambda _: httpx.post(f"{address}/v1/chat/completions", json=asking(), timeout=30), range(2))
        assert [answer.status_code for answer in answers] == [500, 500]
        assert httpx.get(f"{address}/health").status_code == 200
    assert "a batch of 2 failed (RuntimeError); its requests are answered alone" in kept.texts
    assert "secret" not in kept.text


def test_a_defect_stays_out_of_the_log(mini, kept, monkeypatch):
    """The web server logs these, with a traceback."""
    engine = engine_of(mini, Settings())

    def fail(request):
        raise ValueError(QUOTED)

    monkeypatch.setattr(engine, "prepare", fail)
    with serving(engine, Settings()) as address:
        assert httpx.post(f"{address}/v1/chat/completions", json=asking()).status_code == 500
    assert "Exception in ASGI application" in kept.text
    assert ": failed with ValueError" in kept.text
    assert "secret" not in kept.text


def test_a_template_that_quotes_a_message_stays_out_of_the_log(mini, kept, monkeypatch):
    engine = engine_of(mini, Settings())
    template = "{{ raise_exception('I refuse ' ~ messages[0]['content'][0]['text']) }}"
    monkeypatch.setattr(engine._preparer._processor, "chat_template", template)
    with serving(engine, Settings()) as address:
        body = asking(messages=[{"role": "user", "content": "secret text"}])
        answer = httpx.post(f"{address}/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert "I refuse secret text" in answer.json()["error"]["message"]
    assert "400 " in kept.text
    assert kept.text.endswith(": no prompt can be made of the messages: failed with TemplateError")
    assert "secret" not in kept.text


def test_tasks_that_fail_stay_out_of_the_log(kept):
    async def fail(text):
        raise ValueError(text)

    async def forget():
        task = asyncio.ensure_future(fail("secret text"))
        await asyncio.wait([task])
        del task
        gc.collect()
        asyncio.get_running_loop().call_soon(int, "secret text")
        await asyncio.sleep(0)

    asyncio.run(forget())
    wait_for(kept, "Exception in callback int")
    assert "Task exception was never retrieved\n" in kept.text
    assert "in fail" in kept.text
    assert "secret" not in kept.text


def test_an_error_that_another_handler_has_formatted_stays_out_of_the_log(kept):
    for error in (ValueError("secret text"), None):
        record = logging.LogRecord("x", logging.ERROR, __file__, 0, "failed", (), error and (type(error), error, None))
        logging.Formatter().format(record)
        logging.root.handle(record)
    wait_for(kept, "ValueError")
    assert "secret" not in kept.text


def test_what_libraries_write_to_stderr_goes_through_the_thread(monkeypatch):
    """Their own handlers, bars and texts, each once and in order; afterwards all is as before."""
    real, ours, handler = io.StringIO(), logging.getLogger("vlmzip"), Kept()
    monkeypatch.setattr(sys, "stderr", real)
    library = logging.Logger("library")
    monkeypatch.setitem(logging.root.manager.loggerDict, "library", library)
    library.parent, library.propagate = logging.root, False
    library.addHandler(own := logging.StreamHandler(real))
    monkeypatch.setattr(ours, "handlers", [handler])
    monkeypatch.setattr(ours, "level", logging.INFO)
    with log_thread.logging_in_thread():
        library.warning("from %s", "a library")
        sys.stderr.write("50 %\r100 %\n" + "a" * 2500 + "\n\n")
        print("two", "words", file=sys.stderr)
        ours.info("from vlmzip")
    assert handler.texts == [
        "from a library", "50 %", "100 %", "a" * 2500, "two words", "from vlmzip",
    ]  # fmt: skip
    assert (real.getvalue(), sys.stderr) == ("", real)
    assert (library.handlers, library.propagate, ours.handlers) == ([own], False, [handler])
    library.warning("after")
    assert real.getvalue() == "after\n"


def test_a_line_without_an_end_takes_no_memory(monkeypatch):
    handler = Kept()
    monkeypatch.setattr(logging.getLogger("vlmzip"), "handlers", [handler])
    with log_thread.logging_in_thread():
        for _ in range(10):
            sys.stderr.write("a" * 500)
    assert [len(text) for text in handler.texts] == [1500, 1500, 1500, 500]


def test_the_operator_can_turn_it_off(mini, lines):
    settings = Settings(log_requests=False)
    with serving(engine_of(mini, settings), settings) as address:
        assert httpx.post(f"{address}/v1/tokens", json=asking()).status_code == 200
    assert lines(0) == []  # the server has ended


def test_a_kind_of_warning_is_told_once():
    told = []
    with telling_once(told.append):
        for count in (144, 576):
            warnings.warn(f"visionzip keeps all {count} tokens:\n it changes nothing", stacklevel=1)
        warnings.warn("fastv keeps all 144 tokens", stacklevel=1)
        for number in range(500):
            warnings.warn("a" * number, stacklevel=1)
    assert told[:2] == ["visionzip keeps all 144 tokens: it changes nothing", "fastv keeps all 144 tokens"]
    assert len(told) <= 100


def test_requests_at_once_leave_the_filters_of_warnings(http):
    before = warnings.filters[:]
    with ThreadPoolExecutor(8) as pool:
        statuses = pool.map(lambda _: http.post("/v1/tokens", json=asking()).status_code, range(200))
        assert set(statuses) == {200}
    assert warnings.filters == before


def test_warnings_are_ignored_until_the_last_thread_has_ended():
    before = warnings.filters[:]
    first, second = ignoring_warnings(), ignoring_warnings()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    warnings.warn("still ignored", stacklevel=1)
    second.__exit__(None, None, None)
    assert warnings.filters == before
