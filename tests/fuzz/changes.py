"""Ways to break a text, bytes, or the tree of a JSON file. Each way draws its change from `rng`."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

#: Inputs that programs tend to forget: limits of numbers, odd characters, characters with a meaning, other types.
WORDS = (
    *("", " ", "0", "-1", "1", "2", "0.5", "50%", "1e9", "1e400", "nan", "inf", "9" * 30, "9" * 400, "0x10", "1_0"),
    *("None", "null", "true", "[]", "{}", "(", ")", "((", "=", ",", "+", ":", "'", '"', "%", "#", "&x", "*x", "\\"),
    *("\n", "\t", "\r", "\u2028", "\ufeff", "\u202e", "é", "日本", "🙂", "\udc80", "a" * 300, "b/" * 200, "-", "--"),
    *(
        "--json",
        "-h",
        "mini",
        "visionzip",
        "fastv(layer=2)",
        "<image>",
        "{image}",
        "{{",
        "{%",
        "!!python/name:os.system",
    ),
    *("/dev/null", ".", "..", "no/file", "meta", "cuda:99", "as-set", "all"),
)
VALUES = (
    None, True, False, 0, 1, -1, 2, 3, 10**9, 2**63, 10**30, 0.5, -0.5, 1e300, float("nan"), float("inf"),
    "", "x", "mini", "1", "float32", "a" * 300, "\ud800", "\u2028", [], {}, [None], [1, 2], ["x"], {"x": 1}, [[[[1]]]],
)  # fmt: skip
DEEP = 100_000


def text(rng: random.Random, old: str) -> str:
    """Replace, insert, double or delete a part of a text, or replace it all."""
    begin = rng.randrange(len(old) + 1)
    end = min(len(old), begin + rng.choice((1, 1, 2, 5, 20)))
    new = rng.choice((rng.choice(WORDS), old[begin:end] * 2, "", chr(rng.randrange(32, 127))))
    return rng.choice((old[:begin] + new + old[end:], old[:begin] + new + old[begin:], old[:begin], new))


def data(rng: random.Random, old: bytes) -> bytes:
    """Cut off, delete, double, overwrite or flip bytes; half of the time near the beginning, where headers are."""
    begin = rng.randrange(min(len(old), 64) if rng.random() < 0.5 else len(old)) if old else 0
    end = begin + rng.choice((1, 1, 2, 4, 16, 500))
    how = rng.randrange(6)
    if how == 0:
        return old[:begin]
    if how == 1:
        return old[:begin] + old[end:]
    if how == 2:
        return old[:begin] + old[begin:end] * 2 + old[end:]
    if how == 3:
        return old[:begin] + rng.choice((b"\x00", b"\xff")) * (end - begin) + old[end:]
    if how == 4:
        return old[:begin] + rng.randbytes(end - begin) + old[end:]
    return old[:begin] + bytes([old[begin] ^ 1 << rng.randrange(8)]) + old[begin + 1 :] if old else b"\x00"


def tree(rng: random.Random, old: Any) -> Any:
    """Replace, remove, rename or double one node of a JSON or YAML value."""
    new = copy.deepcopy(old)
    nodes = list(_nodes(new))
    if not nodes:
        return rng.choice(VALUES)
    parent, key = rng.choice(nodes)
    how = rng.random()
    if how < 0.6:
        parent[key] = rng.choice(VALUES)
    elif how < 0.7:
        parent[key] = _like(rng, parent[key])
    elif how < 0.8:
        del parent[key]
    elif how < 0.9 and isinstance(parent, dict):
        parent[rng.choice((text(rng, key) if key else "x", *parent))] = parent.pop(key)
    else:
        other, place = rng.choice(nodes)
        parent[key] = copy.deepcopy(other[place])
    return new


def json_file(rng: random.Random, old: bytes) -> bytes:
    """Change the content of a JSON file; the result is mostly still JSON."""
    how = rng.random()
    if how < 0.2:
        return data(rng, old)
    if how < 0.22:
        return rng.choice((b"[", b'{"a":')) * DEEP
    try:
        return json.dumps(tree(rng, json.loads(old))).encode()
    except (ValueError, RecursionError):  # an earlier change broke it
        return data(rng, old)


def json_lines(rng: random.Random, old: bytes) -> bytes:
    """Change, double or delete one line of JSON Lines, or insert an empty line."""
    lines = old.split(b"\n")
    place = rng.randrange(len(lines))
    lines[place : place + 1] = rng.choice(([json_file(rng, lines[place])], [lines[place]] * 2, [], [b"", lines[place]]))
    return b"\n".join(lines)


def _nodes(value: Any) -> Any:
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _nodes(value[key])


def _like(rng: random.Random, value: Any) -> Any:
    """Return another value of the same type; a list of two for other types than text and numbers."""
    if isinstance(value, str):
        return text(rng, value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return [value, value]
    return rng.choice((-value, value + 1, value * 1000, value / 3))
