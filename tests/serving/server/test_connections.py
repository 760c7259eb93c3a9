"""Connections that wait forever end, so that others have room; slow clients that do as they may are answered."""

import asyncio
import json
import re
import socket
import time
from contextlib import ExitStack, closing, contextmanager
from urllib.parse import urlsplit

import httpx
import pytest

from tests.serving.server.running import running_app
from vlmzip.serving.server import connection

#: Seconds of the deadlines in these tests.
LIMIT = 2.0
LARGE = 64 * 2**20


async def app(scope, receive, send):
    """Answers when the body has arrived: at once, after a while, or with more than a pipe of the system holds."""
    if scope["type"] != "http":
        return
    if scope["path"] != "/refused":
        while (await receive()).get("more_body"):
            pass
    if scope["path"] == "/slow":
        await asyncio.sleep(1.5 * LIMIT)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(2 if scope["path"] == "/large-stream" else 1):
        size = LARGE if scope["path"].startswith("/large") else 2
        await send({"type": "http.response.body", "body": b"o" * size, "more_body": True})
    await send({"type": "http.response.body", "body": b"k"})


@pytest.fixture
def address(monkeypatch):
    for name in ("HEAD", "UNREAD"):
        monkeypatch.setattr(connection, name, LIMIT)
    monkeypatch.setattr(connection, "EVERY", 0.05)
    monkeypatch.setattr(connection, "MOST", 8)
    with running_app(app) as address:
        yield address


@contextmanager
def connected(address, buffer=4096):
    """Yield a connection, with a timeout against a server that does not end it."""
    url = urlsplit(address)
    with closing(socket.socket()) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        client.settimeout(20)
        client.connect((url.hostname, url.port))
        yield client


def everything(client):
    """Return what the server sends until it ends the connection."""
    parts = []
    while part := client.recv(2**20):
        parts.append(part)
    return b"".join(parts)


def head(path, *further):
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: x", *further, "", ""]).encode()


def ended_while_sending(client):
    """Send letter by letter until the server ends the connection; return what it has sent."""
    received = b""
    client.settimeout(0.1)
    for _ in range(200):
        try:
            client.sendall(b"a")
            part = client.recv(4096)
        except TimeoutError:
            continue
        except (BrokenPipeError, ConnectionResetError):
            return received
        if not part:
            return received
        received += part
    pytest.fail("the server did not end the connection")


def test_a_client_that_sends_nothing(address):
    with connected(address) as client:
        assert client.recv(1) == b""


def test_a_client_that_does_not_finish_its_headers(address):
    with connected(address) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nX: ")
        assert ended_while_sending(client) == b""


def test_a_second_request_without_an_end(address):
    with connected(address) as client:
        client.sendall(head("/", "Content-Length: 0") + b"POST / HT")
        assert ended_while_sending(client).endswith(b"k\r\n0\r\n\r\n")


def test_a_refused_request_without_an_end(address):
    """It has its answer, and its body has no end."""
    with connected(address) as client:
        client.sendall(head("/refused", "Content-Length: 1000000"))
        assert ended_while_sending(client).endswith(b"k\r\n0\r\n\r\n")


@pytest.mark.parametrize("path", ["/large", "/large-stream"])
def test_a_client_that_does_not_read_its_answer(address, path):
    with connected(address) as client:
        client.sendall(head(path, "Content-Length: 0"))
        time.sleep(2 * LIMIT)
        assert 0 < len(everything(client)) < LARGE


def test_idle_connections_leave_room_for_others(address):
    """Eight connections have room. Those that are open are answered, and a ninth is refused with a reason."""
    with ExitStack() as stack:
        first = stack.enter_context(httpx.Client(base_url=address, timeout=20))
        assert first.get("/").text == "ook"
        idle = [stack.enter_context(connected(address)) for _ in range(7)]
        with connected(address) as ninth:
            head, _, body = everything(ninth).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ")
        assert (
            json.loads(body)["error"]["message"]
            == "the server has no room for another connection (limit 8); try again later"
        )
        assert first.get("/").text == "ook"
        for client in idle:
            assert client.recv(1) == b""
        assert httpx.get(address).text == "ook"


def test_a_slow_client_is_answered(address):
    """Requests come in parts, with pauses, and together take longer than one may."""
    with connected(address) as client:
        for _ in range(3):
            for part in re.split(b"(?<=:)", head("/", "Content-Length: 3")):
                client.sendall(part)
                time.sleep(0.1)
            for _ in range(3):
                client.sendall(b"a")
                time.sleep(LIMIT / 6)
            assert answer_of(client) == b"ook"


def test_a_body_may_take_longer_than_headers(address):
    with connected(address) as client:
        client.sendall(head("/", "Content-Length: 3"))
        for _ in range(3):
            time.sleep(LIMIT / 2)
            client.sendall(b"a")
        assert answer_of(client) == b"ook"


def test_an_answer_may_take_longer_than_headers(address):
    with connected(address) as client:
        client.sendall(head("/slow", "Content-Length: 0"))
        assert answer_of(client) == b"ook"


def test_a_large_answer_may_be_read_slowly(address):
    with connected(address, buffer=2**20) as client:
        client.sendall(head("/large", "Content-Length: 0", "Connection: close"))
        slowly = b""
        for _ in range(60):
            slowly += client.recv(2**18)
            time.sleep(LIMIT / 40)
        assert len(slowly) < LARGE
        assert len(slowly + everything(client)) > LARGE


def test_requests_sent_together_are_answered_in_order(address):
    with connected(address) as client:
        client.sendall(head("/slow", "Content-Length: 1") + b"a" + head("/", "Content-Length: 0") * 2)
        assert [answer_of(client) for _ in range(3)] == [b"ook"] * 3


def answer_of(client):
    """The body of the next answer, which comes in chunks."""
    received = b""
    while not received.endswith(b"\r\n0\r\n\r\n"):
        part = client.recv(1)
        assert part, f"the connection has ended after {received}"
        received += part
    return b"".join(received.partition(b"\r\n\r\n")[2].split(b"\r\n")[1::2])
