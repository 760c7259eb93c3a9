"""The routes of the server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from time import monotonic, time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, RedirectResponse, Response
from starlette.exceptions import HTTPException
from starlette.routing import Match, Mount, Route

from vlmzip.errors import alternatives, counted
from vlmzip.serving.server.access import Notes, notes_of
from vlmzip.serving.server.body import Bodies
from vlmzip.serving.server.counting import TokenCount
from vlmzip.serving.server.engine import Engine
from vlmzip.serving.server.errors import CLIENT_GONE, RequestError, overloaded
from vlmzip.serving.server.guard import PLAYGROUND, Guard
from vlmzip.serving.server.metrics import Metrics
from vlmzip.serving.server.progress import Progress
from vlmzip.serving.server.responses import Answer
from vlmzip.serving.server.schema import ChatRequest, read_request
from vlmzip.serving.server.settings import Settings
from vlmzip.serving.server.stream import EventStream, first_of, gone
from vlmzip.version import __version__

log = logging.getLogger(__name__)

#: The paths of the API.
PATHS = [
    "POST /v1/chat/completions",
    "POST /v1/tokens",
    "GET /v1/models",
    "GET /health",
    "GET /metrics",
]
#: Threads that decode images and prepare the inputs of the model.
PREPARERS = 2


def create_app(
    engine: Engine,
    settings: Settings | None = None,
    metrics: Metrics | None = None,
    died: Callable[[], None] = lambda: None,
) -> FastAPI:
    """Return the application. It starts and stops the engine.

    `died` is called if the engine ends by itself. Further pages can be mounted on the result.
    """
    service = Service(engine, settings or Settings(), metrics or Metrics(), died)
    app = FastAPI(title="vlmzip", version=__version__, lifespan=service.lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    app.add_api_route("/v1/chat/completions", service.chat, methods=["POST"])
    app.add_api_route("/v1/tokens", service.tokens, methods=["POST"])
    reads: dict[str, Callable[..., Any]] = {
        "/v1/models": service.models,
        "/v1/models/{name:path}": service.one_model,
        "/": service.home,
        "/health": service.health,
        "/metrics": service.read_metrics,
    }
    for path, read in reads.items():
        app.add_api_route(path, read, methods=["GET"])
        # FastAPI gives both methods of one route the same id in /openapi.json.
        app.add_api_route(path, read, methods=["HEAD"], include_in_schema=False)
    app.add_exception_handler(RequestError, _refused)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(Exception, _failed)
    paths = [getattr(route, "path", "") for route in app.routes]
    app.add_middleware(Guard, settings=service.settings, metrics=service.metrics, paths=paths)
    return app


class Service:
    """The routes, and what they share."""

    def __init__(self, engine: Engine, settings: Settings, metrics: Metrics, died: Callable[[], None]) -> None:
        self.engine, self.settings, self.metrics = engine, settings, metrics
        self._died = died
        self.bodies = Bodies(settings)
        self._pool = ThreadPoolExecutor(PREPARERS, thread_name_prefix="vlmzip-prepare")
        self._preparing = 0
        self._created = int(time())
        metrics.queue.set_function(lambda: self._preparing + engine.waiting)

    @asynccontextmanager
    async def lifespan(self, _app: FastAPI) -> AsyncIterator[None]:
        self.engine.start(self._died)
        yield
        await asyncio.to_thread(self.engine.stop)
        self._pool.shutdown(wait=False, cancel_futures=True)

    # --- answers ----------------------------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        """Answer POST /v1/chat/completions."""
        arrived, body, prepared = await self._prepare(request)
        progress = Progress(asyncio.get_running_loop(), arrived=arrived)
        count, notes = prepared.count, notes_of(request.scope)
        notes.tokens = count.method
        answer = Answer(self.engine.model, count)
        self.engine.submit(prepared, progress)
        del prepared  # its inputs are large, and a client can be slow to read
        try:
            async with self._until(arrived):
                ready = progress.begun() if body.stream else progress.ended()
                if not await first_of(ready, gone(request.receive)):
                    raise RequestError("the client has gone", CLIENT_GONE)
        except BaseException:
            progress.cancel()
            self._count(count, progress, notes)
            raise
        if body.stream:
            include = body.stream_options is not None and bool(body.stream_options.include_usage)
            events = self._events(answer, progress, include)
            seconds = arrived + self.settings.max_seconds - monotonic()
            return EventStream(events, max(seconds, 0.0), self._end_of(count, progress, notes))
        assert progress.reason is not None
        assert progress.usage is not None
        self._count(count, progress, notes)
        return JSONResponse(answer.whole(progress.text, progress.reason, progress.usage))

    async def _events(
        self, answer: Answer, progress: Progress, include_usage: bool
    ) -> AsyncIterator[dict[str, object]]:
        yield answer.chunk({"role": "assistant", "content": ""})
        try:
            async for piece in progress.pieces():
                yield answer.chunk({"content": piece})
        except RequestError as error:  # the status has been sent
            yield error.content()
            return
        yield answer.chunk({}, progress.reason)
        if include_usage and progress.usage is not None:
            yield answer.last_chunk(progress.usage)

    def _end_of(self, count: TokenCount, progress: Progress, notes: Notes) -> Callable[[str | None], None]:
        def ended(reason: str | None) -> None:
            progress.cancel()
            self._count(count, progress, notes)
            reason = "error" if reason is None and progress.error is not None else reason
            if reason is not None:
                self.metrics.broken_streams.labels(reason).inc()
                notes.reason = f"the stream ended early: {reason if progress.error is None else progress.error.logged}"

        return ended

    def _count(self, count: TokenCount, progress: Progress, notes: Notes) -> None:
        """Put the tokens of an answer, complete or not, into metrics and log."""
        if progress.usage is not None:
            self.metrics.count_answer(count.name, progress, progress.usage)
            visual = progress.usage.visual
            notes.tokens = f"{count.method}: {visual.before} -> {visual.after} visual tokens"
            if visual.last_layer not in (None, visual.after):
                notes.tokens += f" and {visual.last_layer} at the last layer"
            notes.tokens += f", {counted(progress.usage.new_tokens, 'new token')}"

    async def tokens(self, request: Request) -> Response:
        """Answer POST /v1/tokens: the tokens of a request to /v1/chat/completions, without answering it."""
        _, _, prepared = await self._prepare(request)
        return JSONResponse(prepared.count.content())

    async def _prepare(self, request: Request) -> tuple[float, ChatRequest, Any]:
        """Read a request. Return when it had arrived, its settings, and what the engine made of it."""
        if (trouble := self.engine.trouble()) is not None:
            raise RequestError(trouble, 503, code="engine_stopped")
        async with self.bodies.read(request) as body:
            arrived = monotonic()
            waiting = self._preparing + self.engine.waiting
            if waiting >= self.settings.max_queue:
                raise overloaded(f"too many requests are waiting ({waiting}); try again later")
            self._preparing += 1
            try:
                async with self._until(arrived):
                    return arrived, *await asyncio.get_running_loop().run_in_executor(self._pool, self._read, body)
            finally:
                self._preparing -= 1

    @asynccontextmanager
    async def _until(self, arrived: float) -> AsyncIterator[None]:
        """Raise `RequestError` if the block takes longer than a request may from its arrival on."""
        limit = self.settings.max_seconds
        try:
            async with asyncio.timeout(max(arrived + limit - monotonic(), 0.0)):
                yield
        except TimeoutError:
            message = f"the request was not answered within {counted(limit, 'second')}"
            raise RequestError(message, 504, code="timeout") from None

    def _read(self, body: bytes) -> tuple[ChatRequest, Any]:
        """Do the blocking part of `_prepare`."""
        request = read_request(body)
        if request.model != self.engine.model:
            raise _unknown_model(request.model, self.engine.model)
        prepared = self.engine.prepare(request)
        return request.model_copy(update={"messages": []}), prepared  # the messages have megabytes of images

    # --- about the server -------------------------------------------------------------------------------------------

    async def home(self, request: Request) -> Response:
        """Answer GET /: send browsers to the playground, if there is one; otherwise name the paths."""
        if any(isinstance(route, Mount) and route.path == PLAYGROUND for route in request.app.routes):
            return RedirectResponse(f"{PLAYGROUND.strip('/')}/")
        return JSONResponse({"vlmzip": __version__, "model": self.engine.model, "paths": PATHS})

    async def models(self) -> Response:
        """Answer GET /v1/models."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def one_model(self, name: str) -> Response:
        """Answer GET /v1/models/NAME."""
        if name != self.engine.model:
            raise _unknown_model(name, self.engine.model)
        return JSONResponse(self._model())

    async def health(self) -> Response:
        """Answer GET /health: 200 if requests can be answered."""
        trouble = self.engine.trouble()
        content = {"status": trouble or "ok", "waiting": self._preparing + self.engine.waiting}
        return JSONResponse(content, 200 if trouble is None else 503)

    async def read_metrics(self) -> Response:
        """Answer GET /metrics."""
        return Response(self.metrics.text_format(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def _model(self) -> dict[str, object]:
        return {"id": self.engine.model, "object": "model", "created": self._created, "owned_by": "vlmzip"}


def _unknown_model(name: str, known: str) -> RequestError:
    message = f"there is no model {name[:100]!r} here; this server has {known!r}"
    return RequestError(message, 404, code="model_not_found", param="model")


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    notes_of(request.scope).reason = error.logged
    return JSONResponse(error.content(), error.status, error.headers)


async def _no_route(request: Request, error: Exception) -> Response:
    """Answer a request for an unknown path, or with a method that its path does not have."""
    assert isinstance(error, HTTPException)
    detail, headers = str(error.detail).lower(), dict(error.headers or {})
    notes_of(request.scope).reason = detail
    message = f"{request.method[:20]} {request.url.path[:100]}: {detail}"
    if error.status_code == 404:
        message += f"; this server has {', '.join(PATHS)}"
    elif error.status_code == 405 and (methods := _methods_of(request)):
        headers = {"Allow": ", ".join(methods)}
        message += f"; use {alternatives(methods)}"
    return JSONResponse(RequestError(message, error.status_code).content(), error.status_code, headers)


def _methods_of(request: Request) -> list[str]:
    """Return the HTTP methods of a path. A path can have several routes."""
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    found = [route.methods or () for route in routes if route.matches(request.scope)[0] is Match.PARTIAL]
    return sorted(set().union(*found))


async def _failed(_request: Request, _error: Exception) -> Response:
    """Answer a request that met a defect. The server writes the traceback to its log."""
    return JSONResponse(RequestError("the server failed on this request", 500, code="internal_error").content(), 500)
