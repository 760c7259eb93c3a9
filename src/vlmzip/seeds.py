"""Seeds that combine several numbers, such as a run's seed and the number of a step."""

from __future__ import annotations

import hashlib


def mixed(*numbers: int) -> int:
    """Return a seed below 2**56 from a hash of several numbers. Neighbouring numbers give unrelated seeds."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:7])
