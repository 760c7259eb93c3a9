"""The log of requests: one line for each, without images, keys and texts of messages."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from urllib.parse import quote

from starlette.types import Scope

log = logging.getLogger(__name__)

#: Where the notes of a request are in its scope.
NOTES = "vlmzip.notes"
#: Characters of an HTTP method, path or reason in a line.
LONGEST = 200


@dataclass
class Notes:
    """What the log says about a request besides its path, status and time."""

    tokens: str = ""
    """The method, and the visual tokens before and after."""
    reason: str = ""
    """Why the request was refused, or its answer ended early."""


def notes_of(scope: Scope) -> Notes:
    """Return the notes of a request, which all that handle it can change."""
    notes: Notes = scope.setdefault(NOTES, Notes())
    return notes


def log_request(scope: Scope, status: int, seconds: float) -> None:
    """Log an answered request, unless it is a read that browsers and monitors repeat and that succeeded."""
    if status < 400 and scope["method"] in ("GET", "HEAD") and not scope["path"].startswith("/v1/"):
        return
    notes = notes_of(scope)
    method, path = (quote(scope[part][:LONGEST]) for part in ("method", "path"))
    now = datetime.now(UTC).astimezone().isoformat(timespec="seconds")
    line = f"{now} {method} {path} {status} {seconds:.3f} s"
    line += f", {notes.tokens}" if notes.tokens else ""
    log.info("%s", f"{line}: {_plain(notes.reason)}" if notes.reason else line)


def _plain(text: str) -> str:
    """Return a text of a request on one line, without characters that a terminal would obey."""
    shown = text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
    return "".join(letter if letter.isprintable() else "?" for letter in shown)
