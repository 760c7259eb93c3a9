"""The limits of the server. An operator sets them; a request can only stay below them."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

MEGABYTE = 2**20


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The limits of the server, and what it permits."""

    api_key: str | None = field(default=None, repr=False)
    """The key that every request must send, except to /health; `None` for no key."""
    host: str | None = None
    """Where the server listens. Without a key on this machine only, requests must name this host or `localhost`."""
    allow_hosts: frozenset[str] = frozenset()
    """The hosts from which images are fetched. Empty: images come as data URLs only."""
    max_body: int = 32 * MEGABYTE
    """Bytes of a request."""
    max_held: int = 512 * MEGABYTE
    """Bytes of all requests that are read or wait to be decoded."""
    max_inputs: int = 1024 * MEGABYTE
    """Bytes of the model inputs of all requests that wait or are being answered. One request alone may have more."""
    max_messages: int = 64
    """Messages of a request."""
    max_images: int = 16
    """Images of a request."""
    max_pixels: int = 50_000_000
    """Pixels of all images of a request, by the sizes in their headers, which are read before any decoding."""
    max_new_tokens: int = 512
    """Tokens of an answer: the limit, and the length for requests without `max_tokens`."""
    max_queue: int = 64
    """Requests that wait for the model. More are answered 429."""
    max_batch: int = 16
    """Requests that the model answers together."""
    batch_inputs: int = 256 * MEGABYTE
    """Bytes of the model inputs of requests that are answered together. One request alone may have more."""
    batch_wait: float = 0.005
    """Seconds for which an idle model waits for more requests to answer together."""
    max_seconds: float = 120.0
    """Seconds from the last byte of a request to the last byte of its answer."""
    upload_seconds: float = 30.0
    """Seconds in which a request must arrive."""
    fetch_seconds: float = 10.0
    """Seconds in which the images of a request must be fetched."""
    fetch_bytes: int = 32 * MEGABYTE
    """Bytes of all fetched images of a request."""
    log_requests: bool = True
    """Whether each request gets a line in the log."""


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach the address that a server listens on."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
