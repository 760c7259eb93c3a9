"""Close connections that wait forever, and refuse further ones.

uvicorn limits only the pause between an answer and the next request. Beyond its limit of connections, it refuses the
requests of all of them.
"""

from __future__ import annotations

import asyncio
import json
import logging

from uvicorn.protocols.http.h11_impl import H11Protocol

from vlmzip.serving.server.errors import RequestError

log = logging.getLogger(__name__)

#: Connections at once.
MOST = 1024
#: Seconds in which the line and headers of a request must arrive, from the start of its connection or the last answer.
HEAD = 30.0
#: Seconds for which a client may read nothing of an answer. The system takes a megabyte at once, so a client that reads
#: slowly can seem to read nothing for a while.
UNREAD = 60.0
#: Seconds between two looks at a connection.
EVERY = 1.0


class Connection(H11Protocol):
    """A connection that ends if its client sends no request or does not read the answer, so that others have room."""

    _timer: asyncio.TimerHandle

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MOST:
            log.warning("refused a connection: %s are open", f"{MOST:,}")
            transport.write(_refusal())
            transport.close()
        self._free_since = self._read_at = self.loop.time()
        self._unread = 0
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._free_since = self.loop.time()
        super().on_response_complete()  # begins the next request, if the client has sent it already

    def _watch(self) -> None:
        """Look at the connection from time to time until it ends."""
        self._timer = self.loop.call_later(EVERY, self._watch)
        now, unread = self.loop.time(), self.transport.get_write_buffer_size()
        if unread == 0 or unread != self._unread:
            self._unread, self._read_at = unread, now
        answering = self.cycle is not None and not self.cycle.response_complete
        if now - self._read_at > UNREAD:
            self.transport.abort()  # closing would wait until the client has read everything
        elif not answering and now - self._free_since > HEAD and not self.transport.is_closing():
            self.transport.close()


def _refusal() -> bytes:
    """Return the answer to a connection for which there is no room."""
    error = RequestError(f"the server has no room for another connection (limit {MOST:,}); try again later", 503)
    body = json.dumps(error.content()).encode()
    head = ["HTTP/1.1 503 Service Unavailable", "Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*head, "Retry-After: 1", "Connection: close", "", ""]).encode() + body
