"""Names of files that say what is in them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping


def named(text: str, settings: Mapping[str, object] | None) -> str:
    """Return a name for files of some settings (JSON): readable, and no other settings have it."""
    return f"{_plain(text)}-{hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]}"


def slug(text: str) -> str:
    """Return a name that every file system takes: the text itself, or something like it that no other text has."""
    plain = _plain(text)
    return plain if plain == text else f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._=-]+", "-", text).strip("-.")[:60]
