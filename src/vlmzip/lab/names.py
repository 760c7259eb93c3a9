"""File names made from texts and settings."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping


def named(text: str, settings: Mapping[str, object] | None) -> str:
    """Return a readable file name for settings (JSON) that is unique to them."""
    return f"{_plain(text)}-{hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]}"


def slug(text: str) -> str:
    """Return a file name that every file system accepts and that is unique to the text."""
    plain = _plain(text)
    return plain if plain == text else f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._=-]+", "-", text).strip("-.")[:60]
