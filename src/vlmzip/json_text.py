"""Read and write JSON and JSON Lines; the whole package uses these functions.

JSON follows RFC 8259, in UTF-8. A byte order mark (BOM) at the beginning is skipped. NaN and Infinity, which Python's
own reader accepts, are refused. So is a key that occurs twice in an object, because readers differ in which value they
take. In JSON Lines, only "\\n" or "\\r\\n" ends a line, so a text may contain any other separator (U+2028). Blank lines
are skipped.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

from vlmzip.errors import UserError
from vlmzip.files import open_to_read

MARK = b"\xef\xbb\xbf"
BLANK = b" \t\r\n"
#: First bytes of other files that users mistake for JSON, and what each file is.
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
    b"version https://git-lfs": "a Git LFS pointer, which git lfs pull replaces by the file",
    b"<": "a web page or XML",
}
#: The longest number to read, in digits. A number with more is a mistake, and most are too large for a float.
MOST_DIGITS = 300
#: Escapes of surrogates, which are half a character each; a pair is one character, such as an emoji.
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
#: Separators that JSON allows unescaped, but at which other readers split lines.
_SEPARATORS = re.compile("[\x7f-\x9f\u2028\u2029]")


class JsonError(ValueError):
    """Invalid JSON. The message gives the reason, without a file name."""

    def __init__(self, kind: str, where: str = "") -> None:
        super().__init__(where or kind)
        self.kind = kind
        """The reason without details, the same text for all errors of one kind."""


class Line(NamedTuple):
    """A line of a file that is not blank."""

    number: int
    """The line number, from 1; blank lines count."""
    begin: int
    """The offset of the line's first byte in the file."""
    text: bytes
    """The line with its line ending, which the last line may lack."""

    @property
    def is_whole(self) -> bool:
        """Return whether the line has its line ending: the writer may have been stopped in the middle of it."""
        return self.text.endswith(b"\n")


def parse(text: str | bytes) -> Any:
    """Return the JSON value in the text. Raise `JsonError` with a short reason."""
    try:
        decoded = text.decode("utf-8-sig") if isinstance(text, bytes) else text.removeprefix("\ufeff")
        value = _DECODER.decode(decoded.rstrip())
        if _HALF.search(decoded):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise JsonError("invalid JSON", f"{error.msg} ({where}character {error.colno})") from None
    except UnicodeDecodeError as error:
        raise JsonError("invalid UTF-8", f"byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
    except UnicodeEncodeError:
        raise JsonError("half a character in the text (a lone surrogate)") from None
    except RecursionError:
        raise JsonError("brackets nested too deeply") from None
    return value


def read_json(path: Path, advice: str = "") -> Any:
    """Return the content of a JSON file. Raise `UserError` with the path, the reason and the advice."""
    try:
        with open_json(path) as file:
            return parse(file.read())
    except (OSError, JsonError) as error:
        raise _cannot_read(path, error, advice) from None


def read_lines(path: Path, advice: str = "") -> Iterator[Line]:
    """Yield the lines of a file that are not blank, unparsed. Raise `UserError` like `read_json`."""
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


def write_line(content: object) -> str:
    """Return the content as a line of JSON Lines. NaN and infinite numbers become null: JSON has neither."""
    text = json.dumps(_without_nan(content), ensure_ascii=False, allow_nan=False)
    return _SEPARATORS.sub(lambda match: f"\\u{ord(match[0]):04x}", text) + "\n"


def open_json(path: Path) -> BinaryIO:
    """Open a file that should contain JSON. Raise `OSError` that names the format if the first bytes are another's."""
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
    cause = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return UserError(f"{str(path)!r} cannot be read: {cause}" + (f"; {advice}" if advice else ""))


def _without_nan(value: object) -> object:
    """Return the value with null in place of every NaN and infinite number, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _without_nan(part) for name, part in value.items()}
    return [_without_nan(part) for part in value] if isinstance(value, list | tuple) else value


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise JsonError("a duplicate key in an object", f"{twice[:80]!r} occurs twice in an object")
    return content


def _whole_number(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise JsonError("a number that is too large", f"a number has {len(text):,} digits")
    return int(text)


def _fraction(text: str) -> float:
    if math.isinf(number := float(text)):
        raise JsonError("a number that is too large", f"the number {text[:20]} is too large")
    return number


def _no_number(name: str) -> NoReturn:
    raise JsonError("invalid JSON", f"JSON has no number {name}")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_whole_number, parse_float=_fraction, parse_constant=_no_number
)
