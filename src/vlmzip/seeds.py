"""Seeds made of several numbers, such as a run's seed and the number of a step."""

from __future__ import annotations

import hashlib


def mixed(*numbers: int) -> int:
    """Return a seed that mixes several numbers; neighbouring numbers give unrelated seeds."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:7])
