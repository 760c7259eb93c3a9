"""Images from addresses: only of allowed hosts, only public ones, and within limits."""

import socket
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from tests.serving.server.running import encoded
from vlmzip.serving.server import fetch as fetching
from vlmzip.serving.server.errors import RequestError
from vlmzip.serving.server.fetch import Left, fetch, is_public
from vlmzip.serving.server.images import read_images
from vlmzip.serving.server.settings import Settings

ALLOWED = Settings(allow_hosts=frozenset(["good.example", "other.example"]), fetch_bytes=5_000, fetch_seconds=1.0)
IMAGE = encoded(Image.new("RGB", (30, 20), "red"))
PRIVATE = "10.0.0.1"
#: What the host answers, by path: a status, a body, and a place for redirects.
ANSWERS = {
    "/image.png": (200, IMAGE, None),
    "/late.png": (200, IMAGE, None),
    "/there": (302, b"", "http://other.example/image.png"),
    "/beside": (301, b"", "/image.png"),
    "/to_bad": (302, b"", "http://bad.example/image.png"),
    "/to_private": (302, b"", "http://private.example/"),
    "/to_file": (302, b"", "file:///etc/passwd"),
    "/round": (302, b"", "/round"),
    "/large": (200, b"x" * 5_001, None),
    "/missing": (404, b"", None),
}


