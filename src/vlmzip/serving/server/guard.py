"""What happens to every request before and after its route: the API key, the count and the log."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Collection
from time import monotonic

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vlmzip.serving.server.access import log_request, notes_of
from vlmzip.serving.server.errors import CLIENT_GONE, RequestError, send_error
from vlmzip.serving.server.metrics import Metrics
from vlmzip.serving.server.settings import Settings, is_loopback

#: Where the playground is, if the server has one. A browser asks its visitor for the key and sends it as a password.
PLAYGROUND = "/playground"
#: Paths that need no key, so that a load balancer can ask.
OPEN = ("/health",)
#: The names of this machine.
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Guard:
    """Refuses requests without the key or for another host; counts and logs answers."""

    def __init__(self, app: ASGIApp, *, settings: Settings, metrics: Metrics, paths: Collection[str]) -> None:
        self._app, self._metrics, self._paths = app, metrics, frozenset(paths)
        self._log_requests = settings.log_requests
        self._digest = None if settings.api_key is None else _digest(settings.api_key.encode())
        is_private = settings.api_key is None and is_loopback(settings.host or "")
        self._hosts = {(settings.host or "").lower(), *LOOPBACK} if is_private else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, start, notes = CLIENT_GONE, monotonic(), notes_of(scope)

        async def count(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal is None:
                await self._app(scope, receive, count)
            else:
                notes.reason = refusal.logged
                await send_error(refusal, count)
        except Exception as error:  # a defect: a handler around this one answers 500
            if status == CLIENT_GONE:
                status = 500
            notes.reason = f"failed with {type(error).__name__}"
            raise
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.requests.labels(path, str(status)).inc()
            if self._log_requests:
                log_request(scope, status, monotonic() - start)

    def _refusal(self, scope: Scope) -> RequestError | None:
        headers = dict(scope["headers"])
        # A page of another site can let its own name stand for this machine, and a browser then takes both for one.
        host = _name_of(headers.get(b"host", b"").decode("latin-1"))
        if self._hosts is not None and host not in self._hosts:
            message = f"this server is for this machine only, and the request is for {host[:100]!r}; set an API key"
            return RequestError(message, 403, code="host_not_allowed")
        if self._digest is not None and scope["path"] not in OPEN:
            first, page = scope["path"].partition("/")[2].partition("/")[0], PLAYGROUND.strip("/")
            is_page = first in ("", page)
            # GET / is for browsers and for clients of the API.
            schemes = [b"basic"] * is_page + [b"bearer"] * (first != page)
            key = _key(headers.get(b"authorization", b""), schemes)
            # Digests have equal lengths, so the time of the comparison tells nothing about the key.
            if key is None or not hmac.compare_digest(_digest(key), self._digest):
                for_api, for_page = (
                    "send it as Authorization: Bearer KEY",
                    "enter any name, and the key as the password",
                )
                how = for_page if is_page else for_api
                message = f"the API key is missing or wrong; {how}"
                scheme = 'Basic realm="vlmzip: any name, and the API key as password"' if is_page else "Bearer"
                return RequestError(message, 401, code="invalid_api_key", headers={"WWW-Authenticate": scheme})
        return None


def _name_of(host: str) -> str:
    """Return the name or address in a `Host` header, without its port."""
    name = host.partition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
    return name.strip().lower()


def _key(header: bytes, schemes: Collection[bytes]) -> bytes | None:
    """Return the key in a header of one of the schemes, basic or bearer, or `None` for another header."""
    scheme, _, key = header.partition(b" ")
    if scheme.lower() not in schemes:
        return None
    if scheme.lower() == b"bearer":
        return key.strip()
    try:
        return base64.b64decode(key.strip(), validate=True).partition(b":")[2]
    except binascii.Error:
        return None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
