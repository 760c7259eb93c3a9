"""Training records in LLaVA's JSON format, read one at a time from files of any size.

A file is one JSON list, or JSON Lines, of

    {"id": …, "image": "a.jpg" or ["a.jpg", …] or nothing, "conversations": [{"from": "human", "value": "<image>\\n…"},
     {"from": "gpt", "value": "…"}, …]}

with one `<image>` for each image, anywhere in what the human says. `images` is another name for `image`. A video is
`"video": ["1.jpg", "2.jpg", …]`, its frames, with one `<video>` where they stand. What is no such record is counted,
never used.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from vlmzip.errors import UserError
from vlmzip.json_text import JsonError, open_json, parse, read_lines
from vlmzip.runtime.images import ImageError, load_image

PLACE, VIDEO = "<image>", "<video>"
HUMAN, MODEL = ("human", "user"), ("gpt", "assistant")
#: What an image cannot be the name of.
VIDEO_FILES = (".mp4", ".avi", ".mov", ".mkv", ".webm")
#: Bytes read at once while looking for where records begin and end.
CHUNK = 1 << 20
#: Bytes of the longest record of a list. What seems to be longer has a bracket or quote that nothing closes.
LONGEST = 1 << 24


class BadRecord(Exception):
    """A record that cannot be trained on; the message says why, in few words that are the same for all of its kind."""


@dataclass(frozen=True)
class Turn:
    question: str
    """With `PLACE` where an image stands."""
    answer: str


@dataclass(frozen=True)
class TrainingRecord:
    """A conversation, about images or not."""

    id: str
    turns: tuple[Turn, ...]
    images: tuple[str, ...]
    """Paths, in the order of the places."""

    def load_images(self, folder: Path) -> list[Image.Image]:
        """Return the images as every command reads them. Raises `BadRecord` where one is missing or broken."""
        try:
            return [load_image(folder / path) for path in self.images]
        except ImageError as error:
            raise BadRecord(f"an image {error.kind}") from error


def read_record(content: Any) -> TrainingRecord:
    """Raises `BadRecord` for what is no record of LLaVA's format."""
    if not isinstance(content, dict):
        raise BadRecord("not an object")
    said = content.get("conversations")
    if not isinstance(said, list) or not said:
        raise BadRecord("no conversations")
    turns = tuple(_turns(said))
    images, frames = _images(content), _frames(content)
    if sum(turn.question.count(PLACE) for turn in turns) != len(images):
        raise BadRecord(f"not as many {PLACE} as images")
    if sum(turn.question.count(VIDEO) for turn in turns) != bool(frames):
        raise BadRecord(f"not as many {VIDEO} as videos")
    if frames:
        before = "\n".join(turn.question for turn in turns).partition(VIDEO)[0].count(PLACE)
        images[before:before] = frames
        turns = tuple(Turn(turn.question.replace(VIDEO, PLACE * len(frames)), turn.answer) for turn in turns)
    return TrainingRecord(str(content.get("id", "")), turns, tuple(images))


def _images(content: dict[str, Any]) -> list[str]:
    found = [content[name] for name in ("image", "images") if content.get(name) is not None]
    if len(found) > 1:
        raise BadRecord("both image and images")
    paths = found[0] if found else []
    paths = [paths] if isinstance(paths, str) else paths
    if not _are_paths(paths):
        raise BadRecord("image is no path and no list of paths")
    return list(paths)


def _frames(content: dict[str, Any]) -> list[str]:
    if content.get("videos") is not None:
        raise BadRecord("videos: only one video can be given, as video")
    frames = content.get("video")
    frames = [] if frames is None else frames
    named = [frames] if isinstance(frames, str) else frames
    if not _are_paths(named):
        raise BadRecord("video is no list of images")
    if isinstance(frames, str) or any(path.lower().endswith(VIDEO_FILES) for path in named):
        raise BadRecord("a video file; give its frames as a list of images")
    return list(named)


def _are_paths(paths: Any) -> bool:
    return isinstance(paths, list) and all(isinstance(path, str) and path for path in paths)