class Host(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/late.png":
            time.sleep(0.7)
        if self.path == "/slow":  # a byte at a time
            for _ in range(40):
                self.wfile.write(b"H")
                time.sleep(0.1)
            return
        status, body, place = ANSWERS[self.path.partition("?")[0]]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if place:
            self.send_header("Location", place)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        self.server.asked.append((self.headers["Host"], self.path))


@pytest.fixture
def host(monkeypatch):
    """A host on this machine, as which all names are resolved; it counts as public."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Host)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(fetching, "PORTS", {"http": server.server_port, "https": 443})
    monkeypatch.setattr(fetching, "is_public", lambda address: address == "127.0.0.1")
    look_up = socket.getaddrinfo

    def resolve(name, *further, **settings):
        return look_up(PRIVATE if name == "private.example" else "127.0.0.1", *further, **settings)

    monkeypatch.setattr(fetching.socket, "getaddrinfo", resolve)
    yield server
    server.shutdown()
    server.server_close()


def test_an_allowed_image(host):
    assert fetch("http://good.example/image.png?size=1", "image 1", ALLOWED, Left(ALLOWED)) == IMAGE
    assert host.asked == [("good.example", "/image.png?size=1")]
    assert read_images(["http://good.example/image.png"], ALLOWED)[0].size == (30, 20)


@pytest.mark.parametrize("path", ["there", "beside"])
def test_redirects_to_allowed_hosts(host, path):
    assert fetch(f"http://good.example/{path}", "image 1", ALLOWED, Left(ALLOWED)) == IMAGE


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://bad.example/image.png", "image 1 is on the host 'bad.example', which is not allowed here"),
        ("http://good.example.bad.example/", "which is not allowed here"),
        ("http://good.example@bad.example/", "image 1 has a URL with a user name"),
        ("http://bad.example#@good.example/", "which is not allowed here"),
        ("http://127.0.0.1/", "image 1 is on the host '127.0.0.1', which is not allowed here"),
        ("http://good.example:22/", "image 1 has a URL with port 22"),
        ("http://good.example:x/", "image 1 has an invalid URL"),
        ("http://good.example/a b", "image 1 has a URL with spaces"),
        ("http://good.example/\r\nX: y", "image 1 has a URL with spaces"),
        ("ftp://good.example/image.png", "image 1 must be a data, https or http URL"),
        ("file:///etc/passwd", "image 1 must be a data, https or http URL"),
        ("//good.example/image.png", "image 1 must be a data, https or http URL"),
        ("http://good.example/to_bad", "image 1 is on the host 'bad.example', which is not allowed here"),
        ("http://good.example/to_private", "which is not allowed here"),
        ("http://good.example/to_file", "image 1 must be a data, https or http URL"),
        ("http://good.example/round", "image 1 redirects more than 3 times"),
        ("http://good.example/large", "image 1 has more than 5,000 bytes"),
        ("http://good.example/missing", "image 1 cannot be fetched: the host answers 404"),
        ("http://good.example/slow", "image 1 was not fetched within 1 second"),
    ],
)
def test_refused_addresses(host, url, message):
    with pytest.raises(RequestError) as error:
        fetch(url, "image 1", ALLOWED, Left(ALLOWED))
    assert message in error.value.message
    assert error.value.status == 400


def test_the_images_of_a_request_share_their_limits(host):
    few = Settings(allow_hosts=ALLOWED.allow_hosts, fetch_bytes=2 * len(IMAGE) - 1)
    with pytest.raises(RequestError, match=rf"image 2 has more than {len(IMAGE) - 1} bytes; all fetched images"):
        read_images(["http://good.example/image.png"] * 2, few)
    with pytest.raises(RequestError, match="image 2 was not fetched within 1 second"):
        read_images(["http://good.example/late.png"] * 2, ALLOWED)


def test_a_slow_look_up_ends_at_the_deadline(host, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(fetching.socket, "getaddrinfo", lambda *_, **__: ended.wait(5) and [])
    with pytest.raises(RequestError, match="image 1 was not fetched within 1 second"):
        fetch("http://good.example/", "image 1", ALLOWED, Left(ALLOWED))
    assert not ended.is_set()
    ended.set()


def test_a_slow_handshake_ends_at_the_deadline(host, monkeypatch):
    """The host sends the beginning of a TLS record, and then a byte at a time."""
    sent = []

    def drip():
        connection, _ = listening.accept()
        with suppress(OSError):
            connection.sendall(b"\x16\x03\x03\x40\x00\x02")
            for _ in range(40):
                connection.sendall(b"\0")
                sent.append(1)
                time.sleep(0.1)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=drip)
        thread.start()
        monkeypatch.setattr(fetching, "PORTS", {"https": listening.getsockname()[1]})
        with pytest.raises(RequestError, match="image 1 was not fetched within 1 second"):
            fetch("https://good.example/", "image 1", ALLOWED, Left(ALLOWED))
        count = len(sent)
        thread.join()
    assert count < 30


def test_an_allowed_host_in_a_private_network(host):
    allowed = Settings(allow_hosts=frozenset(["private.example", "good.example"]))
    for url in ("http://private.example/image.png", "http://good.example/to_private"):
        with pytest.raises(RequestError, match="image 1 is on a host inside a private network"):
            fetch(url, "image 1", allowed, Left(allowed))


def test_without_allowed_hosts_nothing_is_looked_up(host):
    with pytest.raises(RequestError, match="this server fetches no addresses"):
        fetch("http://good.example/image.png", "image 1", Settings(), Left(Settings()))
    assert host.asked == []


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True), ("2606:2800:220:1:248:1893:25c8:1946", True), ("10.1.2.3", False),
        ("172.16.0.1", False), ("192.168.1.1", False), ("169.254.169.254", False), ("100.64.0.1", False),
        ("0.0.0.0", False), ("127.0.0.1", False), ("224.0.0.1", False), ("240.0.0.1", False), ("192.0.2.1", False),
        ("255.255.255.255", False),
        ("::1", False), ("::", False), ("fe80::1", False), ("fe80::1%eth0", False), ("fc00::1", False),
        ("fec0::1", False), ("ff02::1", False), ("::ffff:127.0.0.1", False), ("::ffff:10.0.0.1", False),
        ("2002:7f00:1::", False), ("64:ff9b::7f00:1", False), ("64:ff9b::a9fe:a9fe", False), ("64:ff9b:1::1", False),
        ("::ffff:93.184.216.34", True), ("64:ff9b::5db8:d822", True), ("::127.0.0.1", False),
    ],
)  # fmt: skip
def test_public_addresses(address, public):
    assert is_public(address) == public
