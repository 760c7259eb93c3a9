"""Fetch an image from an address that the operator allows, and never from a private network."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from urllib.parse import SplitResult, urljoin, urlsplit

from vlmzip.errors import counted
from vlmzip.serving.server.errors import RequestError
from vlmzip.serving.server.settings import Settings
from vlmzip.version import __version__

#: The number of redirects that are followed. Each target is checked as the first address is.
MOST_REDIRECTS = 3
REDIRECTS = (301, 302, 303, 307, 308)
#: The IPv6 addresses that are given out, and those that stand for IPv4 addresses.
GLOBAL_UNICAST, NAT64 = ipaddress.ip_network("2000::/3"), ipaddress.ip_network("64:ff9b::/96")
PORTS = {"http": 80, "https": 443}
#: Threads that look up addresses, because a look-up cannot be ended.
_LOOK_UPS = ThreadPoolExecutor(4, thread_name_prefix="vlmzip-look-up")


class Left:
    """The time and bytes that are left to fetch the images of one request."""

    def __init__(self, settings: Settings) -> None:
        self._deadline, self.bytes = time.monotonic() + settings.fetch_seconds, settings.fetch_bytes

    @property
    def seconds(self) -> float:
        """Return the seconds until the deadline. Raise `TimeoutError` if there are none."""
        seconds = self._deadline - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        return seconds

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self._deadline


def fetch(url: str, name: str, settings: Settings, left: Left) -> bytes:
    """Return the content at an address. Raise `RequestError` if it is not allowed, too large or too slow."""
    if not settings.allow_hosts:
        raise _refused(f"{name} must be a URL like data:image/png;base64,…; this server fetches no addresses")
    for _ in range(MOST_REDIRECTS + 1):
        parts = _checked(url, name, settings)
        try:
            content = _answer_of(parts, public_address(parts, name, left), name, settings, left)
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, TimeoutError) or left.is_over:
                seconds = counted(settings.fetch_seconds, "second")
                message = f"{name} was not fetched within {seconds} of the request"
                raise _refused(message) from None
            raise _refused(f"{name} cannot be fetched: {type(error).__name__}") from None
        if isinstance(content, bytes):
            return content
        url = urljoin(url, content)
    raise _refused(f"{name} redirects more than {MOST_REDIRECTS} times")


def _checked(url: str, name: str, settings: Settings) -> SplitResult:
    """Return the parts of an address of an allowed host."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise _refused(f"{name} has an invalid URL") from None
    if parts.scheme not in PORTS:
        raise _refused(f"{name} must be a data, https or http URL")
    if not url.isascii() or any(letter <= " " or letter == "\x7f" for letter in url):
        raise _refused(f"{name} has a URL with spaces or letters that must be escaped")
    if parts.username is not None or parts.password is not None:
        raise _refused(f"{name} has a URL with a user name; leave it out")
    if (parts.hostname or "") not in settings.allow_hosts:
        raise _refused(f"{name} is on the host {(parts.hostname or '')[:100]!r}, which is not allowed here")
    if port not in (None, PORTS[parts.scheme]):
        raise _refused(f"{name} has a URL with port {port}; only {PORTS[parts.scheme]} is allowed for {parts.scheme}")
    return parts


def public_address(parts: SplitResult, name: str, left: Left) -> str:
    """Return an address of the host. Raise `RequestError` if any of its addresses is not public."""
    try:
        look_up = _LOOK_UPS.submit(socket.getaddrinfo, parts.hostname, PORTS[parts.scheme], type=socket.SOCK_STREAM)
        answers = look_up.result(left.seconds)
    except TimeoutError:
        raise
    except (OSError, UnicodeError):
        raise _refused(f"{name} is on a host that has no address") from None
    addresses = [str(answer[4][0]) for answer in answers]
    if not addresses or not all(map(is_public, addresses)):
        raise _refused(f"{name} is on a host inside a private network")
    return addresses[0]


def is_public(address: str) -> bool:
    """Return whether an address is on the public internet: not private, loopback, link-local or reserved."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address):
        # Addresses that carry an IPv4 address must not lead into a private network either.
        carried = parsed.ipv4_mapped or parsed.sixtofour or (parsed.teredo or (None, None))[1]
        if parsed in NAT64:
            carried = ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)
        if carried is not None:
            return is_public(str(carried))
        if parsed not in GLOBAL_UNICAST:
            return False
    return parsed.is_global and not parsed.is_multicast


def _answer_of(parts: SplitResult, address: str, name: str, settings: Settings, left: Left) -> bytes | str:
    """Return the content at an address, or the target of a redirect. The connection goes to `address` alone."""
    connection = _connection(parts, address, left)
    # A timeout of the socket starts anew with every byte, and a host could send one byte at a time.
    watchdog = threading.Timer(left.seconds, _end, [connection.sock])
    watchdog.daemon = True
    watchdog.start()
    try:
        if isinstance(connection.sock, ssl.SSLSocket):
            connection.sock.do_handshake()
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        headers = {"Host": parts.hostname or "", "User-Agent": f"vlmzip/{__version__}", "Accept": "image/*"}
        connection.request("GET", target, headers=headers)
        answer = connection.getresponse()
        if answer.status in REDIRECTS and (location := answer.getheader("Location")):
            return location
        if answer.status != 200:
            raise _refused(f"{name} cannot be fetched: the host answers {answer.status}")
        content = answer.read(left.bytes + 1)
        if len(content) > left.bytes:
            limit = f"all fetched images of a request may have {settings.fetch_bytes:,} together"
            raise _refused(f"{name} has more than {left.bytes:,} bytes; {limit}")
        left.bytes -= len(content)
        if left.is_over:
            raise TimeoutError
        return content
    finally:
        watchdog.cancel()
        connection.close()


def _end(connected: socket.socket) -> None:
    with suppress(OSError):  # it is closed already
        socket.socket.shutdown(connected, socket.SHUT_RDWR)  # not that of TLS, which is not for two threads


def _connection(parts: SplitResult, address: str, left: Left) -> http.client.HTTPConnection:
    """Return a connection to one address, so that a second look-up of the name cannot lead elsewhere.

    With TLS, the handshake is still to do.
    """
    host, port = parts.hostname or "", PORTS[parts.scheme]
    connection = http.client.HTTPConnection(host, port, timeout=left.seconds)
    connection.sock = socket.create_connection((address, port), timeout=left.seconds)
    if parts.scheme == "https":
        connection.sock = ssl.create_default_context().wrap_socket(
            connection.sock, server_hostname=host, do_handshake_on_connect=False
        )
    return connection


def _refused(message: str) -> RequestError:
    return RequestError(message, code="invalid_image_url", param="messages")