def _turns(said: Sequence[Any]) -> Iterator[Turn]:
    for one in said:
        if isinstance(one, Mapping) and one.get("from") == "system":
            raise BadRecord("a turn by system; human and gpt alone take turns")
    if len(said) % 2:
        raise BadRecord("a conversation that does not end with an answer")
    for asked, answered in zip(said[::2], said[1::2], strict=True):
        question, answer = _said(asked, HUMAN), _said(answered, MODEL)
        for place in (PLACE, VIDEO):
            if place in answer:
                raise BadRecord(f"an answer with {place}")
        if not answer.strip():
            raise BadRecord("an empty answer")
        yield Turn(question, answer)


def _said(part: Any, who: tuple[str, ...]) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("value"), str):
        raise BadRecord("a part of the conversation without text")
    if part.get("from") not in who:
        raise BadRecord("human and gpt do not take turns")
    try:
        part["value"].encode()
    except UnicodeEncodeError:
        raise BadRecord("half a character in the text (a lone surrogate)") from None
    return part["value"]


class Records:
    """The records of a file; each is read from the disk when it is asked for.

    Records that are none are left out. `numbers` has the place in the file of each of those that are here; `bad` the
    place of each that is not, and the reason.
    """

    def __init__(self, path: Path) -> None:
        """Raises `UserError` for a file that cannot be read, that ends in the middle of a record, or that has none."""
        self.path = path
        self.bad: list[tuple[int, str]] = []
        self.numbers = array("Q")
        self._begins, self._ends, self._images = array("Q"), array("Q"), array("Q")
        try:
            for number, (begin, text) in enumerate(_texts(path)):
                try:
                    images = len(read_record(_parsed(text)).images)
                except BadRecord as reason:
                    self.bad.append((number, str(reason)))
                    continue
                columns = (number, begin, begin + len(text), images)
                for values, value in zip(self._columns(), columns, strict=True):
                    values.append(value)
        except OSError as error:
            raise UserError(f"cannot read {str(path)!r}: {error.strerror or error}") from None
        if not self._begins:
            raise UserError(f"{str(path)!r} has no record to train on{self._first_bad()}")

    def __len__(self) -> int:
        return len(self._begins)

    def __getitem__(self, number: int) -> TrainingRecord:
        with self.path.open("rb") as file:
            file.seek(self._begins[number])
            return read_record(_parsed(file.read(self.size(number))))

    def images(self, number: int) -> int:
        """How many images the record is about."""
        return self._images[number]

    def size(self, number: int) -> int:
        """Bytes of the record in the file: about how long it is."""
        return self._ends[number] - self._begins[number]

    def _columns(self) -> tuple[array, ...]:
        return self.numbers, self._begins, self._ends, self._images

    def _first_bad(self) -> str:
        if not self.bad:
            return ": it is empty"
        return f"; {len(self.bad):,} are bad, the first (record {self.bad[0][0]}): {self.bad[0][1]}"


def _parsed(text: bytes) -> Any:
    try:
        return parse(text)
    except JsonError as error:
        raise BadRecord(error.kind) from None


def _texts(path: Path) -> Iterator[tuple[int, bytes]]:
    """Each record as it stands in the file, and where it begins, in bytes; nothing for one that is no JSON."""
    with open_json(path) as file:
        if not file.seekable():
            raise OSError("it is a pipe, which can be read only once; give a file")
        first = file.read(CHUNK).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    return _elements(path) if first == b"[" else _lines(path)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    for line in read_lines(path):
        yield line.begin, line.text


def _elements(path: Path) -> Iterator[tuple[int, bytes]]:
    """The values of one JSON list.

    One that does not parse, or that no comma follows, is bad; it ends where the next object with "conversations" begins
    that parses. Raises `UserError` for a file that ends in the middle of a value.
    """
    with path.open("rb") as file:
        window = _Window(file)
        begin = window.skip(window.skip(0) + 1)
        while not window.closes(begin):
            window.keep, window.ran_out = begin, False
            value, stop = window.value(begin)
            after = window.skip(stop)
            if value is not BROKEN and (window.character(after) == "," or window.closes(after)):
                yield begin, window.cut(begin, stop)
                begin = window.skip(after + 1) if window.character(after) == "," else after
                continue
            lost, following = _next_record(window, begin + 1)
            if following is None and (window.ran_out or not _ends_closed(path)):
                raise UserError(
                    f"{str(path)!r} ends in the middle of a record, which begins at byte {begin}: was it cut short?"
                    " Get the file whole, or mend that record"
                )
            yield from [(begin, b"")] * max(1, lost)
            if following is None:
                return
            begin = following


