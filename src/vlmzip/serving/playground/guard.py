"""What the page's requests may be. Everything else that Gradio offers, such as its file routes, is closed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vlmzip.serving.server.access import notes_of
from vlmzip.serving.server.body import Bodies
from vlmzip.serving.server.errors import RequestError

READS = re.compile(
    r"/?|/(config|theme\.css|manifest\.json|favicon\.ico)|/(assets|static|svelte)/[\w./-]+"
    r"|/gradio_api/(startup-events|queue/data|heartbeat/\w+|app_id|theme\.css)"
)
WRITES = re.compile(r"/gradio_api/(queue/join|reset|cancel)/?")
#: The browser loads everything from this server, shows the page in no frame of another one, and sends nothing away.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline';"
    " img-src 'self' data:; media-src data:; font-src 'self' data:; worker-src 'self' blob:; form-action 'self';"
    " frame-ancestors 'none'; base-uri 'self'; object-src 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class PageGuard:
    """Passes on the requests that the page sends, with bodies within the limits of the server, and refuses others."""

    def __init__(self, app: ASGIApp, *, bodies: Bodies) -> None:
        self._app, self._bodies = app, bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        try:
            await self._pass_on(scope, receive, with_headers)
        except RequestError as error:
            notes_of(scope).reason = error.logged
            await JSONResponse(error.content(), error.status, error.headers)(scope, receive, with_headers)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if scope["method"] in ("GET", "HEAD") and READS.fullmatch(path) and ".." not in path:
            await self._app(scope, receive, send)
            return
        if scope["method"] != "POST" or not WRITES.fullmatch(path):
            raise RequestError(f"{scope['method']} {path[:100]}: not found", 404)
        _refuse_other_pages(Headers(scope=scope))
        async with self._bodies.read(Request(scope, receive)) as body:
            _check(body)
            messages = _again(body)

            async def replay() -> Message:
                return next(messages, None) or await receive()

            await self._app(scope, replay, send)


def _refuse_other_pages(headers: Headers) -> None:
    """Refuse a request that a page of another site makes the visitor's browser send."""
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2] != headers.get("host"):
        raise RequestError("this page takes requests of its own visitors only", 403)


def _check(body: bytes) -> None:
    """Raise `RequestError` unless the fields of the form are texts, numbers and lists of them.

    Gradio would take an object for a file, and fetch one that has an address.
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise RequestError("the body is not valid JSON") from None
    data = content.get("data") if isinstance(content, dict) else None
    if not isinstance(content, dict) or not isinstance(data or [], list):
        raise RequestError("the body must be an object whose data is a list")
    for value in data or []:
        parts = value if isinstance(value, list) else [value]
        if any(isinstance(part, list | dict) for part in parts):
            raise RequestError("a field of the form must be a text, a number or a list of them")


def _again(body: bytes) -> Iterator[Message]:
    yield {"type": "http.request", "body": body, "more_body": False}
