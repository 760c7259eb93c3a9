"""Run the server in this process until a signal or the end of its engine."""

from __future__ import annotations

import logging
import signal
import socket
from collections.abc import Callable, Sequence

import uvicorn
from starlette.types import ASGIApp

from vlmzip.compressor import Compressor
from vlmzip.errors import UserError
from vlmzip.runtime.loading import Loaded
from vlmzip.serving.playground.examples import Example
from vlmzip.serving.playground.mount import mount
from vlmzip.serving.server.app import create_app
from vlmzip.serving.server.connection import MOST, Connection
from vlmzip.serving.server.metrics import Metrics
from vlmzip.serving.server.settings import Settings
from vlmzip.serving.server.stored import ImageStore
from vlmzip.serving.server.worker import HuggingFaceEngine

log = logging.getLogger(__name__)

#: Seconds that the end of the server waits for answers that have begun.
GRACE = 30
#: Seconds for which a connection without a next request stays open after an answer.
IDLE = 15


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens. Raise `UserError` if the address cannot be used."""
    if not 0 <= port < 2**16:
        raise UserError(f"--port must be from 0 to {2**16 - 1}, got {port}")
    try:
        kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=kind, backlog=MOST)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot listen on {host}:{port}: {reason}; give another --host or --port") from None


def run(
    loaded: Loaded,
    compressor: Compressor,
    settings: Settings,
    listening: socket.socket,
    name: str | None = None,
    ready: Callable[[str], None] = lambda address: None,
    examples: Sequence[Example] | None = None,
    store: ImageStore | None = None,
) -> bool:
    """Serve a model until SIGINT or SIGTERM, and let begun answers end. Return whether the engine lived until then.

    `ready` gets the address once requests are accepted. With `examples`, which may be empty, the server has the
    playground. Requests can name the images of `store`.
    """
    metrics = Metrics()
    engine = HuggingFaceEngine(loaded, compressor, settings, metrics, name, store)
    dead: list[bool] = []

    def died() -> None:
        dead.append(True)
        server.should_exit = True

    app = create_app(engine, settings, metrics, died)
    if examples is not None:
        mount(app, engine, settings, examples)
    server = _Server(config_of(app), lambda: ready(_address_of(listening)))
    # uvicorn raises a signal again after it has ended well. Then there is nothing left to do.
    before = {each: signal.signal(each, lambda *_: None) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(sockets=[listening])
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    return not dead


def config_of(app: ASGIApp) -> uvicorn.Config:
    """Return the settings of the web server."""
    return uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=IDLE,
        timeout_graceful_shutdown=GRACE,
    )


class _Server(uvicorn.Server):
    """A server that says when it accepts requests."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()


def _address_of(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
