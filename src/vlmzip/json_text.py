"""JSON and JSON Lines, read and written in one way by everything in the package.

JSON is what RFC 8259 says, in UTF-8: a mark at the beginning (BOM) is skipped, and what only Python's reader takes is
refused (NaN, Infinity). A name that stands twice in an object is refused too: readers differ in which value they take.
In JSON Lines, a line ends at "\\n" or "\\r\\n" and nowhere else, so that texts may have any other separator (U+2028).
Lines without content are skipped.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from vlmzip.errors import UserError
from vlmzip.files import open_to_read

MARK = b"\xef\xbb\xbf"
BLANK = b" \t\r\n"
#: How files begin that are often taken for JSON, or named like it, and what they are.
OTHER_FILES = {
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"\xff\xff\xff\xff": "an Arrow file",
    b"\x89HDF": "an HDF5 file",
    b"SQLite format 3": "an SQLite database",
    b"\x1f\x8b": "a file compressed by gzip",
    b"BZh": "a file compressed by bzip2",
    b"\xfd7zXZ": "a file compressed by xz",
    b"\x28\xb5\x2f\xfd": "a file compressed by Zstandard",
    b"PK\x03\x04": "a zip archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"\x80": "a Python pickle",
    b"%PDF": "a PDF file",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"version https://git-lfs": "a pointer of Git LFS, which git lfs pull replaces by the file",
    b"<": "a web page or XML",
}
#: No number that anybody means has more digits, and a longer one fits no float.
MOST_DIGITS = 300
#: Escapes of half a character; two of them make a whole one, such as an emoji.
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
#: Separators that JSON may hold as they are, and at which other readers cut lines.
_SEPARATORS = re.compile("[\x7f-\x9f\u2028\u2029]")


class JsonError(ValueError):
    """The text is not JSON; the message says why, without the name of a file."""

    def __init__(self, kind: str, where: str = "") -> None:
        super().__init__(where or kind)
        self.kind = kind
        """The reason in words that are the same for all errors of its kind."""


class Line(NamedTuple):
    """A line of a file that has something in it."""

    number: int
    """The first line of the file is 1; empty lines count."""
    begin: int
    """The place of its first byte in the file."""
    text: bytes
    """With the end of the line, which the last one may lack."""

    @property
    def is_whole(self) -> bool:
        return self.text.endswith(b"\n")


def parse(text: str | bytes) -> Any:
    """Return the one value that the text holds. Raises `JsonError` with a short reason."""
    try:
        decoded = text.decode("utf-8-sig") if isinstance(text, bytes) else text.removeprefix("\ufeff")
        value = _DECODER.decode(decoded.rstrip())
        if _HALF.search(decoded):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise JsonError("no JSON", f"{error.msg} ({where}character {error.colno})") from None
    except UnicodeDecodeError as error:
        raise JsonError("no UTF-8", f"byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
    except UnicodeEncodeError:
        raise JsonError("half a character in the text (a lone surrogate)") from None
    except RecursionError:
        raise JsonError("too many brackets in one another") from None
    return value


def read_json(path: Path, advice: str = "") -> Any:
    """Return what a JSON file holds. Raises `UserError` with the path, the reason and the advice."""
    try:
        with open_json(path) as file:
            return parse(file.read())
    except (OSError, JsonError) as error:
        raise _cannot_read(path, error, advice) from None


def read_lines(path: Path, advice: str = "") -> Iterator[Line]:
    """Yield the lines of a file, one at a time, without parsing them. Raises `UserError` as `read_json` does."""
    try:
        with open_json(path) as file:
            begin = 0
            for number, text in enumerate(file, 1):
                skipped = len(MARK) if number == 1 and text.startswith(MARK) else 0
                if text[skipped:].strip(BLANK):
                    yield Line(number, begin + skipped, text[skipped:])
                begin += len(text)
    except OSError as error:
        raise _cannot_read(path, error, advice) from None


def write_line(content: Any) -> str:
    """Return the content as a line of JSON Lines. NaN and infinite numbers, which JSON does not have, become null."""
    text = json.dumps(_without_nan(content), ensure_ascii=False, allow_nan=False)
    return _SEPARATORS.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n"


def open_json(path: Path) -> BinaryIO:
    """Open a file that should hold JSON. Raises `OSError` with what it is instead, as far as its beginning tells."""
    file = open_to_read(path)
    first = file.peek(64)[:64]
    other = next((kind for mark, kind in OTHER_FILES.items() if first.startswith(mark)), None)
    line = first.split(b"\n")[0]
    if other is None and b"\0" in line and not line.startswith((b"\xff\xfe", b"\xfe\xff")):  # UTF-16 is text
        other = "a binary file"
    if other is not None:
        file.close()
        raise OSError(f"it is {other}, not JSON")
    return file


def _cannot_read(path: Path, error: Exception, advice: str) -> UserError:
    said = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return UserError(f"{str(path)!r} cannot be read: {said}" + (f"; {advice}" if advice else ""))


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _without_nan(part) for name, part in value.items()}
    return [_without_nan(part) for part in value] if isinstance(value, list | tuple) else value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise JsonError("a name that stands twice in an object", f"{twice[:80]!r} stands twice in an object")
    return found


def _whole_number(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise JsonError("a number that is too large", f"a number has {len(text):,} digits")
    return int(text)


def _fraction(text: str) -> float:
    if math.isinf(number := float(text)):
        raise JsonError("a number that is too large", f"the number {text[:20]} is too large")
    return number


def _no_number(name: str) -> Any:
    raise JsonError("no JSON", f"JSON has no number {name}")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_whole_number, parse_float=_fraction, parse_constant=_no_number
)