def _next_record(window: _Window, at: int) -> tuple[int, int | None]:
    """How many records begin at `at` that do not parse, and where the next one does; `None` where there is none."""
    lost = 0
    while (place := window.search(at)) is not None:
        if window.character(place) == "{":
            window.keep = place
            value, _ = window.value(place)
            if isinstance(value, dict) and "conversations" in value:
                return lost, place
        else:
            lost += 1
        at = place + 1
    return lost, None


def _ends_closed(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LONGEST))
        return file.read().rstrip().endswith(b"]")


#: In place of a value that does not parse.
BROKEN = object()
_DECODER = json.JSONDecoder()
#: With the mark that some editors put before UTF-8.
_BLANK = re.compile("[ \t\r\n\xef\xbb\xbf]*")
_CONVERSATIONS = '"conversations"'
_OPENS_RECORD = re.compile("{|" + _CONVERSATIONS)
#: What the end of the text can change lies no further from it: `-Infinity`, `\\uD83D\\uDE00`.
_UNSURE = 16


class _Window:
    """The part of a file that is in memory, with places counted from the beginning of the file.

    It is read as Latin-1, one character a byte: what JSON is made of looks the same there as in UTF-8.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._text, self._start = file, "", 0
        self.keep = 0
        """Where what must stay in memory begins."""
        self.ran_out = False
        """Whether the file ended before a value did."""

    def character(self, at: int) -> str:
        """Empty behind the end of the file."""
        return self._text[at - self._start : at - self._start + 1]

    def cut(self, begin: int, end: int) -> bytes:
        return self._text[begin - self._start : end - self._start].encode("latin-1")

    def skip(self, at: int) -> int:
        """The place of the first character from `at` on that is no blank, or of the end of the file."""
        while True:
            found = _BLANK.match(self._text, at - self._start)
            at = max(at, self._start + found.end()) if found else at
            if at < self._end() or not self._read():
                return at

    def closes(self, at: int) -> bool:
        """Whether the list ends at `at`, and with it the file."""
        return self.character(at) == "]" and self.character(self.skip(at + 1)) == ""

    def search(self, at: int) -> int | None:
        """The next place from `at` on that opens an object or is the key of conversations."""
        while True:
            if found := _OPENS_RECORD.search(self._text, at - self._start):
                return self._start + found.start()
            self.keep = at = max(at, self._end() - len(_CONVERSATIONS) + 1)  # the key may be cut in two
            if not self._read():
                return None

    def value(self, at: int) -> tuple[Any, int]:
        """The JSON value at `at` and where it ends, or `BROKEN` and where it begins to be wrong."""
        while True:
            value, stop = _decoded(self._text, at - self._start)
            if stop < len(self._text) - _UNSURE or not self._read():
                break
        stop += self._start
        self.ran_out |= value is BROKEN and self.character(self.skip(stop)) == ""
        return value, stop

    def _end(self) -> int:
        return self._start + len(self._text)

    def _read(self) -> bool:
        """Reads on, as much again as is kept, so that nothing is looked at often. False where there is no more."""
        kept = self._text[self.keep - self._start :]
        more = self._file.read(max(CHUNK, len(kept))) if len(kept) < LONGEST else b""
        if more:
            self._text, self._start = kept + more.decode("latin-1"), self.keep
        return bool(more)


def _decoded(text: str, at: int) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        unclosed = error.msg.startswith("Unterminated string")
        return BROKEN, len(text) if unclosed else error.pos
    except (ValueError, RecursionError):  # a number of thousands of digits; too many brackets in one another
        return BROKEN, at
