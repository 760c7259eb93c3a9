"""What vLLM's own server puts before its routes: it would ignore a method in a request, so the request is refused."""

from __future__ import annotations

import json

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vlmzip.serving.server.errors import RequestError, send_error

FIELD = "vlmzip"
REFUSAL = (
    "vlmzip: with vLLM, a request cannot choose method and budget; serve it with --engine hf, or start vLLM itself"
    " with --trust-request-mm-kwargs and give mm_processor_kwargs"
)


class RefuseChoice:
    """Refuses requests with the field `vlmzip`, and passes all others on unchanged."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        messages: list[Message] = []
        while not messages or messages[-1].get("more_body"):
            messages.append(await receive())
        if _chooses(b"".join(message.get("body", b"") for message in messages)):
            await send_error(RequestError(REFUSAL, code="unsupported_parameter", param=FIELD), send)
            return
        read = iter(messages)

        async def again() -> Message:
            return next(read, None) or await receive()

        await self._app(scope, again, send)


def _chooses(body: bytes) -> bool:
    if f'"{FIELD}"'.encode() not in body:  # no need to parse megabytes of images
        return False
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):  # vLLM says what is wrong
        return False
    return isinstance(content, dict) and FIELD in content
