"""Errors that a client gets, in the JSON shape of OpenAI's API."""

from __future__ import annotations

import json
from collections.abc import Mapping

from starlette.types import Send

from vlmzip.errors import UserError

#: The `type` of an error by its status; other statuses below 500 are "invalid_request_error".
TYPES = {401: "authentication_error", 429: "rate_limit_error"}
#: The status of a request whose client has gone. Nobody receives it; metrics count it.
CLIENT_GONE = 499
#: The longest message. Parts of a request in a message are cut before that.
LONGEST = 500


class RequestError(Exception):
    """A request that gets an error as its answer."""

    def __init__(
        self,
        message: str,
        status: int = 400,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        logged: str | None = None,
    ) -> None:
        """Say `message` to the client, and `logged` to the operator, by default the same."""
        super().__init__(message)
        self.message, self.status, self.code, self.param = message[:LONGEST], status, code, param
        self.headers = dict(headers or {})
        self.logged = logged or self.message

    def content(self) -> dict[str, object]:
        """Return the JSON of the answer."""
        kind = "server_error" if self.status >= 500 else TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def from_user_error(error: UserError, what: str, code: str, param: str | None = None) -> RequestError:
    """Return the error of a request for one of vlmzip, whose text can quote an error of a library.

    Libraries quote what a request contains. So the log says only `what` and the type of their error.
    """
    cause = error.__cause__ or error.__context__
    logged = None if cause is None else f"{what}: failed with {type(cause).__name__}"
    return RequestError(str(error), code=code, param=param, logged=logged)


def overloaded(message: str, seconds: int = 1) -> RequestError:
    """Return the error for a request that the server has no room for now."""
    return RequestError(message, 429, code="overloaded", headers={"Retry-After": str(seconds)})


async def send_error(error: RequestError, send: Send) -> None:
    """Send an error as a whole answer."""
    body = json.dumps(error.content()).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **error.headers}
    encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
